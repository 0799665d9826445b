"""The only code that knows ComfyUI's hooks: which layers, when, composed with whom."""

from .layers import LAYER_CHOICES, block_names, choose_layers, text_layers
from .settings import APPLY_TO, Settings
from .wrappers import apply_settings

__all__ = ["APPLY_TO", "LAYER_CHOICES", "Settings", "apply_settings", "block_names", "choose_layers", "text_layers"]
