"""What a module's forward is handed, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

OPTIONS = "transformer_options"


@lru_cache(maxsize=512)
def _positions(forward) -> dict[str, int]:
    """Where each named parameter stands behind self."""
    named = [name for name, p in inspect.signature(forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {name: index for index, name in enumerate(named[1:])}


@lru_cache(maxsize=512)
def _takes_any(forward) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


@dataclass(frozen=True)
class Handed:
    """The arguments of one call of `module`."""

    module: torch.nn.Module
    args: tuple
    kwargs: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """The argument, or None where it was not given."""
        index = _positions(type(self.module).forward).get(name, len(self.args))
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    def takes(self, name: str) -> bool:
        """Whether it may be given."""
        return name in self.kwargs or name in _positions(type(self.module).forward)

    def uses(self, name: str) -> bool:
        """Whether the class of the module has a parameter for it."""
        forward = type(self.module).forward
        return name in _positions(forward) or (name in self.kwargs and _takes_any(forward))

    def tokens(self, name: str) -> int | None:
        """The length of a (B, L, C) argument."""
        tensor = self.get(name)
        return tensor.shape[1] if isinstance(tensor, torch.Tensor) and tensor.ndim == 3 else None

    @property
    def rows(self) -> int:
        """The batch of the first tensor."""
        return next(t.shape[0] for t in (*self.args, *self.kwargs.values()) if isinstance(t, torch.Tensor))

    @property
    def options(self) -> dict[str, Any]:
        """transformer_options; empty where they were not passed on."""
        return self.get(OPTIONS) or {}

    def with_options(self, options: dict[str, Any]) -> Handed:
        """The same call with these transformer_options."""
        index = _positions(type(self.module).forward).get(OPTIONS, len(self.args))
        if index < len(self.args):
            return replace(self, args=(*self.args[:index], options, *self.args[index + 1 :]))
        return replace(self, kwargs={**self.kwargs, OPTIONS: options})
