"""What outlives a line of a model call: which call runs in this thread, hooks on modules, functions that are diverted.

All of it is bound to its thread, or counted, or both, and undone on every way out: a network may run in several threads
at once, with and without PLADIS.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .batch import Batch
from .handed import Handed
from .models.families import UNET
from .models.layers import Layer
from .models.target import Target
from .settings import Settings

KEY = "pladis"
_here = threading.local()
_lock = threading.RLock()


@dataclass(eq=False)
class ModelCall:
    """One evaluation of a network with PLADIS: what its text modules need to know, and what became of them.

    `active` has the settings of this noise level for every layer that gets PLADIS. `arguments` are those of
    apply_model, `options` the transformer_options that the network gets. `watch` is called with what every text
    attention gets (looking/attention_map.py). `enter` is the road's: it gets the module's arguments and changes them.
    """

    target: Target
    active: dict[Layer, Settings]
    batch: Batch
    arguments: dict[str, Any]
    options: dict[str, Any]
    enter: Callable[[ModelCall, list[Layer], Handed], Handed] | None = None
    watch: Callable[..., Any] | None = None
    ran: set[Layer] = field(default_factory=set)
    reached: set[Layer] = field(default_factory=set)
    # what roads note: of a joint row where its text is, of a picture how many queries stand in front of it, what to
    # undo when the module that runs is left and when the call is over, what compiled code finds in its slots
    row: Any = None
    ahead: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)
    closing: list[Callable[[], None]] = field(default_factory=list)
    slots: dict[str, dict] = field(default_factory=dict)

    def lost_hooks(self) -> RuntimeError:
        """Another pack took a hook off that a module should have been left with."""
        self.leave()
        return RuntimeError(
            "PLADIS: another pack took the hooks of Apply PLADIS off this model while it ran. Remove that pack's node, "
            "or Apply PLADIS."
        )

    def leave(self) -> None:
        """The module that ran is done: what was diverted for it is back."""
        while self.undo:
            self.undo.pop()()

    def close(self) -> None:
        """The call is over: what was diverted for all of it is back."""
        while self.closing:
            self.closing.pop()()

    def __deepcopy__(self, memo) -> ModelCall:
        # other packs copy options that it is in
        return self

    def forget(self) -> None:
        """The call is over: tensors that it held are free at once, though hooks and options refer to each other."""
        self.arguments, self.options = {}, {}


def current_call() -> ModelCall | None:
    """The call that runs in this thread."""
    calls = getattr(_here, "calls", ())
    return calls[-1] if calls else None


# by network: the last call of a run that wants gradients, whose modules may be computed again when it is over
_kept: WeakKeyDictionary[nn.Module, ModelCall] = WeakKeyDictionary()


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """A model call of ours runs in this thread, whether PLADIS is on in it or not."""
    _here.depth = getattr(_here, "depth", 0) + 1
    try:
        yield
    finally:
        _here.depth -= 1


@contextlib.contextmanager
def evaluations(network: nn.Module, went_past: Callable[[], None]) -> Iterator[None]:
    """For the time of a run: `went_past` is told of evaluations of the network without a model call of ours."""
    thread = threading.get_ident()

    def look(module, args):
        if threading.get_ident() == thread and not getattr(_here, "depth", 0):
            went_past()

    handle = network.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def kept(call: ModelCall) -> Iterator[None]:
    """A backward pass that recomputes modules of the network does so for `call`, whatever thread it runs in."""
    network = call.target.network()
    _kept[network] = call
    try:
        yield
    finally:
        _kept.pop(network, None)


def in_backward() -> bool:
    """Whether this thread computes gradients, and modules perhaps again."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def running(call: ModelCall) -> Iterator[None]:
    """`call` runs in this thread."""
    calls = _here.__dict__.setdefault("calls", [])
    calls.append(call)
    try:
        yield
    finally:
        calls.pop()


# by network: how many calls want the hooks on its text modules, and their handles
_hooked: WeakKeyDictionary[nn.Module, tuple[int, list]] = WeakKeyDictionary()


@contextlib.contextmanager
def hooked(target: Target) -> Iterator[None]:
    """Hooks on the text modules of a network, which do nothing but for a call of ours. The last to leave removes them.

    They stay for the run, since a gradient recomputes modules after the call, perhaps in a thread of autograd. Where
    another pack has taken one off meanwhile, or put one of its own behind it, the next call puts all on again: ours see
    what a module gets last.
    """
    network = target.network()
    with _lock:
        count, handles = _hooked.get(network, (0, []))
        if not count or not all(map(_is_last, handles)):
            for handle in handles:
                handle.remove()
            handles = _put_on(target)
        _hooked[network] = (count + 1, handles)
    try:
        yield
    finally:
        with _lock:
            count, handles = _hooked.pop(network)
            if count > 1:
                _hooked[network] = (count - 1, handles)
            else:
                for handle in handles:
                    handle.remove()


def _is_last(handle: RemovableHandle) -> bool:
    return next(reversed(handle.hooks_dict_ref() or {}), None) == handle.id


def _put_on(target: Target) -> list[RemovableHandle]:
    handles = []
    for module, layers in target.modules().items():
        handles += _hook(target, module, layers)
    for block, layers in target.blocks_around().items():
        handles.append(_hook_block(target, block, layers))
    return handles


def _hook(target: Target, module: nn.Module, layers: list[Layer]) -> list:
    def enter(module, args, kwargs):
        handed = Handed(module, args, kwargs)
        call = _call_on(target, handed)
        mine = [layer for layer in layers if layer in call.active] if call is not None else []
        if not mine:
            return None
        call.ran.update(mine)
        entered = call.enter(call, mine, handed)
        return None if entered is handed else (entered.args, entered.kwargs)

    def leave(module, args, output):
        call = _call_on(target)
        if call is not None:
            call.leave()

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True)]
    if target.family is None or target.family.kind != UNET:
        # in a U-Net nothing is diverted for a module
        handles.append(module.register_forward_hook(leave, always_call=True))
    return handles


def _call_on(target: Target, handed: Handed | None = None) -> ModelCall | None:
    """The call that runs in this thread on this network; in a backward pass, the one that is computed again."""
    call = current_call()
    if call is None and in_backward():
        # the options say whose call it was, wherever they come along
        call = (handed and handed.options.get(KEY)) or _kept.get(target.network())
    return call if call is not None and call.target.network() is target.network() else None


def _hook_block(target: Target, block: nn.Module, layers: list[Layer]):
    """A block that runs without its text module is no step that a cache answered."""

    def enter(block, args):
        call = _call_on(target)
        if call is not None:
            call.ran.update(layer for layer in layers if layer in call.active)

    return block.register_forward_pre_hook(enter)


class Diversion:
    """A function in a Python module or in a network's, in whose place one of ours stands while a thread wants it.

    Ours acts in the threads that entered, and calls what stood there before; other threads notice nothing. `default`:
    what is meant where None stands there.
    """

    def __init__(self, place: ModuleType | nn.Module, name: str, default: Callable[..., Any] | None = None):
        # the one who keeps diversions by their place must not keep the place
        self._place, self._name, self._default = ref(place), name, default
        self._overrides: dict[int, Callable[..., Any]] = {}
        self._resident: Callable[..., Any] | None = None

    def enter(self, override: Callable[..., Any]) -> None:
        """Until `leave`, this thread's calls go to `override(function, *args, **kwargs)`."""
        with _lock:
            if not self._overrides:
                self._resident = getattr(self._place(), self._name)
                setattr(self._place(), self._name, self._function)
            self._overrides[threading.get_ident()] = override

    def leave(self) -> None:
        """Also where this thread did not enter, or left already."""
        with _lock:
            entered = self._overrides.pop(threading.get_ident(), None)
            if entered is not None and not self._overrides:
                setattr(self._place(), self._name, self._resident)

    def _function(self, *args, **kwargs):
        # taken before the look-up: the last thread to leave may be leaving
        resident = self._resident or self._default
        override = self._overrides.get(threading.get_ident())
        return resident(*args, **kwargs) if override is None else override(resident, *args, **kwargs)


class TorchDiversion(TorchFunctionMode):
    """torch.nn.functional's own attention, while a thread wants it: torch function modes are the thread's."""

    FUNCTION = torch.nn.functional.scaled_dot_product_attention

    def __init__(self, override: Callable[..., Any]):
        super().__init__()
        self._override = override

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is self.FUNCTION:
            return self._override(func, *args, **kwargs)
        return func(*args, **kwargs)


@cache
def _diversion(place: ModuleType, name: str) -> Diversion:
    return Diversion(place, name)


def diversion(module: str, name: str) -> Diversion:
    """Of the module that has this name now: a pack may be imported anew."""
    return _diversion(sys.modules.get(module) or importlib.import_module(module), name)
