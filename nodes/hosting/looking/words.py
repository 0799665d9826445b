"""Which tokens of a prompt a word is: by position, or through the CLIP that encoded the prompt."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from ..lists import entries
from ..models.tokens import OTHER, PADDING, SAME, START, WORD, Encoded, largest_difference

MAX_WORDS = 32
WEIGHT = re.compile(r":\s*-?[\d.]+\s*\)|embedding:\S+|<[^<>]*>")
POSITIONS = re.compile(r"#(\d{1,6})(?:-#?(\d{1,6}))?")
# encoders whose tokens come first where a model's context holds those of several (comfy/text_encoders/sd3_clip.py)
FIRST = ("l", "g")
# encoders of a model with start tokens that put none
NO_START = ("t5xxl",)
# between the texts of an input that takes several
BETWEEN_TEXTS = re.compile(r"\s*(?<!\S)-{3,}(?!\S)\s*")
# the tokens of a text by encoder
Tokenize = Callable[[str], dict[str, list]]


class NotInPrompt(ValueError):
    """The encoder splits the prompt without this word."""


class Word(NamedTuple):
    """A label, and the positions in the prompt's context whose weights it is."""

    label: str
    positions: list[int]


def find_words(words: str, prompt: str, clip, tokens: int) -> list[Word]:
    """`words`: words, or positions such as #5 or #3-7, with commas or line breaks between; empty for the words of the
    prompt that are found. `tokens` is the length of the encoded prompt.

    Raises:
        ValueError: a word or a position that the prompt does not have, no CLIP to find words with, more than MAX_WORDS.
    """
    tokenize = None if clip is None else cache(partial(_rows, clip))
    names = entries(words, spaces=False)
    if len(names) > MAX_WORDS:
        raise ValueError(f"words: {len(names)} are more than {MAX_WORDS}, and each gets three pictures: name fewer.")
    if names:
        return [Word(name, _positions(name, prompt, tokenize, tokens)) for name in names]
    found = []
    for name in dict.fromkeys(re.findall(r"\w[\w'-]*", WEIGHT.sub(" ", prompt))):
        # punctuation in front of it can hide a word
        with contextlib.suppress(NotInPrompt):
            found.append(Word(name, _positions(name, prompt, tokenize, tokens)))
        if len(found) == MAX_WORDS:
            break
    if not found:
        raise ValueError(
            f"words is empty, and no word of the prompt {prompt!r} is found: name words, or token positions such as #1 "
            "or #2-4."
        )
    return found


def encoded_texts(prompt: str, clip, has_start: bool) -> tuple[Encoded, ...]:
    """The texts in `prompt`, with `---` between, in a line of its own or not, and the empty one, encoded by `clip`.

    `has_start`: whether the encoder puts a start token in front.
    """
    texts = dict.fromkeys([*BETWEEN_TEXTS.split(prompt), ""])
    return tuple(_encoded(text, clip, has_start) for text in texts)


def _encoded(text: str, clip, has_start: bool) -> Encoded:
    context = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0][:1].cpu()
    return Encoded(context, token_kinds(text, clip, context.shape[1], has_start))


def token_kinds(text: str, clip, tokens: int, has_start: bool) -> str:
    """What every token of a text's context of `tokens` is; of two encoders that share a place, words come first."""
    chunks = {key: [[entry[0] if isinstance(entry[0], int) else None for entry in chunk] for chunk in its]
              for key, its in clip.tokenize(text).items()}  # fmt: skip
    kinds = [PADDING] * tokens
    for key, offset in _offsets(_rows(clip, text), tokens).items():
        empty = _rows(clip, "")[key]
        at = offset
        for chunk in chunks[key]:
            for kind in _kinds_of_chunk(chunk, empty, has_start and key not in NO_START):
                if 0 <= at < tokens:
                    kinds[at] = min(kinds[at], kind, key=(WORD + START + OTHER + PADDING).index)
                at += 1
    return "".join(kinds)


def _kinds_of_chunk(row: list, empty: list, has_start: bool) -> str:
    start, stop = _inner_span(row, empty)
    head = (START if has_start else OTHER) + OTHER * (start - 1) if start else ""
    # an end token that is padded with itself
    ends = stop > start or start == 1
    tail = "".join(OTHER if (i == 0 and ends) or token != empty[-1] else PADDING for i, token in enumerate(row[stop:]))
    return head + WORD * (stop - start) + tail


def said_of_another_prompt(prompt: str, clip, encoded: torch.Tensor) -> str:
    """What a person must know where `encoded`, (B, L, C), is not what `clip` makes of `prompt`; else empty."""
    again = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]
    if again.shape[1] != encoded.shape[1]:
        differs = f"it gives {again.shape[1]} tokens, and the conditioning has {encoded.shape[1]}"
    elif again.shape[2] != encoded.shape[2]:
        differs = "clip is another kind of encoder"
    else:
        if largest_difference(again[0].cpu().float(), encoded[0].cpu().float()) <= SAME:
            return ""
        differs = "the conditioning holds another text, other weights, or more than a text"
    return f"prompt is not what was encoded: {differs}. The words may be at other tokens."


def _positions(name: str, prompt: str, tokenize: Tokenize | None, tokens: int) -> list[int]:
    numbers = POSITIONS.fullmatch(name)
    if numbers is None:
        return _occurrences(name, prompt, tokenize, tokens)
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if not first <= last < tokens:
        raise ValueError(f"words: {name!r} is not in this prompt, whose tokens are #0 to #{tokens - 1}.")
    return list(range(first, last + 1))


def _occurrences(name: str, prompt: str, tokenize: Tokenize | None, tokens: int) -> list[int]:
    if tokenize is None:
        raise ValueError(
            f"words: to find {name!r}, connect clip and give prompt, the text that was encoded. Without them, name "
            "token positions such as #1 or #2-4."
        )
    rows = tokenize(prompt)
    found = set()
    for key, offset in _offsets(rows, tokens).items():
        for word in _spellings(name, tokenize, key):
            starts = [i for i in range(len(rows[key])) if rows[key][i : i + len(word)] == word]
            for start in _of_whole_words(starts, name, prompt, tokenize, key):
                found |= {start + i + offset for i in range(len(word))}
    found = sorted(position for position in found if 0 <= position < tokens)
    if not found:
        raise NotInPrompt(
            f"words: {name!r} is not in the prompt {prompt!r} as this CLIP splits it. Spell it as the prompt does, or "
            f"name token positions, #0 to #{tokens - 1}."
        )
    return found


def _spellings(name: str, tokenize: Tokenize, key: str) -> list[list]:
    """A word's tokens at the start of a text, after a space and after punctuation: encoders tell these apart."""
    empty = tokenize("")[key]
    alone, spaced = (_inner(tokenize(text)[key], empty) for text in (name, " " + name))
    spellings = [alone, spaced]
    with contextlib.suppress(ValueError):  # the demo model knows no quotation mark
        quote, quoted = (_inner(tokenize(text)[key], empty) for text in ('"', f'"{name}'))
        if quoted[: len(quote)] == quote:
            spellings.append(quoted[len(quote) :])
    return [word for word in spellings if word]


def _of_whole_words(starts: list[int], name: str, prompt: str, tokenize: Tokenize, key: str) -> list[int]:
    """Of the places where a word's tokens stand, those of the word itself: "ball" also ends "pokeball"."""
    occurrences = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE)]
    if len(starts) <= 1 or not occurrences:
        return starts
    empty = tokenize("")[key]
    lead = next((i for i, (a, b) in enumerate(zip(tokenize(prompt)[key], empty, strict=False)) if a != b), 0)
    before = (len(_inner(tokenize(prompt[:at])[key], empty)) + lead for at in occurrences)
    return sorted({min(starts, key=lambda start: abs(start - expected)) for expected in before})


def _rows(clip, text: str) -> dict[str, list]:
    """The tokens of a text by encoder, over all of its chunks; vectors of textual inversions are None."""
    return {
        key: [entry[0] if isinstance(entry[0], int) else None for chunk in chunks for entry in chunk]
        for key, chunks in clip.tokenize(text).items()
    }


def _offsets(rows: dict[str, list], tokens: int) -> dict[str, int]:
    """Where each encoder's tokens begin in a context of `tokens`; only the encoders whose tokens are in it."""
    same = {key: 0 for key, row in rows.items() if len(row) == tokens}
    if same:
        return same
    lead = max((len(row) for key, row in rows.items() if key in FIRST), default=0)
    rest = {key: row for key, row in rows.items() if key not in FIRST}
    if any(lead + len(row) == tokens for row in rest.values()):
        return {key: 0 if key in FIRST else lead for key in rows}
    # a template in front of the prompt that the encoder drops: they end together
    key = max(rest or rows, key=lambda key: len(rows[key]))
    return {key: tokens - len(rows[key])}


def _inner(row: list, empty: list) -> list:
    """`row` without padding and without what an empty text has too: start, end, a template."""
    return row[slice(*_inner_span(row, empty))]


def _inner_span(row: list, empty: list) -> tuple[int, int]:
    """(start, stop) of what `_inner` keeps."""
    if empty:
        row, empty = (_without_trailing(tokens, empty[-1]) for tokens in (row, empty))
    start = 0
    while start < min(len(row), len(empty)) and row[start] == empty[start]:
        start += 1
    stop, last = len(row), len(empty)
    while stop > start and last > start and row[stop - 1] == empty[last - 1]:
        stop, last = stop - 1, last - 1
    return start, stop


def _without_trailing(tokens: list, padding) -> list:
    end = len(tokens)
    while end and tokens[end - 1] == padding:
        end -= 1
    return tokens[:end]
