"""The only code that knows ComfyUI's hooks: which layers, when, composed with whom.

`wrappers` is the way in, from an Apply node to a model call. Rooms: `models` (families, their layers, what their rows
are made of), `roads` (the ways to a layer's attention), `looking` (maps and words).
"""

from .lists import layer_lists, numbers, whole_numbers
from .models.layers import LAYER_CHOICES, block_names, choose_layers, layer_names
from .models.target import Target, find_target
from .models.tokens import TOKENS, check_tokens
from .sampling import concatenate, samplers, schedulers
from .settings import APPLY_TO, SCHEDULES, Settings
from .wrappers import apply_settings

__all__ = [
    "APPLY_TO", "LAYER_CHOICES", "SCHEDULES", "TOKENS", "Settings", "Target", "apply_settings", "block_names",
    "check_tokens", "choose_layers", "concatenate", "find_target", "layer_lists", "layer_names", "numbers", "samplers",
    "schedulers", "whole_numbers",
]  # fmt: skip
