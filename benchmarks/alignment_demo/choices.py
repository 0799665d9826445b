"""What is chosen, on the captions to tune on and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from demo.oracle import Score

from .arms import PER_GROUP, SETTABLE, SOFTMAX, TRIED, Setting, tried
from .errors import values
from .models import SHARES, Models, Trained
from .pictures import NONE, Disturbance, Sampling
from .scorers import Captions

STEPS = 20
CFGS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NO_GUIDANCE, CFG_3, TUNED = "no guidance", "CFG 3", "tuned CFG"
# ways of sampling; at the tuned CFG an arm chooses among several
STANDARD_WAYS = {
    NO_GUIDANCE: (Sampling(STEPS, 1.0),),
    CFG_3: (Sampling(STEPS, 3.0),),
    TUNED: tuple(Sampling(STEPS, cfg) for cfg in CFGS),
}
STUDENT_WAYS = {f"student, {steps} step{'s' * (steps > 1)}": (Sampling(steps, 1.0),) for steps in (1, 2, 4)}
WAYS = STANDARD_WAYS | STUDENT_WAYS
# all objects at CFG 3 with softmax, of the model that ships
WANTED = (0.6, 0.85)


class Scorer(Protocol):
    captions: Captions

    def scores(
        self, model: Trained, split: str, way: Sampling, setting: Setting, disturbance: Disturbance = NONE
    ) -> list[Score]: ...


@dataclass(frozen=True)
class Choice:
    """Of an arm, under one way of sampling. tried: F1 on the captions to tune on, of each candidate; empty where there
    was nothing to choose."""

    setting: Setting
    sampling: Sampling
    tried: dict[tuple[Setting, Sampling], float]


def choose(scorer: Scorer, model: Trained, way: str, arm: str) -> Choice:
    """The candidate with the highest F1 on the captions to tune on; the first of equals."""
    if way == TUNED:
        return choose_cfg(scorer, model, choose(scorer, model, CFG_3, arm).setting)
    (sampling,) = WAYS[way]
    if arm != PER_GROUP and len(TRIED[arm]) == 1:
        return Choice(TRIED[arm][0], sampling, {})
    f1 = tried(arm, lambda setting: tuned(scorer, model, sampling, setting))
    best = max(f1, key=f1.__getitem__)
    return Choice(best, sampling, {(setting, sampling): score for setting, score in f1.items()})


def choose_cfg(scorer: Scorer, model: Trained, setting: Setting) -> Choice:
    """The CFG that is best for a setting."""
    f1 = {(setting, sampling): tuned(scorer, model, sampling, setting) for sampling in WAYS[TUNED]}
    _, best = max(f1, key=f1.__getitem__)
    return Choice(setting, best, f1)


def tuned(scorer: Scorer, model: Trained, way: Sampling, setting: Setting, measure: str = "F1") -> float:
    """Mean over the captions to tune on."""
    return float(values(scorer.scores(model, "tune", way, setting), measure).mean())


def advised(scorer: Scorer, model: Trained, choices: dict[str, Choice]) -> str:
    """The arm that the pack's nodes can set with the highest F1 on the captions to tune on; the first of equals."""
    return max(SETTABLE, key=lambda arm: tuned(scorer, model, choices[arm].sampling, choices[arm].setting))


def ships_by_rule(scorer: Scorer, models: Models) -> tuple[str | None, dict[str, float]]:
    """The kind of model that should ship by the plan's rule, of those that are measured, and what the rule looks at:
    the largest share of mistakes with *all objects* in WANTED, else the closest."""
    way = STANDARD_WAYS[CFG_3][0]
    kinds = [kind for kind in SHARES if models.of(kind)]
    shares = {kind: tuned(scorer, models.chooser(kind), way, SOFTMAX, "all objects") for kind in kinds}

    def rank(kind: str) -> tuple[float, float]:
        outside = max(WANTED[0] - shares[kind], shares[kind] - WANTED[1], 0.0)
        return -outside, SHARES[kind]

    return max(kinds, key=rank, default=None), shares
