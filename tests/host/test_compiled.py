"""Under ComfyUI's TorchCompileModel: wired before or after, the settings of each queue are the ones that count."""

from __future__ import annotations

import logging

import comfy_extras.nodes_torch_compile
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

import tiny
from pladis_pack.nodes.hosting import compiled

# tracing takes long: two blocks with text attention on the way down, the middle, four on the way up
tiny.LAYOUTS["two levels"] = (
    tiny.supported.SD15,
    {
        "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1],
    },
    7,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    return tiny.patcher("two levels")


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
def test_equals_the_uncompiled_model_and_follows_every_change(model, order):
    for settings in (
        {"scale": 2.0},
        {"scale": 0.5},
        {"scale": 2.0, "alpha": 2.0},
        {"scale": 2.0, "end_percent": 0.5},
        {"scale": 2.0, "start_percent": 0.5},
        {"scale": 2.0, "layers": "custom", "blocks": "m0"},
        {"scale": 2.0, "apply_to": "positive"},
        {"scale": 0.0},
    ):
        expected = tiny.sample(tiny.apply(model, **settings))
        assert_same(tiny.sample(both_orders(model, **settings)[order]), expected)


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


def test_one_trace_serves_every_setting(model):
    frames = torch._dynamo.utils.counters["frames"]
    tiny.sample(tiny.apply(compile_model(model), scale=2.0))
    traced = frames["ok"]
    assert traced > 0
    for scale in (0.0, 1.0, 3.0):
        tiny.sample(tiny.apply(compile_model(model), scale=scale, alpha=1.25, end_percent=0.7))
    assert frames["ok"] == traced


def test_another_packs_hook_keeps_its_effect(model):
    def foreign(q, k, v, extra_options):
        return compiled.dense_attention(q, k, v, extra_options) * 0.5

    other = model.clone()
    other.set_model_attn2_replace(foreign, "middle", 0, 0)
    expected = tiny.sample(tiny.apply(other))
    assert (expected - tiny.sample(tiny.apply(model))).abs().max() > 1e-6
    for patched in both_orders(other):
        assert_same(tiny.sample(patched), expected)


def test_nothing_stays_behind_after_an_error(model):
    def fail(q, k, v, extra_options):
        raise RuntimeError("interrupted")

    broken = model.clone()
    broken.set_model_attn2_replace(fail, "middle", 0, 0)
    with pytest.raises(RuntimeError, match="interrupted"):
        tiny.sample(tiny.apply(compile_model(broken)))
    assert compiled.CURRENT.get() is None


def test_cuda_graphs_are_reported(caplog):
    with caplog.at_level(logging.WARNING):
        compiled.warn_of_frozen_settings({"torch_compile_kwargs": {"backend": "inductor"}})
        compiled.warn_of_frozen_settings({})
        assert not caplog.records
        compiled.warn_of_frozen_settings({"torch_compile_kwargs": {"backend": "cudagraphs"}})
    assert "inductor" in caplog.text
