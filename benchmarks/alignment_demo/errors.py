"""Means over captions and training seeds, their errors, and what the plan calls a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demo.oracle import Score
from demo.scenes import Prompt

MEASURES = ("all objects", "F1", "recall", "extra objects", "relation")
# training seeds that a difference needs
SEEDS = 3


def values(scores: Sequence[Score], measure: str) -> np.ndarray:
    """One number per caption; NaN where the measure does not apply to it.

    extra objects: seen beyond those named (negative: missing). relation: whether the stated relation holds, among
    pictures that show both of its objects.
    """
    read_off = {
        "all objects": lambda s: float(s.complete),
        "F1": lambda s: s.f1,
        "recall": lambda s: s.recall,
        "extra objects": lambda s: float(s.seen - s.named),
        "relation": lambda s: float("nan") if s.relation is None else float(s.relation),
    }[measure]
    return np.array([read_off(s) for s in scores])


def object_sets(prompts: Sequence[Prompt]) -> np.ndarray:
    """The number of each caption's set of coloured shapes, by which the splits are made; captions of one are alike."""
    sets = [frozenset(kind.name for kind in prompt.objects) for prompt in prompts]
    numbers = {objects: number for number, objects in enumerate(dict.fromkeys(sets))}
    return np.array([numbers[objects] for objects in sets])


def clustered_error(numbers: np.ndarray, sets: np.ndarray) -> float:
    """Standard error of the mean of the numbers that are there, clustered by `sets` (Liang, Zeger 1986); NaN for fewer
    than two clusters."""
    there = ~np.isnan(numbers)
    count, sets = there.sum(), np.unique(sets[there], return_inverse=True)[1]
    groups = sets.max(initial=-1) + 1
    if groups < 2:
        return float("nan")
    sums = np.bincount(sets, weights=numbers[there] - numbers[there].mean())
    return float((groups / (groups - 1) * (sums**2).sum()) ** 0.5 / count)


@dataclass(frozen=True)
class Figure:
    """A mean over training seeds, or of differences. seeds: each seed's own mean. over_seeds, over_captions: both
    parts of its error; over_seeds is NaN for one seed."""

    mean: float
    seeds: tuple[float, ...]
    over_seeds: float
    over_captions: float

    @property
    def error(self) -> float:
        return float(np.nanmax([self.over_seeds, self.over_captions, 0.0]))

    @property
    def is_difference(self) -> bool:
        """The plan's rule: at least twice its error, and the same sign for all three seeds."""
        signs = {np.sign(seed) for seed in self.seeds}
        same = len(signs) == 1 and not signs & {0.0}
        return len(self.seeds) >= SEEDS and same and abs(self.mean) >= 2 * self.error


def figure(of_seeds: Sequence[np.ndarray], sets: np.ndarray) -> Figure:
    """Of each training seed's numbers, one per caption.

    The error over captions is the mean of the seeds' own: the captions are the same for all seeds, so that it does not
    shrink with their number.
    """
    means = [np.nanmean(numbers) if (~np.isnan(numbers)).any() else np.nan for numbers in of_seeds]
    over_seeds = np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else np.nan
    over_captions = np.mean([clustered_error(numbers, sets) for numbers in of_seeds])
    return Figure(float(np.mean(means)), tuple(map(float, means)), float(over_seeds), float(over_captions))


class Reported:
    """The scores of one arm: of each training seed of a kind of model."""

    def __init__(self, values: dict[str, dict[int, np.ndarray]], sets: np.ndarray) -> None:
        self.values, self.sets = values, sets

    @classmethod
    def of(cls, scores: dict[int, list[Score]], sets: np.ndarray) -> Reported:
        return cls({name: {seed: values(s, name) for seed, s in scores.items()} for name in MEASURES}, sets)

    def figure(self, measure: str) -> Figure:
        return figure(list(self.values[measure].values()), self.sets)

    def __sub__(self, other: Reported) -> Reported:
        """Paired differences, on the seeds that both have."""
        return Reported(
            {
                name: {seed: mine[seed] - other.values[name][seed] for seed in mine if seed in other.values[name]}
                for name, mine in self.values.items()
            },
            self.sets,
        )
