"""`python -m pladis_core`: the figure and the printed numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pladis_core import __main__ as program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short_timing(monkeypatch):
    monkeypatch.setattr(program, "TIMED_SHAPE", (1, 8, 8, 8))


def printed(text: str, label: str) -> float:
    match = re.search(rf"^{re.escape(label)}\s+([-+.\de]+)(%?)", text, re.MULTILINE)
    assert match, f"{label!r} is not printed"
    return float(match[1]) / (100 if match[2] else 1)


def test_it_writes_a_figure_and_prints_what_it_measured(tmp_path, capsys):
    out = tmp_path / "pladis.png"
    assert program.main(["--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert 0.5 < printed(text, "exact zeros among the sparse weights") < 1.0
    assert 1.0 <= printed(text, "mean support, words per place") < len(program.TOKENS) / 2
    assert printed(text, "negative mass per place, extrapolated") > 0.01
    assert printed(text, "row sums, largest distance from 1") < 1e-5
    assert printed(text, "eager against the entmax package") < 1e-5
    assert printed(text, "lam 0 against torch's softmax attention") < 1e-5
    assert printed(text, "time, eager / reference") > 0
    assert str(out) in text


@pytest.mark.parametrize("options", [["--lam", "0"], ["--alpha", "1"], ["--alpha", "2", "--lam", "-1", "--seed", "7"]])
@pytest.mark.usefixtures("short_timing")
def test_the_ends_of_the_ranges_can_be_drawn(tmp_path, options):
    assert program.main(["--out", str(tmp_path / "pladis.png"), *options]) == 0


def test_the_same_seed_gives_the_same_example():
    first, again, other = (program.example(seed)[0] for seed in (3, 3, 4))
    assert first.equal(again)
    assert not first.equal(other)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--alpha", "2.5", "alpha must lie in [1, 2]"),
        ("--lam", "nan", "lam must lie within"),
        ("--out", "no/such/folder/pladis.png", "cannot write no/such/folder/pladis.png"),
    ],
)
@pytest.mark.usefixtures("short_timing")
def test_a_wrong_argument_is_an_error_that_says_why(tmp_path, monkeypatch, capsys, option, value, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        program.main([option, value])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "entmax"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setattr(program, "find_spec", lambda name: None if name == missing else object())
    assert program.main(["--out", str(tmp_path / "pladis.png")]) == 1
    error = capsys.readouterr().err
    assert missing in error and "[demo]" in error


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "pladis_core", "--out", str(tmp_path / "pladis.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert "wrote" in result.stdout
