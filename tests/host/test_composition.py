"""Beside other patches on the same attention, in either order of the nodes."""

from __future__ import annotations

import pytest
import torch
from comfy.ldm.modules import attention

import tiny
from pladis_pack.nodes.hosting import find_target
from pladis_pack.nodes.hosting.batch import Prompt, repeat_mask
from pladis_pack.nodes.hosting.models.layers import BY_SHAPE
from pladis_pack.nodes.hosting.roads import unet
from pladis_pack.nodes.hosting.running import running
from pladis_pack.nodes.hosting.settings import Settings
from tiny import apply


@pytest.fixture(scope="module")
def sd15():
    return tiny.patcher("SD15")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Adapter:
    """Dense attention plus a term of its own, as image adapters do; like theirs it wants the slot free."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, extra_options):
        self.calls += 1
        return attention.optimized_attention(q, k, v, extra_options["n_heads"]) + 0.3 * q

    def patch(self, model, parts: int):
        model = model.clone()
        for name, number in (("middle", 0), ("output", 3), ("input", 4)):
            slot = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
            assert (name, number) not in slot and (name, number, 0) not in slot, "the slot must be free"
            model.set_model_attn2_replace(self, name, number, 0 if parts == 3 else None)
        return model


@pytest.mark.parametrize("parts", (2, 3))
def test_a_foreign_hook_is_kept_in_both_orders(sd15, parts):
    adapter = Adapter()
    alone = tiny.sample(adapter.patch(sd15, parts))
    count = adapter.calls
    before = tiny.sample(apply(adapter.patch(sd15, parts)))
    after = tiny.sample(adapter.patch(apply(sd15), parts))
    assert torch.equal(before, after)
    assert adapter.calls == 3 * count > 0
    assert relative(before, alone) > 1e-3
    assert relative(before, tiny.sample(apply(sd15))) > 1e-3
    assert torch.equal(tiny.sample(adapter.patch(apply(sd15, scale=0.0), parts)), alone)


def test_resident_plus_correction():
    """On a hook that computes plain attention the sum is what the fused pass gives."""
    q, k, v = torch.randn(2, 20, 32), torch.randn(2, 77, 32), torch.randn(2, 77, 32)
    options = {"n_heads": 4, "attn_precision": None}
    call = tiny.call_of_two_rows(Prompt("positive", 77), Prompt("negative", 77))
    settings = Settings(frozenset())

    def plain(q, k, v, extra_options):
        return attention.optimized_attention(q, k, v, 4)

    resident = unet.PladisHook(settings, call, BY_SHAPE, plain)
    fused = unet.PladisHook(settings, call, BY_SHAPE, None)
    with running(call):
        torch.testing.assert_close(resident(q, k, v, options), fused(q, k, v, options), atol=1e-5, rtol=1e-5)
        assert relative(fused(q, k, v, options), plain(q, k, v, options)) > 1e-3
    # a hook whose call is over does nothing
    assert torch.equal(resident(q, k, v, options), plain(q, k, v, options))


def test_a_foreign_attn1_hook_is_kept_on_the_upscaler():
    model = tiny.patcher("X4 upscaler")
    cross_attending = next(layer.key for layer in find_target(model).layers if layer.slot == "attn1")
    calls = []

    def foreign(q, k, v, extra_options):
        calls.append(1)
        return attention.optimized_attention(q, k, v, extra_options["n_heads"]) + 0.3 * q

    def patch(model):
        model = model.clone()
        # the host itself needs an attn1_patch beside a replaced cross-attending attn1
        model.set_model_attn1_patch(lambda n, context, value, extra_options: (n, context, value))
        model.set_model_attn1_replace(foreign, *cross_attending)
        return model

    before, after = tiny.sample(apply(patch(model))), tiny.sample(patch(apply(model)))
    assert torch.equal(before, after)
    assert calls


@pytest.mark.parametrize("first", (True, False))
def test_attn2_patches_and_output_patches_are_untouched(sd15, first):
    calls = {"in": 0, "out": 0}

    def attn2_patch(n, context, value, extra_options):
        calls["in"] += 1
        return n, context * 1.5, value

    def output_patch(n, extra_options):
        calls["out"] += 1
        return n * 0.5

    def patch(model):
        model = model.clone()
        model.set_model_attn2_patch(attn2_patch)
        model.set_model_attn2_output_patch(output_patch)
        return model

    out = tiny.sample(apply(patch(sd15)) if first else patch(apply(sd15)), steps=1)
    assert calls == {"in": 16, "out": 16}
    assert relative(out, tiny.sample(apply(sd15), steps=1)) > 1e-3
    assert relative(out, tiny.sample(patch(sd15), steps=1)) > 1e-3


@pytest.mark.parametrize("first", (True, False))
def test_an_attention_override_still_computes_the_dense_part(sd15, first):
    calls = []

    def override(func, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block"])
        return func(*args, **kwargs)

    def patch(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model

    out = tiny.sample(apply(patch(sd15)) if first else patch(apply(sd15)), steps=1)
    # self- and cross-attention of all sixteen blocks
    assert len(calls) == 32
    assert relative(out, tiny.sample(apply(sd15), steps=1)) < 1e-5


def couple_patch(contexts):
    """As Attention Couple packs do: the positive rows once per region, contexts repeated to a common length."""

    def patch(n, context, value, extra_options):
        rows, texts = [], []
        for i, kind in enumerate(extra_options["cond_or_uncond"]):
            own = [context[i : i + 1]] if kind == 1 else [context[i : i + 1], *contexts]
            texts += [text.repeat(1, 154 // text.shape[1], 1) for text in own]
            rows += [n[i : i + 1]] * len(own)
        return torch.cat(rows), torch.cat(texts), torch.cat(texts)

    return patch


def couple_output(n, extra_options):
    out, i = [], 0
    for kind in extra_options["cond_or_uncond"]:
        count = 1 if kind == 1 else 2
        out.append(n[i : i + count].mean(0, keepdim=True))
        i += count
    return torch.cat(out)


def test_an_enlarged_batch_with_repeated_contexts(sd15, monkeypatch):
    """Each region counts its own tokens once, though this pack repeats them itself: the same as with lengths known."""
    region = tiny.prompt(41, 77)[0][0]
    seen = []
    original = unet.pladis_attention

    def record(q, k, v, mask=None, **options):
        seen.append((q, k, v, mask, original(q, k, v, mask, **options)))
        return seen[-1][-1]

    monkeypatch.setattr(unet, "pladis_attention", record)
    model = sd15.clone()
    model.set_model_attn2_patch(couple_patch([region]))
    model.set_model_attn2_output_patch(couple_output)
    tiny.sample(apply(model), steps=1)
    assert len(seen) == 16
    for q, k, v, _, out in seen:
        assert q.shape[0] == 3
        expected = original(q, k[:, :, :77], v[:, :, :77], lam=2.0, alpha=1.5)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_an_enlarged_batch_is_refused_where_rows_cannot_be_told(sd15):
    model = sd15.clone()
    model.set_model_attn2_patch(couple_patch([tiny.prompt(41, 77)[0][0]]))
    model.set_model_attn2_output_patch(couple_output)
    with pytest.raises(RuntimeError, match="2 rows into the model, 3 in.*Set apply_to to both"):
        tiny.sample(apply(model, apply_to="positive"), steps=1)


def test_prompts_appended_inside_the_model_are_never_merged(sd15):
    """ComfyUI-NAG lengthens the batch of the text only; reshaping it onto the latents would mix prompts."""

    def append(n, context, value, extra_options):
        longer = torch.cat([context, context[:1]])
        return n, longer, longer

    model = sd15.clone()
    model.set_model_attn2_patch(append)
    with pytest.raises(RuntimeError, match="2 rows here and the text has 3.*NAG"):
        tiny.sample(apply(model), steps=1)


def test_repeat_mask_finds_the_smallest_period():
    own = torch.randn(1, 77, 16)
    other = torch.randn(1, 154, 16)
    key = torch.cat([own.repeat(1, 2, 1), other])
    mask = repeat_mask(key, key)
    assert (mask[0, 0, 0, :77] == 0).all() and (mask[0, 0, 0, 77:] == -torch.inf).all()
    assert (mask[1] == 0).all()
    # values that do not repeat (NegPip gives keys and values signs of their own) keep every token
    assert (repeat_mask(key[:1], other) == 0).all()


def tiled(apply_model, args):
    """As tiled diffusion packs do: every row as several tiles in one batch, tile by tile, options unchanged."""
    c = {key: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for key, v in args["c"].items()}
    x, t = args["input"], args["timestep"]
    return apply_model(torch.cat([x, x]), torch.cat([t, t]), **c)[: len(x)]


def one_by_one(apply_model, args):
    """A wrapper that runs each conditioning alone, under the options of the whole batch."""
    out = []
    for i in range(len(args["input"])):
        c = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in args["c"].items()}
        out.append(apply_model(args["input"][i : i + 1], args["timestep"][i : i + 1], **c))
    return torch.cat(out)


def without_uuids(apply_model, args):
    options = {k: v for k, v in args["c"]["transformer_options"].items() if k != "uuids"}
    return apply_model(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})


@pytest.mark.parametrize("wrapper", (tiled, one_by_one, without_uuids))
def test_a_function_wrapper_that_rearranges_rows_does_not_mix_prompts(sd15, wrapper):
    long = tiny.prompt(21, 154)
    expected = tiny.sample(apply(sd15), positive=long)
    model = sd15.clone()
    model.set_model_unet_function_wrapper(wrapper)
    assert relative(tiny.sample(apply(model), positive=long), expected) < 1e-6
    # whose a row is, its text tells
    for role in ("positive", "negative"):
        expected = tiny.sample(apply(sd15, apply_to=role), positive=long)
        assert relative(tiny.sample(apply(model, apply_to=role), positive=long), expected) < 1e-6


def test_rows_that_cannot_be_told_are_refused(sd15):
    """A wrapper that rearranges rows, and changes their text."""

    def changed(apply_model, args):
        c = {**args["c"], "c_crossattn": args["c"]["c_crossattn"] * 1.5}
        return one_by_one(apply_model, {**args, "c": c})

    model = sd15.clone()
    model.set_model_unet_function_wrapper(changed)
    tiny.sample(apply(model))
    with pytest.raises(RuntimeError, match="2 rows of ComfyUI's, 1 rows into the model, 1 in.*Set apply_to to both"):
        tiny.sample(apply(model, apply_to="positive"))


def test_weight_patches_in_both_orders(sd15):
    """LoRA: the text projections change, and PLADIS reads the changed ones."""
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"

    def patch(model):
        model = model.clone()
        shape = model.model_state_dict()[key].shape
        assert model.add_patches({key: ("diff", (torch.ones(shape),))}, 0.5)
        return model

    before, after = tiny.sample(apply(patch(sd15))), tiny.sample(patch(apply(sd15)))
    assert torch.equal(before, after)
    assert relative(before, tiny.sample(apply(sd15))) > 1e-6
    assert relative(before, tiny.sample(patch(sd15))) > 1e-3
