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

# of the sampling schedule towards noise
SHIFT = 2.0

AUTOENCODER = {"channels": (32, 32, 64), "layers": 1, "groups": 32}


def _text_encoder(width: int, layers: int) -> dict:
    return {
        "vocab_size": len(TOKENS),
        "max_position_embeddings": LENGTH,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


# small: what is shipped, trained on one thread of a CPU; large: the same recipe for a GPU
TEXT_ENCODERS = {"small": _text_encoder(96, 2), "large": _text_encoder(256, 4)}
# text cross-attention at 8 x 8; widths are multiples of the first, as ComfyUI wants them
UNETS = {
    "small": {"channels": (32, 64), "attention": (False, True), "layers": 2, "head_width": 16},
    "large": {"channels": (128, 256), "attention": (False, True), "layers": 3, "head_width": 32},
}
TEXT_ENCODER, UNET = TEXT_ENCODERS["small"], UNETS["small"]
