"""What every training run is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Options:
    folder: Path
    steps: int
    seed: int
    every: int
    device: str

    def picture(self, name: str, rows: list[list[np.ndarray]]) -> None:
        """Writes samples as they look after some step: rows of pictures, twice their size."""
        grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.NEAREST).save(
            self.folder / f"{name}.png"
        )


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
