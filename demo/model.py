"""The demo model in diffusers and transformers: a latent diffusion model with a CLIP text encoder, in small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from . import config
from .scenes import SIZE
from .vocabulary import END, START, TOKENS, tokenize


def autoencoder() -> AutoencoderKL:
    """Pictures (B, 3, 64, 64) in [-1, 1] <-> latents (B, 4, 16, 16)."""
    size = config.AUTOENCODER
    return AutoencoderKL(
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * len(size["channels"]),
        up_block_types=("UpDecoderBlock2D",) * len(size["channels"]),
        block_out_channels=size["channels"],
        layers_per_block=size["layers"],
        norm_num_groups=size["groups"],
        latent_channels=config.LATENT_CHANNELS,
    )


def text_encoder(size: str = "small") -> CLIPTextModel:
    """Tokens (B, 77) -> (B, 77, 96), after the final layer norm; pooled, (B, 96): the state of the first end token."""
    return CLIPTextModel(
        CLIPTextConfig(**config.TEXT_ENCODERS[size], bos_token_id=TOKENS[START], eos_token_id=TOKENS[END])
    )


def unet(size: str = "small") -> UNet2DConditionModel:
    """Noisy latents, sigma * 1000 and text states -> velocity, noise - latents (flow matching)."""
    layout = config.UNETS[size]
    attention = layout["attention"]
    return UNet2DConditionModel(
        sample_size=config.LATENT_SIZE,
        in_channels=config.LATENT_CHANNELS,
        out_channels=config.LATENT_CHANNELS,
        block_out_channels=layout["channels"],
        layers_per_block=layout["layers"],
        down_block_types=tuple("CrossAttnDownBlock2D" if text else "DownBlock2D" for text in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if text else "UpBlock2D" for text in reversed(attention)),
        cross_attention_dim=config.TEXT_ENCODERS[size]["hidden_size"],
        # diffusers calls the number of heads so
        attention_head_dim=tuple(width // layout["head_width"] for width in layout["channels"]),
    )


def encode_text(encoder: CLIPTextModel, captions: Sequence[str]) -> torch.Tensor:
    """(B, 77, 96), as the U-Net reads them."""
    tokens = torch.tensor([tokenize(caption) for caption in captions], device=encoder.device)
    return encoder(tokens).last_hidden_state


def load(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module with the shipped weights of that name (float16 on disk), in float32, for inference."""
    module.load_state_dict(load_file(config.WEIGHTS / f"{name}.safetensors"))
    return module.eval().requires_grad_(False)
