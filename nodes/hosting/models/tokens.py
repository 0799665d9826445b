"""What the tokens of a prompt are: start token, words, padding. Told from its conditioning, or by the text that was
encoded.

Kinds are a string with a letter for every token of a context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .families import BEHIND, CHUNKS, FIRST, NOT_TOLD, PADDING_OF_TEXT, PADDING_OF_ZEROS_OR_TEXT, Family

# an end token, or what a template puts around the prompt; UNKNOWN is a word or any of the others but START
START, WORD, OTHER, PADDING, UNKNOWN = "swop?"
# what the mix acts on, and which kinds that is
TOKENS = {"all": "", "without start token": WORD + OTHER + PADDING + UNKNOWN, "words only": WORD}
CHUNK = 77
# of a token, relative to their mean length: half precision and another device; another word differs by far more
SAME = 0.1


@dataclass(frozen=True)
class Encoded:
    """A text as its encoder made it, (1, L, C), and what its tokens are."""

    context: torch.Tensor = field(compare=False, repr=False)
    kinds: str

    def difference(self, context: torch.Tensor) -> float:
        """From a context (L, C) whose rows of zeros, and those here, do not count; infinite for others."""
        mine = self.context[0].float()
        mine, other = mine[mine.any(-1)], context[context.any(-1)]
        return largest_difference(mine, other) if mine.shape == other.shape else torch.inf


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the tokens of two contexts (L, C), relative to their mean length."""
    if not len(a):
        return 0.0
    length = a.norm(dim=-1).mean().clamp(min=torch.finfo(a.dtype).tiny)
    return float((a - b).norm(dim=-1).amax() / length)


# of every context what was told of it, for each family and its texts, which are kept: their ids must stay theirs
_told: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kinds_of(context: torch.Tensor | None, family: Family, network: Any, texts: tuple[Encoded, ...]) -> str:
    """The kinds of a conditioning's context (B, L, C); empty where it has none. Waits for the device once for each."""
    if context is None or context.ndim != 3:
        return ""
    told = _told.setdefault(context, {})
    key = family.name, tuple(map(id, texts))
    if key not in told:
        told[key] = _read(context[0].float().cpu(), family, network, texts), texts
    return told[key][0]


def _read(context: torch.Tensor, family: Family, network: Any, texts: tuple[Encoded, ...]) -> str:
    filled = context.any(-1).tolist()
    difference, nearest = min(((text.difference(context), i) for i, text in enumerate(texts)), default=(torch.inf, 0))
    if difference <= SAME:
        letters = iter(kind for kind, row in zip(texts[nearest].kinds, texts[nearest].context[0], strict=True)
                       if row.any())  # fmt: skip
    else:
        letters = iter(_by_position(sum(filled), family, network, len(filled) > sum(filled)))
    kinds = "".join(next(letters) if full else PADDING for full in filled)
    multiple = network.pad_tokens_multiple or 1 if family.padding == BEHIND else 1
    return kinds.ljust(-(-len(kinds) // multiple) * multiple, PADDING)


def _by_position(tokens: int, family: Family, network: Any, has_zeros: bool) -> str:
    """The kinds of the tokens that are not zeros."""
    told = family.padding not in (PADDING_OF_TEXT, NOT_TOLD)
    if family.padding == PADDING_OF_ZEROS_OR_TEXT:
        told = has_zeros
    letters = [WORD if told else UNKNOWN] * tokens
    start = family.start_of(network)
    if start == CHUNKS:
        letters[::CHUNK] = START * len(letters[::CHUNK])
    elif start == FIRST and letters:
        letters[0] = START
    return "".join(letters)


def check_tokens(choice: str, family: Family | None, network: Any, has_text: bool) -> None:
    """Whether a choice means something for a model.

    Raises:
        ValueError: it does not, or nothing tells which tokens it means.
    """
    if choice == "all":
        return
    if family is None:
        raise ValueError(f"tokens: {choice} is for models that PLADIS knows. Set tokens to all.")
    if choice == "without start token" and not family.start_of(network):
        raise ValueError(f"tokens: the text of {family.name} has no start token. Set tokens to all.")
    if choice == "words only" and family.padding == NOT_TOLD:
        raise ValueError(f"tokens: the padding of {family.name} cannot be told from its words. Set tokens to all.")
    if choice == "words only" and not has_text:
        if family.padding == PADDING_OF_TEXT:
            raise ValueError(
                f"tokens: words only needs clip and prompt, the text that was encoded: nothing else tells words of "
                f"{family.name} from their padding. Connect clip and give prompt, or choose without start token."
            )
        if not family.padding and not family.start_of(network):
            raise ValueError(
                f"tokens: the text of {family.name} has neither a start token nor padding that takes part. Set tokens "
                "to all, or, to leave out what its template puts around the prompt, connect clip and give prompt."
            )


def kinds_of_keys(kinds: tuple[str, ...], keys: int) -> tuple[str, ...]:
    """The kinds of rows of `keys` text keys; empty where they cannot be told.

    Of a prompt that the host repeats, what it pads behind is not there.
    """
    rows = tuple(row if row[keys:].strip(PADDING) else row[:keys] for row in kinds)
    return rows if all(len(row) == keys for row in rows) else ()


@lru_cache(maxsize=64)
def mixed_keys(kinds: tuple[str, ...], choice: str, keys: int, device: torch.device) -> torch.Tensor | None:
    """The mix_mask (rows, keys) of prompts of these kinds; None where all are mixed. On the device once, not in every
    layer.

    Raises:
        RuntimeError: for a prompt it cannot be told.
    """
    if choice == "all":
        return None
    rows = kinds_of_keys(kinds, keys)
    if not rows:
        raise RuntimeError(
            f"PLADIS: tokens: {choice}: which prompt a row of {keys} tokens belongs to, or what its tokens are, cannot "
            "be told: another node changed the prompts inside the model, or the batch. Set tokens to all."
        )
    if any(UNKNOWN not in TOKENS[choice] and UNKNOWN in row for row in rows):
        raise RuntimeError(
            f"PLADIS: tokens: {choice}: a prompt is none of the texts in prompt. Give all that are encoded, with a "
            "line --- between (the negative prompt too, where it is not empty), or set apply_to to positive, or "
            "tokens to all."
        )
    # kept for runs that want gradients, too, which refuse tensors of inference mode
    with torch.inference_mode(False):
        return torch.tensor([[kind in TOKENS[choice] for kind in row] for row in rows], device=device)
