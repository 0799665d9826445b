"""PLADIS in a U-Net: what stands in a cross-attention's replacement slot during one model call.

The hooks go into the call's own transformer_options, in front of whatever sits in the slots then; a block that is
handed other options gets its hook when it is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules import attention

from ....pladis_core import add_capped, pladis_attention, pladis_correction
from ..batch import Segment, repeat_mask
from ..handed import Handed
from ..models.layers import Layer
from ..models.target import Target
from ..models.tokens import mixed_keys
from ..running import ModelCall, current_call, in_backward
from ..settings import Settings
from .preferred import preferred_by

Hook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


def prepare(call: ModelCall, transformer_options: dict[str, Any]) -> None:
    """The options of this call, with a hook for every layer; and what blocks do that get others."""
    call.options, call.enter = with_hooks(transformer_options, call, list(call.active)), enter_block


def enter_block(call: ModelCall, layers: list[Layer], handed: Handed) -> Handed:
    """A transformer block runs: its hook must be in the options that it got."""
    slots = handed.options.get("patches_replace", {})
    missing = [layer for layer in layers if not _is_ours(slots.get(layer.slot, {}).get(layer.key), call)]
    if not missing:
        return handed
    options = handed.options or call.options
    layer = missing[0]
    place = {"block": layer.key[:2], "block_index": layer.index}
    return handed.with_options({**with_hooks(options, call, missing), **place})


def _is_ours(hook: Any, call: ModelCall) -> bool:
    return isinstance(hook, PladisHook) and hook.call is call


def with_hooks(transformer_options: dict[str, Any], call: ModelCall, layers: list[Layer]) -> dict[str, Any]:
    """A copy of transformer_options with a hook for every layer, in front of the one the host would have called."""
    options = transformer_options.copy()
    replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
    for slot in {layer.slot for layer in layers}:
        residents = replace.get(slot, {})
        replace[slot] = residents.copy()
        for layer in (layer for layer in layers if layer.slot == slot):
            resident = residents.get(layer.key, residents.get(layer.key[:2]))
            if isinstance(resident, PladisHook):
                # of an earlier call, in options that another pack kept
                resident = resident.resident
            refuse_another_pladis(resident)
            replace[slot][layer.key] = PladisHook(call.active[layer], call, layer, resident)
    if any(layer.slot == "attn1" for layer in layers):
        _give_attn1_a_value(options)
    return options


def _give_attn1_a_value(options: dict[str, Any]) -> None:
    """The host sets the value of a replaced attn1 that is cross-attention only where an attn1_patch is present."""
    patches = options["patches"] = options.get("patches", {}).copy()
    patches["attn1_patch"] = [*patches.get("attn1_patch", []), _unchanged]


def _unchanged(n, context, value, extra_options):
    return n, context, value


@dataclass(frozen=True)
class PladisHook:
    """A replacement hook for one layer (comfy/ldm/modules/attention.py, BasicTransformerBlock.forward).

    Where another pack's hook (`resident`) or an attention override is there already, its output stays and PLADIS is
    added onto it; else one fused pass. Holds no state but the call's.
    """

    settings: Settings
    call: ModelCall
    layer: Layer
    resident: Hook | None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """q (B, Lq, H * D), k and v (B, Lk, H * D) -> (B, Lq, H * D)."""
        extra_options = self._with_heads(extra_options)
        dense = self.resident or dense_in(self.call.target, self.layer)
        if current_call() is not self.call and not in_backward():
            # its call is over: another pack kept the options
            return dense(q, k, v, extra_options)
        segments = self._segments(q, k, extra_options)
        alone = dense is dense_attention and "optimized_attention_override" not in extra_options
        if alone and not self.settings.norm_cap:
            parts = [self._fused(segment, q, k, v, extra_options) for segment in segments]
        else:
            base = dense(q, k, v, extra_options)
            parts = [self._added(segment, base, q, k, v, extra_options) for segment in segments]
        self.call.reached.add(self.layer)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __deepcopy__(self, memo) -> PladisHook:
        return self

    def _with_heads(self, extra_options: dict[str, Any]) -> dict[str, Any]:
        """Other packs' blocks do not fill in everything that the host's do."""
        if "n_heads" in extra_options:
            return extra_options
        block = self.call.target.found[self.layer]()
        return {**extra_options, "n_heads": block.n_heads, "dim_head": block.d_head}

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
        if segment.rows != slice(0, q.shape[0]):
            q, k, v = q[segment.rows], k[segment.rows], v[segment.rows]
        if segment.length not in (None, k.shape[1]):
            k, v = k[:, : segment.length], v[:, : segment.length]
        mask = repeat_mask(k, v) if segment.length is None else None
        rows, heads = q.shape[0], extra_options["n_heads"]
        q, k, v = [t.view(rows, -1, heads, t.shape[2] // heads).transpose(1, 2) for t in (q, k, v)]
        if self.call.watch is not None:
            size = extra_options.get("activations_shape")
            size = size and tuple(size[-2:])
            self.call.watch(self.layer, q, k, v, mask=mask, size=size, kinds=segment.kinds)
        settings = self.settings
        mix_mask = mixed_keys(segment.kinds, settings.tokens, k.shape[2], k.device)
        out = function(q, k, v, mask, lam=settings.lam, alpha=settings.alpha, mix_mask=mix_mask)
        return out.transpose(1, 2).flatten(2)

    def _segments(self, q: torch.Tensor, k: torch.Tensor, extra_options: Mapping[str, Any]) -> list[Segment]:
        if q.shape[0] != k.shape[0]:
            raise RuntimeError(
                f"PLADIS: the latents have {q.shape[0]} rows here and the text has {k.shape[0]}: another node appended "
                "prompts to the text inside the model (ComfyUI-NAG's samplers do), and no attention replacement can "
                "run together with that. Use ComfyUI's Normalized Attention Guidance, or remove Apply PLADIS."
            )
        batch = self.call.batch
        segments = batch.segments(q.shape[0], self.settings.apply_to, extra_options)
        if k.shape[1] == batch.tokens:
            return segments
        # another pack's attn2 patch changed the text
        return [Segment(s.rows, None, s.active) for s in segments]


def refuse_another_pladis(resident: Hook | None) -> None:
    """Two packs' PLADIS in one layer would add up; the hook of sd-perturbed-attention is known by its name.

    Raises:
        RuntimeError: `resident` is one.
    """
    name = getattr(resident, "__qualname__", "")
    if "pladis" in name.lower():
        raise RuntimeError(
            "PLADIS: this model also goes through the PLADIS node of another pack (sd-perturbed-attention), and both "
            "together would apply it twice. Remove one of the two nodes."
        )


def dense_in(target: Target, layer: Layer) -> Hook:
    """What the host does in a layer without a hook; `dense_attention` itself where its checkpoint prefers no kernel."""
    block = target.found[layer]()
    preferred = preferred_by(getattr(block, layer.slot, None))
    return partial(dense_attention, **preferred) if preferred else dense_attention


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: Mapping[str, Any], **preferred
) -> torch.Tensor:
    """What the host does without a hook (CrossAttention.forward), attention overrides included."""
    return attention.optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
        **preferred,
    )
