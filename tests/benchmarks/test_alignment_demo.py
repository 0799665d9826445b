"""benchmarks.alignment on the demo model: what is measured, chosen and written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import alignment_demo
from benchmarks.alignment_demo import (
    OPPOSITE,
    PAPER,
    SOFTMAX,
    TEMPERATURES,
    Sampling,
    Store,
    Summary,
    markdown,
    measure,
    values,
)
from demo.attention import TextAttention
from demo.oracle import Score
from demo.scenes import COLOURS, SHAPES, Kind, Prompt

ROOT = Path(__file__).parents[2]
GRID = (TextAttention(0.5), TextAttention(1.0, 2.0))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(alignment_demo, "GRID", GRID)
    monkeypatch.setattr(alignment_demo, "TEMPERATURES", TEMPERATURES[:2])
    monkeypatch.setattr(alignment_demo, "samplings", lambda steps: (Sampling("few-step", 1, 1.0),))
    monkeypatch.setattr(alignment_demo, "BATCH", 8)


def test_a_run_and_its_tables(small, tmp_path):
    result = measure(tmp_path / "scores.json", tune=8, report=12, steps=2)
    (table,) = result["tables"]
    rows = {row["name"]: row for row in table["reported"]}
    assert rows["softmax"]["setting"]["lam"] == 0 and rows["control: lambda -1"]["setting"]["lam"] == -1
    assert TextAttention(**rows["PLADIS, chosen"]["setting"]) in GRID
    # chosen on the tune split by F1
    tuned = {json.dumps(row["setting"]): row["f1"][0] for row in table["tuned"]}
    best = max(tuned[json.dumps(alignment_demo.asdict(setting))] for setting in GRID)
    assert tuned[json.dumps(rows["PLADIS, chosen"]["setting"])] == best
    assert rows["softmax"]["recall"][2] == 12 and rows["softmax"]["gain"]["recall"][0] == 0
    text = markdown(result)
    assert "few-step student, 1 step" in text and text.count("| control:") == 2


def test_a_stopped_run_goes_on(small, tmp_path, monkeypatch):
    whole = measure(tmp_path / "whole.json", 8, 8, 2)
    made = []
    make = alignment_demo.Runner._make

    def stop_after_3(self, prompts, setting, name):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(name)
        return make(self, prompts, setting, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(alignment_demo.Runner, "_make", stop_after_3)
        measure(tmp_path / "part.json", 8, 8, 2)
    assert len(json.loads((tmp_path / "part.json").read_text())["cells"]) == 3
    again = []
    monkeypatch.setattr(alignment_demo.Runner, "_make", lambda *a: again.append(a[3]) or make(*a))
    assert measure(tmp_path / "part.json", 8, 8, 2) == whole
    assert again and not set(again) & set(made)


def test_scores_of_another_run_are_never_taken_or_lost(tmp_path):
    store = Store(tmp_path / "s.json", "one")
    store.add("cell", [Score(1, 2, 3, None)])
    assert Store(tmp_path / "s.json", "one").scores("cell") == [Score(1, 2, 3, None)]
    with pytest.raises(ValueError, match="choose another --out"):
        Store(tmp_path / "s.json", "other")
    assert Store(tmp_path / "s.json", "one").scores("cell") == [Score(1, 2, 3, None)]


def test_measures():
    scores = [Score(2, 2, 2, True), Score(1, 2, 3, None), Score(0, 2, 1, False)]
    np.testing.assert_allclose(values(scores, "recall"), [1, 0.5, 0])
    np.testing.assert_allclose(values(scores, "complete"), [1, 0, 0])
    np.testing.assert_allclose(values(scores, "f1"), [1, 0.4, 0])
    np.testing.assert_allclose(values(scores, "count"), [0, 1, -1])
    np.testing.assert_allclose(values(scores, "relation"), [1, np.nan, 0])
    # the relation's mean is of the pictures where it could hold
    assert Summary(prompts(3)).means(scores)["relation"][::2] == [0.5, 2]


def prompts(sets: int, each: int = 1) -> list[Prompt]:
    """`each` captions of every one of so many sets of objects."""
    kinds = [Kind(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [Prompt(f"{number} {again}", (kinds[number],)) for number in range(sets) for again in range(each)]


def test_differences_are_paired():
    """The same spread in both cancels: the error of a difference is that of the differences."""
    base = [Score(n % 3, 2, 2, None) for n in range(30)]
    mean, error, _ = Summary(prompts(30)).differences(base, base)["recall"]
    assert (mean, error) == (0, 0)


def test_errors_are_the_usual_ones_where_no_captions_share_their_objects():
    scores = [Score(n % 3, 2, 2, None) for n in range(30)]
    recalls = values(scores, "recall")
    mean, error, count = Summary(prompts(30)).means(scores)["recall"]
    assert (mean, count) == (pytest.approx(recalls.mean()), 30)
    assert error == pytest.approx(recalls.std(ddof=1) / 30**0.5)


def test_captions_that_only_repeat_others_do_not_shrink_the_error():
    once = [Score(n % 3, 2, 2, None) for n in range(10)]
    alone = Summary(prompts(10)).means(once)["recall"]
    repeated = Summary(prompts(10, each=4)).means([score for score in once for _ in range(4)])["recall"]
    assert repeated[:2] == pytest.approx(alone[:2])


def test_the_grid_holds_what_the_page_promises():
    assert {s.alpha for s in alignment_demo.GRID} >= {1.5, 2.0}
    assert {s.layers for s in alignment_demo.GRID} == {"all", "down + up"}
    assert PAPER in alignment_demo.GRID and OPPOSITE not in alignment_demo.GRID and SOFTMAX not in alignment_demo.GRID
    # the control has the same choice of layers
    assert {s.layers for s in TEMPERATURES} == {"all", "down + up"}
    names = [str(sampling) for sampling in alignment_demo.samplings(20)]
    assert names[:3] == ["CFG 1", "CFG 3", "CFG 5"] and names[5] == "few-step student, 4 steps"
