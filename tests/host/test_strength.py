"""How hard PLADIS pulls: the scale over the schedule, and the cap on the length of attention outputs."""

from __future__ import annotations

import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete, ModelSamplingFlux

import families
import tiny
from pladis_pack.nodes.hosting.models.layers import BY_SHAPE
from pladis_pack.nodes.hosting.roads import unet
from pladis_pack.nodes.hosting.running import running
from pladis_pack.nodes.hosting.settings import Settings, percent_of
from tiny import apply


@pytest.fixture(scope="module")
def sd15():
    return tiny.patcher("SD15")


def scales(monkeypatch, model, steps=4, **options) -> list[float]:
    """Lambda at every model call in which PLADIS runs."""
    seen, prepare = [], unet.prepare

    def record(call, options):
        seen.append(next(iter(call.active.values())).lam)
        prepare(call, options)

    with monkeypatch.context() as patched:
        patched.setattr(unet, "prepare", record)
        tiny.sample(apply(model, **options), steps=steps, cfg=1.0)
    return seen


@pytest.mark.parametrize("sampling", ("discrete", "zsnr", "edm", "flow", "flux"))
def test_the_percent_of_a_noise_level(sd15, sampling):
    if sampling == "flow":
        model = families.patcher(families.BY_NAME["Wan 2.1 T2V"])
    elif sampling == "flux":
        model = ModelSamplingFlux().patch(families.patcher(families.BY_NAME["Flux.1"]), 1.15, 0.5, 1024, 1024)[0]
    elif sampling == "edm":
        model = ModelSamplingContinuousEDM().patch(sd15, "v_prediction", 120.0, 0.002)[0]
    else:
        model = ModelSamplingDiscrete().patch(sd15, "eps", sampling == "zsnr")[0]
    model_sampling = model.get_model_object("model_sampling")
    for percent in (0.05, 0.3, 0.5, 0.8, 0.95):
        assert percent_of(float(model_sampling.percent_to_sigma(percent)), model_sampling) == pytest.approx(
            percent, abs=2e-3
        )
    assert percent_of(1e9, model_sampling) < 1e-5
    assert percent_of(0.0, model_sampling) > 1 - 1e-5


def test_the_curves(sd15):
    model_sampling = sd15.get_model_object("model_sampling")

    def at(percent, schedule):
        settings = Settings(frozenset(), 2.0, 1.5, 0.2, 0.8, "both", schedule, 1.0)
        return settings.at(float(model_sampling.percent_to_sigma(percent)), model_sampling).lam

    for schedule, quarter in (("linear", 1.75), ("cosine", 1 + 0.5 * (1 + 0.5**0.5))):
        assert at(0.2, schedule) == pytest.approx(2.0, abs=5e-3)
        assert at(0.35, schedule) == pytest.approx(quarter, abs=5e-3)
        assert at(0.5, schedule) == pytest.approx(1.5, abs=5e-3)
        assert at(0.8, schedule) == pytest.approx(1.0, abs=5e-3)
    assert at(0.5, "constant") == 2.0


def test_a_run_follows_the_curve(monkeypatch, sd15):
    falling = scales(monkeypatch, sd15, scale_schedule="linear", end_scale=0.5)
    assert falling[0] == pytest.approx(2.0, abs=1e-2)
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
    assert falling[-1] > 0.5
    rising = scales(monkeypatch, sd15, scale=0.0, scale_schedule="cosine", end_scale=2.0)
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False))
    # lambda 0 at the first step is off, and the first of the others is what a window would let through
    assert 0.0 <= rising[0] < 0.5


def test_each_step_is_that_of_its_scale(monkeypatch, sd15):
    """One step of a schedule equals one step at the constant scale of that moment."""
    expected = scales(monkeypatch, sd15, steps=1, scale_schedule="linear", end_scale=0.0)
    out = tiny.sample(apply(sd15, scale_schedule="linear", end_scale=0.0), steps=1, cfg=1.0)
    assert torch.equal(out, tiny.sample(apply(sd15, scale=expected[0]), steps=1, cfg=1.0))


def test_a_schedule_that_goes_nowhere_is_constant(sd15):
    constant = tiny.sample(apply(sd15))
    for schedule in ("linear", "cosine"):
        assert torch.equal(tiny.sample(apply(sd15, scale_schedule=schedule, end_scale=2.0)), constant)
        changed = tiny.sample(apply(sd15, scale_schedule=schedule, end_scale=0.0))
        assert (changed - constant).abs().max() > 1e-3
    off = tiny.sample(apply(sd15, scale=0.0, scale_schedule="linear", end_scale=0.0))
    assert torch.equal(off, tiny.sample(sd15))


@pytest.mark.parametrize("cap", (0.8, 1.0, 1.3))
def test_no_attention_output_is_longer_than_the_cap(cap):
    heads, width = 4, 8
    q, k, v = (torch.randn(2, n, heads * width) for n in (40, 77, 77))
    options = {"n_heads": heads, "dim_head": width, "attn_precision": None}
    call = tiny.call_of_two_rows()

    def run(cap, lam=6.0):
        with running(call):
            out = unet.PladisHook(Settings(frozenset(), lam, norm_cap=cap), call, BY_SHAPE, None)(q, k, v, options)
        return out.unflatten(-1, (heads, width))

    dense = unet.dense_attention(q, k, v, options).unflatten(-1, (heads, width)).norm(dim=-1)
    free, capped = run(0.0), run(cap)
    assert (free.norm(dim=-1) > cap * dense * 1.01).any()
    assert (capped.norm(dim=-1) <= cap * dense * (1 + 1e-5)).all()
    inside = free.norm(dim=-1) < cap * dense * 0.99
    torch.testing.assert_close(capped[inside], free[inside], atol=1e-5, rtol=1e-5)


def test_a_cap_that_is_never_reached_changes_nothing(sd15):
    free = tiny.sample(apply(sd15))
    torch.testing.assert_close(tiny.sample(apply(sd15, norm_cap=10.0)), free, atol=1e-4, rtol=0)
    assert (tiny.sample(apply(sd15, norm_cap=0.9)) - free).abs().max() > 1e-3
    assert torch.equal(tiny.sample(apply(sd15, scale=0.0, norm_cap=0.9)), tiny.sample(sd15))


@pytest.mark.parametrize("name", ("Flux.1", "Wan 2.1 T2V", "SD3"))
@pytest.mark.parametrize("options", ({"norm_cap": 0.9}, {"scale_schedule": "linear", "end_scale": 0.0}))
def test_transformers_have_both(name, options):
    family = families.BY_NAME[name]
    model = families.patcher(family)
    free = families.sample(apply(model), family, steps=2)
    neutral = {"norm_cap": 10.0} if "norm_cap" in options else {**options, "end_scale": 2.0}
    torch.testing.assert_close(families.sample(apply(model, **neutral), family, steps=2), free, atol=1e-4, rtol=1e-3)
    assert (families.sample(apply(model, **options), family, steps=2) - free).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"scale_schedule": "sine"}, "'sine'"),
        ({"end_scale": float("nan")}, "end_scale"),
        ({"norm_cap": -1.0}, "-1.0"),
        ({"norm_cap": float("inf")}, "inf"),
    ),
)
def test_mistakes_are_named(sd15, options, message):
    with pytest.raises(ValueError, match=message):
        apply(sd15, **options)
