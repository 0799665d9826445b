"""The only code that knows ComfyUI's hooks: which layers, when, composed with whom."""

import torch
from comfy.nested_tensor import NestedTensor
from comfy.samplers import KSampler

from .layers import LAYER_CHOICES, block_names, choose_layers, layer_names, text_layers
from .settings import APPLY_TO, SCHEDULES, Settings
from .wrappers import apply_settings


def samplers() -> list[str]:
    """The names of the host's samplers, as KSampler lists them; more where other packs add some."""
    return KSampler.SAMPLERS


def schedulers() -> list[str]:
    return KSampler.SCHEDULERS


def concatenate(samples: list):
    """Latents in one batch; those of a video with sound are two tensors each."""
    if samples[0].is_nested:
        return NestedTensor([torch.cat(parts) for parts in zip(*(s.unbind() for s in samples), strict=True)])
    return torch.cat(samples)


__all__ = [
    "APPLY_TO", "LAYER_CHOICES", "SCHEDULES", "Settings", "apply_settings", "block_names", "choose_layers",
    "concatenate", "layer_names", "samplers", "schedulers", "text_layers",
]  # fmt: skip
