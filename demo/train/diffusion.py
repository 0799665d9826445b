"""Trains the diffusion model and its text encoder by flow matching (Lipman et al. 2023), on latents."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .. import config
from ..model import autoencoder, encode_text, text_encoder, unet
from ..oracle import read, score
from ..sampling import euler, guided
from ..scenes import CLEAR, Placed, describe, draw, random_prompts, random_scene, relation_between
from .auxiliary import Probes
from .common import Run, averaged, to_pictures, to_tensor
from .options import Options

BATCH = 64
PEAK = 1.5e-3
SCENES = 60_000
# until these steps: shapes and colours; relations alone, from pure noise; half of each batch either way; then a fifth
# for relations
SHAPES_UNTIL, RELATIONS_UNTIL, HALVES_UNTIL = 2500, 3000, 7500
# weight of the probes' loss
AUXILIARY = 1.0
# how often the caption is left out, for classifier-free guidance
DROPOUT = 0.1


class Scenes:
    """Encoded scenes; what each shows is kept, so that its caption is worded anew every time."""

    def __init__(self, options: Options) -> None:
        rng = np.random.default_rng([options.seed, 1])
        self.scenes = [random_scene(rng) for _ in range(SCENES)]
        encoder = hashlib.sha256((options.folder / "autoencoder.safetensors").read_bytes()).hexdigest()[:8]
        file = options.folder / f"latents-{SCENES}-{options.seed}-{encoder}.safetensors"
        if not file.exists():
            fresh = file.with_suffix(".new")
            save_file({"latents": self._encode(options).contiguous()}, fresh)
            fresh.replace(file)
        self.latents = load_file(file)["latents"]
        # two objects whose relation is clear: a caption of theirs says more about the layout than any other
        self.pairs = np.array([number for number, scene in enumerate(self.scenes) if _is_clear_pair(scene)])

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

    def batch(self, seed: int, step: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Latents (BATCH, 4, 16, 16), captions, and which rows are there for their relation (BATCH,)."""
        rng = np.random.default_rng([seed, 2, step])
        related = np.arange(BATCH) < BATCH * _share_of_relations(step)
        chosen = np.where(related, rng.choice(self.pairs, BATCH), rng.integers(SCENES, size=BATCH))
        captions = [describe(self.scenes[i], rng).text for i in chosen]
        captions = ["" if rng.random() < DROPOUT else caption for caption in captions]
        return self.latents[chosen], captions, torch.from_numpy(related)


def _share_of_relations(step: int) -> float:
    if step < SHAPES_UNTIL:
        return 0.0
    if step < RELATIONS_UNTIL:
        return 1.0
    return 0.5 if step < HALVES_UNTIL else 0.2


def _is_clear_pair(scene: list[Placed]) -> bool:
    if len(scene) != 2:
        return False
    first, second = scene
    return relation_between(first.x - second.x, first.y - second.y, CLEAR) is not None


def load_autoencoder(options: Options) -> torch.nn.Module:
    model = autoencoder()
    model.load_state_dict(load_file(options.folder / "autoencoder.safetensors"))
    return model.to(options.device).eval().requires_grad_(False)


def random_sigmas(related: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(BATCH, 1, 1, 1): logit-normal (Esser et al. 2024); a tenth of them uniform, for the ends. Rows that are there
    for their relation (`related`, (BATCH,) boolean) are from .9 to 1: nearly pure noise, where only the words can tell
    what goes where; all of them at 1 while relations are learnt alone."""
    sigmas = torch.sigmoid(torch.randn(BATCH, generator=generator) + 0.3)
    everywhere = torch.rand(BATCH, generator=generator)
    chosen = torch.rand(BATCH, generator=generator) < 0.1
    sigmas = torch.where(chosen, everywhere, sigmas)
    near_noise = torch.ones(BATCH) if related.all() else 1 - 0.1 * everywhere
    return torch.where(related, near_noise, sigmas).view(-1, 1, 1, 1)


def train(options: Options) -> None:
    torch.manual_seed(options.seed)
    model = torch.nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()}).to(options.device)
    probes = Probes(model["unet"], config.TEXT_ENCODER["hidden_size"]).to(options.device)
    run = Run("diffusion", options, model, PEAK, probes=probes)
    # only now: the average, a copy of the network, must not be watched
    probes.watch(model["unet"])
    scenes = Scenes(options)
    smooth = 1.0
    for step in run.steps():
        latents, captions, related = scenes.batch(options.seed, step)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = random_sigmas(related, generator)
        noisy = ((1 - sigmas) * latents + sigmas * noise).to(options.device)
        text = encode_text(model["text_encoder"], captions)
        velocity = model["unet"](noisy, sigmas.flatten().to(options.device) * 1000, text).sample
        error = (velocity - (noise - latents).to(options.device)).square().mean()
        probing = probes.loss(text, captions)
        smooth += 0.01 * (error.item() - smooth)
        run.descend(step, error + AUXILIARY * probing, error=smooth, probes=probing.item())
        if run.due(step):
            run.bar.write(f"{step + 1}: {sample(options, run.average.module, f'diffusion-{step + 1:06}')}")


def trained(options: Options) -> torch.nn.ModuleDict:
    """The averaged weights of the finished run."""
    model = torch.nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder()})
    model.load_state_dict(averaged(options.folder / "diffusion.pt"))
    return model.to(options.device).eval().requires_grad_(False)


@torch.no_grad()
def sample(options: Options, model, name: str, cfg: float = 3.0, steps: int = 20, count: int = 64) -> str:
    """Draws held-out captions, writes the first of them to NAME.png, and says how well they are followed."""
    prompts = random_prompts(count, "tune", seed=0)
    text = encode_text(model["text_encoder"], [prompt.text for prompt in prompts])
    empty = encode_text(model["text_encoder"], [""]).expand_as(text)
    noise = torch.randn(
        count, config.LATENT_CHANNELS, config.LATENT_SIZE, config.LATENT_SIZE, generator=torch.manual_seed(0)
    ).to(options.device)
    latents = euler(guided(model["unet"], text, empty, cfg), noise, steps)
    pictures = to_pictures(load_autoencoder(options).decode(latents).sample)
    scores = [score(prompt, read(picture)) for prompt, picture in zip(prompts, pictures, strict=True)]
    options.picture(name, [pictures[i : i + 8] for i in range(0, 32, 8)])
    relations = [s.relation for s in scores if s.relation is not None]
    return (
        f"recall {np.mean([s.recall for s in scores]):.3f}, F1 {np.mean([s.f1 for s in scores]):.3f}, "
        f"relations {np.mean(relations):.3f} of {len(relations)}"
    )
