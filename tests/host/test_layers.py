"""Which layers are found and hooked, in every U-Net layout, and how block lists name them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from comfy import model_base
from comfy.ldm.modules.attention import BasicTransformerBlock

import tiny
from pladis_pack.nodes.hosting import choose_layers, find_target
from pladis_pack.nodes.hosting.roads import unet
from tiny import apply


@pytest.fixture
def calls(monkeypatch):
    """Every run of a hook, as (slot-independent) key of its layer."""
    seen = Counter()
    original = unet.PladisHook.__call__

    def record(self, q, k, v, extra_options):
        seen[(*extra_options["block"], extra_options["block_index"])] += 1
        return original(self, q, k, v, extra_options)

    monkeypatch.setattr(unet.PladisHook, "__call__", record)
    return seen


def expected_layers(model) -> Counter:
    """From the module names alone, independently of the walk under test."""
    found = Counter()
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            part, number, *_ = name.split(".")
            number = 0 if part == "middle_block" else int(number)
            key = (part.removesuffix("_block").removesuffix("_blocks"), number, int(name.split(".")[-1]))
            found[key] += (module.attn2 is not None) + module.disable_self_attn
    return found


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_every_text_cross_attention_is_hooked_exactly_once(name, calls):
    model = tiny.patcher(name)
    layers = find_target(model).layers
    count = tiny.LAYOUTS[name][2]
    if count is not None:
        assert len(layers) == count
    tiny.sample(apply(model), steps=1, cfg=1.0)
    assert calls == expected_layers(model)


def test_x4_upscaler_has_cross_attention_in_attn1():
    slots = Counter(layer.slot for layer in find_target(tiny.patcher("X4 upscaler")).layers)
    assert slots["attn1"] > 0
    assert slots["attn2"] > slots["attn1"]


def test_down_and_up_leave_the_middle_out(calls):
    model = tiny.patcher("SD15")
    tiny.sample(apply(model, layers="down + up"), steps=1, cfg=1.0)
    assert len(calls) == 15
    assert not any(part == "middle" for part, *_ in calls)


SDXL_BLOCKS = {
    "d0": [("input", 4, 0), ("input", 4, 1)],
    "d2.2-4": [("input", 7, 2), ("input", 7, 3), ("input", 7, 4)],
    "m0": [("middle", 0, i) for i in range(10)],
    "u0.4": [("output", 0, 4)],
    "U3-5.1 , ": [("output", 3, 1), ("output", 4, 1), ("output", 5, 1)],
    "d0-d1.0": [("input", 4, 0), ("input", 5, 0)],
    "d0.1 m0.9": [("input", 4, 1), ("middle", 0, 9)],
    "d0.1，m0.9；": [("input", 4, 1), ("middle", 0, 9)],
    "d0.1,d0.1,m0.9": [("input", 4, 1), ("middle", 0, 9)],
}


@pytest.fixture(scope="module")
def sdxl():
    return tiny.patcher("SDXL")


@pytest.mark.parametrize("blocks", SDXL_BLOCKS)
def test_block_lists_mean_what_sd_perturbed_attention_means(sdxl, blocks):
    chosen = choose_layers("custom", blocks, find_target(sdxl).layers)
    assert sorted(layer.key for layer in chosen) == sorted(SDXL_BLOCKS[blocks])


@pytest.mark.parametrize(
    ("blocks", "named"),
    (
        ("", "empty"), (" , ", "empty"), ("x1", "'x1'"), ("d", "'d'"), ("d1.", "'d1.'"), ("d-1", "'d-1'"),
        ("input4", "'input4'"), ("d4", "no block d4"), ("m1", "no block m1"), ("u0-9", "no block u9"),
        ("u3.2", "no layer 2 in block u3"), ("d2.3-1", "backwards"), ("d0:d1", "'d0:d1'"),
        ("d" + "9" * 5000, "'d" + "9" * 39 + "...'"),
    ),
)  # fmt: skip
def test_a_bad_block_list_names_the_entry_and_lists_the_blocks(sdxl, blocks, named):
    with pytest.raises(ValueError) as error:
        apply(sdxl, layers="custom", blocks=blocks)
    assert named in str(error.value)
    if "backwards" not in named:
        assert "d0.0-1, d1.0-1, d2.0-9, d3.0-9, m0.0-9, u0.0-9" in str(error.value)


def test_start_after_end_is_refused():
    with pytest.raises(ValueError, match=r"start_percent 0.8 is after end_percent 0.2"):
        apply(tiny.patcher(), start_percent=0.8, end_percent=0.2)


@pytest.mark.parametrize("model_class", (model_base.SVD_img2vid, model_base.SV3D_u, model_base.Stable_Zero123))
def test_image_conditioned_unets_say_that_there_is_no_text(model_class):
    model = tiny.patcher()
    model.model.__class__ = model_class
    with pytest.raises(ValueError, match=rf"{model_class.__name__} has no text attention.*Remove"):
        apply(model)


def test_a_transformer_is_refused_by_name():
    class Flux(torch.nn.Module):
        pass

    model = tiny.patcher()
    model.add_object_patch("diffusion_model", Flux())
    with pytest.raises(ValueError, match="cannot reach the text attention of Flux"):
        apply(model)


def test_a_unet_without_text_is_refused():
    model = tiny.patcher()
    for module in model.model.diffusion_model.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn2 = None
    with pytest.raises(ValueError, match="no text cross-attention layer"):
        apply(model)


@pytest.mark.parametrize("layers", ("all", "custom"))
def test_the_advanced_node_reports_every_block_of_the_model(sdxl, layers, monkeypatch):
    """For the front end, whatever is chosen, where a person has the node."""
    monkeypatch.setattr("pladis_pack.nodes.apply_advanced.unique_id", lambda node: "7")
    output = tiny.PLADISApplyAdvanced.execute(sdxl, **{**tiny.ADVANCED, "layers": layers, "blocks": "m0"})
    assert output.ui == {
        "pladis_blocks": ["d0.0-1", "d1.0-1", "d2.0-9", "d3.0-9", "m0.0-9", *(f"u{i}.0-9" for i in range(3)),
                          *(f"u{i}.0-1" for i in range(3, 6))]
    }  # fmt: skip
