"""docs/models.md has the table of families that the code has, and every family that it calls tested has a fixture."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.supported_models
import comfyui_version
import pytest

import families
import tiny
from pladis_pack.nodes.hosting.models.families import TABLE, UNET, UNSUPPORTED, Family, find_family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HOSTS = ("0.20.0", "0.33.0", "0.38.1")
MARKS = ("<!-- families: written by tests/host/test_compatibility.py -->\n", "<!-- /families -->")


def table() -> str:
    rows = ["| Family | Text attention | PLADIS | Tested on ComfyUI | Padding tokens |", "|---|---|---|---|---|"]
    rows += [_row(family) for family in TABLE]
    return "".join(f"{row}\n" for row in rows)


def _row(family: Family) -> str:
    if family.kind == UNSUPPORTED:
        return f"| {family.name} | - | no | - | {family.reason}. |"
    # a pack's, in test_more_peers.py
    hosts = ", ".join(host for host in HOSTS if host >= family.since) + ("" if family.since else ", with that pack")
    return f"| {family.name} | {family.kind} | yes | {hosts} | {family.pads} |"


def family_of(model) -> Family | None:
    return find_family(model.model, model.model.diffusion_model)


def test_the_page_has_the_table():
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    written, end, after = rest.partition(MARKS[1])
    assert mark and end
    if "PLADIS_WRITE_TABLE" in os.environ:
        PAGE.write_text(before + mark + table() + end + after, encoding="utf-8")
    assert written == table(), "run this test once with PLADIS_WRITE_TABLE=1"


def test_every_family_that_is_called_tested_has_a_model_here():
    found = {family_of(tiny.patcher())}
    for fixture in families.FAMILIES:
        if hasattr(comfy.supported_models, fixture.config):
            found.add(family_of(families.patcher(fixture)))
    version = comfyui_version.__version__
    if version not in HOSTS:
        pytest.skip(f"ComfyUI {version} is not one of those in the table")
    expected = {f for f in TABLE if f.kind != UNSUPPORTED and f.since and version >= f.since}
    assert found == expected
    assert UNET in {family.kind for family in found}
