"""Trains the autoencoder: pictures to latents and back."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tqdm import trange

from ..model import autoencoder
from .common import Average, Checkpoint, learning_rate, random_batch, to_pictures
from .options import Options

BATCH = 16
PEAK = 2e-3
# weight of the KL divergence per latent number: just enough to keep the latents smooth
KL = 1e-5


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    model = autoencoder().to(options.device)
    average = Average(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(
        options.folder / "autoencoder.pt", model=model, average=average.module, optimizer=optimizer
    )
    start = checkpoint.load()
    bar = trange(start, options.steps, initial=start, total=options.steps, desc="autoencoder", mininterval=10)
    for step in bar:
        pictures = random_batch(options.seed, step, BATCH)[0].to(options.device)
        latents = model.encode(pictures).latent_dist
        noise = torch.Generator(options.device).manual_seed(options.seed * 1_000_003 + step)
        error = (model.decode(latents.sample(noise)).sample - pictures).abs().mean()
        loss = error + KL * latents.kl().mean() / latents.mean[0].numel()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, PEAK)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        bar.set_postfix(l1=f"{error.item():.4f}", std=f"{latents.mean.std().item():.2f}", refresh=False)
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            checkpoint.save(step + 1)
            shown = pictures[:8]
            options.picture(
                f"autoencoder-{step + 1:06}", [to_pictures(shown), to_pictures(average.module(shown).sample)]
            )
    save_file(normalised(average.module, options).state_dict(), options.folder / "autoencoder.safetensors")


@torch.no_grad()
def normalised(model: AutoencoderKL, options: Options, batches: int = 50) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and standard deviation 1 in every channel, so that nobody who uses
    it needs a scale factor: the change goes into the two 1 x 1 convolutions on either side of the latents."""
    means = [
        model.encode(random_batch(options.seed, options.steps + i, BATCH)[0].to(options.device)).latent_dist.mean
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
