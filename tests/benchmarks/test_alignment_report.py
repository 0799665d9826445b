"""What the benchmark of a checkpoint says of its scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.alignment_report import check, markdown, summarised

PROMPTS, SEEDS = 40, 2
# of a picture's score; a difference of two means then has a standard error of about .016
NOISE = 0.1
REPORTS = Path(__file__).parents[2] / "docs" / "reports"


def setting(key: str, label: str, temperature: float | None = None, cfg: float | None = 5.0) -> dict:
    return {
        "key": key, "label": label, "lambda": 1.0, "tokens": "all", "norm_cap": 0.0, "temperature": temperature,
        "cfg": cfg,
    }  # fmt: skip


def result(gains: dict[str, float], prompts: int = PROMPTS, cfgs=(5.0,), levels=None) -> dict:
    """Scores of softmax and of labels that are better by so much, or by {CFG: so much}, with noise of their own.

    `levels`: {CFG: by how much it is better than others}.
    """
    random = np.random.default_rng(0)
    shared = random.normal(20, 3, (prompts, SEEDS))
    settings, rows = [], {}
    for label, gain in {"softmax": 0.0, **gains}.items():
        for cfg in cfgs:
            key = f"{label} g{cfg:g}"
            settings.append(setting(key, label, 2.0 if "temperature" in label else None, cfg))
            level = gain[cfg] if isinstance(gain, dict) else gain
            level += (levels or {}).get(cfg, 0.0)
            rows[key] = (shared + level + random.normal(0, NOISE, shared.shape)).flatten().tolist()
    return {
        "prompts": [f"prompt {i}" for i in range(prompts)], "seeds": list(range(SEEDS)), "settings": settings,
        "scores": {"CLIPScore": rows}, "versions": {}, "models": [], "workflow": {},
    }  # fmt: skip


def advice(*args, **kwargs) -> str:
    said = summarised(result(*args, **kwargs))["advice"]
    assert "\n" not in said
    return said


def test_a_gain_is_named_with_its_error_and_the_number_that_was_tried():
    given = summarised(result({"lambda 1": 0.2, "lambda 2": 0.0, "lambda 1, words only": 0.1, "lambda 3": -0.3}))
    row = given["best"][1]["CLIPScore"]
    rows = given["scores"]["CLIPScore"]
    gains = (np.array(rows["lambda 1 g5"]) - rows["softmax g5"]).reshape(PROMPTS, SEEDS).mean(1)
    assert row["difference"] == pytest.approx(gains.mean())
    # over prompts, not pictures
    assert row["difference_se"] == pytest.approx(gains.std(ddof=1) / PROMPTS**0.5)
    assert given["advice"].startswith(
        f"On this checkpoint, by CLIPScore over 40 prompts and 2 seeds: lambda 1: {gains.mean():+.3f} ± "
        f"{row['difference_se']:.3f} against softmax at the same CFG, which was not tuned (2 of 4 settings tried are "
        "better, 1 worse; the best of several is optimistic). No temperature was run"
    )


def test_less_than_two_errors_is_no_difference():
    said = advice({"lambda 1": 0.02, "lambda 2": -0.3})
    assert "no setting of PLADIS that was tried is better than softmax" in said
    assert "of 2, 1 are worse and 1 show no difference; the highest, lambda 1: " in said


def test_the_highest_is_not_named_before_one_that_is_certain():
    given = result({"lambda 1": 0.3, "lambda 2": 0.1})
    # a few prompts alone carry it
    rows = given["scores"]["CLIPScore"]
    base = np.array(rows["softmax g5"])
    rows["lambda 1 g5"] = (base + np.where(np.arange(len(base)) < 2, 20.0, 0.0)).tolist()
    given = summarised(given)
    assert given["best"][1]["CLIPScore"]["difference"] > given["best"][2]["CLIPScore"]["difference"]
    assert ": lambda 2: +" in given["advice"] and "(1 of 2 settings" in given["advice"]


def test_each_is_compared_at_its_best_cfg():
    """At CFG 3 lambda 1 is better than softmax, which is as good as that at CFG 7."""
    given = summarised(result({"lambda 1": {3.0: 0.5, 7.0: 0.4}}, cfgs=(3.0, 7.0)))
    rows = given["scores"]["CLIPScore"]
    given["scores"]["CLIPScore"]["softmax g7"] = (np.array(rows["softmax g3"]) + 0.5).tolist()
    given = summarised(given)
    same = {line["key"]: line["CLIPScore"]["difference"] for line in given["table"]}
    assert same["lambda 1 g3"] == pytest.approx(0.5, abs=0.1)
    best = given["best"][1]["CLIPScore"]
    assert best["cfg"] == 3.0 and best["difference"] == pytest.approx(0.0, abs=0.1)
    assert "is better than softmax at its best CFG (7, the highest tried)" in given["advice"]
    assert "the highest, lambda 1 at CFG 3: " in given["advice"]
    assert "Each at its best CFG" in markdown(given)


def test_the_best_cfg_may_lie_between():
    said = advice({"lambda 1": 0.5}, cfgs=(3.0, 7.0, 5.0), levels={5.0: 1.0})
    assert "lambda 1 at CFG 5: +" in said and "against softmax at its best CFG (5). " in said


@pytest.mark.parametrize(("gain", "words"), [
    (0.2, "no difference found."), (0.0, "PLADIS is better."), (0.5, "the temperature is better."),
])  # fmt: skip
def test_a_gain_is_held_against_the_temperature(gain, words):
    said = advice({"lambda 1": 0.2, "temperature 2": gain, "temperature 3": -1.0})
    # a temperature is no setting of PLADIS
    assert "lambda 1: +" in said and "optimistic" not in said
    assert "Control: temperature 2, sharper without sparsity (best of 2), has" in said and said.endswith(words)


def test_another_score_is_asked_about_the_same_setting():
    given = result({"lambda 1": 0.3, "lambda 2": 0.1})
    rows = given["scores"]["CLIPScore"]
    given["scores"]["PickScore"] = {**rows, "lambda 1 g5": rows["lambda 2 g5"], "lambda 2 g5": rows["lambda 1 g5"]}
    given = summarised(given)
    line = given["best"][2]["CLIPScore"]
    assert f"By PickScore the same two differ by {line['difference']:+.3f} ± " in given["advice"]


def test_nothing_is_said_without_a_ground():
    assert advice({"lambda 1": 5.0}, prompts=9) == (
        "No advice: 9 prompts are too few to tell an error from. Give at least 10."
    )
    assert "no lambda but 0 was run" in advice({"temperature 2": 5.0})
    nothing = {**result({"lambda 1": 1.0}), "scores": {}}
    assert "Add --clip" in summarised(nothing)["advice"] and markdown(summarised(nothing)).startswith("No advice")


def test_one_prompt_has_no_error():
    given = json.loads(json.dumps(summarised(result({"lambda 1": 1.0}, prompts=1)), allow_nan=False))
    assert given["table"][1]["CLIPScore"]["difference_se"] is None and "± ?" in markdown(given)


def test_the_workflow_may_hide_its_cfg():
    given = summarised(result({"lambda 1": 1.0}))
    for each in given["settings"]:
        each["cfg"] = None
    assert "| lambda 1 |  | " in markdown(summarised(given))


def test_a_report_must_be_what_its_scores_say():
    given = json.loads(json.dumps(summarised(result({"lambda 1": 0.3}))))
    check(given)
    with pytest.raises(ValueError, match="the tables or the advice"):
        check({**given, "advice": given["advice"].replace("+0", "+1")})
    with pytest.raises(ValueError, match="the report lacks versions, workflow"):
        check({name: value for name, value in given.items() if name not in ("versions", "workflow")})
    given["scores"]["CLIPScore"]["lambda 1 g5"].pop()
    with pytest.raises(ValueError, match="CLIPScore of lambda 1 g5 has 79 scores, not 80"):
        check(given)


def test_every_listed_report_is_what_its_scores_say():
    page = (REPORTS / "README.md").read_text(encoding="utf-8")
    for file in REPORTS.glob("*.json"):
        given = json.loads(file.read_text(encoding="utf-8"))
        check(given)
        assert file.name in page and given["advice"] in page
