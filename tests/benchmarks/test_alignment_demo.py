"""The measurement of the demo models: what is drawn, chosen, kept, skipped and written."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import Future
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import alignment
from benchmarks.alignment_demo import (
    PARTS,
    arms,
    choices,
    command,
    measure,
    parallel,
    pictures,
    scope,
    scorers,
    store,
    tables,
)
from benchmarks.alignment_demo.arms import PAPER, SOFTMAX, Setting
from benchmarks.alignment_demo.choices import CFG_3, NO_GUIDANCE, TUNED, choose, ships_by_rule
from benchmarks.alignment_demo.models import SHARES, SINK, STUDENT, Models, Trained, expected, find
from benchmarks.alignment_demo.parallel import forecast
from benchmarks.alignment_demo.pictures import Disturbance, Sampling, Studio, starting_noise
from benchmarks.alignment_demo.scorers import Captions, Drawn, Forecast
from benchmarks.alignment_demo.store import Store, meaning
from demo.model import autoencoder, text_encoder, unet
from demo.oracle import Score
from demo.scenes import COLOURS, Kind, Placed

LAYER = {"start": 0.1, "words": 0.3, "end": 0.1, "padding": 0.5, "effective tokens": 20.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models that were hardly trained: at random."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    save_file(autoencoder().state_dict(), folder / "autoencoder.safetensors")
    save_file(text_encoder().state_dict(), folder / "text_encoder.safetensors")
    for name in ("noise00-0", "noise15-0", "noise15-1", "student-0"):
        torch.save({"step": 1, "steps": 1, "average": unet().state_dict()}, folder / f"{name}.pt")
    torch.save({"step": 1, "steps": 2, "average": unet().state_dict()}, folder / "noise15-2.pt")
    return folder


@pytest.fixture
def small(monkeypatch):
    """Ways with one step, and few settings of each arm."""
    ways = {NO_GUIDANCE: (1.0,), CFG_3: (3.0,), TUNED: (1.0, 2.0)}
    monkeypatch.setattr(scope, "SHIPPED_KIND", "noise15")
    for name, cfgs in ways.items():
        for table in (choices.WAYS, choices.STANDARD_WAYS):
            monkeypatch.setitem(table, name, tuple(Sampling(1, cfg) for cfg in cfgs))
    for arm, settings in arms.TRIED.items():
        monkeypatch.setitem(arms.TRIED, arm, settings[:2])
    monkeypatch.setattr(arms, "GROUP_TEMPERATURES", (1.0, 1.5))
    monkeypatch.setattr(command, "unit_costs", lambda *_: (0.001, 0.01))
    monkeypatch.setattr("benchmarks.alignment_demo.regime.oracle_accuracy", lambda options: {"drawn": {"colour": 1.0}})
    monkeypatch.setattr("benchmarks.alignment_demo.regime.sink", lambda network, encoder: {"layer": LAYER})


@pytest.fixture
def quick_oracle(monkeypatch):
    """What models drawn at random show takes the oracle long."""

    def read(picture: np.ndarray) -> list[Placed]:
        colours = list(COLOURS)[: int(picture.astype(int).sum()) % len(COLOURS)]
        return [Placed(Kind(colour, "circle"), 0.0, 0.0, 6.0) for colour in colours]

    monkeypatch.setattr(pictures, "read", read)


@pytest.fixture
def guesses(monkeypatch):
    """Made-up scores instead of pictures."""
    made = []

    def draw(self, model, split, way, setting, disturbance):
        made.append((model.name, split, way, setting, disturbance))
        luck = np.random.default_rng(abs(hash((model.seed, split, way, setting))) % 2**32).random()
        prompts = self.captions.prompts[split]
        rows = [[int(len(p.objects) * luck), len(p.objects), len(p.objects), None] for p in prompts]
        self.done(len(prompts))
        return {"scores": rows, "seconds": 0.0}

    monkeypatch.setattr(Drawn, "_draw", draw)
    return made


def drawn(folder: Path, kept: Path, tune: int = 3, report: int = 4) -> Drawn:
    return Drawn(Captions(tune, report, 7), Store(kept))


def run(folder: Path, out: Path, *words: str) -> dict:
    parser = argparse.ArgumentParser()
    alignment._demo_arguments(parser)
    given = ["--trained", str(folder), "--out", str(out), "--tune", "3", "--report", "4", *words]
    command.run(parser.parse_args(given))
    return json.loads((out / "tables.json").read_text(encoding="utf-8"))


def test_a_run_of_drawn_pictures(folder, tmp_path, small, quick_oracle, capsys, monkeypatch):
    """One kind of model with two of its seeds, nothing made up."""
    monkeypatch.setitem(measure.PART_WAYS, "fixed", (NO_GUIDANCE,))
    monkeypatch.setattr(measure, "DISTURBED_WAYS", (NO_GUIDANCE,))
    result = run(folder, tmp_path, "--models", "noise15", "--parts", "fixed", "noise")
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.endswith(text)
    assert list(result["models"]) == ["noise15-0", "noise15-1"] and result["shipped"] == "noise15"
    rows = result["cells"][NO_GUIDANCE]["noise15"]["arms"]
    assert list(rows) == list(arms.ARMS) and rows["opposite"]["setting"] == "lambda -1"
    assert len(rows["softmax"]["figures"]["F1"]["seeds"]) == 2
    assert len(result["disturbed"]) == 3 * len(scope.COMPARED)
    order = [text.index(f"### {part}") for part in ("What to set", "The dial", "The arms", "Robustness", "Where")]
    assert order == sorted(order)


def test_what_is_not_there_is_named(folder, tmp_path, small, guesses, capsys):
    result = run(folder, tmp_path, "--models", "noise15", "noise30", "--parts", "fixed")
    printed = capsys.readouterr().out
    skipped = result["skipped"]
    assert "not trained yet" in skipped["noise30-0"] and "is at step 1 of 2" in skipped["noise15-2"]
    assert skipped["student-0"] == "left out by --models" and skipped["part tuned"] == "left out by --parts"
    for name, reason in skipped.items():
        assert f"- {name}: {reason}" in printed
    assert "skipped: noise30-0: not trained yet" in printed


def test_a_model_whose_chooser_is_missing_is_skipped(folder, tmp_path):
    for name in ("autoencoder.safetensors", "text_encoder.safetensors", "noise15-1.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    models = find(tmp_path, ["all"])
    assert not models.measured
    assert models.skipped["noise15-1"] == "its settings are chosen on noise15-0, which is not there"
    with pytest.raises(ValueError, match="no model is called 'seed9'"):
        find(folder, ["seed9"])


def test_choices_are_made_on_seed_0_and_on_the_captions_to_tune_on(folder, tmp_path, small, guesses):
    models = find(folder, ["seed1"])
    measure.measure(drawn(folder, tmp_path), models, ["fixed", "tuned"])
    assert {name for name, split, *_ in guesses if split == "tune"} == {"noise15-0"}
    assert {name for name, split, *_ in guesses if split == "report"} == {"noise15-1"}
    # of each arm one setting is reported, under each way of sampling
    reported = {(way, setting) for _, split, way, setting, _ in guesses if split == "report"}
    assert len(reported) <= 3 * len(arms.ARMS)


def test_the_highest_f1_on_the_captions_to_tune_on_is_chosen(folder, tmp_path, small, monkeypatch):
    """By F1, although another setting has the higher recall. At tuned CFG the setting of CFG 3 stays, although another
    would be better at CFG 2."""
    best, generous = Setting(1.0), Setting(0.5)

    def scores(self, model, split, way, setting, disturbance=pictures.NONE):
        assert split == "tune"
        if setting == generous:
            return [Score(3, 3, 3 if way.cfg == 2.0 else 9, None)]
        return [Score(2 if way.cfg == 2.0 else 1, 3, 3, None)] if way.cfg != 3.0 else [Score(2, 3, 3, None)]

    monkeypatch.setattr(Drawn, "scores", scores)
    cell = (drawn(folder, tmp_path), Trained(folder, "noise15", 0))
    fixed, tuned = (choose(*cell, way, "PLADIS, chosen") for way in (CFG_3, TUNED))
    assert fixed.setting == best and {setting for setting, _ in fixed.tried} == {best, generous}
    assert (tuned.setting, tuned.sampling.cfg) == (best, 2.0)
    assert [(setting, way.cfg) for setting, way in tuned.tried] == [(best, 1.0), (best, 2.0)]


@pytest.mark.parametrize(
    ("shares", "kind"),
    [
        ((0.9, 0.8, 0.7), "noise30"),
        ((0.9, 0.8, 0.5), "noise15"),
        ((0.59, 0.5, 0.4), "noise00"),
        ((0.9, 0.87, 0.5), "noise15"),
    ],
)
def test_the_model_that_ships(folder, tmp_path, monkeypatch, shares, kind):
    models = find(folder, ["all"])
    for name in ("noise30-0",):
        models.there[name] = Trained(folder, "noise30", 0)
    models = type(models)(models.there, (*models.measured, "noise30-0"), models.skipped)
    of = dict(zip(("noise00", "noise15", "noise30"), shares, strict=True))

    def scores(self, model, split, way, setting, disturbance=pictures.NONE):
        assert (split, way, setting) == ("tune", Sampling(20, 3.0), SOFTMAX)
        right = round(100 * of[model.kind])
        return [Score(1, 1, 1, None)] * right + [Score(0, 1, 1, None)] * (100 - right)

    monkeypatch.setattr(Drawn, "scores", scores)
    assert ships_by_rule(drawn(folder, tmp_path), models)[0] == kind


def test_a_stopped_run_goes_on(folder, tmp_path, small, guesses, monkeypatch):
    whole = run(folder, tmp_path / "whole", "--models", "seed0")
    everything, make = len(guesses), Drawn._draw
    assert len(set(guesses)) == everything

    def stop_after_20(self, *cell):
        if len(guesses) - everything == 20:
            raise KeyboardInterrupt
        return make(self, *cell)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Drawn, "_draw", stop_after_20)
        run(folder, tmp_path / "part", "--models", "seed0")
    assert run(folder, tmp_path / "part", "--models", "seed0") == whole
    # nothing was made twice
    assert sorted(map(str, guesses[everything:])) == sorted(map(str, guesses[:everything]))


def test_the_forecast_counts_what_is_drawn(folder, tmp_path, small, guesses):
    models, scorer = find(folder, ["noise00"]), drawn(folder, tmp_path)
    parts = ["fixed"]
    work = forecast(scorer, models, parts).work
    command.tabulate(scorer, models, parts)
    made = [(3 if split == "tune" else 4, way.evaluations) for _, split, way, *_ in guesses]
    assert work == {"noise00-0": [sum(count * each for count, each in made), sum(count for count, _ in made)]}
    assert forecast(scorer, models, parts).work == {}


def test_several_processes_draw_what_one_does_and_nothing_else(folder, tmp_path, small, guesses, monkeypatch):
    """Settings are chosen before any picture to report on is drawn: which are reported depends on that."""
    what = "--models", "noise15", "--parts", "fixed"
    whole = run(folder, tmp_path / "one", *what)
    alone = list(guesses)
    guesses.clear()

    class InProcess:
        def __init__(self, jobs, context, start, arguments):
            assert jobs == 2
            start(*arguments)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def submit(self, work, *arguments):
            future = Future()
            future.set_result(work(*arguments))
            return future

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", InProcess)
    assert run(folder, tmp_path / "several", *what, "--jobs", "2") == whole
    assert set(guesses) >= set(alone) and len(guesses) == len(set(guesses))
    # luck may have had the search for temperatures try others, but nothing that is not chosen is reported
    assert {cell for cell in guesses if cell[1] == "report"} == {cell for cell in alone if cell[1] == "report"}


def test_scores_depend_on_all_that_is_in_their_key(folder, tmp_path, guesses):
    scorer, model = drawn(folder, tmp_path), Trained(folder, "noise15", 0)
    cell = (model, "tune", Sampling(1, 1.0), PAPER)
    others = [
        (Trained(folder, "noise15", 1), *cell[1:]),
        (model, "report", *cell[2:]),
        (*cell[:2], Sampling(2, 1.0), PAPER),
        (*cell[:3], SOFTMAX),
        (*cell, Disturbance("queries", 0.5)),
    ]
    for each in (cell, *others, cell):
        scorer.scores(*each)
    assert len(guesses) == 1 + len(others)
    for another in (Drawn(Captions(3, 4, 8), Store(tmp_path)), Drawn(scorer.captions, Store(tmp_path), precise=True)):
        another.scores(*cell)
    assert len(guesses) == 3 + len(others)
    # noise of no size is none
    scorer.scores(*cell, Disturbance("queries", 0.0))
    assert len(guesses) == 3 + len(others)


def test_code_that_means_the_same_keeps_its_scores(tmp_path, monkeypatch):
    plain = 'def f(x):\n    """Doc."""\n    # why\n    return x + 1\n'
    assert meaning(plain) == meaning("def f(x):\n  return (x + 1)")
    assert meaning(plain) != meaning(plain.replace("1", "2"))
    kept = Store(tmp_path)
    kept.keep({"model": "m"}, 3)
    assert kept.get({"model": "m"}) == 3
    monkeypatch.setattr(store, "code", lambda: "other")
    assert kept.get({"model": "m"}) is None


def test_pictures_depend_on_caption_seed_and_setting_alone(folder):
    """Not on the other captions, nor on what was drawn before; the noise is the training seed's own."""
    studio, way = Studio(Trained(folder, "noise15", 0), precise=True), Sampling(2, 2.0)
    captions = ["a red circle", "a blue square and a green bar"]
    both = studio.draw(captions, way, PAPER)
    studio.draw(captions, way, SOFTMAX)
    (alone,) = studio.draw(captions[1:], way, PAPER)
    assert np.abs(both[1].astype(int) - alone.astype(int)).max() <= 1
    assert not torch.equal(starting_noise(captions[0], 0), starting_noise(captions[0], 1))
    assert not torch.equal(starting_noise(captions[0], 0), starting_noise(captions[1], 0))


def test_noise_on_text_states_is_on_the_words_alone():
    text = torch.randn(2, 77, 96) * torch.tensor([1.0, 3.0])[:, None, None]
    noisy = pictures.disturbed(text, ["one", "two"], [40, 5], 0.5, seed=0)
    difference = noisy - text
    for row, words in enumerate((40, 5)):
        assert not difference[row, 0].any() and not difference[row, words + 1 :].any()
        size = difference[row, 1 : words + 1].square().mean() / text[row, 1 : words + 1].square().mean()
        assert size.sqrt() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(noisy, pictures.disturbed(text, ["one", "two"], [40, 5], 0.5, seed=0))


def test_a_difference_is_bold_and_the_rest_is_not():
    figure = {"mean": 0.1, "error": 0.04, "difference": True}
    assert tables.show(figure) == "**+0.100 ± 0.040**"
    assert tables.show({**figure, "difference": False}) == "+0.100 ± 0.040"
    assert tables.show({**figure, "mean": None}) == "-"


def test_the_forecast_leaves_scores_that_are_there(folder, tmp_path, guesses):
    scorer, model = drawn(folder, tmp_path), Trained(folder, "noise15", 0)
    real = scorer.scores(model, "tune", Sampling(1, 1.0), SOFTMAX)
    guess = Forecast(scorer)
    assert guess.scores(model, "tune", Sampling(1, 1.0), SOFTMAX) == real and not guess.work
    guess.scores(model, "tune", Sampling(2, 3.0), SOFTMAX)
    guess.scores(model, "tune", Sampling(2, 3.0), SOFTMAX)
    assert guess.work == {"noise15-0": [12, 3]}


def test_the_program_is_the_plan_as_it_was_cut(folder, tmp_path, guesses):
    """All models of the plan, with the plan's settings."""
    everything = {model.name: model for model in expected(folder)}
    for name, model in everything.items():
        model.__dict__["digest"] = name
    models = Models(everything, tuple(everything), {})
    measured = measure.measure(drawn(folder, tmp_path, tune=2, report=3), models, PARTS)
    ships, full = scope.SHIPPED_KIND, {scope.SHIPPED_KIND, SINK}
    assert measured.cells.keys() == {
        *product({*SHARES, SINK}, (NO_GUIDANCE, CFG_3)), *product([STUDENT], choices.STUDENT_WAYS),
        (ships, TUNED),
    }  # fmt: skip
    few = ["softmax", "the paper", "PLADIS, chosen", "temperature"]
    settable = [*few[:3], "tokens", "norm_cap", "temperature"]
    for (kind, way), cell in measured.cells.items():
        of_plan = settable if way == TUNED else list(arms.ARMS) if kind in {*full, STUDENT} else few
        assert list(cell.reported) == list(cell.choices) == of_plan
        assert bool(cell.advised) == (of_plan != few)
    for arm in settable:
        kept = measured.cells[ships, CFG_3].choices[arm].setting
        tried = measured.cells[ships, TUNED].choices[arm].tried
        assert [*tried] == [(kept, Sampling(20, cfg)) for cfg in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    noises = [pictures.NONE, Disturbance("text states", 0.5), Disturbance("queries", 0.5)]
    assert measured.disturbed.keys() == set(product([ships], (NO_GUIDANCE, CFG_3), noises, few))
    # of the other shares, lambdas and temperatures; without guidance and at CFG 3
    others = [made for made in guesses if made[0].split("-")[0] in SHARES.keys() - full and made[1] == "tune"]
    assert len(others) == len(SHARES.keys() - full) * 2 * (4 + 4)


def test_robustness_is_measured_on_the_first_of_the_captions(folder, tmp_path, small, guesses, monkeypatch):
    """What is without noise is not drawn again."""
    monkeypatch.setattr(scorers, "ROBUSTNESS_CAPTIONS", 2)
    scorer = drawn(folder, tmp_path)
    assert scorer.captions.prompts["robustness"] == scorer.captions.prompts["report"][:2]
    measured = measure.measure(scorer, find(folder, ["noise15"]), ["fixed", "noise"])
    assert {(split, d.level) for _, split, *_, d in guesses} == {("tune", 0.0), ("report", 0.0), ("robustness", 0.5)}
    for (kind, way, noise, arm), reported in measured.disturbed.items():
        whole = measured.cells[kind, way].reported[arm].values["F1"]
        for seed, numbers in reported.values["F1"].items():
            assert len(numbers) == 2 and (noise.level or numbers.tolist() == whole[seed][:2].tolist())


def test_without_words_the_program_measures_as_many_captions_as_the_plan():
    parser = argparse.ArgumentParser()
    alignment._demo_arguments(parser)
    args = parser.parse_args([])
    assert (args.tune, args.report, scorers.ROBUSTNESS_CAPTIONS) == (150, 1000, 500)


def test_tables_and_forecast_say_what_is_measured_on_what(folder, tmp_path, small, guesses, capsys):
    with pytest.raises(FileNotFoundError):
        run(folder, tmp_path, "--models", "seed0", "--forecast")
    forecast = capsys.readouterr().out
    run(folder, tmp_path, "--models", "seed0")
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    for said in (
        "3 others to choose on",
        "the mean of the seeds' own, clustered by the set of coloured shapes, as the splits are made",
        "With fewer seeds nothing is called a difference",
        "Only 2 of the 3 shares are measured",
    ):
        assert said in text
    for said in (
        "All arms for 15 % mistakes", "other shares only these: softmax; the paper; PLADIS, chosen; temperature",
        "GAG acts on every head and query", "its CFG alone is chosen", "noise of 0.5 times",
        "On the first 4 of the captions to report on, only for 15 % mistakes", "nor for the variant with a sink",
    ):  # fmt: skip
        assert said in text and said in forecast, said
    assert "#### 15 % mistakes, tuned CFG" in text and "#### 0 % mistakes, tuned CFG" not in text


def test_a_model_that_the_rule_would_not_ship_is_named():
    shares = {"noise00": 0.9, "noise15": 0.8, "noise30": 0.7}
    assert "rule says **another: 30 % mistakes**" in tables.about_shipped("noise15", "noise30", shares)
    assert "rule says the same" in tables.about_shipped("noise30", "noise30", shares)


def test_the_costs_of_a_unit_are_measured(folder, tmp_path, quick_oracle):
    evaluation, picture = scorers.unit_costs(drawn(folder, tmp_path), Trained(folder, "noise15", 0), count=3)
    assert 0 <= evaluation < 10 and 0 < picture < 10
