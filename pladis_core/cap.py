"""A limit on how far extrapolation lengthens an attention output."""

from __future__ import annotations

import torch

from .impl.common import compute_dtype


def add_capped(dense: torch.Tensor, correction: torch.Tensor, cap: float) -> torch.Tensor:
    """dense + correction, every row of the last dimension shortened to at most cap * |dense|.

    Args:
        dense: (..., D), the softmax attention's output.
        correction: (..., D), of `pladis_correction`.
        cap: above 0. Going lower keeps the output nearer to the length it has without PLADIS; its direction stays.

    Returns:
        (..., D) in dense's dtype. Lengths are measured in float32 or wider.
    """
    dtype = compute_dtype(dense.dtype, correction.dtype)
    wide = dense.to(dtype)
    out = wide + correction.to(dtype)
    # scaled first: squares of large values overflow
    limit = cap * _length(wide)
    length = _length(out)
    out = torch.where(length > limit, out * (limit / length.clamp(min=torch.finfo(dtype).tiny)), out)
    top = torch.finfo(dense.dtype).max
    return out.clamp(-top, top).to(dense.dtype)


def _length(rows: torch.Tensor) -> torch.Tensor:
    peak = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return peak * torch.linalg.vector_norm(rows / peak, dim=-1, keepdim=True)
