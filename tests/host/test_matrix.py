"""Apply PLADIS before and after every patch of the host that a graph may hold, through the host's own nodes.

For every one the same must hold, and is measured: both orders give the same image; the network is evaluated as often,
on as many rows, as with the patch alone; the patch changes the image with PLADIS in it, and PLADIS the image with the
patch in it; and the image is that of the patch alone on a network into whose text attention PLADIS is written by hand.
The last one is what "nothing lost, nothing doubled" means, in the passes too that guidance adds.

TorchCompileModel is in test_compiled.py, regional prompts and foreign hooks are in test_composition.py, SEG (not in the
host) in test_peers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.t2i_adapter.adapter
import comfy.utils
import entmax
import folder_paths
import pytest
import torch

import families
import tiny
from graph import Rows, find_node, run_node
from pladis_pack.nodes.hosting import find_target
from tiny import NEGATIVE, POSITIVE, TEXT_WIDTH, apply

CPU = torch.device("cpu")
# quicker than SD 1.5 as it is: ten text attentions
SMALL = {
    "num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 4], "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1] * 6,
}  # fmt: skip
SAME, CHANGED = 1e-4, 1e-3
EXTRAS = "comfy_extras.nodes_"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Patch:
    """`model` patches MODEL, `prompts` the positive and negative CONDITIONING, `guider` makes another guider.

    Where `model` is left out there is one order only: the patch lies on another branch of the graph.
    """

    name: str
    model: Callable | None = None
    prompts: Callable = lambda positive, negative: (positive, negative)
    guider: Callable | None = None
    options: dict[str, Any] = field(default_factory=dict)
    # without motion modules the frames of a video are independent: what windows change is the evaluations
    changes_image: bool = True
    # SD 1.5 as it is fits no other layout's adapters
    small: bool = True

    def sample(self, model) -> torch.Tensor:
        positive, negative = self.prompts(POSITIVE, NEGATIVE)
        if self.guider is None:
            return tiny.sample(model, positive, negative, **self.options)
        return guided(self.guider(model, positive, negative))


def guided(guider) -> torch.Tensor:
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 5)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 2)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)


def extra(file: str, node: str, **inputs) -> Callable:
    """A node of comfy_extras that patches MODEL."""
    return lambda model: run_node(EXTRAS + file, node, model=model, **inputs)


def on_positive(patch: Callable) -> Callable:
    return lambda positive, negative: (patch(positive), negative)


def seeded(shape, seed: int, scale: float) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """Weights where the host's loaders look for them."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("loras", "hypernetworks"):
        folder_paths.add_model_folder_path(kind, str(folder))
    lora = {}
    for name, weight in tiny.patcher(**SMALL).model.state_dict().items():
        if "attn2.to_" in name and "out" not in name:
            path = name.removesuffix(".weight")
            lora[f"{path}.lora_up.weight"] = seeded((weight.shape[0], 2), len(lora), 0.3)
            lora[f"{path}.lora_down.weight"] = seeded((2, weight.shape[1]), len(lora), 0.3)
    comfy.utils.save_torch_file(lora, str(folder / "lora.safetensors"))
    layer = {"0.weight": seeded((TEXT_WIDTH, TEXT_WIDTH), 1, 0.2), "0.bias": torch.zeros(TEXT_WIDTH)}
    torch.save({TEXT_WIDTH: [layer, layer], 32: [
        {"0.weight": seeded((32, 32), 2, 0.2), "0.bias": torch.zeros(32)}] * 2}, folder / "hyper.pt")  # fmt: skip


def lora(model):
    return run_node("nodes", "LoraLoaderModelOnly", model=model, lora_name="lora.safetensors")


def hooked_lora(conditioning):
    hooks = run_node(EXTRAS + "hooks", "CreateHookLoraModelOnly", lora_name="lora.safetensors")
    return run_node(EXTRAS + "hooks", "ConditioningSetProperties", cond_NEW=conditioning, hooks=hooks)


def hypernetwork(model):
    return run_node(EXTRAS + "hypernetwork", "HypernetworkLoader", model=model, hypernetwork_name="hyper.pt")


def control(net) -> Callable:
    def patch(conditioning):
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
        return run_node(
            "nodes", "ControlNetApply", conditioning=conditioning, control_net=net(), image=hint, strength=1.0
        )

    return on_positive(patch)


def controlnet():
    net = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, model_channels=32, use_spatial_transformer=True, legacy=False,
        context_dim=TEXT_WIDTH, num_head_channels=16, dtype=torch.float64,
        transformer_depth_middle=1, **{**SMALL, "transformer_depth": [1, 1, 1]},
    )  # fmt: skip
    tiny.initialise(net)
    return comfy.controlnet.ControlNet(net, load_device=CPU, manual_cast_dtype=torch.float64)


def t2i_adapter():
    adapter = comfy.t2i_adapter.adapter.Adapter(
        cin=192, channels=[32, 64, 128, 128], nums_rb=2, ksize=1, sk=True, use_conv=False
    )
    tiny.initialise(adapter)
    return comfy.controlnet.load_t2i_adapter(adapter.state_dict())


def gligen(conditioning):
    modules = []
    for block in tiny.patcher(**SMALL).model.diffusion_model.modules():
        if isinstance(block, comfy.ldm.modules.attention.BasicTransformerBlock):
            width = block.norm2.weight.shape[0]
            modules.append(comfy.gligen.GatedSelfAttentionDense(width, TEXT_WIDTH, width // 16, 16))
    net = comfy.gligen.Gligen(modules, comfy.gligen.PositionNet(TEXT_WIDTH, TEXT_WIDTH), TEXT_WIDTH)
    tiny.initialise(net)
    model = comfy.model_patcher.ModelPatcher(net.double(), load_device=CPU, offload_device=CPU)
    clip = SimpleNamespace(
        tokenize=lambda text: text, encode_from_tokens=lambda *args, **kwargs: (None, seeded((1, TEXT_WIDTH), 4, 1.0))
    )
    return run_node(
        "nodes", "GLIGENTextBoxApply", conditioning_to=conditioning, clip=clip, gligen_textbox_model=model, text=""
    )


def areas(conditioning):
    left = run_node("nodes", "ConditioningSetArea", conditioning=tiny.prompt(21), width=64, height=64, x=0, y=0)
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1.0
    right = run_node("nodes", "ConditioningSetMask", conditioning=tiny.prompt(22), mask=mask, strength=0.8)
    both = run_node("nodes", "ConditioningCombine", conditioning_1=left, conditioning_2=right)
    return run_node("nodes", "ConditioningCombine", conditioning_1=conditioning, conditioning_2=both)


def scheduled(conditioning):
    early = run_node("nodes", "ConditioningSetTimestepRange", conditioning=conditioning, start=0.0, end=0.5)
    late = run_node("nodes", "ConditioningSetTimestepRange", conditioning=tiny.prompt(23), start=0.5, end=1.0)
    return run_node("nodes", "ConditioningCombine", conditioning_1=early, conditioning_2=late)


@cache
def other_checkpoint(by_hand: bool = False):
    model = tiny.patcher(**SMALL)
    if by_hand:
        tiny.write_pladis_into(model)
    for i, parameter in enumerate(model.model.diffusion_model.parameters()):
        parameter.data += seeded(parameter.shape, i, 0.05 if parameter.ndim > 1 else 0.0).to(parameter)
    return model


def merged(model):
    return run_node(EXTRAS + "model_merging", "ModelMergeSimple", model1=model, model2=other_checkpoint(), ratio=0.5)


def perp_neg_guider(model, positive, negative):
    return run_node(
        EXTRAS + "perpneg", "PerpNegGuider", model=model, positive=positive, negative=negative,
        empty_conditioning=tiny.prompt(31), cfg=4.0,
    )  # fmt: skip


def dual_cfg(style: str) -> Callable:
    return lambda model, positive, negative: run_node(
        EXTRAS + "custom_sampler", "DualCFGGuider", model=model, cond1=positive, cond2=tiny.prompt(31),
        negative=negative, cfg_conds=4.0, cfg_cond2_negative=2.0, style=style,
    )  # fmt: skip


SIZE_16, LONG = {"size": 16}, {"steps": 6}
PATCHES = (
    Patch("LoRA", lora),
    Patch("hypernetwork", hypernetwork),
    Patch("ControlNet", prompts=control(controlnet)),
    Patch("T2I-adapter", prompts=control(t2i_adapter), small=False),
    Patch("GLIGEN", prompts=on_positive(gligen)),
    Patch("areas and masks", prompts=on_positive(areas), options=SIZE_16),
    Patch("prompt scheduling", prompts=on_positive(scheduled), options=LONG),
    Patch("LoRA in hooks", prompts=on_positive(hooked_lora)),
    Patch("FreeU", extra("freelunch", "FreeU")),
    Patch("FreeU V2", extra("freelunch", "FreeU_V2"), options=SIZE_16),
    Patch("HyperTile", extra("hypertile", "HyperTile", tile_size=32)),
    Patch("ToMe", extra("tomesd", "TomePatchModel", ratio=0.5)),
    Patch("Deep Shrink", extra("model_downscale", "PatchModelAddDownscale"), options=SIZE_16),
    Patch("PAG", extra("pag", "PerturbedAttentionGuidance"), options=SIZE_16),
    # its blur wants the middle block to have some tokens
    Patch("SAG", extra("sag", "SelfAttentionGuidance"), options=SIZE_16),
    Patch("NAG", extra("nag", "NAGuidance")),
    Patch("APG", extra("apg", "APG", eta=0.5, norm_threshold=1.0, momentum=-0.5)),
    Patch("CFG-Zero*", extra("cfg", "CFGZeroStar")),
    Patch("CFGNorm", extra("cfg", "CFGNorm")),
    Patch("RescaleCFG", extra("model_advanced", "RescaleCFG")),
    Patch("Mahiro", extra("mahiro", "Mahiro")),
    Patch("TCFG", extra("tcfg", "TCFG")),
    Patch("FreSca", extra("fresca", "FreSca", freq_cutoff=2)),
    Patch("PerpNeg", lambda model: run_node(
        EXTRAS + "perpneg", "PerpNeg", model=model, empty_conditioning=tiny.prompt(31))),
    Patch("PerpNeg guider", guider=perp_neg_guider),
    Patch("DualCFG", guider=dual_cfg("regular")),
    Patch("DualCFG, nested", guider=dual_cfg("nested")),
    Patch("CFG Override", extra("custom_sampler", "CFGOverride", end_percent=0.5)),
    Patch("context windows", extra("context_windows", "ContextWindowsManualNode", context_length=4, context_overlap=2),
          options={"batch": 6}, changes_image=False),
    Patch("EasyCache", extra("easycache", "EasyCacheNode", reuse_threshold=3.0), options=LONG),
    Patch("LazyCache", extra("easycache", "LazyCacheNode", reuse_threshold=3.0), options=LONG),
    Patch("attention multiplied", extra("attention_multiply", "UNetCrossAttentionMultiply", q=1.5)),
    Patch("merged after the node", merged),
    Patch("ModelSamplingDiscrete, v", extra("model_advanced", "ModelSamplingDiscrete", sampling="v_prediction")),
    Patch("ModelSamplingDiscrete, zsnr", extra("model_advanced", "ModelSamplingDiscrete", sampling="eps", zsnr=True)),
    Patch("ModelSamplingContinuousEDM", extra("model_advanced", "ModelSamplingContinuousEDM", sampling="eps")),
    Patch("ModelSamplingContinuousV", extra("model_advanced", "ModelSamplingContinuousV")),
)  # fmt: skip


@cache
def checkpoint(by_hand: bool = False, small: bool = True):
    model = tiny.patcher(**SMALL) if small else tiny.patcher()
    return tiny.write_pladis_into(model) if by_hand else model


WITHOUT = {}


def without_patch(patch: Patch, rows: Rows) -> tuple[torch.Tensor, list[int]]:
    """PLADIS alone, under the options of a patch."""
    key = str((patch.options, patch.small))
    if key not in WITHOUT:
        plain = checkpoint(small=patch.small)
        WITHOUT[key] = rows.of(lambda: Patch("", options=patch.options).sample(apply(plain)))
    return WITHOUT[key]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_nothing_is_lost_or_doubled(patch, monkeypatch):
    rows = Rows(monkeypatch)
    plain, by_hand = checkpoint(small=patch.small), checkpoint(True, patch.small)
    patched = patch.model or (lambda model: model)
    alone, evaluations = rows.of(lambda: patch.sample(patched(plain)))
    expected, _ = rows.of(lambda: patch.sample(patched(by_hand)))
    without, rows_without = without_patch(patch, rows)
    ours = [rows.of(lambda: patch.sample(patched(apply(plain))))]
    if patch.model is not None:
        ours.append(rows.of(lambda: patch.sample(apply(patched(plain)))))
    for image, counted in ours:
        assert torch.equal(image, ours[0][0])
        assert counted == evaluations and counted
        assert relative(image, expected) < SAME
        assert relative(image, alone) > CHANGED
        if patch.changes_image:
            assert relative(image, without) > CHANGED
        else:
            assert counted != rows_without


PILE = (
    lora, hypernetwork, extra("freelunch", "FreeU"), extra("hypertile", "HyperTile", tile_size=64),
    extra("pag", "PerturbedAttentionGuidance"), extra("nag", "NAGuidance"), extra("model_advanced", "RescaleCFG"),
    extra("model_advanced", "ModelSamplingDiscrete", sampling="v_prediction"),
)  # fmt: skip


def test_anywhere_in_a_pile_of_patches():
    """Many at once, under a ControlNet and areas: the same image wherever in the chain the node stands."""

    def sample(model, place):
        for i, patch in enumerate(PILE):
            model = patch(apply(model) if i == place else model)
        model = apply(model) if place == len(PILE) else model
        positive, negative = areas(POSITIVE), NEGATIVE
        return tiny.sample(model, *control(controlnet)(positive, negative), size=16, steps=1)

    expected, alone = sample(checkpoint(True), None), sample(checkpoint(), None)
    first = sample(checkpoint(), 0)
    assert relative(first, expected) < SAME
    assert relative(first, alone) > CHANGED
    for place in (4, len(PILE)):
        assert torch.equal(sample(checkpoint(), place), first)


def test_the_second_model_of_a_merge_brings_its_weights_only():
    """As with every patch that is not a weight: the first model's count."""

    def merge(first, second):
        return tiny.sample(
            run_node(EXTRAS + "model_merging", "ModelMergeSimple", model1=first, model2=second, ratio=0.5)
        )

    model, other = checkpoint(), other_checkpoint()
    assert torch.equal(merge(model, apply(other)), merge(model, other))


def test_two_models_in_one_guider():
    """The host runs both passes under the options of the first model, so what counts is the node on that one."""

    def sample(model, negative_model):
        return guided(run_node(
            EXTRAS + "custom_sampler", "DualModelGuider", model=model, model_negative=negative_model,
            positive=POSITIVE, negative=NEGATIVE,
        ))  # fmt: skip

    model, other = checkpoint(), other_checkpoint()
    on_first = sample(apply(model), other)
    assert relative(on_first, sample(checkpoint(True), other_checkpoint(True))) < SAME
    assert relative(on_first, sample(model, other)) > CHANGED
    assert torch.equal(sample(model, apply(other)), sample(model, other))


@pytest.fixture
def two_devices(monkeypatch):
    """The CPU twice, for the host's MultiGPU CFG Split: the devices have two names, the work two threads."""
    if not hasattr(comfy.model_management, "get_all_torch_devices"):
        pytest.skip("this ComfyUI does not split work among GPUs")
    # the node does not expect entries of patchers that are gone
    monkeypatch.setattr(comfy.model_management, "current_loaded_models", [])
    devices = [CPU, torch.device("cpu", 1)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)


def split(model):
    return run_node(EXTRAS + "multigpu", "MultiGPUCFGSplitNode", model=model)


@pytest.mark.parametrize(
    "settings",
    ({}, {"apply_to": "positive"}, {"apply_to": "negative"}, {"tokens": "without start token"}),
    ids=("default", "positive", "negative", "tokens"),
)
def test_conditionings_split_among_gpus(two_devices, settings, monkeypatch):
    model = tiny.patcher(**SMALL)
    model.cached_patcher_init = (lambda: tiny.patcher(**SMALL), ())
    rows = Rows(monkeypatch)
    alone, evaluations = rows.of(lambda: tiny.sample(split(model)))
    assert evaluations == [1] * 4
    unsplit, _ = rows.of(lambda: tiny.sample(apply(model, **settings)))
    for patched in (split(apply(model, **settings)), apply(split(model), **settings)):
        image, counted = rows.of(lambda patched=patched: tiny.sample(patched))
        assert counted == evaluations
        assert relative(image, unsplit) < SAME
        assert relative(image, alone) > CHANGED


def test_the_split_on_one_device_is_the_model_itself():
    find_node(EXTRAS + "multigpu", "MultiGPUCFGSplitNode")
    model = checkpoint()
    assert torch.equal(tiny.sample(split(apply(model))), tiny.sample(apply(model)))


@dataclass(frozen=True)
class TransformerPatch:
    name: str
    family: str
    model: Callable
    steps: int = 2


TRANSFORMERS = (
    TransformerPatch("SLG, SD3", "SD3", extra("sd3", "SkipLayerGuidanceSD3", layers="0", start_percent=0.0)),
    TransformerPatch("SLG, Flux", "Flux.1", extra(
        "slg", "SkipLayerGuidanceDiT", double_layers="0", single_layers="1", start_percent=0.0, end_percent=1.0)),
    TransformerPatch("SLG simple, Flux", "Flux.1", extra(
        "slg", "SkipLayerGuidanceDiTSimple", double_layers="0", single_layers="1")),
    TransformerPatch("NAG, Flux", "Flux.1", extra("nag", "NAGuidance")),
    TransformerPatch("EasyCache, Flux", "Flux.1", extra("easycache", "EasyCacheNode", reuse_threshold=3.0), steps=6),
    TransformerPatch("APG, Flux", "Flux.1", extra("apg", "APG", eta=0.5, norm_threshold=0.1)),
    TransformerPatch("RescaleCFG, SD3", "SD3", extra("model_advanced", "RescaleCFG")),
    TransformerPatch("ModelSamplingSD3", "SD3", extra("model_advanced", "ModelSamplingSD3", shift=6.0)),
    TransformerPatch("ModelSamplingFlux", "Flux.1", extra("model_advanced", "ModelSamplingFlux", max_shift=3.0)),
)  # fmt: skip


def indices(spans: str) -> list[int]:
    return [i for span in spans.split() for i in range(*map(int, span.split(":")))]


def written_into_a_transformer(model, family):
    """PLADIS by hand, as an attention override: the image's queries on the text's keys, their softmax mass kept."""
    columns, rows = indices(family.columns), indices(family.rows)

    def override(function, q, k, v, heads, *args, **kwargs):
        if not kwargs.get("skip_reshape"):
            width = q.shape[-1] // heads
            q, k, v = (t.flatten(2).unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
        q, k, v = (t.double() for t in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights, text = scores.softmax(-1), scores[:, :, rows][..., columns]
        mass = weights[:, :, rows][..., columns].sum(-1, keepdim=True)
        for i, column in enumerate(columns):
            weights[:, :, rows, column] = (mass * (2 * entmax.entmax15(text, -1) - text.softmax(-1)))[..., i]
        return (weights @ v).float().transpose(1, 2).flatten(2)

    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("patch", TRANSFORMERS, ids=lambda patch: patch.name)
def test_nothing_is_lost_or_doubled_in_a_transformer(patch):
    family = families.BY_NAME[patch.family]
    plain = families.patcher(family)
    evaluations = []
    for layer in find_target(plain).layers:
        module = plain.model.diffusion_model.get_submodule(layer.path)
        module.register_forward_hook(lambda module, args, out, path=layer.path: evaluations.append(path))

    def sample(model):
        evaluations.clear()
        return families.sample(model, family, steps=patch.steps), list(evaluations)

    alone, expected_evaluations = sample(patch.model(plain))
    expected, _ = sample(patch.model(written_into_a_transformer(plain, family)))
    without, _ = sample(apply(plain))
    before, evaluations_before = sample(patch.model(apply(plain)))
    after, evaluations_after = sample(apply(patch.model(plain)))
    assert torch.equal(before, after)
    assert evaluations_before == evaluations_after == expected_evaluations and expected_evaluations
    assert relative(before, expected) < SAME
    assert relative(before, alone) > CHANGED
    assert relative(before, without) > CHANGED
