"""Under ComfyUI's TorchCompileModel: wired before or after, the settings of each queue are the ones that count."""

from __future__ import annotations

import logging

import comfy_extras.nodes_torch_compile
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

import families
import tiny
from graph import run_node
from pladis_pack.nodes.hosting.roads import compiled, unet
from pladis_pack.nodes.hosting.running import current_call

# tracing takes long: one block with text attention on the way down, the middle, two on the way up
tiny.LAYOUTS["one level"] = (
    tiny.supported.SD15,
    {
        "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1],
    },
    4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    return tiny.patcher("one level")


def compile_model(model):
    """TorchCompileModel, with a compiler backend that needs no C compiler. The freezing is in the tracing."""
    model = model.clone(disable_dynamic=True)
    options = {"guard_filter_fn": comfy_extras.nodes_torch_compile.skip_torch_compile_dict}
    set_torch_compile_wrapper(model=model, backend="eager", options=options)
    return model


def both_orders(model, **settings):
    return compile_model(tiny.apply(model, **settings)), tiny.apply(compile_model(model), **settings)


def assert_same(out, expected):
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", (0, 1), ids=("compiled after", "compiled before"))
def test_equals_the_uncompiled_model_and_follows_every_change_on_one_trace(model, order):
    frames, traced = torch._dynamo.utils.counters["frames"], []
    for settings in (
        {"scale": 2.0},
        {"scale": 0.5},
        {"scale": 2.0, "alpha": 2.0},
        {"scale": 2.0, "end_percent": 0.5},
        {"scale": 2.0, "layers": "custom", "blocks": "m0"},
        {"scale": 2.0, "apply_to": "positive"},
        {"scale": 2.0, "tokens": "without start token"},
    ):
        expected = tiny.sample(tiny.apply(model, **settings))
        assert_same(tiny.sample(both_orders(model, **settings)[order]), expected)
        traced.append(frames["ok"])
    assert traced[0] > 0
    assert len(set(traced)) == 1
    # off goes straight through, to the host's code
    off, plain = both_orders(model, scale=0.0)[order], compile_model(model)
    assert torch.equal(tiny.sample(off), tiny.sample(plain))


def test_a_model_that_was_compiled_before_pladis_came_is_traced_anew(model):
    plain = tiny.sample(model)
    compiled_model = compile_model(model)
    assert_same(tiny.sample(compiled_model), plain)
    with_pladis = tiny.sample(tiny.apply(model))
    assert (with_pladis - plain).abs().max() > 1e-3
    assert_same(tiny.sample(tiny.apply(compiled_model)), with_pladis)
    # and without it again
    assert_same(tiny.sample(compiled_model), plain)
    assert_same(tiny.sample(tiny.apply(compiled_model)), with_pladis)


def test_another_packs_hook_keeps_its_effect(model):
    def foreign(q, k, v, extra_options):
        return unet.dense_attention(q, k, v, extra_options) * 0.5

    other = model.clone()
    other.set_model_attn2_replace(foreign, "middle", 0, 0)
    expected = tiny.sample(tiny.apply(other))
    assert (expected - tiny.sample(tiny.apply(model))).abs().max() > 1e-6
    for patched in both_orders(other):
        assert_same(tiny.sample(patched), expected)


@pytest.mark.parametrize("name", ("Flux.1", "Wan 2.1 T2V"))
def test_a_transformer_runs_uncompiled_where_pladis_is_on_and_says_so(name, caplog):
    family = families.BY_NAME[name]
    model = families.patcher(family)
    plain = families.sample(compile_model(model), family, steps=1)
    compiled._warn_of_no_compiling.cache_clear()
    for scale in (2.0, 0.5, 0.0):
        expected = families.sample(tiny.apply(model, scale=scale), family, steps=1)
        for patched in both_orders(model, scale=scale):
            torch.testing.assert_close(families.sample(patched, family, steps=1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)
    assert len([record for record in caplog.records if "torch.compile" in record.message]) == 1


def test_nothing_stays_behind_after_an_error(model):
    def fail(q, k, v, extra_options):
        assert current_call() is not None
        raise RuntimeError("interrupted")

    other = model.clone()
    other.set_model_attn2_replace(fail, "middle", 0, 0)
    for patched in both_orders(other):
        with pytest.raises(RuntimeError, match="interrupted"):
            tiny.sample(patched)
        assert current_call() is None
        assert not hasattr(model.model.diffusion_model, "_orig_mod")


def test_another_compiled_model_keeps_its_code(model):
    """Neither PLADIS on one U-Net nor its leaving makes the compiler forget another."""
    frames, other = torch._dynamo.utils.counters["frames"], tiny.patcher("one level")
    compiled_other, expected = compile_model(other), tiny.sample(other)
    before = frames["ok"]
    assert_same(tiny.sample(compiled_other), expected)
    first_trace = frames["ok"] - before
    compiled_model = compile_model(model)
    for patched in (compiled_model, tiny.apply(compiled_model), compiled_model):
        tiny.sample(patched)
    traced = frames["ok"]
    assert_same(tiny.sample(compiled_other), expected)
    # the compiler itself sees small functions that both share anew, whoever compiles a second model
    assert frames["ok"] - traced <= first_trace // 4
    traced = frames["ok"]
    tiny.sample(tiny.apply(compiled_model))
    tiny.sample(compiled_other)
    assert frames["ok"] == traced


def test_a_step_that_a_cache_answered_is_no_stale_trace(model):
    easycache = run_node("comfy_extras.nodes_easycache", "EasyCacheNode", model=model, reuse_threshold=3.0)
    for patched in both_orders(easycache):
        assert tiny.sample(patched, steps=6).isfinite().all()


def test_a_network_that_a_pack_compiled_itself(model):
    """As an object patch in the network's place."""
    expected, code = tiny.sample(tiny.apply(model)), torch.compile(model.model.diffusion_model, backend="eager")

    def patch(model):
        model = model.clone()
        model.add_object_patch("diffusion_model", code)
        return model

    assert_same(tiny.sample(tiny.apply(patch(model))), expected)
    assert_same(tiny.sample(patch(tiny.apply(model))), expected)
    assert_same(tiny.sample(patch(model)), tiny.sample(model))


def test_the_compile_stance_is_never_touched(model, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("the whole process would notice")

    family = families.BY_NAME["Flux.1"]
    flux = families.patcher(family)
    compiled_unet, compiled_flux = compile_model(model), compile_model(flux)
    tiny.sample(compiled_unet)
    monkeypatch.setattr(torch.compiler, "set_stance", touched)
    monkeypatch.setattr(torch._dynamo, "reset", touched)
    tiny.sample(tiny.apply(compiled_unet))
    families.sample(tiny.apply(compiled_flux), family)
    monkeypatch.undo()


def test_off_after_on_and_without_the_node(model):
    """Keys of ours do not reach the guards: without the node the compiled model runs as before."""
    family = families.BY_NAME["Flux.1"]
    compiled_flux = compile_model(families.patcher(family))
    for scale in (0.0, 2.0):
        families.sample(tiny.apply(compiled_flux, scale=scale, end_percent=0.5), family, steps=2)
    assert families.sample(compiled_flux, family, steps=2).isfinite().all()


def test_cuda_graphs_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        compiled.warn_of_frozen_settings({"torch_compile_kwargs": {"backend": "inductor"}})
        compiled.warn_of_frozen_settings({})
        assert not caplog.records
        compiled.warn_of_frozen_settings({"torch_compile_kwargs": {"backend": "cudagraphs"}})
    assert "inductor" in caplog.text
