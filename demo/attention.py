"""How the demo model's U-Net attends to text: by PLADIS, through `pladis_core.diffusers`, or by softmax of a
temperature, which PLADIS is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from torch import autocast
from torch.nn.functional import scaled_dot_product_attention

from pladis_core.diffusers import apply_pladis

LAYERS = ("all", "down + up")


@dataclass(frozen=True)
class TextAttention:
    """lam: PLADIS' lambda; 0 is softmax. alpha: sparsity of the form that it pushes towards. temperature: factor on the
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

    def on(self, unet: UNet2DConditionModel) -> AbstractContextManager:
        """The U-Net attends so in a `with` block, and as before afterwards."""
        if self.lam:
            return apply_pladis(unet, self.lam, self.alpha, self.layers)
        return nullcontext() if self.temperature == 1 else _tempered(unet, self)


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
