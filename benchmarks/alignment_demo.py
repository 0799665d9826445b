"""Does the demo model follow its prompts better with PLADIS? Measured with an oracle, beside two controls.

For each way of sampling (guidance scale, or the few-step student's steps) the strength is chosen on one half of the
held-out captions and reported on the other. The controls: a temperature, softmax(t * S), with t chosen in the same
way, which sharpens attention without being sparse; and lambda -1, which pushes the other way. Every setting sees the
same noise, so that differences are paired.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from demo import config
from demo.attention import TextAttention
from demo.oracle import Score, read, score
from demo.pipeline import Pipeline
from demo.scenes import Prompt, random_prompts

SEED = 2026
BATCH = 50
SOFTMAX = TextAttention()
PAPER = TextAttention(2.0, 1.5)
OPPOSITE = TextAttention(-1.0, 1.5)
GRID = (
    *(TextAttention(lam, alpha) for alpha in (1.5, 2.0) for lam in (0.5, 1.0, 2.0)),
    *(TextAttention(lam, 1.5, layers="down + up") for lam in (0.5, 1.0, 2.0)),
)
TEMPERATURES = (
    *(TextAttention(temperature=t) for t in (1.25, 1.5, 2.0, 3.0)),
    *(TextAttention(temperature=t, layers="down + up") for t in (1.5, 2.0)),
)
MEASURES = ("recall", "complete", "f1", "count", "relation")


@dataclass(frozen=True)
class Sampling:
    """A way of sampling: variant of the model, Euler steps, guidance scale."""

    variant: str
    steps: int
    cfg: float

    def __str__(self) -> str:
        if self.variant == "few-step":
            return f"few-step student, {self.steps} step{'s' if self.steps > 1 else ''}"
        return f"CFG {self.cfg:g}"


def samplings(steps: int) -> tuple[Sampling, ...]:
    return (
        *(Sampling("standard", steps, cfg) for cfg in (1.0, 3.0, 5.0)),
        *(Sampling("few-step", few, 1.0) for few in (1, 2, 4)),
    )


@dataclass
class Store:
    """Scores of finished cells, by name, in a file that is written after each of them: a run that was stopped goes
    on.

    Raises:
        ValueError: the file holds another model's scores, of other captions or by other code.
    """

    file: Path
    identity: str
    cells: dict[str, list] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            saved = json.loads(self.file.read_text(encoding="utf-8"))
            if saved["identity"] != self.identity:
                raise ValueError(f"{self.file} holds scores of another model, captions or code: choose another --out")
            self.cells = saved["cells"]

    def add(self, name: str, scores: Sequence[Score]) -> None:
        self.cells[name] = [[s.found, s.named, s.seen, s.relation] for s in scores]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps({"identity": self.identity, "cells": self.cells}), encoding="utf-8")
        fresh.replace(self.file)

    def scores(self, name: str) -> list[Score]:
        return [Score(*row) for row in self.cells[name]]


def measure(store: Path, tune: int, report: int, steps: int) -> dict:
    """All tables, as plain data.

    Args:
        store: file of finished cells.
        tune, report: captions to choose on and to report on.
        steps: Euler steps of the standard model.
    """
    prompts = {"tune": random_prompts(tune, "tune", SEED), "report": random_prompts(report, "report", SEED)}
    weights = fingerprint()
    texts = [prompt.text for split in prompts.values() for prompt in split]
    sources = [file.read_text(encoding="utf-8") for file in sorted(Path(config.__file__).parent.glob("*.py"))]
    identity = hashlib.sha256(json.dumps([weights, SEED, steps, texts, sources]).encode()).hexdigest()
    cells = Store(store, identity)
    tables = []
    for sampling in samplings(steps):
        runner = Runner(sampling, prompts, cells)
        over_tune, over_report = Summary(prompts["tune"]), Summary(prompts["report"])
        tuned = {setting: runner.scores("tune", setting) for setting in (SOFTMAX, PAPER, *GRID, *TEMPERATURES)}
        chosen = _best(tuned, GRID)
        temperature = _best(tuned, (SOFTMAX, *TEMPERATURES))
        shown = {
            "softmax": SOFTMAX,
            "PLADIS, the paper's lambda 2, alpha 1.5": PAPER,
            "PLADIS, chosen": chosen,
            "PLADIS, chosen, other layers": TextAttention(
                chosen.lam, chosen.alpha, layers="all" if chosen.layers == "down + up" else "down + up"
            ),
            "control: temperature, chosen": temperature,
            "control: lambda -1": OPPOSITE,
        }
        reported = {name: runner.scores("report", setting) for name, setting in shown.items()}
        tables.append(
            {
                "sampling": str(sampling),
                "steps": sampling.steps,
                "tuned": [{"setting": asdict(s), **over_tune.means(scores)} for s, scores in tuned.items()],
                "reported": [
                    {
                        "name": name,
                        "setting": asdict(shown[name]),
                        **over_report.means(scores),
                        "gain": over_report.differences(scores, reported["softmax"]),
                    }
                    for name, scores in reported.items()
                ],
                "chosen_over_temperature": over_report.differences(
                    reported["PLADIS, chosen"], reported["control: temperature, chosen"]
                ),
            }
        )
    return {"weights": weights, "captions": {"tune": tune, "report": report}, "seed": SEED, "tables": tables}


class Runner:
    """Scores of one way of sampling, from the store or made now."""

    def __init__(self, sampling: Sampling, prompts: dict[str, list[Prompt]], store: Store) -> None:
        self.sampling, self.prompts, self.store = sampling, prompts, store
        self.pipeline: Pipeline | None = None

    def scores(self, split: str, setting: TextAttention) -> list[Score]:
        name = f"{split} | {self.sampling} | {json.dumps(asdict(setting))}"
        if name not in self.store.cells:
            self.pipeline = self.pipeline or Pipeline(self.sampling.variant)
            title = f"{self.sampling}, {split}, {_label(setting)}"
            self.store.add(name, self._make(self.prompts[split], setting, title))
        return self.store.scores(name)

    def _make(self, prompts: Sequence[Prompt], setting: TextAttention, title: str) -> list[Score]:
        scores = []
        for start in tqdm(range(0, len(prompts), BATCH), desc=title, unit="batch", leave=False, mininterval=5):
            batch = prompts[start : start + BATCH]
            # one seed per caption, the same for every setting
            noise = torch.cat([_noise(prompt) for prompt in batch])
            latents = self.pipeline.latents(
                [prompt.text for prompt in batch], noise, setting, self.sampling.steps, self.sampling.cfg
            )
            pictures = self.pipeline.decode(latents)
            scores += [score(prompt, read(picture)) for prompt, picture in zip(batch, pictures, strict=True)]
        return scores


def _noise(prompt: Prompt) -> torch.Tensor:
    shape = (1, config.LATENT_CHANNELS, config.LATENT_SIZE, config.LATENT_SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED * 2**32 + zlib.crc32(prompt.text.encode())))


def fingerprint() -> str:
    """Of the shipped weights."""
    files = sorted(config.WEIGHTS.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def values(scores: Iterable[Score], measure: str) -> np.ndarray:
    """One number per caption; NaN where the measure does not apply to it.

    count is the number of objects seen beyond those named (negative: missing). relation is whether the stated relation
    holds, among pictures that show both of its objects.
    """
    read_off = {
        "recall": lambda s: s.recall,
        "complete": lambda s: float(s.complete),
        "f1": lambda s: s.f1,
        "count": lambda s: float(s.seen - s.named),
        "relation": lambda s: float("nan") if s.relation is None else float(s.relation),
    }[measure]
    return np.array([read_off(s) for s in scores])


def _best(tuned: dict[TextAttention, list[Score]], among: Sequence[TextAttention]) -> TextAttention:
    """By F1: recall alone would reward a picture that shows everything."""
    return max(among, key=lambda setting: values(tuned[setting], "f1").mean())


class Summary:
    """Means over captions, with standard errors that allow for captions of the same objects to be alike."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        sets = [frozenset(prompt.objects) for prompt in prompts]
        numbers = {objects: number for number, objects in enumerate(dict.fromkeys(sets))}
        self.sets = np.array([numbers[objects] for objects in sets])

    def means(self, scores: Sequence[Score]) -> dict[str, list[float | None]]:
        return {name: self._mean(values(scores, name)) for name in MEASURES}

    def differences(self, scores: Sequence[Score], base: Sequence[Score]) -> dict[str, list[float | None]]:
        return {name: self._mean(values(scores, name) - values(base, name)) for name in MEASURES}

    def _mean(self, numbers: np.ndarray) -> list[float | None]:
        """Mean, standard error, count, of the numbers that are there; None where there are too few.

        The standard error is clustered by the set of objects (Liang, Zeger 1986).
        """
        there = ~np.isnan(numbers)
        count, sets = int(there.sum()), self.sets[there]
        groups = len(np.unique(sets))
        if groups < 2:
            return [None, None, count]
        mean = numbers[there].mean()
        sums = np.bincount(sets, weights=numbers[there] - mean)
        error = (groups / (groups - 1) * (sums**2).sum()) ** 0.5 / count
        return [float(mean), float(error), count]


def markdown(result: dict) -> str:
    """The tables of the evidence page, one for each way of sampling."""
    return "\n\n".join(_table(table) for table in result["tables"])


def _table(table: dict) -> str:
    plain = table["reported"][0]
    lines = [
        f"### {table['sampling']}",
        "",
        "| setting | recall | all objects | F1 | extra objects | relation | F1 - softmax |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["reported"]:
        cells = [_show(row[name]) for name in MEASURES]
        gain = "" if row is plain else _show(row["gain"]["f1"], sign=True)
        lines.append(f"| {_name(row)} | {' | '.join(cells)} | {gain} |")
    edge = table["chosen_over_temperature"]
    lines += [
        "",
        f"Chosen PLADIS - chosen temperature, paired: recall {_show(edge['recall'], sign=True)}, "
        f"F1 {_show(edge['f1'], sign=True)}, all objects {_show(edge['complete'], sign=True)}, "
        f"relation {_show(edge['relation'], sign=True)}.",
    ]
    return "\n".join(lines)


def _name(row: dict) -> str:
    setting = row["setting"]
    if "chosen" not in row["name"]:
        return row["name"]
    return f"{row['name']}: {_label(TextAttention(**setting))}"


def _label(setting: TextAttention) -> str:
    if setting.lam == 0:
        return f"t = {setting.temperature:g}, {setting.layers}"
    return f"lambda {setting.lam:g}, alpha {setting.alpha:g}, {setting.layers}"


def _show(mean: Sequence[float | None], sign: bool = False) -> str:
    if mean[0] is None:
        return "-"
    return f"{mean[0]:{'+' if sign else ''}.3f} ± {mean[1]:.3f}"
