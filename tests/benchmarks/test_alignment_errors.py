"""Errors over seeds and captions, and what is called a difference, on made-up numbers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.alignment_demo.errors import Figure, Reported, clustered_error, figure, object_sets, values
from demo.oracle import Score
from demo.scenes import COLOURS, SHAPES, Kind, Prompt

EACH_ITS_OWN = np.arange(40)


def test_measures():
    scores = [Score(2, 2, 2, True), Score(1, 2, 3, None), Score(0, 2, 1, False)]
    np.testing.assert_allclose(values(scores, "recall"), [1, 0.5, 0])
    np.testing.assert_allclose(values(scores, "all objects"), [1, 0, 0])
    np.testing.assert_allclose(values(scores, "F1"), [1, 0.4, 0])
    np.testing.assert_allclose(values(scores, "extra objects"), [0, 1, -1])
    np.testing.assert_allclose(values(scores, "relation"), [1, np.nan, 0])


def test_captions_of_the_same_coloured_shapes_are_one_cluster():
    kinds = [Kind(colour, shape) for colour in list(COLOURS)[:2] for shape in SHAPES[:2]]
    first, again = (kinds[0], kinds[1]), (Kind(*kinds[1].name, "small"), Kind(*kinds[0].name, None, "outlined"))
    sets = object_sets([Prompt("1", first), Prompt("2", again), Prompt("3", (kinds[2], kinds[3]))])
    assert sets.tolist() == [0, 0, 1]


def test_the_error_over_captions_is_the_usual_one_where_none_are_alike():
    numbers = np.arange(40.0)
    assert clustered_error(numbers, EACH_ITS_OWN) == pytest.approx(numbers.std(ddof=1) / 40**0.5)


def test_captions_that_only_repeat_others_do_not_shrink_the_error():
    numbers = np.arange(10.0)
    repeated = clustered_error(numbers.repeat(4), np.arange(10).repeat(4))
    assert repeated == pytest.approx(clustered_error(numbers, np.arange(10)))


def test_numbers_that_are_missing_do_not_count():
    numbers = np.array([1.0, 2.0, 3.0, np.nan])
    assert clustered_error(numbers, np.arange(4)) == pytest.approx(3**-0.5)
    assert np.isnan(clustered_error(np.array([1.0, np.nan]), np.arange(2)))


def test_the_larger_error_is_printed():
    """Three seeds apart from each other, captions alike: the error is that over seeds; and the other way round."""
    apart = figure([np.full(40, mean) for mean in (0.1, 0.2, 0.3)], EACH_ITS_OWN)
    assert apart.mean == pytest.approx(0.2) and apart.over_captions == pytest.approx(0)
    assert apart.error == apart.over_seeds == pytest.approx(0.1 / 3**0.5)
    spread = np.arange(40.0)
    alike = figure([spread, spread, spread], EACH_ITS_OWN)
    # the captions are the same three times: their error is that of one seed
    assert alike.over_seeds == 0 and alike.error == pytest.approx(clustered_error(spread, EACH_ITS_OWN))


@pytest.mark.parametrize(
    ("seeds", "over_seeds", "over_captions", "difference"),
    [
        ((0.05, 0.06, 0.07), 0.006, 0.029, True),
        ((-0.05, -0.06, -0.07), 0.006, 0.029, True),
        # not twice the larger error, whichever that is
        ((0.05, 0.06, 0.07), 0.006, 0.031, False),
        ((0.05, 0.06, 0.07), 0.031, 0.006, False),
        # one seed says otherwise, or nothing
        ((0.1, 0.1, -0.02), 0.01, 0.01, False),
        ((0.1, 0.1, 0.0), 0.01, 0.01, False),
        # fewer than three seeds
        ((0.06,), float("nan"), 0.001, False),
        ((0.06, 0.06), 0.0, 0.001, False),
        ((0.0, 0.0, 0.0), 0.0, 0.0, False),
    ],
)
def test_what_is_called_a_difference(seeds, over_seeds, over_captions, difference):
    assert Figure(float(np.mean(seeds)), seeds, over_seeds, over_captions).is_difference == difference


def test_differences_are_paired_within_seeds_and_on_those_that_both_have():
    def reported(shift: int, seeds: range) -> Reported:
        scores = [Score(n % 3 + shift, 4, 4, None) for n in range(40)]
        return Reported.of({seed: scores for seed in seeds}, EACH_ITS_OWN)

    difference = (reported(1, range(3)) - reported(0, range(1, 4))).figure("recall")
    assert difference.mean == pytest.approx(0.25) and difference.error == pytest.approx(0, abs=1e-12)
    assert len(difference.seeds) == 2
