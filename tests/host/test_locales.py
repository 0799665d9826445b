"""The translations: of the languages that ComfyUI offers, complete, in the shape of the schemas, and served by a real
ComfyUI. tests/web/test_words.py has those of the panels."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from pathlib import Path

import pytest

from comfy_server import PACK, PACK_FOLDER
from pladis_pack.nodes import comfy_entrypoint

FOLDER = PACK / "locales"
LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "es", "pt-BR", "it", "ru", "tr", "ar", "fa", "he")
# that the front end of the oldest host that is supported does not offer
NEWER = {"he", "it"}
# a letter of each script that is not Latin
SCRIPTS = {
    "zh": "[\u4e00-\u9fff]", "zh-TW": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7af]",
    "ru": "[\u0400-\u04ff]", "ar": "[\u0600-\u06ff]", "fa": "[\u0600-\u06ff]", "he": "[\u0590-\u05ff]",
}  # fmt: skip
# the setting's options, {value:`ar`,text:`عربي`} or ar:{text:`عربي`,loaders:
CODE = "([a-z]{2}(?:-[A-Z]{2})?)"
OFFERED = re.compile(rf'\{{value:`{CODE}`,text:`[^`]+`\}}|[{{,]"?{CODE}"?:\{{text:`[^`]+`,loaders:')
# for the direction of writing, and of markup
MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069<>]")
# an option that a text explains, and a list that it gives as an example, are what a person must choose or type
OPTIONS = re.compile(
    r"\b(all|down \+ up|custom|both|positive|negative|constant|linear|cosine|standard|few-step)(?=:|, cosine:)"
)
LISTS = re.compile(r"[dmbu]\d[\d.,dmbu-]*\d|#\d(?:-\d)?|\(red:1\.3\)")


def schemas() -> dict:
    """Of the nodes that people see."""

    async def nodes():
        return await (await comfy_entrypoint()).get_node_list()

    found = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(nodes())}
    return {name: schema for name, schema in found.items() if not schema.is_dev_only}


SCHEMAS = schemas()


def texts(tree: dict, path: tuple = ()) -> dict[tuple, str]:
    """Every text of a tree with the path to it."""
    found = {}
    for key, value in tree.items():
        found.update(texts(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value})
    return found


def english() -> dict:
    return {
        name: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: {"name": entry.id, "tooltip": entry.tooltip} for entry in schema.inputs},
            "outputs": {
                str(number): {"name": entry.display_name, "tooltip": entry.tooltip}
                for number, entry in enumerate(schema.outputs)
            },
        }
        for name, schema in SCHEMAS.items()
    }


ENGLISH = texts(english())


@pytest.fixture(params=LANGUAGES)
def language(request) -> str:
    return request.param


@pytest.fixture
def translated(language) -> dict[tuple, str]:
    return texts(json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8")))


def test_the_five_nodes_are_meant():
    assert len(SCHEMAS) == 5 and len(ENGLISH) > 100


def test_the_folders_are_the_languages():
    # English is in the schemas: a file for it would take their place and fall behind
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(LANGUAGES)


def test_the_languages_are_those_that_the_front_end_offers():
    front_end = importlib.util.find_spec("comfyui_frontend_package")
    if front_end is None:
        pytest.skip("this ComfyUI has its front end elsewhere")
    scripts = (Path(front_end.origin).parent / "static" / "assets").glob("*.js")
    found = (OFFERED.findall(path.read_text(encoding="utf-8")) for path in scripts)
    (offered,) = [{old or new for old, new in codes} for codes in found if codes]
    assert offered - {"en"} <= set(LANGUAGES)
    assert set(LANGUAGES) - offered <= NEWER


def test_a_language_has_the_texts_of_the_schemas_and_no_others(translated):
    assert translated.keys() == ENGLISH.keys()


def test_no_text_is_empty_or_left_in_english(translated, language):
    for path, text in translated.items():
        assert text.strip() == text != "", path
        if path[-1] == "name":
            continue
        assert text != ENGLISH[path], path
        if path[-1] != "display_name" and language in SCRIPTS:
            assert re.search(SCRIPTS[language], text), path


def test_options_and_examples_are_written_as_the_node_takes_them(translated):
    kept = {path: [*OPTIONS.findall(text), *LISTS.findall(text)] for path, text in ENGLISH.items()}
    assert sum(map(len, kept.values())) > 15
    for path, words in kept.items():
        assert [word for word in words if word not in translated[path]] == [], path


def test_scale_and_alpha_can_be_recognised(translated):
    for path, text in translated.items():
        if path[-1] == "name" and path[-2] in ("scale", "alpha"):
            assert text.startswith(path[-2])


def test_no_text_has_a_sign_that_the_front_end_interprets(translated):
    # of its message format
    assert not [path for path, text in translated.items() if re.search(r"[{}@|]", text)]


def test_every_text_is_plain(translated):
    assert not [path for path, text in translated.items() if MARKS.search(text)]


def test_inputs_of_a_node_have_different_names(translated):
    for node in SCHEMAS:
        names = [text for path, text in translated.items() if path[:2] == (node, "inputs") and path[-1] == "name"]
        assert len(set(names)) == len(names) == len(SCHEMAS[node].inputs)


def test_the_server_serves_them(server):
    served = json.loads(server.get("/i18n"))
    assert PACK_FOLDER in server.log()
    assert set(served) == set(LANGUAGES)
    for language, found in served.items():
        files = (FOLDER / language / name for name in ("nodeDefs.json", "main.json"))
        nodes, panels = (json.loads(file.read_text(encoding="utf-8")) for file in files)
        assert found == {**panels, "nodeDefs": nodes}
