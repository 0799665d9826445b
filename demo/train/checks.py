"""What must be known before any figure counts: that the oracle reads what is there, how well captions are followed, and
where the text attention's mass goes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..oracle import read
from ..scenes import Placed, draw, random_scene
from .common import to_pictures, to_tensor
from .diffusion import load_autoencoder, load_noise, load_text_encoder, noisy_name, sample
from .options import NOISES, Options
from .sink import sink

ATTRIBUTES = ("colour", "shape", "size", "fill")
# pixels between an object and where it is seen
NEAR = 4.0


def oracle_accuracy(options: Options, count: int = 500) -> dict[str, dict[str, float]]:
    """Shares of the objects of `count` drawn scenes whose attributes the oracle reads, from the pictures and after the
    autoencoder; `extra`: objects per scene that it sees where there is none."""
    rng = np.random.default_rng([options.seed, 6])
    scenes = [random_scene(rng) for _ in range(count)]
    pictures = [draw(scene) for scene in scenes]
    return {
        "drawn": accuracy(scenes, pictures),
        "after the autoencoder": accuracy(scenes, again(options, pictures)),
    }


@torch.no_grad()
def again(options: Options, pictures: Sequence[np.ndarray], batch: int = 50) -> list[np.ndarray]:
    """The pictures, encoded and decoded."""
    model, out = load_autoencoder(options), []
    for start in range(0, len(pictures), batch):
        pixels = to_tensor(list(pictures[start : start + batch])).to(options.device)
        out += to_pictures(model.decode(model.encode(pixels).latent_dist.mean).sample)
    return out


def accuracy(scenes: Sequence[Sequence[Placed]], pictures: Sequence[np.ndarray]) -> dict[str, float]:
    right = {name: 0 for name in ("seen", *ATTRIBUTES)}
    extra, total = 0, sum(map(len, scenes))
    for scene, picture in zip(scenes, pictures, strict=True):
        objects = read(picture)
        extra += max(len(objects) - len(scene), 0)
        for placed in scene:
            found = [other for other in objects if np.hypot(other.x - placed.x, other.y - placed.y) < NEAR]
            right["seen"] += bool(found)
            for name in ATTRIBUTES:
                right[name] += bool(found) and getattr(found[0].kind, name) == getattr(placed.kind, name)
    return {name: number / total for name, number in right.items()} | {"extra": extra / len(scenes)}


def show(options: Options, count: int = 300) -> str:
    """The oracle's accuracy; and for each share of mistakes how captions of the split to tune on are followed, by
    softmax with 10 steps, and where the text attention's mass goes."""
    lines = [f"oracle, {where}: {_shares(shares)}" for where, shares in oracle_accuracy(options).items()]
    encoder = load_text_encoder(options)
    for noise in NOISES:
        model, name = load_noise(options, noise), noisy_name(noise, options.seed)
        for cfg in (1.0, 3.0):
            told = sample(options, model, encoder, f"{name}-cfg{cfg:g}", cfg, steps=10, count=count)
            lines.append(f"{name}, CFG {cfg:g}: {told}")
        lines += [f"{name}, {layer}: {_shares(parts)}" for layer, parts in sink(model, encoder).items()]
    return "\n".join(lines)


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
