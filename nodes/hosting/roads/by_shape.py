"""PLADIS in a network that the table does not know: whatever looks like text attention by its shape.

An attention is taken for the text's where its keys are as many as the prompt's tokens and its queries are not. It may
miss, or hit something else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..models.layers import BY_SHAPE
from ..running import ModelCall
from .attention_call import READERS
from .preferred import divert_preference, preferences
from .transformer import OVERRIDE, Attention, TextOverride


def prepare(call: ModelCall, transformer_options: dict[str, Any]) -> None:
    """The options of this call, with one override for all attention that takes the options."""
    resident = transformer_options.get(OVERRIDE)
    override = ShapeOverride(call, resident)
    preferred = preferences(call.target.network()) if resident is None else []
    call.options = dict(transformer_options) if preferred else {**transformer_options, OVERRIDE: override}
    call.closing = [divert_preference(preference, override) for preference in preferred]


class ShapeOverride:
    """An attention override (comfy/ldm/modules/attention.py, wrap_attn)."""

    def __init__(self, call: ModelCall, resident: Attention | None):
        self._call, self._resident = call, resident

    def __call__(self, function: Attention, *args, diverted: str = "", **kwargs) -> torch.Tensor:
        self._call.ran.add(BY_SHAPE)
        attention = READERS[diverted](*args, **kwargs)
        if attention.k.shape[2] == self._call.batch.tokens != attention.q.shape[2]:
            override = TextOverride(self._call, BY_SHAPE, (), None, self._resident)
            return override(function, *args, diverted=diverted, **kwargs)
        del attention
        dense = function if self._resident is None else partial(self._resident, function)
        return dense(*args, **kwargs)
