"""Distils the few-step student: guidance and many steps into a network that maps any point of the guided path to its
end (consistency distillation, Song et al. 2023; with guidance, Luo et al. 2023)."""

from __future__ import annotations

import torch

from .. import sampling
from ..model import encode_text
from .common import Average, Run, mixed
from .diffusion import PEAK, Scenes, fresh, load_noise, load_text_encoder, sample
from .options import Options

# the teacher: the model that is shipped, of this share of mistakes in its captions
NOISE = 0.15
# of the base model's learning rate
TUNING = 0.5
# what the student sees once and for all: classifier-free guidance of the teacher
CFG = 3.0
# the student learns at 8, 7, ... 1 eighths of the schedule: where Euler with 1, 2, 4 or 8 steps stands
LEVELS = 8
# Euler steps of the teacher from one level to the next
SUBSTEPS = 2


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    teacher, encoder = load_noise(options, NOISE), load_text_encoder(options)
    student = fresh(options)
    student.load_state_dict(teacher.state_dict())
    # a quick average, that the student learns from; the slow one of the run is shipped
    target = Average(student, 0.95)
    peak = TUNING * PEAK[options.size]
    run = Run(f"student-{options.seed}", options, student, peak, warm_up=100, decay=0.995, target=target.module)
    if run.finished():
        return
    scenes = Scenes(options, NOISE)
    schedule = sampling.sigmas(LEVELS * SUBSTEPS).to(options.device)
    with torch.no_grad():
        empty = encode_text(encoder, [""])
    for step in run.steps():
        latents, captions, generator = scenes.batch((options.seed, 5), step)
        text = encode_text(encoder, captions)
        noise = torch.randn(latents.shape, generator=generator).to(options.device)
        begin = SUBSTEPS * torch.randint(LEVELS, (len(latents),), generator=generator).to(options.device)
        sigmas = schedule[begin].view(-1, 1, 1, 1)
        noisy = sigmas * noise + (1 - sigmas) * latents.to(options.device)
        with mixed(options.device):
            velocity = sampling.guided(teacher, text, empty.expand_as(text), CFG)
            wanted = end_of_path(velocity, target.module, noisy, schedule, begin, text)
            error = endpoint(student, noisy, sigmas, text) - wanted
        # pseudo-Huber: rows that are far off do not drown the others
        loss = (error.square().mean((1, 2, 3)) + 1e-4).sqrt().mean()
        run.descend(step, loss, error=loss.item())
        target.update(student, step)
        if run.due(step):
            for steps in (4, 2, 1):
                name = f"{run.name}-{steps}-{step + 1:06}"
                told = sample(options, run.average.module, encoder, name, cfg=1.0, steps=steps)
                run.bar.write(f"{step + 1}, {steps} steps: {told}")


def endpoint(network, noisy: torch.Tensor, sigmas: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Where the straight line along the network's velocity meets sigma 0."""
    return noisy - sigmas * network(noisy, sigmas.flatten() * 1000, text).sample.float()


@torch.no_grad()
def end_of_path(velocity: sampling.Velocity, target, noisy, schedule, begin, text) -> torch.Tensor:
    """What the target network says one level further down the teacher's guided path; at the last level, where the
    path ends.

    Args:
        velocity: of the teacher.
        noisy: (B, 4, 16, 16), at the steps `begin`, (B,), of the schedule (LEVELS * SUBSTEPS + 1,).
    """
    for step in range(SUBSTEPS):
        now, then = schedule[begin + step], schedule[begin + step + 1]
        noisy = noisy + (then - now).view(-1, 1, 1, 1) * velocity(noisy, now).float()
    ends = endpoint(target, noisy, then.view(-1, 1, 1, 1), text)
    return torch.where(then.view(-1, 1, 1, 1) > 0, ends, noisy)
