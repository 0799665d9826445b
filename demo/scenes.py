"""Scenes of one to five objects, their captions, and how they are drawn.

A scene is drawn 64 x 64 with soft edges on a white ground. Its objects differ in colour or shape. Sets of coloured
shapes are split for good: those whose hash says "tune" or "report" are never trained on, in no order, size, fill or
wording; parts of such a set do occur inside trained scenes.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
SHAPES = ("circle", "square", "triangle", "diamond", "bar")
# pixels from an object's centre to its rim
SIZES = {"small": (5.4, 6.2), "large": (8.4, 9.4)}
FILLS = ("filled", "outlined")
STROKE = 2.0
# unit steps in pictures: x to the right, y down
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# clauses that say nothing of what is to be seen
OPENINGS = ("a picture of", "a drawing of", "an image with", "this is", "here you see", "a nice design with")
CLOSINGS = (
    "on a white background",
    "in high resolution",
    "made for a book",
    "by an unknown artist",
    "free to download",
    "in a simple style",
    "from the new collection",
)

GRID = 3
CELL = SIZE / GRID
# how much longer, in pixels, the stated direction is than the other one
CLEAR = CELL / 2
# how many objects a scene has, and how often
COUNTS = (1, 2, 3, 4, 5)
ODDS = {split: (0.0, 0.25, 0.25, 0.25, 0.25) for split in ("tune", "report")} | {"train": (0.1, 0.25, 0.25, 0.2, 0.2)}
# how often a caption tells an object's size, its fill, a relation, a clause before and one after the objects
TOLD, RELATED, OPENED, CLOSED = 0.4, 0.6, 0.4, 0.4


@dataclass(frozen=True)
class Kind:
    """An object, or what a caption says of one: size and fill are None where it leaves them open."""

    colour: str
    shape: str
    size: str | None = None
    fill: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.fill, self.colour, self.shape) if word)

    @property
    def name(self) -> tuple[str, str]:
        """What tells it from the other objects of its scene."""
        return self.colour, self.shape

    def fits(self, seen: Kind) -> bool:
        """Whether an object that is seen is all that is said here."""
        return self.name == seen.name and self.size in (None, seen.size) and self.fill in (None, seen.fill)


@dataclass(frozen=True)
class Placed:
    """An object at (x, y), in pixels from the top left corner, `radius` pixels from its centre to its rim."""

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
    """The split, "train", "tune" or "report", by the set of coloured shapes. Single ones are always trained on."""
    names = sorted(" ".join(kind.name) for kind in objects)
    bucket = zlib.crc32(", ".join(names).encode()) % 16
    return {0: "tune", 1: "report"}.get(bucket, "train") if len(objects) > 1 else "train"


def relation_between(dx: float, dy: float, clear: float = 0.0) -> str | None:
    """The one relation of an object to another from which it is (dx, dy) away; None where neither axis is longer by
    `clear`."""
    if abs(abs(dx) - abs(dy)) <= clear:
        return None
    direction = (np.sign(dx), 0) if abs(dx) > abs(dy) else (0, np.sign(dy))
    return next(words for words, step in RELATIONS.items() if step == direction)


def random_scene(rng: np.random.Generator, split: str = "train") -> list[Placed]:
    """One to five objects of a split in different cells of a 3 x 3 grid, moved a little inside them."""
    count = int(rng.choice(COUNTS, p=ODDS[split]))
    objects = _random_kinds(rng, count)
    while split_of(objects) != split:
        objects = _random_kinds(rng, count)
    cells = rng.permutation(GRID * GRID)[:count]
    return [_place(rng, kind, int(cell)) for kind, cell in zip(objects, cells, strict=True)]


def crowded_scene(rng: np.random.Generator) -> list[Placed]:
    """One to nine objects: teaches to draw, not to follow a caption."""
    count = int(rng.integers(1, GRID * GRID + 1))
    cells = rng.permutation(GRID * GRID)[:count]
    return [_place(rng, kind, int(cell)) for kind, cell in zip(_random_kinds(rng, count), cells, strict=True)]


def exchanged(scene: Sequence[Placed], attribute: str) -> list[Placed]:
    """The scene after each object has taken another one's `attribute` ("colour", "shape", "size" or "fill"): the same
    words, bound otherwise. Where all have the same one, nothing changes."""
    twin = []
    for placed, giver in zip(scene, [*scene[-1:], *scene[:-1]], strict=True):
        value = getattr(giver.kind, attribute)
        if value != getattr(placed.kind, attribute):
            placed = replace(placed, kind=replace(placed.kind, **{attribute: value}))
            placed = _resized(placed, giver.radius) if attribute == "size" else placed
        twin.append(placed)
    return twin


def _resized(placed: Placed, radius: float) -> Placed:
    """Moved so that it stays in its cell."""
    room = CELL / 2 - radius
    x, y = (
        float(np.clip(at, (at // CELL + 0.5) * CELL - room, (at // CELL + 0.5) * CELL + room))
        for at in (placed.x, placed.y)
    )
    return replace(placed, x=x, y=y, radius=radius)


def _random_kinds(rng: np.random.Generator, count: int) -> list[Kind]:
    numbers = rng.choice(len(COLOURS) * len(SHAPES), size=count, replace=False)
    sizes, fills = rng.integers(2, size=(2, count))
    return [
        Kind(list(COLOURS)[number // len(SHAPES)], SHAPES[number % len(SHAPES)], list(SIZES)[size], FILLS[fill])
        for number, size, fill in zip(numbers, sizes, fills, strict=True)
    ]


def _place(rng: np.random.Generator, kind: Kind, cell: int) -> Placed:
    radius = rng.uniform(*SIZES[kind.size])
    room = CELL / 2 - radius
    row, column = divmod(cell, GRID)
    x, y = (np.array([column, row]) + 0.5) * CELL + rng.uniform(-room, room, 2)
    return Placed(kind, float(x), float(y), float(radius))


def describe(scene: Sequence[Placed], rng: np.random.Generator, noise: float = 0.0, told: float = TOLD) -> Prompt:
    """A caption of the scene: objects in random order, some with their size and fill, often a relation between two
    neighbours where one is clear, and clauses that say nothing.

    Args:
        noise: the share of objects that the caption gets wrong; with 0 it is true. Of those, a third have a wrong
            colour, a third a wrong shape, and a third are not mentioned (one object always is).
        told: how often it tells an object's size, and how often its fill.
    """
    named = [replace(placed, kind=_told(placed.kind, rng, told)) for placed in _mistaken(scene, rng, noise)]
    order = [named[i] for i in rng.permutation(len(named))]
    joints = ["and"] * (len(order) - 1)
    relation = None
    if joints and rng.random() < RELATED:
        pair = int(rng.integers(len(joints)))
        first, second = order[pair], order[pair + 1]
        words = relation_between(first.x - second.x, first.y - second.y, CLEAR)
        if words:
            joints[pair] = words
            relation = (first.kind, words, second.kind)
    parts = [_clause(rng, OPENINGS, OPENED), noun(order[0].kind)]
    for joint, placed in zip(joints, order[1:], strict=True):
        parts += [joint, noun(placed.kind)]
    parts.append(_clause(rng, CLOSINGS, CLOSED))
    return Prompt(" ".join(filter(None, parts)), tuple(placed.kind for placed in order), relation)


def _mistaken(scene: Sequence[Placed], rng: np.random.Generator, noise: float) -> list[Placed]:
    told = []
    for placed in scene:
        mistake = rng.choice(("colour", "shape", "absence")) if rng.random() < noise else None
        if mistake == "colour":
            told.append(replace(placed, kind=replace(placed.kind, colour=_other(rng, COLOURS, placed.kind.colour))))
        elif mistake == "shape":
            told.append(replace(placed, kind=replace(placed.kind, shape=_other(rng, SHAPES, placed.kind.shape))))
        elif mistake is None:
            told.append(placed)
    return told or [scene[int(rng.integers(len(scene)))]]


def _other(rng: np.random.Generator, among: Sequence[str], than: str) -> str:
    return str(rng.choice([name for name in among if name != than]))


def _told(kind: Kind, rng: np.random.Generator, odds: float) -> Kind:
    size, fill = rng.random(2) < odds
    return replace(kind, size=kind.size if size else None, fill=kind.fill if fill else None)


def _clause(rng: np.random.Generator, among: Sequence[str], odds: float) -> str:
    return str(rng.choice(among)) if rng.random() < odds else ""


def noun(kind: Kind) -> str:
    return f"{'an' if str(kind)[0] in 'aeiou' else 'a'} {kind}"


def random_prompts(count: int, split: str, seed: int) -> list[Prompt]:
    """True captions of scenes of a split, no text twice; two to five objects unless the split is "train"."""
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
        cover = coverage(placed.kind.shape, placed.kind.fill, placed.x, placed.y, placed.radius, SIZE)[..., None]
        picture += cover * (np.array(COLOURS[placed.kind.colour]) - picture)
    return picture.round().astype(np.uint8)


def coverage(shape: str, fill: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """(size, size) in [0, 1]: how much of each pixel an object covers, from its signed distance."""
    axis = np.arange(size) + 0.5
    distance = DISTANCES[shape](axis[None, :] - x, axis[:, None] - y, radius)
    if fill == "outlined":
        distance = np.maximum(distance, -distance - STROKE)
    return np.clip(0.5 - distance, 0.0, 1.0)


def _circle(x, y, r):
    return np.hypot(x, y) - r


def _square(x, y, r):
    return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r


def _bar(x, y, r):
    return np.maximum(np.abs(x) - r, np.abs(y) - 0.52 * r)


def _diamond(x, y, r):
    return (np.abs(x) + np.abs(y) - r) / 2**0.5


def _triangle(x, y, r):
    # apex up: base 1.8 r wide at y = .8 r, sides towards the apex at y = -.95 r
    slope = np.hypot(1.75, 0.9)
    side = (1.75 * np.abs(x) - 0.9 * (y + 0.95 * r)) / slope
    return np.maximum(side, y - 0.8 * r)


DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "diamond": _diamond, "bar": _bar}
