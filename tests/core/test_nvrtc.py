"""The kernel for NVIDIA GPUs without Triton, with no GPU: rows.cu compiled by g++, its threads as fibers of a CPU.

What a CPU cannot show: torch's products of 16-bit tensors with float32 sums, the driver's launch, fast exponentials.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from test_attention import definition
from test_entmax import clusters, edges, oracle
from test_triton import assert_as_good_as_naive, mixed_in_part
from warps_on_cpu import built, needs_gcc, nothing_in_new_tensors, run  # noqa: F401

from pladis_core import api, pladis_attention
from pladis_core.impl import eager, nvrtc, trial

LOOPS = """
extern "C" bool pladis_rows_on_cpu(int blocks, const float* scores, weight_t* weights, float* factors,
                                   const float* mask, const unsigned char* mixed, const float* mass, Rows sizes) {
    kernel = [=] { pladis_rows(scores, weights, factors, mask, mixed, mass, sizes); };
    for (int block = 0; block < blocks; ++block)
        if (!run_block(block, 128)) return false;
    return true;
}
extern "C" bool pladis_scale_on_cpu(int blocks, const float* products, const float* factors, weight_t* out,
                                    Products sizes) {
    kernel = [=] { pladis_scale(products, factors, out, sizes); };
    for (int block = 0; block < blocks; ++block)
        if (!run_block(block, 128)) return false;
    return true;
}
"""
# (B, H, Hkv, Lq, Lk, D, Dv); threads to a row: 1, 1, 1, 2, 4, 8
SHAPES = {
    "sdxl": (2, 2, 2, 20, 77, 64, 64),
    "grouped": (1, 4, 2, 17, 7, 5, 9),
    "one key": (2, 1, 1, 3, 1, 16, 16),
    "two prompts": (1, 2, 2, 33, 154, 40, 40),
    "pixart": (1, 1, 1, 12, 300, 72, 72),
    "flux": (1, 1, 1, 9, 512, 128, 128),
}


pytestmark = needs_gcc


class OnCpu(nvrtc.Kernels):
    """The kernels of a variant, on CPU tensors."""

    def __init__(self, variant: nvrtc.Variant, folder: Path) -> None:
        self._rows_of_block = nvrtc.THREADS // variant.lanes
        name = "-".join(map(str, variant))
        self._loops = built(folder, name, variant.definitions, nvrtc.SOURCE.read_text(), LOOPS)

    def _launch(self, name, blocks, tensors, sizes) -> None:
        run(self._loops[f"{name}_on_cpu"], blocks, tensors, sizes)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")

    @cache
    def made(device, variant):
        kernels = OnCpu(variant, folder)
        nvrtc.check(kernels, device, variant)
        return kernels

    return made


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, kernels):
    """The backend takes CPU tensors."""
    monkeypatch.setattr(nvrtc, "kernels_of", kernels)
    monkeypatch.setattr(nvrtc, "unusable", lambda *tensors: None)
    monkeypatch.setattr(nvrtc, "buffer_bytes", lambda device: 32 << 20)


def tensors(shape, dtype=torch.float32):
    batch, heads, kv_heads, queries, keys, width, value_width = SHAPES[shape]
    sizes = (batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_width)
    return tuple(torch.randn(size).to(dtype) for size in sizes)


def attend(query, key, value, mask=None, part=None, alpha=1.5, dense=-1.0, sparse=2.0, mass=None, row_lse=None):
    return nvrtc.attend(
        query, key, value, mask, part, query.shape[-1] ** -0.5, alpha, dense, sparse, mass, row_lse
    )


@pytest.mark.parametrize(
    ("shape", "alpha", "dtype"),
    [
        ("sdxl", 1.0, "float32"), ("sdxl", 1.002, "bfloat16"), ("sdxl", 1.004, "float16"), ("sdxl", 1.02, "float32"),
        ("sdxl", 1.25, "float32"), ("sdxl", 1.9, "bfloat16"),
        ("sdxl", 1.5, "float32"), ("sdxl", 1.5, "float16"), ("sdxl", 1.5, "bfloat16"), ("sdxl", 2.0, "float32"),
        ("sdxl", 2.0, "bfloat16"), ("grouped", 1.5, "float16"), ("one key", 1.5, "float32"),
        ("two prompts", 1.5, "bfloat16"), ("pixart", 1.5, "float32"), ("flux", 1.5, "bfloat16"),
    ],
)  # fmt: skip
def test_every_alpha_shape_and_dtype(shape, alpha, dtype):
    query, key, value = tensors(shape, getattr(torch, dtype))
    out = pladis_attention(query, key, value, alpha=alpha, enable_gqa=True, backend="nvrtc")
    assert_as_good_as_naive(out, query, key, value, alpha=alpha)


@pytest.mark.parametrize(
    ("shape", "kind"), [("two prompts", "boolean"), ("two prompts", "additive"), ("grouped", "per query")]
)
def test_masks_of_every_kind(shape, kind):
    query, key, value = tensors(shape)
    batch, _, queries, _ = query.shape
    keep = torch.rand(batch, 1, queries if kind == "per query" else 1, key.shape[2]) < 0.6
    keep[..., 0] = True
    mask = keep if kind == "boolean" else torch.randn(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    out = pladis_attention(query, key, value, mask, enable_gqa=True, backend="nvrtc")
    exact = mask if kind == "boolean" else mask.double().masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(out.double(), definition(query, key, value, exact), atol=5e-6, rtol=0)


def test_a_query_with_every_key_masked_gets_zero():
    query, key, value = tensors("sdxl")
    mask = torch.rand(2, 1, 20, 77) < 0.5
    mask[:, :, 3] = False
    out = pladis_attention(query, key, value, mask, backend="nvrtc")
    assert (out[:, :, 3] == 0).all() and (out[:, :, 4] != 0).any()


def test_a_masked_key_changes_nothing_however_large():
    query, key, value = tensors("sdxl")
    mask = torch.ones(2, 1, 1, 77, dtype=torch.bool)
    mask[..., 5] = False
    before = pladis_attention(query, key, value, mask, backend="nvrtc")
    key[:, :, 5] = 1e38
    assert torch.equal(pladis_attention(query, key, value, mask, backend="nvrtc"), before)


@pytest.mark.parametrize("dense", (-1.0, -2.0), ids=("attention", "correction"))
@pytest.mark.parametrize("masked", (False, True))
def test_entmax_takes_part_in_the_keys_of_a_mix_mask_alone(masked, dense):
    query, key, value = tensors("two prompts")
    part = torch.rand(1, 154) < 0.4
    mask = None
    if masked:
        mask = torch.rand(1, 2, 33, 154) < 0.7
        # of a row no key that is mixed is left
        mask[:, :, 3] = ~part[:, None]
    out = attend(query, key, value, mask, part, 1.5, dense, 2.0)
    expected = mixed_in_part(query, key, value, part, mask, 1.5, dense, 2.0)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_mass_and_the_log_sum_exp_of_a_longer_row():
    query, key, value = tensors("sdxl")
    mass = torch.rand(2, 1, 20, 1)
    own = (query.double() @ key.double().mT * 64**-0.5).logsumexp(-1, keepdim=True)
    difference = attend(query, key, value, dense=-2.0).double()
    out = attend(query, key, value, dense=-2.0, mass=mass.expand(2, 2, 20, 1))
    torch.testing.assert_close(out.double(), mass * difference, atol=5e-6, rtol=0)
    longer = own - mass.double().log()
    out = attend(query, key, value, dense=-2.0, row_lse=longer.float())
    torch.testing.assert_close(out.double(), mass * difference, atol=5e-6, rtol=0)
    # a longer row that is masked throughout
    nothing = torch.zeros(2, 2, 20, 77, dtype=torch.bool)
    assert (attend(query, key, value, nothing, row_lse=longer * torch.nan) == 0).all()


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_clusters_where_entmax_prunes(alpha):
    """Scores through a product with one column: exact."""
    for scores in clusters(alpha, 77):
        rows = scores.float().reshape(-1, 77)[:4]
        for row in rows:
            query, key, value = torch.ones(1, 1, 1, 1), row.view(1, 1, 77, 1), torch.eye(77).view(1, 1, 77, 77)
            weights = attend(query, key, value, alpha=alpha, dense=0.0, sparse=1.0)[0, 0, 0]
            assert (weights.double() - oracle(row.double(), alpha)).abs().max() <= 2e-6


@pytest.mark.parametrize("keys", (77, 300))
@pytest.mark.parametrize("peaks", (1, 5, 17))
def test_ties_at_the_edge_of_sparsemax_come_in_by_no_more_than_their_weight(peaks, keys):
    scores = edges(keys, peaks)[::2]
    query, key, value = scores[None, None], torch.eye(keys)[None, None], torch.eye(keys)[None, None]
    weights = nvrtc.attend(query, key, value, None, None, 1.0, 2.0, 0.0, 1.0, None, None)[0, 0]
    assert (weights.double() - oracle(scores, 2.0)).abs().max() <= 4e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_finite_inputs_give_finite_outputs(dtype):
    top = torch.finfo(dtype).max
    query, key, value = tensors("grouped", dtype)
    query[:, :, 0], key[:, :, 0], value[:, :, 1] = top, -top, top
    key[:, :, 2], value[:, :, 3] = top, -top
    for lam in (2.0, 1e6):
        assert pladis_attention(query, key, value, lam=lam, enable_gqa=True, backend="nvrtc").isfinite().all()


@pytest.mark.parametrize("lam", (1e-6, 1.0, 7e4, 1e6))
def test_lambda_of_every_size_in_float16(lam):
    query, key, value = tensors("sdxl", torch.float16)
    value = value / max(lam, 1.0)
    out = pladis_attention(query, key, value, lam=lam, backend="nvrtc")
    expected = definition(query, key, value, lam=lam)
    assert (out.double() - expected).abs().max() <= 4e-3 * max(1.0, float(expected.abs().max()))


def test_rounded_weights_add_up():
    query, key, value = tensors("sdxl", torch.bfloat16)
    value = value + 10
    expected = definition(query, key, value)
    error = (pladis_attention(query, key, value, backend="nvrtc").double() - expected).square().mean()
    assert error <= 1.15**2 * (expected.bfloat16().double() - expected).square().mean()


def test_chunks_do_not_change_the_result_and_shrink_where_memory_runs_out(monkeypatch):
    inputs = tensors("sdxl")
    whole = attend(*inputs)
    monkeypatch.setattr(nvrtc, "buffer_bytes", lambda device: 77 * 6 * 4)
    torch.testing.assert_close(attend(*inputs), whole, atol=5e-6, rtol=0)
    empty, sizes = torch.empty, []

    def little_memory(size, **options):
        if isinstance(size, int):
            sizes.append(size)
            if size > 77 * 20:
                raise torch.cuda.OutOfMemoryError("full")
        return empty(size, **options)

    monkeypatch.setattr(nvrtc, "buffer_bytes", lambda device: 32 << 20)
    monkeypatch.setattr(torch, "empty", little_memory)
    torch.testing.assert_close(attend(*inputs), whole, atol=5e-6, rtol=0)
    assert sizes[0] > 77 * 20 >= sizes[-1]


def test_texts_of_about_a_length_share_a_kernel(kernels):
    query = torch.randn(1, 1, 5, 8)
    made = kernels.cache_info().misses
    for keys in (97, 100, 111, 112):
        key, value = torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 8)
        expected = definition(query, key, value)
        torch.testing.assert_close(attend(query, key, value).double(), expected, atol=5e-6, rtol=0)
    assert kernels.cache_info().misses == made + 1


def test_the_hosts_layout_and_zero_sizes():
    flat = torch.randn(2, 20, 128), torch.randn(2, 77, 128), torch.randn(2, 77, 128)
    query, key, value = (t.unflatten(-1, (2, 64)).transpose(1, 2) for t in flat)
    out = attend(query, key, value)
    torch.testing.assert_close(out.double(), definition(query, key, value), atol=5e-6, rtol=0)
    # the caller merges heads without a copy
    assert out.transpose(1, 2).is_contiguous()
    assert attend(query[:, :, :0], key, value).shape == (2, 2, 0, 64)
    assert (attend(query, key[:, :, :0], value[:, :, :0]) == 0).all()


class Wrong(nvrtc.Kernels):
    """Runs, and writes what nobody asked for."""

    def __init__(self) -> None:
        pass

    def _launch(self, name, blocks, tensors, sizes) -> None:
        tensors[1 if name == "pladis_rows" else 2].fill_(0.5)

    _rows_of_block = 128


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog):
    def wrong(device, variant):
        nvrtc.check(Wrong(), device, variant)

    monkeypatch.setattr(nvrtc, "kernels_of", wrong)
    monkeypatch.setattr(api, "_trials", [trial.Trials("nvrtc", "NVRTC")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    inputs = tensors("sdxl")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="portable"))
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith("PLADIS: NVRTC fails on cpu (RuntimeError: its result is off by ")


def test_without_triton_auto_takes_it(monkeypatch):
    calls = []
    monkeypatch.setattr(nvrtc, "attend", lambda *args: (calls.append(1), eager.attend(*args))[1])
    monkeypatch.setattr(api, "_trials", [trial.Trials("nvrtc", "NVRTC")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    inputs = tensors("sdxl")
    torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="portable"))
    assert calls == [1]
