"""Pictures of one model with one setting, and what the oracle reads in them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from demo import config, sampling
from demo.model import encode_text, unet
from demo.oracle import Score, read, score
from demo.scenes import Prompt
from demo.train.common import mixed, to_pictures
from demo.train.diffusion import load_autoencoder, load_text_encoder
from demo.train.options import Options
from demo.vocabulary import split_words

from .arms import Setting
from .attention import Rows, put
from .models import Trained

BATCH = 125
NOISE_SEED = 2026


@dataclass(frozen=True)
class Sampling:
    """Euler steps and guidance scale."""

    steps: int
    cfg: float

    @property
    def evaluations(self) -> int:
        """Of the network, for each picture."""
        return self.steps * (1 if self.cfg == 1 else 2)


@dataclass(frozen=True)
class Disturbance:
    """Gaussian noise of `level` times the root mean square of what it is added to: "text states" (of words, after the
    text encoder) or "queries" (of the text attention)."""

    where: str = "text states"
    level: float = 0.0


NONE = Disturbance()


class Studio:
    """One trained model, ready to draw.

    Args:
        precise: float32 throughout; else bfloat16 where the device has it, as in training.
        device: that draws; noise is drawn on the CPU all the same.
    """

    def __init__(self, model: Trained, precise: bool = False, device: str = "cpu") -> None:
        options = Options(model.folder, 0, model.seed, 0, device)
        self.model, self.precise, self.device = model, precise, device
        self.unet = unet().to(device).eval().requires_grad_(False)
        self.unet.load_state_dict(model.weights)
        self.text_encoder, self.autoencoder = load_text_encoder(options), load_autoencoder(options)
        self.states: dict[str, torch.Tensor] = {"": encode_text(self.text_encoder, [""])[0]}

    @torch.no_grad()
    def scores(
        self,
        prompts: Sequence[Prompt],
        way: Sampling,
        setting: Setting,
        disturbance: Disturbance = NONE,
        done: Callable[[int], object] = lambda pictures: None,
    ) -> list[Score]:
        """One for each caption; a picture's noise depends on the caption and the model's seed alone.

        Args:
            done: told the number of pictures after each batch.
        """
        scores: list[Score] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            pictures = self.draw([prompt.text for prompt in batch], way, setting, disturbance)
            scores += [score(prompt, read(picture)) for prompt, picture in zip(batch, pictures, strict=True)]
            done(len(batch))
        return scores

    @torch.no_grad()
    def draw(self, captions: Sequence[str], way: Sampling, setting: Setting, disturbance: Disturbance = NONE) -> list:
        """Pictures (64, 64, 3) uint8."""
        start = torch.cat([starting_noise(caption, self.model.seed) for caption in captions]).to(self.device)
        words = [len(split_words(caption)) for caption in captions]
        text = self._text(captions)
        queries = disturbance.level if disturbance.where == "queries" else 0.0
        if disturbance.where == "text states" and disturbance.level:
            text = disturbed(text, captions, words, disturbance.level, self.model.seed)
        generator = torch.Generator().manual_seed(seed_of(captions[0], self.model.seed, "queries"))
        put(self.unet, setting, Rows(words + [0] * len(words) * (way.cfg != 1), queries, generator))
        with torch.autocast(self.device, enabled=False) if self.precise else mixed(self.device):
            velocity = sampling.guided(self.unet, text, self.states[""].expand_as(text), way.cfg)
            latents = sampling.euler(lambda x, sigma: velocity(x, sigma).float(), start, way.steps)
            return to_pictures(self.autoencoder.decode(latents).sample)

    def _text(self, captions: Sequence[str]) -> torch.Tensor:
        missing = [caption for caption in captions if caption not in self.states]
        if missing:
            self.states.update(zip(missing, encode_text(self.text_encoder, missing), strict=True))
        return torch.stack([self.states[caption] for caption in captions])


def seed_of(caption: str, seed: int, what: str = "latents") -> int:
    """32 bits: of more, torch's generator on a CPU takes no notice."""
    return zlib.crc32(f"{NOISE_SEED} {seed} {what}: {caption}".encode())


def starting_noise(caption: str, seed: int) -> torch.Tensor:
    shape = (1, config.LATENT_CHANNELS, config.LATENT_SIZE, config.LATENT_SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(caption, seed)))


def disturbed(
    text: torch.Tensor, captions: Sequence[str], words: Sequence[int], level: float, seed: int
) -> torch.Tensor:
    """Text states with noise on the words, relative to the root mean square of each caption's words."""
    text = text.clone()
    for row, caption, count in zip(text, captions, words, strict=True):
        states = row[1 : count + 1]
        generator = torch.Generator().manual_seed(seed_of(caption, seed, "text states"))
        noise = torch.randn(states.shape, generator=generator).to(states.device)
        states += level * states.square().mean().sqrt() * noise
    return text
