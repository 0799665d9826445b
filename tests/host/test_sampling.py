"""PLADIS in the host's own samplers: what changes, what must not, and what a prompt's image may depend on."""

from __future__ import annotations

import pickle

import comfy.samplers
import pytest
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM

import tiny
from pladis_pack.nodes.hosting import wrappers
from pladis_pack.nodes.hosting.batch import Batch, Prompt
from pladis_pack.nodes.hosting.roads import unet
from tiny import apply


@pytest.fixture(scope="module")
def sd15():
    return tiny.patcher("SD15")


@pytest.fixture(scope="module")
def plain(sd15):
    return tiny.sample(sd15)


def predictions(model, positive=tiny.POSITIVE, negative=tiny.NEGATIVE, **options) -> list[dict[str, torch.Tensor]]:
    """The conditional and unconditional predictions of every step."""
    seen = []

    def record(args):
        seen.append({"positive": args["cond_denoised"].clone(), "negative": args["uncond_denoised"].clone()})
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(record)
    tiny.sample(model, positive, negative, **options)
    return seen


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ("SD15", "SDXL", "SD2", "X4 upscaler", "SSD-1B"))
@pytest.mark.parametrize("options", ({"scale": 0.0}, {"alpha": 1.0}, {"end_percent": 0.0}, {"start_percent": 1.0}))
def test_off_is_bit_identical(name, options):
    model = tiny.patcher(name)
    expected = tiny.sample(model, steps=2)
    assert torch.equal(tiny.sample(apply(model, **options), steps=2), expected)
    assert relative(tiny.sample(apply(model), steps=2), expected) > 1e-3


@pytest.mark.parametrize("name", ("SD15", "SDXL refiner", "KOALA-700M", "X4 upscaler", "SD15 inpaint", "SDXL ip2p"))
def test_scale_two_is_the_papers_equation_in_every_layer(name):
    model = tiny.patcher(name)
    ours = tiny.sample(apply(model), steps=2)
    tiny.write_pladis_into(model)
    assert relative(ours, tiny.sample(model, steps=2)) < 1e-4


@pytest.mark.parametrize(("cfg", "steps"), ((4.0, 4), (1.0, 4), (4.0, 1), (1.0, 1)))
def test_no_extra_network_evaluation(sd15, cfg, steps):
    without, with_node = tiny.Evaluations(), tiny.Evaluations()
    tiny.sample(without.attach(sd15), cfg=cfg, steps=steps)
    tiny.sample(with_node.attach(apply(sd15)), cfg=cfg, steps=steps)
    assert with_node.rows == without.rows
    assert len(without.rows) >= steps


def test_samplers_batches_and_few_step_schedules(sd15):
    for options in (
        {"sampler": "dpmpp_2m", "scheduler": "karras"}, {"sampler": "lcm", "scheduler": "sgm_uniform", "cfg": 1.0},
        {"sampler": "euler_ancestral", "steps": 1, "cfg": 1.0}, {"batch": 3},
    ):  # fmt: skip
        expected = tiny.sample(sd15, **options)
        out = tiny.sample(apply(sd15), **options)
        assert out.shape == expected.shape
        assert out.isfinite().all()
        assert relative(out, expected) > 1e-3


def test_a_batch_is_its_images(sd15):
    """Each image of a batch as it is alone."""
    noise = torch.randn(2, 4, 8, 8)
    together = tiny.sample(apply(sd15), noise=noise)
    for i in range(2):
        torch.testing.assert_close(
            together[i : i + 1], tiny.sample(apply(sd15), noise=noise[i : i + 1]), atol=1e-4, rtol=1e-4
        )


@pytest.fixture
def split_batches(monkeypatch):
    """As on a machine with little memory: every conditioning in a model call of its own."""
    return lambda: monkeypatch.setattr(BaseModel, "memory_required", lambda self, *args, **kwargs: float("inf"))


@pytest.mark.parametrize("lengths", ((77, 77), (77, 154), (154, 77), (77, 231), (154, 231)))
def test_same_result_however_the_batch_is_split(sd15, lengths, split_batches):
    positive, negative = tiny.prompt(1, lengths[0]), tiny.prompt(2, lengths[1])
    model, evaluations = apply(sd15), tiny.Evaluations()
    together = tiny.sample(evaluations.attach(model), positive, negative)
    assert evaluations.rows == [2, 2]
    split_batches()
    evaluations = tiny.Evaluations()
    apart = tiny.sample(evaluations.attach(model), positive, negative)
    assert evaluations.rows == [1, 1, 1, 1]
    assert relative(together, apart) < 1e-5


@pytest.mark.parametrize("role", ("positive", "negative"))
def test_a_prompts_prediction_does_not_depend_on_the_other_prompts_length(sd15, role):
    def first_step(tokens):
        prompts = {"positive": tiny.prompt(1), "negative": tiny.prompt(2)}
        other = "negative" if role == "positive" else "positive"
        prompts[other] = tiny.prompt(3, tokens)
        return predictions(apply(sd15), **prompts, steps=1)[0][role]

    expected = first_step(77)
    for tokens in (154, 231, 308):
        assert relative(first_step(tokens), expected) < 1e-5


def test_that_a_repeated_context_would_have_mattered(sd15, monkeypatch):
    """The test above can fail: taking the repeated tokens as they come changes the prediction."""
    positive = tiny.prompt(1)
    expected = predictions(apply(sd15), positive, tiny.prompt(2), steps=1)[0]["positive"]
    prompts = (Prompt("negative", 154), Prompt("positive", 154))
    monkeypatch.setattr(wrappers, "read_batch", lambda *args: Batch(2, 154, prompts))
    naive = predictions(apply(sd15), positive, tiny.prompt(2, 154), steps=1)[0]["positive"]
    assert relative(naive, expected) > 1e-3


def test_apply_to_changes_only_that_prompt(sd15):
    expected = predictions(sd15, steps=1)[0]
    for role, other in (("positive", "negative"), ("negative", "positive")):
        out = predictions(apply(sd15, apply_to=role), steps=1)[0]
        assert relative(out[role], expected[role]) > 1e-3
        assert relative(out[other], expected[other]) < 1e-6


def test_apply_to_with_areas(sd15):
    """The host gives an area prompt a counterpart on the other side under the same uuid, of another length."""
    area = tiny.prompt(21, 77, area=(4, 8, 0, 0), strength=1.0)
    options = {"positive": [*tiny.POSITIVE, *area], "negative": tiny.prompt(12, 154), "steps": 1}
    expected, whole = predictions(sd15, **options)[0], predictions(apply(sd15), **options)[0]
    for role, other in (("positive", "negative"), ("negative", "positive")):
        out = predictions(apply(sd15, apply_to=role), **options)[0]
        assert relative(out[role], whole[role]) < 1e-5
        assert relative(out[other], expected[other]) < 1e-5
        assert relative(whole[role], expected[role]) > 1e-3


def test_negative_is_what_the_guider_calls_so(sd15, monkeypatch):
    """DualCFG puts the negative prompt first in its batch."""
    seen = []
    original = wrappers.read_conditioning

    def record(conds, named):
        known = original(conds, named)
        seen.append({k.index: k.prompt.role for k in known})
        return known

    monkeypatch.setattr(wrappers, "read_conditioning", record)
    guider = Guider_DualCFG(apply(sd15, apply_to="positive"))
    guider.set_conds(tiny.POSITIVE, tiny.prompt(31), tiny.NEGATIVE)
    guider.set_cfg(4.0, 2.0)
    noise = torch.randn(1, 4, 8, 8)
    guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), torch.tensor([10.0, 0.0]),
        disable_pbar=True,
    )  # fmt: skip
    assert seen == [{0: "negative", 1: "positive", 2: "positive"}]


def test_apply_to_negative_without_a_negative_is_off(sd15):
    assert torch.equal(tiny.sample(apply(sd15, apply_to="negative"), cfg=1.0), tiny.sample(sd15, cfg=1.0))


@pytest.fixture
def hooked_sigmas(monkeypatch):
    """The noise levels at which a hook ran."""
    seen = set()
    original = unet.PladisHook.__call__

    def record(self, q, k, v, extra_options):
        seen.add(float(extra_options["sigmas"][0]))
        return original(self, q, k, v, extra_options)

    monkeypatch.setattr(unet.PladisHook, "__call__", record)
    return seen


def test_window_follows_a_model_sampling_node_wired_later(sd15, hooked_sigmas):
    model = apply(sd15, start_percent=0.2, end_percent=0.6)
    schedule = set()
    for patched in (model, ModelSamplingContinuousEDM().patch(model, "v_prediction", 120.0, 0.002)[0]):
        hooked_sigmas.clear()
        sampling = patched.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 8)[:-1]
        tiny.sample(patched, steps=8)
        low, high = (float(sampling.percent_to_sigma(p)) for p in (0.6, 0.2))
        expected = {float(s) for s in sigmas if low <= s <= high}
        assert sorted(hooked_sigmas) == pytest.approx(sorted(expected))
        assert 0 < len(expected) < 8
        schedule.add(frozenset(hooked_sigmas))
    assert len(schedule) == 2


def test_whole_window_covers_a_single_step(sd15, hooked_sigmas):
    tiny.sample(apply(sd15), steps=1)
    assert len(hooked_sigmas) == 1


def test_queueing_again_gives_the_same_image(sd15):
    model = apply(sd15)
    first = tiny.sample(model)
    tiny.sample(apply(sd15, scale=1.0, alpha=2.0))
    assert torch.equal(tiny.sample(model), first)


def test_clones_do_not_leak(sd15, plain):
    before = str(sd15.model_options), str(sd15.wrappers)
    weak = apply(sd15, scale=0.5)
    expected = tiny.sample(weak)
    strong = apply(weak.clone(), scale=3.0)
    assert relative(tiny.sample(strong), expected) > 1e-3
    assert torch.equal(tiny.sample(weak), expected)
    assert torch.equal(tiny.sample(sd15), plain)
    assert (str(sd15.model_options), str(sd15.wrappers)) == before


def test_no_hook_slot_is_taken_at_wiring_time(sd15):
    model = apply(sd15)
    assert str(model.model_options) == str(sd15.model_options)
    assert model.get_wrappers(WrappersMP.APPLY_MODEL, wrappers.KEY)
    assert len(apply(model).get_wrappers(WrappersMP.APPLY_MODEL, wrappers.KEY)) == 1


def test_a_second_node_replaces_the_first_where_they_overlap(sd15, plain):
    advanced = {"layers": "custom", "blocks": "m0,u0-2"}
    assert torch.equal(tiny.sample(apply(apply(sd15, scale=3.0), scale=1.0)), tiny.sample(apply(sd15, scale=1.0)))
    assert torch.equal(tiny.sample(apply(apply(sd15), scale=0.0)), plain)
    both = tiny.sample(apply(apply(sd15, scale=1.0), scale=3.0, **advanced))
    other_order = tiny.sample(
        apply(apply(sd15, scale=3.0, **advanced), scale=1.0, layers="custom", blocks="d0-5,u3-8")
    )
    assert torch.equal(both, other_order)
    assert not torch.equal(both, tiny.sample(apply(sd15, scale=1.0)))


def test_settings_can_be_pickled(sd15):
    (wrapper,) = apply(sd15, apply_to="positive").get_wrappers(WrappersMP.APPLY_MODEL, wrappers.KEY)
    (applied,) = wrapper.applied
    assert pickle.loads(pickle.dumps(applied)) == applied
    assert hash(wrapper) == hash(wrappers.ApplyModel(wrapper.applied, wrapper.target))
