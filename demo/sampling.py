"""Sampling: Euler steps along the flow, the same arithmetic as ComfyUI's `euler` sampler with its `simple` schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import config

# (latents, sigma) -> velocity
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def noise(seed: int, count: int) -> torch.Tensor:
    """(count, 4, 16, 16), as ComfyUI draws it for a batch of `count` (comfy/sample.py, prepare_noise)."""
    shape = (count, config.LATENT_CHANNELS, config.LATENT_SIZE, config.LATENT_SIZE)
    return torch.randn(shape, generator=torch.manual_seed(seed))


def sigmas(steps: int) -> torch.Tensor:
    """(steps + 1,), from 1 to 0: equal steps, shifted towards noise, where it is decided what goes where (Esser et al.
    2024, eq. 23)."""
    times = torch.linspace(1, 0, steps + 1)
    return config.SHIFT * times / (1 + (config.SHIFT - 1) * times)


@torch.no_grad()
def euler(velocity: Velocity, latents: torch.Tensor, steps: int, callback: Callable[[], object] = lambda: None):
    """From noise to latents along the schedule."""
    levels = sigmas(steps)
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        latents = latents + velocity(latents, now) * (then - now)
        callback()
    return latents


def guided(unet, text: torch.Tensor, empty: torch.Tensor, cfg: float) -> Velocity:
    """The velocity with classifier-free guidance (Ho, Salimans 2022); cfg 1 evaluates the prompt alone.

    Args:
        text: (B, 77, 96), one row per picture.
        empty: the same for the empty prompt.
        sigma, as the velocity's argument: one for all pictures, or (B,).
        cfg: going higher pushes harder towards the prompt.
    """

    def predict(latents: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        # the network was trained on sigma in thousandths
        return unet(latents, (sigma.to(latents.device) * 1000).expand(len(latents)), states).sample

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if cfg == 1:
            return predict(latents, sigma, text)
        both = predict(torch.cat((latents, latents)), sigma.expand(len(latents)).repeat(2), torch.cat((text, empty)))
        wanted, plain = both.chunk(2)
        return plain + cfg * (wanted - plain)

    return velocity
