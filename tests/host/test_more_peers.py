"""Beside real packs that take hold of a model elsewhere than in the place of a text attention's hook.

They replace the network or its class, run its blocks themselves, drop wrappers or batch otherwise. As in test_peers.py:
$PLADIS_PEERS/<the pack's name> is a checkout, "by hand" is a network into whose text attention PLADIS is written.
"""

from __future__ import annotations

import functools
import math
import sys
import types

import comfy.ldm.flux.layers
import comfy.ldm.lightricks.model
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import entmax
import pytest
import test_peers
import torch
from test_matrix import SMALL, written_into_a_transformer
from test_peers import CHANGED, SAME, check, relative
from torch import nn

import families
import tiny
from graph import run_class, run_node
from tiny import NEGATIVE, POSITIVE, apply

# assigned, as the tests' arguments of the same names would shadow an import
peer, rows = test_peers.peer, test_peers.rows
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small():
    return tiny.patcher(**SMALL)


@pytest.fixture(scope="module")
def by_hand():
    return tiny.write_pladis_into(tiny.patcher(**SMALL))


def both_orders(patch, model, sample) -> torch.Tensor:
    """The picture, which must be the same with the node first and with the pack first."""
    before, after = sample(patch(apply(model))), sample(apply(patch(model)))
    assert torch.equal(before, after)
    return before


def predictions(model, sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first step, for the positive and the negative prompt."""
    seen = []

    def record(args):
        seen.append((args["cond_denoised"], args["uncond_denoised"]))
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(record)
    # some draw numbers of their own
    torch.manual_seed(0)
    sample(model)
    return seen[0]


def check_one_prompt(patch, model, sample) -> None:
    """apply_to "positive", in both orders: the positive prediction is that of "both", the negative one the pack's."""
    none, both = predictions(patch(model), sample), predictions(apply(patch(model)), sample)
    assert all(relative(*pair) > CHANGED for pair in zip(both, none, strict=True))
    before, after = (
        predictions(ours, sample)
        for ours in (patch(apply(model, apply_to="positive")), apply(patch(model), apply_to="positive"))
    )
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert relative(before[0], both[0]) < SAME
    assert relative(before[1], none[1]) < SAME


def override_by_hand(family):
    """PLADIS written into an attention function: function(original, q, k, v, heads, ...)."""
    model = written_into_a_transformer(families.patcher(family), family)
    return model.model_options["transformer_options"]["optimized_attention_override"]


# BrushNet: its nodes replace every wrapper of two kinds that they find on the MODEL


def test_raunet_of_brushnet(peer, monkeypatch, rows):
    node = peer("ComfyUI-BrushNet", "raunet_nodes").RAUNet
    module = sys.modules["peer_ComfyUI_BrushNet.model_patch"]
    original = module.brushNet_out_sample_wrapper
    # it does not know this argument of newer ComfyUIs, which it could do without
    monkeypatch.setattr(
        module, "brushNet_out_sample_wrapper", lambda *args, latent_shapes=None, **kwargs: original(*args, **kwargs)
    )

    def patch(model):
        return run_class(node, model=model, du_end=1, xa_start=1, xa_end=2)

    plain, by_hand = tiny.patcher(), tiny.write_pladis_into(tiny.patcher())
    check(patch, plain, by_hand, rows, lambda model: tiny.sample(model, size=16))


# nunchaku: the network's own class is a subclass of the host's, with an attention of its own


def nunchaku(monkeypatch, **modules):
    """The external package, of which the pack needs little: quantised layers are layers here."""
    for name in ("", ".models", ".ops", ".caching", ".lora", ".lora.flux", *modules):
        name = f"nunchaku{name}"
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, members in modules.items():
        vars(sys.modules[f"nunchaku{name}"]).update(members)


class QuantisedLinear(nn.Linear):
    def __init__(self, inputs, outputs, bias=True, torch_dtype=None, device=None, **quantisation):
        super().__init__(inputs, outputs, bias, device, torch_dtype)


def nunchaku_qwen(peer, monkeypatch, family):
    def fused(x, first, second):
        return second(nn.functional.gelu(first(x), approximate="tanh"))

    nunchaku(monkeypatch, **{
        ".models.linear": {"SVDQW4A4Linear": QuantisedLinear, "AWQW4A16Linear": QuantisedLinear},
        ".models.utils": {"CPUOffloadManager": object},
        ".ops.fused": {"fused_gelu_mlp": fused},
    })  # fmt: skip
    # it asks for a stream to copy blocks on
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: None)
    pack = peer("ComfyUI-nunchaku", "model_base.qwenimage")
    layout = {**family.layout, "scale_shift": 0, "rank": 4, "precision": "int4"}
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **layout})
    config.unet_config.update(layout)
    config.set_inference_dtype(torch.float32, None)
    base = pack.NunchakuQwenImage(config, device="cpu")
    families.initialise(base)
    return comfy.model_patcher.ModelPatcher(base.eval(), load_device=CPU, offload_device=CPU)


def test_qwen_image_of_nunchaku(peer, monkeypatch):
    family = families.BY_NAME["Qwen-Image"]
    model = nunchaku_qwen(peer, monkeypatch, family)
    alone = families.sample(model, family)
    module = sys.modules[type(model.model.diffusion_model).__module__]
    with monkeypatch.context() as written:
        by_hand = functools.partial(override_by_hand(family), module.optimized_attention_masked)
        written.setattr(module, "optimized_attention_masked", by_hand)
        expected = families.sample(model, family)
    assert relative(expected, alone) > CHANGED
    assert relative(families.sample(apply(model), family), expected) < SAME
    assert torch.equal(families.sample(model, family), alone)
    check_one_prompt(lambda model: model, model, lambda model: families.sample(model, family))


def test_flux_of_nunchaku_is_refused_with_a_way_out(peer, monkeypatch):
    """Its attention is inside the library."""
    nunchaku(monkeypatch, **{
        "": {"NunchakuFluxTransformer2dModel": nn.Linear},
        ".caching.fbcache": {"cache_context": None, "create_cache_context": None},
        ".lora.flux.compose": {"compose_lora": None}, ".utils": {"load_state_dict_in_safetensors": None},
    })  # fmt: skip
    wrapper = peer("ComfyUI-nunchaku", "wrappers.flux").ComfyFluxWrapper
    model = families.patcher(families.BY_NAME["Flux.1"])
    model.model.diffusion_model = wrapper(nn.Linear(2, 2), config={})
    with pytest.raises(ValueError, match=r"(?s)nunchaku.*fp8 or GGUF"):
        apply(model)


# RES4LYF: its nodes change the class of the network and of its blocks while the model is loaded


@pytest.fixture
def res4lyf(peer, monkeypatch):
    # what it computes when wired it computes on a GPU, wherever the model is
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *args: tensor)

    def patch_of(node):
        # `server` holds the web server, which is not there
        node = getattr(peer("RES4LYF", "models", ("server",)), node)
        return lambda model: run_class(node, model=model)

    return patch_of


def first_and_again(patch, make, sample, alone) -> torch.Tensor:
    """In both orders, on a network with the host's classes and then, as it stays loaded, on one with the pack's."""
    model = make()
    before = patch(apply(model))
    images = [sample(before), sample(before)]
    assert type(model.model.diffusion_model).__module__.startswith("peer_RES4LYF")
    model = make()
    after = patch(model)
    images += [sample(apply(after)), sample(apply(after))]
    assert torch.equal(sample(after), alone)
    assert all(torch.equal(image, images[0]) for image in images)
    return images[0]


def test_the_unet_of_res4lyf(res4lyf):
    patch = res4lyf("ReSDPatcher")

    def by_hand():
        model = tiny.write_pladis_into(tiny.patcher(**SMALL))
        for block in model.model.diffusion_model.modules():
            if hasattr(block, "attn2"):
                block.attn2.forward = without_style(block.attn2.forward)
        return model

    def without_style(forward):
        return lambda *args, style_block=None, **kwargs: forward(*args, **kwargs)

    alone, expected = tiny.sample(patch(tiny.patcher(**SMALL))), tiny.sample(patch(by_hand()))
    assert relative(expected, alone) > CHANGED
    ours = first_and_again(patch, lambda: tiny.patcher(**SMALL), tiny.sample, alone)
    assert relative(ours, expected) < SAME
    with pytest.raises(RuntimeError, match="Set apply_to to both"):
        tiny.sample(apply(patch(tiny.patcher(**SMALL)), apply_to="positive"))


# node: (family, module and name of the function that computes its text attention, number of its keys)
RES4LYF = {
    "ReWanPatcher": ("Wan 2.1 T2V", "wan.model", "optimized_attention", 7),
    "ReSD35Patcher": ("SD3", "sd35.mmdit", "optimized_attention", 23),
    "ReChromaPatcher": ("Chroma", "chroma.math", "attention_pytorch", 23),
    "ReAuraPatcher": ("AuraFlow", "aura.mmdit", "attention_pytorch", 31),
}


@pytest.mark.parametrize("name", RES4LYF)
def test_the_transformers_of_res4lyf(res4lyf, monkeypatch, name):
    """They run one prompt at a time within one model call, which leaves unsaid whose the row is."""
    family, module, function, keys = RES4LYF[name]
    family = families.BY_NAME[family]
    patch = res4lyf(name)

    def sample(model):
        return families.sample(model, family)

    override = override_by_hand(family)
    module = sys.modules[f"peer_RES4LYF.{module}"]
    original = getattr(module, function)

    def by_hand(q, k, *args, **kwargs):
        # others in the same module are of the image alone
        call = functools.partial(override, original) if k.shape[-2] == keys else original
        return call(q, k, *args, **kwargs)

    alone = sample(patch(families.patcher(family)))
    with monkeypatch.context() as written:
        written.setattr(module, function, by_hand)
        expected = sample(patch(families.patcher(family)))
    assert relative(expected, alone) > CHANGED
    ours = first_and_again(patch, lambda: families.patcher(family), sample, alone)
    assert relative(ours, expected) < SAME
    # wired once more while it is loaded; of a U-Net the pack's node then forgets some blocks, with or without PLADIS
    model = families.patcher(family)
    for order in (lambda: patch(apply(model)), lambda: apply(patch(model))) * 2:
        assert torch.equal(sample(order()), ours)
    with pytest.raises(RuntimeError, match="Set apply_to to both"):
        sample(apply(patch(model), apply_to="positive"))


# WaveSpeed: while the network runs, its list of blocks is one module that holds them all


def test_the_first_block_cache_of_wavespeed_on_hunyuan_video_is_refused(peer):
    """In its single blocks it puts the text behind the image, where ComfyUI has it in front, and does not say so."""
    family = families.BY_NAME["HunyuanVideo"]
    node = peer("Comfy-WaveSpeed", "fbcache_nodes").ApplyFBCacheOnModel
    model = families.patcher(family)

    def patch(model):
        return run_class(node, model=model, residual_diff_threshold=1e-9)

    assert families.sample(patch(model), family).isfinite().all()
    for patched in (patch(apply(model)), apply(patch(model))):
        with pytest.raises(RuntimeError, match="does not say where in its row the image is.*EasyCache"):
            families.sample(patched, family)


@pytest.mark.parametrize("name", ("SD3", "LTXV"))
def test_the_first_block_cache_of_wavespeed(peer, caplog, name):
    family = families.BY_NAME[name]
    node = peer("Comfy-WaveSpeed", "fbcache_nodes").ApplyFBCacheOnModel
    model = families.patcher(family)
    for threshold, exact in ((1e-9, True), (1e9, False)):

        def patch(model, threshold=threshold):
            return run_class(node, model=model, residual_diff_threshold=threshold)

        def sample(model):
            return families.sample(model, family, steps=4)

        # at the larger one, some steps are answered from the cache
        alone, plain = sample(patch(model)), sample(model)
        assert (relative(alone, plain) < SAME) == exact
        ours, without = both_orders(patch, model, sample), sample(apply(model))
        assert relative(ours, alone) > CHANGED
        assert (relative(ours, without) < SAME) == exact
        assert torch.equal(sample(patch(model)), alone)
    # not even of the steps from the cache
    assert "no text attention" not in caplog.text


# TeaCache: its own forward of the network hands the blocks no transformer_options


@pytest.fixture
def teacache(peer, monkeypatch):
    # gone from ComfyUI; it needs them for other families
    monkeypatch.setattr(comfy.ldm.flux.layers, "apply_mod", None, raising=False)
    monkeypatch.setattr(comfy.ldm.lightricks.model, "precompute_freqs_cis", None, raising=False)
    node = peer("ComfyUI-TeaCache", "nodes").TeaCache
    return lambda model, **inputs: run_class(
        node, model=model, model_type="wan2.1_t2v_1.3B", cache_device="cpu", **inputs
    )


@pytest.mark.parametrize("caching", (False, True))
def test_teacache(teacache, caplog, caching):
    family = families.BY_NAME["Wan 2.1 T2V"]
    model = families.patcher(family)
    inputs = {"rel_l1_thresh": 1e9} if caching else {"rel_l1_thresh": 0.01, "start_percent": 1.0}

    def patch(model):
        return teacache(model, **inputs)

    def sample(model):
        return families.sample(model, family, steps=4)

    alone, plain = sample(patch(model)), sample(model)
    assert (relative(alone, plain) < SAME) == (not caching)
    ours, without = both_orders(patch, model, sample), sample(apply(model))
    assert relative(ours, alone) > CHANGED
    assert (relative(ours, without) < SAME) == (not caching)
    assert torch.equal(sample(patch(model)), alone)
    assert "no text attention" not in caplog.text


# Advanced-ControlNet: it runs the network twice within a call, with blocks of its own


def reference_control(module):
    net = run_class(module.ReferenceControlNetNode, reference_type="reference_attn")
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return run_node(
        "nodes", "ControlNetApply", conditioning=POSITIVE, control_net=net, strength=1.0,
        image=module.ReferencePreprocWrapper(condhint=latent),
    )  # fmt: skip


def test_reference_attention_of_advanced_controlnet(peer, rows):
    """On the prompt: the node's order on the model has nothing to do with it."""
    # it counts on the layout of the real one
    plain, by_hand = tiny.patcher(), tiny.write_pladis_into(tiny.patcher())
    module = peer("ComfyUI-Advanced-ControlNet", "adv_control.nodes_reference")

    def sample(model):
        return rows.of(lambda: tiny.sample(model, reference_control(module)))

    alone, evaluations = sample(plain)
    ours, counted = sample(apply(plain))
    assert counted == evaluations and counted
    assert relative(alone, tiny.sample(plain)) > CHANGED
    assert relative(ours, sample(by_hand)[0]) < SAME
    assert relative(ours, alone) > CHANGED
    check_one_prompt(lambda model: model, plain, lambda model: tiny.sample(model, reference_control(module)))
    capped = sample(apply(plain, norm_cap=1.0))[0]
    assert relative(capped, ours) > CHANGED and relative(capped, alone) > CHANGED


# AnimateDiff-Evolved: windows of frames, each a batch of its own


def sliding_windows(peer):
    context = peer("ComfyUI-AnimateDiff-Evolved", "animatediff.nodes_context").StandardStaticContextOptionsNode
    node = peer("ComfyUI-AnimateDiff-Evolved", "animatediff.nodes_gen2").UseEvolvedSamplingNode

    def patch(model):
        options = run_class(context, context_length=4, context_overlap=2)
        return run_class(node, model=model, context_options=options)

    return patch


def frames(model, negative=NEGATIVE):
    return tiny.sample(model, negative=negative, batch=6)


def test_sliding_windows_of_animatediff_evolved(peer, small, by_hand, rows):
    """Without motion modules frames are independent: what windows change is the evaluations."""
    patch = sliding_windows(peer)
    alone, evaluations = rows.of(lambda: frames(patch(small)))
    assert evaluations == [8] * 4
    expected = frames(patch(by_hand))
    before, rows_before = rows.of(lambda: frames(patch(apply(small))))
    after, rows_after = rows.of(lambda: frames(apply(patch(small))))
    assert torch.equal(before, after)
    assert rows_before == rows_after == evaluations
    assert relative(before, expected) < SAME
    assert relative(before, alone) > CHANGED


def test_sliding_windows_and_one_prompt(peer, small, by_hand):
    """The host repeats the positive prompt to the length of the negative one; PLADIS counts its tokens once."""
    patch = sliding_windows(peer)

    def first_step(model, negative=77):
        return predictions(model, lambda model: frames(model, tiny.prompt(12, negative)))

    def positive(model):
        return apply(model, apply_to="positive")

    none, hand = first_step(patch(small), 154), first_step(patch(by_hand))
    assert relative(hand[0], none[0]) > CHANGED
    before, after = patch(positive(small)), positive(patch(small))
    assert torch.equal(frames(before), frames(after))
    for model in (before, after):
        ours = first_step(model, 154)
        assert relative(ours[0], hand[0]) < SAME
        assert relative(ours[1], none[1]) < SAME


# TiledDiffusion: several tiles a batch, each a copy of all conditionings


@pytest.fixture
def tiled(peer, monkeypatch):
    # what it replaces on import
    import comfy.gligen
    import comfy_extras.nodes_sag

    for owner, name in (
        (comfy.samplers.KSampler, "sample"), (comfy.samplers.KSAMPLER, "sample"),
        (comfy.samplers, "get_area_and_mult"), (comfy.samplers, "pre_run_control"),
        (comfy_extras.nodes_sag, "create_blur_map"), (comfy.gligen.Gligen, "_set_position"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))
    node = peer("ComfyUI-TiledDiffusion", "tiled_diffusion").TiledDiffusion

    def patch(model, batch=4):
        return run_class(
            node, model=model, method="MultiDiffusion", tile_width=64, tile_height=64, tile_overlap=32,
            tile_batch_size=batch,
        )  # fmt: skip

    return patch


def sample_large(model):
    return tiny.sample(model, size=16)


def test_tiled_diffusion(tiled, small, by_hand, rows):
    check(tiled, small, by_hand, rows, sample_large)


@pytest.mark.parametrize("batch", (1, 4))
def test_tiled_diffusion_and_one_prompt(tiled, small, rows, batch):
    check_one_prompt(lambda model: tiled(model, batch), small, sample_large)
    # of both prompts
    assert max(rows.seen) == (2 if batch == 1 else 6)


# ExtraModels: networks that are not the host's, whose text attention calls torch's on all prompts in one row


def timm(monkeypatch):
    """What its networks take from timm, with the names of their weights."""

    class Mlp(nn.Module):
        def __init__(self, in_features, hidden_features, out_features=None, act_layer=nn.GELU, drop=0.0):
            super().__init__()
            self.fc1 = nn.Linear(in_features, hidden_features)
            self.fc2 = nn.Linear(hidden_features, out_features or in_features)
            self.act = act_layer()

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    class Attention(nn.Module):
        def __init__(self, dim, num_heads=8, qkv_bias=False, **unused):
            super().__init__()
            self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
            self.qkv, self.proj = nn.Linear(dim, dim * 3, bias=qkv_bias), nn.Linear(dim, dim)
            self.attn_drop = self.proj_drop = nn.Dropout(0.0)

    class PatchEmbed(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
            super().__init__()
            self.num_patches = (img_size // patch_size) ** 2

    for name in ("", ".models", ".models.vision_transformer", ".models.layers"):
        monkeypatch.setitem(sys.modules, f"timm{name}", types.ModuleType(f"timm{name}"))
    members = {"Mlp": Mlp, "Attention": Attention, "PatchEmbed": PatchEmbed}
    vars(sys.modules["timm.models.vision_transformer"]).update(members)
    sys.modules["timm.models.layers"].DropPath = nn.Identity


EXTRA = {
    "Sana": ({
        "in_channels": 32, "depth": 2, "hidden_size": 64, "patch_size": 1, "num_heads": 4, "linear_head_dim": 16,
        "model_max_length": 12, "y_norm": True, "mlp_ratio": 2.5, "caption_channels": 24,
    }, 32),
    "PixArt": ({
        "input_size": 8, "depth": 2, "num_heads": 4, "hidden_size": 96, "caption_channels": 24, "model_max_length": 7,
        "micro_condition": False, "pe_interpolation": 1,
    }, 4),
}  # fmt: skip


def extra_model(peer, monkeypatch, name):
    timm(monkeypatch)
    loader = peer("ComfyUI_ExtraModels", f"{name}.loader")
    network = "sana_multi_scale.SanaMS" if name == "Sana" else "PixArtMS.PixArtMS"
    module, network = network.split(".")
    network = getattr(peer("ComfyUI_ExtraModels", f"{name}.models.{module}"), network)
    layout, _ = EXTRA[name]
    config = getattr(loader, f"EXM_{name}")({"unet_config": layout, "sampling_settings": {}})
    kind = config.model_type({})
    base = getattr(loader, f"EXM_{name}_Model")(config, model_type=kind, device=CPU)
    base.diffusion_model = network(**layout)
    families.initialise(base)
    return comfy.model_patcher.ModelPatcher(base.eval(), load_device=CPU, offload_device=CPU)


def extra_prompt(name, seed, tokens=7):
    context = torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(seed))
    if name == "Sana":
        # always all its tokens, zeros behind the prompt, and one more dimension
        context = nn.functional.pad(context, (0, 0, 0, 12 - tokens))[:, None]
    return [[context, {}]]


def write_into_extra_model(model):
    """Prompt by prompt, each on its own keys: those that the host repeats to a common length count once."""

    def forward(x, cond, mask=None, *, module):
        heads = (module.num_heads, module.head_dim)
        q = module.q_linear(x).unflatten(-1, heads).transpose(1, 2).double()
        outputs = []
        for i, tokens in enumerate(cond.view(len(x), -1, cond.shape[-1])):
            first, second = tokens.chunk(2) if len(tokens) % 2 == 0 else (tokens, None)
            own = first if second is not None and torch.allclose(first, second) else tokens
            k, v = module.kv_linear(own).unflatten(-1, (2, *heads)).double().unbind(1)
            scores = q[i] @ k.permute(1, 2, 0) / math.sqrt(module.head_dim)
            outputs.append((2 * entmax.entmax15(scores, -1) - scores.softmax(-1)) @ v.transpose(0, 1))
        return module.proj(torch.stack(outputs).transpose(1, 2).flatten(2).to(x))

    for module in model.model.diffusion_model.modules():
        if type(module).__name__ == "MultiHeadCrossAttention":
            module.forward = functools.partial(forward, module=module)
    return model


# prompts of two lengths: SANA reads every row by one of them
@pytest.mark.parametrize(("name", "lengths"), (("Sana", (7, 7)), ("PixArt", (7, 7)), ("PixArt", (7, 14))))
def test_sana_and_pixart_of_extramodels(peer, monkeypatch, name, lengths):
    model = extra_model(peer, monkeypatch, name)
    prompts = [extra_prompt(name, 11 + i, tokens) for i, tokens in enumerate(lengths)]
    noise = torch.randn(1, EXTRA[name][1], 8, 8, generator=torch.Generator().manual_seed(5))

    def sample(model):
        return tiny.sample(model, *prompts, noise=noise)

    alone, expected = sample(model), sample(write_into_extra_model(extra_model(peer, monkeypatch, name)))
    assert relative(expected, alone) > CHANGED
    assert relative(sample(apply(model)), expected) < SAME
    assert torch.equal(sample(model), alone)
    check_one_prompt(lambda model: model, model, sample)


# GGUF: layers that hold their weights quantised, and a patcher of its own


def in_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """Q8_0: of 32 numbers, their scale and a byte each."""
    blocks = weight.view(weight.shape[0], -1, 32)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (blocks / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], -1).flatten(1)


def test_gguf(peer, monkeypatch):
    family = families.BY_NAME["Flux.1"]
    nodes = peer("ComfyUI-GGUF", "nodes", ("gguf",))
    gguf, ops = sys.modules["gguf"], sys.modules["peer_ComfyUI_GGUF.ops"]
    kind = gguf.GGMLQuantizationType.Q8_0
    gguf.GGML_QUANT_SIZES = {kind: (32, 34)}
    weights = families.patcher(family).model.diffusion_model.state_dict()
    for name, weight in weights.items():
        quantised = weight.ndim == 2 and weight.shape[1] % 32 == 0
        if quantised:
            weights[name] = ops.GGMLTensor(in_8_bits(weight), tensor_type=kind, tensor_shape=weight.shape)
    config = comfy.supported_models.Flux({**comfy.supported_models.Flux.unet_config, **family.layout})
    config.unet_config.update(family.layout)
    config.custom_operations = ops.GGMLOps
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device="cpu")
    base.diffusion_model.load_state_dict(weights)
    plain = comfy.model_patcher.ModelPatcher(base.eval(), load_device=CPU, offload_device=CPU)
    model = nodes.GGUFModelPatcher.clone(plain)

    def sample(model):
        return families.sample(model, family)

    alone, ours = sample(model), sample(apply(model))
    assert relative(ours, sample(written_into_a_transformer(model, family))) < SAME
    assert relative(ours, alone) > CHANGED
