"""The gradient of every backend, with torch alone: forward as the backend does it, backward by the formula.

Nothing of the size of a map is kept. The backward pass computes a chunk of queries again and goes back through it by
autograd, but for entmax, whose solver has no graph. With e = entmax_alpha(c), and s = e^(2 - alpha) where e > 0 and 0
elsewhere (Peters, Niculae, Martins 2019, https://arxiv.org/abs/1905.05702, on the Jacobian of alpha-entmax),

    de / dc = diag(s) - s s^T / sum(s).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import eager
from .common import (
    additive_mask,
    bounded_value,
    centred,
    chunks,
    compute_dtype,
    dense_factors,
    row_mass,
    scaled_to,
    unit_keys,
)


def mix_weights(
    scores: torch.Tensor, mixed: torch.Tensor | None, alpha: float, dim: int, dense: float, sparse: float
) -> torch.Tensor:
    """As `mix_weights` of impl/eager.py."""
    scores = scores.to(compute_dtype(scores.dtype))
    if mixed is None:
        return _Weights.apply(scores, alpha, dim, dense, sparse)
    softmax = _Weights.apply(scores, 1.0, dim, 1.0, 0.0)
    sparse_part = _Weights.apply(scores.masked_fill(~mixed, -torch.inf), alpha, dim, 0.0, sparse)
    mass = (softmax * mixed).sum(dim, keepdim=True)
    return dense_factors(mixed, dense, sparse, scores.dtype) * softmax + mass * sparse_part


def attend(forward, query, key, value, mask, mix_mask, scale, alpha, dense, sparse, mass, row_lse) -> torch.Tensor:
    """What `forward`, the `attend` of a backend, returns for the other arguments."""
    return _Attention.apply(forward, (scale, alpha, dense, sparse), mix_mask, query, key, value, mask, mass, row_lse)


class _Weights(torch.autograd.Function):
    """dense * softmax + sparse * entmax_alpha of scores in float32 or wider."""

    @staticmethod
    def forward(ctx, scores, alpha, dim, dense, sparse):
        softmax = eager.mix_weights(scores, None, 1.0, dim, 1.0, 0.0)
        entmax = softmax if alpha == 1.0 else eager.mix_weights(scores, None, alpha, dim, 0.0, 1.0)
        ctx.save_for_backward(softmax, entmax)
        ctx.options = alpha, dim, dense, sparse
        return dense * softmax + sparse * entmax

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        softmax, entmax = ctx.saved_tensors
        alpha, dim, dense, sparse = ctx.options
        # 0^0 is 1, and the solver's last step may leave a rounding below 0
        slopes = (entmax > 0).to(grad.dtype) if alpha == 2.0 else entmax.clamp(min=0.0).pow(2.0 - alpha)
        grad = dense * _times_jacobian(softmax, grad, dim) + sparse * _times_jacobian(slopes, grad, dim)
        return grad, None, None, None, None


def _times_jacobian(s: torch.Tensor, grad: torch.Tensor, dim: int) -> torch.Tensor:
    """(diag(s) - s s^T / sum(s)) @ grad along `dim`; 0 where s is."""
    weighted = s * grad
    total = s.sum(dim, keepdim=True).clamp_(min=torch.finfo(s.dtype).tiny)
    return weighted.sub_(s * (weighted.sum(dim, keepdim=True) / total))


class _Attention(torch.autograd.Function):
    """A backend's attention of query, key, value, mask, mass and row_lse."""

    @staticmethod
    def forward(ctx, forward, options, mix_mask, query, key, value, mask, mass, row_lse):
        ctx.save_for_backward(mix_mask, query, key, value, mask, mass, row_lse)
        ctx.options = options
        return forward(query, key, value, mask, mix_mask, *options, mass, row_lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mix_mask, query, key, value, *others = ctx.saved_tensors
        dtype = compute_dtype(query.dtype, key.dtype, value.dtype)
        groups = query.shape[1] // max(key.shape[1], 1)
        inputs = (query, *(t.to(dtype).repeat_interleave(groups, dim=1) for t in (key, value)), *others)
        wanted = ctx.needs_input_grad[3:]
        totals = [torch.zeros_like(t) if want else None for t, want in zip(inputs, wanted, strict=True)]
        if grad.numel() and key.shape[-2]:
            elements = eager.chunk_elements(query.device, dtype)
            for rows in chunks(query.shape[:3], key.shape[-2], elements):
                mixed = None if mix_mask is None else mix_mask[rows[0]]
                _add_chunk(totals, inputs, rows, grad[rows], dtype, mixed, ctx.options)
        for i, t in ((1, key), (2, value)):
            if wanted[i]:
                totals[i] = totals[i].reshape(*t.shape[:2], groups, *t.shape[2:]).sum(2).to(t.dtype)
        return None, None, None, *totals


def _add_chunk(totals, inputs, rows, grad, dtype, mixed, options) -> None:
    """Adds onto `totals`, None where no gradient is wanted, those of the queries `rows`: batch, heads, positions."""
    # keys and values belong to every query
    places = (rows, rows[:2], rows[:2], rows, rows, rows)
    parts = [None if t is None else t[place] for t, place in zip(inputs, places, strict=True)]
    if parts[3] is not None:
        parts[3] = additive_mask(parts[3], dtype)
    parts = [t if t is None else t.detach().to(dtype) for t in parts]
    leaves = [(t[place], part.requires_grad_()) for t, place, part in zip(totals, places, parts, strict=True)
              if t is not None and part is not None]  # fmt: skip
    # a backward pass inside autocast would multiply matrices in 16 bit
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        out = _formula(*(*parts, mixed, *options, grad.dtype))
        found = torch.autograd.grad(out, [part for _, part in leaves], grad)
    for (total, _), part in zip(leaves, found, strict=True):
        total += part


def _formula(query, key, value, mask, mass, row_lse, mixed, scale, alpha, dense, sparse, dtype) -> torch.Tensor:
    """mass * (dense * softmax(S) + sparse * entmax_alpha(S)) @ value of one chunk, materialised: (heads, rows, Dv)."""
    unit, gain = unit_keys(key, scale, mask)
    scores, peak = centred(query @ unit.mT, gain, mask, dim=-1)
    if row_lse is not None:
        mass = row_mass(peak, scores.exp().sum(-1, keepdim=True), row_lse)
    weights = mix_weights(scores, mixed, alpha, -1, dense, sparse)
    return scaled_to(weights @ bounded_value(value, dense, sparse), mass, dtype)
