"""The arms of the plan: what is tried on the captions to tune on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

TOKENS = ("all", "without start token", "words only")
GROUPS = ("down", "middle", "up")


@dataclass(frozen=True)
class Setting:
    """How text attention weighs its keys; the default is softmax.

    lam, alpha: PLADIS'. tokens, norm_cap: as on Apply PLADIS (Advanced). temperatures: factors on the scores in
    softmax, for each of GROUPS; only with lam 0. gag: (eta, zeta) of Geometry-Aware Guidance (arXiv 2603.02531) with
    lambda `lam`; None is without.
    """

    lam: float = 0.0
    alpha: float = 1.5
    tokens: str = "all"
    norm_cap: float = 0.0
    temperatures: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gag: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {TOKENS}, not {self.tokens!r}")
        if self.lam and set(self.temperatures) != {1.0}:
            raise ValueError(f"temperatures {self.temperatures} are a control for lam 0, not for lam {self.lam}")

    def __str__(self) -> str:
        if self.gag:
            return f"GAG: lambda {self.lam:g}, eta {self.gag[0]:g}, zeta {self.gag[1]:g}"
        if self.lam == 0:
            return self._softmax()
        parts = [f"lambda {self.lam:g}"]
        parts += [f"alpha {self.alpha:g}"] if self.alpha != 1.5 else []
        parts += [self.tokens] if self.tokens != "all" else []
        parts += [f"norm_cap {self.norm_cap:g}"] if self.norm_cap else []
        return ", ".join(parts)

    def _softmax(self) -> str:
        if set(self.temperatures) == {1.0}:
            return "softmax"
        if len(set(self.temperatures)) == 1:
            return f"temperature {self.temperatures[0]:g}"
        return "temperature " + ", ".join(f"{t:g} {group}" for t, group in zip(self.temperatures, GROUPS, strict=True))


SOFTMAX = Setting()
PAPER = Setting(lam=2.0)
OPPOSITE = Setting(lam=-1.0)
GROUP_TEMPERATURES = (1.0, 1.5, 2.5)

# of each arm but the temperature per layer group, which is searched
TRIED: dict[str, tuple[Setting, ...]] = {
    "softmax": (SOFTMAX,),
    "the paper": (PAPER,),
    "PLADIS, chosen": tuple(Setting(lam=lam) for lam in (0.5, 1.0, 2.0, 3.0)),
    "tokens": tuple(Setting(lam=lam, tokens=tokens) for tokens in TOKENS[1:] for lam in (1.0, 2.0, 3.0)),
    "norm_cap": tuple(Setting(lam=2.0, norm_cap=cap) for cap in (1.0, 1.5, 2.0)),
    "temperature": tuple(Setting(temperatures=(t,) * 3) for t in (1.25, 1.5, 2.0, 3.0)),
    "GAG": (Setting(lam=10.0, gag=(15.0, 0.0)), *(Setting(lam=2.0, gag=(eta, 0.0)) for eta in (0.5, 1.0, 2.0))),
    "opposite": (OPPOSITE,),
}
PER_GROUP = "temperature per layer group"
ARMS = (*list(TRIED)[:6], PER_GROUP, *list(TRIED)[6:])
# those that a user of the pack can set
SETTABLE = ("softmax", "the paper", "PLADIS, chosen", "tokens", "norm_cap")


def tried(arm: str, score: Callable[[Setting], float]) -> dict[Setting, float]:
    """The settings of an arm with their scores; what the search for temperatures per group tries depends on them."""
    if arm == PER_GROUP:
        return dict(_searched(score))
    settings = TRIED[arm]
    return {setting: score(setting) for setting in settings}


def _searched(score: Callable[[Setting], float]) -> Iterator[tuple[Setting, float]]:
    """One group at a time, in the order of GROUPS, twice; each time from the best so far."""
    scores: dict[Setting, float] = {}
    best = SOFTMAX
    for group in (0, 1, 2) * 2:
        line = [replace(best, temperatures=_with(best.temperatures, group, t)) for t in GROUP_TEMPERATURES]
        for setting in line:
            if setting not in scores:
                scores[setting] = score(setting)
                yield setting, scores[setting]
        best = max(line, key=scores.__getitem__)


def _with(temperatures: tuple[float, ...], group: int, value: float) -> tuple[float, ...]:
    return (*temperatures[:group], value, *temperatures[group + 1 :])
