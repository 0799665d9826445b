"""The report of PLADIS Attention Map: the sentence on top for models of every regime, and the figures behind it."""

from __future__ import annotations

import re

import comfy.sd1_clip
import pytest
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from test_tokens import Clip, encoded

import families
import tiny
from pladis_core import LayerReport, attention_maps, pladis_weights, sharpening_factor
from pladis_pack.nodes.attention_map import PLADISAttentionMap
from pladis_pack.nodes.hosting.looking.regime import parts_of, regime_table, sentence


def report_of(model, positive=tiny.POSITIVE, latent=None, **options) -> str:
    latent = {"samples": torch.randn(1, 4, 16, 16)} if latent is None else latent
    given = {"words": "#1", "percent": 0.3, "scale": 2.0, "alpha": 1.5, "layers": "all", "blocks": "", "seed": 0}
    return PLADISAttentionMap.execute(model, positive, latent, **{**given, **options}).result[1]


def attentions(model):
    return [m.attn2 for m in model.model.diffusion_model.modules() if isinstance(m, BasicTransformerBlock)]


def with_scores_times(factor):
    model = tiny.patcher("SD15")
    for attention in attentions(model):
        attention.to_q.weight.data *= factor
    return model


def with_a_sink():
    """Every query likes one direction, which the start token alone has."""
    model = tiny.patcher("SD15")
    for attention in attentions(model):
        attention.to_q.bias = torch.nn.Parameter(torch.ones_like(attention.to_q.weight[:, 0]))
        attention.to_k.weight.data[:, 0] = 3.0
    return model


def start_apart(prompt):
    """The first token alone has the context's first feature."""
    context = prompt[0][0].clone()
    context[..., 0] = 0.0
    context[:, 0, 0] = 1.0
    return [[context, prompt[0][1]]]


def test_a_peaky_model():
    assert report_of(with_scores_times(20.0)).startswith("Peaky: attention spreads over 1")


def test_a_diffuse_model():
    first = report_of(with_scores_times(0.01)).splitlines()[0]
    assert first.startswith("Diffuse: attention spreads over 77 tokens, so scale 2 makes it about 17 times as steep")
    # (5 - 1) / (sqrt(77) - 1)
    assert "try scale 0.51" in first


def test_a_model_with_a_sink():
    first = report_of(with_a_sink(), start_apart(tiny.POSITIVE)).splitlines()[0]
    assert re.match(r"Sink: the start token holds [789]\d% of the text's attention\. Compare tokens: words only", first)


def test_with_clip_and_prompt_the_words_are_told():
    clip = Clip(comfy.sd1_clip.SD1Tokenizer())
    text = "a red circle"
    report = report_of(with_a_sink(), start_apart(encoded(clip, text)), words="red", clip=clip, prompt=text)
    # the start token's feature is changed: no text that was encoded
    assert "prompt is not what was encoded" in report
    report = report_of(with_scores_times(0.01), encoded(clip, text), words="red", clip=clip, prompt=text)
    assert report.startswith("Padding: end token and padding hold 95% of the text's attention")
    heads = next(line for line in report.splitlines() if "sharpening" in line).split()
    assert heads == ["layer", "effective", "sharpening", "start", "words", "padding", "words", "below", "0"]
    figures = [line for line in report.splitlines() if line.startswith("d0.0")][-1]
    assert re.search(r"0\.01 > -?0\.0\d +0\.04 > -?0\.\d\d +0\.95 > [01]\.\d\d", figures)


def test_512_tokens_of_padding():
    family = families.BY_NAME["Wan 2.1 T2V"]
    model = families.patcher(family)
    context, options = families.prompt(family, 11, 512)[0]
    context[:, 7:] = 0.0
    first = report_of(model, [[context, options]], {"samples": families.noise(family)}).splitlines()[0]
    assert re.match(r"Padding: end token and padding hold \d\d% of the text's attention", first)
    beyond = r"( \(what goes beyond 100% is taken below zero elsewhere\))?"
    assert re.search(rf"takes the words' share from \d+% to -?\d+%{beyond}\. Try tokens: words only", first)
    # the regime is the model's, not the scale's
    weak = report_of(model, [[context, options]], {"samples": families.noise(family)}, scale=0.1)
    assert weak.startswith("Padding: ")


def test_without_clip_padding_is_not_guessed():
    lines = report_of(tiny.patcher("SD15")).splitlines()
    heads = next(line for line in lines if "sharpening" in line)
    assert heads.split()[:4] == ["layer", "effective", "sharpening", "start"]
    assert "padding" not in heads


def test_parts():
    assert parts_of(("swwop",)) == {"start": [0], "words": [1, 2], "padding": [3, 4]}
    assert parts_of(("s????",)) == {"start": [0]}
    assert parts_of(("wwp", "wwp")) == {"words": [0, 1], "padding": [2]}
    assert parts_of(("wwp", "wpp")) == parts_of(()) == {}


def test_figures_are_what_they_say():
    query, key, value = torch.randn(2, 2, 9, 8) * 2, torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    _, report = attention_maps(query, key, value, [[0]], lam=3.0, parts={"start": [0], "words": [1, 2, 3]})
    dense = (query @ key.mT * 8**-0.5).softmax(-1)
    effective = (-(dense * dense.log()).sum(-1)).exp()
    assert report.effective == pytest.approx(float(effective.mean()), rel=1e-5)
    assert report.sharpening == pytest.approx(float((1 + 3 * (effective**0.5 - 1)).mean()), rel=1e-5)
    assert report.masses["start"][0] == pytest.approx(float(dense[..., 0].mean()), rel=1e-5)
    assert report.masses["words"][0] == pytest.approx(float(dense[..., 1:4].sum(-1).mean()), rel=1e-5)
    assert 0.0 < report.flipped < 1.0


def test_the_sharpening_is_that_of_the_mix():
    """By finite differences near even attention over n keys."""
    for keys in (24, 77, 512):
        step = torch.zeros(keys, dtype=torch.float64)
        step[0] = 1e-6
        slopes = [float(pladis_weights(step, lam)[0] - 1 / keys) for lam in (0.0, 2.0)]
        assert slopes[1] / slopes[0] == pytest.approx(sharpening_factor(keys, 2.0, 1.5), rel=1e-3)


def test_what_stands_between_says_so():
    report = LayerReport(0.5, 5, 0.1, 1.0, 4.0, 3.0)
    assert sentence([report], 2.0, 1.5).startswith("In between: attention spreads over 4 tokens")
    assert regime_table(["b0"], [report])[1].split() == ["b0", "4", "3", "-"]


def test_where_nothing_is_mixed_no_share_is_said_to_change():
    masses = {"words": (0.3, 1.34), "padding": (0.6, -0.4)}
    report = LayerReport(0.5, 5, 0.1, 1.0, 4.0, 3.0, masses)
    mixed, *off = (sentence([report], lam, alpha) for lam, alpha in ((2.0, 1.5), (0.0, 1.5), (2.0, 1.0)))
    assert "takes the words' share from 30% to 134% (what goes beyond 100% is taken below zero elsewhere). Try" in mixed
    assert all(said.startswith("Padding: ") and "takes the words' share" not in said for said in off)
    diffuse = LayerReport(0.5, 5, 0.1, 1.0, 77.0, 3.0)
    # the model's regime, of which alpha 1 says nothing
    assert sentence([diffuse], 2.0, 1.0) == sentence([diffuse], 2.0, 1.5)
