"""The fused kernel against the definition in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import entmax as entmax_package
import pytest
import torch
from test_attention import definition
from test_entmax import cliffs, oracle

from pladis_core import api, pladis_attention, pladis_correction

triton_backend = pytest.importorskip("pladis_core.impl.triton", reason="no Triton on this system")
TRITON_VERSION = tuple(map(int, version("triton").split(".")[:2]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHAS = (1.0, 1.001, 1.25, 1.5, 1.9, 2.0)
# (B, H, Hkv, Lq, Lk, D, Dv): every head width of the hosts' models, tails of tiles, one key, one query, many keys
SHAPES = {
    "sd15 40": (2, 1, 1, 20, 77, 40, 40),
    "sdxl 64": (1, 1, 1, 20, 77, 64, 64),
    "pixart 72": (1, 1, 1, 12, 300, 72, 72),
    "sd15 80": (1, 1, 1, 33, 154, 80, 80),
    "hunyuan 88": (1, 1, 1, 12, 333, 88, 88),
    "lumina 96": (1, 1, 1, 40, 63, 96, 96),
    "wan 128": (1, 1, 1, 12, 512, 128, 128),
    "sd15 160": (1, 1, 1, 16, 77, 160, 160),
    "aura 256": (1, 1, 1, 20, 100, 256, 256),
    "odd": (1, 2, 2, 20, 7, 5, 9),
    "one key": (2, 2, 2, 10, 1, 16, 16),
    "one query": (1, 4, 4, 1, 77, 64, 64),
    "grouped": (1, 4, 2, 17, 100, 24, 24),
    "streaming": (1, 2, 1, 10, 530, 32, 16),
    "streaming 160": (1, 1, 1, 10, 600, 160, 160),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN: whatever the kernel does not write shows. The interpreter gains nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def tensors(shape, dtype=torch.float32):
    batch, heads, kv_heads, queries, keys, width, value_width = SHAPES[shape]
    return tuple(
        torch.randn(size, device=DEVICE).to(dtype)
        for size in (
            (batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_width)
        )
    )  # fmt: skip


def naive(query, key, value, mask=None, alpha=1.5, lam=2.0):
    """The formula as people write it, scores and products in the inputs' dtype."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask.to(scores.dtype)
    dense = scores.softmax(-1)
    sparse = entmax_package.entmax_bisect(scores.float(), alpha, -1) if alpha > 1 else dense
    return ((1 - lam) * dense + lam * sparse.to(dense.dtype)) @ value


def assert_as_good_as_naive(out, query, key, value, mask=None, **mix):
    assert out.dtype == query.dtype
    expected = definition(query, key, value, mask, **mix)
    error = (out.double() - expected).abs().max()
    allowed = 2 * (naive(query, key, value, mask, **mix).double() - expected).abs().max()
    # below it both are rounding of a last bit
    assert error <= max(float(allowed), 4 * torch.finfo(query.dtype).eps), (float(error), float(allowed))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape):
    query, key, value = tensors(shape)
    out = pladis_attention(query, key, value, enable_gqa=True, backend="triton")
    assert_as_good_as_naive(out, query, key, value)


@pytest.mark.parametrize(
    ("shape", "dtype", "alpha"),
    [("sd15 40", dtype, alpha) for dtype in (torch.float16, torch.bfloat16, torch.float32) for alpha in ALPHAS]
    + [("streaming", torch.bfloat16, alpha) for alpha in (1.25, 1.5, 2.0)],
)
def test_every_alpha_and_dtype_with_a_mask(shape, alpha, dtype):
    query, key, value = tensors(shape, dtype)
    mask = torch.randn(key.shape[0], 1, 1, key.shape[2], device=DEVICE)
    mask[..., ::5] = -1e4
    out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
    assert_as_good_as_naive(out, query, key, value, mask, alpha=alpha)


@pytest.mark.parametrize("alpha", (1.0 + 1e-9, 1.0 + 1e-5))
def test_alpha_just_above_one_is_softmax(alpha):
    query, key, value = tensors("sd15 40")
    out = pladis_attention(query * 3, key, value, alpha=alpha, backend="triton")
    torch.testing.assert_close(out.double(), definition(query * 3, key, value, lam=0.0), atol=5e-4, rtol=0)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("shape", ("sdxl 64",))
def test_rows_on_which_the_solver_has_it_hard(shape, alpha):
    """Plateaus under a peak, equal keys, one key far ahead, wide ladders."""
    query, key, value = tensors(shape)
    query, key = query.zero_(), key.zero_()
    rows = query.shape[2]
    query[..., 0] = torch.linspace(0, 40, rows, device=DEVICE)
    query[..., 1] = 1.0
    key[..., 0] = -(torch.rand(key.shape[:3], device=DEVICE) ** 3)
    key[..., ::2, 0] = -0.5
    key[..., 3, :2] = torch.tensor([0.0, 4.0], device=DEVICE)
    out = pladis_attention(query, key, value, scale=1.0, alpha=alpha, enable_gqa=True, backend="triton")
    expected = definition(query, key, value, scale=1.0, alpha=alpha)
    assert (out.double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("alpha", (1.99, 2.0))
def test_a_cluster_where_entmax_prunes(alpha):
    scores = cliffs(alpha, 77).to(DEVICE)
    identity = torch.eye(77, device=DEVICE)[None, None]
    mix = {"scale": 1.0, "lam": 1.0, "alpha": alpha}
    weights = pladis_attention(scores[None, None], identity, identity, **mix, backend="triton")[0, 0]
    assert (weights.cpu() - oracle(scores.cpu(), alpha)).abs().max() <= 77 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("shape", "alpha"), [("odd", 1.25), ("odd", 1.5), ("odd", 2.0), ("streaming", 1.5)])
def test_masks_of_every_kind(shape, alpha):
    query, key, value = tensors(shape)
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    keep = torch.rand(batch, heads, rows, keys, device=DEVICE) < 0.6
    keep[..., 0] = True
    expected = definition(query, key, value, keep, alpha=alpha)
    lowest = torch.zeros(keep.shape, device=DEVICE)
    for mask in (
        keep,
        lowest.masked_fill(~keep, -torch.inf),
        lowest.masked_fill(~keep, torch.finfo(torch.float32).min),
        lowest.bfloat16().masked_fill(~keep, torch.finfo(torch.bfloat16).min),
    ):
        out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "alpha"), [("odd", alpha) for alpha in (1.0, 1.25, 1.5, 2.0)] + [("streaming", 1.5)])
def test_a_query_with_every_key_masked_gets_zero(shape, alpha):
    query, key, value = tensors(shape)
    mask = torch.zeros(query.shape[2], key.shape[2], device=DEVICE)
    mask[5] = -torch.inf
    out = pladis_attention(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
    assert (out[:, :, 5] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("odd", torch.float32), ("odd", torch.bfloat16), ("odd", torch.float16), ("streaming", torch.bfloat16)],
)
def test_finite_inputs_give_finite_outputs(shape, dtype):
    top = torch.finfo(dtype).max
    for magnitude in (1e-30, top):
        query, key, value = (t.clamp(-1, 1).mul(min(magnitude, top)).to(dtype) for t in tensors(shape))
        for mask in (None, torch.full((query.shape[2], key.shape[2]), -3e38, device=DEVICE)):
            for alpha in (1.25, 1.5):
                for function in (pladis_attention, pladis_correction):
                    out = function(query, key, value, mask, alpha=alpha, enable_gqa=True, backend="triton")
                    assert out.isfinite().all(), (magnitude, alpha, function)


@pytest.mark.parametrize("shape", ("grouped", "streaming"))
def test_correction_and_mass(shape):
    query, key, value = tensors(shape)
    mass = torch.rand(query.shape[0], 1, query.shape[2], 1, device=DEVICE)
    out = pladis_correction(query, key, value, mass=mass, lam=1.7, enable_gqa=True, backend="triton")
    expected = mass.double() * definition(query, key, value, lam=1.7, correction=True)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ("grouped", "streaming"))
def test_mass_from_the_log_sum_exp_of_a_longer_row(shape):
    query, key, value = tensors(shape)
    row_lse = 2 + 3 * torch.rand(query.shape[0], 1, query.shape[2], 1, device=DEVICE)
    mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE)
    mask[3] = False
    given, own = (
        pladis_correction(query, key, value, mask, row_lse=row_lse, enable_gqa=True, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(given, own, atol=1e-5, rtol=0)
    assert (given[:, :, 3] == 0).all()


def test_lambda_zero_and_alpha_one_are_softmax_attention():
    query, key, value = tensors("sdxl 64")
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for options in ({"lam": 0.0}, {"alpha": 1.0}):
        out = pladis_attention(query, key, value, **options, backend="triton")
        torch.testing.assert_close(out, dense, atol=2e-6, rtol=0)


def test_strided_inputs_in_the_hosts_layout():
    q, k, v = (torch.randn(2, n, 4 * 16, device=DEVICE) for n in (60, 77, 77))
    strided = [t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v)]
    expanded = [t[:1].expand(2, -1, -1, -1) for t in strided]
    reversed_width = [t.flip(-1).mT.contiguous().mT for t in strided]
    for case in (strided, expanded, reversed_width):
        out = pladis_attention(*case, backend="triton")
        contiguous = pladis_attention(*(t.contiguous() for t in case), backend="triton")
        torch.testing.assert_close(out, contiguous, atol=1e-6, rtol=0)
    # merging the heads again needs no copy
    assert pladis_attention(*strided, backend="triton").transpose(1, 2).flatten(2).is_contiguous()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 5 GB of addresses are too slow for the interpreter")
def test_addresses_beyond_2_to_the_31():
    """Rows 2**27 elements apart, in memory of which only those rows are touched."""
    apart, rows, width = 2**27, 20, 16
    try:
        storage = torch.UntypedStorage(2 * (apart * (rows - 1) + width), device=DEVICE)
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        pytest.skip(f"not enough memory: {error}")
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (1, 1, rows, width), (0, 0, apart, 1))
    query, key, value = torch.randn(3, 1, 1, rows, width, device=DEVICE).half()
    expected = pladis_attention(query, key, value, backend="triton")
    for position in range(3):
        inputs = [query, key, value]
        inputs[position] = far.copy_(inputs[position])
        torch.testing.assert_close(pladis_attention(*inputs, backend="triton"), expected, atol=1e-6, rtol=0)


def test_zero_sizes():
    for batch, queries, keys in ((0, 5, 7), (1, 0, 7), (1, 5, 0)):
        sizes = (batch, 2, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 6)
        out = pladis_attention(*(torch.randn(size, device=DEVICE) for size in sizes), backend="triton")
        assert out.shape == (batch, 2, queries, 6)
        assert (out == 0).all()


@pytest.mark.parametrize("keys", (1, 16, 17, 48, 49, 77, 97, 128, 129, 154, 231, 257, 300, 333, 385, 512))
def test_tiles_cover_the_keys_and_little_more(keys):
    head, tail = triton_backend.key_tiles(keys)
    assert keys <= head + tail <= max(16, 1.5 * keys + 15)
    assert all(width == 0 or (width >= 16 and width & (width - 1) == 0) for width in (head, tail))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64"),
        (lambda q, k, v: (q, k.half(), v), "float16, float32"),
        (lambda q, k, v: (q.repeat(1, 1, 1, 5), k.repeat(1, 1, 1, 5), v), "320"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "no gradient"),
    ),
)
def test_what_it_cannot_take_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        pladis_attention(*change(*tensors("sdxl 64")), backend="triton")


def test_a_kernel_that_fails_is_reported_once_and_not_tried_again(monkeypatch, caplog):
    calls = []

    def fail(*args):
        calls.append(args)
        raise OSError("no C compiler\nmany more lines")

    monkeypatch.setattr(api, "_triton_works", True)
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    monkeypatch.setattr(triton_backend, "attend", fail)
    inputs = tensors("sdxl 64")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="eager"))
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == [
        "PLADIS: Triton fails on this machine (OSError: no C compiler). From now on without its kernel: same images, "
        "slower."
    ]


def test_without_triton_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setattr(api, "_triton_works", False)
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    inputs = tensors("sdxl 64")
    torch.testing.assert_close(pladis_attention(*inputs), pladis_attention(*inputs, backend="eager"))
    assert not caplog.records


def test_running_out_of_memory_says_nothing_about_the_kernel(monkeypatch):
    def fail(*args):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(api, "_triton_works", True)
    monkeypatch.setattr(api, "_has_gpu_compiler", lambda device: True)
    monkeypatch.setattr(triton_backend, "attend", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pladis_attention(*tensors("sdxl 64"))
    assert api._triton_works


@pytest.mark.skipif(TRITON_VERSION < (3, 4), reason="Triton 3.3 asks for AMD's linker to generate code for AMD")
def test_it_compiles_for_gpus_that_are_not_here():
    """NVIDIA and AMD code generation, without a GPU: every branch compiles and fits a consumer card's shared memory."""
    root = Path(__file__).parents[2]
    # where the package is not installed
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_kernels.py")],
        env=environment, capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads(result.stdout)
    assert len(kernels) >= 14
    # compute capability 8.6 and 8.9: 99 KiB a program
    assert all(kernel["shared"] <= 99 * 1024 for kernel in kernels if kernel["target"] == "cuda:80"), kernels
    assert all(kernel["shared"] <= 64 * 1024 for kernel in kernels if kernel["target"].startswith("hip")), kernels
