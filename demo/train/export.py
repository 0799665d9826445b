"""Writes what the training runs made to demo/weights, in float16."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from .. import config
from .common import averaged
from .diffusion import noisy_name
from .options import SHIPPED, Options
from .student import NOISE


def export(options: Options) -> None:
    """The shipped seed's runs, as files of demo/weights.

    Raises:
        ValueError: a run has not come to its end.
    """
    if options.seed != SHIPPED:
        return
    config.WEIGHTS.mkdir(exist_ok=True)
    for name in ("autoencoder", "text_encoder"):
        _write(name, load_file(options.folder / f"{name}.safetensors"))
    _write("unet", averaged(options.folder / f"{noisy_name(NOISE, SHIPPED)}.pt"))
    _write("unet_few_step", averaged(options.folder / f"student-{SHIPPED}.pt"))


def _write(name: str, weights: dict[str, torch.Tensor]) -> None:
    file = config.WEIGHTS / f"{name}.safetensors"
    save_file({key: value.half().contiguous() for key, value in weights.items()}, file)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
