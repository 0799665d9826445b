"""The help pages: one for every node that people see, with all of its inputs and outputs."""

from __future__ import annotations

import asyncio
import re

import pytest
from PIL import Image

from comfy_server import PACK
from pladis_pack.nodes import comfy_entrypoint

DOCS = PACK / "web" / "docs"
MOST_BYTES = 200_000


def schemas() -> dict:
    async def nodes():
        return await (await comfy_entrypoint()).get_node_list()

    found = [node.GET_SCHEMA() for node in asyncio.run(nodes())]
    return {schema.node_id: schema for schema in found if not schema.is_dev_only}


SCHEMAS = schemas()


@pytest.fixture(params=SCHEMAS)
def schema(request):
    return SCHEMAS[request.param]


@pytest.fixture
def page(schema) -> str:
    return (DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")


def rows(page: str, heading: str) -> list[str]:
    """The names in bold in the first column of a section's table."""
    section = page.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    return [name for row in re.findall(r"^\| (\*\*.+?) \|", section, re.MULTILINE) for name in re.findall(r"\w+", row)]


def test_no_page_is_of_a_node_that_is_not_there():
    assert {path.stem for path in DOCS.glob("*.md")} == set(SCHEMAS)


def test_a_page_begins_with_the_name_and_has_its_sections(schema, page):
    assert page.startswith(f"# {schema.display_name}\n")
    assert re.findall(r"^## (Inputs|Outputs?|Cost|Limits)$", page, re.MULTILINE)[:1] == ["Inputs"]
    assert "\n## Cost\n" in page and "\n## Limits\n" in page


def test_inputs_are_those_of_the_node(schema, page):
    assert sorted(rows(page, "Inputs")) == sorted(entry.id for entry in schema.inputs)


def test_outputs_are_those_of_the_node(schema, page):
    if schema.node_id != "PLADISApplyAdvanced":
        assert rows(page, "Output") == [entry.display_name for entry in schema.outputs]


def test_defaults_are_those_of_the_node(schema, page):
    """Numbers: other defaults are words."""
    table = page.split("## Inputs", 1)[1].split("\n## ", 1)[0]
    for name, default in re.findall(r"^\| \*\*(\w+)\*\* \| ([\d.]+) \|", table, re.MULTILINE):
        (entry,) = (entry for entry in schema.inputs if entry.id == name)
        assert float(default) == float(entry.default), name


def test_options_of_a_choice_are_all_explained(schema, page):
    for entry in schema.inputs:
        if entry.io_type == "COMBO" and entry.id in ("apply_to", "scale_schedule", "variant"):
            assert [option for option in entry.options if f"`{option}`" not in page] == []


def test_pictures_are_there_and_small(page):
    pictures = re.findall(r"!\[(.+?)\]\((images/[\w.]+)\)", page)
    assert pictures
    for _, name in pictures:
        assert (DOCS / name).stat().st_size < MOST_BYTES
        with Image.open(DOCS / name) as picture:
            picture.verify()


def test_every_picture_is_used():
    used = {name for path in DOCS.glob("*.md") for name in re.findall(r"\(images/([\w.]+)\)", path.read_text("utf-8"))}
    assert {path.name for path in (DOCS / "images").iterdir()} == used
