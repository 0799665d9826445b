"""What stands in a cross-attention's replacement slot during one model call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from comfy.ldm.modules import attention

from ...pladis_core import add_capped, pladis_attention, pladis_correction
from .conditioning import Chunk, repeat_mask, usual_role
from .settings import Settings

Hook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
# what Attention Couple of ComfyUI-ppm and of prompt-control leave in extra_options
COUPLE_KEYS = ("cond_or_uncond_couple", "cond_or_uncond_hook_couple")


@dataclass(frozen=True)
class ModelCall:
    """What the hooks of one model call know of its batch: rows, context tokens, conditionings (empty: not known)."""

    rows: int
    tokens: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that are computed alike. `length` is the prompt's own length; None: not known."""

    rows: slice
    length: int | None
    active: bool


def cut(chunks: Sequence[Chunk], rows: int, apply_to: str) -> list[Segment]:
    """The batch's rows, of which every chunk has an equal share, as few segments as can be."""
    share = rows // len(chunks)
    segments, start = [], 0
    for (length, active), group in groupby(chunks, lambda c: (c.length, apply_to in ("both", c.role))):
        stop = start + share * len(list(group))
        segments.append(Segment(slice(start, stop), length, active))
        start = stop
    return segments


@dataclass(frozen=True)
class PladisHook:
    """A replacement hook for one layer (comfy/ldm/modules/attention.py, BasicTransformerBlock.forward).

    Where another pack's hook (`resident`) or an attention override is there already, its output stays and PLADIS is
    added onto it; else one fused pass. Holds no state: several threads may call it.
    """

    settings: Settings
    call: ModelCall
    resident: Hook | None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q (B, Lq, H * D), k and v (B, Lk, H * D) -> (B, Lq, H * D)."""
        segments = self._segments(q, k, extra_options)
        alone = self.resident is None and "optimized_attention_override" not in extra_options
        if alone and not self.settings.norm_cap:
            parts = [self._fused(segment, q, k, v, extra_options) for segment in segments]
        else:
            base = (self.resident or dense_attention)(q, k, v, extra_options)
            parts = [self._added(segment, base, q, k, v, extra_options) for segment in segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _fused(self, segment: Segment, q, k, v, extra_options) -> torch.Tensor:
        if not segment.active:
            rows = segment.rows
            return dense_attention(q[rows], k[rows], v[rows], extra_options)
        return self._pladis(pladis_attention, segment, q, k, v, extra_options)

    def _added(self, segment: Segment, base, q, k, v, extra_options) -> torch.Tensor:
        rows = base[segment.rows]
        if not segment.active:
            return rows
        heads, cap = extra_options["n_heads"], self.settings.norm_cap
        correction = self._pladis(pladis_correction, segment, q, k, v, extra_options)
        if not cap:
            return rows + correction.to(rows.dtype)
        by_head = (t.unflatten(-1, (heads, -1)) for t in (rows, correction))
        return add_capped(*by_head, cap).flatten(-2)

    def _pladis(self, function, segment: Segment, q, k, v, extra_options) -> torch.Tensor:
        q, k, v = (t[segment.rows] for t in (q, k[:, : segment.length], v[:, : segment.length]))
        mask = repeat_mask(k, v) if segment.length is None else None
        q, k, v = (t.unflatten(-1, (extra_options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
        if self.settings.watch is not None:
            self.settings.watch(q, k, v, mask=mask, size=tuple(extra_options["activations_shape"][-2:]))
        out = function(q, k, v, mask, lam=self.settings.scale, alpha=self.settings.alpha)
        return out.transpose(1, 2).flatten(2)

    def _segments(self, q: torch.Tensor, k: torch.Tensor, extra_options: dict[str, Any]) -> list[Segment]:
        if q.shape[0] != k.shape[0]:
            raise RuntimeError(
                f"PLADIS: the latents have {q.shape[0]} rows here and the text has {k.shape[0]}: another node appended "
                "prompts to the text inside the model (ComfyUI-NAG's samplers do), and no attention replacement can "
                "run together with that. Use a NAG node that patches the MODEL, or remove Apply PLADIS."
            )
        chunks = self._chunks(q.shape[0], k.shape[1], extra_options)
        return cut(chunks, q.shape[0], self.settings.apply_to)

    def _chunks(self, rows: int, tokens: int, extra_options: dict[str, Any]) -> list[Chunk]:
        """The conditionings of q's rows; other packs' attn2 patches may have changed rows or tokens in between."""
        call = self.call
        if rows == call.rows and call.chunks:
            return [Chunk(c.role, c.length if tokens == call.tokens else None) for c in call.chunks]
        if self.settings.apply_to == "both":
            return [Chunk("positive", None)]
        # which conditioning each share of the enlarged batch came from
        couple = next((extra_options[key] for key in COUPLE_KEYS if extra_options.get(key)), None)
        if couple and rows % len(couple) == 0:
            return [Chunk(usual_role(index), None) for index in couple]
        raise rearranged(call.rows, rows, self.settings.apply_to)


def rearranged(given: int, found: int, apply_to: str) -> RuntimeError:
    return RuntimeError(
        f"PLADIS: another node (Attention Couple, tiled diffusion) rearranged the batch ({given} rows into the model, "
        f"{found} in its attention), so which rows are {apply_to} cannot be told. Set apply_to to both."
    )


def refuse_another_pladis(resident: Hook | None) -> None:
    """Two packs' PLADIS in one layer would add up; the hook of sd-perturbed-attention is known by its name.

    Raises:
        RuntimeError: `resident` is one.
    """
    if "pladis" in getattr(resident, "__qualname__", "").lower():
        raise RuntimeError(
            "PLADIS: this model also goes through the PLADIS node of another pack (sd-perturbed-attention), and both "
            "together would apply it twice. Remove one of the two nodes."
        )


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
    """What the host does without a hook (CrossAttention.forward), attention overrides included."""
    return attention.optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options["attn_precision"],
        transformer_options=extra_options,
    )
