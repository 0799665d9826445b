"""What an Apply node asks for: an immutable, picklable value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .layers import Layer

APPLY_TO = ("both", "positive", "negative")


@dataclass(frozen=True)
class Settings:
    """PLADIS on `layers` with lambda `scale`, inside a window of the noise schedule, for some of the prompts.

    Raises:
        ValueError: scale not finite, alpha outside [1, 2], a percent outside [0, 1], start after end, unknown apply_to.
    """

    layers: frozenset[Layer]
    scale: float = 2.0
    alpha: float = 1.5
    start_percent: float = 0.0
    end_percent: float = 1.0
    apply_to: str = "both"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, not {self.scale}. The paper uses 2.")
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

    @property
    def is_off(self) -> bool:
        """Whether these settings change nothing: lambda 0, or an alpha at which entmax is softmax."""
        return self.scale == 0.0 or self.alpha == 1.0

    @property
    def whole_schedule(self) -> bool:
        return self.start_percent <= 0.0 and self.end_percent >= 1.0

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
