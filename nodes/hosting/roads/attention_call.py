"""An attention call in one layout, whoever makes it: the host, torch, xformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from comfy.ldm.modules import attention as host_attention

# newer hosts hand q, k and v over in these, so that they can be freed early
CONTAINER = getattr(host_attention, "AttentionTensorContainer", ())
View = Callable[[torch.Tensor], torch.Tensor]


def _as_it_is(out: torch.Tensor) -> torch.Tensor:
    return out


def _tokens_first(out: torch.Tensor) -> torch.Tensor:
    """(B, H, L, D) <-> (B, L, H, D)."""
    return out.transpose(1, 2)


@dataclass(frozen=True)
class AttentionCall:
    """q (B, H, Lq, D), k and v (B, Hkv, Lk, D[v]); mask with four dimensions, boolean or additive; scale or None.

    `give` puts an output (B, H, Lq, Dv) into the caller's layout, `view` sees the caller's as (B, H, Lq, Dv).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    give: View = field(default=_as_it_is)
    view: View = field(default=_as_it_is)

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


def read_host(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
) -> AttentionCall:
    """The arguments of optimized_attention (comfy/ldm/modules/attention.py), which callers give by position or name.

    Containers are looked into, not emptied.
    """
    q, k, v = (t.peek() if isinstance(t, CONTAINER) else t for t in (q, k, v))
    if not skip_reshape:
        # SD3's value has its heads apart already, behind the tokens
        q, k, v = (t.flatten(2) for t in (q, k, v))
        width = q.shape[-1] // heads
        q, k = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k))
        v = v.unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
    call = AttentionCall(q, k, v, _four_dimensions(mask), kwargs.get("scale"))
    if skip_output_reshape:
        return call
    return replace(
        call,
        give=lambda out: out.transpose(1, 2).flatten(2),
        view=lambda out: out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2),
    )


def taken_over(args: tuple) -> Callable[[], tuple]:
    """Empties the caller's containers; what makes the arguments anew, in new ones."""
    taken = [(arg.take(), True) if isinstance(arg, CONTAINER) else (arg, False) for arg in args]
    return lambda: tuple(CONTAINER(value) if contained else value for value, contained in taken)


def read_torch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> AttentionCall:
    """Those of torch.nn.functional.scaled_dot_product_attention, with four dimensions."""
    if query.ndim != 4 or is_causal:
        raise ValueError(f"PLADIS: text attention of shape {tuple(query.shape)}, causal: {is_causal}, is not covered")
    return AttentionCall(query, key, value, _four_dimensions(attn_mask), scale)


def read_xformers(query, key, value, attn_bias=None, p=0.0, scale=None, **_) -> AttentionCall:
    """Those of xformers.ops.memory_efficient_attention, (B, L, H, D); a bias of blocks is told by `one_row_each`."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    mask = _four_dimensions(attn_bias) if isinstance(attn_bias, torch.Tensor) else None
    return AttentionCall(q, k, v, mask, scale, give=_tokens_first, view=_tokens_first)


READERS = {"": read_host, "host": read_host, "preference": read_host, "torch": read_torch, "xformers": read_xformers}


def _four_dimensions(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(Lq, Lk), (B, Lq, Lk) or (B, H, Lq, Lk), as the host's backends read it."""
    if mask is None:
        return None
    mask = mask.unsqueeze(-3) if mask.ndim == 3 else mask
    return mask[(None,) * (4 - mask.ndim)]


def one_row_each(call: AttentionCall, rows: int) -> AttentionCall:
    """A batch of `rows` prompts of one length, unflattened, which its caller put into one row with a mask of blocks.

    Raises:
        RuntimeError: the tokens are not a multiple of the rows.
    """
    queries, keys = call.q.shape[2], call.k.shape[2]
    if call.q.shape[0] != 1 or queries % rows or keys % rows:
        raise RuntimeError(
            f"PLADIS: {rows} prompts in one attention row of {queries} queries and {keys} keys are not of one length."
        )
    q, k, v = (t[0].unflatten(1, (rows, -1)).transpose(0, 1) for t in (call.q, call.k, call.v))
    return AttentionCall(
        q, k, v, None, call.scale,
        give=lambda out: call.give(out.transpose(0, 1).flatten(1, 2).unsqueeze(0)),
        view=lambda out: call.view(out)[0].unflatten(1, (rows, -1)).transpose(0, 1),
    )  # fmt: skip
