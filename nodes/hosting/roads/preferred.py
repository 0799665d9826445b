"""Attention kernels that a checkpoint prefers for its modules (ComfyAttention, comfy/ldm/modules/attention.py).

The host asks a module's preference only where the options hold no override (wrap_attn). So a text module that has one
gets no override from us: for the time that it runs we stand in the preference's place, and the preferred kernel
computes the dense part. Older hosts have no such modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

from comfy.ldm.modules import attention as host_attention
from torch import nn

from ..running import Diversion

# by module: where in it preferences are. The host puts another one there for a LoRA that brings its own
_paths: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
_diversions: WeakKeyDictionary[nn.Module, Diversion] = WeakKeyDictionary()


def preferences(module: nn.Module) -> list[nn.Module]:
    """Those of the attention calls inside a module, kernels in `function`; empty where none of them names one."""
    kind = getattr(host_attention, "ComfyAttention", None)
    if kind is None:
        return []
    if module not in _paths:
        _paths[module] = tuple(path for path, m in module.named_modules() if isinstance(m, kind))
    found = [module.get_submodule(path) for path in _paths[module]]
    return found if any(preference.function is not None for preference in found) else []


def divert_preference(preference: nn.Module, override: Callable) -> Callable[[], None]:
    """This thread's calls with this preference go to `override`; what undoes it."""
    if preference not in _diversions:
        _diversions[preference] = Diversion(preference, "function", host_attention.optimized_attention)
    diverted = _diversions[preference]
    diverted.enter(partial(override, diverted="preference"))
    return diverted.leave


def preferred_by(attention: nn.Module | None) -> dict[str, nn.Module]:
    """What a call of the host's attention in this module's place must be handed, so that its preference is kept."""
    found = [] if attention is None else preferences(attention)
    return {"preferred_attention": found[0]} if found else {}
