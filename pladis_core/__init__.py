"""PLADIS (arXiv 2503.07677): text cross-attention extrapolated from softmax towards alpha-entmax.

Host-independent mathematics. It imports torch, and `entmax` only when the reference backend runs.
"""

from .api import BACKENDS, entmax, pladis_attention, pladis_correction, pladis_weights

__all__ = ["BACKENDS", "entmax", "pladis_attention", "pladis_correction", "pladis_weights"]
