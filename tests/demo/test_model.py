"""The shipped weights, the sampler, the attention processor, and the one-command run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import __main__ as program
from demo import config
from demo.attention import SoftmaxAttention, TextAttention
from demo.oracle import read, score
from demo.pipeline import VARIANTS, Pipeline
from demo.sampling import euler, guided, noise, sigmas
from demo.scenes import random_prompts
from pladis_core import pladis_attention

ROOT = Path(__file__).parents[2]
FILES = ("autoencoder", "text_encoder", "unet", "unet_few_step")


@pytest.fixture(scope="module")
def standard() -> Pipeline:
    return Pipeline()


@pytest.mark.parametrize("name", FILES)
def test_weights_are_small_and_finite(name):
    file = config.WEIGHTS / f"{name}.safetensors"
    assert file.stat().st_size <= 8_000_000
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        content = np.frombuffer(stream.read(), dtype=np.float16)
    assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"F16"}
    assert np.isfinite(content).all()


def test_the_model_card_names_every_file():
    card = (config.WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert all(f"{name}.safetensors" in card for name in FILES)


# held-out captions that nothing was chosen on; the evidence page has the figures for a thousand of them
@pytest.mark.parametrize(("variant", "least"), [("standard", 0.8), ("few-step", 0.7)])
def test_the_model_draws_what_held_out_captions_say(variant, least):
    prompts = random_prompts(64, "report", seed=11)
    pipeline = Pipeline(variant)
    pictures = pipeline.decode(pipeline.latents([prompt.text for prompt in prompts], noise(12, len(prompts))))
    results = [score(prompt, read(picture)) for prompt, picture in zip(prompts, pictures, strict=True)]
    assert np.mean([result.recall for result in results]) > least


def test_pictures_have_no_checkerboard(standard):
    """Neighbouring pixels inside a shape or on the ground differ no more than in drawn scenes, edges aside."""
    prompts = random_prompts(16, "report", seed=13)
    pictures = standard.decode(standard.latents([p.text for p in prompts], noise(14, 16))).astype(float)
    alternating = np.indices((2, 2)).sum(0) % 2 * 2 - 1
    blocks = pictures.reshape(16, 32, 2, 32, 2, 3)
    pattern = np.abs((blocks * alternating[None, None, :, None, :, None]).sum((2, 4)) / 4)
    # a checkerboard would be everywhere; at corners of shapes the pattern is there in true pictures too
    assert np.median(pattern) < 1.0 and np.quantile(pattern, 0.9) < 3.0


@pytest.mark.parametrize("layers", ["all", "down + up"])
@pytest.mark.parametrize("control", [{"lam": 2.0}, {"temperature": 2.0}])
def test_only_the_text_layers_that_are_chosen_change(standard, layers, control):
    text = torch.randn(2, 77, 96)
    attentions = {
        name: (module, torch.randn(2, 64, module.to_q.in_features))
        for name, module in standard.unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    }

    def outputs():
        return {n: module(hidden, text if "attn2" in n else None) for n, (module, hidden) in attentions.items()}

    before = outputs()
    with TextAttention(**control, layers=layers).on(standard.unet):
        inside = outputs()
    changed = {name for name in before if not torch.allclose(before[name], inside[name])}
    assert sum("attn2" in name for name in before) == 6
    assert changed == {n for n in before if "attn2" in n and (layers == "all" or not n.startswith("mid_block"))}
    assert all(torch.equal(out, before[name]) for name, out in outputs().items())


def layer_of(pipeline):
    return pipeline.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2


def test_pladis_is_the_equation_on_its_heads(standard):
    attn = layer_of(standard)
    hidden, text = torch.randn(2, 64, 64), torch.randn(2, 77, 96)
    heads = [
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
    ]
    mixed = pladis_attention(*heads, lam=1.5, alpha=1.25, backend="reference").transpose(1, 2).flatten(-2)
    with TextAttention(1.5, 1.25).on(standard.unet):
        torch.testing.assert_close(attn(hidden, text), attn.to_out[0](mixed), atol=1e-5, rtol=1e-5)


def test_words_only_leaves_other_tokens_their_softmax_weights(standard):
    attn = layer_of(standard)
    hidden, text = torch.randn(2, 64, 64), torch.randn(2, 77, 96)
    mixed = torch.zeros(2, 77, dtype=torch.bool)
    mixed[0, 1:4] = True
    heads = [
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
    ]
    expected = pladis_attention(*heads, mix_mask=mixed, backend="reference").transpose(1, 2).flatten(-2)
    dense = attn(hidden, text)
    with TextAttention(2.0, tokens="words only").on(standard.unet, words=[3, 0]):
        out = attn(hidden, text)
    torch.testing.assert_close(out, attn.to_out[0](expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], dense[1], atol=1e-5, rtol=1e-5)


def test_a_temperature_scales_the_scores(standard):
    attn = layer_of(standard)
    hidden, text = torch.randn(2, 64, 64), torch.randn(2, 77, 96)
    with TextAttention(temperature=2.0).on(standard.unet):
        warm = attn(hidden, text)
    before = attn.to_q.weight.clone()
    attn.to_q.weight *= 2
    torch.testing.assert_close(attn(hidden, text), warm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(SoftmaxAttention()(attn, hidden, text), warm, atol=1e-5, rtol=1e-5)
    attn.to_q.weight.copy_(before)


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="'middle'"):
        TextAttention(layers="middle")
    with pytest.raises(ValueError, match="'end token'"):
        TextAttention(tokens="end token")
    with pytest.raises(ValueError, match="temperature 2"):
        TextAttention(1.0, temperature=2.0)


def test_euler_follows_a_known_flow():
    """Along a straight line every number of steps ends at the same point."""
    start, end = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    calls = []
    for steps in (1, 7):
        out = euler(lambda x, sigma: start - end, start, steps, callback=lambda: calls.append(1))
        torch.testing.assert_close(out, end, atol=1e-5, rtol=1e-5)
    assert len(calls) == 8


def test_the_schedule_spends_its_steps_near_noise():
    levels = sigmas(10)
    assert levels[0] == 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    assert (levels > 0.5).sum() > 5 if config.SHIFT > 1 else (levels > 0.5).sum() == 5


@pytest.mark.parametrize(("cfg", "rows"), [(1.0, 3), (3.0, 6)])
def test_guidance_1_evaluates_the_caption_alone(cfg, rows):
    seen = []

    class Network:
        def __call__(self, latents, times, states):
            seen.append(len(latents))
            self.sample = states[:, :1, :1, None].expand_as(latents)
            return self

    text, empty = torch.full((3, 77, 96), 2.0), torch.full((3, 77, 96), 1.0)
    out = guided(Network(), text, empty, cfg)(torch.zeros(3, 4, 16, 16), torch.tensor(0.5))
    assert seen == [rows]
    torch.testing.assert_close(out, torch.full_like(out, 1 + cfg))


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "demo", *arguments, "--out", str(tmp_path / "out.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_one_command_draws_a_grid_and_says_what_it_shows(tmp_path):
    start = time.monotonic()
    result = run(tmp_path)
    took = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    assert took < 60
    for label in ("softmax:", "lambda 0.5:", "lambda 1:", "lambda 2:", "words only:"):
        # three ways of sampling, three captions
        assert result.stdout.count(label) == 9
    for way in ("no guidance", "CFG 3", "Few-step model, 4 steps"):
        assert way in result.stdout
    # the first held-out captions, whatever comes out
    assert all(prompt.text in result.stdout for prompt in random_prompts(3, "report", seed=1))
    # progress, up to its end
    assert "220/220" in result.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 600 and picture.height > 1500
        assert np.asarray(picture.convert("RGB")).std() > 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_are_taken(tmp_path, variant):
    options = ("--variant", variant, "--lambdas", "0", "1.5", "--count", "2", "--steps", "2", "--cfg", "2")
    result = run(tmp_path, "a green bar", *options)
    assert result.returncode == 0, result.stderr
    assert "6/6" in result.stderr and "lambda 1.5:" in result.stdout and "lambda 2:" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a red elephant"], "does not know 'elephant'. It knows these words: a, above"),
        (["a red circle", "--alpha", "3"], "--alpha must be from 1 to 2, not 3"),
        (["a red circle", "--count", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_same_seed_same_picture(standard):
    caption = ["a purple diamond"]
    one, two = (standard.latents(caption, noise(5, 1), steps=3) for _ in range(2))
    assert torch.equal(one, two)
