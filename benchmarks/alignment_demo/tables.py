"""The tables of the evidence page, from plain data, in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .choices import TUNED
from .errors import MEASURES, SEEDS
from .models import SHARES, STUDENT, named
from .regime import LITTLE, PARTS, needs_variant
from .scope import DIAL_WAYS, about_arms, about_robustness, about_tuned

JUDGED = ("all objects", "F1")


def markdown(result: dict[str, Any]) -> str:
    parts = [_head(result), _advice(result), _dial(result), _arms(result), _disturbed(result), _mass(result)]
    return "\n\n".join([part for part in parts if part] + [_oracle(result), _missing(result)]).strip()


def show(figure: dict[str, Any], sign: bool = True) -> str:
    """Bold: a difference by the plan's rule."""
    if figure["mean"] is None:
        return "-"
    text = f"{figure['mean']:{'+' if sign else ''}.3f} ± {figure['error']:.3f}"
    return f"**{text}**" if sign and figure["difference"] else text


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(result: dict[str, Any]) -> str:
    captions = result["captions"]
    return (
        f"{captions['report']} captions to report on, {captions['tune']} others to choose on, caption seed "
        f"{captions['seed']}. ± is the larger of the errors over training seeds and over captions; the error over "
        "captions is the mean of the seeds' own, clustered by the set of coloured shapes, as the splits are made. "
        f"**Bold**: a difference by the plan's rule (at least twice its error, the same sign for all {SEEDS} seeds); "
        "all else is *no difference found*. With fewer seeds nothing is called a difference, so nothing is bold."
    )


def _advice(result: dict[str, Any]) -> str:
    """One table to act on."""
    rows = []
    for way, kinds in result["cells"].items():
        kind = STUDENT if STUDENT in kinds else result["shipped"]
        if kind in kinds:
            rows.append([way, *_advised(kinds[kind])])
    gains = [f"gain in {measure}" for measure in JUDGED]
    head = ("sampling", "set", "all objects with softmax", *gains, "not found worse than it", "seeds")
    about = about_shipped(result["shipped"], result["ships by the rule"],
                          result["all objects at CFG 3 on the captions to tune on"])  # fmt: skip
    return f"### What to set\n\n{about}{_tuned(result)}\n\n{table(head, rows)}" if rows else ""


def about_shipped(kind: str, by_rule: str | None, shares: dict[str, float]) -> str:
    """Which model ships, and whether the plan's rule agrees.

    Args:
        shares: the *all objects* that the rule looks at, of the kinds that are measured.
    """
    ships = f"The model that ships: {named(kind)} in the captions of training."
    if len(shares) < len(SHARES):
        return f"{ships} Only {len(shares)} of the {len(SHARES)} shares are measured, too few for the plan's rule."
    seen = ", ".join(f"{named(other)} {share:.2f}" for other, share in shares.items())
    says = "the same" if by_rule == kind else f"**another: {named(by_rule)}**"
    return f"{ships} The plan's rule says {says}; *all objects* that it looks at: {seen}."


def _advised(cell: dict[str, Any]) -> list[str]:
    row, softmax = cell["arms"][cell["advised"]], cell["arms"]["softmax"]
    gains = [show(row["over softmax"][measure]) for measure in JUDGED]
    seeds = len(row["figures"]["F1"]["seeds"])
    well = ", ".join(f"{arm} ({setting(cell['arms'][arm])})" for arm in cell["as well"]) or "nothing else"
    well = well if seeds >= SEEDS else f"not said with fewer than {SEEDS} seeds"
    return [setting(row), show(softmax["figures"]["all objects"], sign=False), *gains, well, str(seeds)]


def setting(row: dict[str, Any]) -> str:
    guidance = f", CFG {row['cfg']:g}" if row["cfg"] != 1 else ""
    return f"{row['setting']}{guidance}"


def _dial(result: dict[str, Any]) -> str:
    parts = [
        f"#### {way}, {measure}\n\n{_dial_table(arms)}"
        for way, measures in result["dial"].items()
        for measure, arms in measures.items()
    ]
    about = (
        "Gain over softmax, for each share of mistakes in the captions of training; its rise from one share to the "
        "next; and what the arm gains beyond the temperature. For the arms that are measured for every share, under "
        f"{' and '.join(DIAL_WAYS)}: the tuned CFG and the other arms are not measured for every share."
    )
    return "\n\n".join(["### The dial", about, *parts]) if parts else ""


def _dial_table(arms: dict[str, Any]) -> str:
    first = next(iter(arms.values()))
    head = ["arm", *(named(kind) for kind in first["gain"]), *(f"rise, {_span(span)}" for span in first["rise"])]
    head += [f"beyond temperature, {named(kind)}" for kind in first["gain"]]
    rows = [
        [arm, *(show(figure) for part in ("gain", "rise", "beyond temperature") for figure in row[part].values())]
        for arm, row in arms.items()
    ]
    return table(head, rows)


def _span(span: str) -> str:
    low, high = (SHARES[kind] for kind in span.split(" to "))
    return f"{low * 100:.0f} to {high:.0%}".replace("%", " %")


def _arms(result: dict[str, Any]) -> str:
    """Of every kind of model, under each way of sampling, as far as they are measured."""
    parts = [
        f"#### {named(kind)}, {way}\n\n{_arms_table(cell['arms'])}"
        for way, kinds in result["cells"].items()
        for kind, cell in kinds.items()
    ]
    return "\n\n".join(["### The arms", about_arms(result["shipped"]) + _tuned(result), *parts]) if parts else ""


def _tuned(result: dict[str, Any]) -> str:
    return f" {about_tuned(result['shipped'])}" if TUNED in result["cells"] else ""


def _arms_table(arms: dict[str, Any]) -> str:
    gains = [f"{measure} - softmax's" for measure in JUDGED] + ["F1 - temperature's", "F1 - chosen PLADIS'"]
    rows = [
        [
            arm,
            setting(row),
            *(show(row["figures"][measure], sign=False) for measure in MEASURES),
            *(show(row["over softmax"][measure]) if arm != "softmax" else "" for measure in JUDGED),
            show(row["over temperature"]["F1"]) if arm != "temperature" else "",
            show(row["over chosen"]["F1"]) if arm != "PLADIS, chosen" else "",
        ]
        for arm, row in arms.items()
    ]  # fmt: skip
    return table(["arm", "setting", *MEASURES, *gains], rows)


def _disturbed(result: dict[str, Any]) -> str:
    rows = [
        [
            named(row["kind"]), row["way"], f"{row['level']:g}, {row['where']}" if row["level"] else "none", row["arm"],
            show(row["figures"]["all objects"], sign=False), show(row["figures"]["F1"], sign=False), *_gains(row),
        ]
        for row in result["disturbed"]
    ]  # fmt: skip
    head = ("model", "sampling", "noise", "arm", *JUDGED, *(f"{m} - softmax's" for m in JUDGED),
            *(f"{m}: that, more than without noise" for m in JUDGED))  # fmt: skip
    about = about_robustness(result["shipped"], result["captions"]["robustness"])
    return f"### Robustness to noise\n\n{about}\n\n{table(head, rows)}" if rows else ""


def _gains(row: dict[str, Any]) -> Iterator[str]:
    for part in ("over softmax", "more than without noise"):
        yield from (show(row[part][measure]) if row["arm"] != "softmax" else "" for measure in JUDGED)


def _mass(result: dict[str, Any]) -> str:
    rows = [
        [named(kind), layer.removesuffix(".processor"), *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in
                                                           (parts[part] for part in PARTS))]
        for kind, layers in result["mass"].items()
        for layer, parts in layers.items()
    ]  # fmt: skip
    if not rows:
        return ""
    needed = needs_variant(result["mass"])
    verdict = "is below" if needed else "is not below"
    about = (
        "Mean over training seeds, ± their standard deviation (0 where there is one). The start token's mass "
        f"{verdict} {LITTLE} in every layer of the dial's models: the variant with a sink is "
        f"{'needed' if needed else 'not needed'}."
    )
    return f"### Where the text attention's mass goes\n\n{about}\n\n{table(('model', 'layer', *PARTS), rows)}"


def _oracle(result: dict[str, Any]) -> str:
    if not result.get("oracle"):
        return ""
    lines = [f"{where}: " + ", ".join(f"{name} {1 - share if name != 'extra' else share:.3f}" for name, share in
                                      shares.items()) for where, shares in result["oracle"].items()]  # fmt: skip
    return "The oracle's errors: " + "; ".join(lines) + ". They must be at most .02."


def _missing(result: dict[str, Any]) -> str:
    """What is not in these tables."""
    lines = [f"- {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(["### Not measured", "", *lines]) if lines else ""
