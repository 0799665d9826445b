"""PLADIS inside torch.compile (ComfyUI's TorchCompileModel node).

The host freezes attention hooks at the first trace: it drops every guard on transformer_options
(comfy_extras/nodes_torch_compile.py), so a compiled model goes on calling the hooks that it was traced with. Here the
trace gets, in every text layer's slot, one opaque operator that knows only its layer, and that operator looks up what
this model call wants there when it runs. A model traced before PLADIS came into the graph has no such operator: then
the call visits none, and it is traced again. Transformers run without their compiled code where PLADIS is on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import library

from .hook import Hook, dense_attention
from .layers import Layer

# comfy_api/torch_helpers/torch_compile.py, COMPILE_KEY and TORCH_COMPILE_KWARGS
COMPILE_KEY = "torch.compile"
COMPILE_ARGUMENTS = "torch_compile_kwargs"
LOGGER = logging.getLogger(__name__)
CURRENT: ContextVar[RunningCall | None] = ContextVar("pladis_running_call", default=None)


@dataclass
class RunningCall:
    """What the operators of one model call look up. Lives as long as the call, in its thread."""

    hooks: dict[Layer, Hook]
    options: dict[str, Any]
    visits: int = 0


@dataclass(frozen=True)
class CompiledSlot:
    """What the trace sees in the slot of `layer`."""

    layer: Layer

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        return replaced_attention(
            q, k, v, *self.layer[:4], extra_options["n_heads"], extra_options["dim_head"],
            extra_options["attn_precision"], list(extra_options["activations_shape"]),
        )  # fmt: skip


@library.custom_op("pladis::replaced_attention", mutates_args=())
def replaced_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: str, part: str, number: int, index: int, n_heads: int,
    dim_head: int, attn_precision: torch.dtype | None, activations_shape: list[int],
) -> torch.Tensor:  # fmt: skip
    """q (B, Lq, H * D), k and v (B, Lk, H * D) -> (B, Lq, H * D), by the hook that the running call has for the layer.

    Without one, and for a trace that outlived its Apply node, the attention that the host would have computed.
    """
    call = CURRENT.get()
    hook = dense_attention
    options = {} if call is None else call.options
    if call is not None:
        call.visits += 1
        hook = call.hooks.get(Layer(slot, part, number, index), dense_attention)
    extra_options = {
        **options, "block": (part, number), "block_index": index, "n_heads": n_heads, "dim_head": dim_head,
        "attn_precision": attn_precision, "activations_shape": activations_shape,
    }  # fmt: skip
    return hook(q, k, v, extra_options).contiguous()


@replaced_attention.register_fake
def _shape_of_replaced_attention(q, k, v, *_):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@cache
def _warn_of_no_compiling(network: str) -> None:
    LOGGER.warning("PLADIS: %s runs without torch.compile in the steps in which PLADIS is on.", network)


def uncompiled(network: str):
    """A transformer's text attention is found while its modules run, which a compiled model does not let us see."""
    _warn_of_no_compiling(network)
    return torch.compiler.set_stance("force_eager")


def is_compiled(transformer_options: dict[str, Any]) -> bool:
    """Whether the model of this call runs under TorchCompileModel."""
    return COMPILE_KEY in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


def warn_of_frozen_settings(model_options: dict[str, Any]) -> None:
    """A CUDA graph replays kernels, not Python: nothing looks up changed settings."""
    if model_options.get(COMPILE_ARGUMENTS, {}).get("backend") == "cudagraphs":
        _warn_of_cuda_graphs()


@cache
def _warn_of_cuda_graphs() -> None:
    LOGGER.warning(
        "PLADIS: TorchCompileModel with backend cudagraphs freezes the settings of Apply PLADIS at its first run. "
        "Use backend inductor to change them."
    )


def run_compiled(
    run: Callable[[dict[str, Any]], torch.Tensor], installed: dict[str, Any], layers: tuple[Layer, ...]
) -> torch.Tensor:
    """One model call, `run(options)`, whose text layers do what `installed` has in their slots.

    Raises:
        RuntimeError: the compiled model calls no replacement hook even when traced anew.
    """
    residents = installed.get("patches_replace", {})
    hooks = {}
    for layer in layers:
        slot = residents.get(layer.slot, {})
        hook = slot.get(layer.key, slot.get(layer.key[:2]))
        if hook is not None:
            hooks[layer] = hook
    plain = {key: value for key, value in installed.items() if key not in ("patches", "patches_replace")}
    call = RunningCall(hooks, plain)
    options = {**installed, "patches_replace": dict(residents)}
    for layer in layers:
        slot = options["patches_replace"].setdefault(layer.slot, {})
        options["patches_replace"][layer.slot] = {**slot, layer.key: CompiledSlot(layer)}
    token = CURRENT.set(call)
    try:
        out = run(options)
        if call.visits == 0:
            torch._dynamo.reset()
            out = run(options)
    finally:
        CURRENT.reset(token)
    if call.visits == 0:
        raise RuntimeError(
            "PLADIS: the compiled model does not call its attention hooks, so PLADIS cannot run. Remove the node that "
            "compiles it, or Apply PLADIS."
        )
    return out
