"""The host's attention call in one layout (comfy/ldm/modules/attention.py: optimized_attention and its overrides)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionCall:
    """q (B, H, Lq, D), k and v (B, Hkv, Lk, D[v]); mask with four dimensions, boolean or additive; scale or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    split_output: bool

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]

    def part_of_mask(self, batch: slice, rows, columns: slice) -> torch.Tensor | None:
        """`batch`, `rows` (a slice or indices) and `columns` of the mask; dimensions of 1 stay."""
        if self.mask is None:
            return None
        mask = self.mask[batch] if self.mask.shape[0] > 1 else self.mask
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
        return mask[..., columns]

    def to_host(self, out: torch.Tensor) -> torch.Tensor:
        """(B, H, Lq, Dv) as the caller wants it: as it is, or with merged heads."""
        return out if self.split_output else out.transpose(1, 2).flatten(2)

    def from_host(self, out: torch.Tensor) -> torch.Tensor:
        """A view of the host's output as (B, H, Lq, Dv)."""
        return out if self.split_output else out.unflatten(-1, (self.q.shape[1], -1)).transpose(1, 2)


def bind(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
) -> AttentionCall:
    """Reads the arguments of optimized_attention, which callers give by position or by name."""
    if not skip_reshape:
        # SD3's value has its heads apart already, behind the tokens
        q, k, v = (t.flatten(2) for t in (q, k, v))
        width = q.shape[-1] // heads
        q, k = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k))
        v = v.unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
    if mask is not None:
        # (Lq, Lk) or (B, Lq, Lk), as the host's backends read it
        mask = mask.unsqueeze(-3) if mask.ndim == 3 else mask
        mask = mask[(None,) * (4 - mask.ndim)]
    return AttentionCall(q, k, v, mask, kwargs.get("scale"), skip_output_reshape)
