"""NVIDIA GPUs without Triton, what `impl/cuda.py` does not take (float32, other layouts): rows between two products.

torch multiplies query with key, into float32, and weights with value; what lies between is one pass of `rows.cu`, which
NVRTC, CUDA's runtime compiler, compiles in about a second at the first use of a length: torch ships it, and neither a
toolkit nor a compiler need be installed. A chunk of queries at a time, so that no map outgrows a buffer.

Before its first use on a device each variant is compared with `impl/eager.py` on a few rows: where they differ, it is
not used.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import cuda_driver
from .common import (
    LARGEST_CANCELLATION,
    STEPS_FROM_THE_PEAK,
    Mix,
    additive_mask,
    chunk_shape,
    chunks,
    newton_steps,
    retried_in_smaller_chunks,
    small_b,
    stored,
)
from .self_check import compare

SOURCE = Path(__file__).with_name("rows.cu")
# scores that a thread holds in its registers: fewer beside masks, which need some too
KEYS_OF_LANE = 96
KEYS_OF_LANE_MASKED = 48
MAX_KEYS = 1024
WEIGHTS = {torch.float16: 16, torch.bfloat16: 17, torch.float32: 32}
# texts whose lengths differ by less share a kernel
SIMILAR_KEYS = 16
THREADS = 128
# of float32 scores: half of the cache, within what makes launches few and memory little
LEAST_BUFFER_BYTES, LARGEST_BUFFER_BYTES = 8 << 20, 32 << 20
# queries of a chunk come in such numbers, as tensor cores like them
ALIGNMENT = 128
CHECKED_WIDTH = 16
# how a GPU converts float16, for which no header is needed
PRELUDE = """
#define LOOK_CHANGED(x) asm volatile("" : "+f"(x))
__device__ __forceinline__ unsigned short float_to_half_bits(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ float half_bits_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
"""


class Rows(ctypes.Structure):
    """`struct Rows` of rows.cu."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "queries", "keys", "steps", "mass_kind", "divided")),
        *((name, ctypes.c_float) for name in ("scale", "b", "tolerance", "dense", "sparse", "factor")),
        *((name, ctypes.c_longlong) for name in ("mask_h", "mask_q", "mask_k", "mixed_k", "mass_h", "mass_q")),
    ]


class Products(ctypes.Structure):
    """`struct Products` of rows.cu."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rows", "queries", "width")),
        *((name, ctypes.c_longlong) for name in ("out_h", "out_q")),
        ("largest", ctypes.c_float),
    ]


class Variant(NamedTuple):
    """What rows.cu is compiled for; see there."""

    least_keys: int
    most_keys: int
    lanes: int
    alpha: int
    weight: int
    mask: bool
    mix: bool

    @classmethod
    def of(cls, keys: int, alpha: float, dtype: torch.dtype, mask: bool, mix: bool) -> Variant:
        # prompts of CLIP have 77 tokens or a multiple, those of others any number, each of which would be compiled for
        least = most = keys
        if keys % 77:
            most = -(-keys // SIMILAR_KEYS) * SIMILAR_KEYS
            least = most - SIMILAR_KEYS + 1
        lanes = 1
        while most > lanes * (KEYS_OF_LANE_MASKED if mask or mix else KEYS_OF_LANE):
            lanes *= 2
        # softmax alone is computed as alpha 1.5 in no steps
        kind = {1.0: 15, 1.5: 15, 2.0: 20}.get(alpha, 1 if alpha - 1.0 < small_b(dtype) else 0)
        return cls(least, most, lanes, kind, WEIGHTS[dtype], mask, mix)

    @property
    def definitions(self) -> str:
        return "".join(f"#define {name.upper()} {int(value)}\n" for name, value in self._asdict().items())


def unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why it cannot take these tensors; None if it can."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in WEIGHTS:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"it takes float16, bfloat16 or float32, the same for query, key and value, not {names}"
    if key.shape[-2] > MAX_KEYS:
        return f"it takes at most {MAX_KEYS} keys, not {key.shape[-2]}"
    if query.device.type != "cuda" or torch.version.cuda is None:
        return f"it is for NVIDIA GPUs, not for {query.device.type} tensors"
    return None


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`.

    Raises:
        RuntimeError: NVRTC or the driver fails, or the kernel does not compute what `impl/eager.py` does.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[-2]
    if batch * heads * queries * keys * value.shape[-1] == 0:
        return query.new_zeros(batch, heads, queries, value.shape[-1])
    variant = Variant.of(keys, alpha, query.dtype, mask is not None, mix_mask is not None)
    kernels = kernels_of(query.device, variant)
    return _attend(kernels, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse)


def check(kernels: Kernels, device: torch.device, variant: Variant) -> None:
    """Compares with `impl/eager.py` on a few random rows.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    dtype = next(dtype for dtype, weight in WEIGHTS.items() if weight == variant.weight)
    alpha = {0: 1.25, 1: 1.002, 15: 1.5, 20: 2.0}[variant.alpha]
    width = CHECKED_WIDTH
    compare(
        partial(_attend, kernels), device, dtype, variant.least_keys, width, width, alpha, variant.mask, variant.mix
    )


def _attend(
    kernels: Kernels, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse
) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    keys, value_width = value.shape[-2:]
    # laid out [B, Lq, H, Dv], which is what a caller that merges the heads wants without a copy
    out = query.new_empty(batch, queries, heads, value_width).transpose(1, 2)
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is not None:
        mask = additive_mask(stored(mask), torch.float32).expand(mask.shape)
    factor = mass if row_lse is None else row_lse
    factor = None if factor is None else stored(factor).float().expand(factor.shape)
    settings = numbers(keys, scale, alpha, dense, sparse, query.dtype)
    settings |= {"mass_kind": 0 if factor is None else 1 if row_lse is None else 2}

    def fill(elements: int) -> None:
        _fill(out, query, key, value, mask, mix_mask, factor, settings, kernels, elements)

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        retried_in_smaller_chunks(fill, buffer_bytes(query.device) // 4, keys)
    return out


@lru_cache
def buffer_bytes(device: torch.device) -> int:
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return min(max(cache // 2, LEAST_BUFFER_BYTES), LARGEST_BUFFER_BYTES)


@lru_cache(maxsize=1024)
def _numbers(
    keys: int, scale: float, alpha: float, dense: float, sparse: float, dtype: torch.dtype
) -> tuple[tuple[str, float], ...]:
    steps = newton_steps(keys, alpha, dtype) + STEPS_FROM_THE_PEAK
    if alpha == 1.0 or sparse == 0.0:
        alpha, dense, sparse, steps = 1.5, dense + sparse, 0.0, 0
    lean = dtype != torch.float32
    whole, mix = dense + sparse, Mix.of(dense, sparse)
    return tuple({
        "scale": scale, "b": alpha - 1.0, "steps": steps, "tolerance": 1e-6 if lean else 3e-7,
        "dense": mix.dense, "sparse": mix.sparse, "factor": mix.factor,
        "divided": lean and abs(dense) + abs(sparse) <= LARGEST_CANCELLATION * abs(whole),
    }.items())  # fmt: skip


def numbers(keys: int, scale: float, alpha: float, dense: float, sparse: float, dtype: torch.dtype) -> dict[str, float]:
    """What of `Rows` does not depend on a chunk."""
    return dict(_numbers(keys, scale, alpha, dense, sparse, dtype))


def _fill(out, query, key, value, mask, mix_mask, factor, settings, kernels: Kernels, elements: int) -> None:
    """Writes `out` in chunks of at most `elements` scores."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[-2]
    value_width, dtype = value.shape[-1], query.dtype
    # whole groups of queries, where a chunk is a part of a head
    elements = max(elements - elements % (ALIGNMENT * keys), keys)
    step_h, step_q = chunk_shape(heads, queries, keys, elements)
    all_scores = torch.empty(step_h * step_q * keys, dtype=torch.float32, device=query.device)
    all_weights = all_scores if dtype == torch.float32 else torch.empty_like(all_scores, dtype=dtype)
    all_factors = all_scores.new_empty(step_h * step_q)
    for rows in chunks(query.shape[:3], keys, elements):
        part, target = query[rows], out[rows]
        h, q = part.shape[:2]
        # (h, keys, q): neighbouring threads read neighbouring queries
        scores, weights = (flat[: h * keys * q].view(h, keys, q) for flat in (all_scores, all_weights))
        _wide_product(key[rows[:2]], part.mT, scores)
        chunk = {"rows": h * q, "queries": q, "keys": keys}
        mask_part = mixed = factor_part = None
        if mask is not None:
            mask_part = mask[rows]
            chunk |= dict(zip(("mask_h", "mask_q", "mask_k"), mask_part.stride(), strict=True))
        if mix_mask is not None:
            mixed = mix_mask[rows[0]]
            chunk |= {"mixed_k": mixed.stride(0)}
        if factor is not None:
            factor_part = factor[rows]
            chunk |= dict(zip(("mass_h", "mass_q"), factor_part.stride(), strict=False))
        kernels.rows(scores, weights, all_factors, mask_part, mixed, factor_part, Rows(**settings, **chunk))
        products = all_scores.new_empty(h, q, value_width)
        _wide_product(weights.mT, value[rows[:2]], products)
        kernels.scale(
            products, all_factors, target,
            Products(h * q, q, value_width, target.stride(0), target.stride(1), torch.finfo(dtype).max),
        )  # fmt: skip


def _wide_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, with float32 sums that stay float32."""
    if a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
    elif _HAS_WIDE_PRODUCTS and a.is_cuda:
        torch.bmm(a, b, torch.float32, out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)


# torch 2.8
_HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.bmm, "dtype_out")


class Kernels:
    """The two kernels of a variant on a device."""

    def __init__(self, device: torch.device, variant: Variant) -> None:
        self._rows_of_block = THREADS // variant.lanes
        image = compiled(variant, torch.cuda.get_device_capability(device))
        self._functions = cuda_driver.Functions(device, image, ("pladis_rows", "pladis_scale"))

    def rows(self, scores, weights, factors, mask, mixed, mass, sizes: Rows) -> None:
        pointers = (scores, weights, factors, mask, mixed, mass)
        self._launch("pladis_rows", -(-sizes.rows // self._rows_of_block), pointers, sizes)

    def scale(self, products, factors, out, sizes: Products) -> None:
        self._launch("pladis_scale", -(-products.numel() // THREADS), (products, factors, out), sizes)

    def _launch(self, name: str, blocks: int, tensors, sizes: ctypes.Structure) -> None:
        self._functions.launch(name, blocks, THREADS, tensors, sizes)


@lru_cache(maxsize=256)
def kernels_of(device: torch.device, variant: Variant) -> Kernels:
    """Compiled, loaded and checked."""
    with torch.cuda.device(device):
        kernels = Kernels(device, variant)
        check(kernels, device, variant)
    return kernels


def compiled(variant: Variant, capability: tuple[int, int]) -> bytes:
    """Machine code of rows.cu for a compute capability. Needs no GPU.

    Raises:
        RuntimeError: as `cuda_driver.compiled`.
    """
    text = variant.definitions + PRELUDE + SOURCE.read_text(encoding="utf-8")
    return cuda_driver.compiled(text, SOURCE.name, capability)
