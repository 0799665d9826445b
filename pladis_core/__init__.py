"""PLADIS (arXiv 2503.07677): text cross-attention extrapolated from softmax towards alpha-entmax.

Host-independent mathematics. It imports torch, and `entmax` only when the reference backend runs. In models of
diffusers: `pladis_core.diffusers`, which is imported by that name alone.
"""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ImportError(
        'pladis_core needs PyTorch: pip install "pladis-comfy[torch]", or "pladis-comfy[diffusers]", which brings it'
    )

from .api import BACKENDS, entmax, pladis_attention, pladis_correction, pladis_weights, prepare
from .cap import add_capped
from .joint import attention_with_lse, joint_correction, log_sum_exp
from .maps import KINDS, LayerReport, attention_maps, sharpening_factor

__all__ = [
    "BACKENDS", "KINDS", "LayerReport", "add_capped", "attention_maps", "attention_with_lse", "entmax",
    "joint_correction", "log_sum_exp", "pladis_attention", "pladis_correction", "pladis_weights", "prepare",
    "sharpening_factor",
]  # fmt: skip
