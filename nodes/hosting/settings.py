"""What an Apply node asks for: an immutable, picklable value."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from .models.layers import Layer
from .models.tokens import TOKENS, Encoded

TABLE_STEPS = 512
_sigma_tables: WeakKeyDictionary[Any, list[float]] = WeakKeyDictionary()
APPLY_TO = ("both", "positive", "negative")
# how much of the way from scale to end_scale lies behind, at the part of the window that lies behind
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda position: 0.0,
    "linear": lambda position: position,
    "cosine": lambda position: 0.5 - 0.5 * math.cos(math.pi * position),
}


@dataclass(frozen=True)
class Settings:
    """PLADIS on `layers` with lambda `lam`, inside a window of the noise schedule, for some of the prompts.

    Over the window, lambda goes to `end_lam` on the curve of `schedule`. `norm_cap` limits the length of every
    attention output to that many times its length without PLADIS; 0 is no limit. `tokens` are those that are mixed
    (models/tokens.py), and `texts` what was encoded, where they are told by that.

    Raises:
        ValueError: a lambda not finite, alpha outside [1, 2], a percent outside [0, 1], start after end, unknown
            apply_to, schedule or tokens, a norm_cap below 0.
    """

    layers: frozenset[Layer]
    lam: float = 2.0
    alpha: float = 1.5
    start_percent: float = 0.0
    end_percent: float = 1.0
    apply_to: str = "both"
    schedule: str = "constant"
    end_lam: float = 0.0
    norm_cap: float = 0.0
    tokens: str = "all"
    texts: tuple[Encoded, ...] = ()

    def __post_init__(self) -> None:
        # by the names that the node's inputs have
        for name, lam in (("scale", self.lam), ("end_scale", self.end_lam)):
            if not math.isfinite(lam):
                raise ValueError(f"{name} must be a finite number, not {lam}. The paper uses 2.")
        if not 1.0 <= self.alpha <= 2.0:
            raise ValueError(f"alpha must lie between 1 and 2, not {self.alpha}. The paper uses 1.5.")
        for name in ("start_percent", "end_percent"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"start_percent {self.start_percent} is after end_percent {self.end_percent}: PLADIS would never run. "
                "Lower start_percent or raise end_percent."
            )
        if self.apply_to not in APPLY_TO:
            raise ValueError(f"apply_to {self.apply_to!r} is unknown: choose one of {', '.join(APPLY_TO)}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"scale_schedule {self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}.")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens {self.tokens!r} is unknown: choose one of {', '.join(TOKENS)}.")
        if not 0.0 <= self.norm_cap < math.inf:
            raise ValueError(f"norm_cap must be 0 (no limit) or a positive number, not {self.norm_cap}.")

    @property
    def is_off(self) -> bool:
        """Whether these settings do nothing: lambda 0, or an alpha at which entmax is softmax."""
        lams = {self.lam} if self.schedule == "constant" else {self.lam, self.end_lam}
        return lams == {0.0} or self.alpha == 1.0

    @property
    def is_due_at_first(self) -> bool:
        """Whether they do something in the first step, whatever prompts it has."""
        return not self.is_off and self.start_percent <= 0.0 and self.apply_to == "both"

    @property
    def whole_schedule(self) -> bool:
        """Whether they are the same at every noise level."""
        return self.start_percent <= 0.0 and self.end_percent >= 1.0 and self.schedule == "constant"

    def at(self, sigma: float, model_sampling) -> Settings:
        """These settings at noise level `sigma`, without a schedule."""
        if self.schedule == "constant":
            return self
        width = self.end_percent - self.start_percent
        position = (percent_of(sigma, model_sampling) - self.start_percent) / width if width > 0.0 else 0.0
        way = SCHEDULES[self.schedule](min(max(position, 0.0), 1.0))
        return replace(self, lam=self.lam + way * (self.end_lam - self.lam), schedule="constant")

    def describe(self) -> str:
        """`lambda 2, alpha 1.5`."""
        lam = f"{self.lam:g}" if self.schedule == "constant" else f"{self.lam:g} to {self.end_lam:g}"
        return f"lambda {lam}, alpha {self.alpha:g}" + ("" if self.tokens == "all" else f", {self.tokens}")

    def why_it_did_nothing(self, lacked_prompts: bool) -> str:
        """Of a run whose every step was outside the window or without the prompts: the cause, and a way out."""
        nothing = ". PLADIS did nothing: "
        if lacked_prompts:
            why = "at CFG 1 there is none" if self.apply_to == "negative" else "which one it is could not be told"
            return f"{nothing}no step had a {self.apply_to} prompt ({why}). Set apply_to to both."
        ways = ["lower start_percent"] * (self.start_percent > 0.0)
        if self.end_percent < 1.0:
            ways.append("raise end_percent (with denoise below 1 sampling begins late in the noise schedule)")
        falls_to_zero = self.schedule != "constant"
        if not ways and falls_to_zero:
            return f"{nothing}scale was 0 in every step. Raise scale or end_scale."
        if not ways:
            return f"{nothing}the model was given no text."
        window = f"start_percent {self.start_percent:g} to end_percent {self.end_percent:g}"
        window += ", or has scale 0" * falls_to_zero
        return f"{nothing}every step lies outside {window}. To have it here, {' or '.join(ways)}."

    def without(self, layers: frozenset[Layer]) -> Settings:
        return replace(self, layers=self.layers - layers)

    def covers_sigma(self, sigma: float, model_sampling) -> bool:
        """Whether the window holds noise level `sigma`, by ComfyUI's convention (comfy/samplers.py,
        get_area_and_mult): percents count from the most noise, both ends included.

        Percent 0 and 1 have no bound: on flow models percent_to_sigma(0) is 1, and sampling may start above it.
        """
        start, end = self.start_percent, self.end_percent
        # StableCascade's percent_to_sigma returns a tensor
        below_start = start <= 0.0 or sigma <= float(model_sampling.percent_to_sigma(start))
        above_end = end >= 1.0 or sigma >= float(model_sampling.percent_to_sigma(end))
        return below_start and above_end


def percent_of(sigma: float, model_sampling) -> float:
    """The percent of the noise schedule at which it has `sigma`: percent_to_sigma, which falls, turned round."""
    table = _sigma_table(model_sampling)
    # of the first interval's start some kinds have no finite sigma
    index = min(max(bisect.bisect_left(table, -sigma), 1), TABLE_STEPS)
    above, below = -table[index - 1], -table[index]
    part = min(max((above - sigma) / (above - below), 0.0), 1.0) if above > below else 0.0
    return (index - 1 + part) / TABLE_STEPS


def _sigma_table(model_sampling) -> list[float]:
    """-sigma at every percent i / TABLE_STEPS, rising. Once for each model_sampling: a sigma may lie on the GPU."""
    if model_sampling not in _sigma_tables:
        percents = (i / TABLE_STEPS for i in range(TABLE_STEPS + 1))
        _sigma_tables[model_sampling] = [-float(model_sampling.percent_to_sigma(percent)) for percent in percents]
    return _sigma_tables[model_sampling]
