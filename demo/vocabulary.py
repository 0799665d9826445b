"""The words that the demo model knows, and how a caption becomes tokens. Needs neither torch nor transformers."""

from __future__ import annotations

import re

from .scenes import CLOSINGS, COLOURS, KINDS, OPENINGS, RELATIONS, Kind, Prompt

# a caption's start and end as in CLIP; the end token fills the row up
START, END = "<start>", "<end>"
LENGTH = 24
WORDS = tuple(
    sorted({word for text in ("a an and", *OPENINGS, *CLOSINGS, *COLOURS, *KINDS, *RELATIONS) for word in text.split()})
)
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
    """What a caption says: its coloured shapes in their order, and the first relation stated between two neighbours.

    Raises:
        ValueError: as `split_words`.
    """
    words = split_words(text)
    starts = [i for i in range(len(words) - 1) if words[i] in COLOURS and words[i + 1] in KINDS]
    objects = tuple(Kind(words[i], words[i + 1]) for i in starts)
    relation = None
    for number, (here, there) in enumerate(zip(starts, starts[1:], strict=False)):
        between = " ".join(word for word in words[here + 2 : there] if word not in ("a", "an"))
        if relation is None and between in RELATIONS:
            relation = (objects[number], between, objects[number + 1])
    return Prompt(text, objects, relation)
