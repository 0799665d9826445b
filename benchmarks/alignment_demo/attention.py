"""An arm's text attention in the demo model's U-Net: diffusers' attention processors, through `pladis_core`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import scaled_dot_product_attention

from demo.attention import SoftmaxAttention
from demo.vocabulary import LENGTH
from pladis_core import pladis_attention, pladis_correction
from pladis_core.cap import add_capped

from .arms import GROUPS, Setting

BLOCKS = {"down_blocks": "down", "mid_block": "middle", "up_blocks": "up"}


@dataclass(frozen=True)
class Rows:
    """What the rows of a batch are: words in each row's caption, and the noise that its queries get, relative to their
    root mean square."""

    words: Sequence[int]
    query_noise: float = 0.0
    generator: torch.Generator | None = None

    def mixed(self, tokens: str, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """(rows, 77): which keys are mixed; None for all."""
        if tokens == "all":
            return None
        place = torch.arange(LENGTH)
        last = LENGTH if tokens == "without start token" else torch.tensor(self.words)[:, None] + 1
        return ((place > 0) & (place < last)).expand(len(self.words), -1).to(device)


class ArmAttention:
    """One text attention of a setting.

    Args:
        group: of GROUPS, that the layer belongs to.
    """

    def __init__(self, setting: Setting, group: str, rows: Rows, device: torch.device | str = "cpu") -> None:
        self.setting, self.rows = setting, rows
        self.temperature = setting.temperatures[GROUPS.index(group)]
        self.mixed = rows.mixed(setting.tokens, device)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """diffusers' processor, as demo/attention.py has it."""
        query, key, value = (
            projected.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
            )
        )  # fmt: skip
        if self.rows.query_noise:
            noise = torch.randn(query.shape, generator=self.rows.generator).to(query.device)
            query = query + self.rows.query_noise * query.square().mean((1, 2, 3), keepdim=True).sqrt() * noise
        with torch.autocast(query.device.type, enabled=False):
            out = weighed(self.setting, query, key, value, self.temperature, self.mixed)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(-2)))


def weighed(
    setting: Setting,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    temperature: float = 1.0,
    mixed: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, H, Lq, D): attention with a setting's weights.

    Args:
        temperature: of this layer.
        mixed: (B, Lk), the keys that PLADIS mixes; None for all.
    """
    if setting.gag:
        sparse = pladis_attention(query, key, value, lam=1.0, alpha=setting.alpha)
        delta = pladis_correction(query, key, value, lam=1.0, alpha=setting.alpha)
        return geometry_aware(sparse, delta, setting.lam, *setting.gag)
    if not setting.lam or setting.norm_cap:
        dense = scaled_dot_product_attention(query, key, value, scale=query.shape[-1] ** -0.5 * temperature)
        if not setting.lam:
            return dense
    how = {"lam": setting.lam, "alpha": setting.alpha, "mix_mask": mixed}
    if setting.norm_cap:
        return add_capped(dense, pladis_correction(query, key, value, **how), setting.norm_cap)
    return pladis_attention(query, key, value, **how)


def geometry_aware(sparse: torch.Tensor, delta: torch.Tensor, lam: float, eta: float, zeta: float) -> torch.Tensor:
    """sparse + lam * u * min(1, eta / |u|), u the part of delta along `sparse` and zeta times the rest (GAG, arXiv
    2603.02531, eq. 12, 13); for each head and query.

    Args:
        delta: sparse - dense.
    """
    tiny = torch.finfo(sparse.dtype).tiny
    along = (delta * sparse).sum(-1, keepdim=True) / sparse.square().sum(-1, keepdim=True).clamp(min=tiny) * sparse
    update = along + zeta * (delta - along)
    return sparse + lam * update * (eta / update.norm(dim=-1, keepdim=True).clamp(min=tiny)).clamp(max=1.0)


def put(unet: UNet2DConditionModel, setting: Setting, rows: Rows) -> None:
    """The setting on every text attention of the U-Net, softmax on the others."""
    dense = SoftmaxAttention()

    def chosen(name: str):
        return ArmAttention(setting, BLOCKS[name.split(".")[0]], rows, unet.device) if ".attn2." in name else dense

    unet.set_attn_processor({name: chosen(name) for name in unet.attn_processors})
