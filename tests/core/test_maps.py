from __future__ import annotations

import entmax
import pytest
import torch

from pladis_core import attention_maps, maps

GROUPS = [[0], [3, 4, 5], [6]]


def tensors(dtype=torch.float64):
    return torch.randn(2, 4, 30, 8, dtype=dtype) * 2, *(torch.randn(2, 2, 7, n, dtype=dtype) for n in (8, 5))


def weights_by_hand(query, key, mask=None):
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -1e5)
    dense, sparse = scores.softmax(-1), entmax.entmax15(scores, -1)
    return scores, dense, sparse, 3 * sparse - 2 * dense


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("chunk", (1 << 24, 200))
def test_maps_and_report_are_what_they_say(masked, chunk, monkeypatch):
    monkeypatch.setattr(maps, "CHUNK_ELEMENTS", chunk)
    query, key, value = tensors()
    mask = torch.rand(30, 7) < 0.7 if masked else None
    if masked:
        mask[:, 0] = True
    scores, *weights = weights_by_hand(query, key, mask)
    out, report = attention_maps(query, key, value, GROUPS, mask, lam=3.0)
    for kind, expected in zip(out, weights, strict=True):
        for group, found in zip(GROUPS, kind, strict=True):
            torch.testing.assert_close(found, expected[..., group].sum(-1).mean((0, 1)).float(), atol=1e-6, rtol=0)
    dense, sparse, mixed = weights
    support = (sparse > 1e-7).sum(-1).double()
    possible = mask.sum(-1) if masked else 7
    assert report.support == pytest.approx(float(support.mean()), abs=0.02)
    assert report.zeros == pytest.approx(float((1 - support / possible).mean()), abs=0.01)
    assert report.negative == pytest.approx(float(-mixed.clamp(max=0).sum(-1).mean()), abs=1e-6)
    values = value.repeat_interleave(2, 1)
    ratio = (mixed @ values).norm(dim=-1) / (dense @ values).norm(dim=-1)
    assert report.length_ratio == pytest.approx(float(ratio.mean()), rel=1e-6)


def test_in_a_longer_row_the_weights_are_shares_of_it():
    query, key, value = tensors()
    scores, dense, _, _ = weights_by_hand(query, key)
    more = torch.randn(2, 4, 30, 11, dtype=torch.float64)
    row = torch.cat([scores, more], -1)
    out, _ = attention_maps(query, key, value, GROUPS, row_lse=row.logsumexp(-1, keepdim=True))
    torch.testing.assert_close(out[0, 0], row.softmax(-1)[..., 0].mean((0, 1)).float(), atol=1e-6, rtol=0)


def test_softmax_prunes_nothing():
    query, key, value = tensors(torch.float32)
    _, report = attention_maps(query, key, value, GROUPS, lam=0.0, alpha=1.0)
    assert report.zeros == 0.0
    assert report.support == 7.0
    assert report.negative == 0.0
    assert report.length_ratio == pytest.approx(1.0)
