"""PLADIS in a diffusers U-Net: an attention processor on its text cross-attentions, through `pladis_core`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import scaled_dot_product_attention

from pladis_core import pladis_attention

LAYERS = ("all", "down + up")


@dataclass(frozen=True)
class TextAttention:
    """How text cross-attention weighs its keys.

    lam: PLADIS' lambda; 0 is softmax. alpha: sparsity of the form that it pushes towards. temperature: factor on the
    scores in softmax, the control that sharpens without being sparse; only with lam 0. layers: "all", the paper's
    definition, or "down + up", without the middle block, as the authors' code.
    """

    lam: float = 0.0
    alpha: float = 1.5
    temperature: float = 1.0
    layers: str = "all"

    def __post_init__(self) -> None:
        if self.layers not in LAYERS:
            raise ValueError(f"layers must be one of {LAYERS}, not {self.layers!r}")
        if self.lam and self.temperature != 1:
            raise ValueError(f"temperature {self.temperature} is a control for lam 0, not for lam {self.lam}")

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """diffusers' processor (diffusers/models/attention_processor.py, AttnProcessor2_0).

        Args:
            hidden_states: (B, Lq, C). encoder_hidden_states: (B, Lk, C') or None in self-attention.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        scale = query.shape[-1] ** -0.5
        if self.lam:
            out = pladis_attention(query, key, value, scale=scale, lam=self.lam, alpha=self.alpha)
        else:
            # in training with bfloat16 too: its backward pass is slow on CPUs
            with torch.autocast(query.device.type, enabled=False):
                out = scaled_dot_product_attention(query, key, value, scale=scale * self.temperature)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(-2)))


def set_text_attention(unet: UNet2DConditionModel, attention: TextAttention) -> None:
    """Puts `attention` into the text cross-attentions that it covers, softmax everywhere else."""
    dense = TextAttention()

    def chosen(name: str) -> TextAttention:
        covered = attention.layers == "all" or not name.startswith("mid_block")
        return attention if ".attn2." in name and covered else dense

    unet.set_attn_processor({name: chosen(name) for name in unet.attn_processors})
