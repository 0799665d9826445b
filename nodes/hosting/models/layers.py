"""Which attention layers of a model read the text, and how a person names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from ..lists import entries, shortened
from .families import UNET, Family

LAYER_CHOICES = ("all", "down + up", "custom")
PREFIXES = {"d": "input", "m": "middle", "u": "output", "b": "block"}
# no model has as many blocks as four digits count
ENTRY = re.compile(r"([dmub])(\d{1,4})(?:-\1?(\d{1,4}))?(?:\.(\d{1,4})(?:-(\d{1,4}))?)?", re.ASCII)


class Layer(NamedTuple):
    """One text attention.

    In a U-Net by the key under which the host looks up its replacement hook: `slot` is "attn2", or "attn1" where that
    is cross-attention too; the rest is (part, number, index) of `BasicTransformerBlock`
    (comfy/ldm/modules/attention.py, `transformer_block`). In a transformer by the `path` of its module; part is
    "block", number the block's among those with text attention, in the network's order.
    """

    slot: str
    part: str
    number: int
    index: int
    path: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return self[1:4]


# all that is known of a network that is not in the table
BY_SHAPE = Layer("by shape", "block", 0, 0)


class Found(NamedTuple):
    """A text attention, the module that makes it, and the block that it is in (the same, or one around it)."""

    layer: Layer
    module: nn.Module
    block: nn.Module


def family_layers(network: nn.Module, family: Family) -> Iterable[Found]:
    """Every text attention of a network, in the order in which the network runs them."""
    return _unet_layers(network) if family.kind == UNET else _module_layers(network, family)


def _module_layers(network: nn.Module, family: Family) -> Iterable[Found]:
    """The modules that the family names; those under one numbered module are one block."""
    patterns = [re.compile(re.escape(m).replace(r"\*", r"(\d+)")) for m in family.modules]
    modules = dict(_named_modules(network))
    found = [
        (order, path[: match.end(match.lastindex)], path, module)
        for path, module in modules.items()
        for order, pattern in enumerate(patterns)
        if (match := pattern.fullmatch(path))
    ]
    containers = [pattern.partition("*")[0] for pattern in family.modules]
    # stable: blocks of one container stay in the network's order
    found.sort(key=lambda entry: containers.index(containers[entry[0]]))
    numbers: dict[str, int] = {}
    depths: dict[str, int] = {}
    for _, block, path, module in found:
        depth = depths[block] = depths.get(block, -1) + 1
        layer = Layer("module", "block", numbers.setdefault(block, len(numbers)), depth, path)
        yield Found(layer, module, modules[block])


def _named_modules(network: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Their paths as without torch.compile, which puts blocks that it compiles alone under `_orig_mod`."""
    for path, module in network.named_modules():
        if not hasattr(module, "_orig_mod"):
            yield path.replace("._orig_mod", ""), module


def _unet_layers(network: nn.Module) -> Iterable[Found]:
    parts = (
        ("input", network.input_blocks),
        ("middle", [network.middle_block] if network.middle_block is not None else []),
        ("output", network.output_blocks),
    )
    for part, blocks in parts:
        for number, block in enumerate(blocks):
            for transformer in block:
                # SpatialTransformer, whatever class other packs make of it
                for index, layer in enumerate(getattr(transformer, "transformer_blocks", ())):
                    if layer.disable_self_attn:
                        yield Found(Layer("attn1", part, number, index), layer, layer)
                    if layer.attn2 is not None:
                        yield Found(Layer("attn2", part, number, index), layer, layer)


def choose_layers(choice: str, blocks: str, layers: tuple[Layer, ...]) -> frozenset[Layer]:
    """The layers that a `layers` choice and, for "custom", a block list name.

    Raises:
        ValueError: unknown choice, empty list, malformed entry, or a block that this model does not have.
    """
    if choice == "all":
        return frozenset(layers)
    if choice == "down + up":
        if any(layer.part == "block" for layer in layers):
            raise ValueError(
                "layers is down + up, which only U-Nets have: this model is a transformer. Choose all, or custom with "
                f"a list of blocks. {describe_blocks(layers)}"
            )
        return frozenset(layer for layer in layers if layer.part != "middle")
    if choice != "custom":
        raise ValueError(f"layers {choice!r} is unknown: choose one of {', '.join(LAYER_CHOICES)}.")
    named = entries(blocks)
    if not named:
        raise ValueError(f"layers is custom but blocks is empty. {describe_blocks(layers)}")
    return frozenset().union(*(_parse_entry(entry, layers) for entry in named))


def _parse_entry(entry: str, layers: tuple[Layer, ...]) -> frozenset[Layer]:
    """`d2`, `d0-2`, `d2.4`, `d2.2-9`: the spelling of sd-perturbed-attention's block lists; `b0-11` in transformers."""
    match = ENTRY.fullmatch(entry.lower())
    if match is None:
        raise ValueError(
            f"blocks: {shortened(entry)!r} is not a block. Write d, m or u (in a transformer b), a number, and "
            f"optionally a dot and a layer, with ranges as 2-9: d2.2-9,m0,u0.4. {describe_blocks(layers)}"
        )
    prefix, first, last, first_index, last_index = match.groups()
    by_number = _group(PREFIXES[prefix], layers)
    chosen: set[Layer] = set()
    for ordinal in _range(entry, first, last, len(by_number), f"no block {prefix}{{}}", layers):
        depth = max(layer.index for layer in by_number[ordinal]) + 1
        if first_index is None:
            chosen.update(by_number[ordinal])
            continue
        indices = _range(entry, first_index, last_index, depth, f"no layer {{}} in block {prefix}{ordinal}", layers)
        chosen.update(layer for layer in by_number[ordinal] if layer.index in indices)
    return frozenset(chosen)


def _range(entry: str, first: str, last: str | None, count: int, missing: str, layers: tuple[Layer, ...]) -> range:
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


def block_names(layers: tuple[Layer, ...]) -> list[str]:
    """The blocks of a model in the spelling of the block list."""
    names = []
    for prefix, part in PREFIXES.items():
        depths = [max(layer.index for layer in group) for group in _group(part, layers)]
        if prefix == "b" and len(set(depths)) == 1:
            # the blocks of a transformer are many and alike
            names.append(f"b0-{len(depths) - 1}" + (f".0-{depths[0]}" if depths[0] else ""))
            continue
        for ordinal, depth in enumerate(depths):
            names.append(f"{prefix}{ordinal}.0" + (f"-{depth}" if depth else ""))
    return names


def describe_blocks(layers: tuple[Layer, ...]) -> str:
    """For error messages."""
    return f"This model has {', '.join(block_names(layers))}."


def layer_names(layers: tuple[Layer, ...]) -> list[str]:
    """Each layer in the spelling of the block list."""
    prefixes = {part: prefix for prefix, part in PREFIXES.items()}
    ordinals: dict[str, dict[int, int]] = {}
    names = []
    for layer in layers:
        numbers = ordinals.setdefault(layer.part, {})
        ordinal = numbers.setdefault(layer.number, len(numbers))
        names.append(f"{prefixes[layer.part]}{ordinal}.{layer.index}" + (" (attn1)" if layer.slot == "attn1" else ""))
    return names
