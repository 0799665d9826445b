"""Auxiliary losses that teach the U-Net where it is, and the text encoder which way a relation points.

Scenes are as likely as their mirror images. So left and right are no use to the network until it understands the words,
and the words are no use until it knows left from right: by itself, training stays at this saddle for thousands of
steps. Linear probes, trained along, lead it away from there. They are not part of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel

from ..scenes import RELATIONS
from ..vocabulary import LENGTH, split_words


class PositionProbes(torch.nn.Module):
    """Coordinates in [-1, 1] read linearly from what enters each text attention.

    Args:
        unet: hooked; its next forward pass is what `loss` looks at.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
        layers = [
            resnet
            for block in blocks
            # each attention follows the residual block of its number
            for resnet, _ in zip(block.resnets, getattr(block, "attentions", ()), strict=False)
        ]
        self.probes = torch.nn.ModuleList(torch.nn.Conv2d(layer.conv2.out_channels, 2, 1) for layer in layers)
        self.seen: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, out, number=number: self.seen.__setitem__(number, out))

    def loss(self) -> torch.Tensor:
        """Mean squared error, averaged over the layers."""
        errors = []
        for number, probe in enumerate(self.probes):
            found = probe(self.seen[number])
            errors.append((found - _coordinates(found)).square().mean())
        return torch.stack(errors).mean()


class DirectionProbe(torch.nn.Module):
    """Which way an object lies from the one before it, read linearly from its two words.

    "a red circle left of a blue square": the blue square lies to the right. The text encoder is causal, so that only
    the second object's words can know.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.probe = torch.nn.Linear(width, 2)

    def loss(self, states: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Mean squared error over all tokens; `states` is (B, 24, width)."""
        wanted = torch.stack([directions(caption) for caption in captions]).to(states.device)
        return (self.probe(states) - wanted).square().mean() * LENGTH


class SideProbes(torch.nn.Module):
    """Whether a place lies on the second object's side, read linearly from what leaves each text attention: the
    product of place and direction, which the network needs in order to lay objects out.

    Args:
        unet: hooked; its next forward pass is what `loss` looks at.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        layers = [layer for name, layer in unet.named_modules() if name.split(".")[-2:-1] == ["attentions"]]
        self.probes = torch.nn.ModuleList(torch.nn.Conv2d(layer.in_channels, 1, 1) for layer in layers)
        self.seen: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, out, number=number: self.seen.__setitem__(number, out[0]))

    def loss(self, captions: Sequence[str]) -> torch.Tensor:
        """Mean squared error, averaged over the layers."""
        # two words carry the same direction
        ways = torch.stack([directions(caption).sum(0) / 2 for caption in captions])
        errors = []
        for number, probe in enumerate(self.probes):
            found = probe(self.seen[number])
            wanted = torch.einsum("bi,iyx->byx", ways.to(found.device), _coordinates(found))
            errors.append((found[:, 0] - wanted).square().mean())
        return torch.stack(errors).mean()


def directions(caption: str) -> torch.Tensor:
    """(24, 2): the direction at both words of an object that follows a relation, 0 at every other token."""
    words = split_words(caption)
    found = torch.zeros(LENGTH, 2)
    for number in range(len(words)):
        for relation, (x, y) in RELATIONS.items():
            end = number + len(relation.split())
            if words[number:end] == relation.split():
                # after the start token and the article
                found[end + 2 : end + 4] = torch.tensor([-x, -y], dtype=found.dtype)
    return found


def _coordinates(features: torch.Tensor) -> torch.Tensor:
    """(2, H, W): x, then y."""
    y, x = (torch.linspace(-1, 1, size, device=features.device) for size in features.shape[-2:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))
