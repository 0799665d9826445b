"""Where the text attention's mass goes in each trained model, and how well the oracle reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from demo.attention import SoftmaxAttention
from demo.model import unet
from demo.train.checks import oracle_accuracy
from demo.train.diffusion import load_text_encoder
from demo.train.options import Options
from demo.train.sink import PARTS, sink

from .models import SHARES, SINK, Models, Trained
from .store import Store

# below this mean mass on the start token in every layer, the plan measures a variant whose start token is a sink
LITTLE = 0.3


def figures(models: Models, store: Store) -> dict[str, Any]:
    """Of each kind of model and text attention: mass on each of PARTS and effective tokens, mean over seeds and their
    standard deviation; and the oracle's accuracy."""
    kinds = {kind: models.of(kind) for kind in (*SHARES, SINK) if models.of(kind)}
    result: dict[str, Any] = {"mass": {kind: _over_seeds(of_kind, store) for kind, of_kind in kinds.items()}}
    if kinds:
        first = next(iter(kinds.values()))[0]
        result["oracle"] = _taken(first, store, "oracle", lambda: oracle_accuracy(_options(first)))
    return result


def needs_variant(mass: dict[str, dict]) -> bool:
    """Whether no text attention of the dial's models has a start token that holds much."""
    return all(layer["start"][0] < LITTLE for kind in SHARES for layer in mass.get(kind, {}).values())


def _over_seeds(models: Sequence[Trained], store: Store) -> dict[str, dict[str, tuple[float, float]]]:
    of_seeds = [_taken(model, store, "mass", lambda model=model: _mass(model)) for model in models]
    return {
        layer: {
            part: (float(np.mean([seed[layer][part] for seed in of_seeds])),
                   float(np.std([seed[layer][part] for seed in of_seeds], ddof=len(of_seeds) > 1)))
            for part in PARTS
        }
        for layer in of_seeds[0]
    }  # fmt: skip


def _mass(model: Trained) -> dict[str, dict[str, float]]:
    network = unet().eval().requires_grad_(False)
    network.load_state_dict(model.weights)
    network.set_attn_processor(SoftmaxAttention())
    return sink(network, load_text_encoder(_options(model)))


def _options(model: Trained) -> Options:
    return Options(model.folder, 0, model.seed, 0, "cpu")


def _taken(model: Trained, store: Store, what: str, make: Callable[[], Any]) -> Any:
    return store.take({"model": f"{model.name}-{model.digest}", "what": what}, make)
