"""Run in ComfyUI's Python by test_blocks.py: what the host side makes of block lists, as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [os.environ["COMFYUI_PATH"], str(TESTS), str(TESTS / "host")]
texts, sys.argv = json.load(sys.stdin), ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import conftest  # noqa: E402, F401

import tiny  # noqa: E402
from pladis_pack.nodes.hosting import block_names, choose_layers, find_target  # noqa: E402
from pladis_pack.nodes.hosting.demo_model import load_demo_model  # noqa: E402
from pladis_pack.nodes.hosting.models.layers import PREFIXES, Layer  # noqa: E402


def transformer(*depths: int) -> tuple[Layer, ...]:
    """What a list of blocks sees of a transformer."""
    return tuple(Layer("module", "block", n, i, f"{n}.{i}") for n, depth in enumerate(depths) for i in range(depth))


def outcome(text: str, layers: tuple[Layer, ...]) -> dict:
    numbers = {part: sorted({layer.number for layer in layers if layer.part == part}) for part in PREFIXES.values()}
    prefixes = {part: prefix for prefix, part in PREFIXES.items()}
    try:
        chosen = choose_layers("custom", text, layers)
    except ValueError as error:
        return {"error": str(error)}
    return {"chosen": sorted({f"{prefixes[c.part]}{numbers[c.part].index(c.number)}.{c.index}" for c in chosen})}


LAYERS = {
    "SD 1.x": find_target(tiny.patcher("SD15")).layers,
    "SDXL": find_target(tiny.patcher("SDXL")).layers,
    "the demo model": find_target(load_demo_model("unet")[0]).layers,
    "alike": transformer(2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2),
    "not alike": transformer(1, 1, 2, 3),
    "single": transformer(1),
}
print(json.dumps({
    name: {"blocks": block_names(layers), "outcomes": [outcome(text, layers) for text in texts]}
    for name, layers in LAYERS.items()
}))  # fmt: skip
