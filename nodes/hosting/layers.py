"""Which attention layers of a model read the text, and how a person names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from comfy import model_base
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

LAYER_CHOICES = ("all", "down + up", "custom")
PREFIXES = {"d": "input", "m": "middle", "u": "output"}
ENTRY = re.compile(r"([dmu])(\d+)(?:-\1?(\d+))?(?:\.(\d+)(?:-(\d+))?)?")


class Layer(NamedTuple):
    """One text cross-attention, by the key under which the host looks up its replacement hook.

    `slot` is "attn2", or "attn1" where that is cross-attention too; the rest is (part, number, index) of
    `BasicTransformerBlock` (comfy/ldm/modules/attention.py, `transformer_block`).
    """

    slot: str
    part: str
    number: int
    index: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.part, self.number, self.index


def text_layers(model) -> tuple[Layer, ...]:
    """Every text cross-attention of a MODEL, in the order in which the network runs them.

    Raises:
        ValueError: the model has none that PLADIS can reach.
    """
    base = model.model
    if isinstance(base, (model_base.SVD_img2vid, model_base.Stable_Zero123)):
        raise ValueError(
            f"{type(base).__name__} has no text attention: it attends to a single image token, where sparse and dense "
            "attention are the same, so PLADIS would change nothing. Remove the Apply PLADIS node from this workflow."
        )
    network = model.get_model_object("diffusion_model")
    if not isinstance(network, UNetModel):
        raise ValueError(
            f"This version of PLADIS cannot reach the text attention of {type(network).__name__} "
            f"({type(base).__name__}). It works on U-Nets: SD 1.x, SD 2.x, SDXL and their relatives. "
            "Remove the Apply PLADIS node, or load such a model."
        )
    layers = unet_layers(network)
    if not layers:
        raise ValueError(
            f"{type(base).__name__} has no text cross-attention layer: PLADIS would change nothing. "
            "Remove the Apply PLADIS node from this workflow."
        )
    return layers


def unet_layers(network: UNetModel) -> tuple[Layer, ...]:
    """Every cross-attention of a U-Net, in the order in which it runs them."""
    return tuple(_unet_layers(network))


def _unet_layers(network: UNetModel) -> Iterable[Layer]:
    parts = (
        ("input", network.input_blocks),
        ("middle", [network.middle_block] if network.middle_block is not None else []),
        ("output", network.output_blocks),
    )
    for part, blocks in parts:
        for number, block in enumerate(blocks):
            for transformer in block:
                if isinstance(transformer, SpatialTransformer):
                    for index, layer in enumerate(transformer.transformer_blocks):
                        if layer.disable_self_attn:
                            yield Layer("attn1", part, number, index)
                        if layer.attn2 is not None:
                            yield Layer("attn2", part, number, index)


def choose_layers(choice: str, blocks: str, layers: tuple[Layer, ...]) -> frozenset[Layer]:
    """The layers that a `layers` choice and, for "custom", a block list name.

    Raises:
        ValueError: unknown choice, empty list, malformed entry, or a block that this model does not have.
    """
    if choice == "all":
        return frozenset(layers)
    if choice == "down + up":
        return frozenset(layer for layer in layers if layer.part != "middle")
    if choice != "custom":
        raise ValueError(f"layers {choice!r} is unknown: choose one of {', '.join(LAYER_CHOICES)}.")
    entries = [entry.strip() for entry in blocks.split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"layers is custom but blocks is empty. {describe_blocks(layers)}")
    return frozenset().union(*(_parse_entry(entry, layers) for entry in entries))


def _parse_entry(entry: str, layers: tuple[Layer, ...]) -> frozenset[Layer]:
    """`d2`, `d0-2`, `d2.4`, `d2.2-9`: the spelling of sd-perturbed-attention's block lists."""
    match = ENTRY.fullmatch(entry.lower())
    if match is None:
        raise ValueError(
            f"blocks: {entry!r} is not a block. Write d, m or u, a number, and optionally a dot and a layer, with "
            f"ranges as 2-9: d2.2-9,m0,u0.4. {describe_blocks(layers)}"
        )
    prefix, first, last, first_index, last_index = match.groups()
    by_number = _group(PREFIXES[prefix], layers)
    chosen: set[Layer] = set()
    for ordinal in _span(entry, first, last, len(by_number), f"no block {prefix}{{}}", layers):
        depth = max(layer.index for layer in by_number[ordinal]) + 1
        if first_index is None:
            chosen.update(by_number[ordinal])
            continue
        indices = _span(entry, first_index, last_index, depth, f"no layer {{}} in block {prefix}{ordinal}", layers)
        chosen.update(layer for layer in by_number[ordinal] if layer.index in indices)
    return frozenset(chosen)


def _span(entry: str, first: str, last: str | None, count: int, missing: str, layers: tuple[Layer, ...]) -> range:
    start, stop = int(first), int(first if last is None else last)
    if start > stop:
        raise ValueError(f"blocks: the range in {entry!r} runs backwards: write {stop}-{start}.")
    if stop >= count:
        raise ValueError(f"blocks: {entry!r}: this model has {missing.format(stop)}. {describe_blocks(layers)}")
    return range(start, stop + 1)


def _group(part: str, layers: tuple[Layer, ...]) -> list[list[Layer]]:
    """The layers of one part, by block; only blocks with text attention count, in the network's order."""
    by_number: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.part == part:
            by_number.setdefault(layer.number, []).append(layer)
    return list(by_number.values())


def describe_blocks(layers: tuple[Layer, ...]) -> str:
    """The blocks of a model in the spelling of the block list, for error messages."""
    names = []
    for prefix, part in PREFIXES.items():
        for ordinal, group in enumerate(_group(part, layers)):
            depth = max(layer.index for layer in group)
            names.append(f"{prefix}{ordinal}.0" + (f"-{depth}" if depth else ""))
    return f"This model has {', '.join(names)}."
