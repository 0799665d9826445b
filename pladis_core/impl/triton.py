"""Launches the fused kernel of impl/triton_kernel.py: which of its forms, with which tiles, compiled for what.

Against a short context (`RESIDENT_KEYS`) all scores of a tile of queries stay in registers; against a longer one they
are recomputed.

Runs where Triton does: NVIDIA, AMD and Intel GPUs, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import LARGEST_CANCELLATION, STEPS_FROM_THE_PEAK, Mix, newton_steps, small_b
from .triton_kernel import (
    INTERPRETED,
    LOG2_E,
    How,
    Scale,
    Sizes,
    Solver,
    Tensor,
    Tile,
    Weights,
    resident_kernel,
    streaming_kernel,
)

# keys whose scores a tile of queries can hold in registers; float32 products need some of those registers
RESIDENT_KEYS, RESIDENT_KEYS_AMD = 320, 512
RESIDENT_KEYS_FLOAT32 = 256
MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# scores beyond it count as equal: overflow saturates instead of turning into NaN
LARGEST_SCORE = 1e30
# with 16-bit weights, whose scores are centred in one rounding, so do those whose exponents of 2 are beyond this one
LARGEST_EXPONENT = 2.0**20
# rows and columns that a tile may have past the last one
MAX_TILE = 512
# bytes: what Triton asks of an address
ALIGNED = 16
# tiles of the value
ALL = 1000
# of Newton's, which tiles of random scores need at least; equal scores take them too, and stay where they are
LEAST_STEPS = 2
# layouts of one problem whose kernels are kept at hand; Triton keeps all
MOST_COMPILED = 64
# since 3.3 a compiled kernel is called with all arguments
LAUNCHES_COMPILED = not INTERPRETED.value and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
# of programs, in the second and third dimension
LARGEST_GRID = 65535


def unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return f"it takes float16, bfloat16 or float32, the same for query, key and value, not {names}"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"it takes a head_dim of at most {MAX_HEAD_DIM}, not {max(query.shape[-1], value.shape[-1])}"
    if max(query.shape[:2]) > LARGEST_GRID:
        return f"it takes at most {LARGEST_GRID} rows of a batch, not {max(query.shape[:2])}"
    if query.device.type not in ("cuda", "xpu") and not INTERPRETED.value:
        return f"Triton has no backend for {query.device.type} tensors"
    capability, wave = _target(query.device)
    if 0 < capability < 80:
        return "Triton uses the tensor cores of compute capability 8.0 and newer only"
    if wave and spills_on_amd(key.shape[-2], max(query.shape[-1], value.shape[-1]), query.dtype, wave):
        return f"{key.shape[-2]} keys of width {query.shape[-1]} in {query.dtype} leave AMD's registers"
    return None


def spills_on_amd(keys: int, width: int, dtype: torch.dtype, wave: int) -> bool:
    """Where the code for AMD does not fit into registers: left to `portable`."""
    streamed = wave == 32 and width > 64 and not is_resident(keys, dtype, wave)
    return streamed or (dtype == torch.float32 and keys > 112) or (width > 128 and keys > 160)


def is_resident(keys: int, dtype: torch.dtype, wave: int = 0) -> bool:
    """Whether all scores of a tile of queries stay on chip. wave: the lanes of an AMD warp, 0 elsewhere."""
    most = RESIDENT_KEYS_FLOAT32 if dtype == torch.float32 else RESIDENT_KEYS_AMD if wave else RESIDENT_KEYS
    return keys <= most


def configuration(
    queries: int, keys: int, width: int, dtype: torch.dtype, ptx: int = 0, wave: int = 0
) -> tuple[Tile, int]:
    """Sizes of tiles, and warps. A table, not a search: the first image must not wait for one.

    A warp owns whole rows as long as their scores fit its registers: sums over keys then never leave the warp. ptx:
    NVIDIA's compute capability as two digits, 0 elsewhere; wave: the lanes of an AMD warp, 0 elsewhere.
    """
    tile, warps = (
        _streaming(width, dtype, wave) if not is_resident(keys, dtype, wave)
        else _resident_float32(keys, width) if dtype == torch.float32
        else _resident_amd(keys, width, wave) if wave
        else _resident(keys, width, ptx)
    )  # fmt: skip
    fewest = max(16, triton.next_power_of_2(queries))
    return tile._replace(BLOCK_Q=min(tile.BLOCK_Q, fewest)), warps


def _streaming(width: int, dtype: torch.dtype, wave: int) -> tuple[Tile, int]:
    padded = _padded(width)
    if dtype == torch.float32 or wave:
        block_q = 16 if dtype == torch.float32 else 32 if wave == 32 else 64
        warps = 8 if wave == 32 or padded > 128 else 4
        return Tile(block_q, 64 if padded <= 128 else 32, 0, padded, padded, 1, 0), warps
    return Tile(64, 64 if padded <= 64 else 32, 0, padded, padded, 1, 0), 8 if padded > 128 else 4


def _resident(keys: int, width: int, ptx: int) -> tuple[Tile, int]:
    """16-bit weights on NVIDIA's GPUs, as measured on an H200 (docs/performance.md). Few keys: everything is loaded at
    once, and waited for once.
    """
    padded = _padded(width)
    if keys <= 112:
        block_d = padded if padded <= 128 else 64 if width % 64 == 0 else 32
        return _tile(64, 16, keys, width, block_d, min(padded, 64), ahead=ALL), 4
    block_k = 32 if keys <= 256 else 64
    if keys <= 160:
        block_d = padded if padded <= 64 else 64 if width % 64 == 0 else 32
        return _tile(64, block_k, keys, width, block_d, min(padded, 64), ahead=ALL), 4
    if ptx // 10 == 9:
        return _tile(64, block_k, keys, width, padded if padded <= 64 and keys <= 256 else 32, min(padded, 64), 2), 4
    # their products take operands from registers, and leave fewer
    return _tile(64, block_k, keys, width, 16, min(padded, 32), keys <= 256), 4


def _resident_float32(keys: int, width: int) -> tuple[Tile, int]:
    # no tensor cores: products and scores share the registers
    most = 32 if keys <= 160 else 16
    block = min(_padded(width), most)
    return _tile(16, _key_tile(keys), keys, width, block, block), 4 if keys <= 160 else 8


def _resident_amd(keys: int, width: int, wave: int) -> tuple[Tile, int]:
    padded = _padded(width)
    # slices of the width: 80 is 32 + 32 + 16, not 128; many keys leave few registers for wide ones
    block_d = 32 if keys > 160 else padded if padded <= 64 else 64 if width % 64 == 0 else 32
    block_v = min(padded, 32 if 112 < keys <= 160 else 64)
    block_q = 64 if keys <= 160 else 32 if keys <= 256 else 16
    # operands of products lie in registers twice
    warps = 8 if wave == 32 and 112 < keys <= 256 else 4
    return _tile(block_q, _key_tile(keys), keys, width, block_d, block_v), warps


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _key_tile(keys: int) -> int:
    """A power of two, at least 16, a few of which cover `keys` closely."""
    return 16 if keys <= 112 else 32 if keys <= 224 else 64


def _tile(block_q: int, block_k: int, keys: int, width: int, block_d: int, block_v: int, ahead: int = 0) -> Tile:
    number = triton.cdiv(keys, block_k)
    return Tile(block_q, block_k, number, block_d, block_v, 2, min(int(ahead), number * triton.cdiv(width, block_v)))


def tolerance(alpha: float, keys: int, dtype: torch.dtype) -> float:
    """A step below it leaves less than weights of `dtype` show: they err by its min(p, 2)th power."""
    if dtype == torch.float32:
        return max(3e-7, (8e-7 / keys) ** max(alpha - 1.0, 0.5))
    return max(1e-4, 1e-5 ** max(alpha - 1.0, 0.5))


class Plan(NamedTuple):
    """What a launch needs beyond tensors and their sizes, and the kernels that it has compiled for these."""

    kernel: triton.JITFunction
    scale: Scale
    solver: Solver
    weights: Weights
    tile: Tile
    constants: tuple[How, Tile]
    options: Mapping[str, object]  # of Triton's compiler
    compiled: dict


@lru_cache(maxsize=1024)
def plan(
    queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype, scale: float, alpha: float,
    dense: float, sparse: float, mask: torch.dtype | None, mix: bool, mass: int, ptx: int, wave: int, wide: bool,
    aligned: bool,
) -> Plan:  # fmt: skip
    """The kernel for a problem. mask: its dtype; mass: 0 none, 1 given, 2 from a log-sum-exp; ptx: the compute
    capability as two digits, 0 where it is not NVIDIA's; wave: the lanes of an AMD warp, or 0; wide: offsets within a
    head exceed 32 bits; aligned: batches, heads and rows begin at multiples of 16 bytes.
    """
    resident = is_resident(keys, dtype, wave)
    # the streaming form's first step may lead back, from right of the root
    steps, start = newton_steps(keys, alpha, dtype) + STEPS_FROM_THE_PEAK + (not resident), 0.0
    if alpha == 1.0 or sparse == 0.0:
        # softmax alone: no steps from where every entmax weight is 0
        alpha, dense, sparse, mix, steps, start = 1.5, dense + sparse, 0.0, False, 0, 2.0
    b = alpha - 1.0
    lean = dtype != torch.float32
    weights = Mix.of(dense, sparse)
    whole = dense + sparse
    folded = mask is None and scale > 0.0
    gain = (scale if folded else 1.0) * LOG2_E.value
    limit = min(LARGEST_SCORE, LARGEST_EXPONENT / gain) if lean else LARGEST_SCORE
    mask_min = 0.0 if mask in (None, torch.bool) else torch.finfo(mask).min
    common = alpha in (1.5, 2.0)
    tile, warps = configuration(queries, keys, max(width, value_width), dtype, ptx, wave)
    how = How(
        D=width,
        DV=value_width,
        ALPHA=alpha if common else 0,
        POWER=0 if common else 2 if b < small_b(dtype) else 0 if lean else 1,
        EXACT=not lean,
        FOLD=folded,
        MASK=0 if mask is None else 1 if mask == torch.bool else 2,
        MIX=mix,
        MASS=mass,
        UNIT=weights.unit,
        NEGATIVE=weights.dense < 0.0,
        AGAIN=lean or not resident or tile.N * tile.BLOCK_K > 160,
        NORMALISE=lean and abs(dense) + abs(sparse) <= LARGEST_CANCELLATION * abs(whole),
        PTX=ptx,
        WIDE=wide,
        ALIGNED=ALIGNED // dtype.itemsize if aligned else 1,
        WHOLE=keys % tile.BLOCK_K == 0,
    )
    return Plan(
        resident_kernel if resident else streaming_kernel,
        Scale(scale, gain, limit, mask_min),
        Solver(
            steps=steps,
            least=min(LEAST_STEPS, steps),
            start=start,
            most=-math.expm1(-b * math.log(keys)) / b,
            b=b,
            tolerance=tolerance(alpha, keys, dtype),
        ),
        Weights(weights.dense, weights.sparse, weights.factor, torch.finfo(dtype).max),
        tile,
        (How(*map(tl.constexpr, how)), Tile(*map(tl.constexpr, tile))),
        # sums of products are meant to be one rounding, which Triton 3.10 no longer takes for granted
        {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True},
        {},
    )


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`.

    mix_mask, boolean (B, Lk): entmax takes part in the keys where it is True, with the softmax mass of these keys; the
    others weigh dense + sparse times their softmax.
    """
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[-2:]
    out = query.new_empty(batch, queries, heads, value_width).transpose(1, 2)
    if out.numel() == 0 or keys == 0 or (dense + sparse == 0.0 and alpha == 1.0):
        return out.zero_()
    factor = mass if row_lse is None else row_lse
    # what is not there is not read, but a pointer needs a tensor all the same
    nothing = Tensor(query, 0, 0, 0, 0)
    inputs = (
        Tensor(query, *query.stride()),
        Tensor(key, *key.stride()),
        Tensor(value, *value.stride()),
        nothing if mask is None else Tensor(mask, *mask.stride()),
        nothing if mix_mask is None else Tensor(mix_mask, mix_mask.stride(0), 0, 0, mix_mask.stride(1)),
        nothing if factor is None else Tensor(factor, factor.stride(0), factor.stride(1), factor.stride(2), 0),
    )
    row = max(abs(t.row) for t in inputs[:4]) * (max(queries, keys) + MAX_TILE)
    column = max(abs(t.column) for t in inputs[:4]) * (max(width, value_width, keys) + MAX_TILE)
    ptx, wave = _target(query.device)
    chosen = plan(
        queries, keys, width, value_width, query.dtype, scale, alpha, dense, sparse,
        None if mask is None else mask.dtype, mix_mask is not None,
        0 if factor is None else 1 if row_lse is None else 2, ptx, wave, row + column >= 2**31 or out.numel() >= 2**31,
        all(_is_aligned(tensor) for tensor in (query, key, value, out)),
    )  # fmt: skip
    grid = -(-queries // chosen.tile.BLOCK_Q), heads, batch
    output = Tensor(out, queries * heads * value_width, value_width, heads * value_width, 1)
    with _on_device(query.device):
        launch(chosen, grid, (*inputs, output), Sizes(queries, keys, heads // key.shape[1]))
    return out


def launch(plan: Plan, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], sizes: Sizes) -> None:
    """plan.kernel over the grid. From the second time on without Triton's binder, which looks at each of some fifty
    arguments for what a kernel may be compiled for, at ten times the price of a launch: the same sizes, strides and
    aligned addresses, on the same device, mean the same kernel.
    """
    key = (
        tensors[0].at.device.index, sizes, *(tensor[1:] for tensor in tensors),
        *(tensor.at.data_ptr() % ALIGNED == 0 for tensor in tensors),
    )  # fmt: skip
    arguments = (*tensors, sizes, plan.scale, plan.solver, plan.weights, *plan.constants)
    compiled = plan.compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments)
        return
    compiled = plan.kernel[grid](*arguments, **plan.options)
    if LAUNCHES_COMPILED and len(plan.compiled) < MOST_COMPILED:
        plan.compiled[key] = compiled


def _is_aligned(tensor: torch.Tensor) -> bool:
    several = ALIGNED // tensor.element_size()
    *strides, _ = tensor.stride()
    return not any(stride % several for stride in strides)


@lru_cache
def _target(device: torch.device) -> tuple[int, int]:
    """NVIDIA's compute capability as two digits, and the lanes of an AMD warp; 0 where it is another's."""
    if device.type != "cuda":
        return 0, 0
    if torch.version.hip is not None:
        return 0, getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, 0


def _on_device(device: torch.device):
    """Triton launches on the current device."""
    if device.type == "cpu" or (device.type == "cuda" and device.index == torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)
