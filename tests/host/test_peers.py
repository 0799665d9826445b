"""Beside the real packs of other authors, where a folder with checkouts of them is given: $PLADIS_PEERS/<its name>.

Packs whose weights or dependencies are not at hand are driven through their own hook objects. "By hand" is a network
into whose text attention PLADIS is written; where a pack has a hook in that place, its output plus the correction.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import comfy.samplers
import entmax
import pytest
import torch

import families
import tiny
from graph import Rows, run_class
from pladis_pack.nodes.hosting import find_target
from tiny import NEGATIVE, POSITIVE, apply

SAME, CHANGED = 1e-4, 1e-3


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def peer(monkeypatch):
    """Imports `module` of a pack, without running the pack itself; `absent` dependencies are replaced by nothing."""

    def load(folder: str, module: str, absent=(), **root):
        path = Path(os.environ.get("PLADIS_PEERS") or "none").expanduser() / folder
        if "PLADIS_PEERS" not in os.environ or not path.is_dir():
            pytest.skip(f"no checkout of {folder}: set $PLADIS_PEERS to the folder that holds it")
        name = "peer_" + folder.replace("-", "_")
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        vars(package).update(root)
        monkeypatch.setitem(sys.modules, name, package)
        for dependency in absent:
            full = name + dependency if dependency.startswith(".") else dependency
            monkeypatch.setitem(sys.modules, full, MagicMock())
        return importlib.import_module(f"{name}.{module}")

    yield load
    for name in [name for name in sys.modules if name.startswith("peer_")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def sd15():
    return tiny.patcher()


@pytest.fixture(scope="module")
def by_hand():
    return tiny.write_pladis_into(tiny.patcher())


@pytest.fixture
def rows(monkeypatch):
    return Rows(monkeypatch)


def correction(q, k, v, heads: int) -> torch.Tensor:
    """2 * (entmax - softmax) @ v, in float64 on the entmax package."""
    q, k, v = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (2 * (entmax.entmax15(scores, -1) - scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


def correct_hooks(model):
    """The correction onto what every hook in a text attention's place gives."""
    options = model.model_options["transformer_options"]
    replaced = options.get("patches_replace", {})

    def corrected(hook):
        return lambda q, k, v, o: hook(q, k, v, o) + correction(q, k, v, o["n_heads"])

    attn2 = {key: corrected(hook) for key, hook in replaced.get("attn2", {}).items()}
    model.model_options["transformer_options"] = {**options, "patches_replace": {**replaced, "attn2": attn2}}
    return model


def check(patch, sd15, by_hand, rows, sample=tiny.sample) -> None:
    """Both orders alike, evaluations unchanged, each side's effect there, and exactly PLADIS once."""
    alone, evaluations = rows.of(lambda: sample(patch(sd15)))
    expected, _ = rows.of(lambda: sample(correct_hooks(patch(by_hand))))
    without, _ = rows.of(lambda: sample(apply(sd15)))
    before, rows_before = rows.of(lambda: sample(patch(apply(sd15))))
    after, rows_after = rows.of(lambda: sample(apply(patch(sd15))))
    assert torch.equal(before, after)
    assert rows_before == rows_after == evaluations and evaluations
    assert relative(before, expected) < SAME
    assert relative(before, alone) > CHANGED
    assert relative(before, without) > CHANGED


ADAPTERS = {
    "IPAdapter": ("ComfyUI_IPAdapter_plus", "IPAdapterPlus", (), "set_model_patch_replace", "ipadapter"),
    "InstantID": ("ComfyUI_InstantID", "InstantID", ("cv2", "insightface", "insightface.app"),
                  "_set_model_patch_replace", "ipadapter"),
    "PuLID": ("PuLID_ComfyUI", "pulid", ("insightface", "insightface.app", "facexlib", "facexlib.parsing",
              "facexlib.utils", "facexlib.utils.face_restoration_helper", ".eva_clip", ".eva_clip.constants",
              ".encoders"), "set_model_patch_replace", "pulid"),
}  # fmt: skip


def adapter(pack, setter: str, argument: str, whole_blocks: bool):
    """A pack's hook in every text attention; for SD 1.5 the packs address whole blocks, for SDXL layers."""

    def patch(model):
        model = model.clone()
        weights, places = {}, []
        modules = model.model.diffusion_model.named_modules()
        widths = [m.attn2.to_k.weight.shape[0] for _, m in modules if getattr(m, "attn2", None) is not None]
        generator = torch.Generator().manual_seed(7)
        for i, width in enumerate(widths):
            for name in ("k", "v"):
                weights[f"{2 * i + 1}.to_{name}_ip.weight"] = torch.randn(width, 20, generator=generator) * 0.3
        net = SimpleNamespace(ip_layers=pack.To_KV(weights).double())
        net.get_multigpu_clone = lambda device: net
        tokens = torch.randn(1, 4, 20, generator=generator, dtype=torch.float64)
        order = {"input": 0, "middle": 1, "output": 2}
        places = sorted((layer.key for layer in find_target(model).layers), key=lambda key: (order[key[0]], *key[1:]))
        for i, key in enumerate(places):
            settings = {
                argument: net, "weight": 0.8, "cond": tokens, "uncond": tokens * 0.0, "sigma_start": 1e9,
                "sigma_end": 0.0, "module_key": str(2 * i + 1),
            }  # fmt: skip
            getattr(pack, setter)(model, settings, key[:2] if whole_blocks else key)
        return model

    return patch


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("whole_blocks", (True, False))
def test_image_adapters(peer, name, whole_blocks, sd15, by_hand, rows):
    folder, module, absent, setter, argument = ADAPTERS[name]
    patch = adapter(peer(folder, module, absent), setter, argument, whole_blocks)
    check(patch, sd15, by_hand, rows)


def test_two_adapters_and_pladis_in_any_order(peer, sd15):
    """Each of them wants the slot free, or an object there that takes it in."""
    packs = []
    for name in ("IPAdapter", "InstantID"):
        folder, module, absent, setter, argument = ADAPTERS[name]
        packs.append(adapter(peer(folder, module, absent), setter, argument, True))
    first, second = packs
    images = [tiny.sample(model) for model in (
        apply(second(first(sd15))), second(apply(first(sd15))), second(first(apply(sd15))))]  # fmt: skip
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert relative(images[0], tiny.sample(apply(first(sd15)))) > CHANGED
    assert relative(images[0], tiny.sample(second(first(sd15)))) > CHANGED


PERTURBED = "sd-perturbed-attention"


GUIDANCE = {
    "PerturbedAttention": {"unet_block_list": "d3,m0"},
    "SmoothedEnergyGuidanceAdvanced": {"unet_block_list": "d3,m0"},
    "SlidingWindowGuidanceAdvanced": {"tile_width": 64, "tile_height": 64, "tile_overlap": 32},
}


@pytest.mark.parametrize("node", GUIDANCE)
def test_pag_seg_and_sliding_windows(peer, node, sd15, by_hand, rows):
    pack = getattr(peer(PERTURBED, "pag_nodes"), node)
    check(
        lambda model: run_class(pack, model=model, **GUIDANCE[node]), sd15, by_hand, rows,
        lambda model: tiny.sample(model, size=16, steps=1),
    )  # fmt: skip


def test_normalized_attention_guidance(peer, sd15, by_hand, rows):
    """It keeps a hook that is there when it is wired; PLADIS is not, so either order works."""
    node = peer(PERTURBED, "nag_nodes").NormalizedAttentionGuidance
    check(lambda model: run_class(node, model=model, negative=tiny.prompt(31)), sd15, by_hand, rows)


@pytest.mark.parametrize("first", (True, False))
def test_another_pladis_is_refused(peer, first, sd15):
    node = peer(PERTURBED, "pladis_nodes").Pladis

    def patch(model):
        return run_class(node, model=model)

    with pytest.raises(RuntimeError, match="sd-perturbed-attention.*twice.*Remove one"):
        tiny.sample(patch(apply(sd15)) if first else apply(patch(sd15)))
    # off is off
    off = apply(sd15, scale=0.0)
    assert torch.equal(tiny.sample(patch(off) if first else apply(patch(sd15), scale=0.0)), tiny.sample(patch(sd15)))


def masks() -> list[torch.Tensor]:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1.0
    return [left, 1.0 - left]


CGEM156 = {"ROOT_NAME": "", "SYMBOL": "", "NODE_SURFIX": ""}


def cgem156(peer):
    node = peer("cgem156-ComfyUI", "scripts.attention_couple.node", **CGEM156).AttentionCouple
    base, other = masks()
    return lambda model, tokens=77: node().attention_couple_simple(
        model, base, cond_1=tiny.prompt(21, tokens), mask_1=other
    )[0]


def ppm(peer):
    """What its node does on a U-Net; the node's own module does not load on every ComfyUI."""
    couple = peer("ComfyUI-ppm", "src.attention_couple.unet_couple")

    def patch(model, tokens=77):
        model = model.clone()
        mask = torch.stack(masks()).double()
        regions = couple.unet_attn2_couple_wrapper(
            POSITIVE, [tiny.prompt(21, tokens)], 2, False, torch.device("cpu"), torch.float64
        )
        model.set_model_attn2_patch(regions)
        model.set_model_attn2_output_patch(couple.unet_attn2_output_couple_wrapper(mask))
        return model

    return patch


@pytest.mark.parametrize("pack", (cgem156, ppm))
def test_attention_couple(peer, pack, sd15, by_hand, rows):
    check(pack(peer), sd15, by_hand, rows)


@pytest.mark.parametrize("pack", (cgem156, ppm))
def test_a_longer_region_does_not_change_the_others(peer, pack, sd15):
    """The packs repeat tokens to a common length; a region that only repeats its own must not be another prompt."""
    patch = pack(peer)
    once = tiny.prompt(21, 77)[0][0]

    def sample(repeats):
        region = [[once.repeat(1, repeats, 1), {"pooled_output": torch.zeros(1, 8)}]]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tiny, "prompt", lambda *args: region)
            model = patch(sd15)
        return tiny.sample(apply(model)), tiny.sample(model)

    (ours, plain), (ours_repeated, plain_repeated) = sample(1), sample(2)
    assert relative(plain_repeated, plain) < SAME
    assert relative(ours_repeated, ours) < SAME
    assert relative(ours, plain) > CHANGED


def couple_of_prompt_control(peer):
    module = peer("comfyui-prompt-control", "prompt_control.attention_couple_ppm")
    base, other = masks()
    region = tiny.prompt(21)[0]
    return module.set_cond_attnmask(
        [[POSITIVE[0][0], {**POSITIVE[0][1], "mask": base}]],
        [[region[0], {**region[1], "mask": other, "mask_strength": 1.0}]],
    )


def test_attention_couple_of_prompt_control(peer, sd15, by_hand, rows):
    """On the prompt, by hooks: the node's order on the model has nothing to do with it."""
    positive = couple_of_prompt_control(peer)
    alone, evaluations = rows.of(lambda: tiny.sample(sd15, positive))
    ours, counted = rows.of(lambda: tiny.sample(apply(sd15), positive))
    assert counted == evaluations and counted
    assert relative(ours, tiny.sample(by_hand, positive)) < SAME
    assert relative(ours, alone) > CHANGED
    assert relative(ours, tiny.sample(apply(sd15))) > CHANGED


def halves(sample) -> None:
    """Positive and negative alone: other images than both and than none, and than each other."""
    images = [sample(role) for role in ("both", "positive", "negative", None)]
    for i, image in enumerate(images):
        assert all(relative(image, other) > CHANGED for other in images[:i])


def test_apply_to_one_prompt_where_the_pack_marks_its_rows(peer, sd15):
    patch = ppm(peer)
    halves(lambda role: tiny.sample(patch(sd15) if role is None else apply(patch(sd15), apply_to=role)))
    positive = couple_of_prompt_control(peer)
    halves(lambda role: tiny.sample(sd15 if role is None else apply(sd15, apply_to=role), positive))


def test_apply_to_one_prompt_is_refused_where_it_does_not(peer, sd15):
    with pytest.raises(RuntimeError, match="Attention Couple.*Set apply_to to both"):
        tiny.sample(apply(cgem156(peer)(sd15), apply_to="positive"))


def test_negative_weights_of_ppm(peer, sd15, by_hand, rows):
    """NegPip: the prompt holds keys and values in turns, its patch parts them."""
    negpip = peer("ComfyUI-ppm", "src.negpip.unet_negpip").sdxl_attn2_negpip

    def patch(model):
        model = model.clone()
        model.set_model_attn2_patch(negpip)
        return model

    def sample(model):
        return tiny.sample(model, tiny.prompt(11, 154), tiny.prompt(12, 154))

    check(patch, sd15, by_hand, rows, sample)


def test_attention_couple_in_a_transformer(peer):
    family = families.BY_NAME["Anima"]
    try:
        node = peer("ComfyUI-ppm", "src.nodes_ppm.attention_couple_ppm").AttentionCouplePPM
    except ImportError as error:
        pytest.skip(f"this ComfyUI-ppm does not load on this ComfyUI: {error}")
    base, other = masks()

    def patch(model):
        return node.execute(
            model=model, base_cond=families.prompt(family, 11), base_mask=base, cond_1=families.prompt(family, 21),
            mask_1=other,
        ).result[0]  # fmt: skip

    model = families.patcher(family)
    before, after = (families.sample(m, family) for m in (patch(apply(model)), apply(patch(model))))
    assert torch.equal(before, after)
    assert relative(before, families.sample(patch(model), family)) > CHANGED
    assert relative(before, families.sample(apply(model), family)) > CHANGED
    with pytest.raises(RuntimeError, match="Attention Couple.*Set apply_to to both"):
        families.sample(apply(patch(model), apply_to="positive"), family)


def nag_guider(peer, model, conditioning=POSITIVE, negative=NEGATIVE, latent=(1, 4, 8, 8)):
    # its part for Chroma does not load on every ComfyUI
    node = peer("ComfyUI-NAG", "node", (".chroma", ".chroma.model")).NAGCFGGuider
    return run_class(
        node, model=model, positive=conditioning, negative=negative, nag_negative=negative,
        latent_image={"samples": torch.zeros(latent)}, cfg=4.0,
    )  # fmt: skip


def test_the_samplers_of_comfyui_nag_are_refused_on_a_unet(peer):
    """It appends its prompt to the context inside the model, past which no attention replacement can see."""
    guider = nag_guider(peer, apply(tiny.patcher()))
    noise = torch.randn(1, 4, 8, 8)
    with pytest.raises(RuntimeError, match="ComfyUI-NAG.*or remove Apply PLADIS"):
        guider.sample(noise, noise * 0.0, comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 0.0]),
                      disable_pbar=True, seed=1)  # fmt: skip


@pytest.mark.parametrize("name", ("SD3", "Wan 2.1 T2V"))
def test_the_samplers_of_comfyui_nag_are_refused_on_a_transformer(peer, name):
    """Its blocks have attention of their own, past everything: the run stops in its first step, and says who."""
    family = families.BY_NAME[name]
    prompts = families.prompt(family, 11), families.prompt(family, 12)
    noise = families.noise(family)

    def sample(model):
        guider = nag_guider(peer, model, *prompts, noise.shape)
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, noise * 0.0, sampler, sigmas, disable_pbar=True, seed=1)

    assert sample(families.patcher(family)).isfinite().all()
    with pytest.raises(RuntimeError, match="reached none.*NAG.*Normalized Attention Guidance"):
        sample(apply(families.patcher(family)))


def sage(peer, monkeypatch, calls: list):
    """KJNodes' node on a `sageattention` that is torch's attention and counts."""

    def sageattn(q, k, v, is_causal, attn_mask, tensor_layout):
        calls.append(q.shape)
        swap = (lambda t: t.transpose(1, 2)) if tensor_layout == "NHD" else (lambda t: t)
        q, k, v = (swap(t).contiguous() for t in (q, k, v))
        return swap(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask))

    module = types.ModuleType("sageattention")
    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    node = peer("ComfyUI-KJNodes", "nodes.model_optimization_nodes", ("cv2", "color_matcher")).PathchSageAttentionKJ
    return lambda model: run_class(node, model=model, sage_attention="auto")


def test_sage_attention_of_kjnodes(peer, monkeypatch, sd15, by_hand):
    calls = []
    patch = sage(peer, monkeypatch, calls)
    before = tiny.sample(patch(apply(sd15)), steps=1)
    # self- and cross-attention of all sixteen blocks
    assert len(calls) == 32
    after = tiny.sample(apply(patch(sd15)), steps=1)
    assert len(calls) == 64
    assert torch.equal(before, after)
    assert relative(before, tiny.sample(by_hand, steps=1)) < SAME


def test_sage_attention_of_kjnodes_in_a_transformer(peer, monkeypatch):
    family = families.BY_NAME["Flux.1"]
    calls = []
    patch = sage(peer, monkeypatch, calls)
    model = families.patcher(family)
    alone = families.sample(patch(model), family)
    count = len(calls)
    before, after = (families.sample(m, family) for m in (patch(apply(model)), apply(patch(model))))
    assert len(calls) == 3 * count > 0
    assert torch.equal(before, after)
    # it computes in half precision
    assert relative(before, families.sample(apply(model), family)) < 1e-2
    assert relative(before, alone) > 1e-2


@pytest.mark.parametrize("name", ("Wan 2.1 T2V", "Wan 2.1 I2V"))
def test_nag_for_wan_of_kjnodes(peer, name):
    """It replaces the forward of the text modules, within which PLADIS is on for the prompt and for what NAG adds."""
    family = families.BY_NAME[name]
    node = peer("ComfyUI-KJNodes", "nodes.model_optimization_nodes", ("cv2", "color_matcher")).WanVideoNAG

    def patch(model):
        return run_class(node, model=model, conditioning=families.prompt(family, 31))

    model = families.patcher(family)
    before, after = (families.sample(m, family) for m in (patch(apply(model)), apply(patch(model))))
    assert torch.equal(before, after)
    assert relative(before, families.sample(patch(model), family)) > CHANGED
    assert relative(before, families.sample(apply(model), family)) > CHANGED


def test_heat_maps_of_daam(peer, sd15, by_hand, rows):
    """Its own sampler node wires the hook last. Its maps are of the softmax; the image gets PLADIS."""
    module = peer("comfyui-daam", "src.comfyui_daam.daam.patcher.base_patcher", ("matplotlib", "matplotlib.pyplot"))
    seen = []

    def patch(model):
        model = model.clone()
        patcher = module.CrossAttentionPatcher(model, 64, 64, context_size=(77, 77))
        patcher.patch()
        seen.append(patcher)
        return model

    alone, evaluations = rows.of(lambda: tiny.sample(patch(sd15)))
    ours, counted = rows.of(lambda: tiny.sample(patch(apply(sd15))))
    expected, _ = rows.of(lambda: tiny.sample(correct_hooks(patch(by_hand))))
    assert counted == evaluations and counted
    assert relative(ours, expected) < SAME
    assert relative(ours, alone) > CHANGED
    positive, negative = seen[1].all_heat_maps
    assert len(positive) > 0 and len(negative) > 0
