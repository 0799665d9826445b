"""The trained models that are measured, as far as they are there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from demo.train.common import averaged
from demo.train.diffusion import noisy_name
from demo.train.options import NOISES, SHIPPED
from demo.train.student import NOISE

SEEDS = (0, 1, 2)
NOISE_KINDS = tuple(noisy_name(noise, 0)[:-2] for noise in NOISES)
# share of mistakes of each kind that the dial compares
SHARES = dict(zip(NOISE_KINDS, NOISES, strict=True))
# of the model whose weights ship, and from which the student is distilled
SHIPPED_KIND = noisy_name(NOISE, 0)[:-2]
SINK, STUDENT = "sink", "student"
# its models choose for those of the other seeds
CHOOSING = SHIPPED


def named(kind: str) -> str:
    if kind in SHARES:
        return f"{SHARES[kind]:.0%} mistakes".replace("%", " %")
    return {SINK: "start token made a sink", STUDENT: "few-step student"}[kind]


@dataclass(frozen=True)
class Trained:
    """A finished training run: `folder`/`kind`-`seed`.pt."""

    folder: Path
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.pt"

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Averaged over the training steps.

        Raises:
            ValueError: the run has not come to its end.
        """
        return averaged(self.file)

    @cached_property
    def digest(self) -> str:
        """Of all weights that a picture depends on."""
        whole = hashlib.sha256()
        for name in ("autoencoder", "text_encoder"):
            whole.update((self.folder / f"{name}.safetensors").read_bytes())
        for key, value in sorted(self.weights.items()):
            whole.update(key.encode())
            whole.update(value.contiguous().numpy().tobytes())
        return whole.hexdigest()[:16]

    def called(self, words: list[str]) -> bool:
        """Whether it is meant by one of the words: its name, its kind, seedN or "all"."""
        return not {self.name, self.kind, f"seed{self.seed}", "all"}.isdisjoint(words)


@dataclass(frozen=True)
class Models:
    """there: finished models, by name, those that --models leaves out too. measured: names of those that are reported.
    skipped: why each of the others is not."""

    there: dict[str, Trained]
    measured: tuple[str, ...]
    skipped: dict[str, str]

    def of(self, kind: str) -> list[Trained]:
        """In the order of their seeds."""
        return [self.there[name] for name in self.measured if self.there[name].kind == kind]

    def chooser(self, kind: str) -> Trained:
        """The model on which a kind's settings are chosen."""
        return self.there[f"{kind}-{CHOOSING}"]


def expected(folder: Path) -> list[Trained]:
    """All models of the plan."""
    dial = [Trained(folder, kind, seed) for seed in SEEDS for kind in NOISE_KINDS]
    return [*dial, Trained(folder, SINK, CHOOSING), *(Trained(folder, STUDENT, seed) for seed in SEEDS)]


def find(folder: Path, words: list[str]) -> Models:
    """Which models of the plan are there.

    Raises:
        ValueError: a word that means none of them.
    """
    everything = expected(folder)
    for word in words:
        if not any(model.called([word]) for model in everything):
            raise ValueError(f"no model is called {word!r}; there are all, {', '.join(m.name for m in everything)}, "
                             "their parts before the dash, and seed0, seed1, seed2")  # fmt: skip
    reasons = {model.name: _missing(model) for model in everything}
    there = {model.name: model for model in everything if not reasons[model.name]}
    for model in there.values():
        chooser = f"{model.kind}-{CHOOSING}"
        if not model.called(words):
            reasons[model.name] = "left out by --models"
        elif chooser not in there:
            reasons[model.name] = f"its settings are chosen on {chooser}, which is not there"
    measured = tuple(name for name in there if not reasons[name])
    return Models(there, measured, {name: reason for name, reason in reasons.items() if reason})


def _missing(model: Trained) -> str:
    """Why a model cannot be measured; empty if it can."""
    if not model.file.exists():
        return f"not trained yet: {model.file} is not there"
    try:
        return "" if model.weights else "empty"
    except ValueError as error:
        return str(error)
