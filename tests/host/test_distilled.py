"""Distilled models: LCM, Turbo, Lightning, Hyper, DMD2. CFG 1, one to eight steps, their samplers and schedules.

The node needs no setting of its own for them: at its defaults every step is PLADIS, none is evaluated twice, and with
CFG 1 no negative prompt comes in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import comfy.sample
import comfy.samplers
import pytest
import torch

import families
import tiny
from graph import Rows, run_node
from pladis_pack.nodes.hosting.roads import transformer, unet
from tiny import NEGATIVE, POSITIVE, apply

SAME, CHANGED = 1e-4, 1e-3
SAMPLERS, ADVANCED = "comfy_extras.nodes_custom_sampler", "comfy_extras.nodes_model_advanced"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def unchanged(model):
    return model


def sampling(name: str, **inputs) -> Callable:
    return lambda model: run_node(ADVANCED, name, model=model, **inputs)


def basic(scheduler: str, steps: int) -> Callable:
    return lambda model: run_node(SAMPLERS, "BasicScheduler", model=model, scheduler=scheduler, steps=steps)


def turbo(steps: int) -> Callable:
    return lambda model: run_node(SAMPLERS, "SDTurboScheduler", model=model, steps=steps)


def manual(*timesteps: int) -> Callable:
    """Sigmas typed in by hand: those of the timesteps that a model was distilled at."""

    def sigmas(model):
        values = [float(model.get_model_object("model_sampling").sigma(torch.tensor(float(t)))) for t in timesteps]
        return run_node(SAMPLERS, "ManualSigmas", sigmas=", ".join(f"{s:.6f}" for s in (*values, 0.0)))

    return sigmas


@dataclass(frozen=True)
class Recipe:
    """How a distilled model is sampled: patch of the model, sampler, sigmas, and evaluations per image."""

    name: str
    sampler: str
    sigmas: Callable
    evaluations: int
    model: Callable = unchanged


LCM = sampling("ModelSamplingDiscrete", sampling="lcm")
RECIPES = (
    Recipe("LCM, 1 step", "lcm", basic("sgm_uniform", 1), 1, LCM),
    Recipe("LCM, 4 steps", "lcm", basic("sgm_uniform", 4), 4, LCM),
    Recipe("LCM, 8 steps", "lcm", basic("simple", 8), 8, LCM),
    Recipe("Turbo, 1 step", "euler_ancestral", turbo(1), 1),
    Recipe("Turbo, 4 steps", "dpmpp_sde", turbo(4), 7),
    Recipe("Lightning, 1 step", "euler", basic("sgm_uniform", 1), 1, sampling("ModelSamplingDiscrete", sampling="x0")),
    Recipe("Lightning, 2 steps", "euler", basic("sgm_uniform", 2), 2),
    Recipe("Lightning, 8 steps", "dpmpp_sde", basic("sgm_uniform", 8), 15),
    Recipe("Hyper, 1 step", "euler", manual(800), 1),
    Recipe("Hyper, 8 steps", "ddim", basic("sgm_uniform", 8), 8),
    Recipe("DMD2, 1 step", "lcm", manual(399), 1),
    Recipe("DMD2, 4 steps", "lcm", manual(999, 749, 499, 249), 4),
)  # fmt: skip


@cache
def checkpoint(by_hand: bool = False):
    model = tiny.patcher()
    return tiny.write_pladis_into(model) if by_hand else model


def sample(model, recipe: Recipe, *, cfg=1.0, negative=NEGATIVE) -> torch.Tensor:
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 5)
    guider = run_node(SAMPLERS, "CFGGuider", model=model, positive=POSITIVE, negative=negative, cfg=cfg)
    sampler = comfy.samplers.sampler_object(recipe.sampler)
    return guider.sample(noise, noise * 0.0, sampler, recipe.sigmas(model), disable_pbar=True, seed=5)


@pytest.fixture
def rows(monkeypatch):
    return Rows(monkeypatch)


@pytest.fixture
def hooked(monkeypatch):
    """The noise levels at which PLADIS ran, one per evaluation."""
    seen = []
    original = unet.PladisHook.__call__

    def record(self, q, k, v, extra_options):
        if extra_options["block"] == ("middle", 0):
            seen.append(float(extra_options["sigmas"][0]))
        return original(self, q, k, v, extra_options)

    monkeypatch.setattr(unet.PladisHook, "__call__", record)
    return seen


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_special_setting(recipe, rows, hooked):
    plain, by_hand = checkpoint(), checkpoint(True)
    alone, evaluations = rows.of(lambda: sample(recipe.model(plain), recipe))
    assert evaluations == [1] * recipe.evaluations
    expected, _ = rows.of(lambda: sample(recipe.model(by_hand), recipe))
    for order in (lambda model: recipe.model(apply(model)), lambda model: apply(recipe.model(model))):
        hooked.clear()
        image, counted = rows.of(lambda order=order: sample(order(plain), recipe))
        assert counted == evaluations
        assert len(hooked) == recipe.evaluations
        assert relative(image, expected) < SAME
        assert relative(image, alone) > CHANGED


def test_the_negative_prompt_has_no_say_at_cfg_1(rows):
    recipe = RECIPES[1]
    model = apply(recipe.model(checkpoint()))
    short, long = (rows.of(lambda n=n: sample(model, recipe, negative=tiny.prompt(31, n)))[0] for n in (77, 308))
    assert torch.equal(short, long)
    other, evaluations = rows.of(lambda: sample(model, recipe, cfg=1.5, negative=tiny.prompt(31)))
    assert evaluations == [2] * recipe.evaluations
    assert relative(other, short) > CHANGED


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.evaluations == 1], ids=lambda recipe: recipe.name)
def test_the_window_on_one_step(recipe, hooked):
    """The step is in the window or it is not, by its noise level: percents are of the schedule, not of the steps."""
    model = recipe.model(checkpoint())
    alone, whole = sample(model, recipe), sample(apply(model), recipe)
    (sigma, _) = recipe.sigmas(model).tolist()
    sampling = model.get_model_object("model_sampling")
    # the first part of the schedule that holds the step's noise level
    place = next(p / 1000 for p in range(1001) if float(sampling.percent_to_sigma(p / 1000)) <= sigma)
    around = max(place - 0.05, 0.0), min(place + 0.05, 1.0)
    for window, inside in (
        ((0.0, 1.0), True), (around, True), ((0.0, around[1]), True), ((around[0], 1.0), True),
        ((around[1], 1.0), False), ((1.0, 1.0), False),
    ):  # fmt: skip
        hooked.clear()
        image = sample(apply(model, start_percent=window[0], end_percent=window[1]), recipe)
        assert len(hooked) == int(inside)
        assert torch.equal(image, whole if inside else alone)


def test_windows_share_the_steps_out(hooked):
    """Two windows that meet between two steps cover each step once."""
    recipe = RECIPES[1]
    model = recipe.model(checkpoint())
    sigmas = recipe.sigmas(model)[:-1].tolist()
    sampling = model.get_model_object("model_sampling")
    between = (sigmas[1] + sigmas[2]) / 2
    middle = next(p / 1000 for p in range(1001) if float(sampling.percent_to_sigma(p / 1000)) <= between)
    seen = []
    for window in ({"end_percent": middle}, {"start_percent": middle}):
        hooked.clear()
        sample(apply(model, **window), recipe)
        seen.append(list(hooked))
    assert seen[0] == pytest.approx(sigmas[:2]) and seen[1] == pytest.approx(sigmas[2:])


def test_a_schedule_in_two_halves_of_two_samplers():
    """SplitSigmas: first and last steps in samplers of their own, the node on one of them or on both."""
    recipe = Recipe("", "euler", basic("sgm_uniform", 4), 4)
    plain = checkpoint()
    high, low = recipe.sigmas(plain)[:3], recipe.sigmas(plain)[2:]

    def halves(first, second):
        noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 8, 8), 5)
        latent = torch.zeros_like(noise)
        for model, sigmas in ((first, high), (second, low)):
            guider = run_node(SAMPLERS, "CFGGuider", model=model, positive=POSITIVE, negative=NEGATIVE, cfg=1.0)
            latent = guider.sample(
                noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=5
            )
            noise = torch.zeros_like(noise)
        return latent

    assert relative(halves(apply(plain), apply(plain)), sample(apply(plain), recipe)) < SAME
    images = [halves(plain, plain), halves(apply(plain), plain), halves(plain, apply(plain))]
    images.append(halves(apply(plain), apply(plain)))
    for i, image in enumerate(images):
        assert all(relative(image, other) > CHANGED for other in images[:i])


FLOW = (("Flux.1", 1), ("Flux.1", 4), ("Z-Image", 8), ("SD3", 4), ("Wan 2.1 T2V", 4))


@pytest.mark.parametrize(("name", "steps"), FLOW)
def test_distilled_flow_models(name, steps, monkeypatch):
    """schnell, Z-Image Turbo, SD3.5 Turbo, Lightning LoRAs of Wan: PLADIS in every step.

    Their first step, or the only one, lies at percent 0 exactly; as in the host both ends of a window are in it.
    """
    family = families.BY_NAME[name]
    model = families.patcher(family)
    evaluations, windows = [], []
    prepare = transformer.prepare

    def count(call, options):
        windows.append(1)
        prepare(call, options)

    monkeypatch.setattr(transformer, "prepare", count)
    model.model.diffusion_model.register_forward_hook(lambda *args: evaluations.append(args[-1].shape[0]))
    alone = families.sample(model, family, steps=steps, cfg=1.0)
    assert evaluations == [1] * steps and not windows
    evaluations.clear()
    ours = families.sample(apply(model), family, steps=steps, cfg=1.0)
    assert evaluations == [1] * steps == windows
    assert relative(ours, alone) > CHANGED
    for window, covered in (
        ({"end_percent": 0.0}, 1), ({"start_percent": 0.001}, steps - 1), ({"start_percent": 1.0}, 0)
    ):  # fmt: skip
        windows.clear()
        image = families.sample(apply(model, **window), family, steps=steps, cfg=1.0)
        assert len(windows) == covered
        assert torch.equal(image, alone) == (covered == 0)
