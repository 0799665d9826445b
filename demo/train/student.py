"""Distils the few-step student: guidance and many steps into a network that maps any point of the guided path to its
end (consistency distillation, Song et al. 2023; with guidance, Luo et al. 2023)."""

from __future__ import annotations

import copy

import torch

from ..model import encode_text
from ..sampling import guided
from .common import Average, Run
from .diffusion import BATCH, Scenes, sample, trained
from .options import Options

PEAK = 5e-4
# what the student sees once and for all: classifier-free guidance of the teacher
CFG = 3.0
# the student learns at sigma 1, 7/8, ... 1/8: where Euler with 1, 2, 4 or 8 steps stands
LEVELS = 8
# Euler steps of the teacher from one level to the next
SUBSTEPS = 2


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    teacher = trained(options)
    student = copy.deepcopy(teacher["unet"]).train().requires_grad_(True)
    # a quick average, that the student learns from; the slow one of the run is shipped
    target = Average(student, 0.95)
    run = Run("student", options, student, PEAK, warm_up=100, decay=0.995, target=target.module)
    scenes = Scenes(options)
    empty = encode_text(teacher["text_encoder"], [""])
    for step in run.steps():
        latents, captions, _ = scenes.batch(options.seed + 1, step)
        text = encode_text(teacher["text_encoder"], captions)
        generator = torch.Generator().manual_seed((options.seed + 1) * 1_000_003 + step)
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = (torch.randint(1, LEVELS + 1, (BATCH, 1, 1, 1), generator=generator) / LEVELS).to(options.device)
        noisy = sigmas * noise.to(options.device) + (1 - sigmas) * latents.to(options.device)
        wanted = end_of_path(teacher["unet"], target.module, noisy, sigmas, text, empty.expand_as(text))
        error = endpoint(student, noisy, sigmas, text) - wanted
        # pseudo-Huber: rows that are far off do not drown the others
        loss = (error.square().mean((1, 2, 3)) + 1e-4).sqrt().mean()
        run.descend(step, loss, error=loss.item())
        target.update(student, step)
        if run.due(step):
            model = {"unet": run.average.module, "text_encoder": teacher["text_encoder"]}
            for steps in (4, 2, 1):
                told = sample(options, model, f"student-{steps}-{step + 1:06}", cfg=1.0, steps=steps)
                run.bar.write(f"{step + 1}, {steps} steps: {told}")


def endpoint(network, noisy: torch.Tensor, sigmas: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Where the straight line along the network's velocity meets sigma 0."""
    return noisy - sigmas * network(noisy, sigmas.flatten() * 1000, text).sample


@torch.no_grad()
def end_of_path(teacher, target, noisy, sigmas, text, empty) -> torch.Tensor:
    """What the target network says one level further down the teacher's guided path; at the last level, where the
    path ends."""
    velocity = guided(teacher, text, empty, CFG)
    stride = 1 / (LEVELS * SUBSTEPS)
    for substep in range(SUBSTEPS):
        noisy = noisy - stride * velocity(noisy, (sigmas - substep * stride).flatten())
    below = sigmas - 1 / LEVELS
    ends = endpoint(target, noisy, below, text)
    return torch.where(below > 0.5 / LEVELS, ends, noisy)
