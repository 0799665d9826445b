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


class Probes(torch.nn.Module):
    """Three things that the network must know to lay objects out, each read linearly from its features.

    - place: coordinates in [-1, 1], from what enters each text attention;
    - direction: which way an object lies from the one before it, from its two words. "a red circle left of a blue
      square": the blue square lies to the right. The text encoder is causal: only the second object's words can know;
    - side: whether a place lies on the second object's side, the product of the two, from what leaves each text
      attention.

    Args:
        unet: whose features are read, once it is watched.
        width: of the text states.
    """

    def __init__(self, unet: UNet2DConditionModel, width: int) -> None:
        super().__init__()
        widths = [attention.in_channels for attention in _text_attentions(unet)]
        self.place = torch.nn.ModuleList(torch.nn.Conv2d(width, 2, 1) for width in widths)
        self.direction = torch.nn.Linear(width, 2)
        self.side = torch.nn.ModuleList(torch.nn.Conv2d(width, 1, 1) for width in widths)
        self.entering: dict[int, torch.Tensor] = {}
        self.leaving: dict[int, torch.Tensor] = {}

    def watch(self, unet: UNet2DConditionModel) -> None:
        """From now on every forward pass leaves its features here."""
        for number, attention in enumerate(_text_attentions(unet)):
            attention.register_forward_pre_hook(lambda _, seen, n=number: self.entering.__setitem__(n, seen[0]))
            attention.register_forward_hook(lambda _, __, out, n=number: self.leaving.__setitem__(n, out[0]))

    def loss(self, text: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Mean squared errors of the last forward pass: over places and layers, and over tokens times their number.

        Args:
            text: (B, 24, width), the states of the captions.
        """
        wanted = torch.stack([directions(caption) for caption in captions]).to(text.device)
        direction = (self.direction(text) - wanted).square().mean() * LENGTH
        # two words carry the same direction
        ways = wanted.sum(1) / 2
        errors = []
        for number, (place, side) in enumerate(zip(self.place, self.side, strict=True)):
            where = _coordinates(self.entering[number])
            errors.append((place(self.entering[number]) - where).square().mean())
            sides = torch.einsum("bi,iyx->byx", ways, where)
            errors.append((side(self.leaving[number])[:, 0] - sides).square().mean())
        return direction + 2 * torch.stack(errors).mean()


def _text_attentions(unet: UNet2DConditionModel) -> list[torch.nn.Module]:
    return [module for name, module in unet.named_modules() if name.split(".")[-2:-1] == ["attentions"]]


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
