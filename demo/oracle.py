"""Reads a picture back: which objects it shows (colour, shape, size, fill), and where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from .scenes import COLOURS, FILLS, GROUND, SHAPES, SIZES, Kind, Placed, Prompt, coverage, relation_between

# ink below this is ground; a patch of less ink than SMALLEST is a speck (the smallest true object has about 24 pixels)
INK = 0.4
SMALLEST = 14
# least overlap (intersection over union) with the best template: below, it is ink of no known object
LEAST_OVERLAP = 0.5
WINDOW = 26
# between the largest small object and the smallest large one
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2
EIGHT_NEIGHBOURS = np.ones((3, 3))


def read(picture: np.ndarray) -> list[Placed]:
    """The objects of a picture.

    Each pixel is split into ground and ink of the colour that explains it best; every connected patch of one colour is
    compared with all shapes, fills and sizes, laid centre of mass on centre of mass.

    Args:
        picture: (64, 64, 3) uint8.
    """
    ink, colour = _inks(picture)
    found = []
    for number, name in enumerate(COLOURS):
        patches, count = ndimage.label((colour == number) & (ink > INK), EIGHT_NEIGHBOURS)
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
    """The object that overlaps most with one patch of ink; None where none does well enough."""
    y, x = ndimage.center_of_mass(ink)
    patch = _window(ink, x, y).ravel()
    templates, covers = _templates()
    overlaps = np.minimum(covers, patch).sum(1) / np.maximum(covers, patch).sum(1)
    best = int(overlaps.argmax())
    if overlaps[best] < LEAST_OVERLAP:
        return None
    shape, fill, radius, right, down = templates[best]
    size = "large" if radius > LARGE else "small"
    # centres of mass are in pixel numbers, positions in distances from the edge
    return Placed(Kind(colour, shape, size, fill), float(x + 0.5 - right), float(y + 0.5 - down), radius)


def _window(ink: np.ndarray, x: float, y: float) -> np.ndarray:
    """(WINDOW, WINDOW) of `ink`, moved so that (x, y) is in its middle."""
    middle = (WINDOW - 1) / 2
    padded = np.pad(ink, WINDOW)
    moved = ndimage.shift(padded, (middle - y % 1, middle - x % 1), order=1)
    top, left = int(y // 1) + WINDOW, int(x // 1) + WINDOW
    return moved[top : top + WINDOW, left : left + WINDOW]


@cache
def _templates() -> tuple[list[tuple[str, str, float, float, float]], np.ndarray]:
    """(shape, fill, radius, centre of mass to the right of and below the centre) and coverages (N, WINDOW ** 2)."""
    templates, covers = [], []
    radii = np.arange(SIZES["small"][0] - 0.8, SIZES["large"][1] + 0.81, 0.4)
    for shape, fill, radius in itertools.product(SHAPES, FILLS, radii.tolist()):
        cover = coverage(shape, fill, WINDOW / 2, WINDOW / 2, radius, WINDOW)
        y, x = ndimage.center_of_mass(cover)
        templates.append((shape, fill, radius, x + 0.5 - WINDOW / 2, y + 0.5 - WINDOW / 2))
        covers.append(_window(cover, x, y).ravel())
    return templates, np.stack(covers)


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
    """Object by object: colour and shape, with the size and the fill that the caption names; and the relation between
    two of them."""
    return Score(
        found=sum(any(kind.fits(placed.kind) for placed in seen) for kind in prompt.objects),
        named=len(prompt.objects),
        seen=len(seen),
        relation=_holds(prompt, seen),
    )


def _holds(prompt: Prompt, seen: Sequence[Placed]) -> bool | None:
    if prompt.relation is None:
        return None
    first, words, second = prompt.relation
    pairs = [(a, b) for a in seen if a.kind.name == first.name for b in seen if b.kind.name == second.name]
    return any(relation_between(a.x - b.x, a.y - b.y) == words for a, b in pairs) if pairs else None
