"""PLADIS Attention Map: the maps are the layers' weights, words are found, every family has maps."""

from __future__ import annotations

import re
from types import SimpleNamespace

import entmax
import pytest
import torch

import families
import nodes as host_nodes
import tiny
from pladis_pack.nodes import pictures
from pladis_pack.nodes.attention_map import FIGURES, PLADISAttentionMap, draw_words, masks
from pladis_pack.nodes.hosting import Settings, find_target
from pladis_pack.nodes.hosting.looking.attention_map import token_grid, watch_attention
from pladis_pack.nodes.hosting.looking.words import Word, find_words
from tiny import apply

DEFAULTS = {
    "words": "#1, #3-4", "percent": 0.3, "scale": 2.0, "alpha": 1.5, "layers": "all", "blocks": "", "seed": 0,
}  # fmt: skip


def run(model, positive=tiny.POSITIVE, latent=None, **options):
    latent = latent or {"samples": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))}
    return PLADISAttentionMap.execute(model, positive, latent, **{**DEFAULTS, **options}).result[:3]


def test_the_maps_are_the_weights_of_the_layer():
    model = tiny.patcher("SD15")
    (layer,) = [layer for layer in find_target(model).layers if layer.key == ("input", 1, 0)]
    latent = {"samples": torch.randn(1, 4, 8, 8)}
    words = [Word("one", [1]), Word("two", [3, 4])]
    settings = Settings(frozenset(find_target(model).layers), 3.0, 1.5)
    seen = watch_attention(
        model, tiny.POSITIVE, latent, 0.3, 0, settings, find_target(model), words, frozenset([layer])
    )

    attention = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2
    inputs = {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: inputs.update({name: out}))
        for name, module in (("q", attention.to_q), ("k", attention.to_k))
    ]
    watch_attention(
        model, tiny.POSITIVE, latent, 0.3, 0, settings, find_target(model), words, frozenset([layer])
    )
    for handle in handles:
        handle.remove()
    q, k = (inputs[name].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for name in "qk")
    scores = q @ k.mT * attention.dim_head**-0.5
    dense, sparse = scores.softmax(-1), entmax.entmax15(scores, -1)
    for kind, weights in zip(seen.maps(), (dense, sparse, 3 * sparse - 2 * dense), strict=True):
        average = weights.mean((0, 1))
        torch.testing.assert_close(kind[0], average[:, 1].unflatten(0, (8, 8)).float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(kind[1], average[:, 3:5].sum(-1).unflatten(0, (8, 8)).float(), atol=1e-6, rtol=0)
    (report,) = seen.reports[layer]
    assert report.support == pytest.approx(float((sparse > 0).sum(-1).double().mean()))


@pytest.mark.parametrize("name", families.BY_NAME)
def test_every_family_has_maps(name):
    family = families.BY_NAME[name]
    try:
        model = families.patcher(family)
    except (AttributeError, ImportError) as error:
        pytest.skip(f"this ComfyUI lacks it: {error}")
    samples = families.noise(family, 1, 3)
    maps, report, bars = run(model, families.prompt(family, 11), {"samples": samples}, words="#1, #2-3")
    assert maps.shape[0] == 6
    assert maps.isfinite().all()
    # more than the frame is drawn: places differ in at least one map
    assert max(float(m[20:-40].std()) for m in maps) > 0.01
    figures = [line.split() for line in report.splitlines() if re.match(r"[dmub]\d+\.\d+", line)]
    # one step: of Prism's two experts the first
    target = find_target(model)
    first = {layer for layer in target.layers if target.expert(layer) in (None, 0)}
    # in two tables
    assert len(figures) == 2 * len(target.expected(set(target.layers), first))
    assert bars.shape[-1] == 3


def test_a_picture_may_shine_through_and_layers_be_chosen():
    model = tiny.patcher("SD15")
    image = torch.rand(1, 300, 400, 3)
    plain, _, _ = run(model)
    over, report, _ = run(model, image=image, layers="custom", blocks="d0,m0")
    assert plain.shape[1:] == (256 + 60, 256, 3)
    assert over.shape[1:] == (300 + 60, 400, 3)
    assert [line.split()[0] for line in report.splitlines() if re.match(r"[dmub]\d", line)] == ["d0.0", "m0.0"] * 2


def test_it_leaves_the_model_alone_and_replaces_its_settings():
    model = apply(tiny.patcher("SD15"), scale=0.5)
    expected = tiny.sample(model)
    first = run(model)
    assert torch.equal(tiny.sample(model), expected)
    assert torch.equal(run(tiny.patcher("SD15"))[0], first[0])


def test_scale_0_is_watched_too():
    _, report, _ = run(tiny.patcher("SD15"), scale=0.0)
    pruned, support, negative, ratio = (
        float(figure) for line in report.splitlines() if line.startswith("mean") for figure in line.split()[1:]
    )
    assert pruned > 0.1 and support < 77
    assert negative == 0.0
    assert ratio == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("percent", (0.0, 1.0))
def test_both_ends_of_the_schedule(percent):
    assert run(tiny.patcher("SD15"), percent=percent)[0].isfinite().all()
    family = families.BY_NAME["Flux.1"]
    latent = {"samples": families.noise(family, 1, 3)}
    assert run(families.patcher(family), families.prompt(family, 11), latent, percent=percent)[0].isfinite().all()


@pytest.mark.parametrize(
    ("count", "latent", "grid"),
    (
        (64, (8, 8), (1, 8, 8)),
        (16, (8, 8), (1, 4, 4)),
        (20, (9, 8), (1, 5, 4)),
        (48, (3, 8, 8), (3, 4, 4)),
        (64, (1, 16, 16), (1, 8, 8)),
        (50, (50,), (1, 1, 50)),
        (48, (2, 8, 8), (2, 4, 4)),
        (51, (50,), (1, 1, 50)),
        (12, (8, 8), None),
    ),
)
def test_the_grid_of_a_transformers_tokens(count, latent, grid):
    assert token_grid(count, latent) == grid


class FakeClip:
    """Splits words into tokens of up to four letters; `lay_out` puts them into rows as a model's tokenizer does."""

    def __init__(self, **encoders):
        self.encoders = encoders

    def tokenize(self, text):
        pieces = [hash(piece) % 10**6 + 100 for piece in re.findall(r" ?\w{1,4}", re.sub(r"[():.\d]", "", text))]
        plain = [hash(piece) % 10**6 + 100 for piece in re.findall(r"\w{1,4}", re.sub(r"[():.\d]", "", text))]
        return {
            key: [[(token, 1.0) for token in lay_out(pieces if key == "qwen" else plain)]]
            for key, lay_out in self.encoders.items()
        }


def clip_l(pieces):
    return [1, *pieces, *[2] * (77 - 1 - len(pieces))]


def clip_g(pieces):
    return [1, *pieces, 2, *[0] * (77 - 2 - len(pieces))]


def t5(length):
    return lambda pieces: [*pieces, 1, *[0] * (length - 1 - len(pieces))]


def template(pieces):
    return [7, 8, 9, 10, *pieces, 11, 12]


PROMPT = "a (red:1.3) umbrella and a cat"


@pytest.mark.parametrize(
    ("clip", "tokens", "umbrella"),
    (
        (FakeClip(l=clip_l), 77, [3, 4]),
        (FakeClip(l=clip_l, g=clip_g), 77, [3, 4]),
        (FakeClip(t5xxl=t5(256), l=clip_l), 256, [2, 3]),
        (FakeClip(l=clip_l, g=clip_g, t5xxl=t5(77)), 154, [3, 4, 79, 80]),
        (FakeClip(qwen=template), 9, [2, 3]),
    ),
    ids=("SD1.5", "SDXL", "Flux.1", "SD3", "a template in front"),
)
def test_words_of_several_tokens_are_found(clip, tokens, umbrella):
    (word,) = find_words("umbrella", PROMPT, clip, tokens)
    assert word.positions == umbrella
    two, cat = find_words("red umbrella\n cat", PROMPT, clip, tokens)
    assert two.positions == sorted({p - 1 for p in umbrella} | set(umbrella))
    assert len(cat.positions) == len(umbrella) // 2


def test_every_word_of_the_prompt_where_none_is_named():
    words = find_words("", PROMPT, FakeClip(l=clip_l), 77)
    assert [word.label for word in words] == ["a", "red", "umbrella", "and", "cat"]
    assert words[0].positions == [1, 6]


def test_positions_need_no_clip():
    assert find_words("#0, #5-7", "", None, 77) == [Word("#0", [0]), Word("#5-7", [5, 6, 7])]


@pytest.mark.parametrize(
    ("entries", "prompt", "clip", "message"),
    (
        ("dog", PROMPT, FakeClip(l=clip_l), "'dog' is not in the prompt"),
        ("cat", PROMPT, None, "connect clip"),
        ("#77", "", None, "#0 to #76"),
        ("#4-2", "", None, "'#4-2'"),
        ("", "", None, "words is empty"),
    ),
)
def test_what_cannot_be_found_is_named(entries, prompt, clip, message):
    with pytest.raises(ValueError, match=message):
        find_words(entries, prompt, clip, 77)


def test_with_the_demo_models_own_clip():
    from pladis_pack.nodes.demo_checkpoint import PLADISDemoCheckpoint

    model, clip, vae = PLADISDemoCheckpoint.execute("standard").result
    text = "a red circle left of a blue square"
    (positive,) = host_nodes.CLIPTextEncode().encode(clip, text)
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    maps, report, _ = run(model, positive, latent, words="red circle, blue", clip=clip, prompt=text)
    assert maps.shape[0] == 6
    assert "red circle: tokens #2, #3" in report
    assert "blue: tokens #7" in report
    with pytest.raises(ValueError, match="'triangle'"):
        run(model, positive, latent, words="triangle", clip=clip, prompt=text)


def test_a_prompt_that_was_not_encoded_is_said(caplog):
    from pladis_pack.nodes.demo_checkpoint import PLADISDemoCheckpoint

    model, clip, vae = PLADISDemoCheckpoint.execute("standard").result
    text, other = "a red circle left of a blue square", "a blue circle and a red square"
    (positive,) = host_nodes.CLIPTextEncode().encode(clip, text)
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    said = {}
    for prompt in (text, other):
        with caplog.at_level("WARNING"):
            said[prompt] = run(model, positive, latent, words="red", clip=clip, prompt=prompt)[1].splitlines()[2]
    assert "not what was encoded" not in said.pop(text)
    assert "another text" in said.pop(other)
    assert len([message for message in caplog.messages if "not what was encoded" in message]) == 1
    message = "'red' is not in the prompt.*it gives 154 tokens, and the conditioning has 77"
    with pytest.raises(ValueError, match=message):
        run(model, positive, latent, words="red", clip=clip, prompt=" and ".join([text] * 9))


def test_text_report_and_bars_name_the_same_figures():
    _, report, _ = run(tiny.patcher("SD15"))
    heads, _ = (line for line in report.splitlines() if line.startswith("layer"))
    assert re.split(r"\s{2,}", heads)[1:] == [head for head, _ in FIGURES.values()]


def test_a_word_of_letters_that_no_font_has_is_told_by_its_tokens(monkeypatch):
    monkeypatch.setattr(pictures, "FONTS", ())
    pictures._font_for.cache_clear()
    maps = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    unread, told, read = (draw_words(maps, [Word(label, [3, 4])], None) for label in ("红色", "#3, #4", "red"))
    pictures._font_for.cache_clear()
    assert torch.equal(unread, told) and not torch.equal(unread, read)
    assert pictures.drawable("red") and not pictures.drawable("\U0010ffff")


def test_a_long_prompt_is_tokenized_once():
    calls = []

    def tokenize(text):
        calls.append(text)
        return {"l": [[(hash(word) % 1000, 1.0) for word in text.split()]]}

    prompt = " ".join(f"word{i}" for i in range(1000))
    found = find_words("", prompt, SimpleNamespace(tokenize=tokenize), 1000)
    assert len(found) == 32 and calls.count(prompt) == 1 and len(calls) < 4 * 32 + 32
    # a pattern that looks back again and again would take minutes
    with pytest.raises(ValueError, match="no word of the prompt"):
        find_words("", "<" * 50_000, SimpleNamespace(tokenize=tokenize), 1000)


def test_a_real_tokenizer_with_weights(tmp_path):
    """The host's own CLIP-L tokenizer, whose vocabulary ships with it."""
    import comfy.sd1_clip

    clip = SimpleNamespace(tokenize=comfy.sd1_clip.SD1Tokenizer().tokenize_with_weights)
    prompt = "photo of a (crimson:1.2) hummingbird, best quality"
    crimson, bird = find_words("crimson, hummingbird", prompt, clip, 77)
    assert crimson.positions == [4]
    assert bird.positions[0] == 5
    (long,) = find_words("quality", "word " * 90 + "quality", clip, 154)
    assert long.positions and long.positions[0] > 77
    (ball,) = find_words("ball", "a blue pokeball and a ball", clip, 77)
    assert ball.positions == [7]
    twice, red = find_words("ball, red", "a (red: 1.3) ball, \"red\" [ball]", clip, 77)
    assert len(twice.positions) == len(red.positions) == 2
    labels = [word.label for word in find_words("", "(red:-0.5) cat <lora:foo:0.8>, 'x'", clip, 77)]
    assert labels[:2] == ["red", "cat"]


def test_a_t5_tokenizer_and_punctuation():
    import comfy.text_encoders.flux

    clip = SimpleNamespace(tokenize=comfy.text_encoders.flux.FluxTokenizer().tokenize_with_weights)
    for prompt, word in (
        ('a neon sign saying "HELLO" in the rain', "HELLO"),
        ("a red/blue ball", "blue"),
        ("[[dog]] and a cat", "dog"),
    ):
        (found,) = find_words(word, prompt, clip, 256)
        assert found.positions, prompt
        assert find_words("", prompt, clip, 256)


def test_only_the_first_of_several_conditionings_counts_and_on_the_whole_picture():
    model, other = tiny.patcher("SD15"), tiny.prompt(13, tokens=154)
    expected = run(model)[0]
    assert torch.equal(run(model, [*tiny.POSITIVE, *other])[0], expected)
    context, options = tiny.POSITIVE[0]
    for extra in ({"area": (4, 4, 4, 4)}, {"start_percent": 0.5, "end_percent": 1.0}, {"mask": torch.ones(1, 8, 8)}):
        assert torch.equal(run(model, [[context, {**options, **extra}]])[0], expected)


def test_guidance_that_evaluates_the_model_again_is_left_out():
    import comfy_extras.nodes_sag

    model = tiny.patcher("SD15")
    guided = comfy_extras.nodes_sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0]
    assert torch.equal(run(guided)[0], run(model)[0])


def test_many_words_and_large_latents_stay_small():
    maps, _, _ = run(tiny.patcher("SD15"), latent={"samples": torch.randn(1, 4, 8, 100)}, words="#1")
    assert max(maps.shape[1:3]) <= 512 + 60
    with pytest.raises(ValueError, match="more than 32"):
        run(tiny.patcher("SD15"), words=",".join(f"#{i}" for i in range(1, 40)))


def test_a_mask_for_each_word():
    maps = torch.rand(3, 2, 8, 8)
    maps[1, 0, :4], maps[1, 1] = 0.0, 0.25
    found = masks(maps, None)
    torch.testing.assert_close(found[0], maps[1, 0] / maps[1, 0].max())
    assert found.shape == (2, 8, 8) and (found[0, :4] == 0).all() and (found[1] == 1).all()
    assert masks(maps, torch.rand(1, 48, 64, 3)).shape == (2, 48, 64)
    latent = {"samples": torch.rand(1, 4, 8, 8)}
    found = PLADISAttentionMap.execute(tiny.patcher("SD15"), tiny.POSITIVE, latent, **{**DEFAULTS, "words": "#1, #2-3"})
    assert found.result[3].shape == (2, 8, 8)


def test_nan_is_drawn():
    latent = {"samples": torch.full((1, 4, 8, 8), torch.nan)}
    assert run(tiny.patcher("SD15"), latent=latent)[0].isfinite().all()
