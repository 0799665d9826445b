"""The paper's equation, materialised, on the `entmax` package: the oracle of every other backend. Differentiable."""

from __future__ import annotations

import torch

from .common import (
    additive_mask,
    bounded_value,
    centred,
    compute_dtype,
    dense_factors,
    row_mass,
    scaled_to,
    unit_keys,
)

try:
    from entmax import entmax15, entmax_bisect, sparsemax
except ImportError as error:
    raise ImportError(
        "backend 'reference' needs the entmax package: pip install entmax. The other backends do without it."
    ) from error

# entmax differs from softmax by about alpha - 1, and bisection in float64 errs by its rounding over alpha - 1
LIKE_SOFTMAX = 1e-8


def entmax(scores: torch.Tensor, alpha: float, dim: int) -> torch.Tensor:
    """alpha-entmax by the `entmax` package: exact (sorted) at 1.5 and 2, bisection to the float floor elsewhere."""
    if alpha - 1.0 < LIKE_SOFTMAX:
        return scores.softmax(dim)
    if alpha == 1.5:
        return entmax15(scores, dim)
    if alpha == 2.0:
        return sparsemax(scores, dim)
    # it raises thresholds to the power 1 / (alpha - 1), which multiplies their roundings by that
    wide = scores if scores.device.type == "mps" else scores.double()
    return entmax_bisect(wide, alpha, dim, n_iter=60).to(scores.dtype)


def mix_weights(
    scores: torch.Tensor, mixed: torch.Tensor | None, alpha: float, dim: int, dense: float, sparse: float
) -> torch.Tensor:
    """dense * softmax(scores) + sparse * entmax_alpha(scores) over `dim`, in float32 or wider; 0 where all masked.

    `mixed`: broadcastable to scores; the keys that are mixed, see `impl/common.py`.
    """
    if mixed is not None:
        softmax = mix_weights(scores, None, 1.0, dim, 1.0, 0.0)
        sparse_part = mix_weights(scores.masked_fill(~mixed, -torch.inf), None, alpha, dim, 0.0, sparse)
        mass = (softmax * mixed).sum(dim, keepdim=True)
        return dense_factors(mixed, dense, sparse, softmax.dtype) * softmax + mass * sparse_part
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
        unit, gain = unit_keys(key, scale, mask)
        scores = query.to(dtype) @ unit.mT
        scores, peak = centred(scores, gain, None if mask is None else additive_mask(mask, dtype), dim=-1)
        if row_lse is not None:
            mass = row_mass(peak, scores.exp().sum(-1, keepdim=True), row_lse)
        mixed = None if mix_mask is None else mix_mask[:, None, None]
        weights = mix_weights(scores, mixed, alpha, -1, dense, sparse)
        out = weights @ bounded_value(value, dense, sparse)
    return scaled_to(out, mass, query.dtype)
