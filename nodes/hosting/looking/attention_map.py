"""Runs a model once at a point of its schedule and collects what its text attention does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.sample
import comfy.samplers
import torch

from ....pladis_core import KINDS, LayerReport, attention_maps
from ..models.layers import Layer
from ..models.target import Target
from ..models.tokens import kinds_of_keys
from ..settings import Settings
from ..wrappers import apply_settings
from .regime import parts_of
from .words import Word

PATCHES = (1, 2, 4, 8, 16, 32)
# in model_options (comfy/samplers.py), where PAG, SAG and others evaluate the model once more
GUIDANCE_HOOKS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
# of a conditioning (comfy/samplers.py, get_area_and_mult)
PLACE_AND_TIME = ("area", "mask", "set_area_to_bounds", "strength", "start_percent", "end_percent")


@dataclass
class AttentionMaps:
    """The watcher of one run. `total` / `layers_seen` are maps (kinds, words, H, W) at the latent's resolution."""

    words: Sequence[Word]
    latent: tuple[int, ...]
    lam: float
    alpha: float
    watched: frozenset[Layer]
    total: torch.Tensor | None = None
    layers_seen: int = 0
    reports: dict[Layer, list[LayerReport]] = field(default_factory=dict)

    def __call__(
        self, layer: Layer, q, k, v, mask=None, scale=None, row_lse=None, size=None, ahead=0, kinds=()
    ) -> None:
        """One attention call; `size` is the picture's at this layer where the host tells it, else see `token_grid`."""
        if layer not in self.watched:
            return
        groups = [[p for p in word.positions if p < k.shape[2]] for word in self.words]
        parts = parts_of(kinds_of_keys(kinds, k.shape[2]))
        maps, report = attention_maps(
            q, k, v, groups, mask, scale, row_lse, lam=self.lam, alpha=self.alpha, parts=parts
        )
        self.reports.setdefault(layer, []).append(report)
        grid = (1, *size) if size is not None else token_grid(q.shape[2], self.latent[2:])
        if grid is None or not all(groups):
            # sound in a video model, or a context without these words
            return
        target = (1, *self.latent[2:])[-2:]
        first = ahead if ahead >= 0 else q.shape[2] - math.prod(grid)
        if first + math.prod(grid) > q.shape[2]:
            # another pack merged places
            return
        maps = maps[..., first : first + math.prod(grid)].unflatten(-1, grid).mean(-3)
        maps = torch.nn.functional.interpolate(maps, target, mode="bilinear", antialias=False).cpu()
        self.total = maps if self.total is None else self.total + maps
        self.layers_seen += 1

    def maps(self) -> torch.Tensor:
        if not self.reports:
            raise ValueError(
                "No text attention ran in the chosen layers, so there is no map: another node skipped or replaced it. "
                "Take the model before that node, or choose other layers."
            )
        if self.total is None:
            raise ValueError(
                "None of the chosen layers attends from the places of this latent to these tokens, so there is no map. "
                "Choose other layers or other words."
            )
        return self.total / self.layers_seen


def token_grid(count: int, latent: Sequence[int]) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of a transformer's tokens for a latent of size ([T,] H, W) or (L,); None if none fits.

    A few of `count` may be something else, a reference frame or a register, where the patches are of the usual size.
    """
    size = (1,) * (3 - len(latent)) + tuple(latent)
    patches = sorted(itertools.product(PATCHES[:3], PATCHES, PATCHES), key=lambda p: (p[1] != p[2], p[0], p[1] * p[2]))
    grids = {patch: tuple(-(-n // p) for n, p in zip(size, patch, strict=True)) for patch in patches}
    exact = (grid for grid in grids.values() if math.prod(grid) == count)
    usual = (grid for grid in (grids[1, 1, 1], grids[1, 2, 2]) if math.prod(grid) <= count <= 2 * math.prod(grid))
    return next(itertools.chain(exact, usual), None)


def watch_attention(
    model, positive: list, latent: dict, percent: float, seed: int, settings: Settings, target: Target,
    words: Sequence[Word], watched: frozenset[Layer],
) -> AttentionMaps:  # fmt: skip
    """One evaluation of MODEL with PLADIS by `settings`, on the latent noised to `percent` of the schedule.

    Of several conditionings the first, on the whole picture and at any percent; without guidance that evaluates the
    model more often.
    """
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    image = image if image.is_nested else image[:1]
    shape = tuple((image.unbind()[0] if image.is_nested else image).shape)
    watcher = AttentionMaps(words, shape, settings.lam, settings.alpha, watched)
    model = apply_settings(model, settings, target, watch=watcher)
    for hook in GUIDANCE_HOOKS:
        model.model_options.pop(hook, None)
    context, options = positive[0]
    positive = [[context, {key: value for key, value in options.items() if key not in PLACE_AND_TIME}]]
    sampling = model.get_model_object("model_sampling")
    sigma = min(max(float(sampling.percent_to_sigma(percent)), float(sampling.sigma_min)), float(sampling.sigma_max))
    comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(image, seed), 1.0, comfy.samplers.sampler_object("euler"),
        torch.tensor([sigma, 0.0]), positive, positive, image, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return watcher


__all__ = ["KINDS", "AttentionMaps", "token_grid", "watch_attention"]
