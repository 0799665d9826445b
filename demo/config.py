"""The demo model's sizes, in plain numbers: what diffusers (demo/model.py) and ComfyUI (nodes/hosting/demo_model.py)
both build it from."""

from __future__ import annotations

from pathlib import Path

from .vocabulary import LENGTH, TOKENS

WEIGHTS = Path(__file__).parent / "weights"

# pixels per latent, along each side, and channels of a latent
DOWNSCALE = 4
LATENT_CHANNELS = 4
LATENT_SIZE = 16

AUTOENCODER = {"channels": (32, 32, 64), "layers": 1, "groups": 32}

TEXT_ENCODER = {
    "vocab_size": len(TOKENS),
    "max_position_embeddings": LENGTH,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

# text cross-attention at 8 x 8 and 4 x 4; widths are multiples of the first, as ComfyUI wants them
UNET = {"channels": (32, 64, 96), "attention": (False, True, True), "layers": 1, "head_width": 32}
