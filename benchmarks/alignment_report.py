"""Scores of pictures -> tables, and one line of advice that claims no more than they do.

A result is what the JSON of a run holds; everything that is said of it here follows from its settings and scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SOFTMAX = "softmax"
# an error that is estimated from fewer is itself a guess
FEWEST_PROMPTS = 10
# a difference is one from this many standard errors on
ERRORS = 2.0
Row = Sequence[float]
Result = dict[str, Any]


def summarised(result: Result) -> Result:
    """The result with its `table`, `best` and `advice`.

    Args:
        result: "prompts"; "seeds"; "settings", a list of {"key", "label", "temperature", "cfg", ...} with "softmax" at
            every CFG; "scores", {scorer: {key: one number per prompt and seed}}.

    Returns:
        "table": every setting against softmax at the same CFG; "best": every label at the CFG that is best for it
        against softmax at the one that is best for that ("Guidance Matters", arXiv 2602.22570). Differences are paired
        by prompt and seed; standard errors are over prompts, as pictures of one prompt resemble each other.
    """
    settings, seeds = result["settings"], len(result["seeds"])
    table = [{"key": setting["key"]} for setting in settings]
    best = [{"label": label} for label in dict.fromkeys(setting["label"] for setting in settings)]
    softmax = {setting["cfg"]: setting["key"] for setting in settings if setting["label"] == SOFTMAX}
    for scorer, scores in result["scores"].items():
        for line, setting in zip(table, settings, strict=True):
            line[scorer] = _compared(scores[setting["key"]], scores[softmax[setting["cfg"]]], seeds)
        chosen = {line["label"]: _best_cfg(line["label"], settings, scores) for line in best}
        for line in best:
            setting = chosen[line["label"]]
            against = _compared(scores[setting["key"]], scores[chosen[SOFTMAX]["key"]], seeds)
            line[scorer] = {"key": setting["key"], "cfg": setting["cfg"], **against}
    whole = {**result, "table": table, "best": best}
    return {**whole, "advice": _advice(whole)}


def _best_cfg(label: str, settings: Sequence[dict], scores: dict[str, Row]) -> dict:
    at_any = [setting for setting in settings if setting["label"] == label]
    return max(at_any, key=lambda setting: float(np.mean(scores[setting["key"]])))


def _compared(row: Row, base: Row, seeds: int) -> dict[str, float | None]:
    values = np.array(row).reshape(-1, seeds).mean(1)
    gains = values - np.array(base).reshape(-1, seeds).mean(1)
    error, gain_error = (float(x.std(ddof=1) * len(x) ** -0.5) if len(x) > 1 else None for x in (values, gains))
    return {
        "mean": float(values.mean()), "se": error, "difference": float(gains.mean()), "difference_se": gain_error,
    }  # fmt: skip


def _advice(result: Result) -> str:
    """By the first scorer; the others are asked about what it chose."""
    prompts, seeds = len(result["prompts"]), len(result["seeds"])
    ours = [line for line in result["best"] if line["label"] != SOFTMAX]
    controls = {setting["label"] for setting in result["settings"] if setting["temperature"] is not None}
    temperatures = [line for line in ours if line["label"] in controls]
    ours = [line for line in ours if line["label"] not in controls]
    if not result["scores"]:
        return "No advice: nothing was scored. Add --clip FOLDER or --preference FOLDER."
    if prompts < FEWEST_PROMPTS:
        return f"No advice: {prompts} prompts are too few to tell an error from. Give at least {FEWEST_PROMPTS}."
    if not ours:
        return "No advice: no lambda but 0 was run. Give --lambdas."
    scorer = next(iter(result["scores"]))
    first = max(ours, key=lambda line: (_sign(line[scorer]) > 0, line[scorer]["difference"]))
    signs = [_sign(line[scorer]) for line in ours]
    softmax = next(line for line in result["best"] if line["label"] == SOFTMAX)[scorer]
    cfgs = {setting["cfg"] for setting in result["settings"]}
    tuned = len(cfgs) > 1
    base = "softmax at the same CFG, which was not tuned"
    if tuned:
        # beyond it, softmax may be better still
        end = {min(cfgs): ", the lowest tried", max(cfgs): ", the highest tried"}.get(softmax["cfg"], "")
        base = f"softmax at its best CFG ({softmax['cfg']:g}{end})"
    name = first["label"] + (f" at CFG {first[scorer]['cfg']:g}" if tuned else "")
    said = f"On this checkpoint, by {scorer} over {prompts} prompts and {seeds} seeds"
    if _sign(first[scorer]) > 0:
        said += f": {name}: {_shown(first[scorer])} against {base}"
        if len(ours) > 1:
            said += f" ({signs.count(1)} of {len(ours)} settings tried are better, {signs.count(-1)} worse; the best "
            said += "of several is optimistic)"
    else:
        said += f", no setting of PLADIS that was tried is better than {base}: of {len(ours)}, {signs.count(-1)} are "
        said += f"worse and {signs.count(0)} show no difference; the highest, {name}: {_shown(first[scorer])}"
    said += "." + "".join(_by_another(other, first[scorer]["key"], softmax["key"], result) for other in
                          list(result["scores"])[1:])  # fmt: skip
    return said + _against_temperature(first, temperatures, scorer, result)


def _by_another(scorer: str, key: str, base: str, result: Result) -> str:
    rows = result["scores"][scorer]
    return f" By {scorer} the same two differ by {_shown(_compared(rows[key], rows[base], len(result['seeds'])))}."


def _against_temperature(ours: dict, temperatures: Sequence[dict], scorer: str, result: Result) -> str:
    if not temperatures:
        return " No temperature was run as a control (--temperatures), so nothing is said about sparsity."
    control = max(temperatures, key=lambda line: line[scorer]["difference"])
    rows = result["scores"][scorer]
    between = _compared(rows[ours[scorer]["key"]], rows[control[scorer]["key"]], len(result["seeds"]))
    verdict = {1: "PLADIS is better", 0: "no difference found", -1: "the temperature is better"}[_sign(between)]
    return (
        f" Control: {control['label']}, sharper without sparsity (best of {len(temperatures)}), has "
        f"{_shown(control[scorer])}; PLADIS minus it {_shown(between)}: {verdict}."
    )


def _sign(compared: dict[str, float]) -> int:
    """1 better, -1 worse, 0 no difference found."""
    difference = compared["difference"]
    return int(np.sign(difference)) if abs(difference) >= ERRORS * compared["difference_se"] else 0


def _shown(compared: dict[str, float]) -> str:
    return f"{compared['difference']:+.3f} ± {compared['difference_se']:.3f}"


def markdown(result: Result) -> str:
    """Of a summarised result."""
    scorers = list(result["scores"])
    if not scorers:
        return result["advice"]
    settings = {setting["key"]: setting for setting in result["settings"]}
    head = "".join(f" {name} | {name} - softmax |" for name in scorers)
    rule = "|---" * (2 + 2 * len(scorers)) + "|"
    lines = ["Against softmax at the same CFG:", "", f"| setting | CFG |{head}", rule]
    for line in result["table"]:
        setting = settings[line["key"]]
        lines.append(f"| {setting['label']} | {_cfg(setting['cfg'])} |{''.join(_cells(line, scorers))}")
    if len(result["best"]) < len(result["table"]):
        head = "".join(f" {name} | at CFG | {name} - softmax |" for name in scorers)
        lines += ["", "Each at its best CFG, against softmax at its best CFG:", "", f"| setting |{head}"]
        lines.append("|---" * (1 + 3 * len(scorers)) + "|")
        lines += [f"| {line['label']} |{''.join(_cells(line, scorers))}" for line in result["best"]]
    return "\n".join([*lines, "", result["advice"]])


def _cells(line: dict, scorers: Sequence[str]) -> Iterator[str]:
    for compared in (line[name] for name in scorers):
        yield f" {compared['mean']:.3f} ± {_error(compared['se'])} |"
        if "cfg" in compared:
            yield f" {_cfg(compared['cfg'])} |"
        yield f" {compared['difference']:+.3f} ± {_error(compared['difference_se'])} |"


def _error(error: float | None) -> str:
    return "?" if error is None else f"{error:.3f}"


def _cfg(cfg: float | None) -> str:
    return "" if cfg is None else f"{cfg:g}"


def check(result: Result) -> None:
    """That a report that somebody sent says what its own scores say.

    Raises:
        ValueError: something is missing, or the tables are not those of the scores.
    """
    missing = {"prompts", "seeds", "settings", "scores", "table", "best", "advice", "versions", "models", "workflow"}
    missing -= result.keys()
    if missing:
        raise ValueError(f"the report lacks {', '.join(sorted(missing))}: send results.json as it was written")
    pictures = len(result["prompts"]) * len(result["seeds"])
    for scorer, rows in result["scores"].items():
        for setting in result["settings"]:
            count = len(rows.get(setting["key"], ()))
            if count != pictures:
                raise ValueError(f"{scorer} of {setting['key']} has {count} scores, not {pictures}")
    if markdown(summarised(result)) != markdown(result):
        raise ValueError("the tables or the advice of the report are not what its scores give")
