"""Kernels that run where nobody tried them: on a device each variant is first compared with `impl/eager.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from . import eager

HEADS, ROWS = 2, 147
# of the largest value times a rounding
TOLERANCE = 8.0


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
