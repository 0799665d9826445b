"""Draws in several processes what a run of the plan will ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import torch

from .choices import ships_by_rule
from .measure import measure
from .models import Models
from .scorers import Drawn, Forecast

_drawn: Drawn


def draw_ahead(
    drawn: Drawn, models: Models, parts: Sequence[str], jobs: int, done: Callable[[int], object]
) -> None:
    """Round by round, since what is chosen decides what is asked for next: as long as scores to choose by are missing,
    only these are drawn.

    Args:
        done: told the number of pictures after each setting.
    """
    plain = replace(drawn, done=lambda pictures: None, studios={})
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (drawn.captions, drawn.store, drawn.precise,
                                                                  drawn.device)) as pool:  # fmt: skip
        while asked := forecast(plain, models, parts).asked:
            to_choose = [one for one in asked if one[1] == "tune"]
            for finished in as_completed(pool.submit(_draw, *one) for one in to_choose or asked):
                done(finished.result())


def forecast(drawn: Drawn, models: Models, parts: Sequence[str]) -> Forecast:
    """What is still to come."""
    guess = Forecast(drawn)
    measure(guess, models, parts)
    ships_by_rule(guess, models)
    return guess


def _start(captions, store, precise: bool, device: str) -> None:
    global _drawn
    torch.set_num_threads(1)
    if precise:
        torch.backends.cudnn.allow_tf32 = False
    _drawn = Drawn(captions, store, precise, device)


def _draw(*asked) -> int:
    return len(_drawn.scores(*asked))
