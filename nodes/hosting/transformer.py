"""PLADIS in a transformer: which attention call is the text's, and what is done to it.

The text attention is known by the module that makes it: for the time of one model call, hooks on those modules tell the
attention override that one of them runs. No other attention is touched, and an override that another node has set
computes the dense part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ...pladis_core import (
    add_capped,
    attention_with_lse,
    joint_correction,
    log_sum_exp,
    pladis_attention,
    pladis_correction,
)
from .attention_call import AttentionCall, bind
from .direct import direct_attention
from .families import JOINT, Family
from .hook import ModelCall, Segment, cut, rearranged
from .settings import Settings
from .windows import Window

Attention = Callable[..., torch.Tensor]
# the host's own softmax attention, for which torch's is the same mathematics, on a CPU much faster
SOFTMAX = {"cuda": ("attention_pytorch",),
           "cpu": ("attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic")}  # fmt: skip


@dataclass
class Running:
    """A text module that runs now; its next `leave` attention calls are not text."""

    settings: Settings
    leave: int


class TextAttention:
    """An attention override for one model call, which acts while a text module runs.

    `chosen` has the settings by module path; empty, and `by_shape` given, where the network is not known.
    """

    def __init__(
        self,
        family: Family | None,
        chosen: Mapping[str, Settings],
        call: ModelCall,
        window: Window | None,
        resident: Attention | None,
        by_shape: Settings | None = None,
    ):
        self.family, self.chosen, self.call, self.window = family, chosen, call, window
        self.resident, self.by_shape = resident, by_shape
        self.direct = direct_attention(family.direct) if family is not None and family.direct else None
        self.running: Running | None = None
        self.found = False

    @contextmanager
    def installed(self, network: torch.nn.Module) -> Iterator[None]:
        """Hooks on the text modules; whatever happens in the model call, nothing of them stays."""
        handles = []
        try:
            for path, settings in self.chosen.items():
                module = network.get_submodule(path)
                handles.append(module.register_forward_pre_hook(partial(self._enter, settings), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
            # a module that was interrupted did not leave
            self._leave()

    def _enter(self, settings: Settings, module, args, kwargs) -> None:
        self.running = Running(settings, self.family.leave(module, kwargs))
        if self.direct is not None:
            self.direct.enter(self)

    def _leave(self, *_) -> None:
        self.running = None
        if self.direct is not None:
            self.direct.leave()

    def __call__(self, function: Attention, *args, **kwargs) -> torch.Tensor:
        dense = function if self.resident is None or self.direct is not None else partial(self.resident, function)
        settings = self._settings(args, kwargs)
        if settings is None:
            return dense(*args, **kwargs)
        attention = bind(*args, **kwargs)
        change = _joint if self.window is not None else _whole_rows
        # what stands in a host module may be another pack's, and is always asked
        own = function if self.resident is None and self.direct is None else None
        out = change(attention, settings, self.call, self.window, own, partial(dense, *args, **kwargs))
        if out is None:
            return dense(*args, **kwargs)
        self.found = True
        return out

    def _settings(self, args, kwargs) -> Settings | None:
        """The settings for this call; None where it is not the text's."""
        if self.by_shape is not None:
            queries, keys = args[0].shape[-2], args[1].shape[-2]
            return self.by_shape if keys == self.call.tokens != queries else None
        if self.running is None:
            return None
        if self.running.leave > 0:
            self.running.leave -= 1
            return None
        return self.running.settings


def _whole_rows(attention: AttentionCall, settings: Settings, call: ModelCall, _, own, dense) -> torch.Tensor:
    """Cross-attention: one fused pass, or what is there already plus the correction."""
    segments = active_segments(attention, settings, call)
    options = {"lam": settings.scale, "alpha": settings.alpha, "enable_gqa": attention.grouped}
    q, k, v = attention.q, attention.k, attention.v
    every = slice(None)
    if settings.watch is not None:
        settings.watch(q, k, v, mask=attention.mask, scale=attention.scale)
    everything = len(segments) == 1 and segments[0].rows == slice(0, len(q))
    if own is not None and everything and not settings.norm_cap:
        return attention.to_host(pladis_attention(q, k, v, attention.mask, attention.scale, **options))
    out = dense().clone()
    view = attention.from_host(out)
    for rows in (segment.rows for segment in segments):
        mask = attention.part_of_mask(rows, every, every)
        correction = pladis_correction(q[rows], k[rows], v[rows], mask, attention.scale, **options)
        view[rows] = _added(view[rows], correction, settings.norm_cap)
    return out


def _joint(attention: AttentionCall, settings: Settings, call: ModelCall, window: Window, own, dense):
    """Joint attention: image queries on text keys, on top of the dense output. None where the row is another one."""
    q, k, v, scale, grouped = attention.q, attention.k, attention.v, attention.scale, attention.grouped
    if q.shape[2] < window.least or k.shape[2] < window.text[1]:
        return None
    lse = result = None
    if own is not None and getattr(own, "__name__", "") in SOFTMAX.get(q.device.type, ()):
        result = attention_with_lse(q, k, v, attention.mask, scale, enable_gqa=grouped)
    if result is not None:
        view, lse = result
    else:
        out = dense().clone()
        view = attention.from_host(out)
    rows = _span(window.rows, q.shape[2])
    for segment in active_segments(attention, settings, call):
        batch, start = segment.rows, window.text[0] % k.shape[2]
        # a prompt that the host repeated counts once
        length = window.text[1] if segment.length in (None, call.tokens) else segment.length
        text = slice(start, start + length)
        queries = q[batch][:, :, rows]
        row_lse = (
            log_sum_exp(queries, k[batch], attention.part_of_mask(batch, rows, slice(None)), scale, enable_gqa=grouped)
            if lse is None
            else lse[batch][:, :, rows]
        )
        own_text = k[batch][:, :, text], v[batch][:, :, text]
        mask = attention.part_of_mask(batch, rows, text)
        if settings.watch is not None:
            settings.watch(queries, *own_text, mask=mask, scale=scale, row_lse=row_lse)
        correction = joint_correction(
            queries, *own_text, row_lse, mask, scale, lam=settings.scale, alpha=settings.alpha,
            copies=window.text[1] // length, enable_gqa=grouped,
        )  # fmt: skip
        view[batch][:, :, rows] = _added(view[batch][:, :, rows], correction, settings.norm_cap)
    return out if result is None else attention.to_host(view)


def _added(dense: torch.Tensor, correction: torch.Tensor, cap: float) -> torch.Tensor:
    return add_capped(dense, correction, cap) if cap else dense.add_(correction)


def _span(span, length: int):
    if span is None:
        return slice(None)
    if isinstance(span, torch.Tensor):
        return span
    start = span[0] % length
    return slice(start, start + span[1])


def active_segments(attention: AttentionCall, settings: Settings, call: ModelCall) -> list[Segment]:
    """The rows of the batch that get PLADIS, by conditioning."""
    rows = attention.q.shape[0]
    if call.chunks and rows == call.rows:
        return [s for s in cut(call.chunks, rows, settings.apply_to) if s.active]
    if settings.apply_to == "both":
        return [Segment(slice(0, rows), None, True)]
    raise rearranged(call.rows, rows, settings.apply_to)


@contextmanager
def text_attention(
    network, family: Family | None, active: list[Settings], arguments: Mapping[str, Any], call: ModelCall,
    transformer_options: dict[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A copy of transformer_options with the override of this model call, while its hooks are installed."""
    ahead = family.ahead(network, arguments) if family is not None else 0
    chosen = {layer.path: settings.on(layer, ahead=ahead) for settings in active for layer in settings.layers}
    resident = transformer_options.get("optimized_attention_override")
    by_shape = active[-1] if family is None else None
    window = family.window(network, arguments) if family is not None and family.kind == JOINT else None
    override = TextAttention(family, {} if by_shape else chosen, call, window, resident, by_shape)
    with override.installed(network):
        yield {**transformer_options, "optimized_attention_override": override}
    if not override.found:
        _warn(type(network).__name__)


@cache
def _warn(network: str) -> None:
    logging.warning(
        "PLADIS: no text attention ran in %s, so nothing was changed. Another node skipped or replaced it (the "
        "samplers of ComfyUI-NAG do), or this kind of sampling reaches it in another way.", network
    )  # fmt: skip
