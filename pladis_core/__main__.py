"""`python -m pladis_core`: PLADIS on one small cross-attention, as a figure and as measured numbers. No ComfyUI."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import entmax, pladis_attention, pladis_weights

GRID = 16
TOKENS = ("<start>", "red", "fox", "beside", "frozen", "lake", "under", "pines", "and", "pink", "sky", "<end>")
REGIONS = ("fox", "lake", "pines", "sky")
# how strongly a word that is not a region's own asks for it: adjectives nearly as much as their noun
COMPANIONS = {"red": ("fox", 0.8), "frozen": ("lake", 0.85), "pink": ("sky", 0.9)}
WORD_GAIN = 5.0
# like the start token of CLIP, it draws a little attention from everywhere
SINK = 1.2
NOISE = 0.25
TIMED_SHAPE = (8, 1024, 77, 40)
TIMED_ROUNDS = 4
ZERO_COLOUR = "#c9ced6"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figure and print the numbers; returns the exit status.

    Args:
        argv: command line without the program's name; sys.argv's when None.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    missing = [name for name in ("matplotlib", "entmax") if find_spec(name) is None]
    if missing:
        print(
            f"python -m pladis_core needs {' and '.join(missing)}, of the extra `demo`: "
            'pip install -e ".[demo]" in the repository',
            file=sys.stderr,
        )
        return 1
    query, key, value = example(args.seed)
    scores = (query @ key.mT * query.shape[-1] ** -0.5)[0, 0]
    try:
        maps = {
            "dense": scores.softmax(-1),
            "sparse": entmax(scores, args.alpha),
            "extrapolated": pladis_weights(scores, args.lam, args.alpha),
        }
    except ValueError as error:
        parser.error(str(error))
    for line in measure(maps, query, key, value, args.lam, args.alpha):
        print(line)
    try:
        draw(maps, args.lam, args.alpha, args.out)
    except (OSError, ValueError) as error:
        parser.error(f"cannot write {args.out}: {error}")
    print(f"wrote {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pladis_core", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--out", type=Path, default=Path("pladis.png"), help="the figure (default: %(default)s)")
    parser.add_argument("--lam", type=float, default=2.0, help="0 is dense, 1 sparse, above extrapolates")
    parser.add_argument("--alpha", type=float, default=1.5, help="1 is softmax, 2 sparsemax")
    parser.add_argument("--seed", type=int, default=0, help="of the example's noise (default: %(default)s)")
    return parser


def example(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (1, 1, 256, D), key and value (1, 1, 12, D): a picture's places ask, the words of its prompt answer."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[(torch.arange(GRID) + 0.5) / GRID] * 2, indexing="ij")
    fields = {
        "sky": torch.sigmoid((0.34 - y) * 16),
        "pines": torch.exp(-(((y - 0.42) / 0.17) ** 2)) * torch.sigmoid((x - 0.3) * 12),
        "lake": torch.sigmoid((y - 0.58) * 16) * torch.sigmoid((x - 0.4) * 14),
        "fox": torch.exp(-(((x - 0.24) / 0.16) ** 2) - ((y - 0.7) / 0.2) ** 2),
    }
    places = torch.stack([fields[name].flatten() for name in REGIONS] + [torch.ones(GRID * GRID)], 1)
    words = torch.zeros(len(TOKENS), len(REGIONS) + 1)
    for row, token in zip(words, TOKENS, strict=True):
        region, strength = COMPANIONS.get(token, (token, 1.0))
        if region in REGIONS:
            row[REGIONS.index(region)] = strength * WORD_GAIN
    words[0, -1] = SINK
    # noise in dimensions of its own, so that every word sees a slightly uneven picture
    noise = [torch.randn(n, 16, generator=generator) * NOISE**0.5 / 2 for n in (len(places), len(words))]
    query, key = torch.cat([places, noise[0]], 1), torch.cat([words, noise[1]], 1)
    query = query * query.shape[-1] ** 0.5
    value = torch.randn(key.shape, generator=generator)
    return query[None, None], key[None, None], value[None, None]


def measure(
    maps: dict[str, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lam: float,
    alpha: float,
) -> list[str]:
    """The figures of this run, one line each."""
    sparse, mixed = maps["sparse"], maps["extrapolated"]
    row_error = max(float((weights.sum(-1) - 1).abs().max()) for weights in maps.values())
    eager, reference = (
        pladis_attention(query, key, value, lam=lam, alpha=alpha, backend=name) for name in ("eager", "reference")
    )
    dense = scaled_dot_product_attention(query, key, value)
    off = pladis_attention(query, key, value, lam=0.0, alpha=alpha)
    ratio = time_ratio(lam, alpha)
    heads, queries, keys, width = TIMED_SHAPE
    return [
        f"lam {lam:g}, alpha {alpha:g}: {len(mixed)} places, {len(TOKENS)} words",
        f"exact zeros among the sparse weights     {float((sparse == 0).float().mean()):.1%}",
        f"mean support, words per place            {float((sparse > 0).sum(-1).float().mean()):.2f}",
        f"negative mass per place, extrapolated    {float(mixed.clamp(max=0).sum(-1).mean().abs()):.4f}",
        f"row sums, largest distance from 1        {row_error:.1e}",
        f"eager against the entmax package         {float((eager - reference).abs().max()):.1e}",
        f"lam 0 against torch's softmax attention  {float((off - dense).abs().max()):.1e}",
        f"time, eager / reference                  {ratio:.2f}  "
        f"({heads} heads, {queries} queries, {keys} keys, head width {width})",
    ]


def time_ratio(lam: float, alpha: float) -> float:
    """Time of the eager backend over that of the reference: best of several turns each, as load makes noise."""
    heads, queries, keys, width = TIMED_SHAPE
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, width, generator=generator) for n in (queries, keys, keys))

    def seconds(backend: str) -> float:
        return _seconds(lambda: pladis_attention(query, key, value, lam=lam, alpha=alpha, backend=backend))

    turns = [(seconds("eager"), seconds("reference")) for _ in range(TIMED_ROUNDS)]
    eager, reference = map(min, zip(*turns, strict=True))
    return eager / reference


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def draw(maps: dict[str, torch.Tensor], lam: float, alpha: float, path: Path) -> None:
    """One column per word, one row per kind of weights; each square is the picture's grid of places."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    labels = {
        "dense": "dense\nsoftmax",
        "sparse": f"sparse\n{alpha:g}-entmax",
        "extrapolated": f"extrapolated\n$\\lambda$ = {lam:g}",
    }
    figure = Figure(figsize=(15.0, 4.6), dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, len(TOKENS) + 1, width_ratios=[1] * len(TOKENS) + [0.1],
        left=0.088, right=0.962, top=0.825, bottom=0.085, wspace=0.09, hspace=0.09,
    )  # fmt: skip
    title = f"How much each place of a {GRID} x {GRID} picture attends to each word"
    figure.text(0.088, 0.935, title, fontsize=15, weight="bold")
    positive = Normalize(0.0, float(max(maps["dense"].max(), maps["sparse"].max())))
    for row, (name, weights) in enumerate(maps.items()):
        signed = name == "extrapolated"
        norm = _signed_norm(weights) if signed else positive
        for column, token in enumerate(TOKENS):
            axes = figure.add_subplot(grid[row, column], xticks=[], yticks=[])
            image = _heatmap(axes, weights[:, column], norm, signed, hide_zeros=name == "sparse")
            if row == 0:
                axes.set_title(token, fontsize=12, pad=6)
            if column == 0:
                axes.set_ylabel(labels[name], fontsize=12, rotation=0, ha="right", va="center", labelpad=10)
        # shorter than its row, so that the outermost numbers of two rows keep apart
        slot = figure.add_subplot(grid[row, len(TOKENS)])
        slot.set_axis_off()
        strip = slot.inset_axes((0.0, 0.1, 1.0, 0.8))
        ticks = sorted({float(bound) for bound in (norm.vmin, 0.0, norm.vmax) if bound is not None})
        bar = figure.colorbar(image, cax=strip, ticks=ticks, format=lambda weight, _: f"{weight:.2g}")
        bar.ax.tick_params(labelsize=9, length=2)
        bar.outline.set_visible(False)
    _legend(figure)
    figure.savefig(path)


def _heatmap(axes, weights: torch.Tensor, norm, signed: bool, hide_zeros: bool):
    from matplotlib import colormaps

    shades = colormaps["RdBu_r" if signed else "Reds"].with_extremes(bad=ZERO_COLOUR)
    values = weights.reshape(GRID, GRID)
    if hide_zeros:
        values = values.masked_fill(values == 0, torch.nan)
    for spine in axes.spines.values():
        spine.set_color("0.75")
    return axes.imshow(values.numpy(), cmap=shades, norm=norm, interpolation="nearest")


def _signed_norm(weights: torch.Tensor):
    """Zero is white. The negative side has a scale of its own: many small weights, next to a few large ones."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(0.0, min(float(weights.min()), -1e-3), max(float(weights.max()), 1e-3))


def _legend(figure) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(color="#b2182b", label="positive weight"),
            Patch(color=ZERO_COLOUR, label="exactly 0: this place ignores the word"),
            Patch(color="#2166ac", label="negative weight (on a scale of its own): pushed away from the word"),
        ],
        loc="lower center", bbox_to_anchor=(0.515, -0.01), ncols=3, frameon=False, fontsize=11,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
