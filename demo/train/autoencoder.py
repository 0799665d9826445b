"""Trains the autoencoder: pictures to latents and back."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from ..model import autoencoder
from ..scenes import crowded_scene, draw, random_scene
from .common import Run, mixed, to_pictures, to_tensor
from .options import Options

BATCH = 16
PEAK = 2e-3
# weight of the KL divergence per latent number: just enough to keep the latents smooth
KL = 1e-5


def pictures(seed: int, step: int, scene=crowded_scene) -> torch.Tensor:
    """(BATCH, 3, 64, 64) in [-1, 1]: the same for the same seed and step, so that a resumed run sees what an
    uninterrupted one would."""
    rng = np.random.default_rng([seed, 0, step])
    return to_tensor([draw(scene(rng)) for _ in range(BATCH)])


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    model = autoencoder().to(options.device)
    run = Run("autoencoder", options, model, PEAK)
    for step in run.steps():
        shown = pictures(options.seed, step).to(options.device)
        noise = torch.Generator(options.device).manual_seed(options.seed * 1_000_003 + step)
        with mixed(options.device):
            latents = model.encode(shown).latent_dist
            again = model.decode(latents.sample(noise)).sample.float()
        error = (again - shown).abs().mean()
        loss = error + KL * latents.kl().float().mean() / latents.mean[0].numel()
        run.descend(step, loss, l1=error.item(), std=latents.mean.std().item())
        if run.due(step):
            again = run.average.module(shown[:8]).sample
            options.picture(f"autoencoder-{step + 1:06}", [to_pictures(shown[:8]), to_pictures(again)])
    weights = normalised(run.average.module, options).state_dict()
    save_file(weights, options.folder / "autoencoder.safetensors")


@torch.no_grad()
def normalised(model: AutoencoderKL, options: Options, batches: int = 50) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and standard deviation 1 in every channel, so that nobody who uses
    it needs a scale factor: the change goes into the two 1 x 1 convolutions on either side of the latents."""
    means = [
        model.encode(pictures(options.seed, i, random_scene).to(options.device)).latent_dist.mean
        for i in range(batches)
    ]
    std, mean = torch.std_mean(torch.cat(means), dim=(0, 2, 3))
    inward, outward = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    outward.bias += torch.einsum("oiyx,i->o", outward.weight, mean)
    outward.weight *= std.view(1, -1, 1, 1)
    inward.weight[:channels] /= std.view(-1, 1, 1, 1)
    inward.bias[:channels] = (inward.bias[:channels] - mean) / std
    inward.bias[channels:] -= 2 * std.log()
    return model
