"""What PLADIS Sweep needs of the host's sampling."""

from __future__ import annotations

import torch
from comfy.nested_tensor import NestedTensor
from comfy.samplers import KSampler


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
