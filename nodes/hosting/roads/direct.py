"""A way to attention that goes past transformer_options, so that no override reaches it.

While a text module of such a network runs, an override of ours stands in the place of the function that carries its
attention: the host's in a Python module that calls it without options, torch's, or xformers'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import FunctionType

import torch
from comfy.ldm.modules import attention as host_attention
from torch import nn

from ..handed import OPTIONS, Handed
from ..models.families import Diverted
from ..running import TorchDiversion, diversion


def divert(place: Diverted, override: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Diverts one function for this thread; what undoes it."""
    override = partial(override, diverted=place.calling)
    if place.calling == "torch":
        mode = TorchDiversion(override)
        mode.__enter__()
        return partial(mode.__exit__, None, None, None)
    diverted = diversion(place.module, place.name)
    diverted.enter(override)
    return diverted.leave


def diverted_functions(table: tuple[Diverted, ...], handed: Handed) -> tuple[Diverted, ...]:
    """The functions that carry a module's attention past its options: the `table`'s that are there; else, where the
    module takes no options, what it calls of the host's."""
    if not table and handed.uses(OPTIONS):
        return ()
    written_in = _written_in(handed.module)
    return _places_of(table, written_in) or (() if handed.uses(OPTIONS) else _found_in(written_in))


def _written_in(module: nn.Module) -> frozenset[str]:
    """The Python modules that the classes of a module and of what is in it come from."""
    return frozenset(type(m).__module__ for m in module.modules())


@lru_cache(maxsize=256)
def _places_of(table: tuple[Diverted, ...], written_in: frozenset[str]) -> tuple[Diverted, ...]:
    """The table's, by the Python modules' whole names; those that are not there are left out."""
    return tuple(place for diverted in table for place in _resolved(diverted, written_in))


def _resolved(diverted: Diverted, written_in: frozenset[str]) -> Iterator[Diverted]:
    name = diverted.module
    inside = next((m for m in written_in if m == name or m.endswith("." + name)), None)
    if inside is not None:
        yield diverted._replace(module=inside)
    elif diverted.calling != "host" and name.split(".")[0] in sys.modules:
        yield diverted


@lru_cache(maxsize=256)
def _found_in(written_in: frozenset[str]) -> tuple[Diverted, ...]:
    """The host's attention functions by the names under which these Python modules call them.

    For blocks that other packs put in the place of the host's, and that take no options. Helpers that they import
    (RES4LYF's chroma.math) count.
    """
    functions = {f for name, f in vars(host_attention).items() if name.startswith(("optimized_attention", "attention_"))
                 and isinstance(f, FunctionType)}  # fmt: skip
    spaces = {name: sys.modules[name] for name in written_in if not name.startswith("torch.") and name in sys.modules}
    for value in [value for space in spaces.values() for name, value in vars(space).items() if name == "attention"]:
        if isinstance(value, FunctionType) and value.__module__ in sys.modules:
            spaces.setdefault(value.__module__, sys.modules[value.__module__])
    return tuple(
        Diverted(module, name)
        for module, space in spaces.items()
        for name, value in vars(space).items()
        if isinstance(value, FunctionType) and value in functions and module != host_attention.__name__
    )
