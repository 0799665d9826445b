"""The tables of the first demo model, which is no longer shipped, from docs/evidence/alignment.json. The program that
measured them is in the history of this repository."""

from __future__ import annotations

from collections.abc import Sequence

MEASURES = ("recall", "complete", "f1", "count", "relation")


def markdown(result: dict) -> str:
    """The tables of the evidence page, one for each way of sampling."""
    return "\n\n".join(_table(table) for table in result["tables"])


def _table(table: dict) -> str:
    plain = table["reported"][0]
    lines = [
        f"### {table['sampling']}",
        "",
        "| setting | recall | all objects | F1 | extra objects | relation | F1 - softmax |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["reported"]:
        cells = [_show(row[name]) for name in MEASURES]
        gain = "" if row is plain else _show(row["gain"]["f1"], sign=True)
        lines.append(f"| {_name(row)} | {' | '.join(cells)} | {gain} |")
    edge = table["chosen_over_temperature"]
    lines += [
        "",
        f"Chosen PLADIS - chosen temperature, paired: recall {_show(edge['recall'], sign=True)}, "
        f"F1 {_show(edge['f1'], sign=True)}, all objects {_show(edge['complete'], sign=True)}, "
        f"relation {_show(edge['relation'], sign=True)}.",
    ]
    return "\n".join(lines)


def _name(row: dict) -> str:
    setting = row["setting"]
    if "chosen" not in row["name"]:
        return row["name"]
    return f"{row['name']}: {_label(setting)}"


def _label(setting: dict) -> str:
    if setting["lam"] == 0:
        return f"t = {setting['temperature']:g}, {setting['layers']}"
    return f"lambda {setting['lam']:g}, alpha {setting['alpha']:g}, {setting['layers']}"


def _show(mean: Sequence[float | None], sign: bool = False) -> str:
    if mean[0] is None:
        return "-"
    return f"{mean[0]:{'+' if sign else ''}.3f} ± {mean[1]:.3f}"
