"""The loop of cpu.cpp, compiled on first use with the machine's GCC, about a second; without GCC, impl/eager.py serves.

No library is kept on disk: it is made for this processor, and a shared home may serve others.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .common import additive_mask, bounded_value, compute_dtype, newton_steps, scaled_to, unit_keys

LOGGER = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
# of cpu.cpp
QUICK_TERMS = 8


class Problem(ctypes.Structure):
    """`Problem` of cpu.cpp."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("query", "key", "value", "gain", "mask", "row_lse", "out")]
        + [
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width", "columns")
        ]
        + [(name, ctypes.c_int64 * n) for name, n in (("query_stride", 3), ("mask_stride", 4), ("row_lse_stride", 3))]
        + [("out_stride", ctypes.c_int64 * 3), *((name, ctypes.c_int64) for name in ("steps", "threads", "squarings"))]
        + [(name, ctypes.c_float) for name in ("alpha", "dense", "sparse", "rise", "enough")]
        + [("quick", ctypes.c_float * QUICK_TERMS)]
    )


class Solver(NamedTuple):
    """What the solver of cpu.cpp needs to know of an alpha and a number of keys, with p = 1 / (alpha - 1)."""

    steps: int  # from left of the root, whatever the scores
    rise: float  # of the mean score, to a threshold left of the root plus p; of 0, to one right of it plus p
    enough: float  # a step below it leaves less than float's rounding
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
    enough = max(3e-7, (8e-7 / keys) ** max(b, 0.5))
    rise = -math.expm1(-b * math.log(keys)) / b
    quick = _near_power(power / 2**squarings)
    return Solver(newton_steps(keys, alpha, torch.float32), rise, enough, squarings, quick)


def _near_power(power: float) -> tuple[float, ...]:
    """Coefficients of the polynomial that meets x^power at Chebyshev's nodes of [0, 1], the highest power first."""
    angles = (torch.arange(QUICK_TERMS, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / QUICK_TERMS)
    nodes = 0.5 + 0.5 * angles.cos()
    return tuple(torch.linalg.solve(torch.linalg.vander(nodes), nodes**power).flip(0).tolist())


@cache
def compiled_loop() -> ctypes.CDLL | None:
    """The compiled loop; None where there is no GCC for it, and, with one log line, where GCC or the loader fails."""
    name, *options = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    compiler = shutil.which(name)
    if compiler is None or sys.platform != "linux":
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="pladis") as folder:
            target = str(Path(folder) / "cpu.so")
            command = [compiler, *options, *FLAGS, str(SOURCE), "-o", target]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            return ctypes.CDLL(target)
    except (subprocess.SubprocessError, OSError) as error:
        reason = next(iter((getattr(error, "stderr", None) or str(error)).splitlines()), "")
        LOGGER.warning("PLADIS: %s cannot compile its CPU loop (%s): same images, slower.", compiler, reason)
        return None


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
    loop = compiled_loop()
    block = loop.pladis_columns()
    query_rows = query.detach().float()
    query_rows = query_rows if query_rows.stride(-1) == 1 else query_rows.contiguous()
    unit, gain = (t.contiguous() for t in unit_keys(key.detach().float(), scale))
    values = bounded_value(value.detach().float(), dense, sparse)
    values = torch.nn.functional.pad(values, (0, -value_width % block))
    columns = values.shape[-1]
    values = values.unflatten(-1, (-1, block)).transpose(2, 3).contiguous()
    bias = None if mask is None else _unexpanded_mask(mask)
    row_lse = None if row_lse is None else row_lse.detach().float()
    newton = solver(alpha, keys) if sparse else Solver(0, 0.0, 0.0, 0, ())
    problem = Problem(
        *(None if t is None else t.data_ptr() for t in (query_rows, unit, values, gain, bias, row_lse, out)),
        batch, heads, key.shape[1], queries, keys, width, value_width, columns,
        (ctypes.c_int64 * 3)(*query_rows.stride()[:3]),
        (ctypes.c_int64 * 4)(*(() if bias is None else bias.stride())),
        (ctypes.c_int64 * 3)(*(() if row_lse is None else row_lse.stride()[:3])),
        (ctypes.c_int64 * 3)(*out.stride()[:3]),
        newton.steps, torch.get_num_threads(), newton.squarings,
        alpha, dense, sparse, newton.rise, newton.enough, (ctypes.c_float * QUICK_TERMS)(*newton.quick),
    )  # fmt: skip
    if loop.pladis_attend(ctypes.byref(problem)):
        raise MemoryError("PLADIS attention on the CPU ran out of memory")
    return scaled_to(out, mass, query.dtype)


def _unexpanded_mask(mask: torch.Tensor) -> torch.Tensor:
    """Additive, float32, converted before it is expanded to all heads and queries."""
    stored = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    return additive_mask(stored, torch.float32).expand(mask.shape)
