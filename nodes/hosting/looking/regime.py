"""In which regime a model is: what its text attention looks like to PLADIS, and what that suggests to try.

Three facts that follow from the equations decide: a key more than 1 / (alpha - 1) nats below the largest is pruned, and
turns negative beyond scale 1; keys that say nothing take part in the mix; and near even attention over n tokens the mix
is `sharpening_factor` times as steep as softmax. From where on a fact is named is our choice, not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....pladis_core import LayerReport, sharpening_factor
from ..models.tokens import OTHER, PADDING, START, WORD

# kinds of tokens in each part of the report
PARTS = {"start": START, "words": WORD, "padding": OTHER + PADDING}
# shares of the text's attention
SINK, PADDED = 0.4, 0.3
# times as steep as softmax, at the paper's scale
STEEP, FLAT, PAPER, PAPER_ALPHA = 5.0, 1.5, 2.0, 1.5


def parts_of(kinds: tuple[str, ...]) -> dict[str, list[int]]:
    """The key positions of each of `PARTS` that is told for all rows, which are alike."""
    told = set(kinds)
    if len(told) != 1:
        return {}
    (row,) = told
    known = {name: [i for i, kind in enumerate(row) if kind in letters] for name, letters in PARTS.items()}
    covered = sum(map(len, known.values())) == len(row)
    return {name: places for name, places in known.items() if places and (covered or name == "start")}


def mean_mass(reports: Sequence[LayerReport], part: str, kind: int = 0) -> float | None:
    """Of the layers that have this part: the share that softmax (kind 0) or the mix (1) puts on it."""
    found = [report.masses[part][kind] for report in reports if part in report.masses]
    return sum(found) / len(found) if found else None


def sentence(reports: Sequence[LayerReport], lam: float, alpha: float) -> str:
    """One plain sentence: the regime, whatever the scale, and what to try."""
    start, padding = (mean_mass(reports, part) or 0.0 for part in ("start", "padding"))
    is_off = lam == 0.0 or alpha == 1.0
    # the regime is that of the model, also where nothing is mixed
    alpha = PAPER_ALPHA if alpha == 1.0 else alpha
    effective = sum(report.effective for report in reports) / len(reports)
    steep = sharpening_factor(effective, PAPER, alpha)
    before, after = (mean_mass(reports, "words", kind) for kind in (0, 1))
    words = ""
    if before is not None and not is_off:
        words = f", and scale {lam:g} takes the words' share from {before:.0%} to {after:.0%}"
        words += " (what goes beyond 100% is taken below zero elsewhere)" if after > 1.0 else ""
    if start >= SINK:
        return (
            f"Sink: the start token holds {start:.0%} of the text's attention{words}. Compare tokens: words only with "
            "all in Apply PLADIS (Advanced); without start token alone changed little on our small model."
        )
    if padding >= PADDED:
        return (
            f"Padding: end token and padding hold {padding:.0%} of the text's attention and are sharpened along with "
            f"the words{words}. Try tokens: words only in Apply PLADIS (Advanced), or a lower scale."
        )
    if steep >= STEEP:
        # a mix as steep as STEEP
        calm = (STEEP - 1) / (sharpening_factor(effective, 1.0, alpha) - 1)
        return (
            f"Diffuse: attention spreads over {effective:.3g} tokens, so scale {PAPER:g} makes it about {steep:.2g} "
            f"times as steep as softmax. If pictures get worse, try scale {calm:.2g} ({STEEP:g} times as steep)."
        )
    if steep <= FLAT:
        return (
            f"Peaky: attention spreads over {effective:.2g} tokens, so scale {PAPER:g} makes it only about "
            f"{steep:.2g} times as steep as softmax. PLADIS changes little here."
        )
    return (
        f"In between: attention spreads over {effective:.3g} tokens, and scale {PAPER:g} makes it about {steep:.2g} "
        "times as steep as softmax. Nothing here speaks against the paper's scale 2."
    )


def regime_table(names: Sequence[str], reports: Sequence[LayerReport]) -> list[str]:
    """A line per layer: effective tokens, sharpening, the parts' shares by softmax > by the mix, words below 0."""
    parts = [part for part in PARTS if any(part in report.masses for report in reports)]
    heads = ["effective", "sharpening", *parts, "words below 0"]
    lines = [f"{'layer':<12}" + "".join(f"{head:>17}" for head in heads)]
    for name, report in zip(names, reports, strict=True):
        shares = (report.masses.get(part) for part in parts)
        cells = [f"{report.effective:.4g}", f"{report.sharpening:.3g}"]
        cells += ["-" if share is None else f"{share[0]:.2f} > {share[1]:.2f}" for share in shares]
        cells.append("-" if report.flipped is None else f"{report.flipped:.0%}")
        lines.append(f"{name:<12}" + "".join(f"{cell:>17}" for cell in cells))
    return lines
