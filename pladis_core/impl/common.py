"""Mathematics that every backend uses unchanged: how scores stay finite, what a mask means.

Mixed keys. Where only some keys of a row are mixed, with p the softmax over all keys and m the sum of p over these,
their weights are dense * p + sparse * m * entmax_alpha of their scores alone, and every other key's (dense + sparse) *
p: with dense + sparse = 1 all sums stay as softmax has them, and with dense + sparse = 0 the others get nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

# by how much a buffer shrinks where memory runs out
SHRINK = 8
# of kernels that start at the peak: `newton_steps` counts from a start that also knows the mean
STEPS_FROM_THE_PEAK = 2
# a sum of rounded weights divides only where rounding cannot make it vanish
LARGEST_CANCELLATION = 16.0


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float32, or float64 where an input is: entmax thresholds in 16 bit lose supports and row sums."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def newton_steps(keys: int, alpha: float, dtype: torch.dtype) -> int:
    """Steps of Newton's method on the p-norm, from the start of `impl/eager.py`, that reach the floor of `dtype`
    whatever the scores.

    The form is that docstring's bound; the constants are the least that held in an adversarial search.
    """
    steps = 2 + math.ceil(0.6 + 0.75 * (alpha - 1.0) * math.log2(max(keys, 1)))
    # convergence is quadratic: one step more doubles the digits
    return steps + (dtype == torch.float64)


def small_b(dtype: torch.dtype) -> float:
    """Below it, r = 1 + x forgets the digits of x that entmax near softmax needs: what rounds r shows as 1 / b times as
    much in a weight of `dtype`."""
    return 0.05 if dtype == torch.float32 else 0.003


def unit_keys(
    key: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """key (..., Lk, D) as (unit, gain) with scale * key = gain * unit and the 1-norm of every unit row at most 1.

    query @ unit^T then cannot overflow, whatever the magnitudes. The factors are powers of two times |scale|; gain is
    (..., 1, 1). A key that `mask` (..., Lq, Lk) masks for every query has no say in them.
    """
    if mask is not None:
        key = key.masked_fill(_unused_keys(mask, key.shape[-3]).unsqueeze(-1), 0.0)
    span = 4.0 * 2.0 ** key.shape[-1].bit_length()
    top = math.frexp(torch.finfo(key.dtype).max)[1] - 1
    if key.numel() == 0:
        return key, key.new_ones(*key.shape[:-2], 1, 1)
    peak = key.detach().abs().amax((-2, -1), keepdim=True).clamp_(min=1.0)
    peak = torch.exp2(peak.log2_().ceil_().clamp_(max=top))
    unit = key / peak / (-span if scale < 0 else span)
    gain = (peak * (abs(scale) * span)).clamp_(max=torch.finfo(key.dtype).max)
    return unit, gain


def whole_power(alpha: float) -> int:
    """p = 1 / (alpha - 1) where it is a whole number from 3 to 10, as at alpha 1.25: r^p is a few products. Else 0."""
    p = round(1.0 / max(alpha - 1.0, 1e-3))
    return p if 3 <= p <= 10 and abs(p * (alpha - 1.0) - 1.0) < 1e-6 else 0


class Mix(NamedTuple):
    """`dense` and `sparse` as a kernel takes them: weights are factor * (dense * softmax + sparse * entmax)."""

    dense: float
    sparse: float
    factor: float
    unit: bool  # sparse is 1

    @classmethod
    def of(cls, dense: float, sparse: float) -> Mix:
        if sparse != 0.0 and abs(dense) <= abs(sparse):
            return cls(dense / sparse, 1.0, sparse, True)
        # a power of two that keeps sums of weighted values in range
        bound = 2.0 ** math.ceil(math.log2(max(abs(dense) + abs(sparse), 1.0)))
        return cls(dense / bound, sparse / bound, bound, False)


def chunk_shape(heads: int, queries: int, keys: int, elements: int) -> tuple[int, int]:
    """(heads, queries) of one chunk: whole heads where several fit into `elements`, else a part of one head."""
    rows = max(1, elements // keys)
    if rows >= queries:
        return max(1, min(heads, rows // queries)), queries
    return 1, rows


def is_recorded(device: torch.device) -> bool:
    """Whether calls go into a CUDA graph, into which nothing that waits for the device may go."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def chunks(rows: tuple[int, int, int], keys: int, elements: int) -> Iterator[tuple[int, slice, slice]]:
    """The places of all chunks in tensors of (batch, heads, queries): one batch, then slices of heads and queries."""
    batch, heads, queries = rows
    step_h, step_q = chunk_shape(heads, queries, keys, elements)
    for b in range(batch):
        for h in range(0, heads, step_h):
            for start in range(0, queries, step_q):
                yield b, slice(h, h + step_h), slice(start, start + step_q)


def retried_in_smaller_chunks(fill: Callable[[int], None], elements: int, least: int) -> None:
    """fill(elements), with fewer elements at a time where memory runs out.

    Raises:
        torch.cuda.OutOfMemoryError: `least` are too many, too.
    """
    while True:
        try:
            return fill(elements)
        except torch.cuda.OutOfMemoryError:
            if elements <= least:
                raise
            elements //= SHRINK


def dense_factors(mixed: torch.Tensor, dense: float, sparse: float, dtype: torch.dtype) -> torch.Tensor:
    """What every key's softmax weight is multiplied with, of the shape of `mixed`."""
    factors = torch.full(mixed.shape, dense + sparse, dtype=dtype, device=mixed.device)
    return factors.masked_fill_(mixed, dense)


def _unused_keys(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(..., kv_heads, Lk): the keys that (..., H, Lq, Lk) masks for every query of every head that shares them."""
    kept = stored(mask)
    masked = ~kept if mask.dtype == torch.bool else kept <= torch.finfo(mask.dtype).min
    unused = masked.all(-2).expand(*mask.shape[:-2], mask.shape[-1])
    return unused.unflatten(-2, (kv_heads, -1)).all(-2)


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """An expanded tensor as it is in memory: every dimension along which it repeats has length 1."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean or additive mask as additive, with -inf for every masked key.

    The lowest finite value of an additive mask's dtype counts as masked: hosts write it where they mean -inf.
    """
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    masked = mask <= torch.finfo(mask.dtype).min
    return mask.to(dtype).masked_fill(masked, -torch.inf)


def centred(
    scores: torch.Tensor, gain: torch.Tensor, mask: torch.Tensor | None, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """gain * scores + mask, minus its maximum over `dim`, in place: at most 0, and -inf where masked. Never NaN.

    Returns them and the maximum.
    """
    lowest = torch.finfo(scores.dtype).min
    if mask is not None:
        # a quarter of the range, so that adding the mask cannot overflow upwards
        scores.mul_(gain).clamp_(lowest / 4, -lowest / 4).add_(mask.clamp(max=-lowest / 4))
    # where all is -inf the peak is finite, and -inf stays
    peak = scores.detach().amax(dim, keepdim=True).clamp_(min=lowest)
    scores.sub_(peak)
    return (scores, peak) if mask is not None else (scores.mul_(gain), peak * gain)


def row_mass(peak: torch.Tensor, softmax_sum: torch.Tensor, row_lse: torch.Tensor) -> torch.Tensor:
    """The softmax mass that a longer row, of log-sum-exp `row_lse`, puts on these keys.

    Where all are masked, with a `softmax_sum` of 0, some value from 0 to 1 without a slope: their weights are 0.
    """
    # the slope of the logarithm of 0 is infinite
    log_mass = peak + softmax_sum.clamp(min=torch.finfo(peak.dtype).tiny).log() - row_lse.to(peak.dtype)
    # kernels call the log-sum-exp of such a row infinite or NaN; bounded before exp, whose slope may overflow
    return log_mass.nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()


def bounded_value(value: torch.Tensor, dense: float, sparse: float) -> torch.Tensor:
    """value, clamped so that no mix of weights dense * p + sparse * q overflows. Touches only the top of the range."""
    limit = torch.finfo(value.dtype).max / max(1.0, 2.0 * (abs(dense) + abs(sparse)))
    return value.clamp(-limit, limit)


def scaled_to(out: torch.Tensor, mass: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """mass * out in `dtype`, saturated: extrapolation can leave the range of 16-bit floats that the inputs were in."""
    if mass is not None:
        out = out * mass.to(out.dtype)
    elif out.dtype == dtype:
        return out
    limit = torch.finfo(dtype).max
    return out.clamp(-limit, limit).to(dtype)
