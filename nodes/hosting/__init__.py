"""The only code that knows ComfyUI's hooks: which layers, when, composed with whom."""

from .layers import LAYER_CHOICES, choose_layers, text_layers
from .settings import APPLY_TO, SCHEDULES, Settings
from .wrappers import apply_settings

__all__ = ["APPLY_TO", "LAYER_CHOICES", "SCHEDULES", "Settings", "apply_settings", "choose_layers", "text_layers"]
