"""What must hold before any figure counts: the oracle reads what is there, and what the text attention looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from .. import sampling
from ..model import encode_text
from ..oracle import read
from ..scenes import Placed, draw, random_prompts, random_scene
from ..vocabulary import split_words
from .common import to_pictures, to_tensor
from .diffusion import load_autoencoder, load_text_encoder
from .options import Options

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


class Watch:
    """An attention processor that keeps where the text attention's mass goes: start token, words, first end token,
    padding (the end tokens after it), and the effective number of tokens, exp of the entropy."""

    def __init__(self, inner, words: Sequence[int]) -> None:
        self.inner, self.words, self.seen = inner, torch.tensor(words), []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **others):
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        query, key = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key))
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        position = torch.arange(weights.shape[-1])
        last = self.words[:, None] + 1
        groups = (position == 0, (position > 0) & (position < last), position == last, position > last)
        masses = [(weights * group.expand(len(last), -1)[:, None, None].to(weights)).sum(-1).mean() for group in groups]
        effective = (-(weights * weights.clamp_min(1e-20).log()).sum(-1)).exp().mean()
        self.seen.append(torch.stack([*masses, effective]))
        return self.inner(attn, hidden_states, encoder_hidden_states, **others)


@torch.no_grad()
def sink(unet: UNet2DConditionModel, encoder, count: int = 64, steps: int = 10) -> dict[str, list[float]]:
    """For each text attention: mean mass on the start token, the words, the first end token and padding, and effective
    tokens, over pictures that are sampled without guidance for captions of the split to tune on."""
    captions = [prompt.text for prompt in random_prompts(count, "tune", seed=0)]
    words = [len(split_words(caption)) for caption in captions]
    inner = unet.attn_processors
    watches = {name: Watch(inner[name], words) for name in inner if ".attn2." in name}
    unet.set_attn_processor({**inner, **watches})
    text = encode_text(encoder, captions)
    sampling.euler(sampling.guided(unet, text, text, 1.0), sampling.noise(0, count), steps)
    unet.set_attn_processor(inner)
    return {name: torch.stack(watch.seen).mean(0).tolist() for name, watch in watches.items()}


def show(options: Options, unet: UNet2DConditionModel) -> str:
    lines = [f"oracle, {where}: {_shares(shares)}" for where, shares in oracle_accuracy(options).items()]
    names = ("start", "words", "end", "padding", "effective tokens")
    for layer, masses in sink(unet, load_text_encoder(options)).items():
        lines.append(f"{layer}: {_shares(dict(zip(names, masses, strict=True)))}")
    return "\n".join(lines)


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
