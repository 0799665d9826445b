"""Which network PLADIS acts on and where its text attention is, decided once: when the node runs.

What other packs change later (a class, a list of blocks, a wrapper around the network) changes nothing here. A copy of
the network, on another GPU or without dynamic VRAM, is resolved when it first runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from types import MappingProxyType
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from ..suspects import advice, pack_of
from .families import UNSUPPORTED, Family, find_family, is_known
from .layers import BY_SHAPE, Layer, family_layers

# by the module that stands as a model's network; a module that is gone takes its entry along
_targets: WeakKeyDictionary[nn.Module, Target] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Target:
    """A network, its row of the table (None: not in it, text attention is told by shape), and its text attention.

    `found` has for every layer the module that makes it (a U-Net's transformer block, a transformer's block or
    attention), `blocks` the block that it is in. Weak references: a node's output must not keep a network that the host
    replaced.
    """

    family: Family | None
    network: ReferenceType[nn.Module]
    found: Mapping[Layer, ReferenceType[nn.Module]] = field(default_factory=dict)
    blocks: Mapping[Layer, ReferenceType[nn.Module]] = field(default_factory=dict)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """In the order in which the network runs them."""
        return tuple(self.found) if self.family is not None else (BY_SHAPE,)

    def expert(self, layer: Layer) -> int | None:
        """Which of the family's experts it belongs to."""
        experts = self.family.experts if self.family is not None else ()
        fitting = (i for i, paths in enumerate(experts) if any(fnmatchcase(layer.path, path) for path in paths))
        return next(fitting, None)

    def expected(self, layers: Set[Layer], ran: Set[Layer]) -> Set[Layer]:
        """`layers` without those of experts that did not run, where others did."""
        if self.family is None or not self.family.experts:
            return layers
        running = {self.expert(layer) for layer in ran}
        return {layer for layer in layers if self.expert(layer) in running | {None}} if running else layers

    def modules(self) -> dict[nn.Module, list[Layer]]:
        """The text modules that are still there; a block of the X4 upscaler makes two layers."""
        return _by_module(self.found)

    def blocks_around(self) -> dict[nn.Module, list[Layer]]:
        """The blocks that are not text modules themselves."""
        modules = self.modules()
        return {block: layers for block, layers in _by_module(self.blocks).items() if block not in modules}

    def on(self, base) -> Target:
        """The target for the network that a BaseModel runs now: this one, or a copy's."""
        network = base.diffusion_model
        if network is self.network():
            return self
        known = _targets.get(network)
        if known is None:
            inside = self.network()
            try:
                known = self if inside in set(network.modules()) else _resolve(base, network, self)
            except ValueError:
                # a module that hides the network: whether it is reached, the receipt tells
                if inside is None:
                    raise
                known = self
            _targets[network] = known
        return known

    def __deepcopy__(self, memo) -> Target:
        return self


def _by_module(found: Mapping[Layer, ReferenceType[nn.Module]]) -> dict[nn.Module, list[Layer]]:
    modules: dict[nn.Module, list[Layer]] = {}
    for layer, reference in found.items():
        module = reference()
        if module is not None:
            modules.setdefault(module, []).append(layer)
    return modules


def find_target(model, force_unknown: bool = False) -> Target:
    """The target of a MODEL.

    `force_unknown`: in a network that is not in the table, whatever looks like text attention by its shape.

    Raises:
        ValueError: the model has no text attention that PLADIS can reach.
    """
    network = model.get_model_object("diffusion_model")
    known = _targets.get(network)
    try:
        _targets[network] = _resolve(model.model, network, None, force_unknown)
    except ValueError:
        # another pack has made it something else since (RES4LYF, while its model is loaded)
        if known is None or known.family is None:
            raise
    return _targets[network]


def _resolve(base, outer: nn.Module, like: Target | None, force_unknown: bool = False) -> Target:
    network = inner_network(outer)
    family = find_family(base, network)
    if family is None and (force_unknown or (like is not None and like.family is None)):
        return Target(None, ref(network))
    if family is None:
        raise ValueError(_unknown(base, outer))
    if family.kind == UNSUPPORTED:
        raise ValueError(
            f"{type(base).__name__} has no text attention that PLADIS changes. {family.reason}. Remove the Apply "
            "PLADIS node from this workflow."
        )
    every = list(family_layers(network, family))
    if not every:
        raise ValueError(
            f"{type(base).__name__} has no text cross-attention layer: PLADIS would change nothing. "
            "Remove the Apply PLADIS node from this workflow."
        )
    found = MappingProxyType({layer: ref(module) for layer, module, _ in every})
    return Target(family, ref(network), found, MappingProxyType({layer: ref(block) for layer, _, block in every}))


def inner_network(outer: nn.Module) -> nn.Module:
    """The one network of the table inside `outer` (torch.compile's `_orig_mod`, a pack's module); else `outer`.

    Raises:
        ValueError: several are.
    """
    if is_known(type(outer)):
        return outer
    topmost: list[nn.Module] = []
    waiting = list(outer.children())
    while waiting:
        module = waiting.pop()
        if is_known(type(module)):
            topmost.append(module)
        else:
            waiting.extend(module.children())
    topmost = list(dict.fromkeys(topmost))
    if len(topmost) > 1:
        names = ", ".join(type(module).__name__ for module in topmost)
        raise ValueError(
            f"PLADIS finds {len(topmost)} networks in {type(outer).__name__} ({names}) and cannot tell which is the "
            "model's. Remove the node that put them there, or Apply PLADIS."
        )
    return topmost[0] if topmost else outer


def _unknown(base, network: nn.Module) -> str:
    pack = pack_of(network)
    by = f" of {pack}" if pack else ""
    way_out = advice(pack) or (
        "docs/models.md in its repository lists the families that it knows. To try a general rule, set force_unknown "
        "in Apply PLADIS (Advanced); else remove the Apply PLADIS node, or load another model."
    )
    return (
        f"PLADIS does not know this kind of model and cannot reach the text attention of {type(network).__name__}{by} "
        f"({type(base).__name__}). {way_out}"
    )
