"""Records every attention call of one evaluation of a network: who makes it, with what, and whether a hook sees it.

The trace needs no knowledge of the model, so it can check what the pack claims to know of one: which columns of the
keys are text, and which rows of the queries are image, shows in what changes with the prompt, and what with the noise.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.patcher_extension
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

OPTIONS = (
    "attn_precision", "enable_gqa", "low_precision_attention", "scale", "skip_output_reshape", "skip_reshape",
)  # fmt: skip
BLOCK = ("block", "block_type", "block_index", "total_blocks", "img_slice", "grid_sizes", "reference_image_num_tokens")


# what attention functions the host has, and the one that some of its modules call directly
ATTENTION = frozenset(
    name for name in vars(host_attention) if name.startswith(("optimized_attention", "attention_"))
) - {"optimized_attention_for_device"}
PLAIN = torch.nn.functional.scaled_dot_product_attention


@dataclass
class AttentionCall:
    """`module` is the path below the diffusion model, `site` the line of the host that calls `function`.

    `reached`: the call went through transformer_options["optimized_attention_override"]. `options` holds what else the
    call was given, `block` what transformer_options told about its place.
    """

    module: str
    site: str
    function: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    mask: torch.Tensor | None
    options: dict[str, Any]
    block: dict[str, Any]
    reached: bool = False

    def tokens(self, name: str) -> torch.Tensor:
        """q, k or v as (batch, tokens, channels), whatever its layout."""
        tensor = getattr(self, name)
        return tensor.transpose(1, 2).flatten(2) if tensor.ndim == 4 else tensor

    @property
    def q_length(self) -> int:
        return self.q.shape[-2]

    @property
    def k_length(self) -> int:
        return self.k.shape[-2]

    def weights(self) -> torch.Tensor:
        """Softmax weights (batch, heads, q_length, k_length)."""
        q, k = (t if t.ndim == 4 else t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q, self.k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = q @ k.mT * (self.options.get("scale") or q.shape[-1] ** -0.5)
        return (scores if self.mask is None else scores + additive(self.mask)).softmax(-1)


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A mask as the host reads it, broadcastable to (batch, heads, q_length, k_length)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.unsqueeze(-3) if mask.ndim == 3 else mask


@dataclass
class Trace:
    """One model call: what apply_model was given, and the attention calls that followed."""

    arguments: dict[str, Any] = field(default_factory=dict)
    calls: list[AttentionCall] = field(default_factory=list)


class Tracer:
    """Attach to a model; every evaluation appends a Trace."""

    def __init__(self):
        self.evaluations: list[Trace] = []
        self._modules: list[str] = []
        self._open: list[AttentionCall] = []

    def attach(self, model):
        model = model.clone()
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        model.add_wrapper_with_key(kind, "trace", self._apply_model)
        return model

    def _apply_model(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, options=None, **extra):
        self.evaluations.append(Trace({"x": x, "c_concat": c_concat, "c_crossattn": c_crossattn, **extra}))
        options = options or {}
        override = functools.partial(self._override, options.get("optimized_attention_override"))
        options = {**options, "optimized_attention_override": override}
        names = {id(module): name for name, module in executor.class_obj.diffusion_model.named_modules()}
        with self._module_names(names), self._recorded_functions():
            return executor(x, t, c_concat, c_crossattn, control, options, **extra)

    def _override(self, resident, function, *args, **kwargs):
        self._open[-1].reached = True
        return resident(function, *args, **kwargs) if resident else function(*args, **kwargs)

    @contextlib.contextmanager
    def _module_names(self, names: dict[int, str]) -> Iterator[None]:
        def enter(module, args):
            if id(module) in names:
                self._modules.append(names[id(module)])

        def leave(module, args, output):
            if id(module) in names:
                self._modules.pop()

        handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _recorded_functions(self) -> Iterator[None]:
        """Host files bind the functions by name when they are imported, so every binding is replaced."""
        functions = {f for name, f in vars(host_attention).items() if name in ATTENTION and callable(f)}
        places = [m for name, m in sys.modules.items() if name.startswith("comfy.ldm.")]
        bindings = [
            (module, name, value)
            for module in places
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value in functions
        ]
        bindings.append((torch.nn.functional, "scaled_dot_product_attention", PLAIN))
        for module, name, function in bindings:
            setattr(module, name, self._recorded(name, function))
        try:
            yield
        finally:
            for module, name, function in bindings:
                setattr(module, name, function)

    def _recorded(self, name: str, function: Callable) -> Callable:
        def record(q, k, v, *args, **kwargs):
            if self._open:
                return function(q, k, v, *args, **kwargs)
            call = self._describe(name, sys._getframe(1), q, k, v, args, kwargs)
            self.evaluations[-1].calls.append(call)
            self._open.append(call)
            try:
                return function(q, k, v, *args, **kwargs)
            finally:
                self._open.pop()

        return record

    def _describe(self, name, frame, q, k, v, args, kwargs) -> AttentionCall:
        given = dict(kwargs)
        if name == "scaled_dot_product_attention":
            heads, mask = q.shape[1], args[0] if args else kwargs.get("attn_mask")
        else:
            given.update(zip(("heads", "mask", "attn_precision", "skip_reshape"), args, strict=False))
            heads, mask = given["heads"], given.get("mask")
        options = {key: given[key] for key in OPTIONS if given.get(key) is not None}
        transformer_options = kwargs.get("transformer_options") or {}
        block = {key: transformer_options[key] for key in BLOCK if key in transformer_options}
        while "comfy/ldm" not in (file := Path(frame.f_code.co_filename).as_posix()) and frame.f_back is not None:
            frame = frame.f_back
        site = f"{file.rpartition('comfy/')[2]}:{frame.f_lineno}"
        # comfy.ldm.modules.attention.AttentionTensorContainer: a tensor that the host frees as soon as it can
        tensors = (tensor.peek() if hasattr(tensor, "peek") else tensor for tensor in (q, k, v, mask))
        q, k, v, mask = (None if tensor is None else tensor.clone() for tensor in tensors)
        module = self._modules[-1] if self._modules else ""
        return AttentionCall(module, site, name, q, k, v, heads, mask, options, block)


def changed(a: AttentionCall, b: AttentionCall, name: str) -> list[int]:
    """The tokens of q, k or v ("q", ...) that differ between two evaluations' same call."""
    difference = (a.tokens(name) - b.tokens(name)).abs().amax((0, 2))
    return difference.nonzero().flatten().tolist()


def spans(tokens: list[int]) -> str:
    """`0:5 7:11` for the tokens 0 to 4 and 7 to 10."""
    starts = [t for t in tokens if t - 1 not in tokens]
    stops = [t + 1 for t in tokens if t + 1 not in tokens]
    return " ".join(f"{start}:{stop}" for start, stop in zip(starts, stops, strict=True))
