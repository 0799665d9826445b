"""PLADIS (arXiv 2503.07677): text cross-attention extrapolated from softmax towards alpha-entmax.

Host-independent mathematics. It imports torch, and `entmax` only when the reference backend runs.
"""

from .api import BACKENDS, entmax, pladis_attention, pladis_correction, pladis_weights
from .cap import add_capped
from .joint import attention_with_lse, joint_correction, log_sum_exp
from .maps import KINDS, LayerReport, attention_maps, sharpening_factor

__all__ = [
    "BACKENDS", "KINDS", "LayerReport", "add_capped", "attention_maps", "attention_with_lse", "entmax",
    "joint_correction", "log_sum_exp", "pladis_attention", "pladis_correction", "pladis_weights", "sharpening_factor",
]  # fmt: skip
