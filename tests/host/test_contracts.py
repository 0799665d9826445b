"""What the pack relies on in ComfyUI, a test for each fact: on a new ComfyUI, the name of the test that fails says
which fact is gone.

Nothing here runs the pack. Of it only the table of families is read, for the names of the host's that it holds.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import re
import sys
import types
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# main.py does so first: nodes.py puts comfy/ in front, where `utils` is something else
import utils.extra_config  # noqa: F401  # isort: skip
import comfy.conds
import comfy.context_windows
import comfy.diffusers_convert
import comfy.ldm.modules.attention as host_attention
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_torch_compile
import execution
import folder_paths
import pytest
import server
import torch
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_execution.graph_utils import GraphBuilder

import families
import nodes as host_nodes
import tiny
from pladis_pack.nodes.hosting.models.families import TABLE

OVERRIDE = "optimized_attention_override"
KINDS = ("outer_sample", "calc_cond_batch", "apply_model")
Container = getattr(host_attention, "AttentionTensorContainer", None)
has_containers = pytest.mark.skipif(Container is None, reason="this ComfyUI has no AttentionTensorContainer")
has_preferences = pytest.mark.skipif(
    not hasattr(host_attention, "ComfyAttention"), reason="this ComfyUI has no ComfyAttention"
)
has_grouped_heads = pytest.mark.skipif(
    not hasattr(comfy.ops, "repeat_kv_for_gqa"), reason="this ComfyUI's attention has neither enable_gqa nor scale"
)


@pytest.fixture(scope="module")
def sd15():
    return tiny.patcher("SD15")


@pytest.fixture(scope="module")
def flux():
    return families.patcher(families.BY_NAME["Flux.1"])


def evaluate(model, rows: int = 1, **options) -> torch.Tensor:
    """One model call of a small U-Net with these transformer_options."""
    random = families.source(2)
    context = random(rows, 7, tiny.TEXT_WIDTH)
    return model.model.apply_model(
        random(rows, 4, 8, 8), torch.ones(rows), c_crossattn=context, transformer_options=options
    )


def without_network(executor, x, *args, **kwargs):
    """An APPLY_MODEL wrapper: a run that costs nothing."""
    return torch.zeros_like(x)


def wrapped(model, key: str = "mine", **wrappers):
    """A clone with one wrapper of each kind that is named."""
    model = model.clone()
    for kind, wrapper in wrappers.items():
        model.add_wrapper_with_key(getattr(WrappersMP, kind.upper()), key, wrapper)
    return model


def noting(seen: list, what, go_on=lambda executor, *args, **kwargs: executor(*args, **kwargs)):
    """A wrapper that notes `what(*args)` of its arguments, or `what` itself."""

    def wrapper(executor, *args, **kwargs):
        seen.append(what(*args) if callable(what) else what)
        return go_on(executor, *args, **kwargs)

    return wrapper


# comfy/ldm/modules/attention.py: the blocks of a U-Net


def small_block(**layout) -> host_attention.BasicTransformerBlock:
    block = host_attention.BasicTransformerBlock(
        32, 2, 16, context_dim=tiny.TEXT_WIDTH, operations=comfy.ops.disable_weight_init, **layout
    )
    tiny.initialise(block)
    return block


def run_block(block, /, **options) -> torch.Tensor:
    random = families.source(2)
    return block(random(1, 5, 32), context=random(1, 7, tiny.TEXT_WIDTH), transformer_options=options)


def outputs_of(block, attention: str) -> dict[str, torch.Tensor]:
    """What the projections of a block's attention give, once it has run."""
    seen = {}
    for name in ("to_q", "to_k", "to_v"):
        module = block.get_submodule(f"{attention}.{name}")
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    return seen


class Hook:
    """A replacement hook that keeps its last arguments."""

    args: tuple = ()

    def __call__(self, q, k, v, extra_options):
        self.args = (q, k, v, extra_options)
        return q * 0.5


def test_a_replaced_attn2_gets_projected_q_k_v_of_all_heads():
    """comfy/ldm/modules/attention.py, BasicTransformerBlock.forward; roads/unet.py."""
    block, hook = small_block(), Hook()
    projected = outputs_of(block, "attn2")
    run_block(block, block=("input", 1), patches_replace={"attn2": {("input", 1): hook}})
    assert all(a is b for a, b in zip(hook.args, projected.values(), strict=False))
    assert [tuple(t.shape) for t in hook.args[:3]] == [(1, 5, 32), (1, 7, 32), (1, 7, 32)]


def test_what_a_hook_gives_goes_through_to_out():
    """comfy/ldm/modules/attention.py, BasicTransformerBlock.forward; roads/unet.py."""
    block, hook, seen = small_block(), Hook(), []
    block.attn2.to_out.register_forward_pre_hook(lambda module, args: seen.extend(args))
    run_block(block, block=("input", 1), patches_replace={"attn2": {("input", 1): hook}})
    assert torch.equal(seen[0], hook.args[0] * 0.5) and len(seen) == 1


def test_the_key_with_a_blocks_index_comes_before_the_key_without():
    """comfy/ldm/modules/attention.py, BasicTransformerBlock.forward; roads/unet.py, with_hooks."""
    for attention in ("attn1", "attn2"):
        exact, whole = Hook(), Hook()
        hooks = {("input", 1): whole, ("input", 1, 3): exact}
        place = {"block": ("input", 1), "patches_replace": {attention: hooks}}
        run_block(small_block(), block_index=3, **place)
        assert exact.args and not whole.args
        run_block(small_block(), block_index=2, **place)
        assert whole.args


def test_extra_options_are_the_transformer_options_without_patches_and_with_the_heads():
    """comfy/ldm/modules/attention.py, BasicTransformerBlock.forward; roads/unet.py, roads/compiled.py."""
    hook, mine = Hook(), object()
    block = small_block(attn_precision=torch.float32)
    run_block(block, block=("input", 1), mine=mine, patches={}, patches_replace={"attn2": {("input", 1): hook}})
    assert hook.args[3] == {
        "block": ("input", 1), "mine": mine, "n_heads": 2, "dim_head": 16, "attn_precision": torch.float32
    }
    assert (block.n_heads, block.d_head) == (2, 16)


def test_an_attn1_that_is_cross_attention_reads_the_text():
    """comfy/ldm/modules/attention.py, BasicTransformerBlock (X4 upscaler); models/layers.py, disable_self_attn."""
    block = small_block(disable_self_attn=True)
    projected = outputs_of(block, "attn1")
    run_block(block)
    assert block.disable_self_attn and projected["to_k"].shape == projected["to_v"].shape == (1, 7, 32)


def test_a_replaced_attn1_that_is_cross_attention_has_a_value_only_beside_an_attn1_patch():
    """comfy/ldm/modules/attention.py, BasicTransformerBlock.forward; roads/unet.py, _give_attn1_a_value."""
    block, hook = small_block(disable_self_attn=True), Hook()
    place = {"block": ("input", 1), "patches_replace": {"attn1": {("input", 1): hook}}}
    with pytest.raises((TypeError, AttributeError)):
        run_block(block, **place)
    run_block(block, **place, patches={"attn1_patch": [lambda n, context, value, extra_options: (n, context, value)]})
    assert hook.args[1].shape == hook.args[2].shape == (1, 7, 32)


def test_without_a_hook_a_block_calls_optimized_attention_with_its_options():
    """comfy/ldm/modules/attention.py, CrossAttention.forward; roads/unet.py, dense_attention."""
    calls = []

    def override(function, q, k, v, heads, **kwargs):
        calls.append((k.shape[1], heads, kwargs["attn_precision"], kwargs["transformer_options"]["mine"]))
        return function(q, k, v, heads, **kwargs)

    plain, block = run_block(small_block()), small_block()
    assert torch.equal(run_block(block, mine=3, **{OVERRIDE: override}), plain)
    assert calls == [(5, 2, None, 3), (7, 2, None, 3)]


# comfy/ldm/modules/diffusionmodules/openaimodel.py


def places(network):
    """The text attentions of a U-Net by their place in its lists."""
    parts = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    for part, blocks in parts.items():
        for number, block in enumerate(blocks):
            for transformer in block:
                for index, _ in enumerate(getattr(transformer, "transformer_blocks", ())):
                    yield part, number, index


def test_a_unets_slots_are_keyed_by_the_place_in_its_lists_and_run_in_their_order(sd15):
    """comfy/ldm/modules/diffusionmodules/openaimodel.py, UNetModel._forward; models/layers.py, _unet_layers."""
    ran, keys = [], list(places(sd15.model.diffusion_model))
    hooks = {key: lambda q, k, v, extra_options, key=key: ran.append(key) or q for key in keys}
    evaluate(sd15, patches_replace={"attn2": hooks})
    assert ran == keys and len(keys) == 16


def test_a_hook_is_told_its_block_the_size_of_the_picture_there_and_the_model_calls_batch(sd15):
    """comfy/ldm/modules/diffusionmodules/openaimodel.py, forward_timestep_embed; roads/unet.py, running.py."""
    seen = []

    def hook(q, k, v, extra_options):
        seen.append((extra_options["block"], extra_options["block_index"]))
        assert extra_options["cond_or_uncond"] == [0] and extra_options["sigmas"] is sigmas
        shape = extra_options["activations_shape"]
        assert isinstance(shape, list) and shape[0] == q.shape[0] and shape[-2] * shape[-1] == q.shape[1]
        return q

    keys, sigmas = list(places(sd15.model.diffusion_model)), torch.ones(1)
    evaluate(sd15, cond_or_uncond=[0], sigmas=sigmas, patches_replace={"attn2": dict.fromkeys(keys, hook)})
    assert seen == [(key[:2], key[2]) for key in keys]


# comfy/ldm/modules/attention.py: optimized_attention

B, H, D, LQ, LK = 2, 3, 8, 5, 7
# as read by every function of the host's
NAMED = ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch")


def heads_apart(kv_heads: int = H) -> tuple[torch.Tensor, ...]:
    """q, k and v as (B, H, L, D)."""
    random = families.source(3)
    return random(B, H, LQ, D), random(B, kv_heads, LK, D), random(B, kv_heads, LK, D)


def together(tensor: torch.Tensor) -> torch.Tensor:
    """(B, L, H * D)."""
    return tensor.transpose(1, 2).flatten(2)


def softmax_attention(q, k, v, mask=0.0, scale=D**-0.5) -> torch.Tensor:
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    return (q @ k.mT * scale + mask).softmax(-1) @ v


def assert_close(out, expected):
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_attention_is_softmax_attention_in_every_layout(name):
    """comfy/ldm/modules/attention.py, attention_*; roads/attention_call.py, read_host and SOFTMAX of transformer.py."""
    function, (q, k, v) = getattr(host_attention, name), heads_apart()
    expected = softmax_attention(q, k, v)
    assert_close(function(*map(together, (q, k, v)), H), together(expected))
    assert_close(function(q, k, v, H, skip_reshape=True), together(expected))
    assert_close(function(q, k, v, H, skip_reshape=True, skip_output_reshape=True), expected)
    assert_close(function(*map(together, (q, k, v)), H, skip_output_reshape=True), expected)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("shape", ((LQ, LK), (B, LQ, LK), (B, 1, LQ, LK), (B, H, LQ, LK)), ids=str)
def test_a_mask_has_two_three_or_four_dimensions_and_is_added(name, shape):
    """comfy/ldm/modules/attention.py, attention_*; roads/attention_call.py, _four_dimensions."""
    (q, k, v), mask = heads_apart(), families.source(4)(*shape)
    in_four = mask[:, None] if mask.ndim == 3 else mask
    out = getattr(host_attention, name)(*map(together, (q, k, v)), H, mask)
    assert_close(out, together(softmax_attention(q, k, v, in_four)))


def test_a_boolean_mask_is_true_where_keys_count():
    """comfy/ldm/modules/attention.py, attention_pytorch; roads/attention_call.py."""
    (q, k, v), mask = heads_apart(), torch.arange(LK) < 4
    out = host_attention.attention_pytorch(*map(together, (q, k, v)), H, mask.expand(LQ, LK))
    assert_close(out, together(softmax_attention(q, k[:, :, :4], v[:, :, :4])))


@has_grouped_heads
@pytest.mark.parametrize("name", NAMED)
def test_enable_gqa_shares_keys_among_neighbouring_heads(name):
    """comfy/ldm/modules/attention.py, attention_*; roads/attention_call.py, AttentionCall.grouped."""
    function, (q, k, v) = getattr(host_attention, name), heads_apart(kv_heads=1)
    expected = together(softmax_attention(q, k, v))
    assert_close(function(q, k, v, H, skip_reshape=True, enable_gqa=True), expected)
    assert_close(function(*map(together, (q, k, v)), H, enable_gqa=True), expected)


@has_grouped_heads
@pytest.mark.parametrize("name", NAMED)
def test_scale_takes_the_place_of_one_over_the_root_of_the_width(name):
    """comfy/ldm/modules/attention.py, attention_*; roads/attention_call.py, read_host."""
    q, k, v = heads_apart()
    out = getattr(host_attention, name)(q, k, v, H, skip_reshape=True, scale=0.1)
    assert_close(out, together(softmax_attention(q, k, v, scale=0.1)))


def test_a_value_may_have_its_heads_apart_behind_the_tokens():
    """comfy/ldm/modules/attention.py, for diffusionmodules/mmdit.py; roads/attention_call.py, read_host."""
    q, k, v = heads_apart()
    out = host_attention.optimized_attention(together(q), together(k), v.transpose(1, 2), H)
    assert_close(out, together(softmax_attention(q, k, v)))


def test_optimized_attention_is_one_of_the_named_functions():
    """comfy/ldm/modules/attention.py; roads/transformer.py, SOFTMAX and _host_functions, roads/direct.py."""
    chosen = host_attention.optimized_attention
    assert chosen is host_attention.optimized_attention_masked is getattr(host_attention, chosen.__name__)
    assert isinstance(chosen, types.FunctionType) and chosen.__name__ in NAMED


def test_an_override_gets_the_named_function_and_the_whole_call_with_its_options():
    """comfy/ldm/modules/attention.py, wrap_attn; roads/transformer.py, TextOverride."""
    q, k, v = map(together, heads_apart())
    seen, mask = [], torch.zeros(LQ, LK)
    options = {OVERRIDE: lambda function, *args, **kwargs: seen.append((function.__name__, args, kwargs)) or "out"}
    out = host_attention.optimized_attention(q, k, v, H, mask=mask, skip_reshape=False, transformer_options=options)
    ((name, args, kwargs),) = seen
    assert out == "out" and name == host_attention.optimized_attention.__name__
    assert all(a is b for a, b in zip(args, (q, k, v, H), strict=True))
    assert kwargs["mask"] is mask and kwargs["transformer_options"] is options and kwargs["skip_reshape"] is False


def test_the_function_that_an_override_gets_does_not_ask_it_again():
    """comfy/ldm/modules/attention.py, wrap_attn; roads/transformer.py, roads/unet.py."""
    calls, (q, k, v) = [], map(together, heads_apart())

    def override(function, *args, **kwargs):
        calls.append(1)
        # as named in the host, too
        again = host_attention.optimized_attention(*args, **kwargs)
        assert torch.equal(function(*args, **kwargs), again)
        return again

    host_attention.optimized_attention(q, k, v, H, transformer_options={OVERRIDE: override})
    assert calls == [1]


@has_containers
def test_a_container_can_be_looked_into_and_is_empty_once_taken():
    """comfy/ldm/modules/attention.py, AttentionTensorContainer; roads/attention_call.py."""
    tensor = torch.zeros(1)
    container = Container(tensor)
    assert container.peek() is container.peek() is tensor and container.take() is tensor
    for empty in (container.peek, container.take):
        with pytest.raises(RuntimeError):
            empty()


@has_containers
def test_attention_empties_the_containers_that_it_is_handed():
    """comfy/ldm/modules/attention.py, wrap_attn; roads/attention_call.py, taken_over."""
    tensors = heads_apart()
    containers = [Container(together(tensor)) for tensor in tensors]
    assert_close(host_attention.optimized_attention(*containers, H), together(softmax_attention(*tensors)))
    assert all(container.tensor is None for container in containers)


@has_containers
def test_an_override_gets_tensors_where_the_caller_has_containers():
    """comfy/ldm/modules/attention.py, wrap_attn; roads/transformer.py, TextOverride."""
    tensors = [together(tensor) for tensor in heads_apart()]
    options = {OVERRIDE: lambda function, *args, **kwargs: args[:3]}
    got = host_attention.optimized_attention(*map(Container, tensors), H, transformer_options=options)
    assert all(a is b for a, b in zip(got, tensors, strict=True))


@has_containers
def test_containers_are_known_by_their_position_alone():
    """comfy/ldm/modules/attention.py, wrap_attn; roads/attention_call.py, taken_over."""
    q, k, v = (Container(together(tensor)) for tensor in heads_apart())
    with pytest.raises(AttributeError):
        host_attention.attention_pytorch(q=q, k=k, v=v, heads=H)


@has_preferences
def test_a_preferred_kernel_is_asked_with_containers_where_no_override_is():
    """comfy/ldm/modules/attention.py, wrap_attn and ComfyAttention; roads/preferred.py."""
    preference, tensors = host_attention.ComfyAttention(), [together(tensor) for tensor in heads_apart()]
    preference.function = lambda *args, **kwargs: [type(arg) for arg in args[:3]]

    def attend(**options):
        containers = map(Container, tensors)
        return host_attention.optimized_attention(
            *containers, H, preferred_attention=preference, transformer_options=options
        )

    assert attend() == [Container] * 3
    assert attend(**{OVERRIDE: lambda *args, **kwargs: "override"}) == "override"
    preference.function = None
    assert_close(attend(), together(softmax_attention(*heads_apart())))


@has_preferences
def test_an_attention_module_asks_the_preference_that_is_in_it():
    """comfy/ldm/modules/attention.py, CrossAttention.forward; roads/preferred.py, preferences."""
    block, asked = small_block(), []
    (preference,) = [m for m in block.attn2.modules() if isinstance(m, host_attention.ComfyAttention)]
    assert preference.function is None
    preference.function = lambda *args, **kwargs: (
        asked.append(1) or host_attention.optimized_attention(*args, **kwargs)
    )
    run_block(block)
    assert asked == [1]


@has_preferences
def test_a_loras_config_puts_another_preference_in_place_as_an_object_patch(sd15):
    """comfy/model_patcher.py, add_patches; roads/preferred.py, which looks a preference up by its path."""
    path, preference = next(
        (name, module) for name, module in sd15.model.named_modules()
        if isinstance(module, host_attention.ComfyAttention)
    )  # fmt: skip
    model, config = sd15.clone(), torch.tensor(list(b"[]"), dtype=torch.uint8)
    model.add_patches({f"{path}.config": ("config", (config,))})
    assert type(model.object_patches[path]) is type(preference) and model.object_patches[path] is not preference
    assert sd15.model.get_submodule(path) is preference


# comfy/ldm: names of the host's attention in modules that hand it no options, by a family that they are in

DIVERTED = {
    "comfy.ldm.qwen_image21.model": "Qwen-Image 2.1", "comfy.ldm.ernie.model": "ERNIE-Image",
    "comfy.ldm.pixart.blocks": "PixArt Sigma", "comfy.ldm.hydit.attn_layers": "HunyuanDiT",
    "comfy.ldm.ace.ace_step15": "ACE-Step 1.5",
}  # fmt: skip


@pytest.mark.parametrize(
    "diverted", [d for row in TABLE for d in row.diverted if d.module.startswith("comfy.")], ids=lambda d: d.module
)
def test_a_module_calls_attention_by_its_own_name_for_it(diverted, monkeypatch):
    """comfy/ldm/pixart/blocks.py and others; models/families.py, Diverted, running.py, Diversion."""
    family, calls = families.BY_NAME[DIVERTED[diverted.module]], []
    model, module = families.patcher(family), importlib.import_module(diverted.module)
    function = getattr(module, diverted.name)
    assert function is getattr(host_attention, diverted.name)

    def stand_in(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, diverted.name, stand_in)
    families.sample(model, family)
    assert calls


# comfy/ldm: networks of the table. The first fixture of every configuration that this ComfyUI has


@dataclass
class NetworkRun:
    """A family's network, its row of the table, and what its text modules and apply_model were called with."""

    family: families.Family
    network: torch.nn.Module
    row: Any
    called: dict[str, dict[str, Any]] = field(default_factory=dict)
    arguments: set[str] = field(default_factory=set)

    @property
    def expected(self) -> list[str]:
        patterns = self.row.modules
        return [path for path, _ in self.network.named_modules() if any(_fits(path, p) for p in patterns)]


def _fits(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) and path.count(".") == pattern.count(".")


FIRST = [family.name for family in {family.config: family for family in reversed(families.FAMILIES)}.values()]
TOLD_OPTIONS = [name for name in FIRST if families.BY_NAME[name].reached and not families.BY_NAME[name].diverted]
IMG_SLICE = ["Flux.1", "Flux.2", "LongCat-Image", "Chroma", "Chroma Radiance", "HunyuanVideo", "HunyuanVideo 1.5"]
# what apply_model is given by name
ARGUMENTS = {
    "Flux.1 Kontext": "ref_latents", "Z-Image Omni": "ref_latents",
    "HunyuanVideo 1.5": "clip_fea txt_byt5", "HunyuanCustom": "ref_latent",
    "HiDream E1": "image_cond encoder_hidden_states_llama3", "Mochi": "num_tokens", "MiniMax H3": "latent_shapes",
    "Stable Cascade C": "clip_text clip_text_pooled clip_img", "Stable Cascade B": "clip",
    "Wan 2.1 reference": "reference_latent", "Qwen-Image 2.1 edit, between": "ref_latents image_slots",
    "Ming-Image edit": "direct_context ref_frames",
}  # fmt: skip
TEXT_STREAM = [*IMG_SLICE, "AuraFlow", "Qwen-Image", "MageFlow", "CogVideoX"]


@pytest.fixture(scope="module")
def network_run(request):
    family = families.BY_NAME[request.param]
    model = families.patcher(family)
    network = model.model.diffusion_model
    names = [f"{c.__module__}.{c.__qualname__}" for c in type(network).__mro__]
    row = next((row for name in names for row in TABLE if name in row.classes), None)
    run = NetworkRun(family, network, row)

    def note(path):
        def hook(module, args, kwargs):
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
            # nested parameters, and options as they are now
            bound = {**bound, **bound.get("kwargs", {})}
            run.called[path] = {**bound, "transformer_options": dict(bound.get("transformer_options") or {})}

        return hook

    for path in run.expected if row is not None else ():
        network.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)

    def apply_model(executor, *args, **kwargs):
        run.arguments.update(kwargs)
        return executor(*args, **kwargs)

    families.sample(wrapped(model, apply_model=apply_model), family, cfg=1.0)
    return run


def of_families(names: list[str]):
    return pytest.mark.parametrize("network_run", names, indirect=True)


@of_families(FIRST)
def test_a_network_is_of_a_class_that_the_table_names(network_run):
    """comfy/supported_models.py, comfy/model_base.py; models/families.py, find_family."""
    assert network_run.row is not None, type(network_run.network)


@of_families(FIRST)
def test_text_modules_are_at_their_paths_and_called_as_modules(network_run):
    """comfy/ldm/*/model.py; models/families.py, Family.modules, running.py, hooked."""
    assert network_run.expected
    assert set(network_run.expected) == set(network_run.called) or network_run.row.experts and network_run.called


@of_families(TOLD_OPTIONS)
def test_text_modules_get_the_transformer_options(network_run):
    """comfy/ldm/*/model.py; handed.py, Handed.options, roads/transformer.py, enter_module."""
    assert all("sample_sigmas" in call["transformer_options"] for call in network_run.called.values())


@of_families(TEXT_STREAM)
def test_a_blocks_text_stream_is_in_the_parameter_that_the_table_names(network_run):
    """comfy/ldm/flux/layers.py and others; models/families.py, Family.text_tensor."""
    name = network_run.row.text_tensor
    lengths = {call[name].shape[1] for call in network_run.called.values() if name in call}
    assert lengths == {int(network_run.family.columns.rpartition(":")[2])}


@of_families(IMG_SLICE)
def test_img_slice_is_where_the_image_begins_and_how_long_the_row_is(network_run):
    """comfy/ldm/flux/model.py and others; models/families.py, Family.img_slice, roads/transformer.py, check_streams."""
    told = [call["transformer_options"].get("img_slice") for call in network_run.called.values()]
    start, stop = map(int, network_run.family.rows.split(":"))
    assert [start, stop] in told and all(slice in (None, [start, stop]) for slice in told)


@of_families(ARGUMENTS)
def test_extra_conds_are_keywords_of_apply_model(network_run):
    """comfy/model_base.py, extra_conds; models/spans.py, and wrappers.py, ApplyModel."""
    assert set(ARGUMENTS[network_run.family.name].split()) <= network_run.arguments


@of_families(["Wan 2.1 I2V"])
def test_wans_attention_to_pictures_is_told_how_much_of_its_context_is_picture(network_run):
    """comfy/ldm/wan/model.py, WanI2VCrossAttention; models/families.py, image_and_text_calls."""
    for path, call in network_run.called.items():
        assert call["context"].shape[1] == call["context_img_len"] + families.TOKENS
        assert hasattr(network_run.network.get_submodule(path), "k_img")


@pytest.mark.parametrize("name", ("Flux.1", "Qwen-Image", "MageFlow", "Krea 2", "Lens"))
def test_post_input_patches_get_both_streams_in_turn_and_give_what_the_blocks_get(name):
    """comfy/ldm/flux/model.py and others, forward; roads/streams.py."""
    family, seen = families.BY_NAME[name], []
    model = families.patcher(family)

    def double(streams):
        seen.append({stream: streams[stream].clone() for stream in ("img", "txt")})
        return {**streams, "img": streams["img"] * 2, "txt": streams["txt"] * 2}

    patched = model.clone()
    patched.model_options["transformer_options"]["patches"] = {"post_input": [double, double]}
    assert not torch.equal(families.sample(patched, family, cfg=1.0), families.sample(model, family, cfg=1.0))
    assert all(torch.equal(2 * first, second) for first, second in zip(seen[0].values(), seen[1].values(), strict=True))
    assert seen[0]["txt"].ndim == seen[0]["img"].ndim == 3 and len(seen) == 2


# comfy/patcher_extension.py


def test_an_executor_has_its_place_all_wrappers_the_original_and_its_object():
    """comfy/patcher_extension.py, WrapperExecutor; roads/compiled.py, _with_network."""
    thing, seen = object(), []

    def outer(executor, x):
        seen.append((executor.original, executor.class_obj, executor.wrappers, executor.idx))
        return executor(x + 1)

    def inner(executor, x):
        seen.append((executor.original, executor.class_obj, executor.wrappers, executor.idx))
        return executor(x * 2)

    def original(x):
        return x - 3

    assert WrapperExecutor.new_class_executor(original, thing, [outer, inner]).execute(4) == 7
    assert seen == [(original, thing, [outer, inner], 0), (original, thing, [outer, inner], 1)]
    # called, one calls the wrapper behind its own place
    assert WrapperExecutor(original, thing, [None, inner], 0)(4) == 5


# comfy/samplers.py and comfy/model_base.py: a run with two wrappers of every kind


@dataclass
class Call:
    kind: str
    key: str
    executor: WrapperExecutor
    args: tuple
    kwargs: dict[str, Any]


@pytest.fixture(scope="module")
def calls(sd15):
    """What wrappers of every kind are called with, two steps with CFG, two pictures in a batch."""
    seen, model = [], sd15

    def note(kind, key):
        def wrapper(executor, *args, **kwargs):
            seen.append(Call(kind, key, executor, args, kwargs))
            return executor(*args, **kwargs)

        return wrapper

    for key in ("first", "second"):
        model = wrapped(model, key, **{kind: note(kind, key) for kind in KINDS})
    tiny.sample(wrapped(model, "third", apply_model=without_network), batch=2)
    return seen


def of_kind(calls: list[Call], kind: str, key: str = "first") -> list[Call]:
    return [call for call in calls if (call.kind, call.key) == (kind, key)]


def test_the_wrapper_that_was_added_first_is_outermost(calls):
    """comfy/patcher_extension.py, get_all_wrappers; wrappers.py, _put_back."""
    for kind in KINDS:
        assert [call.key for call in calls if call.kind == kind][:2] == ["first", "second"]


def test_outer_sample_runs_once_around_both_other_kinds(calls):
    """comfy/samplers.py, CFGGuider.sample; wrappers.py, OuterSample."""
    kinds = [call.kind for call in calls if call.key == "first"]
    assert kinds == ["outer_sample", *["calc_cond_batch", "apply_model"] * 2]


def test_outer_sample_is_handed_its_guider_and_the_callback_in_sixth_place(calls):
    """comfy/samplers.py, CFGGuider.sample; wrappers.py, OuterSample."""
    (call,) = of_kind(calls, "outer_sample")
    noise, latent, sampler, sigmas, mask, callback, *_ = call.args
    guider = call.executor.class_obj
    assert isinstance(guider, comfy.samplers.CFGGuider) and guider.model_patcher.model is not None
    assert noise.shape == latent.shape == (2, 4, 8, 8) and len(sigmas) == 3 and hasattr(sampler, "sample")
    assert mask is None and callback is None


def test_calc_cond_batch_gets_model_conds_latent_noise_level_and_options_in_order(calls):
    """comfy/samplers.py, _calc_cond_batch_outer; wrappers.py, CalcCondBatch."""
    for call in of_kind(calls, "calc_cond_batch"):
        model, conds, x, timestep, model_options = call.args
        assert isinstance(model, comfy.model_base.BaseModel) and not call.kwargs and call.executor.class_obj is None
        # the positive first
        contexts = [group[0]["model_conds"]["c_crossattn"].cond for group in conds]
        assert torch.equal(contexts[0], tiny.POSITIVE[0][0]) and torch.equal(contexts[1], tiny.NEGATIVE[0][0])
        assert all("uuid" in group[0] for group in conds)
        assert x.shape[0] == len(timestep) == 2 and "transformer_options" in model_options


def test_apply_model_gets_six_arguments_by_position_and_its_base_model(calls):
    """comfy/model_base.py, BaseModel.apply_model; wrappers.py, ApplyModel, roads/compiled.py, _with_network."""
    for call in of_kind(calls, "apply_model"):
        x, t, c_concat, c_crossattn, control, options = call.args
        assert x.shape[0] == len(t) == c_crossattn.shape[0] == 4 and c_concat is None and control is None
        assert isinstance(call.executor.class_obj, comfy.model_base.BaseModel) and isinstance(options, dict)
        assert call.executor.original.__func__ is comfy.model_base.BaseModel._apply_model


def test_a_model_calls_rows_are_its_conditionings_in_order_each_as_many_as_sigmas(calls):
    """comfy/samplers.py, _calc_cond_batch; batch.py, read_batch."""
    prompts = [tiny.POSITIVE[0][0], tiny.NEGATIVE[0][0]]
    for call in of_kind(calls, "apply_model"):
        options = call.args[5]
        assert sorted(options["cond_or_uncond"]) == [0, 1] and options["sigmas"].numel() == 2
        for index, rows in zip(options["cond_or_uncond"], call.args[3].split(2), strict=True):
            assert torch.equal(rows, prompts[index].expand(2, -1, -1).to(rows))


def test_the_uuids_of_a_model_call_are_its_conditionings(calls):
    """comfy/samplers.py, _calc_cond_batch; batch.py, _chunks."""
    batches, model_calls = of_kind(calls, "calc_cond_batch"), of_kind(calls, "apply_model")
    for batch, call in zip(batches, model_calls, strict=True):
        options, conds = call.args[5], batch.args[1]
        assert options["uuids"] == [conds[index][0]["uuid"] for index in options["cond_or_uncond"]]


def test_a_model_call_is_told_the_noise_level_and_the_whole_schedule(calls):
    """comfy/samplers.py, inner_sample and _calc_cond_batch; batch.py, wrappers.py, ApplyModel._now."""
    schedule = of_kind(calls, "outer_sample")[0].args[3]
    for step, call in enumerate(of_kind(calls, "apply_model")):
        options = call.args[5]
        assert torch.equal(options["sample_sigmas"], schedule)
        assert (options["sigmas"] == schedule[step]).all() and (call.args[1] == schedule[step]).all()


def test_the_guider_has_the_very_conditionings_of_a_batch_by_name(sd15):
    """comfy/samplers.py, CFGGuider.predict_noise; batch.py, _role."""
    guiders, same = [], []

    def outer(executor, *args, **kwargs):
        guiders.append(executor.class_obj)
        return executor(*args, **kwargs)

    def batch(executor, model, conds, *args):
        named = guiders[0].conds
        same.append(conds[0] is named["positive"] and conds[1] is named["negative"])
        return executor(model, conds, *args)

    tiny.sample(wrapped(sd15, outer_sample=outer, calc_cond_batch=batch, apply_model=without_network), steps=1)
    assert same == [True]


def test_dual_cfg_puts_the_negative_first_and_names_it(sd15):
    """comfy_extras/nodes_custom_sampler.py, Guider_DualCFG; batch.py, _role."""
    seen = []
    model = wrapped(sd15, calc_cond_batch=noting(seen, lambda model, conds, *_: conds), apply_model=without_network)
    guider = custom_sampler.Guider_DualCFG(model)
    guider.set_conds(tiny.POSITIVE, tiny.prompt(13), tiny.NEGATIVE)
    guider.set_cfg(2.0, 3.0)
    latent = torch.zeros(1, 4, 8, 8)
    guider.sample(latent, latent, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]), disable_pbar=True)
    assert set(guider.original_conds) >= {"positive", "negative"} and len(seen[0]) == 3
    assert torch.equal(seen[0][0][0]["model_conds"]["c_crossattn"].cond, tiny.NEGATIVE[0][0])


def test_an_area_and_its_counterpart_on_the_other_side_share_a_uuid(sd15):
    """comfy/samplers.py, create_cond_with_same_area_if_none; batch.py, _chunks."""
    seen = []
    model = wrapped(sd15, calc_cond_batch=noting(seen, lambda model, conds, *_: conds), apply_model=without_network)
    tiny.sample(model, tiny.prompt(11, area=(4, 4, 0, 0)), steps=1)
    positive, negative = seen[0]
    assert positive[0]["uuid"] in [cond["uuid"] for cond in negative] and len(negative) == 2


def test_a_context_window_is_a_batch_of_its_own_with_its_own_sigmas(sd15):
    """comfy/context_windows.py, comfy/samplers.py, calc_cond_batch; batch.py, read_batch."""
    rows, batches = [], []
    model = wrapped(
        sd15, calc_cond_batch=noting(batches, lambda model, conds, x, *_: len(x)),
        apply_model=noting(rows, lambda *args: (len(args[0]), args[5]["sigmas"].numel()), without_network),
    )  # fmt: skip
    windows = comfy.context_windows
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        windows.get_matching_fuse_method(windows.ContextFuseMethods.FLAT), context_length=2, dim=0,
    )  # fmt: skip
    tiny.sample(model, steps=1, batch=4)
    assert len(batches) == 2 and max(batches) < 4 and rows == [(2 * batch, batch) for batch in batches]


def test_an_object_in_the_guiders_options_arrives_in_the_model_call_and_not_on_the_model(sd15):
    """comfy/samplers.py, CFGGuider.sample, comfy/utils.py, deepcopy_list_dict; wrappers.py, Context."""
    mine, got = object(), []

    def outer(executor, *args, **kwargs):
        executor.class_obj.model_options["transformer_options"]["mine"] = mine
        return executor(*args, **kwargs)

    model = wrapped(sd15, outer_sample=outer, apply_model=noting(got, lambda *args: args[5]["mine"], without_network))
    tiny.sample(model)
    assert got == [mine, mine] and "mine" not in model.model_options["transformer_options"]


def test_wrappers_are_looked_up_in_the_options_of_the_moment(sd15):
    """comfy/samplers.py, comfy/model_base.py: get_all_wrappers; wrappers.py, _put_back."""
    ran = []
    inner = noting(ran, "apply model", without_network)

    def batch(executor, model, conds, x, timestep, model_options):
        ran.append("batch")
        options = {**model_options["transformer_options"], "wrappers": {WrappersMP.APPLY_MODEL: {"late": [inner]}}}
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def outer(executor, *args, **kwargs):
        wrappers = executor.class_obj.model_options["transformer_options"]["wrappers"]
        wrappers.setdefault(WrappersMP.CALC_COND_BATCH, {})["late"] = [batch]
        return executor(*args, **kwargs)

    tiny.sample(wrapped(sd15, outer_sample=outer), steps=1)
    assert ran == ["batch", "apply model"]


def test_a_models_wrappers_are_in_its_options_by_kind_and_key(sd15):
    """comfy/sampler_helpers.py, prepare_model_patcher; wrappers.py, _put_back, suspects.py, roads/compiled.py."""
    seen = []
    wrapper = noting(seen, lambda *args: args[5]["wrappers"][WrappersMP.APPLY_MODEL]["mine"], without_network)
    tiny.sample(wrapped(sd15, apply_model=wrapper), steps=1)
    assert seen == [[wrapper]]


def test_what_one_model_call_writes_into_its_options_does_not_reach_the_next(sd15):
    """comfy/samplers.py, _calc_cond_batch; wrappers.py, roads/unet.py."""
    seen, model = [], sd15.clone()
    model.model_options["transformer_options"] = {"patches_replace": {"attn2": {}}, "patches": {"mine": []}}

    def write(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        seen.append((dict(options["patches_replace"]["attn2"]), list(options["patches"]["mine"]), "mine" in options))
        options["patches_replace"]["attn2"]["mine"] = options["mine"] = 1
        options["patches"]["mine"].append(1)
        return torch.zeros_like(x)

    tiny.sample(wrapped(model, apply_model=write))
    assert seen == [({}, [], False)] * 2


def test_a_step_is_called_back_once_behind_its_model_calls(sd15):
    """comfy/samplers.py, KSAMPLER.sample; wrappers.py, OuterSample, receipt.py."""
    events = []

    def outer(executor, noise, latent, sampler, sigmas, mask, callback, *rest, **kwargs):
        return executor(noise, latent, sampler, sigmas, mask, lambda *args: events.append("step"), *rest, **kwargs)

    inner = noting(events, "call", without_network)
    tiny.sample(wrapped(sd15, outer_sample=outer, apply_model=inner), steps=3)
    assert events == ["call", "step"] * 3


def test_at_cfg_one_the_negative_prompt_is_not_computed(sd15):
    """comfy/samplers.py, sampling_function; looking/attention_map.py, receipt.py."""
    seen = []
    note = noting(seen, lambda *args: args[5]["cond_or_uncond"], without_network)
    tiny.sample(wrapped(sd15, apply_model=note), cfg=1.0, steps=1)
    assert seen == [[0]]


def test_one_sigma_and_zero_are_one_model_call_at_that_sigma(sd15):
    """comfy/sample.py, sample_custom; looking/attention_map.py, watch_attention."""
    seen, latent = [], torch.zeros(1, 4, 8, 8)
    model = wrapped(sd15, apply_model=noting(seen, lambda x, t, *_: float(t), without_network))
    comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(latent, 3), 1.0, comfy.samplers.sampler_object("euler"),
        torch.tensor([2.5, 0.0]), tiny.POSITIVE, tiny.POSITIVE, latent, disable_pbar=True, seed=3,
    )  # fmt: skip
    assert seen == [2.5]


def test_the_network_is_called_as_a_module_once_in_a_model_call(sd15):
    """comfy/model_base.py, BaseModel._apply_model; running.py, evaluations."""
    ran = []
    handle = sd15.model.diffusion_model.register_forward_pre_hook(lambda module, args: ran.append(1))
    evaluate(sd15)
    handle.remove()
    assert ran == [1]


def test_a_view_of_a_base_model_runs_the_network_that_is_in_it(sd15):
    """comfy/model_base.py, BaseModel._apply_model; roads/compiled.py, _with_network."""
    view, ran = copy.copy(sd15.model), []
    view._modules = {**view._modules, "diffusion_model": lambda x, *args, **kwargs: ran.append(1) or x}
    apply_model = types.MethodType(comfy.model_base.BaseModel._apply_model, view)
    # what a network that is no module cannot tell
    view.get_dtype = lambda: torch.float32
    apply_model(torch.zeros(1, 4, 8, 8), torch.ones(1), c_crossattn=torch.zeros(1, 7, tiny.TEXT_WIDTH))
    assert ran == [1] and isinstance(sd15.model.diffusion_model, torch.nn.Module)


# comfy/samplers.py: single places in model_options


def test_a_function_around_the_model_call_stands_between_batch_and_apply_model(sd15):
    """comfy/samplers.py, _calc_cond_batch, model_function_wrapper; wrappers.py, Context.rearranged, suspects.py."""
    events, model = [], sd15.clone()

    def around(apply_model, arguments):
        events.append(sorted(arguments["cond_or_uncond"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(around)
    wrappers = {"calc_cond_batch": noting(events, "batch"), "apply_model": noting(events, "call", without_network)}
    tiny.sample(wrapped(model, **wrappers), steps=1)
    assert events == ["batch", [0, 1], "call"] and model.model_options["model_function_wrapper"] is around


def test_a_function_in_place_of_the_batch_decides_whether_our_wrappers_see_it(sd15):
    """comfy/samplers.py, sampling_function, sampler_calc_cond_batch_function; suspects.py, docs/composition.md."""
    events = []
    model = wrapped(sd15, calc_cond_batch=noting(events, "batch"), apply_model=without_network)

    def instead(args):
        events.append("instead")
        return comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    model.set_model_sampler_calc_cond_batch_function(instead)
    tiny.sample(model, steps=1)
    assert events == ["instead", "batch"]
    assert model.model_options["sampler_calc_cond_batch_function"] is instead


def test_guidance_hooks_are_gone_once_taken_out_of_the_models_options(sd15):
    """comfy/samplers.py, cfg_function; looking/attention_map.py, GUIDANCE_HOOKS, suspects.py."""
    ran, model = [], wrapped(sd15, apply_model=without_network)
    model.set_model_sampler_cfg_function(lambda args: ran.append("cfg") or args["cond"])
    model.set_model_sampler_pre_cfg_function(lambda args: ran.append("pre") or args["conds_out"])
    model.set_model_sampler_post_cfg_function(lambda args: ran.append("post") or args["denoised"])
    tiny.sample(model, steps=1)
    for hook in ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"):
        del model.model_options[hook]
    tiny.sample(model, steps=1)
    assert ran == ["pre", "cfg", "post"]


def test_a_prompts_range_of_the_schedule_has_both_its_ends():
    """comfy/samplers.py, get_area_and_mult; settings.py, Settings.covers_sigma."""
    cond = {"timestep_start": 5.0, "timestep_end": 2.0, "model_conds": {}, "uuid": None}
    inside = [
        comfy.samplers.get_area_and_mult(cond, torch.zeros(1, 4, 8, 8), torch.tensor([sigma])) is not None
        for sigma in (5.1, 5.0, 3.0, 2.0, 1.9)
    ]
    assert inside == [False, True, True, True, False]


# comfy/conds.py


def test_the_shorter_prompt_is_repeated_to_the_common_multiple():
    """comfy/conds.py, CONDCrossAttn; batch.py, Batch and repeat_mask."""
    short, long = torch.randn(1, 2, 4), torch.randn(1, 3, 4)
    first = comfy.conds.CONDCrossAttn(short)
    assert first.can_concat(comfy.conds.CONDCrossAttn(long))
    together = first.concat([comfy.conds.CONDCrossAttn(long)])
    assert torch.equal(together, torch.cat([short.repeat(1, 3, 1), long.repeat(1, 2, 1)]))


def test_prompts_whose_common_multiple_is_far_are_not_batched():
    """comfy/conds.py, CONDCrossAttn.can_concat; batch.py."""
    short, long = (comfy.conds.CONDCrossAttn(torch.zeros(1, length, 4)) for length in (7, 8))
    assert not short.can_concat(long)


def test_other_conditionings_of_other_lengths_are_not_batched():
    """comfy/conds.py, CONDRegular.can_concat; batch.py, roads/transformer.py."""
    short, long = (comfy.conds.CONDRegular(torch.zeros(1, length, 4)) for length in (2, 4))
    assert not short.can_concat(long) and short.can_concat(short)


# comfy/model_sampling.py


@pytest.mark.parametrize("name", (
    "ModelSamplingDiscrete", "ModelSamplingContinuousEDM", "ModelSamplingDiscreteFlow", "ModelSamplingFlux",
    "ModelSamplingCosmosRFlow", "StableCascadeSampling",
))  # fmt: skip
def test_percent_to_sigma_falls_from_above_all_sigmas_to_zero(name):
    """comfy/model_sampling.py, percent_to_sigma; settings.py, covers_sigma and percent_of, looking/attention_map.py."""
    sampling = getattr(comfy.model_sampling, name)()
    sigmas = [float(sampling.percent_to_sigma(percent)) for percent in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sigmas == sorted(sigmas, reverse=True) and len(set(sigmas)) == 5
    assert sigmas[0] >= float(sampling.sigma_max) > float(sampling.sigma_min) >= sigmas[-1] == 0.0


def test_a_flow_models_first_sigma_is_one_at_percent_zero(flux):
    """comfy/model_sampling.py, ModelSamplingFlux; settings.py, covers_sigma."""
    assert flux.get_model_object("model_sampling").percent_to_sigma(0.0) == 1.0


# comfy/model_patcher.py


def test_a_clone_shares_the_model_and_copies_wrappers_callbacks_and_options(sd15):
    """comfy/model_patcher.py, ModelPatcher.clone; wrappers.py, apply_settings."""
    first = wrapped(sd15, apply_model=without_network)
    first.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "mine", print)
    first.model_options["transformer_options"]["patches"] = {"kind": [1]}
    second = first.clone()
    assert second.model is first.model and second.get_wrappers(WrappersMP.APPLY_MODEL, "mine") == [without_network]
    second.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "mine")
    second.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, "mine")
    second.model_options["transformer_options"]["patches"]["kind"].append(2)
    assert first.get_wrappers(WrappersMP.APPLY_MODEL, "mine") == [without_network]
    assert first.get_callbacks(CallbacksMP.ON_PRE_RUN, "mine") == [print]
    assert first.model_options["transformer_options"]["patches"] == {"kind": [1]}
    assert not second.get_wrappers(WrappersMP.APPLY_MODEL, "mine")


def test_an_object_patch_is_the_model_object_and_runs_in_the_networks_place(sd15):
    """comfy/model_patcher.py, get_model_object and object_patches; models/target.py, suspects.py."""

    class Instead(torch.nn.Module):
        dtype = torch.float64

        def forward(self, x, *args, **kwargs):
            seen.append(model.model.diffusion_model is instead)
            return x

    seen, instead, model = [], Instead(), sd15.clone()
    network = model.get_model_object("diffusion_model")
    model.add_object_patch("diffusion_model", instead)
    assert model.get_model_object("diffusion_model") is model.object_patches["diffusion_model"] is instead
    tiny.sample(model, steps=1)
    tiny.sample(sd15, steps=1)
    assert seen == [True] and sd15.get_model_object("diffusion_model") is network is not instead


def test_a_run_calls_back_before_and_behind_it_with_the_model_that_runs(sd15):
    """comfy/model_patcher.py, pre_run and cleanup, comfy/samplers.py, outer_sample; wrappers.py, end_of_run."""
    events = []

    def outer(executor, *args, **kwargs):
        events.append(executor.class_obj.model_patcher)
        return executor(*args, **kwargs)

    batch = noting(events, lambda model, *_: model.current_patcher)
    model = wrapped(sd15, outer_sample=outer, calc_cond_batch=batch, apply_model=without_network)
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "mine", lambda *args: events.append(("before", *args)))
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "mine", lambda *args: events.append(("behind", *args)))
    tiny.sample(model, steps=1)
    assert events == [model, ("before", model), model, ("behind", model)]


def test_cleanup_is_called_behind_a_run_that_failed_while_its_error_passes(sd15):
    """comfy/samplers.py, CFGGuider.outer_sample; wrappers.py, end_of_run."""
    seen = []

    def inner(executor, x, *args, **kwargs):
        if not seen:
            raise RuntimeError("interrupted")
        return torch.zeros_like(x)

    model = wrapped(sd15, apply_model=inner)
    model.add_callback_with_key(CallbacksMP.ON_CLEANUP, "mine", lambda model: seen.append(sys.exc_info()[0]))
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny.sample(model, steps=1)
    tiny.sample(model, steps=1)
    assert seen == [RuntimeError, None]


def test_an_error_before_a_run_stops_it(sd15):
    """comfy/samplers.py, CFGGuider.outer_sample; wrappers.py, refuse_a_dropped_promise."""
    model = wrapped(sd15, apply_model=without_network)

    def refuse(model):
        raise RuntimeError("refused")

    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "mine", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        tiny.sample(model, steps=1)


class Factory:
    """A loader's factory, which gives a fresh small model."""

    def __init__(self):
        self.calls, self.made = [], tiny.patcher("SD15")

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.made

    def in_a_tuple(self, *args, **kwargs):
        return None, self(*args, **kwargs)


def test_a_copy_without_dynamic_vram_asks_the_loaders_factory_with_disable_dynamic(sd15, monkeypatch):
    """comfy/model_patcher.py, clone and cached_patcher_init; demo_model.py, load_unet."""
    model, factory = sd15.clone(), Factory()
    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    with pytest.raises(RuntimeError, match="cached_patcher_init"):
        model.clone(disable_dynamic=True)
    model.cached_patcher_init = (factory, ("name",))
    copied = model.clone(disable_dynamic=True)
    assert factory.calls == [(("name",), {"disable_dynamic": True})] and copied.model is factory.made.model
    assert model.clone().cached_patcher_init == (factory, ("name",)) and model.clone().model is sd15.model


@pytest.mark.skipif(
    "force_deepcopy" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters,
    reason="this ComfyUI's clone has no force_deepcopy",
)
def test_a_deep_copy_asks_the_loaders_factory_and_picks_by_its_third_entry(sd15):
    """comfy/model_patcher.py, clone and cached_patcher_init; demo_model.py."""
    model, factory = sd15.clone(), Factory()
    model.cached_patcher_init = (factory.in_a_tuple, ("name",), 1)
    copied = model.clone(force_deepcopy=True)
    assert factory.calls == [(("name",), {"disable_dynamic": True})] and copied.model is factory.made.model


@pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"), reason="this ComfyUI has no deepclone_multigpu"
)
def test_a_copy_for_another_gpu_asks_the_loaders_factory_with_its_arguments_alone(sd15):
    """comfy/model_patcher.py, deepclone_multigpu; demo_model.py, models/target.py, Target.on."""
    model, factory = wrapped(sd15, apply_model=without_network), Factory()
    model.cached_patcher_init = (factory, ("name",))
    copied = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert factory.calls == [(("name",), {})] and copied.model is factory.made.model
    assert copied.get_wrappers(WrappersMP.APPLY_MODEL, "mine") == [without_network]


# comfy_api/torch_helpers/torch_compile.py, comfy_extras/nodes_torch_compile.py


def test_a_compiled_network_stands_in_the_model_inside_of_the_wrapper_called_torch_compile(sd15):
    """comfy_api/torch_helpers/torch_compile.py; roads/compiled.py, wrappers.py, _put_back."""
    inside, model = [], sd15.clone()

    def look(executor, x, *args, **kwargs):
        inside.append(executor.class_obj.diffusion_model._orig_mod)
        return torch.zeros_like(x)

    set_torch_compile_wrapper(model=model, backend="eager", options={})
    assert len(model.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile")) == 1
    tiny.sample(wrapped(model, apply_model=look), steps=1)
    assert inside == [sd15.model.diffusion_model] and not hasattr(sd15.model.diffusion_model, "_orig_mod")


def test_the_arguments_of_torch_compile_are_in_the_models_options(sd15):
    """comfy_extras/nodes_torch_compile.py, TorchCompileModel; roads/compiled.py, run_unet."""
    node = comfy_extras.nodes_torch_compile.TorchCompileModel
    model = node.execute(sd15, "eager").result[0]
    arguments = model.model_options["torch_compile_kwargs"]
    assert set(arguments) == {"backend", "options", "mode", "fullgraph", "dynamic"} and arguments["backend"] == "eager"
    # torch takes the filter of guards out of the very dict
    assert set(arguments["options"]) <= {"guard_filter_fn"} and "torch_compile_kwargs" not in sd15.model_options


def test_compiled_code_goes_on_with_the_transformer_options_of_its_first_trace():
    """comfy_extras/nodes_torch_compile.py, skip_torch_compile_dict; roads/compiled.py."""

    def network(x, transformer_options):
        return x * transformer_options["scale"]

    torch._dynamo.reset()
    options = {"guard_filter_fn": comfy_extras.nodes_torch_compile.skip_torch_compile_dict}
    code = torch.compile(network, backend="eager", options=options)
    assert [float(code(torch.ones(1), transformer_options={"scale": scale})) for scale in (2.0, 3.0)] == [2.0, 2.0]
    torch._dynamo.reset()


# comfy/ops.py, comfy/model_prefetch.py


def test_the_order_of_torchs_kernels_is_a_list_for_queries_from_131072_elements():
    """comfy/ops.py, scaled_dot_product_attention (CUDA); roads/transformer.py, kernels_as_the_host_orders_them."""
    source = Path(comfy.ops.__file__).read_text()
    assert re.search(r"if q\.nelement\(\) < 1024 \* 128:", source)
    assert re.search(r"with sdpa_kernel\(SDPA_BACKEND_PRIORITY, set_priority=True\):", source)


def test_pausing_the_plan_of_a_models_memory_pauses_this_threads_and_resumes_it(monkeypatch):
    """comfy/model_prefetch.py, pause_malloc_graph; roads/transformer.py, outside_the_hosts_memory_plan."""
    prefetch = sys.modules.get("comfy.model_prefetch")
    if not hasattr(prefetch, "pause_malloc_graph"):
        pytest.skip("this ComfyUI has no comfy.model_prefetch.pause_malloc_graph")
    events = []
    graph = SimpleNamespace(_comfy_active=True, **{
        name: lambda name=name, **kwargs: events.append(name) for name in ("pause", "resume")
    })  # fmt: skip
    monkeypatch.setitem(prefetch.MALLOC_GRAPHS, prefetch.threading.get_ident(), graph)
    with prefetch.pause_malloc_graph():
        events.append("inside")
    assert events == ["pause", "inside", "resume"]


# comfy/utils.py, comfy/supported_models_base.py, comfy/diffusers_convert.py: what a loader needs


def test_unet_to_diffusers_names_every_weight_of_a_unet(sd15):
    """comfy/utils.py, unet_to_diffusers; demo_model.py, unet_names."""
    names = comfy.utils.unet_to_diffusers(sd15.model.model_config.unet_config)
    layer = "transformer_blocks.0.attn2.to_k.weight"
    assert names[f"down_blocks.0.attentions.0.{layer}"] == f"input_blocks.1.1.{layer}"
    assert set(names.values()) >= set(sd15.model.diffusion_model.state_dict())


def test_a_checkpoint_is_saved_under_three_prefixes():
    """comfy/model_base.py, state_dict_for_saving, comfy/supported_models_base.py, BASE; demo_model.py, SAVED_UNET."""
    model = SimpleNamespace(model_config=comfy.supported_models_base.BASE({}), model_type=None)
    saved = comfy.model_base.BaseModel.state_dict_for_saving(model, {"a": 1}, {"b": 2}, {"c": 3})
    assert saved == {"model.diffusion_model.a": 1, "cond_stage_model.b": 2, "first_stage_model.c": 3}


def test_state_dict_prefix_replace_renames_and_filters():
    """comfy/utils.py, state_dict_prefix_replace; demo_model.py, _read and load_vae."""
    weights = {"model.a": 1, "other.b": 2}
    assert comfy.utils.state_dict_prefix_replace(dict(weights), {"model.": "x."}) == {"x.a": 1, "other.b": 2}
    assert comfy.utils.state_dict_prefix_replace(dict(weights), {"model.": ""}, filter_keys=True) == {"a": 1}


def test_a_configuration_of_ones_own_builds_a_flow_model_that_loads_weights(sd15):
    """comfy/supported_models_base.py, BASE; demo_model.py, DemoConfig and load_unet."""

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config: dict = {}
        latent_format = comfy.latent_formats.SD15
        sampling_settings = {"shift": 1.0}
        supported_inference_dtypes = [torch.float32]

        def model_type(self, state_dict, prefix=""):
            return comfy.model_base.ModelType.FLOW

        def inpaint_model(self):
            return False

    config = Config(dict(sd15.model.model_config.unet_config))
    config.set_inference_dtype(torch.float32, None)
    model, weights = config.get_model({}, device=torch.device("cpu")), sd15.model.diffusion_model.state_dict()
    model.load_model_weights({key: value.float() for key, value in weights.items()}, "", assign=False)
    assert torch.equal(model.diffusion_model.out[2].weight, weights["out.2.weight"].float())
    assert model.model_sampling.percent_to_sigma(0.0) == 1.0 and model.diffusion_model.dtype == torch.float32


def test_a_vaes_levels_are_numbered_from_the_fourth_down():
    """comfy/diffusers_convert.py, convert_vae_state_dict; demo_model.py, load_vae."""
    weight = torch.zeros(1)
    names = ("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.1.resnets.0.conv1.weight")
    converted = comfy.diffusers_convert.convert_vae_state_dict(dict.fromkeys(names, weight))
    assert set(converted) == {"decoder.up.3.block.0.conv1.weight", "encoder.down.1.block.0.conv1.weight"}


def test_a_vae_is_built_by_the_layout_that_it_is_given():
    """comfy/sd.py, VAE; demo_model.py, load_vae."""
    layout = {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    config = {"params": {"ddconfig": layout, "embed_dim": 4}}
    vae = comfy.sd.VAE(sd={"decoder.conv_in.bias": torch.full((64,), 3.0)}, config=config, dtype=torch.float32)
    assert vae.first_stage_model.decoder.conv_in.bias.eq(3.0).all()
    vae.downscale_ratio = vae.upscale_ratio = 2
    assert vae.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 8, 8, 3)


# comfy/sd1_clip.py, comfy/sd.py: a text encoder

VOCABULARY = {"<start>": 0, "<end>": 1, "red": 2, "cat": 3}


class Words:
    """A tokenizer of transformers, as far as the host uses one."""

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls()

    def __call__(self, text):
        return {"input_ids": [0, *(VOCABULARY[word] for word in text.split()), 1]}

    def get_vocab(self):
        return VOCABULARY


class WordTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            tokenizer_path="", max_length=12, embedding_directory=embedding_directory, embedding_size=8,
            tokenizer_class=Words, tokenizer_data=tokenizer_data or {},
        )  # fmt: skip


class SmallTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=WordTokenizer
        )


class SmallTextModel(comfy.clip_model.CLIPTextModel):
    def __init__(self, size, dtype, device, operations):
        super().__init__(size, dtype, device, operations)
        self.set_input_embeddings(operations.Embedding(4, 8, dtype=dtype, device=device))


class SmallClipModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        size = {
            "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16,
            "hidden_act": "gelu", "eos_token_id": 1, "max_position_embeddings": 12, "num_positions": 12,
        }  # fmt: skip
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, max_length=12, textmodel_json_config=size,
            special_tokens={"start": 0, "end": 1, "pad": 1}, model_class=SmallTextModel, return_projected_pooled=False,
        )  # fmt: skip


class SmallClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=SmallClipModel)


def small_clip(weights) -> comfy.sd.CLIP:
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(SmallTokenizer, SmallClip), state_dict=weights,
        parameters=comfy.utils.calculate_parameters(weights), model_options={"dtype": torch.float32},
        disable_dynamic=True,
    )  # fmt: skip


def test_a_tokenizer_gives_chunks_of_tokens_with_weights_between_start_and_end():
    """comfy/sd1_clip.py, SDTokenizer and SD1Tokenizer; demo_model.py, looking/words.py, _rows."""
    (chunks,) = SmallTokenizer().tokenize_with_weights("red (cat:1.5)").values()
    assert [entry[:2] for entry in chunks[0]] == [(0, 1.0), (2, 1.0), (3, 1.5), *[(1, 1.0)] * 9]
    tokens = SmallTokenizer().tokenize_with_weights("red " * 11)
    assert list(tokens) == ["l"] and [len(chunk) for chunk in tokens["l"]] == [12, 12]


def test_a_text_encoder_of_ones_own_loads_its_weights_and_encodes():
    """comfy/sd1_clip.py, SDClipModel and SD1ClipModel, comfy/sd.py, CLIP; demo_model.py, load_clip."""
    name = "clip_l.transformer.text_model.embeddings.token_embedding.weight"
    model, random = SmallClip(dtype=torch.float32), families.source(6)
    weights = {key: random(*value.shape) for key, value in model.state_dict().items() if ".transformer." in key}
    clip = small_clip(weights)
    assert torch.equal(clip.cond_stage_model.state_dict()[name], weights[name])
    context = clip.encode_from_tokens_scheduled(clip.tokenize("red cat"))[0][0]
    assert context.shape == (1, 12, 8) and context.isfinite().all()
    assert not torch.equal(context, clip.encode_from_tokens_scheduled(clip.tokenize("cat red"))[0][0])


def test_of_several_encoders_clips_tokens_come_first():
    """comfy/text_encoders/sd3_clip.py, SD3ClipModel.encode_token_weights; looking/words.py, _offsets."""

    def encoder(tokens):
        out = torch.full((1, tokens, 4096), float(tokens)), torch.ones(1, 1)
        return SimpleNamespace(encode_token_weights=lambda pairs: out)

    model = SimpleNamespace(clip_l=encoder(3), clip_g=None, t5xxl=encoder(5), t5_attention_mask=False)
    tokens = {"l": [1], "g": [], "t5xxl": [1]}
    context = comfy.text_encoders.sd3_clip.SD3ClipModel.encode_token_weights(model, tokens)[0]
    assert context[0, :, 0].tolist() == [3.0] * 3 + [5.0] * 5


# folder_paths.py, comfy/sample.py, comfy/nested_tensor.py


def test_a_checkpoint_is_found_by_name_and_an_unknown_one_is_none(tmp_path, monkeypatch):
    """folder_paths.py; demo_model.py, saved_checkpoints and _read."""
    (tmp_path / "mine.safetensors").write_bytes(b"")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    assert folder_paths.get_filename_list("checkpoints") == ["mine.safetensors"]
    assert folder_paths.get_full_path("checkpoints", "mine.safetensors") == str(tmp_path / "mine.safetensors")
    assert folder_paths.get_full_path("checkpoints", "unet") is None


def test_an_empty_latent_takes_the_models_channels(flux):
    """comfy/sample.py, fix_empty_latent_channels; looking/attention_map.py."""
    assert comfy.sample.fix_empty_latent_channels(flux, torch.zeros(1, 4, 8, 8)).shape == (1, 16, 8, 8)


def test_a_nested_tensor_says_so_and_comes_apart():
    """comfy/nested_tensor.py; sampling.py, concatenate, looking/attention_map.py."""
    parts = [torch.zeros(1, 2, 3), torch.zeros(1, 5)]
    nested = NestedTensor(parts)
    assert nested.is_nested and not parts[0].is_nested
    assert [part.shape for part in nested.unbind()] == [part.shape for part in parts]


def test_ksampler_lists_samplers_and_schedulers_by_name():
    """comfy/samplers.py, KSampler; sampling.py, nodes/sweep.py."""
    sampling = comfy.model_sampling.ModelSamplingDiscrete()
    assert {"euler", "dpmpp_2m"} <= set(comfy.samplers.KSampler.SAMPLERS)
    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        assert comfy.samplers.calculate_sigmas(sampling, scheduler, 4)[-1] == 0.0


# comfy_api/latest, execution.py, comfy_execution: nodes in a graph

RAN = []


class Noted(io.ComfyNode):
    """Notes how it is run."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Noted", category="test", search_aliases=["other name"], hidden=[io.Hidden.unique_id],
            inputs=[
                io.Int.Input("number", default=1, advanced=True),
                io.Int.Input("link", raw_link=True, optional=True),
            ],
            outputs=[io.Int.Output()], not_idempotent=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, number, link=None):
        RAN.append((cls.hidden.unique_id, number, link))
        return io.NodeOutput(number + 1)


class Alike(io.ComfyNode):
    """Notes that it is run."""

    @classmethod
    def define_schema(cls):
        outputs = [io.Int.Output()]
        return io.Schema(node_id="Alike", category="test", inputs=[io.Int.Input("number")], outputs=outputs)

    @classmethod
    def execute(cls, number):
        RAN.append(number)
        return io.NodeOutput(number)


class Expanded(io.ComfyNode):
    """Becomes two Noted nodes, one behind the other."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Expanded", category="test", inputs=[io.Int.Input("number")], outputs=[io.Int.Output()],
            enable_expand=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, number):
        graph = GraphBuilder()
        first = graph.node("Noted", "named", number=number)
        second = graph.node("Noted", number=first.out(0))
        return io.NodeOutput(second.out(0), expand=graph.finalize())


class Shown(io.ComfyNode):
    """Shows something though it is in the middle of a graph."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Shown", category="test", inputs=[io.Int.Input("number")], outputs=[io.Int.Output()],
            has_intermediate_output=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, number):
        return io.NodeOutput(number, ui={"words": ["seen"]})


class Last(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("number"), io.Int.Input("other", optional=True)]
        return io.Schema(node_id="Last", category="test", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, number, other=None):
        RAN.append(("last", number))
        return io.NodeOutput()


class Graphs:
    """Runs graphs as the server does; `sent` is what the browser is told."""

    client_id = last_node_id = last_prompt_id = None

    def __init__(self):
        self.sent: list[tuple] = []
        self.executor = execution.PromptExecutor(self, cache_args={"ram": 0, "ram_inactive": 0, "lru": 0})

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data))

    def run(self, **graph):
        """Nodes by id, each a class with its inputs."""
        RAN.clear()
        self.sent.clear()
        prompt = {id: {"class_type": kind.__name__, "inputs": inputs} for id, (kind, inputs) in graph.items()}
        self.executor.execute(prompt, "prompt", {"client_id": "browser"}, ["last"])
        assert self.executor.success, self.executor.status_messages
        return list(RAN)


@pytest.fixture
def graphs(monkeypatch):
    for node in (Noted, Alike, Expanded, Shown, Last):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    return Graphs()


def test_a_node_is_told_its_own_id(graphs):
    """comfy_api/latest/_io.py, Hidden, execution.py; nodes/inputs.py, unique_id."""
    ran = graphs.run(mine=(Noted, {"number": 3}), last=(Last, {"number": ["mine", 0]}))
    assert ran == [("mine", 3, None), ("last", 4)]


def test_a_raw_link_comes_as_a_link_and_not_as_its_value(graphs):
    """comfy_api/latest/_io.py, raw_link, execution.py, get_input_data; nodes/sweep.py."""
    ran = graphs.run(
        first=(Alike, {"number": 7}), mine=(Noted, {"number": 3, "link": ["first", 0]}),
        last=(Last, {"number": ["mine", 0]}),
    )  # fmt: skip
    assert ("mine", 3, ["first", 0]) in ran


def test_nodes_with_equal_inputs_run_once_but_each_where_they_are_not_idempotent(graphs):
    """comfy_execution/caching.py; nodes/apply.py, not_idempotent."""
    for node, times in ((Alike, 1), (Noted, 2)):
        one, other = (node, {"number": 3}), (node, {"number": 3})
        ran = graphs.run(a=one, b=other, last=(Last, {"number": ["a", 0], "other": ["b", 0]}))
        assert len(ran) == times + 1


def test_a_node_becomes_the_graph_that_it_gives_whose_ids_have_dots(graphs):
    """comfy_execution/graph_utils.py, GraphBuilder, execution.py; nodes/sweep.py, nodes/inputs.py, unique_id."""
    graph = {"mine": (Expanded, {"number": 3}), "last": (Last, {"number": ["mine", 0]})}
    (first, *_), (second, number, _), last = graphs.run(**graph)
    assert number == 4 and last == ("last", 5)
    assert first.startswith("mine.") and first.endswith(".named") and second.startswith("mine.") and second != first
    # nothing changed: nothing runs, whatever place its nodes have
    assert graphs.run(**graph) == []


def test_a_part_of_an_expanded_graph_is_cached_by_its_own_id(graphs):
    """comfy_execution/caching.py; nodes/sweep.py, whose finished cells stay."""
    graphs.run(mine=(Expanded, {"number": 3}), last=(Last, {"number": ["mine", 0]}))
    ids = [entry[0] for entry in graphs.run(mine=(Expanded, {"number": 5}), last=(Last, {"number": ["mine", 0]}))]
    assert ids[0].endswith(".named") and len(ids) == 3


def test_what_a_node_in_the_middle_shows_comes_from_the_cache_too(graphs):
    """execution.py, has_intermediate_output; nodes/apply_advanced.py, which reports blocks to web/."""
    for number in (1, 2):
        graphs.run(
            mine=(Shown, {"number": 3}), other=(Alike, {"number": number}),
            last=(Last, {"number": ["mine", 0], "other": ["other", 0]}),
        )  # fmt: skip
        shown = [data["output"] for event, data in graphs.sent if event == "executed" and data["node"] == "mine"]
        assert {"words": ["seen"]} in shown


def test_the_browser_is_told_search_aliases_and_which_inputs_are_advanced():
    """comfy_api/latest/_io.py, Schema.get_v1_info; nodes/inputs.py."""
    schema = Noted.GET_SCHEMA()
    info = schema.get_v1_info(Noted)
    assert info.input["required"]["number"][1]["advanced"] is True
    assert info.search_aliases == ["other name"]


def test_packs_are_imported_under_their_folders_path(tmp_path, monkeypatch):
    """nodes.py, load_custom_node; suspects.py, pack_of."""
    pack = tmp_path / "custom_nodes" / "my.pack"
    pack.mkdir(parents=True)
    (pack / "__init__.py").write_text("class Mine: pass\nNODE_CLASS_MAPPINGS = {'Mine': Mine}\n")
    monkeypatch.setattr(host_nodes, "NODE_CLASS_MAPPINGS", dict(host_nodes.NODE_CLASS_MAPPINGS))
    assert asyncio.run(host_nodes.load_custom_node(str(pack)))
    name = host_nodes.NODE_CLASS_MAPPINGS["Mine"].__module__
    del sys.modules[name]
    assert name.replace("\\", "/").endswith("custom_nodes/my_x_pack")


# server.py


def test_words_go_to_a_node_in_one_browser():
    """server.py, PromptServer.send_progress_text; receipt.py, show_on_node."""
    sent = []
    here = SimpleNamespace(send_sync=lambda event, data, sid=None: sent.append((data, sid)))
    server.PromptServer.send_progress_text(here, "some words", "17", "browser")
    ((message, sid),) = sent
    assert sid == "browser" and message.endswith(b"17some words")


def test_the_server_that_runs_is_its_class_instance_and_knows_its_browser(monkeypatch):
    """server.py, PromptServer; receipt.py, show_on_node."""
    monkeypatch.setattr(server.PromptServer, "instance", None, raising=False)
    loop = asyncio.new_event_loop()
    running = server.PromptServer(loop)
    loop.close()
    assert server.PromptServer.instance is running and running.client_id is None
