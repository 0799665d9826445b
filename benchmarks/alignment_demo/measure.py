"""Makes what the plan asks for, in the order in which it says most: a run that ends early has the first parts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from demo.oracle import Score

from . import PARTS
from .arms import ARMS
from .choices import CFG_3, NO_GUIDANCE, STUDENT_WAYS, TUNED, Choice, Scorer, advised, choose
from .errors import Reported, object_sets
from .models import SHARES, SINK, STUDENT, Models
from .pictures import NONE, Disturbance

PART_WAYS = {"fixed": (NO_GUIDANCE, CFG_3), "student": tuple(STUDENT_WAYS), "tuned": (TUNED,), "noise": ()}
DISTURBED_WAYS = (NO_GUIDANCE, CFG_3)
DISTURBED_ARMS = ("softmax", "the paper", "PLADIS, chosen", "temperature")
DISTURBANCES = tuple(Disturbance(where, level) for where in ("text states", "queries") for level in (0.25, 0.5, 1.0))


@dataclass(frozen=True)
class Cell:
    """One kind of model under one way of sampling: what each arm chose, what the pack's nodes should be set to, and
    what came out on the captions to report on."""

    choices: dict[str, Choice]
    advised: str
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
            for kind in kinds_of(way, models):
                measured.cells[kind, way] = measure_cell(scorer, models, kind, way)
    if "noise" in parts:
        for way in DISTURBED_WAYS:
            for kind in (kind for kind in SHARES if models.of(kind)):
                measured.disturbed |= measure_disturbed(scorer, models, kind, way)
    return measured


def kinds_of(way: str, models: Models) -> list[str]:
    kinds = (STUDENT,) if way in STUDENT_WAYS else (*SHARES, SINK)
    return [kind for kind in kinds if models.of(kind)]


def measure_cell(scorer: Scorer, models: Models, kind: str, way: str) -> Cell:
    """Chooses on one seed's model, then reports on all."""
    chooser = models.chooser(kind)
    choices = {arm: choose(scorer, chooser, way, arm) for arm in ARMS}
    best = advised(scorer, chooser, choices)
    return Cell(choices, best, report(scorer, models, kind, {arm: (choice, NONE) for arm, choice in choices.items()}))


def report(
    scorer: Scorer, models: Models, kind: str, wanted: dict[Hashable, tuple[Choice, Disturbance]]
) -> dict[Hashable, Reported]:
    """What comes out on the captions to report on, by the names of what is wanted; one model after the other."""
    scores: dict[Hashable, dict[int, list[Score]]] = {name: {} for name in wanted}
    for model in models.of(kind):
        for name, (choice, noise) in wanted.items():
            scores[name][model.seed] = scorer.scores(model, "report", choice.sampling, choice.setting, noise)
    sets = object_sets(scorer.captions.prompts["report"])
    return {name: Reported.of(of_seeds, sets) for name, of_seeds in scores.items()}


def measure_disturbed(scorer: Scorer, models: Models, kind: str, way: str) -> dict:
    """Robustness to noise of settings that were chosen without it."""
    chooser = models.chooser(kind)
    choices = {arm: choose(scorer, chooser, way, arm) for arm in DISTURBED_ARMS}
    wanted = {
        (kind, way, noise, arm): (choice, noise) for noise in (NONE, *DISTURBANCES) for arm, choice in choices.items()
    }
    return report(scorer, models, kind, wanted)
