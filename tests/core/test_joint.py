"""PLADIS on the text columns of longer rows, against its definition in float64 on the `entmax` package."""

from __future__ import annotations

import entmax
import pytest
import torch

from pladis_core import attention_with_lse, joint_correction, log_sum_exp
from pladis_core import joint as module

TEXT = slice(3, 12)
ROWS = slice(12, 40)


def inputs(dtype=torch.float64, kv_heads=4, head_dim=16):
    q, k, v = (torch.randn(2, h, 40, head_dim, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    return tuple((2 * t).to(dtype) for t in (q, k)) + (v.to(dtype),)


def masks():
    additive = torch.zeros(2, 1, 1, 40, dtype=torch.float64)
    additive[..., 10:14] = torch.finfo(torch.float64).min
    boolean = torch.rand(2, 4, 40, 40) > 0.3
    boolean[:, :, 5, :] = False
    boolean[:, :, 20, TEXT] = False
    return {"none": None, "padding": additive, "-inf": additive.clamp(min=-1).where(additive == 0, -torch.inf),
            "boolean": boolean, "bias": torch.randn(2, 4, 40, 40, dtype=torch.float64)}  # fmt: skip


def definition(q, k, v, mask, lam, alpha):
    """The whole rows' outputs, weights written out in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        bias = torch.where(mask, 0.0, -1e6) if mask.dtype == torch.bool else mask
        scores = scores + bias.double().clamp(min=-1e6)
    weights = scores.softmax(-1)
    mass = weights[..., TEXT].sum(-1, keepdim=True)
    text = scores[..., TEXT]
    sparse = entmax.sparsemax(text, -1) if alpha == 2 else entmax.entmax_bisect(text, alpha, -1, 80)
    mixed = mass * ((1 - lam) * text.softmax(-1) + lam * sparse)
    weights[:, :, ROWS, TEXT] = mixed[:, :, ROWS]
    return weights @ v


def ours(q, k, v, mask, lam, alpha):
    gqa = q.shape[1] != k.shape[1]
    out, lse = attention_with_lse(q, k, v, mask, enable_gqa=gqa)
    part = None if mask is None else mask.expand(2, 4, 40, 40)[:, :, ROWS, TEXT]
    out[:, :, ROWS] += joint_correction(
        q[:, :, ROWS], k[:, :, TEXT], v[:, :, TEXT], lse[:, :, ROWS], part, lam=lam, alpha=alpha, enable_gqa=gqa
    )
    return out


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize(("lam", "alpha"), ((2.0, 1.5), (1.0, 2.0), (3.0, 1.3)))
def test_text_weights_are_remixed_and_keep_their_mass(mask, lam, alpha):
    q, k, v = inputs()
    mask = masks()[mask]
    expected, out = definition(q, k, v, mask, lam, alpha), ours(q, k, v, mask, lam, alpha)
    # a row whose keys are all masked has no defined output
    rows = [i for i in range(40) if mask is None or mask.dtype != torch.bool or i not in (5,)]
    torch.testing.assert_close(out[:, :, rows], expected[:, :, rows], atol=1e-9, rtol=1e-9)


def test_other_rows_and_lambda_zero_are_the_dense_output():
    q, k, v = inputs(torch.float32)
    dense, _ = attention_with_lse(q, k, v)
    assert torch.equal(ours(q, k, v, None, 2.0, 1.5)[:, :, :12], dense[:, :, :12])
    assert torch.equal(ours(q, k, v, None, 0.0, 1.5), dense)
    torch.testing.assert_close(dense, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_grouped_heads():
    q, k, v = inputs(kv_heads=2)
    torch.testing.assert_close(ours(q, k, v, None, 2.0, 1.5), definition(q, k, v, None, 2.0, 1.5))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_low_precision_is_within_twice_the_naive_error(dtype):
    q, k, v = inputs(dtype, head_dim=32)
    expected = definition(q, k, v, None, 2.0, 1.5)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights, text = scores.softmax(-1), scores[:, :, ROWS, TEXT]
    mass = weights[:, :, ROWS, TEXT].sum(-1, keepdim=True)
    weights[:, :, ROWS, TEXT] = mass * (2 * entmax.entmax15(text.float(), -1).to(dtype) - text.softmax(-1))
    naive = (weights @ v - expected).abs().max()
    assert (ours(q, k, v, None, 2.0, 1.5) - expected).abs().max() <= 2 * naive


def test_repeated_columns_count_once_with_the_mass_of_all():
    q, k, v = inputs()
    own_k, own_v = k[:, :, :5], v[:, :, :5]
    keys, values = (torch.cat([own, own, rest[:, :, 5:]], 2) for own, rest in ((own_k, k), (own_v, v)))
    scores = q @ keys.mT * q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    once = scores[..., :5]
    mixed = weights[..., :10].sum(-1, keepdim=True) * 2 * (entmax.entmax15(once, -1) - once.softmax(-1))
    lse = log_sum_exp(q, keys)
    torch.testing.assert_close(joint_correction(q, own_k, own_v, lse, copies=2), mixed @ own_v)


@pytest.mark.parametrize("mask", masks())
def test_the_portable_log_sum_exp(mask, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    q, k, _ = inputs()
    mask = masks()[mask]
    portable = module._chunked_lse(q, k, mask, 0.25)
    rows = [i for i in range(40) if i != 5]
    torch.testing.assert_close(portable[:, :, rows], log_sum_exp(q, k, mask)[:, :, rows])


@pytest.mark.parametrize(
    ("capability", "dtype", "narrow"),
    [((9, 0), torch.bfloat16, False), ((8, 9), torch.bfloat16, True), ((12, 0), torch.bfloat16, True),
     ((9, 0), torch.float32, True)],
)  # fmt: skip
def test_the_narrow_kernel_is_left_out_where_another_is_faster(monkeypatch, capability, dtype, narrow):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "_narrow_lse", lambda *a: asked.append(a) or module._chunked_lse(*a))
    q, k = (torch.randn(1, 2, length, 16).to(dtype) for length in (5, 9))
    lse = module._lse_on_cuda(q, k, None, 0.25)
    torch.testing.assert_close(lse, module._chunked_lse(q, k, None, 0.25), atol=0.02, rtol=0)
    assert bool(asked) == narrow


def test_where_torchs_kernel_refuses_its_narrow_values_chunks_serve(monkeypatch, caplog):
    q, k = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 30, 16)
    asked = []

    def refuse(*args):
        asked.append(1)
        raise RuntimeError("no kernel found to launch!")

    monkeypatch.setattr(module, "_efficient", refuse)
    monkeypatch.setattr(module, "_no_narrow_kernel", set())
    for _ in range(2):
        torch.testing.assert_close(module._narrow_lse(q, k, None, 0.25), module._chunked_lse(q, k, None, 0.25))
    assert len(asked) == 1 and len(caplog.records) == 1 and "no kernel found" in caplog.records[0].message


@pytest.mark.parametrize("error", (torch.cuda.OutOfMemoryError("full"), RuntimeError("an illegal memory access")))
def test_what_chunks_would_not_help_is_raised(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(module, "_efficient", fail)
    with pytest.raises(type(error)):
        module._narrow_lse(torch.randn(1, 1, 4, 16), torch.randn(1, 1, 5, 16), None, 1.0)
    assert not module._no_narrow_kernel


def test_masked_rows_stay_finite():
    q, k, v = inputs(torch.float32)
    for value in (-torch.inf, torch.finfo(torch.float32).min):
        mask = torch.full((2, 1, 1, 40), value)
        assert ours(q, k, v, mask, 2.0, 1.5).isfinite().all()
