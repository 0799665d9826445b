"""The only code that knows ComfyUI's hooks: which layers, when, composed with whom."""

from comfy.samplers import KSampler

from .layers import LAYER_CHOICES, block_names, choose_layers, layer_names, text_layers
from .settings import APPLY_TO, SCHEDULES, Settings
from .wrappers import apply_settings


def samplers() -> list[str]:
    """The names of the host's samplers, as KSampler lists them; more where other packs add some."""
    return KSampler.SAMPLERS


def schedulers() -> list[str]:
    return KSampler.SCHEDULERS


__all__ = [
    "APPLY_TO", "LAYER_CHOICES", "SCHEDULES", "Settings", "apply_settings", "block_names", "choose_layers",
    "layer_names", "samplers", "schedulers", "text_layers",
]  # fmt: skip
