"""entmax and pladis_weights against the `entmax` package in float64, and against the definition itself."""

from __future__ import annotations

import entmax as entmax_package
import pytest
import torch

from pladis_core import entmax, pladis_weights

ALPHAS = (1.0, 1.001, 1.1, 1.25, 1.5, 1.75, 1.99, 2.0)
SIZES = (1, 2, 7, 63, 77, 154, 1000)


def oracle(scores: torch.Tensor, alpha: float, dim: int = -1) -> torch.Tensor:
    scores = scores.double()
    if alpha == 1.0:
        return scores.softmax(dim)
    if alpha == 1.5:
        return entmax_package.entmax15(scores, dim)
    if alpha == 2.0:
        return entmax_package.sparsemax(scores, dim)
    return entmax_package.entmax_bisect(scores, alpha, dim, n_iter=100)


def hard_scores(rows: int, keys: int) -> torch.Tensor:
    """Rows from nearly equal to peaked, geometric ladders and ties among them."""
    spread = torch.logspace(-4, 3, rows).unsqueeze(1)
    scores = torch.randn(rows, keys) * spread
    scores[::3] = -(torch.rand(len(scores[::3]), keys) ** 4) * spread[::3]
    scores[::5] = scores[::5].sign() * spread[::5]
    return scores


def clusters(alpha: float, keys: int):
    """One peak over nearly equal scores, from just below it to just above where entmax prunes."""
    for depth in (0.05, 0.3, 0.7, 0.95):
        cluster = -depth / (alpha - 1) - torch.rand(64, keys - 1) * 1e-4
        yield torch.cat([torch.zeros(64, 1), cluster], 1)


def cliffs(alpha: float, keys: int) -> torch.Tensor:
    """One peak, and all other keys within a few roundings of where entmax prunes."""
    edge = torch.linspace(-3e-6, 3e-6, 61).unsqueeze(1) - 1 / (alpha - 1)
    return torch.cat([torch.zeros(61, 1), edge.expand(61, keys - 1)], 1)


@pytest.mark.parametrize("keys", SIZES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_matches_the_entmax_package(alpha, keys):
    scores = hard_scores(240, keys)
    assert (entmax(scores, alpha) - oracle(scores, alpha)).abs().max() <= 1e-6


@pytest.mark.parametrize("keys", (20, 77, 231, 1000, 4096))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 1.7, 1.95, 2.0))
def test_one_peak_over_a_cluster_of_nearly_equal_scores(alpha, keys):
    """A start token and padding: the rounding of a threshold counts once per key of the support."""
    for scores in clusters(alpha, keys):
        assert (entmax(scores, alpha) - oracle(scores, alpha)).abs().max() <= 1e-6


@pytest.mark.parametrize("keys", (20, 77, 300))
@pytest.mark.parametrize("alpha", (1.5, 1.9, 1.99, 2.0))
def test_a_cluster_where_entmax_prunes(alpha, keys):
    """There every key may err by the rounding of the threshold, and the peak by the sum of that."""
    scores = cliffs(alpha, keys)
    assert (entmax(scores, alpha) - oracle(scores, alpha)).abs().max() <= keys * torch.finfo(torch.float32).eps


def edges(keys: int, peaks: int) -> torch.Tensor:
    """A few keys that share the weight, and a cluster of ties within roundings of where sparsemax prunes."""
    first = -torch.rand(peaks) * 0.3 / peaks
    first[0] = 0.0
    threshold = (first.double().sum() - 1.0) / peaks
    at = (threshold + torch.arange(-12, 240, 3, dtype=torch.float64) * 1.5e-8).float()
    return torch.cat([first.expand(len(at), peaks), at[:, None].expand(-1, keys - peaks)], 1)


@pytest.mark.parametrize("keys", (40, 77, 300, 2000))
@pytest.mark.parametrize("peaks", (1, 2, 5, 17))
def test_ties_at_the_edge_of_sparsemax_come_in_by_no_more_than_their_weight(peaks, keys):
    """A threshold's rounding, times the ties, would be a weight."""
    scores = edges(keys, peaks)
    assert (entmax(scores, 2.0) - oracle(scores, 2.0)).abs().max() <= 2e-6


@pytest.mark.parametrize("above", (1e-12, 1e-9, 1e-8, 1e-7))
def test_alpha_just_above_one_is_softmax(above):
    for scores in (torch.zeros(8, 77), torch.randn(64, 77) * 5, torch.randn(64, 1000) * 0.1):
        assert (entmax(scores, 1.0 + above) - scores.double().softmax(-1)).abs().max() <= 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_sum_to_one_and_pruned_keys_are_exactly_zero(alpha):
    weights = entmax(hard_scores(240, 77), alpha)
    assert (weights.sum(-1) - 1).abs().max() <= 1e-6
    assert (weights >= 0).all()
    if alpha >= 1.5:
        assert (weights == 0).any()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_low_precision_scores_give_float32_weights(dtype):
    scores = torch.randn(50, 77).to(dtype)
    weights = entmax(scores)
    assert weights.dtype == torch.float32
    assert (weights - oracle(scores, 1.5)).abs().max() <= 1e-6


def test_float64_stays_float64():
    scores = torch.randn(50, 77, dtype=torch.float64) * 5
    for alpha in (1.0, 1.25, 1.5, 2.0):
        weights = entmax(scores, alpha)
        assert weights.dtype == torch.float64
        assert (weights - oracle(scores, alpha)).abs().max() <= 1e-7


@pytest.mark.parametrize("dim", (0, 1, 2, -1, -3))
def test_any_axis(dim):
    scores = torch.randn(5, 6, 7)
    for alpha in (1.25, 1.5):
        assert (entmax(scores, alpha, dim) - oracle(scores, alpha, dim)).abs().max() <= 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masked_entries_are_zero_and_the_rest_as_if_they_were_not_there(alpha):
    scores = torch.randn(20, 77)
    masked = scores.clone()
    masked[:, 40:] = -torch.inf
    weights = pladis_weights(masked, 2.0, alpha)
    assert (weights[:, 40:] == 0).all()
    torch.testing.assert_close(weights[:, :40], pladis_weights(scores[:, :40], 2.0, alpha), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_row_with_every_entry_masked_is_zero(alpha):
    scores = torch.randn(3, 9)
    scores[1] = -torch.inf
    assert (pladis_weights(scores, 2.0, alpha)[1] == 0).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("magnitude", (1e-30, 1e4, 1e30, 3e38))
def test_any_magnitude_is_finite(alpha, magnitude):
    scores = torch.randn(30, 77).clamp(-1, 1) * magnitude
    weights = pladis_weights(scores, 2.0, alpha)
    assert weights.isfinite().all()
    assert (weights.sum(-1) - 1).abs().max() <= 2e-6


def test_the_mix():
    scores = torch.randn(20, 77) * 3
    for lam in (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0):
        expected = (1 - lam) * scores.double().softmax(-1) + lam * oracle(scores, 1.5)
        assert (pladis_weights(scores, lam) - expected).abs().max() <= 1e-6 * max(1, abs(lam))


def test_scores_are_left_alone():
    scores = torch.randn(20, 77)
    before = scores.clone()
    pladis_weights(scores)
    assert torch.equal(scores, before)


def test_empty_scores():
    assert pladis_weights(torch.empty(0, 77)).shape == (0, 77)
    assert pladis_weights(torch.empty(3, 0)).shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"alpha": 0.9}, "0.9"),
        ({"alpha": 2.1}, "2.1"),
        ({"alpha": float("nan")}, "nan"),
        ({"lam": float("inf")}, "inf"),
        ({"lam": 1e39}, "1e\\+39"),
        ({"dim": 2}, "dim 2"),
    ),
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pladis_weights(torch.randn(2, 3), **arguments)


def test_integer_scores_are_refused():
    with pytest.raises(ValueError, match="int64"):
        entmax(torch.arange(3))
