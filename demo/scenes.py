"""Scenes of one to three coloured shapes, their captions, and how they are drawn.

A scene is drawn 64 x 64 with soft edges on a white ground. Sets of objects are split for good: those whose hash says
"tune" or "report" are never trained on, in no order and with no wording; pairs do occur inside trained scenes of three.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIZE = 64
GROUND = (255, 255, 255)
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 215, 30),
    "green": (40, 150, 60),
    "cyan": (40, 200, 215),
    "blue": (35, 75, 200),
    "purple": (145, 60, 180),
    "black": (25, 25, 25),
}
KINDS = ("circle", "square", "triangle", "cross", "ring")
# unit steps in pictures: x to the right, y down
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPENINGS = ("", "a picture of", "a drawing of")
CLOSINGS = ("", "on a white background")

GRID = 3
CELL = SIZE / GRID
RADII = (7.5, 9.5)
# how much longer, in pixels, the stated direction is than the other one
CLEAR = CELL / 2


@dataclass(frozen=True, order=True)
class Kind:
    """What a caption names: a coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Placed:
    """A coloured shape at (x, y), in pixels from the top left corner, `radius` pixels from its centre to its rim."""

    kind: Kind
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Prompt:
    """A caption and what it says: its objects, and at most one relation (first, words, second) between two of them."""

    text: str
    objects: tuple[Kind, ...]
    relation: tuple[Kind, str, Kind] | None = None


def split_of(objects: Sequence[Kind]) -> str:
    """The split, "train", "tune" or "report", by the set of objects alone. Single objects are always trained on."""
    bucket = zlib.crc32(", ".join(sorted(map(str, objects))).encode()) % 16
    return {0: "tune", 1: "report"}.get(bucket, "train") if len(objects) > 1 else "train"


def relation_between(dx: float, dy: float, clear: float = 0.0) -> str | None:
    """The one relation of an object to another from which it is (dx, dy) away; None where neither axis is longer by
    `clear`."""
    if abs(abs(dx) - abs(dy)) <= clear:
        return None
    direction = (np.sign(dx), 0) if abs(dx) > abs(dy) else (0, np.sign(dy))
    return next(words for words, step in RELATIONS.items() if step == direction)


def random_scene(rng: np.random.Generator, split: str = "train") -> list[Placed]:
    """One to three different objects of a split in different cells of a 3 x 3 grid, moved a little inside them."""
    counts, odds = ((1, 2, 3), (0.15, 0.45, 0.4)) if split == "train" else ((2, 3), (0.5, 0.5))
    objects = _random_kinds(rng, int(rng.choice(counts, p=odds)))
    while split_of(objects) != split:
        objects = _random_kinds(rng, len(objects))
    cells = rng.permutation(GRID * GRID)[: len(objects)]
    return [_place(rng, kind, int(cell)) for kind, cell in zip(objects, cells, strict=True)]


def _random_kinds(rng: np.random.Generator, count: int) -> list[Kind]:
    numbers = rng.choice(len(COLOURS) * len(KINDS), size=count, replace=False)
    return [Kind(list(COLOURS)[n // len(KINDS)], KINDS[n % len(KINDS)]) for n in numbers]


def _place(rng: np.random.Generator, kind: Kind, cell: int) -> Placed:
    radius = rng.uniform(*RADII)
    room = CELL / 2 - radius
    row, column = divmod(cell, GRID)
    x, y = (np.array([column, row]) + 0.5) * CELL + rng.uniform(-room, room, 2)
    return Placed(kind, float(x), float(y), float(radius))


def describe(scene: Sequence[Placed], rng: np.random.Generator) -> Prompt:
    """A caption that is true of the scene: objects in random order, a relation between two neighbours where one is
    clear, often with words that say nothing."""
    order = [scene[i] for i in rng.permutation(len(scene))]
    joints = ["and"] * (len(order) - 1)
    relation = None
    pair = int(rng.integers(len(joints))) if joints else 0
    if joints and rng.random() < 0.8:
        first, second = order[pair], order[pair + 1]
        words = relation_between(first.x - second.x, first.y - second.y, CLEAR)
        if words:
            joints[pair] = words
            relation = (first.kind, words, second.kind)
    words = [noun(order[0].kind)]
    for joint, placed in zip(joints, order[1:], strict=True):
        words += [joint, noun(placed.kind)]
    opening = rng.choice(OPENINGS, p=(0.6, 0.2, 0.2))
    closing = rng.choice(CLOSINGS, p=(0.8, 0.2))
    text = " ".join(part for part in (opening, *words, closing) if part)
    return Prompt(text, tuple(placed.kind for placed in order), relation)


def noun(kind: Kind) -> str:
    return f"{'an' if kind.colour[0] in 'aeiou' else 'a'} {kind}"


def random_prompts(count: int, split: str, seed: int) -> list[Prompt]:
    """Captions of scenes of a split, no text twice; two or three objects unless the split is "train"."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        prompt = describe(random_scene(rng, split), rng)
        prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def draw(scene: Sequence[Placed]) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8."""
    picture = np.full((SIZE, SIZE, 3), GROUND, dtype=np.float64)
    for placed in scene:
        cover = coverage(placed.kind.shape, placed.x, placed.y, placed.radius, SIZE)[..., None]
        picture += cover * (np.array(COLOURS[placed.kind.colour]) - picture)
    return picture.round().astype(np.uint8)


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """(size, size) in [0, 1]: how much of each pixel a shape covers, from its signed distance."""
    axis = np.arange(size) + 0.5
    return np.clip(0.5 - DISTANCES[shape](axis[None, :] - x, axis[:, None] - y, radius), 0.0, 1.0)


def _circle(x, y, r):
    return np.hypot(x, y) - r


def _ring(x, y, r):
    return np.abs(np.hypot(x, y) - 0.775 * r) - 0.225 * r


def _square(x, y, r):
    return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r


def _cross(x, y, r):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - r, np.minimum(x, y) - 0.3 * r)


def _triangle(x, y, r):
    # apex up: base 1.8 r wide at y = .8 r, sides towards the apex at y = -.95 r
    slope = np.hypot(1.75, 0.9)
    side = (1.75 * np.abs(x) - 0.9 * (y + 0.95 * r)) / slope
    return np.maximum(side, y - 0.8 * r)


DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring}
