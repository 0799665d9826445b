"""`tokens`: which of a prompt's tokens are mixed, how they are told, and what a run with them computes."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.samplers
import comfy.sd1_clip
import comfy.sdxl_clip
import entmax
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock

import families
import tiny
from graph import run_node
from pladis_pack.nodes.hosting.looking import words
from pladis_pack.nodes.hosting.models import tokens
from pladis_pack.nodes.hosting.models.families import TABLE, UNSUPPORTED
from pladis_pack.nodes.hosting.roads import transformer
from tiny import apply

PAGE = Path(__file__).parents[2] / "docs" / "tokens.md"
MARKS = ("<!-- tokens: written by tests/host/test_tokens.py -->\n", "<!-- /tokens -->")
WITHOUT_START, WORDS = "without start token", "words only"


class Clip:
    """The host's tokenizer, and an encoder that gives every token of every text vectors of its own."""

    def __init__(self, tokenizer, width=tiny.TEXT_WIDTH):
        self.tokenizer, self.width = tokenizer, width

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, rows):
        rows = next(iter(rows.values()))
        ids = torch.tensor([token for chunk in rows for token, *_ in chunk])
        table = torch.randn(50_000, self.width, generator=torch.Generator().manual_seed(0))
        place = torch.randn(len(ids), self.width, generator=torch.Generator().manual_seed(1))
        # a causal encoder: every place knows what came before
        context = table[ids].cumsum(0) / torch.arange(1, len(ids) + 1)[:, None] ** 0.5 + place
        return [[context[None], {"pooled_output": torch.zeros(1, 1280)}]]


@pytest.fixture(scope="module")
def clip():
    return Clip(comfy.sd1_clip.SD1Tokenizer())


@pytest.fixture
def sd15():
    return tiny.patcher("SD15")


def encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def letters(count: str) -> str:
    """`s1 w2` is sww."""
    return "".join(part[0] * int(part[1:]) for part in count.split())


@pytest.mark.parametrize(("text", "expected"), [
    ("", "s1 o1 p75"),
    ("a red circle", "s1 w3 o1 p72"),
    ("a (red:1.3) circle", "s1 w3 o1 p72"),
    ("cat " * 75, "s1 w75 o1"),
    ("cat " * 80, "s1 w75 o1 s1 w5 o1 p70"),
])  # fmt: skip
@pytest.mark.parametrize("tokenizer", [comfy.sd1_clip.SD1Tokenizer, comfy.sdxl_clip.SDXLTokenizer])
def test_kinds_of_a_text(tokenizer, text, expected):
    clip = Clip(tokenizer())
    length = sum(len(chunk) for chunk in next(iter(clip.tokenize(text).values())))
    assert words.token_kinds(text, clip, length, True) == letters(expected)


def test_several_texts(clip):
    texts = [words.encoded_texts(text, clip, True) for text in ("a cat --- a dog", "a cat\n---\na dog")]
    assert [text.kinds for text in texts[0]] == [text.kinds for text in texts[1]]
    found = words.encoded_texts("a cat\n---\na red dog\n", clip, True)
    assert [text.kinds for text in found] == [letters(k) for k in ("s1 w2 o1 p73", "s1 w3 o1 p72", "s1 o1 p75")]


def mixed_equation(module, wanted):
    """CrossAttention.forward: softmax, and in place of the weights that `wanted` names their mass times the mix."""

    def forward(x, context=None, value=None, mask=None, transformer_options=None):
        q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
        q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT * module.dim_head**-0.5
        weights = scores.softmax(-1)
        for row in range(len(context)):
            places = torch.tensor([i for i, kind in enumerate(wanted(context[row])) if kind])
            if len(places):
                its = scores[row, ..., places]
                mix = 2 * entmax.entmax15(its, -1) - its.softmax(-1)
                weights[row, ..., places] = weights[row, ..., places].sum(-1, keepdim=True) * mix
        return module.to_out((weights @ v).transpose(1, 2).flatten(2))

    return forward


def written_in(wanted):
    """The network of `sd15` whose text attention is that equation."""
    model = tiny.patcher("SD15")
    for block in model.model.diffusion_model.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn2.forward = mixed_equation(block.attn2, wanted)
    return model


def test_without_start_token_is_the_equation(sd15):
    """Prompts of two chunks, with a start token each."""
    positive, negative = tiny.prompt(11, 154), tiny.prompt(12, 154)

    def wanted(row):
        return [place % 77 != 0 for place in range(len(row))]

    out = tiny.sample(apply(sd15, tokens=WITHOUT_START), positive, negative)
    expected = tiny.sample(written_in(wanted), positive, negative)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert (out - tiny.sample(apply(sd15), positive, negative)).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"norm_cap": 10.0}])
def test_words_only_is_the_equation(sd15, clip, options):
    """In one pass, and on top of the dense output."""
    texts = {"a red circle": range(1, 4), "blurry": range(1, 2), "": ()}
    positive, negative = encoded(clip, "a red circle"), encoded(clip, "blurry")

    def wanted(row):
        (text,) = (t for t in texts if torch.allclose(encoded(clip, t)[0][0][0].to(row), row))
        return [place in texts[text] for place in range(len(row))]

    model = apply(sd15, tokens=WORDS, clip=clip, prompt="a red circle\n---\nblurry", **options)
    expected = tiny.sample(written_in(wanted), positive, negative)
    torch.testing.assert_close(tiny.sample(model, positive, negative), expected, rtol=0, atol=1e-6)
    # the empty prompt is known without being named
    without = tiny.sample(model, positive, encoded(clip, ""))
    torch.testing.assert_close(without, tiny.sample(written_in(wanted), positive, encoded(clip, "")),
                               rtol=0, atol=1e-6)  # fmt: skip


def test_prompts_of_unequal_length(sd15):
    """The shorter, which the host repeats, counts once."""
    short, long = tiny.prompt(12, 77), tiny.prompt(11, 154)
    model = apply(sd15, tokens=WITHOUT_START)
    seen = {}

    def record(args):
        seen[len(seen)] = args["uncond_denoised"]
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(record, disable_cfg1_optimization=True)
    for positive in (short, long):
        tiny.sample(model, positive, short, steps=1)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)


def test_a_batch_of_two(sd15, clip):
    positive, negative = encoded(clip, "a red circle"), encoded(clip, "")
    model = apply(sd15, tokens=WORDS, clip=clip, prompt="a red circle")
    together = tiny.sample(model, positive, negative, batch=2)
    torch.testing.assert_close(together[:1], tiny.sample(model, positive, negative), rtol=0, atol=1e-6)


def test_beside_a_step_cache(sd15):
    def cached(model):
        return run_node("comfy_extras.nodes_easycache", "EasyCacheNode", model=model, reuse_threshold=3.0)

    expected = tiny.sample(cached(written_in(lambda row: [place % 77 != 0 for place in range(len(row))])), steps=10)
    for model in (cached(apply(sd15, tokens=WITHOUT_START)), apply(cached(sd15), tokens=WITHOUT_START)):
        ran = []
        hook = model.model.diffusion_model.time_embed.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        torch.testing.assert_close(tiny.sample(model, steps=10), expected, rtol=0, atol=1e-5)
        hook.remove()
        assert 0 < len(ran) < 10


def test_scale_0_is_off(sd15):
    assert torch.equal(tiny.sample(apply(sd15, scale=0.0, tokens=WITHOUT_START)), tiny.sample(sd15))


def test_a_prompt_that_is_not_named(sd15, clip):
    model = apply(sd15, tokens=WORDS, clip=clip, prompt="a red circle")
    positive, negative = encoded(clip, "a red circle"), encoded(clip, "blurry")
    with pytest.raises(RuntimeError, match="a line --- between"):
        tiny.sample(model, positive, negative)
    tiny.sample(apply(sd15, tokens=WORDS, clip=clip, prompt="a red circle", apply_to="positive"), positive, negative)


def test_words_only_needs_clip_for_a_unet(sd15):
    with pytest.raises(ValueError, match="clip and prompt"):
        apply(sd15, tokens=WORDS)


@pytest.fixture
def masks(monkeypatch):
    """The mix_mask of every call that the transformers' road makes."""
    seen = []

    def spy(function):
        def call(*args, mix_mask=None, **kwargs):
            seen.append(None if mix_mask is None else "".join("01"[int(mixed)] for mixed in mix_mask[0]))
            return function(*args, mix_mask=mix_mask, **kwargs)

        return call

    for name in ("pladis_attention", "pladis_correction", "joint_correction"):
        monkeypatch.setattr(transformer, name, spy(getattr(transformer, name)))
    return seen


def zeros_behind(prompt, words_):
    context, options = prompt[0]
    return [[torch.cat((context[:, :words_], context[:, words_:] * 0), 1), options]]


@pytest.mark.parametrize(("name", "choice", "given", "expected"), [
    ("SD3", WITHOUT_START, 7, "0111111"),
    ("Lumina 2", WITHOUT_START, 7, "0111111"),
    ("Wan 2.1 T2V", WORDS, 4, "1111000"),
    ("AuraFlow", WORDS, 4, "1111000"),
    ("Cosmos 1", WORDS, 4, "1111000"),
    # 7 tokens, and learned pads behind them to a multiple of 4, as this small network has it
    ("Z-Image", WORDS, 7, None),
])  # fmt: skip
def test_transformers(masks, name, choice, given, expected):
    family = families.BY_NAME[name]
    model = families.patcher(family)
    positive, negative = (zeros_behind(families.prompt(family, seed), given) for seed in (11, 12))
    out = families.sample(apply(model, tokens=choice), family, positive, negative)
    if expected is None:
        multiple = model.model.diffusion_model.pad_tokens_multiple
        expected = "1" * 7 + "0" * (-7 % multiple)
        assert "0" in expected
    assert masks and set(masks) == {expected}
    assert (out - families.sample(apply(model), family, positive, negative)).abs().max() > 1e-6


@pytest.mark.parametrize(("name", "choice", "message"), [
    ("Flux.1", WITHOUT_START, "no start token"),
    ("Flux.1", WORDS, None),
    ("Wan 2.1 T2V", WITHOUT_START, "no start token"),
    ("Qwen-Image", WORDS, "neither a start token nor padding"),
    ("Z-Image", WITHOUT_START, "no start token"),
    ("CogVideoX", WORDS, "clip and prompt"),
    ("HunyuanDiT", WORDS, "cannot be told"),
])  # fmt: skip
def test_a_choice_without_meaning(name, choice, message):
    family = families.BY_NAME[name]
    model = families.patcher(family)
    if message is None:
        # whether its padding is zeros (Flux.2), the conditioning says in the run
        with pytest.raises(RuntimeError, match="a prompt is none of the texts"):
            families.sample(apply(model, tokens=choice), family)
    else:
        with pytest.raises(ValueError, match=message):
            apply(model, tokens=choice)


def test_left_padding_of_zeros(masks):
    """Flux.2's context is padded with zeros on the left, which no text that was encoded has."""
    family = families.BY_NAME["Flux.2"]
    model = families.patcher(family)
    families.sample(apply(model, tokens=WORDS), family)
    (mask,) = set(masks)
    assert mask.startswith("0") and mask.endswith("1" * 7)


def table() -> str:
    rows = ["| Family | Start token | Padding that takes part is told by |", "|---|---|---|"]
    for family in TABLE:
        if family.kind != UNSUPPORTED:
            start = family.start if isinstance(family.start, str) else "the first token (Z-Image: none)"
            rows.append(f"| {family.name} | {start or 'none'} | {family.padding or 'none takes part'} |")
    return "".join(f"{row}\n" for row in rows)


def test_the_page_has_the_table():
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    written, end, after = rest.partition(MARKS[1])
    assert mark and end
    if "PLADIS_WRITE_TABLE" in os.environ:
        PAGE.write_text(before + mark + table() + end + after, encoding="utf-8")
    assert written == table(), "run this test once with PLADIS_WRITE_TABLE=1"


def test_the_receipt_says_it(sd15, caplog):
    with caplog.at_level("INFO"):
        tiny.sample(apply(sd15, tokens=WITHOUT_START))
    assert "alpha 1.5, without start token" in caplog.text


def test_kinds_are_told_once_for_each_context(sd15, monkeypatch):
    calls = []
    read = tokens._read
    monkeypatch.setattr(tokens, "_read", lambda *args: calls.append(1) or read(*args))
    positive, negative = tiny.prompt(21), tiny.prompt(22)
    for _ in range(2):
        tiny.sample(apply(sd15, tokens=WITHOUT_START), positive, negative, steps=4)
    assert len(calls) == 2


def test_a_gradient_after_a_run_in_inference_mode(sd15):
    """Masks are kept from run to run, and autograd refuses tensors of inference mode."""
    tokens.mixed_keys.cache_clear()
    model = apply(sd15, tokens=WITHOUT_START)
    with torch.inference_mode():
        tiny.sample(model)
    weights = sd15.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_k.weight
    weights.requires_grad_(True)

    class Gradient(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            with torch.enable_grad():
                denoised = model_wrap(noise, sigmas[:1], **extra_args)
                denoised.square().mean().backward()
            return denoised.detach()

        def max_denoise(self, *args):
            return False

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny.POSITIVE, tiny.NEGATIVE)
    guider.set_cfg(4.0)
    noise = torch.randn(1, 4, 8, 8)
    guider.sample(noise, noise * 0, Gradient(), torch.tensor([0.7, 0.0]), disable_pbar=True, seed=1)
    assert weights.grad.isfinite().all() and weights.grad.abs().max() > 0


@pytest.mark.parametrize("prompt", ("", " \n"))
def test_words_only_with_a_clip_and_no_text_is_refused_at_the_node(prompt):
    with pytest.raises(ValueError, match="words only needs clip and prompt"):
        apply(tiny.patcher("SD15"), tokens=WORDS, clip=object(), prompt=prompt)
