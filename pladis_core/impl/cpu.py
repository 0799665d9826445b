"""The loop of cpu.cpp, compiled once for this processor; without a compiler for it, impl/eager.py serves.

The library is kept in torch's extension cache ($TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions), under a key of
source, compiler and processor: a home may be shared. PLADIS_CPU_LOOP=0 turns the loop off.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch._appdirs

from .common import additive_mask, bounded_value, compute_dtype, newton_steps, scaled_to, unit_keys

LOGGER = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("cpu.cpp")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-std=c++17", "-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
SWITCH = "PLADIS_CPU_LOOP"
# of cpu.cpp
QUICK_TERMS = 8


class Problem(ctypes.Structure):
    """`Problem` of cpu.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("query", "key", "value", "gain", "mask", "row_lse", "mixed", "out")]
        + [
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width", "columns")
        ]
        + [(name, ctypes.c_int64 * n) for name, n in (("query_stride", 3), ("mask_stride", 4), ("row_lse_stride", 3))]
        + [("out_stride", ctypes.c_int64 * 3), *((name, ctypes.c_int64) for name in ("steps", "threads", "squarings"))]
        + [(name, ctypes.c_float) for name in ("alpha", "dense", "sparse", "rise", "tolerance")]
        + [("quick", ctypes.c_float * QUICK_TERMS)]
    )


class Solver(NamedTuple):
    """What the solver of cpu.cpp needs to know of an alpha and a number of keys, with p = 1 / (alpha - 1)."""

    steps: int  # from left of the root, whatever the scores
    rise: float  # of the mean score, to a threshold left of the root plus p; of 0, to one right of it plus p
    tolerance: float  # a step below it leaves less than float's rounding
    squarings: int  # of x, before the polynomial of x ...
    quick: tuple[float, ...]  # ... of these coefficients, which is near x^(p - 1) on [0, 1]: for first steps


@lru_cache(maxsize=256)
def solver(alpha: float, keys: int) -> Solver:
    b = alpha - 1.0
    power = 1.0 / b - 1.0
    # a power of more than about 4 has more in it than so many terms can follow
    squarings = max(0, math.ceil(math.log2(power / 4.5))) if power > 0.0 else 0
    # a weight errs by up to the min(p, 2)th power of the step, a sum by that of all keys. The floor is for alpha near
    # 2, where thresholds have no finer digits
    tolerance = max(3e-7, (8e-7 / keys) ** max(b, 0.5))
    rise = -math.expm1(-b * math.log(keys)) / b
    quick = _near_power(power / 2**squarings)
    return Solver(newton_steps(keys, alpha, torch.float32), rise, tolerance, squarings, quick)


def _near_power(power: float) -> tuple[float, ...]:
    """Coefficients of the polynomial that meets x^power at Chebyshev's nodes of [0, 1], the highest power first."""
    angles = (torch.arange(QUICK_TERMS, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / QUICK_TERMS)
    nodes = 0.5 + 0.5 * angles.cos()
    return tuple(torch.linalg.solve(torch.linalg.vander(nodes), nodes**power).flip(0).tolist())


@cache
def compiled_loop() -> ctypes.CDLL | None:
    """The compiled loop; None, with one log line, where it is turned off, or no compiler does it."""
    if os.environ.get(SWITCH) == "0":
        LOGGER.info("PLADIS: its CPU loop is off (%s=0): same images, slower.", SWITCH)
        return None
    command = None
    try:
        command = _compiler()
        if command is None:
            LOGGER.info("PLADIS: no C++ compiler (CXX, g++, clang++) for its CPU loop: same images, slower.")
            return None
        loop, place = _kept_or_compiled(command)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        what = command[0] if command else f"CXX={os.environ.get('CXX')}"
        LOGGER.warning("PLADIS: %s cannot compile its CPU loop (%s): same images, slower.", what, _reason(error))
        return None
    LOGGER.info(
        "PLADIS: attention on the CPU runs in a loop that %s compiled for this processor, %s (%s=0 turns it off).",
        command[0], place, SWITCH,
    )  # fmt: skip
    return loop


def _compiler() -> list[str] | None:
    """Its path and options: those of CXX, else the first that is there. None: there is none.

    Raises:
        ValueError: CXX has an open quotation.
    """
    names = [shlex.split(os.environ.get("CXX", ""))]
    if not names[0]:
        names = [["g++"], ["clang++"]]
    # the loop is written for POSIX
    found = [] if os.name == "nt" else [(shutil.which(name), options) for name, *options in names]
    return next(([path, *options] for path, options in found if path), None)


def _kept_or_compiled(command: list[str]) -> tuple[ctypes.CDLL, str]:
    """The loop that an earlier start left, or a new one; and where it is, in words."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or torch._appdirs.user_cache_dir("torch_extensions")
    kept = Path(root) / "pladis" / f"cpu_{_key(command)}.so"
    with contextlib.suppress(OSError):
        return _load(kept), f"kept in {kept}"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder, writable = tempfile.TemporaryDirectory(prefix="making", dir=kept.parent), True
    except OSError:
        folder, writable = tempfile.TemporaryDirectory(prefix="pladis"), False
    with folder as name:
        made = Path(name) / "cpu.so"
        compile_it = [*command, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(compile_it, check=True, capture_output=True, text=True, timeout=120)
        loop = _load(made)
        if not writable:
            return loop, f"not kept, as {root} cannot be written to"
        # at once, so that another process never sees a part of it
        made.replace(kept)
        return loop, f"kept in {kept}"


def _load(path: Path) -> ctypes.CDLL:
    """Raises OSError where this is not the loop."""
    loop = ctypes.CDLL(str(path))
    if not (hasattr(loop, "pladis_attend") and hasattr(loop, "pladis_columns")):
        raise OSError(f"{path} has other functions")
    return loop


def _key(command: list[str]) -> str:
    """Of everything that the library depends on."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), *FLAGS, *command, version, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native looks at, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU", "Features", "isa", "cpu\t")
    return platform.machine() + "\n".join(line for line in lines if line.startswith(told))


def _reason(error: Exception) -> str:
    """The first line that says what went wrong."""
    lines = (getattr(error, "stderr", None) or str(error)).splitlines()
    return next((line for line in lines if "error" in line), next(iter(lines), ""))


def usable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        # a trace would keep the addresses and free what lies there
        return False
    dtype = compute_dtype(query.dtype, key.dtype, value.dtype)
    # a fake tensor has no address
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (query, key, value))
    return plain and query.device.type == "cpu" and dtype == torch.float32 and compiled_loop() is not None


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """As `attend` of impl/eager.py."""
    batch, heads, queries, width = query.shape
    keys, value_width = value.shape[-2:]
    out = query.new_empty(batch, queries, heads, value_width, dtype=torch.float32).transpose(1, 2)
    if out.numel() == 0 or keys == 0:
        return out.zero_().to(query.dtype)
    # as the loop sees it: an alpha that is 1 there must be 1 here
    alpha = ctypes.c_float(alpha).value
    if alpha == 1.0:
        dense, sparse = dense + sparse, 0.0
    order, mixed = (None, None) if mix_mask is None or sparse == 0.0 else _mixed_first(mix_mask)
    loop = compiled_loop()
    assert loop is not None, "asked for without usable()"
    block = loop.pladis_columns()
    query_rows = query.detach().float()
    query_rows = query_rows if query_rows.stride(-1) == 1 else query_rows.contiguous()
    unit, gain = (t.contiguous() for t in unit_keys(key.detach().float(), scale, mask))
    unit = unit if order is None else torch.take_along_dim(unit, order[:, None, :, None], 2)
    values = bounded_value(value.detach().float(), dense, sparse)
    values = values if order is None else torch.take_along_dim(values, order[:, None, :, None], 2)
    values = torch.nn.functional.pad(values, (0, -value_width % block))
    columns = values.shape[-1]
    values = values.unflatten(-1, (-1, block)).transpose(2, 3).contiguous()
    bias = None if mask is None else _unexpanded_mask(mask, order)
    row_lse = None if row_lse is None else row_lse.detach().float()
    newton = solver(alpha, keys) if sparse else Solver(0, 0.0, 0.0, 0, ())
    problem = Problem(
        *(None if t is None else t.data_ptr() for t in (query_rows, unit, values, gain, bias, row_lse, mixed, out)),
        batch, heads, key.shape[1], queries, keys, width, value_width, columns,
        (ctypes.c_int64 * 3)(*query_rows.stride()[:3]),
        (ctypes.c_int64 * 4)(*(() if bias is None else bias.stride())),
        (ctypes.c_int64 * 3)(*(() if row_lse is None else row_lse.stride()[:3])),
        (ctypes.c_int64 * 3)(*out.stride()[:3]),
        newton.steps, torch.get_num_threads(), newton.squarings,
        alpha, dense, sparse, newton.rise, newton.tolerance, (ctypes.c_float * QUICK_TERMS)(*newton.quick),
    )  # fmt: skip
    if loop.pladis_attend(ctypes.byref(problem)):
        raise MemoryError("PLADIS attention on the CPU ran out of memory")
    return scaled_to(out, mass, query.dtype)


def _mixed_first(mix_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of every batch, (B, Lk), those that are mixed in front, and how many these are, (B,)."""
    return (~mix_mask).to(torch.int8).argsort(dim=-1, stable=True), mix_mask.sum(-1)


def _unexpanded_mask(mask: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Additive, float32, keys in `order`; converted before it is expanded to all heads and queries."""
    stored = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    bias = additive_mask(stored, torch.float32)
    if order is not None and bias.shape[-1] > 1:
        bias = torch.take_along_dim(bias, order[:, None, None], -1)
    return bias.expand(mask.shape)
