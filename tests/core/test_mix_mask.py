"""Some keys are mixed, the others keep their softmax weight: every backend against the equation."""

from __future__ import annotations

import pytest
import torch
from entmax import entmax_bisect

from pladis_core import joint_correction, pladis_attention, pladis_correction, pladis_weights

BACKENDS = ["reference", "portable", "eager"]
KEYS = [1, 3, 24, 77, 154, 512]
# scores near 20 are rounded by 1e-6, and weights below 0 make a sum of weights up to 3 of values near 4
CLOSE = {"rtol": 0, "atol": 1e-5}


def equation(scores: torch.Tensor, mixed: torch.Tensor, lam: float, alpha: float) -> torch.Tensor:
    """Row by row, in float64: softmax, and in place of the mixed keys' weights their mass times the mix."""
    softmax = scores.double().softmax(-1)
    weights = softmax.clone()
    places = mixed.nonzero().flatten()
    if len(places):
        chosen = scores.double()[..., places]
        mix = (1 - lam) * chosen.softmax(-1) + lam * entmax_bisect(chosen, alpha, n_iter=80)
        weights[..., places] = softmax[..., places].sum(-1, keepdim=True) * mix
    return weights


def tensors(keys: int, batch: int = 2, heads: int = 2, queries: int = 9, width: int = 8):
    q, k = torch.randn(batch, heads, queries, width) * 2, torch.randn(batch, heads, keys, width) * 2
    return q, k, torch.randn(batch, heads, keys, width)


def some_keys(keys: int) -> torch.Tensor:
    """(2, keys): all but the first key; every other one."""
    mixed = torch.ones(2, keys, dtype=torch.bool)
    mixed[0, 0] = False
    mixed[1, ::2] = False
    return mixed


def expected(q, k, v, mixed, lam, alpha, mask=None, scale=None):
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if mask is None else scores + mask
    return torch.stack([equation(s, m, lam, alpha) @ value.double()
                        for s, m, value in zip(scores, mixed, v, strict=True)]).float()  # fmt: skip


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equation(backend, keys, alpha):
    q, k, v = tensors(keys)
    out = pladis_attention(q, k, v, alpha=alpha, mix_mask=some_keys(keys), backend=backend)
    torch.testing.assert_close(out, expected(q, k, v, some_keys(keys), 2.0, alpha), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_is_no_mask(backend):
    q, k, v = tensors(77)
    everything = torch.ones(1, 77, dtype=torch.bool)
    out = pladis_attention(q, k, v, mix_mask=everything, backend=backend)
    torch.testing.assert_close(out, pladis_attention(q, k, v, backend=backend), **CLOSE)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_key_is_softmax(backend, alpha):
    q, k, v = tensors(24)
    nothing = torch.zeros(2, 24, dtype=torch.bool)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(pladis_attention(q, k, v, alpha=alpha, mix_mask=nothing, backend=backend), softmax)
    assert not pladis_correction(q, k, v, alpha=alpha, mix_mask=nothing, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_that_outweighs_all(backend):
    """Keys 100 nats below the rest are mixed among themselves, and weigh nothing."""
    q, k, v = tensors(24)
    mask = torch.zeros(24)
    mask[0] = 100.0
    out = pladis_attention(q, k, v, mask, mix_mask=some_keys(24), backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0], v[0, :, :1].expand_as(out[0]), **CLOSE)


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beside_an_attention_mask(backend, boolean):
    q, k, v = tensors(24)
    seen = torch.rand(2, 1, 1, 24) < 0.7
    seen[:, ..., -1] = True
    additive = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    out = pladis_attention(q, k, v, seen if boolean else additive, mix_mask=some_keys(24), backend=backend)
    torch.testing.assert_close(out, expected(q, k, v, some_keys(24), 2.0, 1.5, additive), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_keys_that_are_all_masked_change_nothing(backend):
    q, k, v = tensors(24)
    seen = ~some_keys(24)[:, None, None]
    seen[..., 1] |= ~seen.any(-1)
    out = pladis_attention(q, k, v, seen, mix_mask=some_keys(24) & ~seen[:, 0, 0], backend=backend)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, seen), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_correction_turns_softmax_into_it(backend):
    q, k, v = tensors(77)
    mixed = some_keys(77)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = out + pladis_correction(q, k, v, mix_mask=mixed, backend=backend)
    torch.testing.assert_close(out, pladis_attention(q, k, v, mix_mask=mixed, backend=backend), **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_part_of_a_longer_row(backend):
    """Of a row of 24 text keys and 40 others, some text keys: as if these alone were the text."""
    q, k, v = tensors(64)
    lse = (q @ k.mT * 8**-0.5).logsumexp(-1, keepdim=True)
    mixed = some_keys(24)
    out = joint_correction(q, k[:, :, :24], v[:, :, :24], lse, mix_mask=mixed, backend=backend)
    for i in range(2):
        its = mixed[i].nonzero().flatten()
        alone = joint_correction(
            q[i : i + 1], k[i : i + 1][:, :, its], v[i : i + 1][:, :, its], lse[i : i + 1], backend=backend
        )
        torch.testing.assert_close(out[i : i + 1], alone, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend):
    q, k, v = tensors(24, heads=4)
    k, v = k[:, :2], v[:, :2]
    out = pladis_attention(q, k, v, mix_mask=some_keys(24), enable_gqa=True, backend=backend)
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    torch.testing.assert_close(out, expected(q, k, v, some_keys(24), 2.0, 1.5), **CLOSE)


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_gradient(backend, alpha):
    q, k, v = (t.double().requires_grad_() for t in tensors(7, queries=3, width=4))
    mixed = some_keys(7)
    torch.autograd.gradcheck(
        lambda *qkv: pladis_attention(*qkv, alpha=alpha, mix_mask=mixed, backend=backend), (q, k, v)
    )


def test_weights():
    scores = (torch.randn(3, 11, dtype=torch.float64) * 3).requires_grad_()
    mixed = torch.arange(11) > 2
    weights = pladis_weights(scores, 0.3, 1.5, mix_mask=mixed)
    torch.testing.assert_close(weights, equation(scores, mixed, 0.3, 1.5), rtol=0, atol=1e-12)
    torch.testing.assert_close(pladis_weights(scores.detach(), 0.3, 1.5, mix_mask=mixed), weights.detach())
    torch.autograd.gradcheck(lambda s: pladis_weights(s, 0.3, 1.5, mix_mask=mixed), scores)


@pytest.mark.parametrize(("mask", "says"), [
    (torch.ones(24), "must be boolean"), (torch.ones(23, dtype=torch.bool), "does not broadcast"),
])  # fmt: skip
def test_refused(mask, says):
    with pytest.raises(ValueError, match=says):
        pladis_attention(*tensors(24), mix_mask=mask)
