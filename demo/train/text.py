"""Trains the text encoder as CLIP's was (Radford et al. 2021): captions against pictures, with a small image encoder.

Afterwards it is frozen, and the image encoder is not used again.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from ..model import text_encoder
from ..scenes import describe, draw, exchanged, random_scene
from ..vocabulary import END, TOKENS, tokenize
from .common import Run, mixed, to_tensor
from .options import Options

BATCH = 130
PEAK = 1e-3
# what twins exchange: each its own, for an encoder binds only what it must to tell pictures apart
EXCHANGED = ("colour", "shape", "size", "fill")
# how often a caption tells size and fill: oftener than elsewhere, since twins cannot be told apart by what is not said
TOLD = 0.8


class Contrast(nn.Module):
    """A text encoder and a picture encoder, each with a projection to common unit vectors."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.text = text_encoder(size)
        width = self.text.config.hidden_size
        self.words = nn.Linear(width, width, bias=False)
        self.picture = PictureEncoder(width)
        # CLIP's start: a temperature of .07
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, tokens: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
        """(B, L), (B, 3, 64, 64) -> (B, B): how well each caption, a row, goes with each picture."""
        captions = normalize(self.words(self.text(tokens).pooler_output).float(), dim=-1)
        return self.scale.exp().clamp(max=100) * captions @ normalize(self.picture(pictures).float(), dim=-1).T


class PictureEncoder(nn.Module):
    """(B, 3, 64, 64) -> (B, width): convolutions down to 8 x 8, then what is there at most and on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, width // 3, width // 2, width)
        layers: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 2 * width, 3, padding=1), nn.SiLU())
        self.out = nn.Linear(4 * width, width)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        features = self.layers(pictures).flatten(2)
        return self.out(torch.cat((features.amax(-1), features.mean(-1)), dim=-1))


def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (BATCH, L) and pictures (BATCH, 3, 64, 64), in five equal parts: scenes, and for each of EXCHANGED the
    same scenes with that attribute exchanged between objects; where all objects have the same one, another scene.

    L is that of the longest caption with its end token: attention is causal, and nothing behind it is learned from.
    """
    rng = np.random.default_rng([seed, 1, step])
    firsts = [random_scene(rng) for _ in range(BATCH // (1 + len(EXCHANGED)))]
    scenes = list(firsts)
    for attribute in EXCHANGED:
        twins = [exchanged(scene, attribute) for scene in firsts]
        scenes += [random_scene(rng) if twin == first else twin for first, twin in zip(firsts, twins, strict=True)]
    tokens = torch.tensor([tokenize(describe(scene, rng, told=TOLD).text) for scene in scenes])
    longest = int((tokens != TOKENS[END]).sum(1).max())
    return tokens[:, : longest + 1], to_tensor([draw(scene) for scene in scenes])


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    model = Contrast(options.size).to(options.device)
    run = Run("text_encoder", options, model, PEAK)
    for step in run.steps():
        tokens, pictures = (part.to(options.device) for part in batch(options.seed, step))
        with mixed(options.device):
            logits = model(tokens, pictures)
        right = torch.arange(BATCH, device=options.device)
        loss = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
        run.descend(step, loss, contrast=loss.item(), found=(logits.argmax(1) == right).float().mean().item())
        if run.due(step):
            run.bar.write(f"{step + 1}: {matched(run.average.module, options)}")
    save_file(run.average.module.text.state_dict(), options.folder / "text_encoder.safetensors")


@torch.no_grad()
def matched(model: Contrast, options: Options, batches: int = 8) -> str:
    """How often a new caption finds its picture in a batch, and how often it prefers it to each twin."""
    found = []
    preferred: dict[str, list[float]] = {attribute: [] for attribute in EXCHANGED}
    for step in range(batches):
        tokens, pictures = (part.to(options.device) for part in batch(options.seed + 1_000_000, step))
        logits = model(tokens, pictures)
        rows = torch.arange(len(logits), device=options.device)
        found.append((logits.argmax(1) == rows).float().mean().item())
        firsts = rows[: len(rows) // (1 + len(EXCHANGED))]
        for part, attribute in enumerate(EXCHANGED, start=1):
            twins = firsts + part * len(firsts)
            preferred[attribute].append((logits[firsts, firsts] > logits[firsts, twins]).float().mean().item())
    told = ", ".join(f"{attribute} {np.mean(shares):.3f}" for attribute, shares in preferred.items())
    return f"found among {BATCH} {np.mean(found):.3f}, told from its twin by {told}"
