"""Portable PyTorch: a chunk of queries at a time, so that the passes stay in cache and no map outgrows a buffer.

The threshold of alpha-entmax. With b = alpha - 1, p = 1 / b and scores c <= 0 whose maximum is 0,

    entmax(c)_i = [b * z_i]^p,   z_i = [c_i - tau]_+,   tau such that the weights sum to 1, i.e. ||z||_p = p.

The p-norm of z is a convex, decreasing function of tau, so Newton's method from the left of the root is monotone and
overshoots by rounding alone. Newton on the norm, rather than on the sum, makes the step exact when all scores are equal
and when alpha -> 1 (where it reads u += log sum exp(c - u)), and needs fewer steps in between. A start left of the
root: tau >= -p (the largest score alone) and tau >= mean(c) - p * n^-b (power means). With t = ||z||_p - p, every step
shrinks t * |t'| at least fourfold (t convex), and it starts below p * n^(2b): the number of steps is known beforehand,
no convergence test, no host synchronisation. The last step is not added to tau, which would round it, but to z or to
the weights: a large support multiplies such a rounding.
"""

from __future__ import annotations

import math

import torch

from .common import (
    additive_mask,
    bounded_value,
    centred,
    chunk_shape,
    chunks,
    compute_dtype,
    dense_factors,
    newton_steps,
    retried_in_smaller_chunks,
    row_mass,
    scaled_to,
    unit_keys,
)

# Bytes of one score buffer, of which there are two or three: near a core's cache, enough work per kernel launch.
CPU_BUFFER_BYTES = 5 << 19
DEVICE_BUFFER_BYTES = 8 << 20
# sums of weights are about 1, and 0 where all is masked: then no lambda may make the quotient infinite
LEAST_SUM = 1e-20


class Scratch:
    """Two buffers that every chunk reuses: fresh memory for each costs as much in page faults as the mathematics."""

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device):
        self._flat = torch.empty(2, elements, dtype=dtype, device=device)

    def views(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and weights of one shape; the last chunk of a head may be smaller than the others."""
        return tuple(flat[: math.prod(shape)].view(shape) for flat in self._flat)


def entmax_numerators(scores: torch.Tensor, alpha: float, dim: int, weights: torch.Tensor) -> torch.Tensor:
    """Fills `weights` with alpha-entmax of centred scores (maximum 0), a constant factor apart; 0 where all is -inf.

    Returns their sum over `dim`, to divide by.
    """
    if alpha in (1.5, 2.0):
        _polynomial_numerators(scores, alpha, dim, weights)
    else:
        _generic_numerators(scores, alpha, dim, weights)
    return weights.sum(dim, keepdim=True)


def _start(scores: torch.Tensor, alpha: float, dim: int) -> torch.Tensor:
    """tau + p at a threshold left of the root, exact for equal scores; without p, which outgrows tau as alpha -> 1."""
    b = alpha - 1.0
    return scores.mean(dim, keepdim=True).sub_(math.expm1(-b * math.log(scores.shape[dim])) / b).clamp_(min=0.0)


def _polynomial_numerators(scores: torch.Tensor, alpha: float, dim: int, z: torch.Tensor) -> None:
    """p = 2 (entmax-1.5) or p = 1 (sparsemax): the Newton step needs sums of z and z^2, or of z and its support."""
    tiny, eps = torch.finfo(scores.dtype).tiny, torch.finfo(scores.dtype).eps
    tau = _start(scores, alpha, dim).sub_(1.0 / (alpha - 1.0))
    step = torch.zeros_like(tau)
    steps = newton_steps(scores.shape[dim], alpha, scores.dtype)
    for _ in range(steps if alpha == 1.5 else steps - 1):
        tau += step
        torch.sub(scores, tau, out=z).clamp_(min=0.0)
        total = z.sum(dim, keepdim=True)
        if alpha == 1.5:
            norm = z.square_().sum(dim, keepdim=True).sqrt_()
            step = (norm - 2.0) * norm / total.clamp_(min=tiny)
        else:
            support = z.sign_().sum(dim, keepdim=True)
            step = (total - 1.0) / support.clamp_(min=1.0)
        # back by rounding alone: where a cluster of keys has dropped out, a step that counts one key is wrong for all
        step.clamp_(min=-eps)
    torch.sub(scores, tau, out=z).sub_(step).clamp_(min=0.0)
    if alpha == 1.5:
        z.square_()
    else:
        _settle(z, dim)


def _settle(z: torch.Tensor, dim: int) -> None:
    """The last step of sparsemax, in z, where nothing rounds it.

    A step back by a rounding, before it, lets a whole cluster of keys in again, each with that rounding. What a sum of
    1 may be rounded by is no such surplus.
    """
    surplus = z.sum(dim, keepdim=True).sub_(1.0)
    surplus.masked_fill_(surplus <= 4.0 * torch.finfo(z.dtype).eps, 0.0)
    z.sub_(surplus / (z > 0.0).sum(dim, keepdim=True).clamp_(min=1)).clamp_(min=0.0)


def _generic_numerators(scores: torch.Tensor, alpha: float, dim: int, weights: torch.Tensor) -> None:
    """Any alpha in (1, 2): weights as exp(log1p(b * (c - u)) / b) with tau = u - p, which stays exact as alpha -> 1."""
    b = alpha - 1.0
    tiny = torch.finfo(scores.dtype).tiny
    u = _start(scores, alpha, dim)
    base = torch.empty_like(scores)

    def solve() -> tuple[torch.Tensor, torch.Tensor]:
        """Fills weights with z^p and base with z^(p - 1), a constant factor apart; returns their sums."""
        torch.sub(scores, u, out=base).mul_(b).clamp_(min=-1.0)
        torch.log1p(base, out=weights).mul_(1.0 / b).exp_()
        torch.div(weights, base.add_(1.0).clamp_(min=tiny), out=base)
        return weights.sum(dim, keepdim=True), base.sum(dim, keepdim=True).clamp_(min=tiny)

    for _ in range(newton_steps(scores.shape[dim], alpha, scores.dtype)):
        total, slope = solve()
        # (||.||_p - p) / |slope of the norm| with the norm's p-th power in `total`, through logs for small b
        log_total = total.clamp_(min=tiny).log_()
        step = torch.expm1(log_total * b) * torch.exp(log_total * (1.0 - b)) / b
        # where all is masked there is no root: stay finite
        u += (step / slope).clamp_(min=-1.0)
    total, slope = solve()
    weights.addcmul_(base, (1.0 - total) / slope)


def mix_weights(
    scores: torch.Tensor, mixed: torch.Tensor | None, alpha: float, dim: int, dense: float, sparse: float
) -> torch.Tensor:
    """dense * softmax(scores) + sparse * entmax_alpha(scores) over `dim`, in float32 or wider; 0 where all masked.

    `mixed`: broadcastable to scores; the keys that are mixed, see `impl/common.py`.
    """
    scores = scores.to(compute_dtype(scores.dtype))
    if scores.numel() == 0:
        return scores.clone()
    peak = scores.amax(dim, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    scores = scores - peak
    return _mix(scores, mixed, alpha, dim, dense, sparse, torch.empty_like(scores))[0]


def _mix(
    scores: torch.Tensor, mixed: torch.Tensor | None, alpha: float, dim: int, dense: float, sparse: float,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same on centred scores, in one of the two buffers, and the sum of their exponentials; it overwrites both."""
    if alpha == 1.0:
        dense, sparse = dense + sparse, 0.0
    if mixed is not None and sparse != 0.0:
        return _mix_some(scores, mixed, alpha, dim, dense, sparse, weights)
    if sparse != 0.0:
        total = entmax_numerators(scores, alpha, dim, weights)
        weights.mul_(sparse / total.clamp_(min=LEAST_SUM))
    softmax = scores.exp_()
    softmax_sum = softmax.sum(dim, keepdim=True)
    factor = dense / softmax_sum.clamp(min=LEAST_SUM)
    return (softmax.mul_(factor) if sparse == 0.0 else weights.addcmul_(softmax, factor)), softmax_sum


def _mix_some(scores, mixed, alpha, dim, dense, sparse, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """`_mix` of the keys `mixed`, whose sum stays; the others keep their softmax weight."""
    chosen = scores.masked_fill(~mixed, -torch.inf)
    chosen -= chosen.amax(dim, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = entmax_numerators(chosen, alpha, dim, weights)
    softmax = scores.exp_()
    softmax_sum = softmax.sum(dim, keepdim=True)
    softmax.div_(softmax_sum.clamp(min=LEAST_SUM))
    mass = torch.mul(softmax, mixed, out=chosen).sum(dim, keepdim=True)
    weights.mul_(mass * (sparse / total.clamp_(min=LEAST_SUM)))
    return weights.add_(softmax.mul_(dense_factors(mixed, dense, sparse, softmax.dtype))), softmax_sum


def chunk_elements(device: torch.device, dtype: torch.dtype) -> int:
    """How many scores fill a buffer."""
    return (CPU_BUFFER_BYTES if device.type == "cpu" else DEVICE_BUFFER_BYTES) // dtype.itemsize


def attend(query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value; shapes as in `pladis_core.api`."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[-2]
    # laid out [B, Lq, H, Dv], which is what a caller that merges the heads wants without a copy
    out = query.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    dtype = compute_dtype(query.dtype, key.dtype, value.dtype)
    groups = heads // key.shape[1]
    key, value = (t.to(dtype).repeat_interleave(groups, dim=1) if groups > 1 else t.to(dtype) for t in (key, value))
    value = bounded_value(value, dense, sparse)
    unit, gain = unit_keys(key, scale, mask)

    def fill(elements: int) -> None:
        _fill(out, query, unit, gain, value, mask, mix_mask, alpha, dense, sparse, mass, row_lse, elements)

    retried_in_smaller_chunks(fill, chunk_elements(query.device, dtype), keys)
    return out


def _fill(
    out, query, unit, gain, value, mask, mix_mask, alpha, dense, sparse, mass, row_lse, elements: int
) -> None:
    """Writes `out` in chunks of at most `elements` scores."""
    keys, dtype = unit.shape[-2], unit.dtype
    _, heads, queries, _ = query.shape
    step_h, step_q = chunk_shape(heads, queries, keys, elements)
    scratch = Scratch(step_h * step_q * keys, dtype, query.device)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for rows in chunks(query.shape[:3], keys, elements):
            head = rows[:2]
            part = query[rows].to(dtype)
            # keys before queries: reductions over keys then run along contiguous queries
            scores, weights = scratch.views((part.shape[0], keys, part.shape[1]))
            torch.bmm(unit[head], part.mT, out=scores)
            bias = None if mask is None else additive_mask(mask[rows], dtype).mT
            scores, peak = centred(scores, gain[head], bias, dim=-2)
            mixed = None if mix_mask is None else mix_mask[rows[0], :, None]
            weights, softmax_sum = _mix(scores, mixed, alpha, -2, dense, sparse, weights)
            part_mass = None if mass is None else mass[rows]
            if row_lse is not None:
                part_mass = row_mass(peak, softmax_sum, row_lse[rows].mT).mT
            out[rows] = scaled_to(weights.mT @ value[head], part_mass, query.dtype)
