"""Where the demo model looks for the words of its shapes, against where the shapes are: what the map template shows."""

from __future__ import annotations

import itertools
from collections import Counter

import comfy.sample
import torch

from pladis_pack.demo.scenes import COLOURS, random_prompts
from pladis_pack.nodes.hosting import Settings, find_target
from pladis_pack.nodes.hosting.demo_model import load_demo_model
from pladis_pack.nodes.hosting.looking.attention_map import watch_attention
from pladis_pack.nodes.hosting.looking.words import find_words
from pladis_pack.nodes.hosting.models.layers import layer_names

# the first held-out captions of two objects, never chosen by how they come out
PROMPTS = tuple(prompt for prompt in random_prompts(100, "report", 1) if len(prompt.objects) == 2)[:3]
SEEDS, PERCENTS = range(3), (0.4, 0.7)
# of a colour's value, in one channel: paint still counts as that colour
NEAR = 70
# least part of the picture that a shape has
SMALLEST = 0.01
# a map lies on its shape: this much more there than if it were flat, and less than flat on the other shape
ON_IT = 1.5


def sampled(model, clip, vae, prompt: str, seed: int, sampling: dict):
    """The conditioning, the finished latent and its picture (H, W, 3)."""
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, ""))
    empty = torch.zeros(1, 4, 16, 16)
    latent = comfy.sample.sample(
        model, comfy.sample.prepare_noise(empty, seed), sampling["steps"], sampling["cfg"], sampling["sampler_name"],
        sampling["scheduler"], positive, negative, empty, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return positive, {"samples": latent}, vae.decode(latent)[0]


def places_of(picture: torch.Tensor, colour: str) -> torch.Tensor:
    """(H, W): where the picture has that colour."""
    return ((picture * 255 - torch.tensor(COLOURS[colour], dtype=torch.float32)).abs() < NEAR).all(-1)


def lift(seen: torch.Tensor, places: torch.Tensor) -> float:
    """How much more of a map (h, w) lies on the places (H, W) than if it were flat; 1 is no more."""
    covered = torch.nn.functional.interpolate(places[None, None].float(), seen.shape, mode="area")[0, 0]
    return float((seen * covered).sum() / covered.sum() / seen.mean().clamp(min=1e-12))


def choose_map(sampling: dict) -> dict:
    """The prompt, seed, point and block at which both words of shapes lie most clearly on their shapes, and what to say
    of it. Every prompt, seed, point and layer that was tried counts in what is said."""
    model, clip, vae = load_demo_model("unet")
    target = find_target(model)
    layers = dict(zip(layer_names(target.layers), target.layers, strict=True))
    settings = Settings(frozenset(target.layers), 2.0, 1.5)
    tried, on_it, best = 0, Counter(), None
    for prompt, seed in itertools.product(PROMPTS, SEEDS):
        positive, latent, picture = sampled(model, clip, vae, prompt.text, seed, sampling)
        shapes = ", ".join(kind.shape for kind in prompt.objects)
        places = [places_of(picture.float(), kind.colour) for kind in prompt.objects]
        if min(float(place.float().mean()) for place in places) < SMALLEST:
            continue
        words = find_words(shapes, prompt.text, clip, positive[0][0].shape[1])
        for percent, (layer, place) in itertools.product(PERCENTS, layers.items()):
            maps = watch_attention(
                model, positive, latent, percent, 0, settings, target, words, frozenset([place])
            ).maps()[0]
            own = min(lift(maps[i], places[i]) for i in range(2))
            beside = max(lift(maps[i], places[1 - i]) for i in range(2))
            tried += 1
            on_it[layer] += own > ON_IT and beside < 1
            if best is None or own / beside > best[0]:
                best = own / beside, own, beside, prompt.text, seed, shapes, percent, layer
    _, own, beside, prompt, seed, words, percent, layer = best
    chosen = {"prompt": prompt, "seed": seed, "words": words, "percent": percent}
    if own > ON_IT and beside < 1:
        said = (
            f"the two shapes: in block **{layer}** each word has more than {ON_IT:g} times its mean weight on its own, "
            "and less than its mean on the other. The maps are 8 x 8: a patch tells the place, not the outline. The "
            f"case was picked: {on_it.total()} of the {tried} that we tried are like it. Set **layers** to all for "
            "the mean of every layer."
        )
        return {**chosen, "layers": "custom", "blocks": layer, "seen": said}
    said = (
        f"how far the words are from their shapes: in none of {tried} cases that we tried does this tiny model look "
        "at a shape for its name. Large models often do; put your own loader in the demo's place."
    )
    return {**chosen, "layers": "all", "blocks": "", "seen": said}
