"""The words that the demo model knows, and how a caption becomes tokens. Needs neither torch nor transformers."""

from __future__ import annotations

import re

from .scenes import CLOSINGS, COLOURS, FILLS, OPENINGS, RELATIONS, SHAPES, SIZES, Kind, Prompt

# a caption's start and end as in CLIP; the end token fills the row up
START, END = "<start>", "<end>"
LENGTH = 77
PHRASES = ("a an and", *OPENINGS, *CLOSINGS, *COLOURS, *SHAPES, *SIZES, *FILLS, *RELATIONS)
WORDS = tuple(sorted({word for phrase in PHRASES for word in phrase.split()}))
TOKENS = {token: number for number, token in enumerate((START, END, *WORDS))}


def split_words(text: str) -> list[str]:
    """The words of a caption, lower-cased, without punctuation.

    Raises:
        ValueError: a word that the model does not know; names it and those that it knows.
    """
    words = re.findall(r"[^\s.,;:!?]+", text.lower())
    unknown = [word for word in words if word not in TOKENS]
    if unknown:
        raise ValueError(
            f"the demo model does not know {', '.join(map(repr, dict.fromkeys(unknown)))}. "
            f"It knows these words: {', '.join(WORDS)}."
        )
    return words


def tokenize(text: str) -> list[int]:
    """LENGTH token numbers of a caption.

    Raises:
        ValueError: an unknown word, or too many words.
    """
    words = split_words(text)
    if len(words) > LENGTH - 2:
        raise ValueError(f"the caption has {len(words)} words; the demo model reads at most {LENGTH - 2}: {text!r}")
    return [TOKENS[START], *(TOKENS[word] for word in words), *[TOKENS[END]] * (LENGTH - 1 - len(words))]


def read_caption(text: str) -> Prompt:
    """What a caption says: its coloured shapes in their order, with the sizes and fills named before them, and the
    first relation stated between two neighbours.

    Raises:
        ValueError: as `split_words`.
    """
    words = split_words(text)
    ends = [i + 2 for i in range(len(words) - 1) if words[i] in COLOURS and words[i + 1] in SHAPES]
    starts = [_start(words, end - 2) for end in ends]
    objects = tuple(_kind(words[start:end]) for start, end in zip(starts, ends, strict=True))
    relation = None
    for number, (here, there) in enumerate(zip(ends, starts[1:], strict=False)):
        between = " ".join(word for word in words[here:there] if word not in ("a", "an"))
        if relation is None and between in RELATIONS:
            relation = (objects[number], between, objects[number + 1])
    return Prompt(text, objects, relation)


def _start(words: list[str], colour: int) -> int:
    """Where the words for an object begin whose colour is at `colour`."""
    start = colour
    while start > 0 and words[start - 1] in (*SIZES, *FILLS):
        start -= 1
    return start


def _kind(words: list[str]) -> Kind:
    *named, colour, shape = words
    size = next((word for word in named if word in SIZES), None)
    return Kind(colour, shape, size, next((word for word in named if word in FILLS), None))
