"""Attention in one kernel on NVIDIA's tensor cores without Triton (most of Windows, and the RTX 20 series): `fused.cu`,
which NVRTC compiles in less than a second at the first use of a length.

It takes 16-bit inputs whose rows begin at multiples of 16 bytes, which those of hosts do; `impl/nvrtc.py` takes others.
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
    newton_steps,
    small_b,
    stored,
    whole_power,
)
from .self_check import compare

KERNEL = "pladis_attention"
SOURCES = Path(__file__).with_name("tensor_cores.cuh"), Path(__file__).with_name("fused.cu")
# quotients and roots to two units of the last place
OPTIONS = "--std=c++17", "--prec-div=false", "--prec-sqrt=false"
TYPES = {torch.float16: 16, torch.bfloat16: 17}
# of query and key, or of the value
MAX_WIDTH = 256
MAX_KEYS = 1024
# bytes: of an address
ALIGNED = 16
# keys, and columns, that a product takes: texts whose lengths differ by less share a kernel
PRODUCT = 16
LANES = 32
ROWS = 16
# warps that share a tile
MAX_SHARE = 4
# float32 numbers of a lane: scores and results together, so that its 255 registers hold what else there is
LARGEST_SHARE, MOST_HELD = 200, 220
# bytes of shared memory that every GPU has for a block
SHARED_BYTES = 64 << 10
# of these for two buffers: if all keys fit, they stay; if not, a few at a time
RESIDENT_BYTES, BUFFER_BYTES = 56 << 10, 40 << 10
# where two blocks are to share a multiprocessor of the RTX 20 series
HALF_OF_SHARED_BYTES = 31 << 10
# of a block, in tiles of each of its groups: a guess
BEGINNING = 0.3
LOG2_E = 1.4426950408889634


class Tensor(ctypes.Structure):
    """`struct Tensor` of fused.cu."""

    _fields_ = [(name, ctypes.c_longlong) for name in ("batch", "head", "row", "column")]


class Problem(ctypes.Structure):
    """`struct Problem` of fused.cu."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("heads", "groups", "queries", "keys", "blocks", "steps", "divided")),
        *((name, ctypes.c_float) for name in ("gain", "b", "start", "tolerance", "coarse")),
        *((name, ctypes.c_float) for name in ("dense", "sparse", "factor")),
        *((name, Tensor) for name in ("query", "key", "value", "out", "mask", "mixed", "mass")),
    ]


class Variant(NamedTuple):
    """What fused.cu is compiled for; see there."""

    keys: int
    least_keys: int
    width: int
    value: int
    share: int
    warps: int
    blocks: int
    chunk: int
    alpha: int
    power: int
    type: int
    unit: bool
    mask: bool
    mix: bool
    mass: int
    flip: bool

    @property
    def definitions(self) -> str:
        return "".join(f"#define {name.upper()} {int(value)}\n" for name, value in self._asdict().items())

    @property
    def chunks(self) -> int:
        return -(-self.keys // self.chunk)

    @property
    def groups(self) -> int:
        """Tiles of queries that a block has at once."""
        return self.warps // self.share

    @property
    def shared_bytes(self) -> int:
        return _shared_bytes(self.width, self.value, self.share, self.warps, self.chunk)


def _padded(length: int) -> int:
    return -(-length // PRODUCT) * PRODUCT


def _row_bytes(width: int, value_width: int) -> int:
    """Of a row in both buffers."""
    return 2 * 2 * (_padded(max(width, value_width)) + 8)


def _parts(share: int, warps: int, value_width: int) -> int:
    """Bytes of what all but the first warps of tiles have of their results."""
    return warps // share * (share - 1) * (_padded(value_width) // 8 * 4 + 2) * LANES * 4


def _shared_bytes(width: int, value_width: int, share: int, warps: int, chunk: int) -> int:
    """Two buffers, later those parts; behind the buffers what warps that share a tile tell each other."""
    messages = warps // share * 4 * share * ROWS * 4 if share > 1 else 0
    return max(chunk * _row_bytes(width, value_width) + messages, _parts(share, warps, value_width))


@lru_cache(maxsize=1024)
def sizes(keys: int, width: int, value_width: int) -> dict[str, int]:
    """share, warps, blocks and chunk of a `Variant`: a table, since the first image must not wait for a search."""
    padded, columns = max(_padded(keys), PRODUCT), _padded(value_width)
    share = 1
    while share < MAX_SHARE and padded / share / 2 + columns / 2 > LARGEST_SHARE:
        share *= 2
    row = _row_bytes(width, value_width)
    step = 16 * share
    chunk = -(-padded // step) * step
    if chunk * row > RESIDENT_BYTES:
        most = max((BUFFER_BYTES if share > 1 else HALF_OF_SHARED_BYTES) // row // step, 1)
        # the fewest keys past the last one, and then the fewest chunks
        chunk = min(
            (step * n for n in range(-(-most // 2), most + 1)), key=lambda size: (-(-padded // size) * size, -size)
        )
    held = (-(-padded // chunk) * chunk / share + columns) / 2
    if held <= 76:
        warps, blocks = 8, 2
    elif share > 1 or (chunk >= padded and chunk * row > HALF_OF_SHARED_BYTES):
        warps, blocks = 8, 1
    else:
        warps, blocks = 4, 3 if held <= 116 else 2
    while warps > share and _parts(share, warps, value_width) > RESIDENT_BYTES:
        warps //= 2
    return {"share": share, "warps": warps, "blocks": blocks, "chunk": chunk}


def unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why it cannot take these tensors; None if it can."""
    if any([tensor.data_ptr() % ALIGNED for tensor in (query, key, value)]):
        return UNALIGNED
    return _unusable(
        (query.dtype, key.dtype, value.dtype), query.shape, value.shape,
        (query.stride(), key.stride(), value.stride()), query.device,
    )  # fmt: skip


UNALIGNED = "it takes tensors whose rows are contiguous and begin at multiples of 16 bytes"


@lru_cache(maxsize=1024)
def _unusable(
    dtypes: tuple[torch.dtype, ...], query: torch.Size, value: torch.Size, strides: tuple[tuple[int, ...], ...],
    device: torch.device,
) -> str | None:  # fmt: skip
    """`unusable`, of the shapes of query and value."""
    if len(set(dtypes)) > 1 or dtypes[0] not in TYPES:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in set(dtypes)))
        return f"it takes float16 or bfloat16, the same for query, key and value, not {names}"
    if value[-2] > MAX_KEYS:
        return f"it takes at most {MAX_KEYS} keys, not {value[-2]}"
    if max(query[-1], value[-1]) > MAX_WIDTH or query[-1] % 8 or value[-1] % 8:
        return f"it takes a head_dim of a multiple of 8 up to {MAX_WIDTH}, not {query[-1]} or {value[-1]}"
    if not _fits(value[-2], query[-1], value[-1]):
        return f"{value[-2]} keys of width {max(query[-1], value[-1])} leave its registers"
    elements = ALIGNED // dtypes[0].itemsize
    if any(column != 1 or any(stride % elements for stride in outer) for *outer, column in strides):
        return UNALIGNED
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it is for NVIDIA GPUs, not for {device.type} tensors"
    least = (8, 0) if dtypes[0] == torch.bfloat16 else (7, 5)
    if _capability(device) < least:
        return f"it needs compute capability {least[0]}.{least[1]} for {dtypes[0]}"
    return None


def _fits(keys: int, width: int, value_width: int) -> bool:
    chosen = sizes(keys, width, value_width)
    share, chunk = chosen["share"], chosen["chunk"]
    held = (-(-keys // chunk) * chunk / share + _padded(value_width)) / 2
    return held <= MOST_HELD and _shared_bytes(width, value_width, share, chosen["warps"], chunk) <= SHARED_BYTES


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`.

    Raises:
        RuntimeError: NVRTC or the driver fails, or the kernel does not compute what `impl/eager.py` does.
    """
    return _attend(kernel_of, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse)


def _attend(
    kernel_of, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse
) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    # laid out [B, Lq, H, Dv], which is what a caller that merges the heads wants without a copy
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    if out.numel() == 0 or key.shape[-2] == 0:
        return out.zero_()
    if mask is not None:
        mask = additive_mask(stored(mask), torch.float32).expand(mask.shape)
    factor = mass if row_lse is None else row_lse
    factor = None if factor is None else stored(factor).float().expand(factor.shape)
    kind = 0 if factor is None else 1 if row_lse is None else 2
    chosen = laid_out(
        kernel_of, query.device, query.dtype, query.shape, value.shape,
        tuple(None if t is None else t.stride() for t in (query, key, value, out, mask, mix_mask, factor)), kind,
        scale, alpha, dense, sparse,
    )  # fmt: skip
    chosen.kernel.launch(chosen.blocks, (query, key, value, out, mask, mix_mask, factor), chosen.problem)
    return out


class Launch(NamedTuple):
    """What all calls with tensors of the same layouts have in common."""

    kernel: Kernel
    blocks: int
    problem: Problem


@lru_cache(maxsize=1024)
def laid_out(
    kernel_of, device: torch.device, dtype: torch.dtype, query: torch.Size, value: torch.Size,
    strides: tuple[tuple[int, ...] | None, ...], mass: int, scale: float, alpha: float, dense: float, sparse: float,
) -> Launch:  # fmt: skip
    """The launch for a problem. strides: of query, key, value, output, mask, mix mask and mass; mass: of `Variant`."""
    batch, heads, queries, _ = query
    _, kv_heads, keys, _ = value
    *of_tensors, of_mix, of_mass = strides
    of_mask = of_tensors[4]
    variant = variant_of(
        query, value, dtype, scale, alpha, dense, sparse, mask=of_mask is not None, mix=of_mix is not None, mass=mass
    )
    steps, start = solver_steps(keys, alpha, dtype), 0.0
    if alpha == 1.0 or sparse == 0.0:
        # softmax alone: no steps from where every entmax weight is 0
        alpha, dense, sparse, steps, start = 1.5, dense + sparse, 0.0, 0, 2.0
    weights, whole, last = Mix.of(dense, sparse), dense + sparse, tolerance(alpha, dtype)
    kernel = kernel_of(device, variant)
    nothing = 0, 0, 0, 0
    tiles = -(-queries // ROWS)
    blocks = -(-tiles // variant.groups)
    if variant.chunks == variant.share == 1:
        # keys and values stay in shared memory while a block goes from tile to tile
        blocks = blocks_of_head(batch * heads, tiles, variant.groups, kernel.places)
    problem = Problem(
        heads=heads, groups=heads // kv_heads, queries=queries, keys=keys, blocks=blocks, steps=steps,
        divided=abs(dense) + abs(sparse) <= LARGEST_CANCELLATION * abs(whole),
        gain=max(abs(scale) * LOG2_E, 1e-30), b=alpha - 1.0, start=start,
        tolerance=last, coarse=last**0.5,
        dense=weights.dense, sparse=weights.sparse, factor=weights.factor,
        query=of_tensors[0], key=of_tensors[1], value=of_tensors[2], out=of_tensors[3], mask=of_mask or nothing,
        mixed=nothing if of_mix is None else (of_mix[0], 0, 0, of_mix[1]),
        mass=nothing if of_mass is None else (*of_mass[:3], 0),
    )  # fmt: skip
    return Launch(kernel, batch * heads * blocks, problem)


def variant_of(
    query: torch.Size, value: torch.Size, dtype: torch.dtype, scale: float, alpha: float, dense: float, sparse: float,
    mask: bool, mix: bool, mass: int,
) -> Variant:  # fmt: skip
    """What a problem is compiled for."""
    width, (*_, keys, value_width) = query[-1], value
    if alpha == 1.0 or sparse == 0.0:
        # softmax alone is computed as alpha 1.5 in no steps
        alpha, dense, sparse, mix = 1.5, dense + sparse, 0.0, False
    weights, padded = Mix.of(dense, sparse), _padded(keys)
    return Variant(
        keys=padded,
        least_keys=padded - PRODUCT + 1,
        width=width,
        value=value_width,
        **sizes(keys, width, value_width),
        alpha={1.5: 15, 2.0: 20}.get(alpha, 1 if alpha - 1.0 < small_b(dtype) else 0),
        power=whole_power(alpha),
        type=TYPES[dtype],
        unit=weights.unit and not mix,
        mask=mask,
        mix=mix,
        mass=mass,
        flip=scale < 0.0,
    )


@lru_cache(maxsize=1024)
def blocks_of_head(heads: int, tiles: int, groups: int, places: int) -> int:
    """Blocks that divide the tiles of a head, `groups` at once: so many that all places for a block have about as much
    to do, and few, since each begins with all keys and values.
    """

    def longest(blocks: int) -> float:
        """Of a place, in tiles."""
        return -(-heads * blocks // places) * (tiles / blocks + BEGINNING * groups)

    return min(range(1, -(-tiles // groups) + 1), key=longest)


def solver_steps(keys: int, alpha: float, dtype: torch.dtype) -> int:
    """At most."""
    return newton_steps(keys, alpha, dtype) + STEPS_FROM_THE_PEAK


def tolerance(alpha: float, dtype: torch.dtype) -> float:
    """How far from 1 the sum of r^p may be before the last step.

    Newton's method about squares that, however close scores are to each other, to less than weights of `dtype` show;
    not so for sparsemax, whose last step is exact. The square root is where half precision stops: mostly, one step in
    float32 is left.
    """
    return torch.finfo(dtype).eps ** 0.5 * 0.1 ** max(2.0 * alpha - 3.0, 0.0)


class Kernel:
    """A variant on a device."""

    # for blocks at a time: one as long as it is not checked, so that what a block does again is checked, too
    places = 1

    def __init__(self, device: torch.device, variant: Variant) -> None:
        self._threads = variant.warps * LANES
        image = compiled(variant, _capability(device))
        self._functions = cuda_driver.Functions(device, image, (KERNEL,), variant.shared_bytes)

    def use_whole_device(self, device: torch.device, variant: Variant) -> None:
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_multiprocessor", SHARED_BYTES)
        # the driver keeps one KiB of each block
        of_one = max(1, min(variant.blocks, shared // (variant.shared_bytes + 1024)))
        self.places = of_one * properties.multi_processor_count

    def launch(self, blocks: int, tensors, problem: Problem) -> None:
        self._functions.launch(KERNEL, blocks, self._threads, tensors, problem)


@lru_cache(maxsize=256)
def kernel_of(device: torch.device, variant: Variant) -> Kernel:
    """Compiled, loaded and checked."""
    with torch.cuda.device(device):
        kernel = Kernel(device, variant)
        check(kernel, device, variant)
        kernel.use_whole_device(device, variant)
    return kernel


def check(kernel: Kernel, device: torch.device, variant: Variant) -> None:
    """Compares with `impl/eager.py` on a few random rows.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    dtype = next(dtype for dtype, number in TYPES.items() if number == variant.type)
    alpha = {0: 1.0 + 1.0 / variant.power if variant.power else 1.3, 1: 1.002, 15: 1.5, 20: 2.0}[variant.alpha]
    # or weights that give entmax a factor
    dense, sparse = (-1.0, 2.0) if variant.unit else (1.5, 1.0)
    compare(
        partial(_attend, lambda device, wanted: kernel), device, dtype, variant.least_keys, variant.width,
        variant.value, alpha, variant.mask, variant.mix, variant.mass, -1.0 if variant.flip else 1.0, dense, sparse,
    )  # fmt: skip


@lru_cache(maxsize=256)
def compiled(variant: Variant, capability: tuple[int, int]) -> bytes:
    """Machine code of fused.cu for a compute capability. Needs no GPU.

    Raises:
        RuntimeError: as `cuda_driver.compiled`.
    """
    text = variant.definitions + "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    return cuda_driver.compiled(text, SOURCES[-1].name, capability, OPTIONS)
