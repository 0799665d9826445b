"""The kernel for NVIDIA's tensor cores, with no GPU: fused.cu compiled by g++, its threads as fibers of a CPU.

What a CPU cannot show: NVIDIA's own instructions (tensor_cores.cuh), the driver's launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from test_attention import definition
from test_entmax import clusters, oracle
from test_triton import assert_as_good_as_naive, mixed_in_part
from warps_on_cpu import built, needs_gcc, nothing_in_new_tensors, run  # noqa: F401

from pladis_core import api, pladis_attention
from pladis_core.impl import cuda, cuda_driver, eager, trial

LOOP = """
extern "C" bool attention_on_cpu(int blocks, const half_t* query, const half_t* key, const half_t* value, half_t* out,
                                 const float* mask, const unsigned char* mixed, const float* mass, Problem sizes) {
    kernel = [=] { pladis_attention(query, key, value, out, mask, mixed, mass, sizes); };
    for (int block = 0; block < blocks; ++block)
        if (!run_block(block, WARPS * 32)) return false;
    return true;
}
extern "C" long products_since(int in_halves) { return std::exchange(saturated_products[in_halves], 0); }
"""
# (B, H, Hkv, Lq, Lk, D, Dv)
SHAPES = {
    "sdxl": (2, 2, 2, 20, 77, 64, 64),
    "sd15": (1, 2, 2, 35, 77, 40, 40),
    "sd15 wide": (1, 1, 1, 17, 77, 160, 160),
    "grouped": (1, 4, 2, 17, 7, 8, 24),
    "one key": (2, 1, 1, 3, 1, 16, 16),
    "sixteen keys": (1, 1, 1, 33, 16, 16, 16),
    "two prompts": (1, 2, 2, 33, 154, 40, 40),
    "pixart": (1, 1, 1, 65, 300, 72, 72),
    "flux": (1, 1, 1, 40, 512, 128, 128),
    "narrow": (1, 1, 1, 150, 400, 16, 16),
    "ltx": (1, 1, 1, 20, 1000, 64, 64),
}

pytestmark = needs_gcc


class OnCpu(cuda.Kernel):
    """A variant, on CPU tensors."""

    def __init__(self, variant: cuda.Variant, folder) -> None:
        name = "-".join(map(str, variant))
        self._loops = built(folder, name, variant.definitions, cuda.SOURCES[-1].read_text(), LOOP)

    def launch(self, blocks, tensors, problem) -> None:
        run(self._loops.attention_on_cpu, blocks, tensors, problem)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")

    @cache
    def made(device, variant):
        return OnCpu(variant, folder)

    return made


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, kernels):
    """The backend takes CPU tensors."""
    monkeypatch.setattr(cuda, "kernel_of", kernels)
    taken = cuda.unusable

    def unusable(query, key, value):
        reason = taken(query, key, value)
        return None if reason == "it is for NVIDIA GPUs, not for cpu tensors" else reason

    monkeypatch.setattr(cuda, "unusable", unusable)


def tensors(shape, dtype=torch.float16):
    """As hosts lay them out: heads behind positions."""
    batch, heads, kv_heads, queries, keys, width, value_width = SHAPES[shape]
    sizes = (queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)
    return tuple(torch.randn(batch, *size).to(dtype).transpose(1, 2) for size in sizes)


def attend(query, key, value, mask=None, part=None, alpha=1.5, dense=-1.0, sparse=2.0, mass=None, row_lse=None):
    assert cuda.unusable(query, key, value) is None
    return cuda.attend(
        query, key, value, mask, part, query.shape[-1] ** -0.5, alpha, dense, sparse, mass, row_lse
    )


def assert_close(out, expected, roundings=4.0):
    """To within so many roundings of the largest value."""
    allowed = roundings * torch.finfo(out.dtype).eps * expected.abs().max().item()
    assert (out.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize(
    ("shape", "alpha", "dtype"),
    [
        ("sdxl", 1.0, "float16"), ("sdxl", 1.002, "bfloat16"), ("sdxl", 1.0001, "float16"), ("sdxl", 1.02, "float16"),
        ("sdxl", 1.25, "float16"), ("sdxl", 1.1, "bfloat16"), ("sdxl", 1.3, "float16"), ("sdxl", 1.9, "bfloat16"),
        ("sdxl", 2.0 - 1e-8, "float16"), ("sdxl", 1.5, "float16"), ("sdxl", 1.5, "bfloat16"),
        ("sdxl", 2.0, "float16"), ("sdxl", 2.0, "bfloat16"), ("sd15", 1.5, "float16"), ("sd15 wide", 1.5, "float16"),
        ("grouped", 1.5, "float16"), ("one key", 1.5, "float16"), ("sixteen keys", 2.0, "float16"),
        ("two prompts", 1.5, "bfloat16"), ("pixart", 1.5, "bfloat16"), ("flux", 1.5, "bfloat16"),
        ("flux", 2.0, "float16"), ("ltx", 1.5, "bfloat16"), ("narrow", 1.5, "float16"),
    ],
)  # fmt: skip
def test_every_alpha_shape_and_dtype(shape, alpha, dtype):
    query, key, value = tensors(shape, getattr(torch, dtype))
    out = pladis_attention(query, key, value, alpha=alpha, enable_gqa=True, backend="cuda")
    assert_as_good_as_naive(out, query, key, value, alpha=alpha)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("two prompts", "boolean"), ("two prompts", "additive"), ("grouped", "per query"), ("flux", "per query")],
)
def test_masks_of_every_kind(shape, kind):
    query, key, value = tensors(shape)
    batch, _, queries, _ = query.shape
    keep = torch.rand(batch, 1, queries if kind == "per query" else 1, key.shape[2]) < 0.6
    keep[..., 0] = True
    mask = keep if kind == "boolean" else torch.randn(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    out = pladis_attention(query, key, value, mask, enable_gqa=True, backend="cuda")
    exact = mask if kind == "boolean" else mask.double().masked_fill(~keep, -torch.inf)
    assert_close(out, definition(query, key, value, exact))


def test_a_query_with_every_key_masked_gets_zero():
    query, key, value = tensors("sdxl")
    mask = torch.rand(2, 1, 20, 77) < 0.5
    mask[:, :, 3] = False
    out = pladis_attention(query, key, value, mask, backend="cuda")
    assert (out[:, :, 3] == 0).all() and (out[:, :, 4] != 0).any()


def test_a_masked_key_changes_nothing_however_large():
    query, key, value = tensors("sdxl")
    mask = torch.ones(2, 1, 1, 77, dtype=torch.bool)
    mask[..., 5] = False
    before = pladis_attention(query, key, value, mask, backend="cuda")
    key[:, :, 5] = 6e4
    assert torch.equal(pladis_attention(query, key, value, mask, backend="cuda"), before)


@pytest.mark.parametrize("shape", ("two prompts", "flux"))
@pytest.mark.parametrize("dense", (-1.0, -2.0), ids=("attention", "correction"))
@pytest.mark.parametrize("masked", (False, True))
def test_entmax_takes_part_in_the_keys_of_a_mix_mask_alone(masked, dense, shape):
    query, key, value = tensors(shape)
    _, heads, queries, _ = query.shape
    keys = key.shape[2]
    part = torch.rand(1, keys) < 0.4
    mask = None
    if masked:
        mask = torch.rand(1, heads, queries, keys) < 0.7
        # of a row no key that is mixed is left
        mask[:, :, 3] = ~part[:, None]
    out = attend(query, key, value, mask, part, 1.5, dense, 2.0)
    assert_close(out, mixed_in_part(query, key, value, part, mask, 1.5, dense, 2.0))


def test_keys_that_are_mixed_may_lie_far_below_the_others():
    query, key, value = tensors("sdxl")
    part = torch.arange(77)[None].expand(2, -1) >= 40
    key[:, :, :40] += 3.0 * query.mean((2,), keepdim=True).sign()
    query = query * 8.0
    out = attend(query, key, value, None, part)
    assert_close(out, mixed_in_part(query, key, value, part, None, 1.5, -1.0, 2.0))


@pytest.mark.parametrize("shape", ("sdxl", "flux"))
def test_mass_and_the_log_sum_exp_of_a_longer_row(shape):
    query, key, value = tensors(shape)
    batch, heads, queries, width = query.shape
    mass = torch.rand(batch, 1, queries, 1)
    own = (query.double() @ key.double().mT * width**-0.5).logsumexp(-1, keepdim=True)
    difference = definition(query, key, value, correction=True)
    out = attend(query, key, value, dense=-2.0, mass=mass.expand(batch, heads, queries, 1))
    assert_close(out, mass * difference)
    longer = own - mass.double().log()
    out = attend(query, key, value, dense=-2.0, row_lse=longer.float())
    assert_close(out, mass * difference)
    # a longer row that is masked throughout
    nothing = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.bool)
    assert (attend(query, key, value, nothing, row_lse=longer * torch.nan) == 0).all()


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_clusters_where_entmax_prunes(alpha):
    """Scores through a product with one column, weights through the unit matrix."""
    value = torch.eye(80, dtype=torch.float16)[None, None, :77]
    for scores in clusters(alpha, 77):
        for row in scores[:3].half():
            query, key = torch.zeros(1, 1, 1, 16).half(), torch.zeros(1, 1, 77, 16).half()
            query[..., 0], key[..., 0] = 4.0, row
            weights = attend(query, key, value, alpha=alpha, dense=0.0, sparse=1.0)[0, 0, 0, :77]
            expected = oracle(row.double(), alpha)
            # what a step's tolerance leaves, and roundings
            assert (weights.double() - expected).abs().max() <= 2e-4 + torch.finfo(torch.float16).eps


@pytest.mark.parametrize("shape", ("sdxl", "flux"))
@pytest.mark.parametrize("size", (30.0, 300.0, 1e4), ids=("moderate", "large", "beyond float32's last digits"))
def test_large_scores(shape, size):
    query, key, value = tensors(shape, torch.bfloat16)
    query = (query * size).bfloat16()
    for alpha in (1.5, 2.0):
        out = pladis_attention(query, key, value, alpha=alpha, enable_gqa=True, backend="cuda")
        # products of large numbers are rounded to float32 before anything is compared
        assert_as_good_as_naive(out, query, key, value, alpha=alpha)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_finite_inputs_give_finite_outputs(dtype):
    top = torch.finfo(dtype).max
    query, key, value = tensors("grouped", dtype)
    query[:, :, 0], key[:, :, 0], value[:, :, 1] = top, -top, top
    key[:, :, 2], value[:, :, 3] = top, -top
    # sums of infinities of both signs
    query[:, :, 1, ::2], query[:, :, 1, 1::2] = top, -top
    # every score far below the range
    query[:, :, 4] = -top
    for lam in (2.0, 1e6):
        assert pladis_attention(query, key, value, lam=lam, enable_gqa=True, backend="cuda").isfinite().all()
    key[:] = top
    out = pladis_attention(query, key, value, lam=1.0, enable_gqa=True, backend="cuda")
    # equal scores, if of minus infinity: a mean
    expected = value.double().mean(2)[:, :1]
    assert_close(out[:, :2, 4], expected.expand(-1, 2, -1), 8.0)


@pytest.mark.parametrize("lam", (-1.0, 1e-6, 0.4, 1.0, 7e4, 1e6))
def test_lambda_of_every_size(lam):
    query, key, value = tensors("sdxl")
    value = value / max(abs(lam), 1.0)
    out = pladis_attention(query, key, value, lam=lam, backend="cuda")
    expected = definition(query, key, value, lam=lam)
    assert (out.double() - expected).abs().max() <= 4e-3 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("shape", ("sdxl", "flux"))
def test_rounded_weights_add_up(shape):
    query, key, value = tensors(shape, torch.bfloat16)
    value = value + 10
    expected = definition(query, key, value)
    error = (pladis_attention(query, key, value, backend="cuda").double() - expected).square().mean()
    assert error <= 1.15**2 * (expected.bfloat16().double() - expected).square().mean()


@pytest.mark.parametrize("alpha", (1.25, 1.5, 1.9, 2.0))
@pytest.mark.parametrize("spread", (0.01, 0.1, 0.3))
@pytest.mark.parametrize("keys", (77, 512))
def test_scores_that_are_nearly_equal(keys, spread, alpha):
    """The root lies where most keys are about to drop out, and the sum of all counts what is off."""
    query, key, value = (torch.randn(1, 1, rows, 64) for rows in (32, keys, keys))
    inputs = [t.half() for t in (query * spread, key, value)]
    expected = definition(*inputs, alpha=alpha)
    error = pladis_attention(*inputs, alpha=alpha, backend="cuda").double() - expected
    # weights are rounded, too
    assert error.square().mean() <= 1.8**2 * (expected.half().double() - expected).square().mean()


@pytest.mark.parametrize("scale", (-0.2, 0.0, 0.5))
def test_scales_of_every_sign(scale):
    query, key, value = tensors("sdxl")
    out = pladis_attention(query, key, value, scale=scale, backend="cuda")
    assert_close(out, definition(query, key, value, scale=scale))


@pytest.mark.parametrize("shape", ("sd15", "narrow"))
@pytest.mark.parametrize("blocks", (1, 2, 100))
def test_blocks_divide_the_tiles_of_a_head_in_any_way(shape, blocks, monkeypatch):
    inputs = tensors(shape)
    whole, launch = attend(*inputs), OnCpu.launch

    def with_other_blocks(kernel, count, tensors, problem):
        other = cuda.Problem.from_buffer_copy(problem)
        other.blocks = blocks
        launch(kernel, count // problem.blocks * blocks, tensors, other)

    monkeypatch.setattr(OnCpu, "launch", with_other_blocks)
    assert torch.equal(attend(*inputs), whole)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_of_the_steps_in_half_precision_few_are_left_to_float32(alpha, kernels):
    query, key, value = (torch.randn(1, 1, length, 64).half() for length in (64, 80, 80))
    variant = cuda.variant_of(query.shape, value.shape, query.dtype, 0.125, alpha, -1.0, 2.0, False, False, 0)
    loops = kernels(query.device, variant)._loops
    # what other tests left
    for in_halves in (0, 1):
        loops.products_since(in_halves)
    assert_close(attend(query, key, value, alpha=alpha), definition(query, key, value, alpha=alpha))
    counts = [loops.products_since(in_halves) for in_halves in (0, 1)]
    # groups of warps past the last row compute that one
    tiles = variant.groups
    of_number, in_halves = (count / (tiles * 16 * 80) for count in counts)
    # of each score one product is the weight's
    assert of_number - 1 <= 1.5 and 1.0 <= 2 * in_halves <= 4.5, (of_number - 1, 2 * in_halves)


def test_texts_of_about_a_length_share_a_kernel(kernels):
    query = torch.randn(1, 1, 5, 8).half()
    made = kernels.cache_info().misses
    for keys in (97, 100, 111, 112):
        key, value = torch.randn(1, 1, keys, 8).half(), torch.randn(1, 1, keys, 8).half()
        assert_close(attend(query, key, value), definition(query, key, value))
    assert kernels.cache_info().misses == made + 1


def test_the_output_is_laid_out_as_hosts_want_it_and_zero_sizes():
    query, key, value = tensors("sdxl")
    # the caller merges heads without a copy
    assert attend(query, key, value).transpose(1, 2).is_contiguous()
    assert attend(query[:, :, :0], key, value).shape == (2, 2, 0, 64)
    assert (attend(query, key[:, :, :0], value[:, :, :0]) == 0).all()


def in_front_of_a_wall(tensor: torch.Tensor, behind: bool) -> torch.Tensor:
    """A copy, laid out alike, whose last byte, or the first one, has memory beyond it that nobody may touch."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    page, size = mmap.PAGESIZE, flat.numel() * flat.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + 2 * page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for wall in (first, first + page + pages):
        assert libc.mprotect(ctypes.c_void_p(wall), page, 0) == 0
    start = page if behind else page + pages - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=flat.numel(), offset=start)
    copy.copy_(flat)
    WALLS.append(memory)
    return copy.as_strided(tensor.shape, tensor.stride())


# kept: nothing unmaps what a tensor lies in
WALLS: list[mmap.mmap] = []


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("behind", (False, True), ids=("before", "behind"))
@pytest.mark.parametrize("shape", ("sdxl", "sd15", "grouped", "one key", "pixart", "flux"))
def test_nothing_outside_of_the_tensors_is_touched(shape, behind, monkeypatch):
    """On a GPU that would take the whole process down; here it would, too."""
    query, key, value = tensors(shape)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    mask, part = torch.randn(batch, heads, queries, keys), torch.rand(batch, keys) < 0.5
    mass = torch.rand(batch, heads, queries, 1)
    inputs = query, key, value, mask, part, 1.5, -1.0, 2.0, mass
    expected = attend(*inputs)
    walled = [in_front_of_a_wall(t, behind) if isinstance(t, torch.Tensor) else t for t in inputs]
    made = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: in_front_of_a_wall(made(*args), behind))
    assert torch.equal(attend(*walled), expected)
    assert torch.equal(attend(*walled[:3]), attend(*inputs[:3]))


def test_every_problem_that_fits_has_tiles_that_fit():
    for keys, width in ((1, 8), (77, 40), (80, 256), (154, 128), (231, 64), (300, 72), (512, 128), (1000, 128)):
        chosen = cuda.sizes(keys, width, width)
        variant = cuda.Variant(
            keys=-(-keys // 16) * 16, least_keys=1, width=width, value=width, **chosen, alpha=15, power=0, type=16,
            unit=True, mask=False, mix=False, mass=0, flip=False,
        )  # fmt: skip
        assert variant.chunk % (16 * variant.share) == 0 and variant.warps % variant.share == 0
        assert variant.shared_bytes <= 64 << 10
        assert variant.chunks * variant.chunk >= keys


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "float16 or bfloat16.*not float32"),
        (lambda q, k, v: (q, k, v.bfloat16()), "the same for query, key and value"),
        (lambda q, k, v: (q[..., :60], k[..., :60], v), "multiple of 8 up to 256, not 60 or 64"),
        (lambda q, k, v: (q, k.repeat(1, 1, 20, 1), v.repeat(1, 1, 20, 1)), "at most 1024 keys, not 1540"),
        (lambda q, k, v: (q, k.repeat(1, 1, 8, 4), v.repeat(1, 1, 8, 4)), "leave its registers"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), "contiguous and begin at multiples of 16 bytes"),
        (lambda q, k, v: (torch.cat([q, q], -1)[..., 4:68], k, v), "contiguous and begin at multiples of 16 bytes"),
    ],
)
def test_what_it_cannot_take_it_names(change, reason):
    query, key, value = change(*tensors("sdxl"))
    if key.shape[-1] > query.shape[-1]:
        query = query.repeat(1, 1, 1, 4)
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot take these tensors: .*{reason}"):
        pladis_attention(query, key, value, backend="cuda")


class Wrong(cuda.Kernel):
    """Runs, and writes what nobody asked for."""

    def __init__(self) -> None:
        pass

    def launch(self, blocks, tensors, problem) -> None:
        tensors[3].fill_(0.5)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog):
    def wrong(device, variant):
        cuda.check(Wrong(), device, variant)

    monkeypatch.setattr(cuda, "kernel_of", wrong)
    monkeypatch.setattr(api, "_trials", [trial.Trials("cuda", "NVRTC")])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    inputs = tensors("sdxl")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="portable"))
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith("PLADIS: NVRTC fails on cpu (RuntimeError: its result is off by ")


def test_a_kernel_that_fails_while_a_graph_is_recorded_is_tried_again_later(monkeypatch):
    def fails(device, variant):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda, "kernel_of", fails)
    monkeypatch.setattr(trial, "is_recorded", lambda device: True)
    trials, inputs = trial.Trials("cuda", "NVRTC"), tensors("sixteen keys")
    rest = None, None, 0.25, 1.5, -1.0, 2.0, None, None
    with pytest.raises(RuntimeError, match="capturing"):
        trials.attend(*inputs, *rest)
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "unusable", lambda *tensors: None)
    monkeypatch.setattr(cuda, "attend", eager.attend)
    assert trials.attend(*inputs, *rest) is not None


def test_a_device_beyond_use_is_told_with_a_way_out(monkeypatch, caplog):
    def fails(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered (700)")

    monkeypatch.setattr(cuda, "attend", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"), caplog.at_level(logging.ERROR):
        trial.Trials("cuda", "NVRTC").attend(*tensors("sixteen keys"), None, None, 0.25, 1.5, -1.0, 2.0, None, None)
    assert "start with PLADIS_WITHOUT=cuda in the environment" in caplog.text


def test_the_environment_leaves_backends_out():
    code = "from pladis_core import api; print(*[trials.backend for trials in api._trials])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PLADIS_WITHOUT"] = "triton,cuda"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["nvrtc"], found.stderr


@pytest.mark.parametrize("name", ("attn_mask", "mix_mask"))
def test_a_tensor_on_another_device_is_refused_before_a_kernel_gets_its_address(name):
    query, key, value = tensors("sixteen keys")
    with pytest.raises(ValueError, match=f"{name} is on meta and query on cpu"):
        pladis_attention(query, key, value, **{name: torch.ones(1, 16, dtype=torch.bool, device="meta")})


@pytest.mark.parametrize("changes", ({}, {"unit": False}, {"flip": True}, {"mix": True, "unit": False, "mass": 2}))
def test_a_right_kernel_passes_its_check(kernels, changes):
    variant = variant_of_sixteen_keys()._replace(**changes)
    cuda.check(kernels(torch.device("cpu"), variant), torch.device("cpu"), variant)


def test_without_triton_auto_takes_it_before_the_kernel_between_two_products(monkeypatch):
    calls = []
    monkeypatch.setattr(cuda, "attend", lambda *args: (calls.append(1), eager.attend(*args))[1])
    monkeypatch.setattr(api, "_trials", [trials for trials in api._trials if trials.backend != "triton"])
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    inputs = tensors("sdxl")
    torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="portable"))
    assert calls == [1]


class Driver:
    """What CUDA's driver does with a launch, on a CPU."""

    def __init__(self, loop, sizes) -> None:
        self._loop, self._sizes = loop, sizes
        self.launches: list[tuple] = []

    def cuModuleLoadData(self, module, image):
        assert image == b"machine code"
        module._obj.value = 11
        return 0

    def cuModuleGetFunction(self, function, module, name):
        assert module.value == 11
        function._obj.value = {b"pladis_attention": 12}[name]
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        assert (function.value, attribute) == (12, 8)
        self.shared_bytes = value
        return 0

    def cuLaunchKernel(self, function, x, y, z, threads, b, c, shared_bytes, stream, addresses, extra):
        assert (function.value, y, z, b, c, shared_bytes, stream.value, extra) == (
            12, 1, 1, 1, 1, self.shared_bytes, 99, None,
        )  # fmt: skip
        *pointers, last = (ctypes.c_void_p.from_address(address) for address in addresses)
        sizes = self._sizes.from_address(ctypes.addressof(last))
        self.launches.append((x, threads, sizes.blocks))
        assert self._loop(x, *pointers, sizes)
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"out of memory"
        return 0


@pytest.fixture
def a_gpu(monkeypatch, kernels):
    """A GPU of 4 multiprocessors, whose driver runs kernels on a CPU; gives the driver of the last variant loaded."""
    found = {}

    def compiled(variant, capability):
        assert capability == (8, 9)
        loop = kernels(torch.device("cpu"), variant)._loops.attention_on_cpu
        loop.restype = ctypes.c_bool
        found["driver"] = Driver(loop, cuda.Problem)
        return b"machine code"

    def library(names):
        assert names == cuda_driver.DRIVERS
        return found["driver"]

    monkeypatch.setattr(cuda, "compiled", compiled)
    monkeypatch.setattr(cuda_driver, "_library", library)
    monkeypatch.setattr(cuda, "_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=99, synchronize=lambda: None)
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4)
    )
    real = cache(KERNEL_OF.__wrapped__)
    monkeypatch.setattr(cuda, "kernel_of", real)
    return found


# before `on_a_cpu` puts another one in its place
KERNEL_OF = cuda.kernel_of


def test_the_driver_gets_every_address_and_checks_come_first(a_gpu):
    query, key, value = tensors("sd15")
    mask, part, mass = torch.randn(1, 2, 35, 77), torch.rand(1, 77) < 0.5, torch.rand(1, 2, 35, 1)
    arguments = query, key, value, mask, part, 0.15, 1.5, -1.0, 2.0, mass, None
    out = cuda.attend(*arguments)
    expected = eager.attend(*(t.float() if t is not None and i < 3 else t for i, t in enumerate(arguments)))
    assert_close(out, expected.double())
    driver = a_gpu["driver"]
    # 147 rows of 2 heads by one block each, then 35 rows of 2 heads: 3 tiles, of which a block has 8 at once
    assert driver.launches == [(2, 256, 1), (2, 256, 1)]
    out = cuda.attend(*arguments)
    assert len(driver.launches) == 3 and torch.equal(out, cuda.attend(*arguments))


def test_blocks_are_so_many_that_the_whole_device_has_as_much_to_do(a_gpu):
    query, key, value = (torch.randn(1, length, 2, 16).half().transpose(1, 2) for length in (16 * 50, 16, 16))
    out = attend(query, key, value)
    assert_close(out, definition(query, key, value))
    # 4 multiprocessors with 2 places each, 2 heads of 50 tiles: 4 blocks of each
    assert a_gpu["driver"].launches[-1] == (8, 256, 4)
    # SDXL's larger layers on 28, 82, 128 and 132 multiprocessors: no place has 10 % more to do than all on average
    for places in (56, 164, 256, 264):
        blocks = cuda.blocks_of_head(20, 256, 8, places)
        most = -(-20 * blocks // places) * 256 / blocks
        assert most <= 1.1 * 20 * 256 / places
    assert cuda.blocks_of_head(500, 1, 8, 264) == 1


def test_a_thread_without_a_context_gets_one(a_gpu, monkeypatch):
    inputs, launch, failed = tensors("sixteen keys"), Driver.cuLaunchKernel, []

    def at_first_without(driver, *arguments):
        if failed:
            return launch(driver, *arguments)
        failed.append(1)
        return 201

    attend(*inputs)
    monkeypatch.setattr(Driver, "cuLaunchKernel", at_first_without)
    assert_close(attend(*inputs), definition(*inputs))
    assert failed


def test_it_compares_itself_whatever_the_defaults_are(kernels):
    variant = variant_of_sixteen_keys()
    torch.set_default_dtype(torch.float16)
    try:
        cuda.check(kernels(torch.device("cpu"), variant), torch.device("cpu"), variant)
    finally:
        torch.set_default_dtype(torch.float32)


def variant_of_sixteen_keys():
    shapes = torch.Size((1, 1, 33, 16)), torch.Size((1, 1, 16, 16))
    return cuda.variant_of(*shapes, torch.float16, 0.25, 1.5, -1.0, 2.0, mask=False, mix=False, mass=0)


def test_what_the_driver_says_is_raised(a_gpu, monkeypatch):
    monkeypatch.setattr(Driver, "cuLaunchKernel", lambda *args: 2)
    with pytest.raises(RuntimeError, match=r"CUDA error: out of memory \(2\)"):
        attend(*tensors("sixteen keys"))
