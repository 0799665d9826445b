"""How ComfyUI 0.38 calls attention, on any ComfyUI: tensors in containers, and kernels that modules prefer.

On a ComfyUI that does so itself, nothing is changed. Elsewhere the methods that call attention are given other globals,
in which `optimized_attention` is a call as 0.38 makes it, and the host's function is wrapped as 0.38 wraps it.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType

import comfy.ldm.modules.attention as host_attention
import torch

OVERRIDE = "optimized_attention_override"
FUNCTIONS = ("optimized_attention", "optimized_attention_masked")
IS_NEWER = hasattr(host_attention, "ComfyAttention")
# ComfyUI 0.20.0 has none: there tensors stay as they are
Container = getattr(host_attention, "AttentionTensorContainer", lambda tensor: tensor)


class Preference(torch.nn.Module):
    """ComfyAttention (comfy/ldm/modules/attention.py): `function` is the preferred kernel, or None."""

    function: Callable | None = None


def call_as_newer_hosts_do(network: torch.nn.Module, monkeypatch) -> None:
    """For every class of the network's Python modules that calls the host's attention."""
    if IS_NEWER:
        return
    monkeypatch.setattr(host_attention, "ComfyAttention", Preference, raising=False)
    written_in = {type(module).__module__ for module in network.modules()}
    for name in sorted(name for name in written_in if name.startswith("comfy.ldm.")):
        module = importlib.import_module(name)
        for function in FUNCTIONS:
            if function in vars(module):
                monkeypatch.setattr(module, function, _wrapped(vars(module)[function]))
        for kind in [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == name]:
            for method, code in list(vars(kind).items()):
                if isinstance(code, FunctionType) and set(FUNCTIONS) & set(code.__code__.co_names):
                    monkeypatch.setattr(kind, method, _calling(module, code))
                    for caller in [m for m in network.modules() if isinstance(m, kind)]:
                        caller.comfy_attention = Preference()


def _wrapped(function: Callable) -> Callable:
    """wrap_attn: a preference is asked where there is no override."""

    def attention(*args, preferred_attention=None, **kwargs):
        overridden = OVERRIDE in (kwargs.get("transformer_options") or {})
        preferred = preferred_attention and preferred_attention.function
        if preferred is None or overridden or "_inside_attn_wrapper" in kwargs:
            return function(*args, **kwargs)
        return preferred(*args, _inside_attn_wrapper=True, **kwargs)

    return attention


def _calling(module: ModuleType, method: FunctionType) -> Callable:
    here = threading.local()

    def newer_call(function: str) -> Callable:
        def call(q, k, v, *args, **kwargs):
            tensors = (Container(t) for t in (q, k, v))
            preferred = here.callers[-1].comfy_attention
            return vars(module)[function](*tensors, *args, preferred_attention=preferred, **kwargs)

        return call

    others = {**vars(module), **{name: newer_call(name) for name in FUNCTIONS}}
    newer = FunctionType(method.__code__, others, method.__name__, method.__defaults__, method.__closure__)
    newer.__kwdefaults__ = method.__kwdefaults__

    def forward(self, *args, **kwargs):
        callers = here.__dict__.setdefault("callers", [])
        callers.append(self)
        try:
            return newer(self, *args, **kwargs)
        finally:
            callers.pop()

    forward.__signature__ = inspect.signature(method)
    return forward


class Kernels:
    """Gives every attention module of a network a kernel of its own, and notes which one ran, in order."""

    def __init__(self, network: torch.nn.Module, only: Callable[[str], bool] = lambda path: True, factor: float = 1.0):
        self.ran: list[str] = []
        self.got: list[tuple] = []
        self._factor = factor
        self.preferences = {p: m for p, m in network.named_modules() if isinstance(m, host_attention.ComfyAttention)}
        for path, preference in self.preferences.items():
            preference.function = self._kernel(path) if only(path) else None

    def _kernel(self, path: str) -> Callable:
        def kernel(*args, **kwargs):
            self.ran.append(path)
            self.got.append(tuple(type(arg) for arg in args[:3]))
            return host_attention.optimized_attention(*args, **kwargs) * self._factor

        return kernel

    def during(self, run: Callable) -> list[str]:
        """What ran in `run()`."""
        self.ran.clear()
        self.got.clear()
        run()
        return list(self.ran)
