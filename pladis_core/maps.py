"""What PLADIS does inside one attention layer: its weights on chosen keys, and figures about all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .api import pladis_weights
from .impl.common import additive_mask, compute_dtype

KINDS = ("dense", "sparse", "extrapolated")
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class LayerReport:
    """Means over the queries and heads of one layer.

    `zeros`: share of keys whose sparse weight is exactly 0; `support`: number of the others; `negative`: how much
    weight below 0 a query's extrapolated weights hold in all; `length_ratio`: |output| / |output without PLADIS|, of
    these keys alone. `effective`: tokens among which softmax spreads, exp of its entropy; `sharpening`: how many times
    as steep as softmax the mix is for a row that is spread evenly over so many (`sharpening_factor`).

    `masses`: of each part of the keys, what share of the text's attention is on it, (dense, extrapolated). `flipped`:
    of the part "words", the share of keys whose extrapolated weight is below 0; None without that part.
    """

    zeros: float
    support: float
    negative: float
    length_ratio: float
    effective: float
    sharpening: float
    masses: dict[str, tuple[float, float]] = field(default_factory=dict)
    flipped: float | None = None


def sharpening_factor(tokens: torch.Tensor | float, lam: float, alpha: float) -> torch.Tensor | float:
    """1 + lam * (n^(alpha - 1) - 1): how many times as much as softmax's the mix's weights change with the scores,
    where these are equal over n tokens. Follows from the Jacobian of alpha-entmax (`impl/gradient.py`)."""
    return 1 + lam * (tokens ** (alpha - 1) - 1)


@torch.no_grad()
def attention_maps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: list[list[int]],
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    row_lse: torch.Tensor | None = None,
    *,
    lam: float = 2.0,
    alpha: float = 1.5,
    parts: Mapping[str, Sequence[int]] | None = None,
) -> tuple[torch.Tensor, LayerReport]:
    """The weights of `KINDS` that every query puts on each group of keys, averaged over batch and heads.

    Args:
        query, key, value, attn_mask, scale: as in `pladis_attention`; heads may be grouped.
        groups: key positions whose weights are added up, for instance the tokens of one word.
        row_lse: (B, H, Lq, 1), the log-sum-exp of a longer row that these keys are a part of. Weights then count the
            share of the row that falls on them.
        parts: key positions by what they are ("start", "words", "padding"), for the report.

    Returns:
        (3, len(groups), Lq) float32, and the layer's report.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[-2]
    repeat = heads // key.shape[1]
    dtype = compute_dtype(query.dtype, key.dtype, value.dtype)
    key, value = (t.to(dtype).repeat_interleave(repeat, 1) for t in (key, value))
    scale = width**-0.5 if scale is None else scale
    mask = None if attn_mask is None else additive_mask(attn_mask, dtype).expand(batch, heads, queries, keys)
    maps = torch.empty(len(KINDS), len(groups), queries, dtype=torch.float32, device=query.device)
    parts = {name: list(places) for name, places in (parts or {}).items()}
    figures = torch.zeros(7 + 2 * len(parts), dtype=torch.float64, device="cpu")
    step = max(1, CHUNK_ELEMENTS // (batch * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        scores = query[:, :, rows].to(dtype) @ key.mT * scale
        scores = scores if mask is None else scores + mask[:, :, rows]
        dense, sparse = (pladis_weights(scores, lam, alpha) for lam in (0.0, 1.0))
        mixed = (1 - lam) * dense + lam * sparse
        figures += _figures(scores, dense, sparse, mixed, value, lam, alpha, parts)
        mass = 1.0 if row_lse is None else _mass(scores, row_lse[:, :, rows])
        for kind, weights in enumerate((dense, sparse, mixed)):
            average = (weights * mass).mean((0, 1))
            for index, group in enumerate(groups):
                maps[kind, index, rows] = average[:, group].sum(-1).float()
    zeros, support, negative, length_ratio, effective, sharpening, flipped, *shares = (
        figures / (batch * heads * queries)
    ).tolist()
    masses = dict(zip(parts, zip(shares[::2], shares[1::2], strict=True), strict=True))
    return maps, LayerReport(
        zeros, support, negative, length_ratio, effective, sharpening, masses, flipped if parts.get("words") else None
    )


def _mass(scores: torch.Tensor, row_lse: torch.Tensor) -> torch.Tensor:
    return (scores.logsumexp(-1, keepdim=True) - row_lse.to(scores.dtype)).exp().nan_to_num(0.0).clamp(max=1.0)


def _figures(scores, dense, sparse, mixed, value, lam, alpha, parts) -> torch.Tensor:
    """Sums over the queries of a chunk, in the order of `LayerReport`; then flipped, and the masses of `parts`."""
    possible = (scores > -torch.inf).sum(-1).clamp(min=1)
    support = (sparse > 0).sum(-1)
    before, after = ((weights @ value).norm(dim=-1) for weights in (dense, mixed))
    ratio = after / before.clamp(min=torch.finfo(before.dtype).tiny)
    effective = torch.special.entr(dense).sum(-1).exp()
    words = parts.get("words") or []
    flipped = (mixed[..., words] < 0).to(mixed.dtype).mean(-1) if words else torch.zeros_like(effective)
    masses = (weights[..., places].sum(-1) for places in parts.values() for weights in (dense, mixed))
    per_query = (1 - support / possible, support, -mixed.clamp(max=0).sum(-1), ratio, effective,
                 sharpening_factor(effective, lam, alpha), flipped, *masses)  # fmt: skip
    # in float64 only where the host's memory is: some GPUs have none
    return torch.stack([figure.to(before.dtype).sum() for figure in per_query]).cpu().double()
