"""How PLADIS gets into a model call: keyed wrappers on the MODEL, which take no hook slot before it.

At each model call APPLY_MODEL sees the final transformer_options, with the patches of nodes wired before and after. On
its own copy it puts what the network's road needs. Nothing is left behind when the call returns.

Down from the sampler: OUTER_SAMPLE opens the run's receipt, CALC_COND_BATCH reads the conditionings, APPLY_MODEL acts.
Each hands on to the next in one entry of transformer_options, and puts the next one back where another pack dropped it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...pladis_core import prepare
from .batch import Known, read_batch, read_conditioning, read_guider
from .models.families import UNET
from .models.target import Target
from .models.tokens import kinds_of
from .receipt import Applied, Receipt, show_on_node
from .roads import by_shape, compiled, transformer, unet
from .running import KEY, ModelCall, evaluations, hooked, inside, kept, running
from .settings import Settings
from .suspects import suspects

KINDS = (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)


def apply_settings(
    model, settings: Settings, target: Target, node: str | None = None, watch: Callable[..., Any] | None = None
):
    """A clone of MODEL with PLADIS. Settings of an earlier Apply node stay on the layers that these do not cover.

    `node`: the id of the node on which to report. `watch` is called with what every text attention gets.
    """
    model = model.clone()
    earlier = [a for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY) for a in wrapper.applied]
    rest = [replace(a, settings=a.settings.without(settings.layers)) for a in earlier]
    if node is None:
        # of Sweep or Attention Map, whose runs are not the earlier node's
        rest = [replace(a, node=None) for a in rest]
    # one that is replaced on all of its layers stays for its receipt
    everything = (*(a for a in rest if a.settings.layers or a.node is not None), Applied(settings, node))
    apply_model = ApplyModel(everything, target, watch)
    for kind, wrapper in zip(
        KINDS, (OuterSample(apply_model), CalcCondBatch(apply_model), apply_model), strict=True
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    for kind, callback in ((CallbacksMP.ON_PRE_RUN, refuse_a_dropped_promise), (CallbacksMP.ON_CLEANUP, end_of_run)):
        model.remove_callbacks_with_key(kind, KEY)
        if not all(a.settings.is_off for a in everything):
            model.add_callback_with_key(kind, KEY, callback)
    return model


def refuse_a_dropped_promise(model) -> None:
    """ON_PRE_RUN callback: another pack took all of our wrappers off this MODEL.

    Raises:
        RuntimeError: it did.
    """
    if not any(model.get_wrappers(kind, KEY) for kind in KINDS):
        packs = suspects(model, model)
        raise RuntimeError(
            "PLADIS: another node took Apply PLADIS off this model" + (f" ({', '.join(packs)})" if packs else "")
            + ". Place Apply PLADIS behind it, next to the sampler, or remove it."
        )  # fmt: skip


# the receipts of the runs that go on, by the MODEL that runs
_open: WeakKeyDictionary[Any, Receipt] = WeakKeyDictionary()


def end_of_run(model) -> None:
    """ON_CLEANUP callback: says a receipt that no OUTER_SAMPLE wrapper will say; not of a run that failed."""
    receipt = _open.get(model)
    if receipt is None or receipt.knows_steps:
        return
    del _open[model]
    if sys.exc_info()[0] is None:
        _say(receipt)


def _say(receipt: Receipt) -> None:
    for node, words in receipt.finish():
        if node is not None:
            show_on_node(node, words)


@dataclass(frozen=True)
class Context:
    """What the wrappers hand down. An object, because the host copies every dict in transformer_options.

    `guider` has the run's conditionings by name, `known` those of this `calc_cond_batch` call.
    """

    guider: Any = None
    receipt: Receipt | None = None
    # open until the run's end
    stack: contextlib.ExitStack | None = None
    known: tuple[Known, ...] | None = None
    compile_arguments: Mapping[str, Any] = field(default_factory=dict)
    # a function of another pack stands around the model call
    rearranged: bool = False

    def __deepcopy__(self, memo) -> Context:
        return self

    def conditionings(self) -> tuple[Known, ...]:
        if self.known is not None:
            return self.known
        return read_guider(self.named()) if self.guider is not None else ()

    def named(self) -> Mapping[str, Any]:
        return getattr(self.guider, "conds", None) or {}


@dataclass(frozen=True)
class OuterSample:
    """OUTER_SAMPLE wrapper (comfy/samplers.py, CFGGuider.sample): one run, its receipt, its steps."""

    apply_model: ApplyModel

    def __call__(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *rest, **more):
        guider, applied = executor.class_obj, self.apply_model.applied
        receipt = Receipt(applied, self.apply_model.target, partial(suspects, guider.model_patcher, guider))

        def step_is_done(*values, **named):
            receipt.end_step()
            return callback(*values, **named) if callback is not None else None

        options = guider.model_options.setdefault("transformer_options", {})
        network = guider.model_patcher.model.diffusion_model
        prepare(guider.model_patcher.load_device)
        with contextlib.ExitStack() as stack:
            options[KEY] = Context(guider, receipt, stack)
            _put_back(options, CalcCondBatch(self.apply_model), self.apply_model)
            _open[guider.model_patcher] = receipt
            stack.callback(_open.pop, guider.model_patcher, None)
            if not compiled.compiles(options, network):
                stack.enter_context(evaluations(network, receipt.went_past))
            out = executor(noise, latent_image, sampler, sigmas, denoise_mask, step_is_done, *rest, **more)
        _say(receipt)
        return out


@dataclass(frozen=True)
class CalcCondBatch:
    """CALC_COND_BATCH wrapper: hands each conditioning's role and own length down to the model call."""

    apply_model: ApplyModel

    def __call__(self, executor, model, conds, x_in, timestep, model_options: dict[str, Any]):
        compiled.warn_of_frozen_settings(model_options)
        options = dict(model_options.get("transformer_options", {}))
        context = options.get(KEY) or Context(receipt=self._receipt(getattr(model, "current_patcher", None)))
        options[KEY] = replace(
            context, known=read_conditioning(conds, context.named()),
            compile_arguments=model_options.get(compiled.COMPILE_ARGUMENTS) or {},
            rearranged=model_options.get("model_function_wrapper") is not None,
        )  # fmt: skip
        _put_back(options, self, self.apply_model)
        return executor(model, conds, x_in, timestep, {**model_options, "transformer_options": options})

    def _receipt(self, patcher) -> Receipt | None:
        """The run's; where its OUTER_SAMPLE wrapper was dropped, one that counts model calls instead of steps."""
        if patcher is not None and patcher not in _open:
            of_whom = partial(suspects, patcher, patcher)
            _open[patcher] = Receipt(self.apply_model.applied, self.apply_model.target, of_whom, knows_steps=False)
        return _open.get(patcher)


def _put_back(options: dict[str, Any], calc_cond_batch: CalcCondBatch, apply_model: ApplyModel) -> None:
    """Wrappers of ours that another pack dropped, and torch.compile's behind them, so that ours can leave it out."""
    wrappers = options["wrappers"] = dict(options.get("wrappers", {}))
    around_batches = wrappers[WrappersMP.CALC_COND_BATCH] = dict(wrappers.get(WrappersMP.CALC_COND_BATCH, {}))
    around_calls = wrappers[WrappersMP.APPLY_MODEL] = dict(wrappers.get(WrappersMP.APPLY_MODEL, {}))
    around_batches.setdefault(KEY, [calc_cond_batch])
    around_calls.setdefault(KEY, [apply_model])
    if compiled.COMPILE_KEY in around_calls:
        around_calls[compiled.COMPILE_KEY] = around_calls.pop(compiled.COMPILE_KEY)


@dataclass(frozen=True)
class ApplyModel:
    """APPLY_MODEL wrapper (comfy/model_base.py, BaseModel.apply_model): one model call with PLADIS."""

    applied: tuple[Applied, ...]
    target: Target
    watch: Callable[..., Any] | None = field(default=None, compare=False)

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **extra
    ):
        options = dict(transformer_options or {})
        # neither other packs' code nor the guards of torch.compile ever see it
        context = options.pop(KEY, None) or Context()
        if self.watch is None and all(a.settings.is_off for a in self.applied):
            with inside():
                return executor(x, t, c_concat, c_crossattn, control, options, **extra)
        target = self.target.on(executor.class_obj)
        call, on, due = self._call(target, context, x, t, {"x": x, "c_crossattn": c_crossattn, **extra}, options,
                                   executor.class_obj.model_sampling)  # fmt: skip

        def run(executor, options):
            return executor(x, t, c_concat, c_crossattn, control, options, **extra)

        with inside():
            out = _on_its_road(call, target, context, options, executor, run)
        if context.receipt is not None:
            context.receipt.add(call, on, due)
        return out

    def _call(
        self, target, context, x, t, arguments, options, model_sampling
    ) -> tuple[ModelCall | None, list[int], list[int]]:
        """This model call's, None where no Apply node is on; which of them are on in it, and which were if it had
        their prompts.
        """
        text = arguments.get("c_crossattn" if target.family is None else target.family.text)
        now = self._now(t, model_sampling) if text is not None else {}
        if not now:
            return None, [], []
        due = list(now)
        wants_roles = any(s.apply_to != "both" or s.tokens != "all" for s in now.values())
        known = self._with_kinds(context.conditionings(), target, now)
        batch = read_batch(x.shape[0], text, options, known, wants_roles, context.rearranged)
        now = {i: s for i, s in now.items() if s.apply_to == "both" or s.apply_to in batch.roles}
        active = {layer: s for s in now.values() for layer in target.layers if layer in s.layers}
        if not active:
            return None, [], due
        return ModelCall(target, active, batch, arguments, options, watch=self.watch), list(now), due

    def _with_kinds(self, known: tuple[Known, ...], target: Target, now: Mapping[int, Settings]) -> tuple[Known, ...]:
        """The conditionings with what their tokens are, where somebody asks for it."""
        wanting = [settings for settings in now.values() if settings.tokens != "all" or self.watch is not None]
        if not wanting or target.family is None:
            return known
        texts = tuple(text for settings in wanting for text in settings.texts)
        kinds = (kinds_of(k.context, target.family, target.network(), texts) for k in known)
        return tuple(replace(k, prompt=k.prompt._replace(kinds=its)) for k, its in zip(known, kinds, strict=True))

    def _now(self, t: torch.Tensor, model_sampling) -> dict[int, Settings]:
        """The settings at this noise level, by the place of their Apply node."""
        candidates = {i: a.settings for i, a in enumerate(self.applied) if a.settings.layers}
        if self.watch is None:
            candidates = {i: s for i, s in candidates.items() if not s.is_off}
        if all(s.whole_schedule for s in candidates.values()):
            return candidates
        # the only synchronisation of a model call
        sigma = float(t.max())
        now = {i: s.at(sigma, model_sampling) for i, s in candidates.items() if s.covers_sigma(sigma, model_sampling)}
        return {i: s for i, s in now.items() if not s.is_off}


def _on_its_road(call: ModelCall | None, target: Target, context: Context, options: dict[str, Any], executor, run):
    """The model call, by the way that its network's kind and torch.compile leave."""
    is_unet = target.family is not None and target.family.kind == UNET
    is_compiled = compiled.compiles(options, executor.class_obj.diffusion_model)
    if is_compiled and is_unet and context.compile_arguments:
        return compiled.run_unet(call, target, context.compile_arguments, options, executor, run)
    if call is None:
        return run(executor, options)
    if is_compiled:
        executor = compiled.without_compiling(executor, target, options)
    road = by_shape if target.family is None else unet if is_unet else transformer
    with contextlib.ExitStack() as stack:
        stack.callback(call.close)
        road.prepare(call, options)
        # a gradient may compute modules again when the call is over
        until = context.stack if torch.is_grad_enabled() and context.stack is not None else stack
        # for the run, where one is open: to put hooks on all modules takes as long as a few of them
        (context.stack or stack).enter_context(hooked(target))
        until.enter_context(kept(call))
        stack.enter_context(running(call))
        # another pack may have taken away the hook that a module is left with
        stack.callback(call.leave)
        until.callback(call.forget)
        out = run(executor, call.options)
        if call.undo:
            raise call.lost_hooks()
        return out
