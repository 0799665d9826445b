"""Kernels that run where nobody tried them: on a device each variant is first compared with `impl/eager.py`."""

from __future__ import annotations

from collections.abc import Callable

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
    # laid out as hosts do: heads behind positions
    query, key, value = (
        torch.randn(1, length, HEADS, columns, generator=generator).to(dtype).to(device).transpose(1, 2)
        for length, columns in ((ROWS, width), (keys, width), (keys, value_width))
    )
    bias = mixed = share = row_lse = None
    if mask:
        bias = torch.randn(ROWS, keys, generator=generator)
        bias = bias.masked_fill(bias > 1.0, -torch.inf).to(device).expand(1, HEADS, -1, -1)
    if mix:
        mixed = (torch.arange(keys)[None] % 3 > 0).to(device)
    if mass:
        drawn = torch.rand(1, HEADS, ROWS, 1, generator=generator).to(device)
        share, row_lse = (drawn, None) if mass == 1 else (None, 2.0 + 4.0 * drawn)
    others = scale * width**-0.5, alpha, dense, sparse, share, row_lse
    out = attend(query, key, value, bias, mixed, *others).float()
    expected = eager.attend(query.float(), key.float(), value.float(), bias, mixed, *others)
    error = (out - expected).abs().max().item()
    allowed = TOLERANCE * torch.finfo(dtype).eps * value.float().abs().max().item()
    if not error <= allowed:
        raise RuntimeError(f"its result is off by {error:.1e}, where rounding allows {allowed:.1e}")
