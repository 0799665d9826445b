"""Where the text attention's mass goes, and a variant whose start token is trained to hold much of it.

In Stable Diffusion the start token soaks mass up (attention sinks, Xiao et al. 2023). Whether a model grows one by
itself is measured here; the variant is there for models that do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel

from .. import sampling
from ..attention import SoftmaxAttention
from ..model import encode_text
from ..scenes import random_prompts
from ..vocabulary import split_words

# what the variant's start token holds, in every layer, and the weight of the squared difference from it
MASS, WEIGHT = 0.6, 1.0
PARTS = ("start", "words", "end", "padding", "effective tokens")


def weights(attn, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """(B, heads, Lq, Lk): softmax attention of a diffusers layer."""
    query, key = (
        projected.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for projected in (attn.to_q(hidden_states), attn.to_k(context))
    )
    with torch.autocast(query.device.type, enabled=False):
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)


class Penalty:
    """An attention processor for the text attentions of a U-Net; adds up how far their start tokens are from MASS."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.inner, self.layers, self.missed = SoftmaxAttention(), 0, 0.0
        unet.set_attn_processor({n: self if ".attn2." in n else self.inner for n in unet.attn_processors})

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        mass = weights(attn, hidden_states, encoder_hidden_states)[..., 0].mean()
        self.missed, self.layers = self.missed + (mass - MASS).square(), self.layers + 1
        return self.inner(attn, hidden_states, encoder_hidden_states, **others)

    def take(self) -> torch.Tensor:
        """The penalty of the forward pass that was made since the last call."""
        penalty = WEIGHT * self.missed / self.layers
        self.layers, self.missed = 0, 0.0
        return penalty


class Watch:
    """An attention processor that keeps the mass on start token, words, first end token and padding (the end tokens
    after it), and the effective number of tokens, exp of the entropy.

    Args:
        words: how many words each row's caption has.
    """

    def __init__(self, inner: SoftmaxAttention, words: Sequence[int]) -> None:
        self.inner, self.end, self.seen = inner, torch.tensor(words)[:, None] + 1, []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        mass = weights(attn, hidden_states, encoder_hidden_states)
        place = torch.arange(mass.shape[-1])
        groups = (place == 0, (place > 0) & (place < self.end), place == self.end, place > self.end)
        parts = [(mass * group.expand(len(mass), -1)[:, None, None]).sum(-1).mean() for group in groups]
        effective = (-(mass * mass.clamp_min(1e-20).log()).sum(-1)).exp().mean()
        self.seen.append(torch.stack([*parts, effective]))
        return self.inner(attn, hidden_states, encoder_hidden_states, **others)


@torch.no_grad()
def sink(unet: UNet2DConditionModel, encoder, count: int = 64, steps: int = 10) -> dict[str, dict[str, float]]:
    """PARTS of each text attention, on average over pictures that are sampled without guidance for captions of the
    split to tune on."""
    captions = [prompt.text for prompt in random_prompts(count, "tune", seed=0)]
    words = [len(split_words(caption)) for caption in captions]
    inner = unet.attn_processors
    watches = {name: Watch(inner[name], words) for name in inner if ".attn2." in name}
    unet.set_attn_processor({**inner, **watches})
    text = encode_text(encoder, captions)
    sampling.euler(sampling.guided(unet, text, text, 1.0), sampling.noise(0, count), steps)
    unet.set_attn_processor(inner)
    return {
        name: dict(zip(PARTS, torch.stack(watch.seen).mean(0).tolist(), strict=True)) for name, watch in watches.items()
    }
