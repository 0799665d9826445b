"""Which arms are measured on which kinds of model: the plan, as it was cut ("Changed since") before any figure."""

from __future__ import annotations

from .arms import ARMS, SETTABLE
from .choices import CFG_3, CFGS, NO_GUIDANCE, STUDENT_WAYS, TUNED
from .models import SHARES, SHIPPED_KIND, SINK, STUDENT, named
from .pictures import Disturbance

# for every share of mistakes, and under noise; the other arms for the share that ships alone
COMPARED = ("softmax", "the paper", "PLADIS, chosen", "temperature")
# at tuned CFG, which is the dearest to measure
AT_TUNED_CFG = (*SETTABLE, "temperature")
DIAL_WAYS = (NO_GUIDANCE, CFG_3)
DISTURBED_WAYS = (NO_GUIDANCE, CFG_3)
NOISE_LEVEL = 0.5
DISTURBANCES = tuple(Disturbance(where, NOISE_LEVEL) for where in ("text states", "queries"))


def arms_of(kind: str, way: str) -> tuple[str, ...]:
    if kind in SHARES and kind != SHIPPED_KIND:
        return COMPARED
    return AT_TUNED_CFG if way == TUNED else ARMS


def kinds_of(way: str) -> tuple[str, ...]:
    if way in STUDENT_WAYS:
        return (STUDENT,)
    return (SHIPPED_KIND,) if way == TUNED else (*SHARES, SINK)


def about_arms(shipped: str) -> str:
    return (
        f"All arms for {named(shipped)} in the captions of training, the share that ships, for the few-step student "
        f"and for the variant with a sink; for the other shares only these: {'; '.join(COMPARED)}. "
        "GAG acts on every head and query."
    )


def about_tuned(shipped: str) -> str:
    return (
        f"At tuned CFG an arm keeps the setting that was chosen at CFG 3, and its CFG alone is chosen, among "
        f"{', '.join(f'{cfg:g}' for cfg in CFGS)}; only for {named(shipped)}, and only these arms: "
        f"{'; '.join(AT_TUNED_CFG)}."
    )


def about_robustness(shipped: str, captions: int) -> str:
    return (
        f"Gaussian noise of {NOISE_LEVEL:g} times the root mean square of what it is added to: the text states of "
        "words or, by itself, the queries of the text attention. Settings are those chosen without noise. On the first "
        f"{captions} of the captions to report on, only for {named(shipped)}: not for the other shares, nor for the "
        "variant with a sink."
    )
