"""PLADIS in a transformer: what a text module does with the attention calls that it makes.

A text module is known since the node ran. When it is entered, it gets transformer_options with an attention override
of its own (comfy/ldm/modules/attention.py, wrap_attn); where its calls go past these options, the function that carries
them is diverted while it runs. No other attention of the network sees anything of it, and an override that another node
has set, or the kernel that a checkpoint prefers, computes the dense part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules import attention as host_attention
from torch.nn.attention import sdpa_kernel

from ....pladis_core import (
    add_capped,
    attention_with_lse,
    joint_correction,
    log_sum_exp,
    pladis_attention,
    pladis_correction,
)
from ..batch import Segment
from ..handed import OPTIONS, Handed
from ..models.families import JOINT
from ..models.layers import Layer
from ..models.spans import Inserted, Places, Row, Span, place
from ..models.tokens import mixed_keys
from ..running import KEY, ModelCall, current_call, in_backward
from .attention_call import READERS, AttentionCall, one_row_each, taken_over
from .direct import divert, diverted_functions
from .preferred import divert_preference, preferences
from .streams import StreamProbe

Attention = Callable[..., torch.Tensor]
OVERRIDE = "optimized_attention_override"
# the host's own softmax attention, for which torch's is the same mathematics, on a CPU much faster
SOFTMAX = {"cuda": ("attention_pytorch",),
           "cpu": ("attention_pytorch", "attention_sub_quad", "attention_split", "attention_basic")}  # fmt: skip
# elements of the query below which the host leaves the choice to torch (comfy/ops.py)
SMALL = 1024 * 128
# rows of text alone
EVERYWHERE = Places(slice(None), None)
WAY_OUT = (
    "Another node changed the tokens of this block in a way that PLADIS cannot follow. Remove that node, or Apply "
    "PLADIS."
)


def prepare(call: ModelCall, transformer_options: dict[str, Any]) -> None:
    """The options of this call, and what its text modules do when they are entered."""
    family = call.target.family
    call.options = {**transformer_options, KEY: call}
    call.enter = enter_module
    if family.kind == JOINT:
        probe = StreamProbe()
        call.options = probe.between(call.options)
        row = family.row(call.target.network(), call.arguments)
        call.row = JointRow(row, probe)
    call.ahead = family.ahead(call.target.network(), call.arguments)


def enter_module(call: ModelCall, layers: list[Layer], handed: Handed) -> Handed:
    """A text module runs: its attention goes through an override of its own."""
    (layer,) = layers
    family = call.target.family
    if family.kind == JOINT:
        call.row.check_streams(handed, family.text_tensor, family.img_slice)
    override = partial(TextOverride, call, layer, family.calls(handed), handed.rows if family.flat else None)
    if call.undo:
        raise call.lost_hooks()
    functions = diverted_functions(family.diverted, handed)
    for function in functions:
        call.undo.append(divert(function, override(None)))
    if not handed.takes(OPTIONS):
        return handed
    # where a pack forgot to pass them on, the call's own
    options = handed.options or call.options
    resident = options.get(OVERRIDE)
    if isinstance(resident, TextOverride):
        # of an earlier call, in options that another pack kept
        resident = resident.resident
    preferred = preferences(handed.module) if resident is None else []
    if preferred:
        for preference in preferred if not functions else ():
            call.undo.append(divert_preference(preference, override(None)))
        return handed.with_options({key: value for key, value in options.items() if key != OVERRIDE})
    return handed.with_options({**options, OVERRIDE: override(resident)})


class JointRow:
    """The row of one model call, and where text and image are in the attention calls that were seen of it."""

    def __init__(self, row: Row, probe: StreamProbe):
        self._row, self._probe = row, probe
        self._places: dict[tuple[Inserted, int, int], Places | None] = {}

    def places(self, queries: int, keys: int) -> Places | None:
        """None where the attention is another one of the block's.

        Raises:
            RuntimeError: the tokens do not add up.
        """
        inserted = self._probe.inserted
        seen = (inserted, queries, keys)
        if seen not in self._places:
            try:
                self._places[seen] = place(self._row, inserted, queries, keys)
            except ValueError as error:
                raise RuntimeError(f"PLADIS: {error}. {WAY_OUT}") from None
        return self._places[seen]

    def check_streams(self, handed: Handed, text_tensor: str, img_slice: bool) -> None:
        """The text that the block is handed is the prompt with what was put around it.

        Raises:
            RuntimeError: it has another length, or nobody says where it is.
        """
        found = handed.tokens(text_tensor) if text_tensor else None
        image = handed.options.get("img_slice")
        if img_slice and found is None and image is None and handed.options:
            raise RuntimeError(
                "PLADIS: another node runs this block and does not say where in its row the image is (img_slice), so "
                "which tokens are the text cannot be told. Remove that node (for a cache: use ComfyUI's EasyCache), or "
                "Apply PLADIS."
            )
        if found is None and image and not any(self._probe.inserted.text) and self._row.keys[0].name != "image":
            # a row of both: the host says where its image begins (flux/model.py)
            found = image[0]
        stream = [span for span in self._row.keys if span.name in self._row.text_stream]
        expected = sum(span.length for span in stream) + sum(self._probe.inserted.text)
        if found is not None and found != expected:
            described = " + ".join(f"{span.name} {span.length}" for span in stream)
            added = sum(self._probe.inserted.text)
            raise RuntimeError(
                f"PLADIS: a block's text has {found} tokens, but {described}{f' + added {added}' if added else ''} = "
                f"{expected}. {WAY_OUT}"
            )


class TextOverride:
    """The attention override of one text module, for one time that it runs.

    `calls` tells the module's attention calls by the length of their keys; empty, where all are text. `rows`: the batch
    that the module flattens into one row.
    """

    def __init__(
        self, call: ModelCall, layer: Layer, calls: tuple[Span, ...], rows: int | None, resident: Attention | None
    ):
        self.call, self.layer, self.rows, self.resident = call, layer, rows, resident
        self._calls = list(calls)
        self._lengths = {span.length for span in calls}

    def __call__(self, function: Attention, *args, diverted: str = "", **kwargs) -> torch.Tensor:
        """`diverted`: what the call was diverted from; empty for the host's own call of an override."""
        by_options = (kwargs.get(OPTIONS) or {}).get(OVERRIDE)
        if diverted and isinstance(by_options, TextOverride):
            # it comes here again by its options
            return function(*args, **kwargs)
        dense = function if self.resident is None else partial(self.resident, function)
        if current_call() is not self.call and not in_backward():
            # its call is over: another pack kept the options
            return dense(*args, **kwargs)
        attention = READERS[diverted](*args, **kwargs)
        if self.rows is not None:
            attention = one_row_each(attention, self.rows)
        places = self._places(attention)
        if places is None:
            # the host frees its tensors early
            del attention
            return dense(*args, **kwargs)
        again = taken_over(args)
        alone = function if self._alone(function, diverted, kwargs) else None
        compute = self._whole_rows if self.call.row is None else partial(self._joint, places)
        out = compute(attention, alone, lambda: dense(*again(), **kwargs))
        self.call.reached.add(self.layer)
        return out

    def _alone(self, function: Attention, diverted: str, kwargs: dict[str, Any]) -> bool:
        """Whether nobody else has a say in this attention.

        What stands in a host's module may be another pack's, and is always asked, and so is what a checkpoint prefers.
        """
        if diverted == "host":
            preferred = getattr(kwargs.get("preferred_attention"), "function", None)
            overridden = OVERRIDE in (kwargs.get(OPTIONS) or {})
            return function in _host_functions() and preferred is None and not overridden
        if diverted == "preference":
            return function is host_attention.optimized_attention
        return self.resident is None and diverted in ("", "torch")

    def _places(self, attention: AttentionCall) -> Places | None:
        """Where text and image are in this call; None where it is not the text's."""
        if not self._is_text(attention):
            return None
        row = self.call.row
        return EVERYWHERE if row is None else row.places(attention.q.shape[2], attention.k.shape[2])

    def _is_text(self, attention: AttentionCall) -> bool:
        """By the length of its keys; of two calls with the same, by their order."""
        if not self._calls:
            return True
        keys = attention.k.shape[2]
        if keys not in self._lengths:
            lengths = ", ".join(f"{span.name} {span.length}" for span in self._calls)
            raise RuntimeError(f"PLADIS: an attention call has {keys} keys, where {lengths} are expected. {WAY_OUT}")
        fitting = next(span for span in self._calls if span.length == keys)
        if sum(span.length == keys for span in self._calls) > 1:
            self._calls.remove(fitting)
        return fitting.name == "text"

    def _whole_rows(self, attention: AttentionCall, alone, dense) -> torch.Tensor:
        """Cross-attention: one fused pass, or what is there already plus the correction.

        `alone`: the function that nobody else has a say in, so that one fused pass may replace it.
        """
        settings, segments = self._settings_and_segments(attention)
        options = {"scale": attention.scale, "lam": settings.lam, "alpha": settings.alpha,
                   "enable_gqa": attention.grouped}  # fmt: skip
        parts = [(segment, self._text_of(segment, attention)) for segment in segments]
        everything = len(parts) == 1 and parts[0][0].rows == slice(0, len(attention.q))
        if alone is not None and everything and not settings.norm_cap:
            ((segment, text),) = parts
            mix_mask = self._mixed(segment, text[1])
            return attention.give(pladis_attention(*text, **options, mix_mask=mix_mask))
        out = dense().clone()
        view = attention.view(out)
        for segment, text in parts:
            correction = pladis_correction(*text, **options, mix_mask=self._mixed(segment, text[1]))
            view[segment.rows] = _added(view[segment.rows], correction, settings.norm_cap)
        return out

    def _mixed(self, segment: Segment, k: torch.Tensor) -> torch.Tensor | None:
        """Which of a segment's text keys (B, H, Lk, D) are mixed."""
        return mixed_keys(segment.kinds, self.call.active[self.layer].tokens, k.shape[2], k.device)

    def _text_of(self, segment: Segment, attention: AttentionCall):
        """Queries, keys, values and mask of a segment; a prompt that the host repeated counts once."""
        tokens = self.call.batch.tokens
        apart = self.call.target.family is not None and self.call.target.family.apart
        of_prompt = not apart or not self.layer.path.endswith(apart)
        repeated = of_prompt and segment.length not in (None, tokens) and attention.k.shape[2] == tokens
        columns = slice(0, segment.length) if repeated else slice(None)
        rows = segment.rows
        q, k, v = attention.q[rows], attention.k[rows][:, :, columns], attention.v[rows][:, :, columns]
        mask = attention.part_of_mask(rows, slice(None), columns)
        self._watch(q, k, v, mask=mask, scale=attention.scale, kinds=segment.kinds)
        return q, k, v, mask

    def _joint(self, places: Places, attention: AttentionCall, alone, dense) -> torch.Tensor:
        """Joint attention: image queries on text keys, on top of the dense output."""
        q, k, v, scale, grouped = attention.q, attention.k, attention.v, attention.scale, attention.grouped
        settings, segments = self._settings_and_segments(attention)
        lse = result = None
        if alone is not None and getattr(alone, "__name__", "") in SOFTMAX.get(q.device.type, ()):
            with kernels_as_the_host_orders_them(q):
                result = attention_with_lse(q, k, v, attention.mask, scale, enable_gqa=grouped)
        if result is not None:
            view, lse = result
        else:
            out = dense().clone()
            view = attention.view(out)
        rows = slice(None) if places.image is None else places.image
        columns = torch.arange(k.shape[2])[places.text]
        whole = len(columns)
        for segment in segments:
            batch = segment.rows
            # a prompt that the host repeated counts once
            length = whole if segment.length in (None, self.call.batch.tokens) else segment.length
            text = _as_slice(columns[:length])
            queries = q[batch][:, :, rows]
            row_lse = (
                log_sum_exp(
                    queries, k[batch], attention.part_of_mask(batch, rows, slice(None)), scale, enable_gqa=grouped
                )
                if lse is None
                else lse[batch][:, :, rows]
            )
            its_text = k[batch][:, :, text], v[batch][:, :, text]
            mask = attention.part_of_mask(batch, rows, text)
            self._watch(queries, *its_text, mask=mask, scale=scale, row_lse=row_lse, kinds=segment.kinds)
            correction = joint_correction(
                queries, *its_text, row_lse, mask, scale, lam=settings.lam, alpha=settings.alpha,
                copies=whole // length, mix_mask=self._mixed(segment, its_text[0]), enable_gqa=grouped,
            )  # fmt: skip
            view[batch][:, :, rows] = _added(view[batch][:, :, rows], correction, settings.norm_cap)
        return out if result is None else attention.give(view)

    def _settings_and_segments(self, attention: AttentionCall):
        settings = self.call.active[self.layer]
        segments = self.call.batch.segments(attention.q.shape[0], settings.apply_to)
        return settings, [segment for segment in segments if segment.active]

    def _watch(self, *tensors, **others) -> None:
        if self.call.watch is not None:
            with outside_the_hosts_memory_plan():
                self.call.watch(self.layer, *tensors, **others, ahead=self.call.ahead)


def _as_slice(columns: torch.Tensor) -> slice | torch.Tensor:
    """Of columns in a row, so that they are a view."""
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last + 1 - first == len(columns) else columns


def _added(dense: torch.Tensor, correction: torch.Tensor, cap: float) -> torch.Tensor:
    return add_capped(dense, correction, cap) if cap else dense.add_(correction)


def _host_functions() -> tuple[Attention, Attention]:
    return host_attention.optimized_attention, host_attention.optimized_attention_masked


def outside_the_hosts_memory_plan():
    """For what is kept longer than a model call: newer hosts plan the memory of some networks' evaluations
    (comfy/model_prefetch.py, malloc_graph_begin)."""
    prefetch = sys.modules.get("comfy.model_prefetch")
    pause = getattr(prefetch, "pause_malloc_graph", nullcontext)
    return pause()


def kernels_as_the_host_orders_them(query: torch.Tensor):
    """torch picks its kernel as it does for the host (comfy/ops.py, scaled_dot_product_attention)."""
    order = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", None)
    if order is None or query.nelement() < SMALL:
        return nullcontext()
    return sdpa_kernel(order, set_priority=True)
