"""How PLADIS gets into a model call: keyed wrappers on the MODEL, which take no hook slot before it.

At each model call APPLY_MODEL sees the final transformer_options, with the patches of nodes wired before and after. On
its own copy it puts a hook in front of whatever sits in each slot. Nothing is left behind when the call returns.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from comfy.patcher_extension import WrappersMP

from .compiled import is_compiled, run_compiled, uncompiled, warn_of_frozen_settings
from .conditioning import GUIDER_KEY, TABLE_KEY, GuiderConds, batch_chunks, read_conditioning
from .families import UNET, find_family, network_of
from .hook import ModelCall, PladisHook, refuse_another_pladis
from .layers import unet_layers
from .settings import Settings
from .transformer import text_attention

KEY = "pladis"


def apply_settings(model, settings: Settings):
    """A clone of MODEL with PLADIS. Settings of an earlier Apply node stay on the layers that these do not cover."""
    model = model.clone()
    earlier = [s for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY) for s in wrapper.settings]
    kept = (s.without(settings.layers) for s in earlier)
    everything = (*(s for s in kept if s.layers), settings)
    wrappers = {
        WrappersMP.APPLY_MODEL: ApplyModel(everything),
        WrappersMP.CALC_COND_BATCH: calc_cond_batch,
        WrappersMP.PREDICT_NOISE: predict_noise,
    }
    if all(s.apply_to == "both" for s in everything):
        del wrappers[WrappersMP.PREDICT_NOISE]
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.PREDICT_NOISE):
        model.remove_wrappers_with_key(kind, KEY)
        if kind in wrappers:
            model.add_wrapper_with_key(kind, KEY, wrappers[kind])
    return model


def predict_noise(executor, x, timestep, model_options: dict[str, Any], seed=None):
    """PREDICT_NOISE wrapper: hands the guider's names of the conditionings down to `calc_cond_batch`."""
    guider = GuiderConds(executor.class_obj.conds)
    return executor(x, timestep, _with_option(model_options, GUIDER_KEY, guider), seed)


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options: dict[str, Any]):
    """CALC_COND_BATCH wrapper: hands each conditioning's role and own length down to the model call."""
    warn_of_frozen_settings(model_options)
    table = read_conditioning(conds, x_in.shape[0], model_options["transformer_options"].get(GUIDER_KEY))
    return executor(model, conds, x_in, timestep, _with_option(model_options, TABLE_KEY, table))


def _with_option(model_options: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**model_options, "transformer_options": {**model_options["transformer_options"], key: value}}


@dataclass(frozen=True)
class ApplyModel:
    """APPLY_MODEL wrapper (comfy/model_base.py, BaseModel.apply_model): installs the hooks of this model call."""

    settings: tuple[Settings, ...]

    def __call__(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **extra
    ):
        transformer_options = transformer_options or {}
        base = executor.class_obj
        family = find_family(base)
        arguments = {"x": x, "c_crossattn": c_crossattn, **extra}
        text = arguments.get("c_crossattn" if family is None else family.text)
        active, call = [], None
        if text is not None:
            call = ModelCall(x.shape[0], text.shape[1], batch_chunks(transformer_options, x.shape[0]))
            roles = {"both", *(chunk.role for chunk in call.chunks)}
            active = [s for s in self._active(t, base.model_sampling) if not call.chunks or s.apply_to in roles]

        def run(options):
            return executor(x, t, c_concat, c_crossattn, control, options, **extra)

        compiled = is_compiled(transformer_options)
        if family is not None and family.kind == UNET:
            for settings in active:
                transformer_options = _install(transformer_options, settings, call)
            if compiled:
                return run_compiled(run, transformer_options, unet_layers(network_of(base)))
            return run(transformer_options)
        if not active:
            return run(transformer_options)
        hosted = text_attention(network_of(base), family, active, arguments, call, transformer_options)
        with uncompiled(type(network_of(base)).__name__) if compiled else contextlib.nullcontext(), hosted as options:
            return run(options)

    def _active(self, t, model_sampling) -> list[Settings]:
        candidates = [s for s in self.settings if not s.is_off]
        if all(s.whole_schedule for s in candidates):
            return candidates
        # the only synchronisation of a model call
        sigma = float(t.max())
        now = (s.at(sigma, model_sampling) for s in candidates if s.covers_sigma(sigma, model_sampling))
        return [s for s in now if not s.is_off]


def _install(transformer_options: dict[str, Any], settings: Settings, call: ModelCall) -> dict[str, Any]:
    """A copy of transformer_options with a hook for every layer, in front of the one the host would have called."""
    options = transformer_options.copy()
    replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
    for slot in {layer.slot for layer in settings.layers}:
        residents = replace.get(slot, {})
        replace[slot] = residents.copy()
        for layer in (layer for layer in settings.layers if layer.slot == slot):
            resident = residents.get(layer.key, residents.get(layer.key[:2]))
            refuse_another_pladis(resident)
            replace[slot][layer.key] = PladisHook(settings.on(layer), call, resident)
    if any(layer.slot == "attn1" for layer in settings.layers):
        _give_attn1_a_value(options)
    return options


def _give_attn1_a_value(options: dict[str, Any]) -> None:
    """The host sets the value of a replaced attn1 that is cross-attention only where an attn1_patch is present."""
    patches = options["patches"] = options.get("patches", {}).copy()
    patches["attn1_patch"] = [*patches.get("attn1_patch", []), _unchanged]


def _unchanged(n, context, value, extra_options):
    return n, context, value
