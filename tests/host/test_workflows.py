"""The example workflows on a real ComfyUI: every node, input, value and link is one that the server takes."""

from __future__ import annotations

import json
import os
import re
import urllib.error
from io import BytesIO
from pathlib import Path

import numpy
import pytest
import templates
from PIL import Image

from comfy_server import PACK, PACK_FOLDER
from pladis_pack.demo.scenes import random_prompts
from workflows import FOLDER, NAMES, NOTES, RUN_HERE, THIRD_PARTY, inputs_of, lacks, read, to_prompt, working

HOST = Path(os.environ["COMFYUI_PATH"])
PYPROJECT = (PACK / "pyproject.toml").read_text(encoding="utf-8")
VERSION, NAME = (re.search(rf'^{key} = "(.+)"', PYPROJECT, re.MULTILINE)[1] for key in ("version", "name"))
OLDEST = re.search(r'^requires-comfyui = ">=(.+)"', PYPROJECT, re.MULTILINE)[1]
# where ComfyUI itself has no such folder
FOLDERS_OF_OTHERS = {"ipadapter": "comfyui_ipadapter_plus"}
MOST_BYTES = 200_000
# a node of ComfyUI that an older one has, but not with what the example chooses
CORE_SINCE = {"krea2_turbo_text_to_image": {"CLIPLoader": "0.33.0"}}
SHOWS = ("SaveImage", "PreviewImage")


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return json.loads(server.get("/object_info"))


@pytest.fixture(params=NAMES)
def workflow(request, object_info) -> dict:
    workflow = {"name": request.param, **read(request.param)}
    if lacking := lacks(workflow, object_info):
        pytest.skip(f"this ComfyUI has no text encoder of the kind {lacking}")
    return workflow


def test_the_files_are_those_that_templates_py_describes(server, object_info):
    """Written with PLADIS_WRITE_TEMPLATES=1, thumbnails too."""
    if os.environ["PLADIS_HOST"] != "newest":
        pytest.skip("described by the newest ComfyUI's inputs")
    if "PLADIS_WRITE_TEMPLATES" in os.environ:
        write_templates(server, object_info)
    choice = json.loads(templates.CHOICES.read_text(encoding="utf-8"))
    assert tuple(templates.TEMPLATES) == NAMES
    for name in NAMES:
        built = templates.build(name, object_info, choice, VERSION)
        assert read(name) == built, "run this test once with PLADIS_WRITE_TEMPLATES=1"


def write_templates(server, object_info: dict) -> None:
    from shapes_seen import choose_map

    choice = {"scale": templates.DEMO_SCALE, **choose_map(templates.DEMO_SAMPLING)}
    templates.CHOICES.write_text(json.dumps(choice, indent=1) + "\n", encoding="utf-8")
    for name, (_, words) in templates.TEMPLATES.items():
        workflow = templates.build(name, object_info, choice, VERSION)
        (FOLDER / f"{name}.json").write_text(templates.text_of(workflow), encoding="utf-8")
        if words:
            templates.save_thumbnail(name, templates.drawing(words))
            continue
        outputs = server.run(to_prompt(workflow, object_info))["outputs"]
        kept = [node for node in workflow["nodes"] if node["type"] in SHOWS and not node["flags"]]
        shown = [(node["title"], image) for node in kept for image in outputs[str(node["id"])]["images"]]
        pictures = [Image.open(BytesIO(server.view(image))).convert("RGB") for _, image in shown]
        # those of one node have their words in them
        labels = [title for title, _ in shown] if len(kept) > 1 else [""] * len(shown)
        templates.save_thumbnail(name, templates.side_by_side(pictures, labels, min(len(pictures), 3)))


def test_the_prompt_of_the_demos_is_not_picked():
    (prompt,) = random_prompts(1, "report", templates.SEED)
    assert prompt.text == templates.PROMPT and templates.SEED == 1


def all_nodes(object_info: dict) -> dict:
    """With those of other packs that an example may use."""
    return {**object_info, **{kind: info for pack in THIRD_PARTY.values() for kind, info in pack.items()}}


def test_the_folder_holds_these_workflows():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        f"{n}.{end}" for n in NAMES for end in ("json", "jpg")
    )


def test_the_template_browser_offers_them(server):
    assert sorted(json.loads(server.get("/workflow_templates"))[PACK_FOLDER]) == sorted(NAMES)
    for name in NAMES:
        url = f"/api/workflow_templates/{PACK_FOLDER}/{name}"
        assert json.loads(server.get(f"{url}.json")) == read(name)
        assert server.get(f"{url}.jpg") == (FOLDER / f"{name}.jpg").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_thumbnail_is_a_small_picture(name):
    file = FOLDER / f"{name}.jpg"
    assert file.stat().st_size < MOST_BYTES
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 200 and max(picture.size) <= 1024
        assert numpy.asarray(picture).std() > 8


def test_links_are_what_both_of_their_ends_say(workflow, object_info):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    known = all_nodes(object_info)
    ends, starts = {}, {}
    for node in nodes.values():
        for slot, entry in enumerate(node.get("inputs", [])):
            if entry["link"] is not None:
                ends[entry["link"]] = (node["id"], slot)
        for slot, entry in enumerate(node.get("outputs", [])):
            starts.update({link: (node["id"], slot) for link in entry["links"] or []})
    assert len(nodes) == len(workflow["nodes"])
    assert {link[0]: (link[1], link[2]) for link in workflow["links"]} == starts
    assert {link[0]: (link[3], link[4]) for link in workflow["links"]} == ends
    for number, source, out, target, slot, kind in workflow["links"]:
        assert known[nodes[source]["type"]]["output"][out] == kind, number
        name = nodes[target]["inputs"][slot]["name"]
        wanted = inputs_of(known[nodes[target]["type"]])[name][0]
        assert kind in str(wanted).split(",") or wanted == "*", (number, name)
    assert workflow["last_node_id"] >= max(nodes) and workflow["last_link_id"] >= max(starts)


def test_every_required_input_has_a_link_or_a_value(workflow, object_info):
    for number, node in to_prompt(workflow, all_nodes(object_info)).items():
        required = all_nodes(object_info)[node["class_type"]]["input"]["required"]
        assert set(required) <= set(node["inputs"]), number


def test_saved_values_by_name_are_those_by_place(workflow):
    for node in working(workflow):
        if "widgets_values" in node:
            assert list(node["widgets_values_named"].values()) == node["widgets_values"], node["type"]


def test_the_server_misses_nothing_but_the_declared_models(server, workflow, object_info):
    """Its own validation: classes, inputs, ranges, choices, types of links."""
    prompt = to_prompt(workflow, all_nodes(object_info))
    for number in [n for n, node in prompt.items() if node["class_type"] not in object_info]:
        bypass(prompt, number)
    refused = refusals(server, prompt)
    declared = {model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])}
    files = declared | {"example.png" for node in working(workflow) if node["type"] == "LoadImage"}
    missing = set()
    for number, found in refused.items():
        for error in found["errors"]:
            assert error["type"] in ("value_not_in_list", "custom_validation_failed"), (number, error)
            (value,) = (name for name in files if name in error["details"])
            missing.add(value)
    # a workflow that the server takes whole would say nothing here
    assert missing == reachable(prompt, files)


def reachable(prompt: dict, files: set[str]) -> set[str]:
    """Those files that a node with something after it loads: a bypass leaves others behind."""
    used = {value[0] for node in prompt.values() for value in node["inputs"].values() if isinstance(value, list)}
    values = [value for number in used for value in prompt[number]["inputs"].values() if isinstance(value, str)]
    return files & set(values)


def bypass(prompt: dict, number: str) -> None:
    """Takes out a node of another pack: its model goes on to those after it."""
    gone = prompt.pop(number)
    for node in prompt.values():
        for name, value in list(node["inputs"].items()):
            if isinstance(value, list) and value[0] == number:
                if "model" in gone["inputs"]:
                    node["inputs"][name] = gone["inputs"]["model"]
                else:
                    del node["inputs"][name]


def refusals(server, prompt: dict) -> dict:
    """What the server has against each node; empties its queue where it takes the prompt."""
    try:
        answer = json.loads(server.get("/prompt", json.dumps({"prompt": prompt}).encode()))
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
        assert answer["error"]["type"] == "prompt_outputs_failed_validation", answer
        return answer["node_errors"]
    server.get("/queue", json.dumps({"clear": True}).encode())
    server.get("/interrupt", b"{}")
    return answer["node_errors"]


def test_nodes_say_which_pack_they_are_of(workflow, object_info):
    packs = {kind: pack for pack, nodes in THIRD_PARTY.items() for kind in nodes}
    for node in working(workflow):
        stamp = (node["properties"]["cnr_id"], node["properties"]["ver"])
        if node["type"] in packs:
            assert stamp[0] == packs[node["type"]] and re.fullmatch(r"\d+\.\d+\.\d+", stamp[1])
            continue
        module = object_info[node["type"]]["python_module"]
        since = CORE_SINCE.get(workflow["name"], {}).get(node["type"], OLDEST)
        assert stamp == ((NAME, VERSION) if module == f"custom_nodes.{PACK_FOLDER}" else ("comfy-core", since))
    assert any(node["properties"].get("cnr_id") == NAME for node in workflow["nodes"])


def test_models_are_declared_where_they_are_loaded(server, workflow):
    folders = {*json.loads(server.get("/models")), *FOLDERS_OF_OTHERS}
    for node in working(workflow):
        files = {value for value in node.get("widgets_values", []) if str(value).endswith(".safetensors")}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == files, node["type"]
        for model in models:
            assert set(model) == {"name", "url", "directory"} and model["directory"] in folders
            assert re.fullmatch(
                r"https://huggingface\.co/[\w-]+/[\w.-]+/resolve/main/[\w./-]+\.safetensors", model["url"]
            )
    loads = [node for node in workflow["nodes"] if "models" in node["properties"]]
    assert bool(loads) == (workflow["name"] not in RUN_HERE)


def test_a_note_explains_the_workflow(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] in NOTES]
    (text,) = note["widgets_values"]
    assert text.startswith("## ") and len(text) > 200
    assert ("Not run by us with these weights" in text) == (workflow["name"] not in RUN_HERE)


def test_the_example_picture_comes_with_every_comfyui(workflow):
    pictures = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "LoadImage"]
    assert all((HOST / "input" / picture).is_file() for picture in pictures)


def test_every_node_is_in_an_example(object_info):
    ours = {kind for kind, info in object_info.items() if info["python_module"] == f"custom_nodes.{PACK_FOLDER}"}
    internal = {"PLADISSweepCell", "PLADISSweepGrid"}
    assert {node["type"] for name in NAMES for node in read(name)["nodes"]} & ours == ours - internal


# how many pictures each shows or saves
SHOWN = {"01_pladis_demo": 2, "02_pladis_sweep": 1, "03_pladis_attention_map": 7, "04_pladis_schedule": 2}


@pytest.mark.parametrize("name", RUN_HERE)
def test_the_demo_models_workflows_run(server, object_info, name):
    entry = server.run(to_prompt(read(name), object_info))
    assert entry["status"]["status_str"] == "success", entry["status"]
    # without what PLADIS Sweep shows of itself
    own = [found for node, found in entry["outputs"].items() if "." not in node]
    saved = [image for found in own for image in found.get("images", [])]
    pictures = [numpy.asarray(Image.open(BytesIO(server.view(image))).convert("RGB")) for image in saved]
    assert len(pictures) == SHOWN[name]
    assert all(picture.std() > 8 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
