"""Kernels that run where nobody tried them: on a device each variant is first compared with `impl/eager.py`.

`compare` does so on random rows before a kernel's first use, `compare_output` on a few rows of that use itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from . import eager

HEADS, ROWS = 2, 147
# of the largest value times a rounding
TOLERANCE = 8.0
# of an output's root mean square: far above what rounding makes of any row, below what a wrong tile does to few; and
# how many roundings of weights beside it
WRONG, ROUNDINGS = 0.05, 4.0


def compare(
    attend: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, keys: int, width: int,
    value_width: int, alpha: float, mask: bool = False, mix: bool = False, mass: int = 0, scale: float = 1.0,
    dense: float = -1.0, sparse: float = 2.0,
) -> None:  # fmt: skip
    """A few random rows by `attend`, a backend's function, and by `impl/eager.py`.

    Args:
        scale: times width ** -0.5.
        mass: 0 none, 1 of a row, 2 by the log-sum-exp of a longer row.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    # whatever the default device and dtype are
    drawn = partial(torch.randn, generator=generator, device="cpu", dtype=torch.float32)
    # laid out as hosts do: heads behind positions; with one head of keys and values
    query, key, value = (
        drawn(1, length, heads, columns).to(dtype).to(device).transpose(1, 2)
        for length, heads, columns in ((ROWS, HEADS, width), (keys, 1, width), (keys, 1, value_width))
    )
    bias = mixed = share = row_lse = None
    if mask:
        bias = drawn(ROWS, keys)
        bias = bias.masked_fill(bias > 1.0, -torch.inf).to(device).expand(1, HEADS, -1, -1)
    if mix:
        mixed = (torch.arange(keys, device="cpu")[None] % 3 > 0).to(device)
    if mass:
        sizes = drawn(1, HEADS, ROWS, 1).abs().to(device)
        share, row_lse = (sizes, None) if mass == 1 else (None, 2.0 + 4.0 * sizes)
    others = scale * width**-0.5, alpha, dense, sparse, share, row_lse
    out = attend(query, key, value, bias, mixed, *others).float()
    expected = eager.attend(query.float(), key.float(), value.float(), bias, mixed, *others)
    error = (out - expected).abs().max().item()
    allowed = TOLERANCE * torch.finfo(dtype).eps * value.float().abs().max().item()
    if not error <= allowed:
        raise RuntimeError(f"its result is off by {error:.1e}, where rounding allows {allowed:.1e}")


def compare_output(
    out: torch.Tensor, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse
) -> bool:
    """What a kernel made of `attend`'s arguments, by `impl/eager.py` on some 128 rows of the first and last head of the
    first and last of the batch. Waits for the device.

    Returns:
        False where there was nothing to compare: inputs that are not finite, or outputs that are 0.

    Raises:
        RuntimeError: they differ by more than rounding can explain.
    """
    length = query.shape[2]
    # odd: another row of every tile
    step = max(length // 128, 1) | 1
    ends = _first_and_last(query.shape[0])
    few = ends, _first_and_last(query.shape[1]), slice((length - 1) % step, None, step)
    # products of float32 may be rounded on tensor cores
    exact = torch.float64 if query.dtype == torch.float32 and query.device.type == "cuda" else torch.float32
    key, value = (t[ends, _first_and_last(t.shape[1])].to(exact) for t in (key, value))
    mask, mass, row_lse = (None if t is None else t[few] for t in (mask, mass, row_lse))
    mixed = None if mix_mask is None else mix_mask[ends]
    beside = mask, mixed, scale, alpha, dense, sparse, mass, row_lse
    expected = eager.attend(query[few].to(exact), key, value, *beside)
    largest = torch.finfo(out.dtype).max
    expected = expected.clamp(-largest, largest)
    # of random signs a row of weights makes its own length
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(key.shape[-2], 16, generator=generator, device="cpu", dtype=torch.float32).sign()
    signs = signs.to(key).expand(*key.shape[:-1], -1)
    weights = eager.attend(query[few].to(exact), key, signs, *beside)
    error, size, of_value, of_row = (
        _root_mean_square(t) for t in (out[few].to(exact) - expected, expected, value, weights)
    )
    allowed = WRONG * size + ROUNDINGS * torch.finfo(out.dtype).eps * of_value * of_row
    if not (0.0 < size < math.inf and math.isfinite(of_value)):
        return False
    if not error <= allowed:
        raise RuntimeError(f"its result is off by {error:.1e}, where rounding allows {allowed:.1e}")
    return True


def _first_and_last(length: int) -> slice:
    return slice(None, None, max(length - 1, 1))


def _root_mean_square(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()
