"""Runs a node of the host or of another pack as a graph does: inputs by name, the rest at their defaults."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel


def find_node(module: str, name: str) -> type:
    """Skips the test where this ComfyUI lacks the node."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError):
        pytest.skip(f"this ComfyUI has no node {module}.{name}")


def run_class(node: type, **inputs: Any) -> Any:
    """The first output of a node class, of either of the host's two kinds."""
    for name, (kind, *options) in node.INPUT_TYPES().get("required", {}).items():
        widget = options[0] if options else {}
        choices = kind if isinstance(kind, list) else widget.get("options")
        if name not in inputs and ("default" in widget or choices):
            inputs[name] = widget["default"] if "default" in widget else choices[0]
    outputs = node.execute(**inputs) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(**inputs)
    return getattr(outputs, "result", outputs)[0]


def run_node(module: str, name: str, **inputs: Any) -> Any:
    return run_class(find_node(module, name), **inputs)


class Rows:
    """The rows of every evaluation of a U-Net, inside whatever wraps it (a cache may skip some)."""

    def __init__(self, monkeypatch):
        self.seen: list[int] = []
        original = UNetModel._forward

        def record(network, x, *args, **kwargs):
            self.seen.append(x.shape[0])
            return original(network, x, *args, **kwargs)

        monkeypatch.setattr(UNetModel, "_forward", record)

    def of(self, sample) -> tuple[torch.Tensor, list[int]]:
        self.seen.clear()
        # some patches draw numbers of their own
        torch.manual_seed(0)
        return sample(), list(self.seen)
