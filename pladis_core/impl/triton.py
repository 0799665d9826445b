"""Launches the fused kernel of impl/triton_kernel.py: which of its forms, with which tiles, compiled for what.

Against a short context (`RESIDENT_KEYS`) all scores of a tile of queries stay in registers; against a longer one they
are recomputed.

Runs where Triton does: NVIDIA, AMD and Intel GPUs, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1). On a
GPU the first output of every variant that is compiled is compared with `impl/eager.py` on a few of its rows.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import (
    LARGEST_CANCELLATION,
    STEPS_FROM_THE_PEAK,
    Mix,
    is_recorded,
    newton_steps,
    small_b,
    whole_power,
)
from .self_check import compare_output
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
LEAST_STEPS, LEAST_STEPS_BY_NORM = 2, 1
# of the streaming form, at most, more than `newton_steps` says
STREAMING_STEPS = 5
# since 3.3 a compiled kernel is called with all arguments
LAUNCHES_COMPILED = not INTERPRETED.value and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
# of programs, in the second and third dimension
LARGEST_GRID = 65535
# to compare a variant's output: more would cost a pipeline of zeros, or of NaN, a comparison a layer
TRIES = 8


def unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    return _unusable(
        (query.dtype, key.dtype, value.dtype), query.shape, value.shape, query.device.type, *_target(query.device)
    )


@lru_cache(maxsize=1024)
def _unusable(
    dtypes: tuple[torch.dtype, ...], query: torch.Size, value: torch.Size, device: str, capability: int, wave: int
) -> str | None:
    """`unusable`, of the shapes of query and value."""
    dtype, keys, width = dtypes[0], value[-2], max(query[-1], value[-1])
    if len(set(dtypes)) > 1 or dtype not in DTYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in set(dtypes)))
        return f"it takes float16, bfloat16 or float32, the same for query, key and value, not {names}"
    if width > MAX_HEAD_DIM:
        return f"it takes a head_dim of at most {MAX_HEAD_DIM}, not {width}"
    if max(query[:2]) > LARGEST_GRID:
        return f"it takes at most {LARGEST_GRID} rows of a batch, not {max(query[:2])}"
    if device not in ("cuda", "xpu") and not INTERPRETED.value:
        return f"Triton has no backend for {device} tensors"
    if 0 < capability < 80:
        return "Triton uses the tensor cores of compute capability 8.0 and newer only"
    if wave and spills_on_amd(keys, width, dtype, wave):
        return f"{keys} keys of width {query[-1]} in {dtype} leave AMD's registers"
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
        _streaming(queries, width, dtype, ptx, wave) if not is_resident(keys, dtype, wave)
        else _resident_float32(keys, width) if dtype == torch.float32
        else _resident_amd(keys, width, wave) if wave
        else _resident(keys, width, ptx)
    )  # fmt: skip
    fewest = max(16, triton.next_power_of_2(queries))
    return tile._replace(BLOCK_Q=min(tile.BLOCK_Q, fewest)), warps


def _streaming(queries: int, width: int, dtype: torch.dtype, ptx: int, wave: int) -> tuple[Tile, int]:
    """Every program reads the keys once a pass, and NVIDIA's second cache gave what it can (docs/performance.md): as
    many queries as fit registers. Hopper's narrow heads leave room for three programs of fewer.
    """
    padded = _padded(width)
    if dtype == torch.float32 or wave:
        block_q = 16 if dtype == torch.float32 else 32 if wave == 32 else 64
        warps = 8 if wave == 32 or padded > 128 else 4
        return Tile(block_q, 64 if padded <= 128 else 32, 0, padded, padded, 1, 0), warps
    hopper = ptx // 10 == 9
    if queries <= 64 or padded > (256 if hopper else 128) or (hopper and padded <= 64):
        return Tile(64, 64 if padded <= 64 else 32, 0, padded, padded, 1, 0), 8 if padded > 128 else 4
    # Hopper's products take operands from shared memory, and leave registers for more keys
    return Tile(128, 64 if padded <= (128 if hopper else 64) else 32, 0, padded, padded, 1, 0), 8


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
    tile = _tile(64, block_k, keys, width, 16, min(padded, 32), keys <= 256)
    if tile.N * block_k + width > 288:
        # too many for all scores and outputs of a row
        tile = tile._replace(BLOCK_V=16, AHEAD=0, SLICED=True)
    return tile, 4


def _resident_float32(keys: int, width: int) -> tuple[Tile, int]:
    # no tensor cores: products and scores share the registers
    most = 32 if keys <= 160 else 16
    block = min(_padded(width), most)
    return _tile(16, _key_tile(keys), keys, width, block, block), 4 if keys <= 160 else 8


def _resident_amd(keys: int, width: int, wave: int) -> tuple[Tile, int]:
    padded, block_k = _padded(width), _key_tile(keys)
    if wave == 64 or 112 < keys <= 320 or width > 128:
        # RDNA's operands of products lie in registers twice
        block_q = 64 if wave == 64 or keys <= 160 else 32
        tile = _tile(block_q, block_k, keys, width, min(padded, 32), 16)
        return tile._replace(SLICED=True), 4
    if keys <= 112:
        # slices of the width: 80 is 32 + 32 + 16, not 128
        block_d = padded if padded <= 64 else 64 if width % 64 == 0 else 32
        return _tile(64, block_k, keys, width, block_d, min(padded, 64)), 4
    if keys > 384 and width > 96:
        # more warps to load a tile, and each thread less of it
        return _tile(32, block_k, keys, width, 16 if keys > 448 else 32, min(padded, 64)), 8
    return _tile(16, block_k, keys, width, 32, min(padded, 64)), 4


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
    # the last steps of sparsemax are exact but for the keys that drop out in them
    return torch.finfo(dtype).eps / 8 if alpha == 2.0 else max(1e-4, 1e-5 ** max(alpha - 1.0, 0.5))


def tolerance_of_norm(alpha: float, dtype: torch.dtype, normalised: bool) -> float:
    """How far from 1 the p-norm may be before a last step, which about squares that, however close the scores are; less
    well the nearer alpha is to 2.

    normalised: a sum of weights beside 1 is made good, so that what is left shows in their proportions alone.
    """
    return (0.5 if normalised else 0.25) * torch.finfo(dtype).eps ** 0.5 * 0.1 ** max(2.0 * alpha - 3.0, 0.0)


class Plan(NamedTuple):
    """The kernel for a problem, and all that it takes beyond tensors and their sizes."""

    kernel: triton.JITFunction
    scale: Scale
    solver: Solver
    weights: Weights
    tile: Tile
    constants: tuple[How, Tile]
    variant: tuple  # what is compiled, but for what Triton specialises by itself
    options: Mapping[str, object]  # of Triton's compiler


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
    steps, start = newton_steps(keys, alpha, dtype) + STEPS_FROM_THE_PEAK + (0 if resident else STREAMING_STEPS), 0.0
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
    power = 0 if common else 2 if b < small_b(dtype) else whole_power(alpha) or (0 if lean else 1)
    normalise = lean and abs(dense) + abs(sparse) <= LARGEST_CANCELLATION * abs(whole)
    by_norm = lean and alpha != 2.0 and power != 2
    tile, warps = configuration(queries, keys, max(width, value_width), dtype, ptx, wave)
    how = How(
        D=width,
        DV=value_width,
        ALPHA=alpha if common else 0,
        POWER=power,
        EXACT=not lean,
        FOLD=folded,
        MASK=0 if mask is None else 1 if mask == torch.bool else 2,
        MIX=mix,
        MASS=mass,
        UNIT=weights.unit,
        NEGATIVE=weights.dense < 0.0,
        AGAIN=lean or not resident or tile.N * tile.BLOCK_K > 160,
        NORM=by_norm,
        NORMALISE=normalise,
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
            least=min(LEAST_STEPS_BY_NORM if by_norm else LEAST_STEPS, steps),
            start=start,
            most=-math.expm1(-b * math.log(keys)) / b,
            b=b,
            right=keys**b,
            tolerance=tolerance_of_norm(alpha, dtype, normalise) if by_norm else tolerance(alpha, keys, dtype),
        ),
        Weights(weights.dense, weights.sparse, weights.factor, torch.finfo(dtype).max),
        tile,
        (How(*map(tl.constexpr, how)), Tile(*map(tl.constexpr, tile))),
        (resident, dtype, mask, how, tile),
        # sums of products are meant to be one rounding, which Triton 3.10 no longer takes for granted
        {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True},
    )


# of a tensor: shape, strides and dtype
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


class Launch(NamedTuple):
    """What all calls with tensors of the same layouts have in common."""

    plan: Plan
    grid: tuple[int, int, int]
    strides: tuple[tuple[int, ...], ...]  # of all inputs, then of the output; 0 where nothing is read
    others: tuple  # arguments behind the tensors
    runners: dict  # what launches a kernel that Triton has compiled, by device and by which addresses are aligned


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`.

    mix_mask, boolean (B, Lk): entmax takes part in the keys where it is True, with the softmax mass of these keys; the
    others weigh dense + sparse times their softmax.
    """
    factor = mass if row_lse is None else row_lse
    inputs = query, key, value, mask, mix_mask, factor
    chosen = laid_out(
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in inputs],
        0 if factor is None else 1 if row_lse is None else 2, scale, alpha, dense, sparse, *_target(query.device),
    )  # fmt: skip
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    if chosen is None:
        return out.zero_()
    # what is not there is not read, but a pointer needs a tensor all the same
    tensors = [query if t is None else t for t in inputs]
    if _is_current(query.device):
        is_new = launch(chosen, [*tensors, out])
    else:
        # Triton launches on the current device
        with torch.get_device_module(query.device).device(query.device):
            is_new = launch(chosen, [*tensors, out])
    if is_new and _is_unseen(variant := (query.device, *chosen.plan.variant)):
        # until it is compared every call comes by here
        chosen.runners.clear()
        if not is_recorded(query.device):
            _compare(variant, out, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse)
    return out


# variants of the kernel, by device: how often one was not to be compared, and those that are done with
_tried: Counter[tuple] = Counter()
_compared: set[tuple] = set()


def _is_unseen(variant: tuple) -> bool:
    return variant not in _compared and variant[0].type != "cpu"


def _compare(variant: tuple, out: torch.Tensor, *inputs) -> None:
    """Notes that the variant's output is what it should be; or, some calls long, that there was nothing to compare.

    Raises:
        RuntimeError: it is not.
    """
    # without memory for that the output is there all the same
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        if compare_output(out, *inputs):
            _compared.add(variant)
            return
    _tried[variant] += 1
    if _tried[variant] >= TRIES:
        _compared.add(variant)


@lru_cache(maxsize=1024)
def laid_out(
    query: Layout, key: Layout, value: Layout, mask: Layout | None, mix_mask: Layout | None, factor: Layout | None,
    mass: int, scale: float, alpha: float, dense: float, sparse: float, ptx: int, wave: int,
) -> Launch | None:  # fmt: skip
    """The launch for tensors of these layouts; None where the output is 0. mass, ptx, wave: as in `plan`."""
    (batch, heads, queries, width), _, dtype = query
    (_, kv_heads, keys, value_width), *_ = value
    elements = batch * heads * queries * value_width
    if elements == 0 or keys == 0 or (dense + sparse == 0.0 and alpha == 1.0):
        return None
    nothing = 0, 0, 0, 0
    out = queries * heads * value_width, value_width, heads * value_width, 1
    strides = (
        query[1], key[1], value[1], nothing if mask is None else mask[1],
        nothing if mix_mask is None else (mix_mask[1][0], 0, 0, mix_mask[1][1]),
        nothing if factor is None else (*factor[1][:3], 0), out,
    )  # fmt: skip
    row = max(abs(row) for _, _, row, _ in strides[:4]) * (max(queries, keys) + MAX_TILE)
    column = max(abs(column) for *_, column in strides[:4]) * (max(width, value_width, keys) + MAX_TILE)
    chosen = plan(
        queries, keys, width, value_width, dtype, scale, alpha, dense, sparse, None if mask is None else mask[2],
        mix_mask is not None, mass, ptx, wave, row + column >= 2**31 or elements >= 2**31,
        all(_is_aligned(strides[i], dtype) for i in (0, 1, 2, 6)),
    )  # fmt: skip
    grid = -(-queries // chosen.tile.BLOCK_Q), heads, batch
    sizes = Sizes(queries, keys, heads // kv_heads)
    others = sizes, chosen.scale, chosen.solver, chosen.weights, *chosen.constants
    return Launch(chosen, grid, strides, others, {})


def launch(chosen: Launch, tensors: list[torch.Tensor]) -> bool:
    """The kernel over the grid; True where Triton may have compiled one for it.

    From the second time on without Triton's binder, which looks at each of some fifty arguments for what a kernel may
    be compiled for, at ten times the price of a launch: the same sizes, strides and aligned addresses, on the same
    device, mean the same kernel.
    """
    groups = [(tensor, *strides) for tensor, strides in zip(tensors, chosen.strides, strict=True)]
    key = (tensors[0].device.index, *[tensor.data_ptr() % ALIGNED == 0 for tensor in tensors])
    runner = chosen.runners.get(key)
    if runner is not None:
        runner(*groups, *chosen.others)
        return False
    plan = chosen.plan
    compiled = plan.kernel[chosen.grid](*(Tensor(*group) for group in groups), *chosen.others, **plan.options)
    if LAUNCHES_COMPILED:
        chosen.runners[key] = compiled[chosen.grid]
    return True


def _is_aligned(strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    return not any(stride % (ALIGNED // dtype.itemsize) for stride in strides[:-1])


@lru_cache
def _target(device: torch.device) -> tuple[int, int]:
    """NVIDIA's compute capability as two digits, and the lanes of an AMD warp; 0 where it is another's."""
    if device.type != "cuda":
        return 0, 0
    if torch.version.hip is not None:
        return 0, getattr(torch.cuda.get_device_properties(device), "warp_size", 32)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, 0


def _is_current(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and device.index == torch.cuda.current_device())
