"""How every list that a person types is read: scales, alphas, blocks, words."""

from __future__ import annotations

import re

# with the full-width ones of Chinese and Japanese keyboards
COMMAS = ",;\n，、；"
SHOWN = 40


def entries(text: str, spaces: bool = True) -> list[str]:
    """What stands between commas, semicolons and line breaks, and between `spaces`; empty where nothing does."""
    parts = re.split(rf"[{COMMAS}\s]+" if spaces else rf"[{COMMAS}]", text)
    return [part.strip() for part in parts if part.strip()]


def layer_lists(text: str) -> list[str]:
    """Choices of layers, without repetitions: all, down + up, and lists of blocks, which have commas of their own.

    They stand between semicolons and line breaks, the first two also between commas.
    """
    found: list[str] = []
    for part in re.split("[;；\n]", text):
        blocks: list[str] = []
        for entry in entries(part, spaces=False):
            name = " + ".join(entry.lower().replace("+", " ").split())
            if name in ("all", "down + up"):
                found.append(name)
            else:
                blocks.append(entry)
        if blocks:
            found.append(",".join(blocks))
    return list(dict.fromkeys(found))


def whole_numbers(name: str, text: str, low: int, high: int) -> list[int]:
    """A list of whole numbers without repetitions.

    Raises:
        ValueError: no number, not a whole number, one outside [low, high].
    """
    found = []
    for entry in entries(text):
        if not re.fullmatch(r"-?\d+", entry):
            raise ValueError(
                f"{name}: {shortened(entry)!r} is not a whole number. Write whole numbers with commas between: 0, 1, 2"
            )
        # what is cut off lies outside all the same
        number = int(entry[:SHOWN])
        if not low <= number <= high:
            raise ValueError(f"{name}: {shortened(entry)} lies outside {low} to {high}.")
        found.append(number)
    if not found:
        raise ValueError(f"{name}: the list is empty. Write whole numbers with commas between: 0, 1, 2")
    return list(dict.fromkeys(found))


def numbers(name: str, text: str, low: float, high: float) -> list[float]:
    """A list of numbers without repetitions.

    Raises:
        ValueError: no number, not a number, one outside [low, high], or one with a decimal comma among others.
    """
    # between semicolons or spaces, a comma with digits around it is no separator
    apart = re.split(r"[;；\s]+|[,，、]\s+", text.strip())
    decimal = next((part for part in apart if re.fullmatch(r"\d+,\d+", part)), None)
    if decimal is not None and len(apart) > 1:
        point = decimal.replace(",", ".")
        raise ValueError(f"{name}: {decimal} could be one number or two. Write {point}, or commas between all numbers.")
    found = []
    for entry in entries(text):
        try:
            number = float(entry)
        except ValueError:
            raise ValueError(
                f"{name}: {shortened(entry)!r} is not a number. Write numbers from {low:g} to {high:g}, with commas "
                "between."
            ) from None
        if not low <= number <= high:
            raise ValueError(f"{name}: {number:g} lies outside {low:g} to {high:g}.")
        found.append(number)
    if not found:
        raise ValueError(f"{name}: the list is empty. Write numbers from {low:g} to {high:g}, with commas between.")
    return list(dict.fromkeys(found))


def shortened(entry: str) -> str:
    return entry if len(entry) <= SHOWN else entry[:SHOWN] + "..."
