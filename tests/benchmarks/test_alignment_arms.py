"""The arms of the plan do what their equations say."""

from __future__ import annotations

import pytest
import torch
from entmax import entmax15

from benchmarks.alignment_demo import arms
from benchmarks.alignment_demo.arms import OPPOSITE, PAPER, PER_GROUP, SOFTMAX, TRIED, Setting, tried
from benchmarks.alignment_demo.attention import ArmAttention, Rows, geometry_aware, put, weighed
from demo.model import unet

WORDS = (3, 0)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 77, 77))
    scores = query @ key.mT * 8**-0.5
    return query, key, value, scores.softmax(-1), entmax15(scores, dim=-1), scores


def close(out: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", [PAPER, OPPOSITE, Setting(0.5)], ids=str)
def test_lambda(tensors, setting):
    query, key, value, dense, sparse, _ = tensors
    close(weighed(setting, query, key, value), ((1 - setting.lam) * dense + setting.lam * sparse) @ value)


def test_softmax_and_temperature(tensors):
    query, key, value, dense, _, scores = tensors
    close(weighed(SOFTMAX, query, key, value), dense @ value)
    close(weighed(SOFTMAX, query, key, value, temperature=2.5), (2.5 * scores).softmax(-1) @ value)


@pytest.mark.parametrize(("tokens", "mixed"), [("without start token", slice(1, None)), ("words only", slice(1, 4))])
def test_tokens(tensors, tokens, mixed):
    """What is left out keeps its softmax weight, the rest its sum; a row without words is softmax."""
    query, key, value, dense, _, scores = tensors
    setting = Setting(2.0, tokens=tokens)
    out = weighed(setting, query, key, value, mixed=Rows(WORDS).mixed(tokens))
    wanted = dense.clone()
    mass = dense[..., mixed].sum(-1, keepdim=True)
    wanted[..., mixed] = 2 * mass * entmax15(scores[..., mixed], dim=-1) - dense[..., mixed]
    close(out[0], (wanted @ value)[0])
    close(out[1], ((dense if tokens == "words only" else wanted) @ value)[1])


def test_norm_cap(tensors):
    query, key, value, dense, sparse, _ = tensors
    out = weighed(Setting(2.0, norm_cap=1.0), query, key, value)
    free, limit = (2 * sparse - dense) @ value, (dense @ value).norm(dim=-1, keepdim=True)
    assert (free.norm(dim=-1, keepdim=True) > limit).any()
    close(out, free * (limit / free.norm(dim=-1, keepdim=True)).clamp(max=1))


@pytest.mark.parametrize("zeta", [0.0, 0.5])
@pytest.mark.parametrize("eta", [0.05, 15.0])
def test_geometry_aware_guidance(tensors, eta, zeta):
    """By components: along the sparse output and across it."""
    query, key, value, dense, sparse, _ = tensors
    out = weighed(Setting(3.0, gag=(eta, zeta)), query, key, value)
    sparse, delta = sparse @ value, (sparse - dense) @ value
    unit = sparse / sparse.norm(dim=-1, keepdim=True)
    along = (delta * unit).sum(-1, keepdim=True) * unit
    update = along + zeta * (delta - along)
    length = update.norm(dim=-1, keepdim=True)
    assert (length > eta).any() == (eta < 1)
    close(out, sparse + 3 * update * torch.where(length > eta, eta / length, 1.0))


def test_geometry_aware_guidance_of_nothing():
    nothing = torch.zeros(1, 1, 1, 4)
    assert torch.equal(geometry_aware(nothing, nothing, 10.0, 15.0, 0.0), nothing)


def test_the_arms_are_those_of_the_plan():
    shown = {arm: [str(setting) for setting in settings] for arm, settings in TRIED.items()}
    assert shown == {
        "softmax": ["softmax"],
        "the paper": ["lambda 2"],
        "PLADIS, chosen": ["lambda 0.5", "lambda 1", "lambda 2", "lambda 3"],
        "tokens": [f"lambda {lam}, {tokens}" for tokens in ("without start token", "words only") for lam in (1, 2, 3)],
        "norm_cap": ["lambda 2, norm_cap 1", "lambda 2, norm_cap 1.5", "lambda 2, norm_cap 2"],
        "temperature": ["temperature 1.25", "temperature 1.5", "temperature 2", "temperature 3"],
        "GAG": ["GAG: lambda 10, eta 15, zeta 0", *(f"GAG: lambda 2, eta {eta}, zeta 0" for eta in (0.5, 1, 2))],
        "opposite": ["lambda -1"],
    }
    assert all(setting.alpha == 1.5 for settings in TRIED.values() for setting in settings)
    assert set(arms.ARMS) == {*TRIED, PER_GROUP}


def test_groups_are_searched_one_after_the_other_twice():
    """Down is only better at 2.5 once up is at 1.5: the second round finds it."""

    def score(setting: Setting) -> float:
        down, middle, up = setting.temperatures
        return (up == 1.5) + (up == 1.5 and down == 2.5) - (middle != 1.0)

    scores = tried(PER_GROUP, score)
    assert max(scores, key=scores.__getitem__).temperatures == (2.5, 1.0, 1.5)
    assert [setting.temperatures for setting in scores][:7] == [
        (1.0, 1.0, 1.0), (1.5, 1.0, 1.0), (2.5, 1.0, 1.0), (1.0, 1.5, 1.0), (1.0, 2.5, 1.0), (1.0, 1.0, 1.5),
        (1.0, 1.0, 2.5),
    ]  # fmt: skip
    assert (2.5, 2.5, 2.5) not in {setting.temperatures for setting in scores}


def test_every_text_attention_gets_its_groups_temperature():
    network = unet()
    put(network, Setting(temperatures=(1.0, 1.5, 2.5)), Rows(WORDS))
    temperatures: dict[str, set[float]] = {}
    for name, processor in network.attn_processors.items():
        assert isinstance(processor, ArmAttention) == (".attn2." in name)
        if ".attn2." in name:
            temperatures.setdefault(name.split("_")[0], set()).add(processor.temperature)
    assert temperatures == {"down": {1.0}, "mid": {1.5}, "up": {2.5}}


def test_noise_on_queries_is_of_the_stated_size(monkeypatch):
    """0.5 times the root mean square of each row's queries, and the same for every setting."""
    network = unet()
    layer = next(module for name, module in network.named_modules() if name.endswith("attn2"))
    hidden, text = torch.randn(2, 400, 64), torch.randn(2, 77, 96)
    seen = []
    monkeypatch.setattr(
        "benchmarks.alignment_demo.attention.weighed", lambda setting, query, *_: seen.append(query) or query
    )
    for setting, level in ((SOFTMAX, 0.0), (SOFTMAX, 0.5), (PAPER, 0.5)):
        ArmAttention(setting, "up", Rows(WORDS, level, torch.Generator().manual_seed(1)))(layer, hidden, text)
    clean, noisy, again = seen
    assert torch.equal(noisy, again)
    ratio = (noisy - clean).square().mean((1, 2, 3)).sqrt() / clean.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(ratio, torch.full((2,), 0.5), rtol=0.02, atol=0)


def test_a_setting_that_is_two_things_is_an_error():
    with pytest.raises(ValueError, match="control for lam 0"):
        Setting(2.0, temperatures=(2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="tokens must be"):
        Setting(2.0, tokens="no padding")
