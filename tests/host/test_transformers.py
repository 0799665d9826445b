"""PLADIS in transformers beside other nodes: choice of layers and prompts, window, patches, threads, interruptions."""

from __future__ import annotations

import importlib
import inspect
import re
import threading

import comfy.ldm.pixart.blocks
import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import families
from pladis_pack.nodes.hosting import find_target, running
from pladis_pack.nodes.hosting.models.families import TABLE, UNSUPPORTED
from tiny import apply

# one of every way to the text: joint, cross, and past the override
NAMES = ("Flux.1", "Z-Image", "HunyuanVideo 1.5", "Stable Cascade C", "Wan 2.1 I2V", "LTXAV", "PixArt Sigma")


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return families.BY_NAME[request.param]


@pytest.fixture(scope="module")
def model(family):
    return families.patcher(family)


@pytest.fixture(scope="module")
def flux():
    return families.patcher(families.BY_NAME["Flux.1"])


FLUX = families.BY_NAME["Flux.1"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def predictions(model, family, **options) -> dict[str, torch.Tensor]:
    seen = {}

    def record(args):
        seen.update(positive=args["cond_denoised"], negative=args["uncond_denoised"])
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(record)
    families.sample(model, family, **options)
    return seen


@pytest.mark.parametrize("batch", (1, 2))
def test_apply_to_changes_only_that_prompt(family, model, batch):
    plain, whole = predictions(model, family, batch=batch), predictions(apply(model), family, batch=batch)
    for role, other in (("positive", "negative"), ("negative", "positive")):
        out = predictions(apply(model, apply_to=role), family, batch=batch)
        assert relative(out[role], whole[role]) < 1e-4
        assert relative(out[other], plain[other]) < 1e-4
        assert relative(whole[role], plain[role]) > 1e-3


def test_apply_to_negative_without_a_negative_is_off(family, model):
    out = families.sample(apply(model, apply_to="negative"), family, cfg=1.0)
    assert torch.equal(out, families.sample(model, family, cfg=1.0))


def test_the_window(family, model):
    """Half the steps each: together another image than either, and than none."""
    early, late = ({"end_percent": 0.4}, {"start_percent": 0.6})
    images = [families.sample(m, family, steps=4, cfg=1.0) for m in (model, apply(model), apply(model, **early),
                                                                     apply(model, **late))]  # fmt: skip
    for i, image in enumerate(images):
        assert all(relative(image, other) > 1e-6 for other in images[:i])


def test_no_extra_network_evaluation(family, model):
    rows = []

    def count(executor, x, *args, **kwargs):
        rows.append(x.shape[0])
        return executor(x, *args, **kwargs)

    counts = []
    for patched in (model.clone(), apply(model)):
        rows.clear()
        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
        families.sample(patched, family, steps=2)
        counts.append(list(rows))
    assert counts[0] == counts[1]


def test_a_second_node_replaces_the_first_where_they_overlap(family, model):
    once = families.sample(apply(model, scale=1.0), family)
    assert torch.equal(families.sample(apply(apply(model, scale=3.0), scale=1.0), family), once)
    block = {"layers": "custom", "blocks": "b0"}
    both = families.sample(apply(apply(model, scale=1.0), scale=3.0, **block), family)
    assert not torch.equal(both, once)
    rest = f"b1-{max(layer.number for layer in find_target(model).layers)}"
    other_order = apply(apply(model, scale=3.0, **block), scale=1.0, layers="custom", blocks=rest)
    assert torch.equal(families.sample(other_order, family), both)


BLOCKS = {
    "Flux.1": ("b0-3", {"b0": "double_blocks.0", "b2": "single_blocks.0"}),
    "LTXAV": ("b0-1.0-1", {"b1.1": "transformer_blocks.1.audio_attn2", "b0.0": "transformer_blocks.0.attn2"}),
    "Wan VACE": ("b0-3", {"b1": "blocks.1.cross_attn", "b3": "vace_blocks.1.cross_attn"}),
    "Cosmos 1": ("b0-1", {"b1": "blocks.block1.blocks.1.block.attn"}),
    "Boogu": ("b0-3", {"b0": "double_stream_layers.0.img_instruct_attn", "b3": "single_stream_layers.1"}),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_lists_count_through_the_network(name):
    model = families.patcher(families.BY_NAME[name])
    described, paths = BLOCKS[name]
    for blocks, path in paths.items():
        (wrapper,) = apply(model, layers="custom", blocks=blocks).get_wrappers(WrappersMP.APPLY_MODEL, "pladis")
        assert [layer.path for layer in wrapper.applied[0].settings.layers] == [path]
    for bad in ("b9", "d0", "m0", "x1"):
        with pytest.raises(ValueError, match=f"'{bad}'.*This model has {described}\\."):
            apply(model, layers="custom", blocks=bad)
    with pytest.raises(ValueError, match=f"only U-Nets have.*{described}"):
        apply(model, layers="down + up")


def test_a_block_replacement_of_another_node_is_kept(flux):
    calls = []

    def replacement(args, extra):
        calls.append(1)
        return extra["original_block"](args)

    def patch(model):
        model = model.clone()
        model.set_model_patch_replace(replacement, "dit", "double_block", 0)
        return model

    expected = families.sample(apply(flux), FLUX)
    assert torch.equal(families.sample(apply(patch(flux)), FLUX), expected)
    assert torch.equal(families.sample(patch(apply(flux)), FLUX), expected)
    assert len(calls) == 2


def test_the_hosts_own_attention_node(flux):
    """set_model_optimized_attention assigns the override, as attention nodes of other packs do."""

    def override(function, *args, **kwargs):
        return function(*args, **kwargs)

    patched = apply(flux)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert relative(families.sample(patched, FLUX), families.sample(apply(flux), FLUX)) < 1e-4


@pytest.mark.parametrize("error", (RuntimeError, comfy.model_management.InterruptProcessingException))
def test_nothing_stays_after_an_interruption(model, family, error):
    attention = comfy.ldm.pixart.blocks.optimized_attention
    plain = families.sample(model, family)

    def interrupt(function, *args, **kwargs):
        raise error

    patched = apply(model)
    modules = dict(patched.model.diffusion_model.named_modules())
    (path, *_) = (layer.path for layer in find_target(model).layers)
    handle = modules[path].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        families.sample(patched, family)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    assert comfy.ldm.pixart.blocks.optimized_attention is attention
    assert torch.equal(families.sample(model, family), plain)


def test_two_threads_past_the_override():
    """One thread with PLADIS and one without, on models of their own that share the host's function."""
    family = families.BY_NAME["PixArt Sigma"]
    with_node, without = apply(families.patcher(family)), families.patcher(family)
    expected = {"with": families.sample(with_node, family), "without": families.sample(without, family)}
    # models are loaded by now: the network alone, many times over
    direct = running.diversion("comfy.ldm.pixart.blocks", "optimized_attention")
    q, k = torch.randn(1, 8, 32), torch.randn(1, 5, 32)
    plain = comfy.ldm.pixart.blocks.optimized_attention(q, k, k, 2)
    wrong = []

    def diverted():
        for _ in range(300):
            direct.enter(lambda function, *args, **kwargs: 2 * function(*args, **kwargs))
            out = comfy.ldm.pixart.blocks.optimized_attention(q, k, k, 2)
            direct.leave()
            wrong.extend([] if torch.equal(out, 2 * plain) else [1])

    def untouched():
        for _ in range(600):
            out = comfy.ldm.pixart.blocks.optimized_attention(q, k, k, 2)
            wrong.extend([] if torch.equal(out, plain) else [2])

    threads = [threading.Thread(target=f) for f in (diverted, untouched, diverted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(families.sample(with_node, family), expected["with"])
    assert torch.equal(families.sample(without, family), expected["without"])


def unknown(name: str):
    """A model whose class the table does not know."""
    model = families.patcher(families.BY_NAME[name])
    network = model.model.diffusion_model
    known = type(network)
    network.__class__ = type("Unheard", (torch.nn.Module,), {
        key: value for key, value in {**vars(known.__mro__[1]), **vars(known)}.items() if key not in ("__dict__",)
    })  # fmt: skip
    return model


def test_an_unknown_network_is_named_and_can_be_tried():
    family = families.BY_NAME["Kandinsky 5 image"]
    expected = families.sample(apply(families.patcher(family)), family)
    model = unknown(family.name)
    with pytest.raises(ValueError, match="Unheard.*force_unknown"):
        apply(model)
    # its text attention is what the general rule finds
    assert torch.equal(families.sample(apply(model, force_unknown=True), family), expected)


WITHOUT = {name: row.reason for row in TABLE if row.kind == UNSUPPORTED for name in row.classes if ".ldm." in name}


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_text_attention_say_so(name, flux):
    path, _, kind = name.rpartition(".")
    try:
        network = getattr(importlib.import_module(path), kind)
    except ImportError as error:
        pytest.skip(f"this ComfyUI has no such family: {error}")
    model = flux.clone()
    model.add_object_patch("diffusion_model", network.__new__(network))
    with pytest.raises(ValueError, match=f"no text attention.*{re.escape(WITHOUT[name])}.*Remove"):
        apply(model)


def test_minimax_h3_with_sparse_attention_names_the_node(monkeypatch):
    """ComfyUI 0.38's Model Sparse Attention hands H3's blocks an attention of its own, past everything."""
    node = pytest.importorskip("comfy_extras.nodes_sparse_attention")
    monkeypatch.setattr(node, "h3_eligible", lambda *args: True)
    monkeypatch.setattr(
        node, "h3_sparse_attention",
        lambda attn, h, rope_freqs, options, *_: attn(h, rope_freqs=rope_freqs, transformer_options={}),
    )  # fmt: skip
    family = families.BY_NAME["MiniMax H3"]
    model = families.patcher(family)
    options = inspect.signature(node.apply_block_sparse_attention).parameters
    given = {"tau": 1.0, "topk_ratio": 0.5, "vsa": False, "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0,
             "dense_blocks": "", "sink_conditioning": False, "extra_tokens": 0, "verbose": False}  # fmt: skip
    given = {name: value for name, value in given.items() if name in options}
    for patched in (node.apply_block_sparse_attention(apply(model), **given),
                    apply(node.apply_block_sparse_attention(model, **given))):  # fmt: skip
        with pytest.raises(RuntimeError, match="Likely comfy_extras.nodes_sparse_attention.*remove that node"):
            families.sample(patched, family)


def test_a_graph_in_which_no_text_attention_runs_ends_in_its_first_step(flux):
    model = flux.clone()
    for i in range(2):
        for block in ("double_block", "single_block"):
            model.set_model_patch_replace(lambda args, extra: args, "dit", block, i)
    steps = []
    with pytest.raises(RuntimeError, match="reached none of its 4 text layers \\(b0.0, .*test_transformers"):
        families.sample(apply(counted(model, steps)), FLUX, steps=4, cfg=1.0)
    assert len(steps) == 1


def counted(model, calls: list):
    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "count", lambda executor, *args, **kwargs: calls.append(1) or executor(*args, **kwargs)
    )
    return model


def test_of_two_experts_a_step_runs_one(caplog):
    """Prism: below a noise level its second video network runs, above it the first."""
    family = families.BY_NAME["Prism"]
    model = apply(families.patcher(family))
    said = {}
    for steps in (1, 4):
        caplog.clear()
        with caplog.at_level("INFO"):
            families.sample(model, family, steps=steps)
        (said[steps],) = (record for record in caplog.records if "text layers" in record.message)
    assert said[1].message.startswith("PLADIS: 3 of 5 text layers in 1 of 1 steps")
    assert "2 of an expert that did not run" in said[1].message
    assert said[4].message.startswith("PLADIS: 5 of 5 text layers in 4 of 4 steps")
    assert all("cache" not in record.message and record.levelname == "INFO" for record in said.values())
