"""The only code that knows ComfyUI's hooks: which layers, when, composed with whom."""

from .layers import LAYER_CHOICES, block_names, choose_layers, layer_names, text_layers
from .sampling import concatenate, samplers, schedulers
from .settings import APPLY_TO, SCHEDULES, Settings
from .wrappers import apply_settings

__all__ = [
    "APPLY_TO", "LAYER_CHOICES", "SCHEDULES", "Settings", "apply_settings", "block_names", "choose_layers",
    "concatenate", "layer_names", "samplers", "schedulers", "text_layers",
]  # fmt: skip
