"""The small models that the tests of transformers stand on: they work in the host, and text attention matters in them.

And where that text attention is, found out by changing the prompt and the noise: what tests/host/families.py claims.
"""

from __future__ import annotations

import pytest
import torch
from comfy.model_base import BaseModel

import families
from attention_trace import Tracer, changed, spans
from families import FAMILIES, Family


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return families.patcher(family)


@pytest.fixture(autouse=True)
def batches_that_the_host_can_compute(request, monkeypatch):
    """As on a machine with little memory, where it cannot: every conditioning in a model call of its own."""
    if "family" in request.fixturenames and request.getfixturevalue("family").no_batch:
        monkeypatch.setattr(BaseModel, "memory_required", lambda self, *args, **kwargs: float("inf"))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_samples(family, model):
    guided, unguided = (families.sample(model, family, cfg=cfg) for cfg in (4.0, 1.0))
    assert guided.isfinite().all() and unguided.isfinite().all()
    assert relative(guided, unguided) > 0.02


def test_another_text_is_another_image(family, model):
    first, second = (families.sample(model, family, families.prompt(family, seed), cfg=1.0) for seed in (21, 22))
    assert relative(second, first) > 0.02


def test_a_batch_of_two(family, model):
    if family.no_batch:
        with pytest.raises((RuntimeError, ValueError)):
            families.sample(model, family, batch=2)
    else:
        out = families.sample(model, family, batch=2)
        assert out.isfinite().all()
        assert len(out) == 2


def test_prompts_of_unequal_length(family, model):
    prompts = families.prompt(family, 11, 9), families.prompt(family, 12, 5)
    if family.fixed_length:
        with pytest.raises(RuntimeError):
            families.sample(model, family, *prompts)
    else:
        assert families.sample(model, family, *prompts).isfinite().all()


def attention_calls(model, family, prompt_seed=11, noise_seed=5):
    tracer = Tracer()
    prompt = families.prompt(family, prompt_seed)
    families.sample(tracer.attach(model), family, prompt, cfg=1.0, seed=noise_seed)
    (evaluation,) = tracer.evaluations
    return evaluation.calls


def test_text_attention_is_where_the_family_says(family, model):
    runs = (attention_calls(model, family, *seeds) for seeds in ((11, 5), (13, 5), (11, 6)))
    for call, other_text, other_noise in zip(*runs, strict=True):
        columns, rows = changed(call, other_text, "k"), changed(call, other_noise, "q")
        # text encoders and refiners inside the network attend from text to text
        if columns and (rows or not family.rows):
            break
    assert (spans(columns), spans(rows), call.reached) == (family.columns, family.rows, family.reached)
    # far from uniform
    assert call.weights().amax(-1).mean() > 2 / call.k_length


def test_a_trace_changes_nothing():
    family = families.BY_NAME["Flux.1"]
    model = families.patcher(family)
    before = families.sample(model, family)
    tracer = Tracer()
    assert torch.equal(families.sample(tracer.attach(model), family), before)
    assert [len(evaluation.calls) for evaluation in tracer.evaluations] == [4]
    assert torch.equal(families.sample(model, family), before)
    assert len(tracer.evaluations) == 1


def test_a_trace_keeps_the_hook_that_is_there():
    family = families.BY_NAME["Flux.1"]
    model = families.patcher(family)
    plain = families.sample(model, family)
    model.model_options["transformer_options"]["optimized_attention_override"] = halve
    before = families.sample(model, family)
    assert relative(before, plain) > 0.02
    assert torch.equal(families.sample(Tracer().attach(model), family), before)


def halve(function, *args, **kwargs):
    return 0.5 * function(*args, **kwargs)
