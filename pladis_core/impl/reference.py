"""The paper's equation, materialised, on the `entmax` package: the oracle of every other backend. Differentiable."""

from __future__ import annotations

import torch

from .common import additive_mask, bounded_value, centred, compute_dtype, row_mass, scaled_to, unit_keys

try:
    from entmax import entmax15, entmax_bisect, sparsemax
except ImportError as error:
    raise ImportError(
        "backend 'reference' needs the entmax package: pip install entmax. The other backends do without it."
    ) from error


def entmax(scores: torch.Tensor, alpha: float, dim: int) -> torch.Tensor:
    """alpha-entmax by the `entmax` package: exact (sorted) at 1.5 and 2, bisection to the float floor elsewhere."""
    if alpha == 1.0:
        return scores.softmax(dim)
    if alpha == 1.5:
        return entmax15(scores, dim)
    if alpha == 2.0:
        return sparsemax(scores, dim)
    return entmax_bisect(scores, alpha, dim, n_iter=60)


def mix_weights(scores: torch.Tensor, alpha: float, dim: int, dense: float, sparse: float) -> torch.Tensor:
    """dense * softmax(scores) + sparse * entmax_alpha(scores) over `dim`, in float32 or wider; 0 where all masked."""
    scores = scores.to(compute_dtype(scores.dtype))
    if scores.numel() == 0:
        return scores
    dead = (scores == -torch.inf).all(dim, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    # far below any weight's reach, yet finite: sorting and bisection in the package form inf - inf otherwise
    scores = (scores - scores.amax(dim, keepdim=True)).clamp(min=-1e6)
    weights = dense * scores.softmax(dim) + sparse * entmax(scores, alpha, dim)
    return weights.masked_fill(dead, 0.0)


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`."""
    dtype = compute_dtype(query.dtype, key.dtype, value.dtype)
    groups = query.shape[1] // max(key.shape[1], 1)
    key, value = (t.to(dtype).repeat_interleave(groups, dim=1) for t in (key, value))
    if key.shape[-2] == 0:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        unit, gain = unit_keys(key, scale)
        scores = query.to(dtype) @ unit.mT
        scores, peak = centred(scores, gain, None if mask is None else additive_mask(mask, dtype), dim=-1)
        if row_lse is not None:
            mass = row_mass(peak, scores.exp().sum(-1, keepdim=True), row_lse)
        weights = mix_weights(scores, alpha, -1, dense, sparse)
        out = weights @ bounded_value(value, dense, sparse)
    return scaled_to(out, mass, query.dtype)
