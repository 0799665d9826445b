"""What a kernel made of its first arguments is compared with portable: what is right passes, what is wrong does not."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch

from pladis_core import api, pladis_attention
from pladis_core.impl import eager, trial
from pladis_core.impl.self_check import compare_output

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def arguments(kind: str, dtype: torch.dtype, queries: int = 300, keys: int = 77) -> list:
    """Those of a backend's `attend`: 3 x 4 heads, two of them to a head of key and value, 300 x 77 x 40."""
    query, key, value = (torch.randn(3, heads, length, 40) for heads, length in ((4, queries), (2, keys), (2, keys)))
    mask = mix_mask = mass = row_lse = None
    alpha, dense, sparse = 1.5, -1.0, 2.0
    if kind == "nearly equal":
        query *= 0.03
    elif kind == "peaks":
        query *= 20.0
    elif kind == "one value":
        value = 100.0 + 0.01 * value
    elif kind == "cancels":
        dense, sparse = -2.0, 2.0
    elif kind == "lambda 50":
        dense, sparse = -49.0, 50.0
    elif kind == "saturates":
        value, dense, sparse = (value * 2e4).clamp(-6e4, 6e4), -49.0, 50.0
    elif kind == "boolean mask":
        mask = torch.rand(3, 4, queries, keys) < 0.5
        mask[:, :, ::7] = False
    elif kind == "additive mask":
        mask = torch.randn(1, 1, 1, keys).masked_fill(torch.rand(1, 1, 1, keys) < 0.3, -torch.inf)
        mask = mask.to(dtype).expand(3, 4, queries, keys)
    elif kind == "mixed":
        mix_mask = torch.rand(3, keys) < 0.5
    elif kind == "mass":
        mass = torch.rand(3, 4, queries, 1)
    elif kind == "longer row":
        row_lse = 3.0 + 6.0 * torch.rand(3, 4, queries, 1)
    elif kind == "sparsemax":
        alpha = 2.0
    query, key, value = (t.to(dtype) for t in (query, key, value))
    return [query, key, value, mask, mix_mask, 40**-0.5, alpha, dense, sparse, mass, row_lse]


KINDS = (
    "plain", "nearly equal", "peaks", "one value", "cancels", "lambda 50", "saturates", "boolean mask", "additive mask",
    "mixed", "mass", "longer row", "sparsemax",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_passes(kind, dtype):
    given = arguments(kind, dtype)
    out = eager.attend(*given)
    assert compare_output(out, *given)
    # as far off as weights rounded to `dtype` make it
    noise = torch.randn(out.shape) * out.float().square().mean().sqrt() * torch.finfo(dtype).eps
    largest = torch.finfo(dtype).max
    assert compare_output((out.float() + noise).clamp(-largest, largest).to(dtype), *given)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 77), (2, 77), (128, 512), (4096, 16)])
def test_any_number_of_rows(queries, keys):
    given = arguments("plain", torch.float32, queries, keys)
    out = eager.attend(*given)
    assert compare_output(out, *given)
    with pytest.raises(RuntimeError, match="off by"):
        compare_output(2.0 * out, *given)


def broken(out: torch.Tensor, how: str) -> torch.Tensor:
    out = out.clone()
    if how == "a tile of rows":
        out[:, :, 64:80] = 0.0
    elif how == "not a number":
        out[..., -1, 0] = torch.nan
    elif how == "columns":
        out[..., 32:] = out[..., 24:32]
    elif how == "a fifth too large":
        out *= 1.2
    elif how == "other heads":
        out = out.flip(1)
    else:
        out = out.roll(1, 2)
    return out


HOW = ("a tile of rows", "not a number", "columns", "a fifth too large", "other heads", "other rows")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("plain", "peaks", "mixed", "sparsemax"))
def test_what_is_wrong_does_not(kind, dtype, how):
    given = arguments(kind, dtype)
    with pytest.raises(RuntimeError, match="off by"):
        compare_output(broken(eager.attend(*given), how), *given)


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
def test_inputs_that_are_not_finite_say_nothing(value):
    given = arguments("plain", torch.float16)
    given[2][:, :, 5, 3] = value
    for out in (torch.zeros_like(given[0]), torch.full_like(given[0], torch.nan)):
        assert not compare_output(out, *given)


def test_outputs_that_are_zero_say_nothing():
    given = arguments("plain", torch.float16)
    given[2].zero_()
    assert not compare_output(eager.attend(*given), *given)


@pytest.mark.parametrize("how", ("a tile of rows", "columns", "other heads", "other rows"))
@pytest.mark.parametrize("keys", (77, 4096))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_share_of_a_longer_row_is_compared_as_closely(dtype, keys, how):
    given = arguments("cancels", dtype, keys=keys)
    given[9] = torch.full((3, 4, 300, 1), 0.01)
    out = eager.attend(*given)
    assert compare_output(out, *given)
    with pytest.raises(RuntimeError, match="off by"):
        compare_output(broken(out, how), *given)


@pytest.fixture
def unseen(monkeypatch):
    """Triton's kernel on the CPU, in its interpreter, as if that were a device where it has not run yet."""
    backend = pytest.importorskip("pladis_core.impl.triton", reason="no Triton on this system")
    monkeypatch.setattr(backend, "_compared", set())
    monkeypatch.setattr(backend, "_tried", Counter())
    monkeypatch.setattr(backend, "_is_unseen", lambda variant: variant not in backend._compared)
    monkeypatch.setattr(api, "_trials", [trial.Trials("triton", "Triton")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    compared = []
    exact = backend.compare_output
    monkeypatch.setattr(backend, "compare_output", lambda *args: compared.append(1) or exact(*args))
    return backend, compared


def inputs(queries=20, keys=20, dtype=torch.float32):
    return tuple(torch.randn(1, 2, length, 16, dtype=dtype) for length in (queries, keys, keys))


def test_each_variant_of_tritons_kernel_is_compared_once(unseen, caplog):
    _, compared = unseen
    with caplog.at_level(logging.WARNING):
        for tensors in (inputs(), inputs(), inputs(21), inputs(dtype=torch.float16), inputs(keys=40)):
            pladis_attention(*tensors)
        pladis_attention(*inputs(), lam=3.0)
        pladis_attention(*inputs(), alpha=2.0)
    assert len(compared) == 4 and not caplog.records


@pytest.mark.parametrize("how", ("a tile of rows", "not a number", "columns"))
def test_where_tritons_kernel_is_wrong_another_is_taken_and_that_is_said(unseen, monkeypatch, caplog, how):
    backend, compared = unseen
    launch = backend.launch

    def wrong(chosen, tensors):
        is_new = launch(chosen, tensors)
        out = tensors[-1]
        # four rows of twenty
        out.copy_(broken(out, how) if how != "a tile of rows" else out.index_fill(2, torch.arange(4), 0.0))
        return is_new

    monkeypatch.setattr(backend, "launch", wrong)
    tensors = inputs() if how != "columns" else tuple(torch.randn(1, 2, 20, 40) for _ in range(3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(pladis_attention(*tensors), pladis_attention(*tensors, backend="eager"))
    assert len(compared) == 1
    (record,) = caplog.records
    assert "off by" in record.message and "same images, slower" in record.message
    with pytest.raises(RuntimeError, match="off by"):
        pladis_attention(*tensors, backend="triton")
    with pytest.raises(RuntimeError, match="off by"):
        pladis_attention(*tensors, backend="triton")


def test_inputs_that_are_not_finite_leave_a_variant_to_be_compared(unseen):
    backend, compared = unseen
    query, key, value = inputs()
    pladis_attention(query, key, value * torch.nan)
    assert not backend._compared
    # the same layout
    pladis_attention(*inputs())
    assert len(compared) == 2 and len(backend._compared) == 1


def test_a_pipeline_of_zeros_is_not_compared_for_ever(unseen, monkeypatch):
    backend, compared = unseen
    query, key, value = inputs()
    monkeypatch.setattr(backend, "TRIES", 2)
    for _ in range(4):
        pladis_attention(query, key, value * 0.0)
    assert len(compared) == 2


def test_one_of_a_batch_that_is_zero_leaves_another_to_be_compared(unseen):
    backend, compared = unseen
    query, key, value = (t.repeat(2, 1, 1, 1) for t in inputs())
    value[1] = 0.0
    for _ in range(3):
        pladis_attention(query, key, value)
    assert len(compared) == len(backend._compared) == 1


def test_what_cannot_be_compared_now_is_compared_later(unseen, monkeypatch, caplog):
    backend, compared = unseen
    tensors = inputs()
    with monkeypatch.context() as recording:
        recording.setattr(backend, "is_recorded", lambda device: True)
        pladis_attention(*tensors)
    assert not compared
    with monkeypatch.context() as full:
        full.setattr(backend, "compare_output", lambda *args: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("out")))
        torch.testing.assert_close(pladis_attention(*tensors), pladis_attention(*tensors, backend="eager"))
    pladis_attention(*tensors)
    assert len(compared) == 1 and not caplog.records


def test_the_cpu_is_no_device_where_a_kernel_is_unseen():
    backend = pytest.importorskip("pladis_core.impl.triton", reason="no Triton on this system")
    assert not backend._is_unseen((torch.device("cpu"), "any"))
    assert backend._is_unseen((torch.device("cuda", 0), "any"))


def test_the_log_names_kernels_so_that_one_can_be_left_out():
    trials = [trials for trials in api._trials if trials.backend != "triton"]
    assert [trials._name for trials in trials] == ["NVRTC (cuda)", "NVRTC (nvrtc)"]
