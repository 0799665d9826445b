"""Writes what the training runs made to demo/weights, in float16."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import config
from .common import averaged


def export(folder: Path) -> None:
    """Each run of `folder`, as files of demo/weights; a run that was never begun is left out.

    Raises:
        ValueError: a run has not come to its end.
    """
    config.WEIGHTS.mkdir(exist_ok=True)
    if (folder / "autoencoder.safetensors").exists():
        _write("autoencoder", load_file(folder / "autoencoder.safetensors"))
    if (folder / "diffusion.pt").exists():
        average = averaged(folder / "diffusion.pt")
        for name in ("unet", "text_encoder"):
            prefix = f"{name}."
            _write(name, {k.removeprefix(prefix): v for k, v in average.items() if k.startswith(prefix)})
    if (folder / "student.pt").exists():
        _write("unet_few_step", averaged(folder / "student.pt"))


def _write(name: str, weights: dict[str, torch.Tensor]) -> None:
    file = config.WEIGHTS / f"{name}.safetensors"
    save_file({key: value.half().contiguous() for key, value in weights.items()}, file)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
