"""The demo model in ComfyUI: the picture that diffusers makes, and what people do with any model."""

from __future__ import annotations

import comfy.sample
import comfy.sd
import numpy as np
import nodes as host_nodes
import pytest
import torch

from pladis_pack.demo.attention import TextAttention
from pladis_pack.demo.pipeline import Pipeline
from pladis_pack.demo.sampling import noise
from pladis_pack.nodes.demo_checkpoint import PLADISDemoCheckpoint
from tiny import apply

CAPTION = "a red circle left of a blue square"
OTHER = "a drawing of a green ring and a black cross above an orange triangle"
# pixels in [0, 1]; what the issue asks for
CLOSE = 1e-4


def load(variant: str = "standard"):
    return PLADISDemoCheckpoint.execute(variant).result


def picture(model, clip, vae, *, text=CAPTION, negative="", steps=20, cfg=3.0, seed=7, batch=2) -> torch.Tensor:
    """(B, 64, 64, 3) in [0, 1] from ComfyUI's own nodes."""
    (positive,) = host_nodes.CLIPTextEncode().encode(clip, text)
    (empty,) = host_nodes.CLIPTextEncode().encode(clip, negative)
    (latent,) = host_nodes.EmptyLatentImage().generate(64, 64, batch)
    (sampled,) = host_nodes.KSampler().sample(
        model, seed, steps, cfg, "euler", "simple", positive, empty, latent, denoise=1.0
    )
    return host_nodes.VAEDecode().decode(vae, sampled)[0]


@pytest.fixture(scope="module")
def standard():
    return load()


@pytest.fixture(scope="module", params=["standard", "few-step"])
def both(request):
    """Model, clip and vae of a variant in ComfyUI, the variant in diffusers, its steps and CFG."""
    pipeline = Pipeline(request.param)
    return load(request.param), pipeline, {"steps": pipeline.steps, "cfg": pipeline.cfg}


def expected(pipeline: Pipeline, attention: TextAttention | None, steps: int, cfg: float) -> torch.Tensor:
    latents = pipeline.latents([CAPTION] * 2, noise(7, 2), attention, steps, cfg)
    pixels = pipeline.autoencoder.decode(latents).sample
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


def test_the_picture_is_diffusers(both):
    (model, clip, vae), pipeline, settings = both
    assert (picture(model, clip, vae, **settings) - expected(pipeline, None, **settings)).abs().max() < CLOSE


@pytest.mark.parametrize("lam", [1.0, 2.0])
def test_the_picture_with_pladis_is_diffusers(both, lam):
    (model, clip, vae), pipeline, settings = both
    attention = TextAttention(lam, alpha=1.5)
    patched = picture(apply(model, scale=lam), clip, vae, **settings)
    assert (patched - expected(pipeline, attention, **settings)).abs().max() < CLOSE
    # else the model would not show whether PLADIS ran
    assert (patched - expected(pipeline, None, **settings)).abs().max() > 100 * CLOSE


def test_down_and_up_is_the_same_choice_of_layers(standard):
    pipeline = Pipeline()
    patched = picture(apply(standard[0], layers="down + up"), *standard[1:], steps=4)
    attention = TextAttention(2.0, layers="down + up")
    assert (patched - expected(pipeline, attention, 4, 3.0)).abs().max() < CLOSE


def test_guidance_off_is_diffusers_too(standard):
    pipeline = Pipeline()
    assert (picture(*standard, steps=4, cfg=1.0) - expected(pipeline, None, 4, 1.0)).abs().max() < CLOSE
