"""Where scores come from: from the store or drawn now, or, for a forecast, made up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from demo.oracle import Score
from demo.scenes import Prompt, random_prompts

from . import ROBUSTNESS_CAPTIONS
from .arms import SOFTMAX, Setting
from .models import Trained
from .pictures import BATCH, NONE, Disturbance, Sampling, Studio
from .store import Store

# model, split, sampling, setting, disturbance
Asked = tuple[Trained, str, Sampling, Setting, Disturbance]


class Captions:
    """True captions of the two splits; "robustness" is the first part of "report".

    Args:
        seed: of the captions.
    """

    def __init__(self, tune: int, report: int, seed: int) -> None:
        self.seed = seed
        self.prompts: dict[str, list[Prompt]] = {
            split: random_prompts(count, split, seed) for split, count in (("tune", tune), ("report", report))
        }
        self.prompts["robustness"] = self.prompts["report"][:ROBUSTNESS_CAPTIONS]
        self.digests = {
            split: hashlib.sha256(json.dumps([prompt.text for prompt in prompts]).encode()).hexdigest()[:16]
            for split, prompts in self.prompts.items()
        }


@dataclass
class Drawn:
    """Scores of pictures that are drawn unless the store has them; `model` says whose.

    Args:
        done: told the number of pictures after each batch.
    """

    captions: Captions
    store: Store
    precise: bool = False
    device: str = "cpu"
    done: Callable[[int], object] = lambda pictures: None
    studios: dict[str, Studio] = field(default_factory=dict)

    def key(self, model: Trained, split: str, way: Sampling, setting: Setting, disturbance: Disturbance) -> dict:
        return {
            "model": f"{model.name}-{model.digest}", "split": split, "captions": self.captions.digests[split],
            "sampling": asdict(way), "setting": asdict(setting), "precise": self.precise,
            # float32 is the same on all but for its last digits
            "device": "any" if self.precise else self.device,
            # the place of noise that is not there makes no difference
            "disturbance": asdict(disturbance if disturbance.level else NONE), "batch": BATCH,
        }  # fmt: skip

    def scores(
        self, model: Trained, split: str, way: Sampling, setting: Setting, disturbance: Disturbance = NONE
    ) -> list[Score]:
        key = self.key(model, split, way, setting, disturbance)
        kept = self.store.get(key)
        if kept is None:
            kept = self._draw(model, split, way, setting, disturbance)
            self.store.keep(key, kept)
        return [Score(*row) for row in kept["scores"]]

    def _draw(self, model: Trained, split: str, way: Sampling, setting: Setting, disturbance: Disturbance) -> dict:
        if model.name not in self.studios:
            self.studios[model.name] = Studio(model, self.precise, self.device)
        begin = time.process_time()
        scores = self.studios[model.name].scores(self.captions.prompts[split], way, setting, disturbance, self.done)
        seconds = time.process_time() - begin
        return {"scores": [[s.found, s.named, s.seen, s.relation] for s in scores], "seconds": seconds}


@dataclass
class Forecast:
    """Made-up scores for what the store does not have: how much work a run of the plan is. What is chosen, and so what
    coincides, is left to chance."""

    drawn: Drawn
    work: dict[str, list[int]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    counted: set[str] = field(default_factory=set)

    @property
    def captions(self) -> Captions:
        return self.drawn.captions

    def scores(
        self, model: Trained, split: str, way: Sampling, setting: Setting, disturbance: Disturbance = NONE
    ) -> list[Score]:
        key = self.drawn.key(model, split, way, setting, disturbance)
        if self.drawn.store.get(key) is not None:
            return self.drawn.scores(model, split, way, setting, disturbance)
        prompts, name = self.captions.prompts[split], json.dumps(key, sort_keys=True)
        if name not in self.counted:
            self.counted.add(name)
            self.asked.append((Trained(model.folder, model.kind, model.seed), split, way, setting, disturbance))
            work = self.work.setdefault(model.name, [0, 0])
            work[0] += len(prompts) * way.evaluations
            work[1] += len(prompts)
        luck = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)).random()
        return [Score(int(len(p.objects) * luck), len(p.objects), len(p.objects), None) for p in prompts]


def unit_costs(drawn: Drawn, model: Trained, count: int = 50) -> tuple[float, float]:
    """CPU seconds of one network evaluation, and of decoding and reading one picture; measured now."""
    studio, prompts = Studio(model, drawn.precise, drawn.device), drawn.captions.prompts["tune"][:count]
    seconds = []
    # the first warms up
    for steps in (1, 1, 3):
        begin = time.process_time()
        studio.scores(prompts, Sampling(steps, 1.0), SOFTMAX)
        seconds.append((time.process_time() - begin) / len(prompts))
    evaluation = max(seconds[2] - seconds[1], 0.0) / 2
    return evaluation, max(seconds[1] - evaluation, 0.0)
