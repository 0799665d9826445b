"""What was measured, as plain data: tables.json."""

from __future__ import annotations

import math
from typing import Any

from .choices import WAYS, Choice
from .errors import MEASURES, SEEDS, Figure, Reported
from .measure import Cell, Measured
from .models import SHARES
from .pictures import NONE, Disturbance
from .scope import COMPARED, DIAL_WAYS, DISTURBANCES

JUDGED = ("all objects", "F1")


def plain(figure: Figure) -> dict[str, Any]:
    numbers = {"mean": figure.mean, "error": figure.error, "over seeds": figure.over_seeds,
               "over captions": figure.over_captions}  # fmt: skip
    numbers = {name: None if math.isnan(number) else number for name, number in numbers.items()}
    return {**numbers, "seeds": list(figure.seeds), "difference": figure.is_difference}


def results(measured: Measured) -> dict[str, Any]:
    cells: dict[str, dict] = {}
    for (kind, way), cell in measured.cells.items():
        cells.setdefault(way, {})[kind] = cell_results(cell)
    return {
        "cells": {way: cells[way] for way in WAYS if way in cells},
        "dial": {way: dial(measured, way) for way in DIAL_WAYS if way in cells},
        "disturbed": disturbed(measured),
    }


def cell_results(cell: Cell) -> dict[str, Any]:
    others = {"softmax": "softmax", "temperature": "temperature", "chosen": "PLADIS, chosen"}
    others |= {"advised": cell.advised} if cell.advised else {}
    rows = {}
    for arm, mine in cell.reported.items():
        rows[arm] = {
            **chosen(cell.choices[arm]),
            "figures": {name: plain(mine.figure(name)) for name in MEASURES},
            **{
                f"over {name}": {m: plain((mine - cell.reported[other]).figure(m)) for m in MEASURES}
                for name, other in others.items()
            },
        }
    return {"advised": cell.advised, "as well": as_well(cell), "arms": rows}


def chosen(choice: Choice) -> dict[str, Any]:
    return {
        "setting": str(choice.setting),
        "cfg": choice.sampling.cfg,
        "steps": choice.sampling.steps,
        "tried": [[str(setting), sampling.cfg, f1] for (setting, sampling), f1 in choice.tried.items()],
    }


def as_well(cell: Cell) -> list[str]:
    """The other arms that no difference puts below the advised one, in either measure that is judged by; none with
    fewer than three seeds, where nothing is called a difference."""
    advised = cell.reported[cell.advised] if cell.advised else None
    if advised is None or len(advised.values["F1"]) < SEEDS:
        return []

    def worse(arm: str) -> bool:
        figures = [(cell.reported[arm] - advised).figure(measure) for measure in JUDGED]
        return any(figure.is_difference and figure.mean < 0 for figure in figures)

    return [arm for arm in cell.reported if arm != cell.advised and not worse(arm)]


def dial(measured: Measured, way: str) -> dict[str, Any]:
    """Gains over softmax for each share of mistakes, how they change from share to share, and what the arm gains beyond
    the temperature."""
    kinds = [kind for kind in SHARES if (kind, way) in measured.cells]
    arms = {kind: measured.cells[kind, way].reported for kind in kinds}
    gains = {arm: {kind: arms[kind][arm] - arms[kind]["softmax"] for kind in kinds} for arm in COMPARED[1:]}
    pairs = list(zip(kinds, kinds[1:], strict=False))
    pairs += [(kinds[0], kinds[-1])] if len(kinds) > 2 else []
    return {
        measure: {
            arm: {
                "gain": {kind: plain(gain.figure(measure)) for kind, gain in of_arm.items()},
                "rise": {f"{low} to {high}": plain((of_arm[high] - of_arm[low]).figure(measure)) for low, high in pairs
                         if shared(of_arm[high], of_arm[low])},
                "beyond temperature": {k: plain((of_arm[k] - gains["temperature"][k]).figure(measure)) for k in kinds},
            }
            for arm, of_arm in gains.items()
        }
        for measure in JUDGED
    }  # fmt: skip


def shared(one: Reported, other: Reported) -> bool:
    """Whether both were measured on a seed that the other has too."""
    return not one.values["F1"].keys().isdisjoint(other.values["F1"])


def disturbed(measured: Measured) -> list[dict[str, Any]]:
    """Under each noise: what each arm gains over softmax, and by how much that is more than without the noise."""
    rows = []
    for kind, way in dict.fromkeys((kind, way) for kind, way, *_ in measured.disturbed):
        for disturbance in (NONE, *DISTURBANCES):
            rows += [_disturbed_row(measured, kind, way, disturbance, arm) for arm in COMPARED]
    return rows


def _disturbed_row(measured: Measured, kind: str, way: str, disturbance: Disturbance, arm: str) -> dict[str, Any]:
    def reported(under: Disturbance, name: str) -> Reported:
        return measured.disturbed[kind, way, under, name]

    mine = reported(disturbance, arm)
    gain = mine - reported(disturbance, "softmax")
    more = gain - (reported(NONE, arm) - reported(NONE, "softmax"))
    return {
        "kind": kind, "way": way, "where": disturbance.where, "level": disturbance.level, "arm": arm,
        "figures": {name: plain(mine.figure(name)) for name in JUDGED},
        "over softmax": {name: plain(gain.figure(name)) for name in JUDGED},
        "more than without noise": {name: plain(more.figure(name)) for name in JUDGED},
    }  # fmt: skip
