"""Captions drawn without guidance, with it and by the few-step student, at several strengths of PLADIS.

    python -m demo
    python -m demo "a small red circle left of an outlined blue square"

Without a caption, the first held-out captions of seed 1: chosen by this rule, never by how they come out. Every setting
starts from the same noise. Writes a labelled picture and prints what the oracle reads.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from .attention import TextAttention
from .oracle import Score, read, score
from .pipeline import VARIANTS, Pipeline
from .sampling import noise
from .scenes import Placed, Prompt, random_prompts
from .vocabulary import read_caption, tokenize

LAMBDAS = (0.0, 0.5, 1.0, 2.0)
# of captions and noise
SEED = 1
# to be read on a phone: letters of 20 pixels, pictures of 192 or more
DPI, TEXT = 140, 10.5


@dataclass(frozen=True)
class Way:
    """A way of sampling: variant of the model, Euler steps, guidance scale; and the lambda that goes with `words only`
    there, by the table in docs/evidence.md."""

    variant: str
    steps: int
    cfg: float
    words_lam: float

    def __str__(self) -> str:
        guidance = f"CFG {self.cfg:g}" if self.cfg != 1 else "no guidance"
        return f"{self.variant} model, {self.steps} step{'s' if self.steps > 1 else ''}, {guidance}"


WAYS = (Way("standard", 20, 1.0, 2.0), Way("standard", 20, 3.0, 1.0), Way("few-step", 4, 1.0, 1.0))


@dataclass(frozen=True)
class Block:
    """What one way of sampling made: pictures[row][setting], and what the oracle sees in each."""

    way: Way
    labels: list[str]
    pictures: list[np.ndarray]
    seen: list[list[list[Placed]]]


def main() -> None:
    args = _arguments()
    prompts = [read_caption(args.caption)] * args.count if args.caption else random_prompts(args.count, "report", SEED)
    settings = {way: _settings(args, way) for way in _ways(args)}
    with tqdm(total=sum(way.steps * len(of_way) for way, of_way in settings.items()), desc="sampling",
              unit="step") as bar:  # fmt: skip
        blocks = [_sample(way, prompts, of_way, args.seed, bar) for way, of_way in settings.items()]
    for block in blocks:
        _print(block, prompts)
    _draw(blocks, prompts, args.out)
    print(f"\n{args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("caption", nargs="?", help="default: the first held-out captions")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS, help="0 is softmax (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=1.5, help="1 is softmax, 2 is sparsemax (default: %(default)s)")
    parser.add_argument("--words-lambda", type=float, help="with `words only` (default: by way of sampling, 1 or 2)")
    parser.add_argument("--temperature", type=float, help="also softmax with the scores times that")
    parser.add_argument("--variant", choices=VARIANTS, help="this one alone; few-step: distilled, without guidance")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the variant's own)")
    parser.add_argument("--cfg", type=float, help="guidance scale (default: the variant's own)")
    parser.add_argument("--count", type=int, default=3, help="captions, or pictures of one (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pladis_demo.png"))
    args = parser.parse_args()
    if args.count < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--count and --steps must be at least 1")
    if not 1 <= args.alpha <= 2:
        parser.error(f"--alpha must be from 1 to 2, not {args.alpha}")
    try:
        tokenize(args.caption or "")
    except ValueError as error:
        parser.error(str(error))
    return args


def _settings(args: argparse.Namespace, way: Way) -> dict[str, TextAttention]:
    settings = {f"lambda {lam:g}" if lam else "softmax": TextAttention(lam, args.alpha) for lam in args.lambdas}
    lam = way.words_lam if args.words_lambda is None else args.words_lambda
    settings[f"lambda {lam:g}, words only"] = TextAttention(lam, args.alpha, tokens="words only")
    if args.temperature is not None:
        settings[f"temperature {args.temperature:g}"] = TextAttention(temperature=args.temperature)
    return settings


def _ways(args: argparse.Namespace) -> tuple[Way, ...]:
    if (args.variant, args.steps, args.cfg) == (None, None, None):
        return WAYS
    variant = args.variant or "standard"
    _, steps, cfg = VARIANTS[variant]
    cfg = cfg if args.cfg is None else args.cfg
    return (Way(variant, args.steps or steps, cfg, 2.0 if cfg == 1 and variant == "standard" else 1.0),)


def _sample(way: Way, prompts: Sequence[Prompt], settings: dict[str, TextAttention], seed: int, bar: tqdm) -> Block:
    pipeline = Pipeline(way.variant)
    captions = [prompt.text for prompt in prompts]
    start = noise(seed, len(captions))
    columns = [
        pipeline.decode(pipeline.latents(captions, start, attention, way.steps, way.cfg, callback=bar.update))
        for attention in settings.values()
    ]
    rows = [np.stack(row) for row in zip(*columns, strict=True)]
    return Block(way, list(settings), rows, [[read(picture) for picture in row] for row in rows])


def _print(block: Block, prompts: Sequence[Prompt]) -> None:
    name = str(block.way)
    print(f"\n{name[0].upper()}{name[1:]}. What the oracle reads, from top to bottom of each picture:")
    for prompt, row in zip(prompts, block.seen, strict=True):
        print(f"  {prompt.text}")
        for label, objects in zip(block.labels, row, strict=True):
            there = ", ".join(str(placed.kind) for placed in sorted(objects, key=lambda placed: placed.y)) or "nothing"
            print(f"    {label + ':':<22} {_verdict(prompt, objects):<18} {there}")


def _verdict(prompt: Prompt, objects: Sequence[Placed]) -> str:
    """Such as "2 of 3 and 1 more"; nothing for a caption without objects."""
    result: Score = score(prompt, objects)
    extra = max(result.seen - result.found, 0)
    return f"{result.found} of {result.named}{f' and {extra} more' if extra else ''}" if prompt.objects else ""


def _draw(blocks: Sequence[Block], prompts: Sequence[Prompt], out: Path) -> None:
    """One part for each way of sampling: a line for each caption, a column for each setting."""
    lines, columns = len(prompts), len(blocks[0].labels)
    figure = plt.figure(figsize=(1.9 * columns, (2.75 * lines + 0.5) * len(blocks)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False)[:, 0]
    for part, block in zip(parts, blocks, strict=True):
        part.suptitle(str(block.way), fontsize=14, fontweight="bold")
        for line, prompt in zip(part.subfigures(lines, 1, squeeze=False)[:, 0], prompts, strict=True):
            line.suptitle(textwrap.fill(prompt.text, 22 * columns), fontsize=TEXT)
        for number, line in enumerate(part.subfigs):
            for column, axis in enumerate(line.subplots(1, columns, squeeze=False)[0]):
                axis.imshow(block.pictures[number][column])
                axis.set(xticks=[], yticks=[])
                axis.set_title(block.labels[column], fontsize=TEXT)
                axis.set_xlabel(_verdict(prompts[number], block.seen[number][column]), fontsize=TEXT, labelpad=2)
    figure.savefig(out, dpi=DPI)
    plt.close(figure)


if __name__ == "__main__":
    main()
