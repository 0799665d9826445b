"""How the demo model's U-Net attends to text: by PLADIS, through `pladis_core.diffusers`, or by softmax of a
temperature, which PLADIS is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import autocast
from torch.nn.functional import scaled_dot_product_attention

from pladis_core.diffusers import apply_pladis

from .vocabulary import LENGTH

LAYERS = ("all", "down + up")
TOKENS = ("all", "words only")


@dataclass(frozen=True)
class TextAttention:
    """lam: PLADIS' lambda; 0 is softmax. alpha: sparsity of the form that it pushes towards. temperature: factor on the
    scores in softmax, the control that sharpens without being sparse; only with lam 0. layers: "all", the paper's
    definition, or "down + up", without the middle block, as the authors' code. tokens: which of them PLADIS mixes, as
    on Apply PLADIS (Advanced).
    """

    lam: float = 0.0
    alpha: float = 1.5
    temperature: float = 1.0
    layers: str = "all"
    tokens: str = "all"

    def __post_init__(self) -> None:
        for name, value, known in (("layers", self.layers, LAYERS), ("tokens", self.tokens, TOKENS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, not {value!r}")
        if self.lam and self.temperature != 1:
            raise ValueError(f"temperature {self.temperature} is a control for lam 0, not for lam {self.lam}")

    def on(self, unet: UNet2DConditionModel, words: Sequence[int] = ()) -> AbstractContextManager:
        """The U-Net attends so in a `with` block, and as before afterwards.

        Args:
            words: how many each row of its batches has; for "words only".
        """
        if self.lam:
            mix_mask = words_alone(words) if self.tokens == "words only" else None
            return apply_pladis(unet, self.lam, self.alpha, self.layers, mix_mask=mix_mask)
        return nullcontext() if self.temperature == 1 else _tempered(unet, self)


def words_alone(words: Sequence[int]) -> torch.Tensor:
    """(B, 77): True from the first to the last word of each row, between start and end token."""
    place = torch.arange(LENGTH)
    return (place > 0) & (place <= torch.tensor(words)[:, None])


@contextmanager
def _tempered(unet: UNet2DConditionModel, attention: TextAttention):
    before = unet.attn_processors
    tempered = SoftmaxAttention(attention.temperature)

    def chosen(name: str) -> bool:
        return ".attn2." in name and (attention.layers == "all" or not name.startswith("mid_block"))

    unet.set_attn_processor({name: tempered if chosen(name) else processor for name, processor in before.items()})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class SoftmaxAttention:
    """diffusers' processor (diffusers/models/attention_processor.py, AttnProcessor2_0), with a factor on the scores and
    in float32: under bfloat16 autocast its backward pass is slow on CPUs."""

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """
        Args:
            hidden_states: (B, Lq, C). encoder_hidden_states: (B, Lk, C') or None in self-attention.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        scale = query.shape[-1] ** -0.5 * self.temperature
        with autocast(query.device.type, enabled=False):
            out = scaled_dot_product_attention(query, key, value, scale=scale)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(-2)))
