"""PLADIS beside torch.compile (ComfyUI's TorchCompileModel node and packs that compile the network themselves).

The host freezes attention hooks at the first trace: it drops every guard on transformer_options
(comfy_extras/nodes_torch_compile.py), so a compiled model goes on calling the hooks that it was traced with. So a U-Net
with PLADIS runs code of its own, compiled with the same arguments: its trace has, in every text layer's slot, one
opaque operator that knows only its layer, and that operator looks up what this model call wants there when it runs. The
code without PLADIS, and every other model's, stays as it is. Transformers, and networks that a pack compiled in a way
of its own, run without their compiled code where PLADIS is on.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import library, nn

from ..batch import Batch
from ..models.layers import Layer
from ..models.target import Target
from ..running import ModelCall, current_call, running
from .unet import dense_attention, dense_in, with_hooks

# comfy_api/torch_helpers/torch_compile.py, COMPILE_KEY and TORCH_COMPILE_KWARGS
COMPILE_KEY = "torch.compile"
COMPILE_ARGUMENTS = "torch_compile_kwargs"
LOGGER = logging.getLogger(__name__)


def compiles(transformer_options: Mapping[str, Any], network: nn.Module) -> bool:
    """Whether a model's network runs compiled: by TorchCompileModel, or under a pack's object patch."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return COMPILE_KEY in wrappers or hasattr(network, "_orig_mod")


def without_compiling(
    executor: WrapperExecutor, target: Target, transformer_options: Mapping[str, Any]
) -> WrapperExecutor:
    """The rest of this model call, with the network itself, for this call alone: no other thread or model notices."""
    _warn_of_no_compiling(type(target.network()).__name__)
    return _with_network(executor, target.network(), transformer_options)


@cache
def _warn_of_no_compiling(network: str) -> None:
    LOGGER.warning("PLADIS: %s runs without torch.compile in the steps in which PLADIS is on.", network)


def _with_network(
    executor: WrapperExecutor, network: Callable, transformer_options: Mapping[str, Any]
) -> WrapperExecutor:
    """The wrappers that are left of an APPLY_MODEL call but torch.compile's, on a view of the model with `network`."""
    view = copy.copy(executor.class_obj)
    # the copy shares everything but which module its network is
    view._modules = {**view._modules, "diffusion_model": network}
    compiling = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY, ())
    left = [wrapper for wrapper in executor.wrappers[executor.idx + 1 :] if wrapper not in compiling]
    # an executor calls the wrapper behind its own place
    return WrapperExecutor(types.MethodType(executor.original.__func__, view), view, [None, *left], 0)


def warn_of_frozen_settings(model_options: Mapping[str, Any]) -> None:
    """A CUDA graph replays kernels, not Python: nothing looks up changed settings."""
    arguments = model_options.get(COMPILE_ARGUMENTS) or {}
    if arguments.get("backend") == "cudagraphs" or arguments.get("mode") in ("reduce-overhead", "max-autotune"):
        _warn_of_cuda_graphs()


@cache
def _warn_of_cuda_graphs() -> None:
    LOGGER.warning(
        "PLADIS: CUDA graphs (torch.compile with backend cudagraphs, or a mode that uses them) freeze the settings of "
        "Apply PLADIS at their first run. Use backend inductor in its default mode to change them."
    )


def run_unet(
    call: ModelCall | None, target: Target, arguments: Mapping[str, Any], options: dict[str, Any], executor, run
):
    """One model call of a compiled U-Net, whose text layers do what this call wants in their slots."""
    hooks = with_hooks(options, call, list(call.active)) if call is not None else options
    slots = hooks.get("patches_replace", {})
    wanted = call or ModelCall(target, {}, Batch(0, 0), {}, options)
    wanted.slots = slots
    placed = {slot: dict(hooks_there) for slot, hooks_there in slots.items()}
    for layer in target.layers:
        placed.setdefault(layer.slot, {})[layer.key] = CompiledSlot(layer)
    with running(wanted):
        code = _code_with_pladis(target.network(), arguments)
        out = run(_with_network(executor, code, options), {**hooks, "patches_replace": placed})
    if call is not None:
        call.ran.update(call.reached)
    return out


@dataclass(frozen=True)
class CompiledSlot:
    """What the trace sees in the slot of `layer`."""

    layer: Layer

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        return replaced_attention(
            q, k, v, *self.layer[:4], extra_options["n_heads"], extra_options["dim_head"],
            extra_options.get("attn_precision"), list(extra_options["activations_shape"]),
        )  # fmt: skip


@library.custom_op("pladis::replaced_attention", mutates_args=())
def replaced_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: str, part: str, number: int, index: int, n_heads: int,
    dim_head: int, attn_precision: torch.dtype | None, activations_shape: list[int],
) -> torch.Tensor:  # fmt: skip
    """q (B, Lq, H * D), k and v (B, Lk, H * D) -> (B, Lq, H * D), by the hook that the running call has for the layer.

    Without one, the attention that the host would have computed.
    """
    call = current_call()
    slots = {} if call is None else call.slots.get(slot, {})
    options = {} if call is None else call.options
    hook = slots.get((part, number, index), slots.get((part, number)))
    if hook is None:
        hook = dense_attention if call is None else dense_in(call.target, Layer(slot, part, number, index))
    plain = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
    extra_options = {
        **plain, "block": (part, number), "block_index": index, "n_heads": n_heads, "dim_head": dim_head,
        "attn_precision": attn_precision, "activations_shape": activations_shape,
    }  # fmt: skip
    return hook(q, k, v, extra_options).contiguous()


@replaced_attention.register_fake
def _shape_of_replaced_attention(q, k, v, *_):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _code_with_pladis(network: nn.Module, arguments: Mapping[str, Any]) -> Callable:
    """The network compiled as the host compiled it, apart from the host's code.

    The compiler keeps code by backend and by what is guarded, and the same backend under another name is another
    backend. So this costs a compilation once, and holds no network.
    """
    options = {key: value for key, value in (arguments.get("options") or {}).items() if key != "guard_filter_fn"}
    name, mode = arguments.get("backend") or "inductor", arguments.get("mode")
    key = repr((name, mode, sorted(options.items())))
    if key not in _backends:
        _backends[key] = _backend(name, mode, options)
    backend = _backends[key]
    return torch.compile(
        network, backend=backend, fullgraph=bool(arguments.get("fullgraph")), dynamic=arguments.get("dynamic"),
        options={"guard_filter_fn": _skip_transformer_options},
    )  # fmt: skip


def _skip_transformer_options(guards) -> list[bool]:
    """As the host does (comfy_extras/nodes_torch_compile.py)."""
    return ["transformer_options" not in guard.name for guard in guards]


# by the arguments that they were made for
_backends: dict[str, Callable] = {}


def _backend(name: Any, mode: str | None, options: dict[str, Any]) -> Callable:
    """A backend that compiles as the one called `name`."""
    if name == "inductor":
        modes = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else {}
        compile_graph = partial(torch._inductor.compile, options={**modes, **options})
    else:
        compile_graph = partial(torch._dynamo.lookup_backend(name), **({"options": options} if options else {}))

    def with_pladis(graph, inputs, **_):
        return compile_graph(graph, inputs)

    return with_pladis
