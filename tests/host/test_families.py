"""PLADIS in every transformer family: against the equation written out here, in exactly the text's attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import entmax
import pytest
import torch
from comfy.model_base import BaseModel

import families
from attention_trace import AttentionCall, Tracer, additive
from families import FAMILIES, Family
from tiny import apply

# the fixtures' columns are those that change with the prompt; pads that the host does not mask take part too
COLUMNS = {"Flux.2": "0:512", "Flux.2 edit": "0:512"}
# they mix with the noise before the first joint attention, but are references
ROWS = {"Z-Image Omni": "160:192", "Ming-Image edit": "16:32"}
# keys of the text's attention where they are more than the prompt's tokens
KEYS = {"ACE-Step": 13, "HunyuanDiT": 12, "HunyuanDiT 1.0": 12, "Anima": 512, "Stable Audio": 9, "Stable Audio 3": 257}
CROSS = {family.name for family in families.CROSS}


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


def indices(spans: str) -> list[int]:
    return [i for span in spans.split() for i in range(*map(int, span.split(":")))]


def text_calls(family: Family, calls: list[AttentionCall]) -> dict[int, tuple[list[int], list[int]]]:
    """The text attention of an evaluation as the fixture describes it: (columns, rows) by the call's place."""
    columns, rows = indices(COLUMNS.get(family.name, family.columns)), indices(ROWS.get(family.name, family.rows))
    found: dict[int, tuple[list[int], list[int]]] = {}
    if family.name in CROSS:
        for i, call in enumerate(calls):
            keys = KEYS.get(family.name, families.TOKENS)
            if family.name == "ACE-Step 1.5":
                # every row gets the timbre of all
                keys = 12 + len(call.q)
            if call.k_length == keys != call.q_length:
                found[i] = list(range(keys)), list(range(call.q_length))
        return found
    if family.name.startswith("Qwen-Image 2.1"):
        # the image's call, among those of the text and of references
        longest = max(call.k_length for call in calls)
        return {i: (columns, rows) for i, call in enumerate(calls) if call.k_length == longest}
    apart = {"Stable Cascade C": 15, "Stable Cascade B": 4}.get(family.name, 0)
    longest = max(call.q_length for call in calls)
    for i, call in enumerate(calls):
        if call.k_length - call.q_length == apart and (apart or call.q_length == longest):
            # in Stable Cascade the text follows the image, of which the lower levels have less
            shift = call.q_length - len(rows) if apart else 0
            found[i] = [c + shift for c in columns], list(range(call.q_length)) if apart else rows
    return found


def reference(call: AttentionCall, columns: list[int], rows: list[int], scale=2.0) -> torch.Tensor:
    """The equation in float64 on the `entmax` package: text weights remixed, their softmax mass kept."""
    q, k, v = (t.double() for t in (call.q, call.k, call.v))
    if not call.options.get("skip_reshape"):
        width = q.shape[-1] // call.heads
        q, k, v = (t.flatten(2).unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (call.options.get("scale") or q.shape[-1] ** -0.5)
    if call.mask is not None:
        scores = scores + additive(call.mask).double().clamp(min=-1e6)
    weights = scores.softmax(-1)
    text = scores[..., columns]
    mass = weights[..., columns].sum(-1, keepdim=True)
    mixed = mass * (scale * entmax.entmax15(text, -1) + (1 - scale) * text.softmax(-1))
    changed = weights.clone()
    changed[..., columns] = mixed
    weights[:, :, rows] = changed[:, :, rows]
    out = (weights @ v).to(call.q.dtype)
    return out if call.options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


class Watching(Tracer):
    """Lets `answer(index, call, compute)` give the result of every attention call; `compute` is the host's."""

    def __init__(self, answer: Callable):
        super().__init__()
        self.answer = answer

    def _recorded(self, name, function):
        def record(q, k, v, *args, **kwargs):
            if self._open:
                return function(q, k, v, *args, **kwargs)
            call = self._describe(name, sys._getframe(1), q, k, v, args, kwargs)
            calls = self.evaluations[-1].calls
            calls.append(call)
            self._open.append(call)

            def compute(**options):
                return function(call.q, call.k, call.v, *args, **{**kwargs, **options})

            try:
                return self.answer(len(calls) - 1, call, compute)
            finally:
                self._open.pop()

        return record


def plain_calls(model, family, **options) -> list[list[AttentionCall]]:
    tracer = Tracer()
    families.sample(tracer.attach(model), family, **options)
    return [evaluation.calls for evaluation in tracer.evaluations]


@pytest.mark.parametrize("options", ({"cfg": 1.0}, {"cfg": 4.0, "batch": 2}), ids=("one", "guided batch"))
def test_scale_two_is_the_equation(family, model, options):
    if family.no_batch:
        options = {**options, "batch": 1}
    (calls, *_) = plain_calls(model, family, **options)
    text = text_calls(family, calls)
    assert text

    def answer(index, call, compute):
        return reference(call, *text[index]) if index in text else compute()

    expected = families.sample(Watching(answer).attach(model), family, **options)
    ours = families.sample(apply(model), family, **options)
    plain = families.sample(model, family, **options)
    assert relative(ours, expected) < 2e-4
    assert relative(plain, expected) > 20 * relative(ours, expected)
    assert relative(plain, expected) > 1e-3


def test_off_is_bit_identical(family, model):
    expected = families.sample(model, family)
    for options in ({"scale": 0.0}, {"alpha": 1.0}, {"start_percent": 1.0}):
        assert torch.equal(families.sample(apply(model, **options), family), expected)
    families.sample(apply(model), family)
    assert torch.equal(families.sample(model, family), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_exactly_the_text_attention_changes(family, model):
    (calls,) = plain_calls(model, family, cfg=1.0)
    text = text_calls(family, calls)
    changed = {}

    def answer(index, call, compute):
        out = compute()
        plain = compute() if call.function == "scaled_dot_product_attention" else compute(transformer_options={})
        changed[index] = not torch.equal(out, plain)
        return out

    tracer = Watching(answer)
    families.sample(tracer.attach(apply(model)), family, cfg=1.0)
    (evaluation,) = tracer.evaluations
    assert len(evaluation.calls) == len(calls)
    first = min(text)
    for before, after in zip(calls[: first + 1], evaluation.calls[: first + 1], strict=True):
        assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in "qkv")
    # else the host's function does not see the change, which is added to its output
    if family.reached and not family.diverted:
        assert {index for index, different in changed.items() if different} == set(text)


def test_a_prompt_does_not_depend_on_the_other_prompts_length(family, model):
    if family.fixed_length:
        return

    def change(model) -> float:
        seen = []

        def record(args):
            seen.append(args["cond_denoised"])
            return args["denoised"]

        model = model.clone()
        model.set_model_sampler_post_cfg_function(record)
        for tokens in (7, 5):
            families.sample(model, family, families.prompt(family, 11, 7), families.prompt(family, 12, tokens))
        return relative(seen[1], seen[0])

    # in two families the host itself lets one prompt's rows see how many tokens, or voices, the other has
    allowed = 2 * change(model) if family.name in ("Stable Cascade C", "ACE-Step 1.5") else 0
    assert change(apply(model)) <= allowed + 1e-4


def test_an_attention_override_of_another_node_computes_the_dense_part(family, model):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(1)
        return 0.9 * function(*args, **kwargs)

    def patch(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    alone = families.sample(patch(model), family, cfg=1.0)
    count = len(calls)
    before, after = (families.sample(m, family, cfg=1.0) for m in (apply(patch(model)), patch(apply(model))))
    assert torch.equal(before, after)
    assert len(calls) == 3 * count
    assert relative(before, alone) > 1e-3
    assert torch.equal(families.sample(apply(patch(model), scale=0.0), family, cfg=1.0), alone)


def test_a_text_of_its_own_is_not_cut_with_the_prompt(monkeypatch):
    """Prism's sound has its own words: as many as the longer prompt has, and the host repeats the shorter one."""
    prism = families.BY_NAME["Prism"]
    family = replace(prism, extras=lambda random: {**prism.extras(random), "prism_audio_context": random(1, 6, 4096)})
    model = apply(families.patcher(family))
    prompts = families.prompt(family, 11, 6), families.prompt(family, 12, 3)
    together = families.sample(model, family, *prompts)
    monkeypatch.setattr(BaseModel, "memory_required", lambda self, *args, **kwargs: float("inf"))
    assert relative(together, families.sample(model, family, *prompts)) < 1e-4
