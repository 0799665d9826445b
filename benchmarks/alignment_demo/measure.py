"""Makes what the plan asks for, in the order in which it says most: a run that ends early has the first parts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from demo.oracle import Score

from . import PARTS, scope
from .arms import SETTABLE
from .choices import CFG_3, NO_GUIDANCE, STUDENT_WAYS, TUNED, Choice, Scorer, advised, choose
from .errors import Reported, object_sets
from .models import Models
from .pictures import NONE, Disturbance
from .scope import COMPARED, DISTURBANCES, DISTURBED_WAYS

PART_WAYS = {"fixed": (NO_GUIDANCE, CFG_3), "student": tuple(STUDENT_WAYS), "tuned": (TUNED,), "noise": ()}


@dataclass(frozen=True)
class Cell:
    """One kind of model under one way of sampling: what each arm chose, what the pack's nodes should be set to (None
    where not all arms were measured), and what came out on the captions to report on."""

    choices: dict[str, Choice]
    advised: str | None
    reported: dict[str, Reported]


@dataclass
class Measured:
    """cells: by kind of model and way of sampling. disturbed: by kind, way, disturbance and arm."""

    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    disturbed: dict[tuple[str, str, Disturbance, str], Reported] = field(default_factory=dict)


def measure(scorer: Scorer, models: Models, parts: Sequence[str]) -> Measured:
    """The parts of the plan on the models that are there."""
    measured = Measured()
    for part in (part for part in PARTS if part in parts):
        for way in PART_WAYS[part]:
            for kind in (kind for kind in scope.kinds_of(way) if models.of(kind)):
                measured.cells[kind, way] = measure_cell(scorer, models, kind, way)
    if "noise" in parts and models.of(scope.SHIPPED_KIND):
        for way in DISTURBED_WAYS:
            measured.disturbed |= measure_disturbed(scorer, models, scope.SHIPPED_KIND, way)
    return measured


def measure_cell(scorer: Scorer, models: Models, kind: str, way: str) -> Cell:
    """Chooses on one seed's model, then reports on all."""
    chooser = models.chooser(kind)
    choices = {arm: choose(scorer, chooser, way, arm) for arm in scope.arms_of(kind, way)}
    best = advised(scorer, chooser, choices) if choices.keys() >= set(SETTABLE) else None
    return Cell(choices, best, report(scorer, models, kind, {arm: (choice, NONE) for arm, choice in choices.items()}))


def report(
    scorer: Scorer,
    models: Models,
    kind: str,
    wanted: dict[Hashable, tuple[Choice, Disturbance]],
    split: str = "report",
) -> dict[Hashable, Reported]:
    """What comes out, by the names of what is wanted; one model after the other.

    Args:
        split: "robustness" are the first of those to "report" on, so that what is without noise has been drawn.
    """
    scores: dict[Hashable, dict[int, list[Score]]] = {name: {} for name in wanted}
    prompts = scorer.captions.prompts[split]
    for model in models.of(kind):
        for name, (choice, noise) in wanted.items():
            drawn = scorer.scores(model, split if noise.level else "report", choice.sampling, choice.setting, noise)
            scores[name][model.seed] = drawn[: len(prompts)]
    sets = object_sets(prompts)
    return {name: Reported.of(of_seeds, sets) for name, of_seeds in scores.items()}


def measure_disturbed(scorer: Scorer, models: Models, kind: str, way: str) -> dict:
    """Robustness to noise of settings that were chosen without it."""
    chooser = models.chooser(kind)
    choices = {arm: choose(scorer, chooser, way, arm) for arm in COMPARED}
    wanted = {
        (kind, way, noise, arm): (choice, noise) for noise in (NONE, *DISTURBANCES) for arm, choice in choices.items()
    }
    return report(scorer, models, kind, wanted, "robustness")
