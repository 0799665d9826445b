"""Which other pack an object comes from, and what a person can do where that pack keeps PLADIS out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

# keys of wrappers that only carry what others asked for: ours, and ComfyUI's torch.compile
HARMLESS = ("pladis", "torch.compile")
# in model_options (comfy/samplers.py), each a single place that a pack takes
SINGLE_PLACES = ("model_function_wrapper", "sampler_calc_cond_batch_function", "sampler_cfg_function")
# a word of a pack's name, in lower case: the way out that works
WAYS_OUT = {
    "nunchaku": "Its attention runs inside the nunchaku library, out of reach: load the model's fp8 or GGUF files "
                "with ComfyUI's own or the GGUF loader (nunchaku's Qwen-Image works).",
    "teacache": "Use ComfyUI's EasyCache node in its place: PLADIS works beside it.",
    "wavespeed": "Use ComfyUI's EasyCache node in its place: PLADIS works beside it.",
    "nag": "Use ComfyUI's Normalized Attention Guidance, or another NAG node that patches the MODEL, in place of its "
           "samplers.",
    "wanvideowrapper": "Use ComfyUI's own Wan nodes.",
    "nodes_sparse_attention": "On MiniMax H3, Model Sparse Attention computes all attention by itself: remove that "
                              "node, or Apply PLADIS.",
    "torch.compile": "Compile with ComfyUI's TorchCompileModel node, which PLADIS works beside.",
}  # fmt: skip


def pack_of(thing: Any) -> str:
    """The pack, or else the Python package, that made `thing`; empty for ComfyUI's and torch's own."""
    if hasattr(thing, "_orig_mod"):
        return "torch.compile"
    while isinstance(thing, functools.partial):
        thing = thing.func
    owner = getattr(thing, "__self__", None)
    source = type(owner) if owner is not None and not isinstance(owner, type) else thing
    if not isinstance(getattr(source, "__module__", None), str) or not hasattr(source, "__qualname__"):
        source = type(source)
    module = source.__module__
    # ComfyUI loads a pack under its folder's path (nodes.py, load_custom_node)
    path = module.replace("\\", "/").replace("_x_", ".")
    if "custom_nodes" in path:
        return path.partition("custom_nodes")[2].strip("/.").split("/")[0].split(".")[0]
    package = module.split(".")[0]
    if package in ("comfy", "torch", "builtins", "functools") or package.startswith("pladis"):
        return ""
    return module if package == "comfy_extras" else package


def advice(pack: str) -> str:
    """The way out for a pack that has one, else empty."""
    # not inside of words: "manager"
    names = re.compile("|".join(rf"(?<![a-z]){re.escape(name)}(?![a-z])" for name in WAYS_OUT))
    found = names.search(pack.lower())
    return WAYS_OUT[found[0]] if found else ""


def suspects(model, guider) -> list[str]:
    """Packs that took hold of a MODEL: by its wrappers, object patches, hooks in places, its network's class, or as the
    guider that samples it (comfy/samplers.py, CFGGuider; before a run the MODEL itself)."""
    model_options = guider.model_options
    options = model_options.get("transformer_options", {})
    things = [guider, *_wrappers(options.get("wrappers", {}))]
    things += [patch for key, patch in model.object_patches.items() if key.startswith("diffusion_model")]
    things += [model_options[key] for key in SINGLE_PLACES if model_options.get(key) is not None]
    for slot in options.get("patches_replace", {}).values():
        things += slot.values()
    network = model.model.diffusion_model
    things += [network, *(value for value in vars(network).values() if callable(value))]
    return list(dict.fromkeys(pack for thing in things if (pack := pack_of(thing))))


def _wrappers(kinds: Mapping[str, Mapping[str, list]]) -> Iterable[Any]:
    for keyed in kinds.values():
        for key, wrappers in keyed.items():
            if key not in HARMLESS:
                yield from wrappers
