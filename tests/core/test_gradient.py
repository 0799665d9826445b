"""Gradients with torch alone: against the `entmax` package's own, in float64, and against finite differences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import entmax as entmax_package
import pytest
import torch
from test_attention import definition, peak_bytes
from test_entmax import oracle
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from pladis_core import (
    api,
    attention_with_lse,
    entmax,
    joint,
    joint_correction,
    log_sum_exp,
    pladis_attention,
    pladis_correction,
    pladis_weights,
)
from pladis_core.impl import eager, trial

ALPHAS = (1.0, 1.25, 1.5, 1.75, 2.0)
BACKENDS = ("auto", "portable", "eager")
TEXT, ROWS = slice(3, 12), slice(12, 40)


def tensors(queries=33, keys=77, heads=4, kv_heads=4, width=16, dtype=torch.float64):
    sizes = (heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, width)
    return tuple(torch.randn(2, *size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)


def masks(queries=33, keys=77):
    """Every kind; in the first three, query 5 sees no key."""
    keep = torch.rand(queries, keys) < 0.6
    keep[:, 0], keep[5] = True, False
    zeros = torch.zeros(2, 1, queries, keys, dtype=torch.float64)
    return {
        "boolean": keep,
        "-inf": zeros.masked_fill(~keep, -torch.inf),
        "lowest": zeros.float().masked_fill(~keep, torch.finfo(torch.float32).min),
        "padding": torch.arange(keys) < keys - 9,
        "bias": torch.randn(4, queries, keys, dtype=torch.float64),
    }


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In `inputs`, of a weighted sum of `out` that is the same for every `out` of one shape."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(out, inputs, weight.to(out.dtype))


def assert_near(found, expected, tolerance=1e-9):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lam", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("keys", (1, 63, 77, 1000))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_have_the_gradient_of_the_entmax_package(alpha, keys, lam):
    scores = (torch.randn(40, keys, dtype=torch.float64) * torch.logspace(-2, 1, 40).double()[:, None]).requires_grad_()
    expected = (1 - lam) * scores.softmax(-1) + lam * oracle(scores, alpha)
    assert_near(gradients(pladis_weights(scores, lam, alpha), scores), gradients(expected, scores), 1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_have_the_slope_of_finite_differences(alpha):
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: pladis_weights(s, 2.0, alpha), scores)
    assert torch.autograd.gradcheck(lambda s: entmax(s, alpha, dim=0), scores)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masked_scores_have_none(alpha):
    scores = torch.randn(6, 9, dtype=torch.float64)
    scores[:, 7:], scores[2] = -torch.inf, -torch.inf
    (found,) = gradients(pladis_weights(scores.requires_grad_(), 2.0, alpha), scores)
    assert found.isfinite().all()
    assert (found[:, 7:] == 0).all()
    assert (found[2] == 0).all()
    assert found[0, :7].any()


def test_low_precision_scores_get_low_precision_gradients():
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.randn(20, 77).to(dtype).requires_grad_()
        (found,) = gradients(pladis_weights(scores), scores)
        wide = scores.detach().double().requires_grad_()
        (expected,) = gradients(2 * oracle(wide, 1.5) - wide.softmax(-1), wide)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", (63, 77, 1000))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_attention_has_the_gradient_of_the_definition(alpha, keys, backend):
    inputs = tensors(keys=keys, heads=6, kv_heads=2)
    for correction, function in ((False, pladis_attention), (True, pladis_correction)):
        out = function(*inputs, alpha=alpha, lam=1.7, enable_gqa=True, backend=backend)
        expected = definition(*inputs, alpha=alpha, lam=1.7, correction=correction)
        assert_near(gradients(out, *inputs), gradients(expected, *inputs), 1e-7)


@pytest.mark.parametrize("lam", (0.0, 1.0, 2.0))
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_mask_and_its_own_gradient(alpha, mask, lam):
    inputs = [*tensors(), masks()[mask]]
    if inputs[3].is_floating_point():
        inputs[3].requires_grad_()
    wanted = [t for t in inputs if t.requires_grad]
    found, expected = (
        gradients(pladis_attention(*inputs, lam=lam, alpha=alpha, backend=backend), *wanted)
        for backend in ("auto", "reference")
    )
    assert_near(found, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", ("mass", "row_lse"))
@pytest.mark.parametrize("mask", (None, "boolean"))
def test_the_mass_and_its_own_gradient(mask, name, alpha):
    inputs, mask = tensors(heads=4, kv_heads=2), mask and masks()[mask]
    # some rows have a larger log-sum-exp than these keys alone, some have not: there the mass is 1
    factor = torch.rand(2, 4, 33, 1, dtype=torch.float64) * (8 if name == "row_lse" else 1)
    factor.requires_grad_()
    found, expected = (
        gradients(
            pladis_correction(*inputs, mask, alpha=alpha, **{name: factor}, enable_gqa=True, backend=backend),
            *inputs, factor,
        )
        for backend in ("auto", "reference")
    )  # fmt: skip
    assert_near(found, expected)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_attention_has_the_slope_of_finite_differences(alpha):
    inputs = tensors(queries=3, keys=7, heads=2, kv_heads=1, width=4)
    bias = torch.randn(2, 1, 1, 7, dtype=torch.float64, requires_grad=True)
    for name, factor in (("mass", 0.3), ("row_lse", 6.0)):
        factor = torch.full((2, 2, 3, 1), factor, dtype=torch.float64, requires_grad=True)

        def correction(q, k, v, mask, factor, name=name):
            return pladis_correction(q, k, v, mask, alpha=alpha, enable_gqa=True, **{name: factor})

        assert torch.autograd.gradcheck(correction, (*inputs, bias, factor))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("row_lse", (None, -torch.inf, 0.0, torch.inf))
def test_a_query_with_every_key_masked_moves_nothing(row_lse, alpha):
    """Whatever a kernel calls the log-sum-exp of such a row."""
    query, key, value = tensors(dtype=torch.float32)
    lse = None if row_lse is None else torch.full((2, 4, 33, 1), 9.0).index_fill(2, torch.tensor(5), row_lse)
    for mask in (masks()["boolean"], masks()["lowest"], torch.zeros(33, 77, dtype=torch.bool)):
        out = pladis_correction(query, key, value, mask, alpha=alpha, row_lse=lse)
        assert (out[:, :, 5] == 0).all()
        alone = torch.autograd.grad(out[:, :, 5].sum(), (query, key, value), retain_graph=True)
        assert all((t == 0).all() for t in alone)
        found = gradients(out, query, key, value)
        assert all(t.isfinite().all() for t in found)
        assert (found[0][:, :, 5] == 0).all()


def test_a_log_sum_exp_far_below_that_of_these_keys_has_no_slope():
    """The mass is 1; exp of the distance, and so its slope, is infinite."""
    inputs, lse = tensors(dtype=torch.float32), torch.full((2, 4, 33, 1), -1e4, requires_grad=True)
    *found, of_lse = gradients(pladis_correction(*inputs, row_lse=lse), *inputs, lse)
    assert (of_lse == 0).all()
    assert_near(found, gradients(pladis_correction(*inputs), *inputs), 1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("keys", (63, 77, 1000))
def test_low_precision_error_is_at_most_twice_the_naive_one(keys, dtype):
    inputs = tensors(queries=130, keys=keys, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = gradients(definition(*exact), *exact)
    query, key, value = inputs
    scores = query @ key.mT * query.shape[-1] ** -0.5
    weights = 2 * entmax_package.entmax15(scores.float(), -1).to(dtype) - scores.softmax(-1)
    naive, found = (gradients(out, *inputs) for out in (weights @ value, pladis_attention(*inputs)))
    for ours, plain, exactly in zip(found, naive, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exactly).abs().max() <= 2 * (plain.double() - exactly).abs().max()


@pytest.mark.parametrize("magnitude", (1e-30, 1e3, 1e15))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_finite_inputs_give_finite_gradients(alpha, magnitude):
    query, key, value = (t.detach().clamp(-1, 1) for t in tensors(dtype=torch.float32))
    inputs = [t.requires_grad_() for t in (query * magnitude, key * magnitude, value)]
    for mask in (None, torch.randn(33, 77) * 1e4, torch.full((33, 77), -3e38)):
        assert all(t.isfinite().all() for t in gradients(pladis_attention(*inputs, mask, alpha=alpha), *inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_is_the_one_without_a_gradient(backend):
    inputs = tensors(heads=4, kv_heads=2, dtype=torch.float32)
    out = pladis_attention(*inputs, enable_gqa=True, backend=backend)
    assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(pladis_attention(*inputs, enable_gqa=True, backend=backend), out)


@pytest.mark.parametrize("alone", range(3))
def test_only_what_is_wanted_gets_one(alone):
    inputs = tensors()
    together = gradients(pladis_attention(*inputs), *inputs)
    for i, t in enumerate(inputs):
        t.requires_grad_(i == alone)
    assert_near(gradients(pladis_attention(*inputs), inputs[alone]), together[alone : alone + 1])


def test_chunk_sizes_do_not_change_it(monkeypatch):
    inputs = *tensors(heads=4, kv_heads=2), torch.randn(33, 77, dtype=torch.float64, requires_grad=True)
    whole = gradients(pladis_attention(*inputs, enable_gqa=True), *inputs)
    for size in (1, 5000, 100_000):
        monkeypatch.setattr(eager, "CPU_BUFFER_BYTES", size)
        assert_near(gradients(pladis_attention(*inputs, enable_gqa=True), *inputs), whole)


def test_no_map_of_a_whole_layer_is_kept():
    """Peak memory of forward and backward, beyond inputs, output and gradients: under a quarter of the reference's."""
    sizes = (4096, 77, 77)
    query, key, value = (torch.randn(1, 10, n, 64).requires_grad_() for n in sizes)

    def train(backend):
        torch.autograd.grad(pladis_attention(query, key, value, backend=backend).sum(), (query, key, value))

    least = 2 * query.nelement() * 4
    portable, reference = (peak_bytes(lambda b=b: train(b)) - least for b in ("portable", "reference"))
    assert portable < reference / 4, (portable, reference)


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("reentrant", (True, False))
def test_inside_gradient_checkpointing(reentrant, autocast):
    inputs = tensors(dtype=torch.float32)
    for function in (pladis_attention, lambda q, k, v: pladis_weights(q @ k.mT) @ v):
        for t in inputs:
            t.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            expected, out = function(*inputs), checkpoint(function, *inputs, use_reentrant=reentrant)
        expected = gradients(expected, *inputs)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(weight.to(out.dtype))
        assert_near([t.grad for t in inputs], expected)


@pytest.mark.parametrize("function", (pladis_attention, lambda q, k, v: log_sum_exp(q, k)))
def test_autocast_does_not_lower_the_precision(function):
    """Not even where the backward pass runs inside it."""
    inputs = tensors(dtype=torch.float32)
    wanted = inputs if function is pladis_attention else inputs[:2]
    plain = gradients(function(*inputs), *wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(gradients(function(*inputs), *wanted), plain, 0)


def test_inside_torch_compile():
    inputs = tensors(dtype=torch.float32)
    compiled = torch.compile(lambda q, k, v: pladis_attention(q * 1, k, v) * 2, backend="eager")
    expected = gradients(pladis_attention(*inputs) * 2, *inputs)
    assert_near(gradients(compiled(*inputs), *inputs), expected, 1e-4)


def test_a_second_derivative_is_refused():
    scores, inputs = torch.randn(3, 7, requires_grad=True), tensors()
    lse = log_sum_exp(*inputs[:2])
    for out, wanted in ((pladis_weights(scores), scores), (pladis_attention(*inputs), inputs[0]), (lse, inputs[0])):
        (first,) = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_zero_sizes():
    for batch, queries, keys in ((0, 5, 7), (1, 0, 7), (1, 5, 0)):
        sizes = (batch, 2, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 6)
        inputs = [torch.randn(size, requires_grad=True) for size in sizes]
        for t, found in zip(inputs, gradients(pladis_attention(*inputs), *inputs), strict=True):
            assert found.shape == t.shape
            assert (found == 0).all()
    scores = torch.empty(0, 7, requires_grad=True)
    assert gradients(pladis_weights(scores), scores)[0].shape == (0, 7)


def test_on_a_gpu_the_kernel_serves_forward(monkeypatch):
    kernel = pytest.importorskip("pladis_core.impl.triton", reason="no Triton on this system")
    calls = []

    def attend(*args):
        calls.append(args)
        return eager.attend(*args)

    monkeypatch.setattr(api, "_trials", [trial.Trials("triton", "Triton")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    monkeypatch.setattr(kernel, "unusable", lambda *tensors: None)
    monkeypatch.setattr(kernel, "attend", attend)
    inputs = tensors(dtype=torch.float32)
    found = gradients(pladis_attention(*inputs), *inputs)
    assert len(calls) == 1
    assert_near(found, gradients(pladis_attention(*inputs, backend="portable"), *inputs), 0)


def test_the_entmax_package_is_not_needed():
    """Training a LoRA through the pack failed with "pip install entmax" where ComfyUI's users have no such package."""
    code = """
import sys
sys.modules["entmax"] = None
import torch
from pladis_core import attention_with_lse, entmax, joint_correction, pladis_weights
from pladis_core import pladis_attention, pladis_correction
q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 7, 7))
out, lse = attention_with_lse(q, k, v)
for backend in ("auto", "portable", "eager"):
    for function in (pladis_attention, pladis_correction):
        out = out + function(q, k, v, backend=backend)
out = out + joint_correction(q, k, v, lse)
(out.sum() + pladis_weights(q @ k.mT)[..., 0].sum() + entmax(q @ k.mT)[..., 0].sum()).backward()
assert all(t.grad.isfinite().all() and t.grad.any() for t in (q, k, v))
try:
    pladis_attention(q, k, v, backend="reference")
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "pip install entmax" in result.stdout


def whole_rows(q, k, v, mask, alpha):
    """Joint attention, written out: rows `ROWS` with the text columns `TEXT` remixed, lambda 2."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -1e6)
    weights, text = scores.softmax(-1), scores[..., TEXT]
    mixed = weights[..., TEXT].sum(-1, keepdim=True) * (2 * oracle(text, alpha) - text.softmax(-1))
    remixed = torch.cat([weights[..., : TEXT.start], mixed, weights[..., TEXT.stop :]], -1)
    return torch.cat([weights[:, :, : ROWS.start], remixed[:, :, ROWS]], 2) @ v


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kernel", (True, False))
def test_joint_attention_has_the_gradient_of_the_definition(kernel, alpha, masked):
    """The log-sum-exp of the row takes part: kernels return it without a graph, which lost the image keys' share.

    The hosts write into the dense output, which the kernel's own backward pass needs as it was.
    """
    q, k, v = tensors(queries=40, keys=40)
    mask = torch.rand(2, 1, 40, 40) > 0.3 if masked else None
    if kernel:
        dense, lse = attention_with_lse(q, k, v, mask)
    else:
        dense, lse = scaled_dot_product_attention(q, k, v, mask).clone(), log_sum_exp(q, k, mask)
    part = None if mask is None else mask[:, :, ROWS, TEXT]
    dense[:, :, ROWS] += joint_correction(
        q[:, :, ROWS], k[:, :, TEXT], v[:, :, TEXT], lse[:, :, ROWS], part, alpha=alpha
    )
    assert_near(gradients(dense, q, k, v), gradients(whole_rows(q, k, v, mask, alpha), q, k, v), 1e-7)


def test_the_log_sum_exp_and_its_gradient():
    q, k, v = tensors(heads=4, kv_heads=2)
    for mask in (None, masks()["boolean"], masks()["bias"], masks()["bias"].requires_grad_()):
        inputs = (q, k) if mask is None or not mask.requires_grad else (q, k, mask)
        expected = gradients(joint._chunked_lse(q, k.repeat_interleave(2, 1), mask, 0.25), *inputs)
        found = gradients(log_sum_exp(q, k, mask, enable_gqa=True), *inputs)
        assert_near(found, expected)
        result = attention_with_lse(q, k, v, mask, enable_gqa=True)
        # the kernel gives masks no gradient
        assert (result is None) == (len(inputs) == 3)
        if result is not None:
            assert_near(gradients(result[1], *inputs), expected)
