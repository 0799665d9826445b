"""Reads a picture back: which coloured shapes it shows, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from .scenes import COLOURS, GROUND, KINDS, RADII, Kind, Placed, Prompt, coverage, relation_between

# a patch of ink smaller than this is a speck, not an object (the smallest true shape has about 90 pixels)
SMALLEST = 24
# least overlap (intersection over union) with the best template: below, it is ink of no known shape
LEAST_OVERLAP = 0.6
WINDOW = 28


def read(picture: np.ndarray) -> list[Placed]:
    """The objects of a picture.

    Each pixel is split into ground and ink of the colour that explains it best; every connected patch of one colour is
    compared with all shapes at all sizes, laid centre of mass on centre of mass.

    Args:
        picture: (64, 64, 3) uint8.
    """
    ink, colour = _inks(picture)
    found = []
    for number, name in enumerate(COLOURS):
        patches, count = ndimage.label((colour == number) & (ink > 0.5))
        for patch in range(1, count + 1):
            inside = patches == patch
            if inside.sum() >= SMALLEST:
                placed = _fit(name, np.where(ndimage.binary_dilation(inside) & (colour == number), ink, 0.0))
                found += [placed] if placed else []
    return found


def _inks(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(64, 64) amount of ink in [0, 1] and (64, 64) number of its colour: the nearest point on the lines from the
    ground to each colour."""
    pixels = picture.astype(np.float64) - GROUND
    lines = np.array(list(COLOURS.values()), dtype=np.float64) - GROUND
    amounts = np.clip(pixels @ lines.T / (lines**2).sum(1), 0.0, 1.0)
    misses = ((pixels[:, :, None] - amounts[..., None] * lines) ** 2).sum(-1)
    colour = misses.argmin(-1)
    return np.take_along_axis(amounts, colour[..., None], -1)[..., 0], colour


def _fit(colour: str, ink: np.ndarray) -> Placed | None:
    """The shape that overlaps most with one patch of ink; None where none does well enough."""
    y, x = ndimage.center_of_mass(ink)
    patch = _window(ink, x, y).ravel()
    shapes, radii, offsets, templates = _templates()
    shared = np.minimum(templates, patch).sum(1)
    overlaps = shared / np.maximum(templates, patch).sum(1)
    best = int(overlaps.argmax())
    if overlaps[best] < LEAST_OVERLAP:
        return None
    # centres of mass are in pixel numbers, positions in distances from the edge
    return Placed(
        Kind(colour, shapes[best]), float(x + 0.5 - offsets[best][0]), float(y + 0.5 - offsets[best][1]), radii[best]
    )


def _window(ink: np.ndarray, x: float, y: float) -> np.ndarray:
    """(WINDOW, WINDOW) of `ink`, moved so that (x, y) is in its middle."""
    middle = (WINDOW - 1) / 2
    padded = np.pad(ink, WINDOW)
    moved = ndimage.shift(padded, (middle - y % 1, middle - x % 1), order=1)
    top, left = int(y // 1) + WINDOW, int(x // 1) + WINDOW
    return moved[top : top + WINDOW, left : left + WINDOW]


@cache
def _templates() -> tuple[list[str], list[float], list[tuple[float, float]], np.ndarray]:
    """Shapes, radii, centres of mass as seen from the shapes' own centres, and (N, WINDOW ** 2) coverages."""
    shapes, radii, offsets, templates = [], [], [], []
    for shape in KINDS:
        for radius in np.arange(RADII[0] - 1.0, RADII[1] + 1.01, 0.5):
            cover = coverage(shape, WINDOW / 2, WINDOW / 2, radius, WINDOW)
            y, x = ndimage.center_of_mass(cover)
            shapes.append(shape)
            radii.append(float(radius))
            offsets.append((x + 0.5 - WINDOW / 2, y + 0.5 - WINDOW / 2))
            templates.append(_window(cover, x, y).ravel())
    return shapes, radii, offsets, np.stack(templates)


@dataclass(frozen=True)
class Score:
    """How well a picture follows its prompt.

    found, named, seen: objects of the prompt that the picture shows; objects of the prompt; objects of the picture.
    relation: whether the stated relation holds; None where none is stated or its objects are not both there.
    """

    found: int
    named: int
    seen: int
    relation: bool | None

    @property
    def recall(self) -> float:
        return self.found / self.named

    @property
    def f1(self) -> float:
        return 2 * self.found / (self.named + self.seen)

    @property
    def complete(self) -> bool:
        return self.found == self.named


def score(prompt: Prompt, seen: Sequence[Placed]) -> Score:
    """Colour-shape binding, object by object, and the relation between two of them."""
    kinds = {placed.kind for placed in seen}
    return Score(
        found=sum(kind in kinds for kind in prompt.objects),
        named=len(prompt.objects),
        seen=len(seen),
        relation=_holds(prompt, seen),
    )


def _holds(prompt: Prompt, seen: Sequence[Placed]) -> bool | None:
    if prompt.relation is None:
        return None
    first, words, second = prompt.relation
    pairs = [(a, b) for a in seen if a.kind == first for b in seen if b.kind == second]
    return any(relation_between(a.x - b.x, a.y - b.y) == words for a, b in pairs) if pairs else None
