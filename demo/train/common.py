"""What the three training runs share: seeded batches, averaged weights, resuming, the learning rate's course."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch

from ..scenes import Prompt, describe, draw, random_scene


def random_batch(seed: int, step: int, size: int) -> tuple[torch.Tensor, list[Prompt]]:
    """Pictures (size, 3, 64, 64) in [-1, 1] with their captions; the same for the same seed and step, so that a
    resumed run sees what an uninterrupted one would."""
    rng = np.random.default_rng([seed, step])
    scenes = [random_scene(rng) for _ in range(size)]
    prompts = [describe(scene, rng) for scene in scenes]
    return to_tensor([draw(scene) for scene in scenes]), prompts


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] to B pictures (H, W, 3) uint8."""
    return list(((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


class Average:
    """Exponential moving average of a module's weights; the decay grows with the steps, so that the start is soon
    forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


class Checkpoint:
    """Everything a run needs to go on, in one file that is replaced whole."""

    def __init__(self, path: Path, **parts) -> None:
        self.path = path
        self.parts = parts

    def load(self) -> int:
        """The step to go on with; 0 where there is no file."""
        if not self.path.exists():
            return 0
        saved = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["step"]

    def save(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        torch.save({"step": step, **{name: part.state_dict() for name, part in self.parts.items()}}, fresh)
        fresh.replace(self.path)
