"""benchmarks.noise_robustness: the retrieval experiment measures what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks.noise_robustness import CONTROL, RULES, SOFTMAX, markdown, measure, plot, retrieval_errors


def test_perfect_weights_have_no_error():
    """A rule that always picks the nearest pattern errs not at all without noise, and by a pattern's distance if it
    picks a wrong one."""
    nearest = lambda scores: torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()  # noqa: E731
    assert retrieval_errors(nearest, 8.0, 0.0, 5, 16, 0).max() < 1e-6
    wrong = lambda scores: nearest(scores).roll(1, -1)  # noqa: E731
    # random unit vectors of many dimensions are nearly orthogonal
    assert retrieval_errors(wrong, 8.0, 0.0, 5, 16, 0).mean() == pytest.approx(2**0.5, abs=0.05)


def test_uniform_weights_forget_the_query():
    uniform = lambda scores: torch.full_like(scores, 1 / scores.shape[-1])  # noqa: E731
    assert torch.equal(*(retrieval_errors(uniform, 8.0, noise, 5, 16, 0) for noise in (0.0, 2.0)))


@pytest.mark.parametrize("rule", RULES)
def test_noise_hurts(rule):
    little, much = (retrieval_errors(RULES[rule], 8.0, noise, 20, 16, 0).mean() for noise in (0.25, 2.0))
    assert much > little


def test_points_table_and_plot(tmp_path):
    points = measure(draws=4, queries=8, seed=1)
    softmax = [point for point in points if point.rule == SOFTMAX]
    assert all(point.gain == 0 and point.gain_se == 0 for point in softmax)
    text = markdown(points)
    assert all(f"| {rule} |" in text for rule in (*RULES, CONTROL))
    plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
