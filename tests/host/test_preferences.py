"""Attention as ComfyUI 0.38 calls it: containers, and kernels that a checkpoint prefers compute the dense part."""

from __future__ import annotations

import gc
import threading
import weakref

import comfy.ldm.modules.attention as host_attention
import comfy.ops
import pytest
import torch
from comfy.model_base import BaseModel
from newer_host import IS_NEWER, OVERRIDE, Container, Kernels, call_as_newer_hosts_do
from torch.nn.attention import SDPBackend

import families
import tiny
from pladis_pack.nodes.hosting.roads import transformer
from pladis_pack.nodes.hosting.roads.preferred import divert_preference
from pladis_pack.pladis_core import attention_with_lse
from tiny import apply

U_NET = "SD15"
# modules that take the options, that do not take them, and that make two calls
NAMES = (U_NET, "Wan 2.1 T2V", "Wan 2.1 I2V", "SD3.5 medium", "PixArt Sigma", "HunyuanDiT", "ACE-Step 1.5")
EVERY = (U_NET, *(family.name for family in families.FAMILIES)) if IS_NEWER else NAMES


class Kind:
    """A small model, and how it is sampled."""

    def __init__(self, name: str):
        self.family = None if name == U_NET else families.BY_NAME[name]
        self.model = tiny.patcher(U_NET) if self.family is None else families.patcher(self.family)
        self.network = self.model.model.diffusion_model

    def sample(self, model, **options) -> torch.Tensor:
        return tiny.sample(model, **options) if self.family is None else families.sample(model, self.family, **options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def newer(name: str, monkeypatch) -> Kind:
    kind = Kind(name)
    if kind.family is not None and kind.family.no_batch:
        # as on a machine with little memory: every conditioning in a model call of its own
        monkeypatch.setattr(BaseModel, "memory_required", lambda self, *args, **kwargs: float("inf"))
    call_as_newer_hosts_do(kind.network, monkeypatch)
    if not Kernels(kind.network, only=lambda path: False).preferences or (name == "SD3.5 medium" and not IS_NEWER):
        pytest.skip(f"{name} knows no preferences here, and calls attention from functions: it has no stand-in")
    return kind


@pytest.fixture(params=NAMES)
def kind(request, monkeypatch):
    return newer(request.param, monkeypatch)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_kernels_run_with_and_without_pladis(name, monkeypatch):
    """Scale 0 and scale 2 differ in the text alone: what computes the dense part, and everything else, is the same."""
    kind = newer(name, monkeypatch)
    without = kind.sample(kind.model)
    kernels = Kernels(kind.network)
    plain = kernels.during(lambda: kind.sample(apply(kind.model, scale=0.0)))
    assert kernels.ran and kind.network is kind.model.model.diffusion_model
    handed = list(kernels.got)
    patched = apply(kind.model, scale=2.0)
    assert kernels.during(lambda: kind.sample(patched)) == plain
    # the host's own way into a kernel: in containers where it uses them; a U-Net's replacement hook has none
    assert kernels.got == handed or kind.family is None
    assert all(preference.function.__name__ == "kernel" for preference in kernels.preferences.values())
    assert relative(kind.sample(patched), without) > 1e-3


def test_the_dense_part_is_the_preferred_kernels(kind):
    """A kernel that gives a little less: what PLADIS adds is the same as on the host's own."""
    Kernels(kind.network, factor=0.5)
    halved = kind.sample(apply(kind.model, scale=0.0))
    with_pladis = kind.sample(apply(kind.model, scale=1e-4, alpha=1.5))
    assert relative(with_pladis, halved) < 1e-2
    Kernels(kind.network, only=lambda path: False)
    assert relative(halved, kind.sample(apply(kind.model, scale=0.0))) > 2e-2


def test_without_a_preference_nothing_changes(kind):
    Kernels(kind.network, only=lambda path: False)
    assert torch.equal(kind.sample(apply(kind.model, scale=0.0)), kind.sample(kind.model))
    assert relative(kind.sample(apply(kind.model)), kind.sample(kind.model)) > 1e-3


@pytest.mark.parametrize("name", ("SD3.5 medium", "Wan 2.1 T2V"))
def test_some_modules_prefer(name, monkeypatch):
    """In one block, a kernel for one attention and none for another; in one network, in half of its blocks."""
    kind = newer(name, monkeypatch)
    expected = kind.sample(apply(kind.model))
    paths = list(Kernels(kind.network).preferences)
    for chosen in (set(paths[::2]), set(paths[1::2])):
        kernels = Kernels(kind.network, only=chosen.__contains__)
        plain = kernels.during(lambda: kind.sample(apply(kind.model, scale=0.0)))
        assert kernels.during(lambda: kind.sample(apply(kind.model))) == plain
        assert relative(kind.sample(apply(kind.model)), expected) < 1e-5


@pytest.mark.parametrize("order", ("node first", "LoRA first"))
@pytest.mark.parametrize("name", ("Wan 2.1 T2V", U_NET))
def test_preferences_that_come_with_a_lora(name, order, monkeypatch):
    """As object patches, which take the modules' place while the model is loaded (comfy/model_patcher.py)."""
    kind = newer(name, monkeypatch)
    kernels = Kernels(kind.network)
    of_lora = {path: preference.function for path, preference in kernels.preferences.items()}
    for preference in kernels.preferences.values():
        preference.function = None

    def patch(model):
        model = model.clone()
        for path, function in of_lora.items():
            preference = type(kernels.preferences[path])()
            preference.function = function
            model.add_object_patch(f"diffusion_model.{path}", preference)
        return model

    with_lora = patch(kind.model)
    plain = kernels.during(lambda: kind.sample(with_lora))
    patched = patch(apply(kind.model)) if order == "node first" else apply(with_lora)
    assert kernels.during(lambda: kind.sample(patched)) == plain != []
    assert kernels.during(lambda: kind.sample(apply(kind.model))) == []


@pytest.mark.parametrize("order", ("node first", "pack first"))
@pytest.mark.parametrize("name", ("Wan 2.1 T2V", "SD3.5 medium", U_NET))
def test_an_override_of_another_node_wins(name, order, monkeypatch):
    """As in the host: it is asked, and no preference."""
    kind = newer(name, monkeypatch)
    calls = []

    def override(function, *args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    def patch(model):
        model = model.clone()
        options = model.model_options["transformer_options"]
        model.model_options["transformer_options"] = {**options, OVERRIDE: override}
        return model

    kernels = Kernels(kind.network)
    assert kernels.during(lambda: kind.sample(patch(kind.model))) == []
    count = len(calls)
    model = patch(apply(kind.model)) if order == "node first" else apply(patch(kind.model))
    calls.clear()
    assert kernels.during(lambda: kind.sample(model)) == []
    assert len(calls) == count > 0


def test_a_network_that_is_not_in_the_table(monkeypatch):
    """force_unknown: attention that does not look like text keeps its kernel too."""
    kind = newer("Wan 2.1 T2V", monkeypatch)
    monkeypatch.setattr("pladis_pack.nodes.hosting.models.families._row_of", lambda network: None)
    kernels = Kernels(kind.network)
    plain = kernels.during(lambda: kind.sample(kind.model))
    patched = apply(kind.model, force_unknown=True)
    assert kernels.during(lambda: kind.sample(patched)) == plain
    assert relative(kind.sample(patched), kind.sample(kind.model)) > 1e-3
    assert all(preference.function.__name__ == "kernel" for preference in kernels.preferences.values())


def test_two_threads_on_one_preference(monkeypatch):
    """What is diverted for the one is itself for the other, and what stood there is back when the last is done."""
    kind = newer("Wan 2.1 T2V", monkeypatch)
    preference = next(iter(Kernels(kind.network, factor=3.0).preferences.values()))
    kernel, q, k = preference.function, torch.randn(1, 8, 32), torch.randn(1, 5, 32)
    plain = kernel(q, k, k, 2)
    wrong = []

    def diverted():
        for _ in range(300):
            leave = divert_preference(preference, lambda function, *args, diverted, **_: 2 * function(*args))
            out = preference.function(q, k, k, 2)
            leave()
            wrong.extend([] if torch.equal(out, 2 * plain) else [1])

    def untouched():
        for _ in range(600):
            wrong.extend([] if torch.equal(preference.function(q, k, k, 2), plain) else [2])

    threads = [threading.Thread(target=f) for f in (diverted, untouched, diverted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and preference.function is kernel


@pytest.mark.parametrize("small", (0, 1 << 30))
def test_torch_picks_its_kernel_in_the_hosts_order(small, monkeypatch):
    """For the dense part of a joint row, which comes with its log-sum-exp (comfy/ops.py)."""
    priority = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    monkeypatch.setattr(comfy.ops, "SDPA_BACKEND_PRIORITY", priority, raising=False)
    monkeypatch.setattr(transformer, "SMALL", small)
    orders = []

    def compute(*args, **kwargs):
        orders.append(torch._C._get_sdp_priority_order()[: len(priority)])
        return attention_with_lse(*args, **kwargs)

    monkeypatch.setattr(transformer, "attention_with_lse", compute)
    before = torch._C._get_sdp_priority_order()
    kind = Kind("Flux.1")
    kind.sample(apply(kind.model))
    # a query that is small is left to torch
    expected = before[: len(priority)] if small else [backend.value for backend in priority]
    assert orders and all(order == expected for order in orders)
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.skipif(not hasattr(host_attention, "AttentionTensorContainer"), reason="this ComfyUI has no containers")
@pytest.mark.parametrize("name", ("PixArt Sigma", "HunyuanDiT", "ACE-Step 1.5", "ERNIE-Image"))
def test_containers_are_emptied_and_nothing_is_kept(name, monkeypatch):
    """The same picture from containers as from tensors, and no tensor outlives its module."""
    kind = Kind(name)
    expected = kind.sample(apply(kind.model))
    made = []
    create = Container.__init__

    def noted(container, tensor):
        create(container, tensor)
        made.append((container, weakref.ref(tensor)))

    monkeypatch.setattr(Container, "__init__", noted)
    call_as_newer_hosts_do(kind.network, monkeypatch)
    # one fused pass, or the dense part and a correction: other roundings
    assert relative(kind.sample(apply(kind.model)), expected) < 1e-4
    assert len(made) > 0
    gc.collect()
    for container, tensor in made:
        with pytest.raises(RuntimeError, match="consumed"):
            container.peek()
        assert tensor() is None
