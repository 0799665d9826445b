"""What every training run is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# optimizer steps of each phase
STEPS = {"autoencoder": 1800, "text_encoder": 4000, "base": 20_000, "noise": 3000, "sink": 3000, "student": 800}
# the seed whose models are shipped, of whatever is trained once, and of the variant with a sink
SHIPPED = 0
# the dial: shares of the objects that captions get wrong
NOISES = (0.0, 0.15, 0.3)


@dataclass(frozen=True)
class Options:
    """folder: checkpoints and samples. every: steps between samples. size: "small", or "large" for a GPU."""

    folder: Path
    steps: int
    seed: int
    every: int
    device: str
    size: str = "small"

    def picture(self, name: str, rows: list[list[np.ndarray]]) -> None:
        """Writes samples as they look after some step: rows of pictures, twice their size."""
        grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.NEAREST).save(
            self.folder / f"{name}.png"
        )


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
