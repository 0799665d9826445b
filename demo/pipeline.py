"""Captions to pictures: the demo model with diffusers' modules and a text attention of choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .attention import TextAttention
from .model import autoencoder, encode_text, load, text_encoder, unet
from .sampling import euler, guided
from .vocabulary import split_words

# name: (file in demo/weights, steps, CFG) that the model is made for
VARIANTS = {"standard": ("unet", 20, 3.0), "few-step": ("unet_few_step", 4, 1.0)}


class Pipeline:
    """The demo model, loaded from demo/weights, in float32.

    Args:
        variant: "standard", or "few-step": distilled from it, for 1 to 8 steps without guidance.
    """

    def __init__(self, variant: str = "standard", device: str = "cpu") -> None:
        file, self.steps, self.cfg = VARIANTS[variant]
        self.device = device
        self.unet = load(unet(), file).to(device)
        self.text_encoder = load(text_encoder(), "text_encoder").to(device)
        self.autoencoder = load(autoencoder(), "autoencoder").to(device)

    @torch.no_grad()
    def latents(
        self,
        captions: Sequence[str],
        noise: torch.Tensor,
        attention: TextAttention | None = None,
        steps: int | None = None,
        cfg: float | None = None,
        callback: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        """(B, 4, 16, 16): what the noise becomes.

        Args:
            captions: one for each row of noise.
            noise: (B, 4, 16, 16).
            attention: how text is attended to; softmax when None.
            steps, cfg: the variant's own when None.
            callback: called after every step.

        Raises:
            ValueError: a word that the model does not know, or a caption that is too long.
        """
        text = encode_text(self.text_encoder, captions)
        empty = encode_text(self.text_encoder, [""]).expand_as(text)
        cfg = self.cfg if cfg is None else cfg
        velocity = guided(self.unet, text, empty, cfg)
        words = [len(split_words(caption)) for caption in captions]
        with (attention or TextAttention()).on(self.unet, words if cfg == 1 else words + [0] * len(words)):
            return euler(velocity, noise.to(self.device), steps or self.steps, callback)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """(B, 64, 64, 3) uint8."""
        pixels = self.autoencoder.decode(latents).sample.clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
