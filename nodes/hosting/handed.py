"""What a module's forward is handed, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

OPTIONS = "transformer_options"


@dataclass(frozen=True)
class Signature:
    """Where each named parameter of a forward stands, and whether it takes others by name."""

    positions: dict[str, int]
    takes_any: bool


@lru_cache(maxsize=512)
def _signature(forward, bound: bool) -> Signature:
    parameters = list(inspect.signature(forward).parameters.values())[0 if bound else 1 :]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return Signature({name: i for i, name in enumerate(named)}, any(p.kind is p.VAR_KEYWORD for p in parameters))


def _signature_of(module: torch.nn.Module) -> Signature:
    """Of the forward that will run: a pack may have put one on the module; one that takes anything hands it on."""
    of_class = _signature(type(module).forward, False)
    if "forward" not in vars(module):
        return of_class
    of_module = _signature(vars(module)["forward"], True)
    return of_class if of_module.takes_any and not of_module.positions else of_module


class Handed(NamedTuple):
    """The arguments of one call of `module`."""

    module: torch.nn.Module
    args: tuple
    kwargs: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """The argument, or None where it was not given."""
        index = _signature_of(self.module).positions.get(name, len(self.args))
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    def takes(self, name: str) -> bool:
        """Whether it may be given."""
        return name in self.kwargs or name in _signature_of(self.module).positions

    def uses(self, name: str) -> bool:
        """Whether the class of the module has a parameter for it, and not only what a pack put on the module."""
        of_class = _signature(type(self.module).forward, False)
        return name in of_class.positions or (name in self.kwargs and of_class.takes_any)

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
        index = _signature_of(self.module).positions.get(OPTIONS, len(self.args))
        if index < len(self.args):
            return self._replace(args=(*self.args[:index], options, *self.args[index + 1 :]))
        return self._replace(kwargs={**self.kwargs, OPTIONS: options})
