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


def text_encoder() -> CLIPTextModel:
    """Tokens (B, 24) -> (B, 24, 96), after the final layer norm."""
    return CLIPTextModel(
        CLIPTextConfig(**config.TEXT_ENCODER, bos_token_id=TOKENS[START], eos_token_id=TOKENS[END])
    )


def unet() -> UNet2DConditionModel:
    """Noisy latents, sigma * 1000 and text states -> velocity, noise - latents (flow matching)."""
    size = config.UNET
    attention = size["attention"]
    return UNet2DConditionModel(
        sample_size=config.LATENT_SIZE,
        in_channels=config.LATENT_CHANNELS,
        out_channels=config.LATENT_CHANNELS,
        block_out_channels=size["channels"],
        layers_per_block=size["layers"],
        down_block_types=tuple("CrossAttnDownBlock2D" if text else "DownBlock2D" for text in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if text else "UpBlock2D" for text in reversed(attention)),
        cross_attention_dim=config.TEXT_ENCODER["hidden_size"],
        # diffusers calls the number of heads so
        attention_head_dim=tuple(width // size["head_width"] for width in size["channels"]),
    )


def encode_text(encoder: CLIPTextModel, captions: Sequence[str]) -> torch.Tensor:
    """(B, 24, 96)."""
    tokens = torch.tensor([tokenize(caption) for caption in captions], device=encoder.device)
    return encoder(tokens).last_hidden_state


def load(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module with the shipped weights of that name (float16 on disk), in float32, for inference."""
    module.load_state_dict(load_file(config.WEIGHTS / f"{name}.safetensors"))
    return module.eval().requires_grad_(False)
