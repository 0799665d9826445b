"""docs/evidence.md shows the measurements that docs/evidence/ holds, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import noise_robustness
from benchmarks.alignment_demo import first_model, tables

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evidence.md").read_text(encoding="utf-8")


def load(name: str) -> dict:
    return json.loads((DOCS / "evidence" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_second_models_tables_are_the_measured_ones():
    result = load("second_model")
    assert result["captions"]["report"] >= 1000
    whole = tables.markdown(result)
    # one level up in a file of their own
    of_file = whole.replace("\n### ", "\n## ").replace("\n#### ", "\n### ")
    assert of_file in (DOCS / "evidence" / "second_model.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^### ([^\n]+)\n\n(.*?)(?=^### |\Z)", whole, re.MULTILINE | re.DOTALL))
    for title in ("What to set", "The dial"):
        assert parts[title].strip() in PAGE, title


def test_the_first_models_tables_are_the_measured_ones():
    result = load("alignment")
    assert first_model.markdown(result) in PAGE
    assert result["captions"]["report"] >= 1000


def test_every_table_has_both_controls():
    for table in load("alignment")["tables"]:
        names = " ".join(row["name"] for row in table["reported"])
        assert "control: temperature" in names and "control: lambda -1" in names


def test_the_noise_tables_are_the_measured_ones():
    points = [noise_robustness.Point(**point) for point in load("noise_robustness")["points"]]
    assert noise_robustness.markdown(points) in PAGE


def test_every_picture_of_the_page_is_there():
    for file in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE):
        assert (DOCS / file).is_file(), file
