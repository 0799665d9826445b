"""PLADIS in a model of diffusers, in one line.

    with apply_pladis(pipeline):
        image = pipeline("a red fox beside a frozen lake").images[0]

The model keeps its processors, and so its IP-Adapters, LoRAs, PAG and masks: PLADIS is in the calls of torch's
scaled_dot_product_attention that they make, and only there.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

try:
    import diffusers
except ImportError as error:
    raise ImportError('pladis_core.diffusers needs diffusers: pip install "pladis-comfy[diffusers]"') from error

from ..api import _check_mix, prepare
from .attention import Settings, TextAttention
from .families import BY_CLASS, JOINT, Family, Row, chosen_layers, family_of, knows_processor, text_modules

__all__ = ["PladisHandle", "apply_pladis"]

# where a pipeline keeps its networks; Wan 2.2 has two
NETWORKS = ("unet", "transformer", "transformer_2")
_handles: WeakKeyDictionary[nn.Module, PladisHandle] = WeakKeyDictionary()
# of a thread: the joint rows of its last call of every network
_running = threading.local()


def apply_pladis(
    model_or_pipeline: nn.Module | diffusers.DiffusionPipeline,
    lam: float = 2.0,
    alpha: float = 1.5,
    layers: str | Sequence[str] = "all",
    norm_cap: float = 0.0,
    mix_mask: torch.Tensor | None = None,
) -> PladisHandle:
    """Puts PLADIS (https://arxiv.org/abs/2503.07677, eq. 11) into the text attention of a diffusers model.

    In cross-attention whole rows are PLADIS. In joint attention the queries of the image are, on the text's keys, and
    the softmax mass that they put on the text stays (`joint_correction`). Padding that the model masks stays out.

    Args:
        model_or_pipeline: a pipeline, or its U-Net or transformer. `families.py` has the classes that are known.
        lam: 0 is the model as it is, to the bit; 2 is the paper's choice.
        alpha: 1 <= alpha <= 2, 1.5 in the paper. Going higher prunes more keys.
        layers: "all", as the paper; "down + up" (of a U-Net, without the middle block, as the authors' code); or
            patterns of module paths, such as "up_blocks.*" or ["transformer_blocks.1?.attn2"].
        norm_cap: above 0, an attention output is at most so many times as long as without PLADIS. 0: no limit.
        mix_mask: (B, L) or (1, L) boolean, over the L tokens of the text: those that are mixed, for instance without
            start token and padding. The others keep their softmax weights. B is the network's batch: with guidance,
            most pipelines' negative prompts and then the prompts.

    Returns:
        A handle: `.remove()` undoes it, as does leaving `with apply_pladis(...)`; `.lam`, `.alpha`, `.norm_cap` and
        `.mix_mask` may be set between steps, `.layers` are the paths of the modules.

    Raises:
        ValueError: a class of network, or of attention processor, that is not known; layers that fit nothing; a value
            out of range; a model that has PLADIS already.
    """
    networks = _networks(model_or_pipeline)
    settings = _checked(Settings(lam, alpha, norm_cap, mix_mask))
    chosen = []
    for network in networks:
        if network in _handles:
            raise ValueError(
                f"PLADIS is on this {type(network).__name__} already: set .lam of its handle, or .remove() it first"
            )
        chosen.append((network, *_layers_of(network, layers)))
    if not torch.cuda.is_available():
        prepare(next(networks[0].parameters()).device)
    return PladisHandle(settings, chosen)


class PladisHandle:
    """PLADIS on the text attention of one or more networks, until `remove`. Made by `apply_pladis`."""

    def __init__(self, settings: Settings, chosen: list[tuple[nn.Module, Family, dict[str, nn.Module]]]):
        self._settings = settings
        self._undo = []
        self.layers = [path for _, _, modules in chosen for path in modules]
        for network, family, modules in chosen:
            _handles[network] = self
            if family.kind == JOINT:
                self._undo += [_change_class(network), _note_rows(network, family)]
            for path, module in modules.items():
                self._undo.append(_change_class(module, __call__=self._text_attention(network, family, path)))

    def _text_attention(self, network: nn.Module, family: Family, path: str) -> Callable[..., Any]:
        """What a text module does when it is called. Compiled code calls it and goes on behind it."""
        network_ref = ref(network)

        @torch.compiler.disable
        def call(module, *args, **kwargs):
            plain = partial(nn.Module.__call__, module, *args, **kwargs)
            if not self._settings.lam:
                return plain()
            _check_processor(family, module, path)
            row = _current_row(network_ref(), path) if family.row else None
            settings = self._settings
            with TextAttention(settings, row, _text_call(module)) as mode:
                out = plain()
            if self._settings is settings:
                # a mask that had to be moved is moved once, not in every layer
                self._settings = mode.settings
            if not mode.reached:
                raise RuntimeError(_unreached(module, path, mode))
            return out

        return call

    @property
    def lam(self) -> float:
        return self._settings.lam

    @lam.setter
    def lam(self, lam: float) -> None:
        self._settings = _checked(self._settings._replace(lam=lam))

    @property
    def alpha(self) -> float:
        return self._settings.alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._settings = _checked(self._settings._replace(alpha=alpha))

    @property
    def norm_cap(self) -> float:
        return self._settings.norm_cap

    @norm_cap.setter
    def norm_cap(self, norm_cap: float) -> None:
        self._settings = _checked(self._settings._replace(norm_cap=norm_cap))

    @property
    def mix_mask(self) -> torch.Tensor | None:
        return self._settings.mix_mask

    @mix_mask.setter
    def mix_mask(self, mix_mask: torch.Tensor | None) -> None:
        self._settings = _checked(self._settings._replace(mix_mask=mix_mask))

    def remove(self) -> None:
        """The networks are as they were; a second time, nothing happens."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        for network in [network for network, handle in _handles.items() if handle is self]:
            del _handles[network]

    def __enter__(self) -> PladisHandle:
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"PladisHandle(lam={self.lam:g}, alpha={self.alpha:g}, {len(self.layers)} text attentions)"


def _networks(model_or_pipeline) -> list[nn.Module]:
    """The networks to put PLADIS into, without torch.compile's wrapper."""
    if isinstance(model_or_pipeline, nn.Module):
        held: list[nn.Module | None] = [model_or_pipeline]
    else:
        held = [getattr(model_or_pipeline, name, None) for name in NETWORKS]
    found = [getattr(network, "_orig_mod", network) for network in held if network is not None]
    unknown = [type(network).__name__ for network in found if family_of(network) is None]
    if unknown or not found:
        what = f"a {unknown[0]}" if unknown else f"what a {type(model_or_pipeline).__name__} has"
        raise ValueError(
            f"PLADIS does not know where {what} attends to text. It knows {', '.join(BY_CLASS)}, and pipelines of them "
            f"({', '.join(NETWORKS)})"
        )
    return found


def _layers_of(network: nn.Module, layers: str | Sequence[str]) -> tuple[Family, dict[str, nn.Module]]:
    family = family_of(network)
    assert family is not None, "not from _networks()"
    modules = text_modules(family, network)
    if not modules:
        raise ValueError(
            f"this {type(network).__name__} has no text attention of its own: its text, if it has one, is added to the "
            "keys of self-attention, which PLADIS does not cover"
        )
    modules = {path: modules[path] for path in chosen_layers(layers, list(modules))}
    for path, module in modules.items():
        _check_processor(family, module, path)
    return family, modules


def _checked(settings: Settings) -> Settings:
    _check_mix(settings.lam, settings.alpha)
    if not 0.0 <= settings.norm_cap < float("inf"):
        raise ValueError(f"norm_cap must be 0 (no limit) or a finite number above 0, not {settings.norm_cap}")
    mask = settings.mix_mask
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2):
        raise ValueError(f"mix_mask must be boolean (B, L), not {mask.dtype} {tuple(mask.shape)}")
    return settings


def _check_processor(family: Family, module: nn.Module, path: str) -> None:
    if not knows_processor(family, module.processor):
        raise ValueError(
            f"PLADIS does not know the attention processor {type(module.processor).__name__} of {path}. It works in "
            f"{', '.join(family.processors)}. {WAY_BACK}"
        )


WAY_BACK = (
    "Undo what set the other: pipe.disable_attention_slicing() (PLADIS keeps no attention map), "
    'pipe.disable_xformers_memory_efficient_attention(), model.set_attention_backend("native"), '
    "model.set_default_attn_processor()."
)


def _change_class(module: nn.Module, **methods: Callable[..., Any]) -> Callable[[], None]:
    """Gives this one module a class derived from its own, as torch's parametrizations do; returns what undoes it.

    Code that torch.compile made before is not used for a module of another class: it would go on without PLADIS.
    """
    own = type(module)
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    module.__class__ = derived = type(own.__name__, (own,), {**names, **methods})

    def undo() -> None:
        if type(module) is derived:
            module.__class__ = own

    return undo


def _note_rows(network: nn.Module, family: Family) -> Callable[[], None]:
    """Before every call of the network, what its joint rows are made of; returns what undoes it."""
    signature = inspect.signature(network.forward)

    @torch.compiler.disable
    def note(network, args, kwargs):
        _rows()[network] = family.row(network, signature.bind(*args, **kwargs).arguments)

    return network.register_forward_pre_hook(note, with_kwargs=True).remove


def _rows() -> WeakKeyDictionary[nn.Module, Row]:
    if not hasattr(_running, "rows"):
        _running.rows = WeakKeyDictionary()
    return _running.rows


def _current_row(network: nn.Module, path: str) -> Row:
    row = _rows().get(network)
    if row is None:
        raise RuntimeError(f"PLADIS: {path} runs outside its network's forward, so which tokens are text is unknown")
    return row


def _text_call(module: nn.Module) -> int:
    """Wan attends to the picture that a video begins with, where it has one, before the text."""
    return int(type(module).__name__ == "WanAttention" and getattr(module, "add_k_proj", None) is not None)


def _unreached(module: nn.Module, path: str, mode: TextAttention) -> str:
    processor = module.processor
    backend = getattr(processor, "_attention_backend", None)
    seen = f"made {mode.calls} attention calls, none of them of text"
    if not mode.calls:
        name = "the active one" if backend is None else getattr(backend, "value", backend)
        seen = f"did not call torch's scaled_dot_product_attention (attention backend: {name})"
    rows = "" if mode.row is None else f" Rows of {mode.row.length} tokens were expected."
    return f"PLADIS: {type(processor).__name__} of {path} {seen}, so nothing was done.{rows} {WAY_BACK}"
