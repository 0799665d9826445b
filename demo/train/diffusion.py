"""Trains the diffusion model by flow matching (Lipman et al. 2023), on latents: first the base model, on captions that
are true, then, from it, one model for each share of mistakes in the captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .. import sampling
from ..attention import SoftmaxAttention
from ..model import autoencoder, encode_text, text_encoder, unet
from ..oracle import Score, read, score
from ..scenes import describe, draw, random_prompts, random_scene
from .common import Run, averaged, mixed, to_pictures, to_tensor
from .options import Options
from .sink import Penalty

SCENES = 40_000
BATCH = {"small": 32, "large": 256}
PEAK = {"small": 1e-3, "large": 4e-4}
# of the learning rate, when the base model is trained on
TUNING = 0.4
# how often the caption is left out, for classifier-free guidance
DROPOUT = 0.1


class Scenes:
    """Encoded scenes, the same for every seed; what each shows is kept, so that its caption is worded anew every time.

    Args:
        noise: the share of objects that captions get wrong.
    """

    def __init__(self, options: Options, noise: float = 0.0) -> None:
        rng = np.random.default_rng([0, 2])
        self.scenes = [random_scene(rng) for _ in range(SCENES)]
        self.size, self.noise = BATCH[options.size], noise
        encoder = hashlib.sha256((options.folder / "autoencoder.safetensors").read_bytes()).hexdigest()[:8]
        file = options.folder / f"latents-{SCENES}-{encoder}.safetensors"
        if not file.exists():
            fresh = file.with_suffix(".new")
            save_file({"latents": self._encode(options).contiguous()}, fresh)
            fresh.replace(file)
        self.latents = load_file(file)["latents"]

    @torch.no_grad()
    def _encode(self, options: Options) -> torch.Tensor:
        encoder = load_autoencoder(options)
        chunks = [self.scenes[i : i + 100] for i in range(0, SCENES, 100)]
        return torch.cat(
            [
                encoder.encode(to_tensor([draw(scene) for scene in chunk]).to(options.device)).latent_dist.mean.cpu()
                for chunk in tqdm(chunks, desc="encoding scenes", mininterval=10)
            ]
        )

    def batch(self, stream: Sequence[int], step: int) -> tuple[torch.Tensor, list[str], torch.Generator]:
        """Latents (B, 4, 16, 16), captions, and a generator for what else is random: the same for the same stream and
        step; whatever the share of mistakes, but for the captions."""
        rng = np.random.default_rng([*stream, step])
        chosen = rng.integers(SCENES, size=self.size)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        captions = [describe(self.scenes[i], rng, self.noise).text for i in chosen]
        captions = ["" if rng.random() < DROPOUT else caption for caption in captions]
        return self.latents[chosen], captions, generator


def random_sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 1, 1, 1): logit-normal (Esser et al. 2024), towards noise, where it is decided what goes where; a tenth
    of them uniform, for the ends."""
    sigmas = torch.sigmoid(1.2 * torch.randn(count, generator=generator) + 0.8)
    everywhere = torch.rand(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < 0.1
    return torch.where(chosen, everywhere, sigmas).view(-1, 1, 1, 1)


def train_base(options: Options) -> None:
    torch.manual_seed(options.seed)
    run = Run("base", options, fresh(options), PEAK[options.size])
    _descend(run, options, 0.0, (options.seed, 3))


def train_noise(options: Options, noise: float) -> None:
    """The base model, trained on with captions that get a share `noise` of their objects wrong."""
    model = fresh(options)
    model.load_state_dict(averaged(options.folder / "base.pt"))
    run = Run(noisy_name(noise, options.seed), options, model, TUNING * PEAK[options.size])
    _descend(run, options, noise, (options.seed, 4))


def train_sink(options: Options, noise: float) -> None:
    """As `train_noise`, with a penalty that makes the start token a sink."""
    model = fresh(options)
    model.load_state_dict(averaged(options.folder / "base.pt"))
    run = Run(f"sink-{options.seed}", options, model, TUNING * PEAK[options.size])
    _descend(run, options, noise, (options.seed, 4), Penalty(model).take)


def noisy_name(noise: float, seed: int) -> str:
    return f"noise{100 * noise:02.0f}-{seed}"


def load_noise(options: Options, noise: float) -> torch.nn.Module:
    """The finished model of that share of mistakes."""
    model = fresh(options)
    model.load_state_dict(averaged(options.folder / f"{noisy_name(noise, options.seed)}.pt"))
    return model.eval().requires_grad_(False)


def fresh(options: Options) -> torch.nn.Module:
    model = unet(options.size).to(options.device)
    model.set_attn_processor(SoftmaxAttention())
    return model


def _descend(
    run: Run,
    options: Options,
    noise: float,
    stream: tuple[int, ...],
    penalty: Callable[[], torch.Tensor | float] = lambda: 0.0,
) -> None:
    if run.finished():
        return
    scenes, encoder = Scenes(options, noise), load_text_encoder(options)
    smooth = 1.0
    for step in run.steps():
        latents, captions, generator = scenes.batch(stream, step)
        start = torch.randn(latents.shape, generator=generator)
        sigmas = random_sigmas(len(latents), generator)
        noisy = ((1 - sigmas) * latents + sigmas * start).to(options.device)
        with mixed(options.device):
            text = encode_text(encoder, captions)
            velocity = run.model(noisy, sigmas.flatten().to(options.device) * 1000, text).sample.float()
        error = (velocity - (start - latents).to(options.device)).square().mean()
        smooth += 0.01 * (error.item() - smooth)
        run.descend(step, error + penalty(), error=smooth)
        if run.due(step):
            told = sample(options, run.average.module, encoder, f"{run.name}-{step + 1:06}")
            run.bar.write(f"{step + 1}: error {smooth:.4f}, {told}")


def load_autoencoder(options: Options) -> torch.nn.Module:
    return _frozen(autoencoder(), options, "autoencoder")


def load_text_encoder(options: Options) -> torch.nn.Module:
    return _frozen(text_encoder(options.size), options, "text_encoder")


def _frozen(model: torch.nn.Module, options: Options, name: str) -> torch.nn.Module:
    model.load_state_dict(load_file(options.folder / f"{name}.safetensors"))
    return model.to(options.device).eval().requires_grad_(False)


@torch.no_grad()
def sample(options: Options, model, encoder, name: str, cfg: float = 3.0, steps: int = 20, count: int = 96) -> str:
    """Draws captions of the split to tune on, writes the first of them to NAME.png, and says how well they are
    followed."""
    prompts = random_prompts(count, "tune", seed=0)
    text = encode_text(encoder, [prompt.text for prompt in prompts])
    empty = encode_text(encoder, [""]).expand_as(text)
    latents = sampling.euler(
        sampling.guided(model, text, empty, cfg), sampling.noise(0, count).to(options.device), steps
    )
    pictures = to_pictures(load_autoencoder(options).decode(latents).sample)
    options.picture(name, [pictures[i : i + 8] for i in range(0, 32, 8)])
    return summary([score(prompt, read(picture)) for prompt, picture in zip(prompts, pictures, strict=True)])


def summary(scores: Sequence[Score]) -> str:
    """Means, and how often all objects are right for each number of objects."""
    by_count = {
        count: np.mean([s.complete for s in scores if s.named == count]) for count in sorted({s.named for s in scores})
    }
    return (
        f"recall {np.mean([s.recall for s in scores]):.3f}, F1 {np.mean([s.f1 for s in scores]):.3f}, "
        f"all objects {np.mean([s.complete for s in scores]):.3f} "
        f"({', '.join(f'{count}: {share:.2f}' for count, share in by_count.items())})"
    )
