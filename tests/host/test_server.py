"""The pack in a real ComfyUI server: it loads, samples the demo model, and reports errors at its own node."""

from __future__ import annotations

import json
import re
from io import BytesIO

import pytest

from comfy_server import PACK_FOLDER
from pladis_pack.demo.oracle import read, score
from pladis_pack.demo.vocabulary import read_caption

CAPTION = "a red circle left of a blue square"
APPLY, SAMPLER = "apply", "sampler"
BASIC = {"scale": 2.0, "alpha": 1.5, "start_percent": 0.0, "end_percent": 1.0}
# as workflows from before force_unknown name them
ADVANCED = {**BASIC, "layers": "all", "blocks": "", "apply_to": "both"}
SINCE = {"force_unknown": False, "scale_schedule": "constant", "end_scale": 0.0, "norm_cap": 0.0, "tokens": "all",
         "prompt": ""}  # fmt: skip
BLOCKS = [*(f"d{i}.0" for i in range(2)), "m0.0", *(f"u{i}.0" for i in range(3))]


def workflow(node: str | None = None, seed: int = 1, text: str = CAPTION, **inputs) -> dict:
    """Text to image in 64 x 64 pixels, through Apply node `node` if one is given."""
    model = [APPLY, 0] if node else ["demo", 0]
    sampling = {"seed": seed, "steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": model, "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    nodes = {
        "demo": ("PLADISDemoCheckpoint", {"variant": "standard"}),
        "positive": ("CLIPTextEncode", {"clip": ["demo", 1], "text": text}),
        "negative": ("CLIPTextEncode", {"clip": ["demo", 1], "text": ""}),
        "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        SAMPLER: ("KSampler", {**sampling, **links}),
        "decode": ("VAEDecode", {"samples": [SAMPLER, 0], "vae": ["demo", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "pladis"}),
    }
    if node:
        nodes[APPLY] = (node, {"model": ["demo", 0], **inputs})
    return {name: {"class_type": kind, "inputs": values} for name, (kind, values) in nodes.items()}


def basic(scale: float, **inputs) -> dict:
    return workflow("PLADISApply", **{**BASIC, "scale": scale, **inputs})


def advanced(**inputs) -> dict:
    return workflow("PLADISApplyAdvanced", **{**ADVANCED, **inputs})


def image(server, workflow: dict):
    """The pixels that a workflow saves, as an int array; fails if it did not run or if sampling was skipped."""
    # both come with the host
    import numpy
    from PIL import Image

    entry = server.run(workflow)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert SAMPLER not in messages(entry)["execution_cached"]["nodes"], "taken from the server's cache"
    (saved,) = entry["outputs"]["save"]["images"]
    return numpy.asarray(Image.open(BytesIO(server.view(saved))).convert("RGB")).astype(int)


def error(server, workflow: dict) -> dict:
    """What the server reports about a workflow that fails."""
    entry = server.run(workflow)
    assert entry["status"]["status_str"] == "error", entry["status"]
    return messages(entry)["execution_error"]


def messages(entry: dict) -> dict[str, dict]:
    return dict(entry["status"]["messages"])


@pytest.fixture(scope="module")
def baseline(server):
    """The picture without PLADIS."""
    return image(server, workflow())


@pytest.fixture(scope="module")
def scale_2(server):
    """The same picture with PLADIS."""
    return image(server, basic(2.0))


@pytest.mark.parametrize(
    ("node", "inputs"), [("PLADISApply", BASIC), ("PLADISApplyAdvanced", {**ADVANCED, **SINCE})],
    ids=["basic", "advanced"]
)
def test_the_server_offers_the_documented_node(server, node, inputs):
    info = json.loads(server.get(f"/object_info/{node}"))[node]
    offered = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert [name for name in offered if name != "clip"] == ["model", *inputs]
    assert all(options.get("tooltip") for _, options in offered.values())
    assert {name: offered[name][1].get("default") for name in inputs} == inputs
    assert info["output"] == ["MODEL"]
    assert len(info["output_tooltips"]) == 1 and all(info["output_tooltips"])
    assert info["category"] == "model/patch"
    assert info["python_module"] == f"custom_nodes.{PACK_FOLDER}"


def test_the_server_offers_the_demo_model(server):
    info = json.loads(server.get("/object_info/PLADISDemoCheckpoint"))["PLADISDemoCheckpoint"]
    assert list(info["input"]["required"]) == ["variant"]
    assert info["output"] == ["MODEL", "CLIP", "VAE"]
    assert len(info["output_tooltips"]) == 3 and all(info["output_tooltips"])


def test_nothing_fails_to_import(server):
    log = server.log()
    assert PACK_FOLDER in log
    assert "IMPORT FAILED" not in log, log[-4000:]


def test_the_demo_model_is_complete_and_makes_a_picture(server, baseline):
    """Else the other tests would say nothing."""
    assert not re.findall(r".*(?:clip|unet) (?:missing|unexpected).*|.*Missing VAE keys.*", server.log())
    assert_is_a_picture(baseline)


def assert_is_a_picture(pixels) -> None:
    assert pixels.shape == (64, 64, 3)
    # a blank picture has one colour; NaN is saved as black
    assert pixels.std() > 8
    assert 16 < pixels.mean() < 254


def test_scale_0_changes_no_pixel(server, baseline):
    assert (image(server, basic(0.0)) == baseline).all()


def test_alpha_1_changes_no_pixel(server, baseline):
    assert (image(server, basic(2.0, alpha=1.0)) == baseline).all()


def test_scale_2_changes_the_picture(baseline, scale_2, record_property):
    assert_is_a_picture(scale_2)
    difference = abs(scale_2 - baseline)
    record_property("mean_difference", float(difference.mean()))
    record_property("max_difference", int(difference.max()))
    print(f"scale 2: mean difference {difference.mean():.2f}, max {difference.max()}, of 255")
    assert difference.mean() > 2


def test_advanced_with_its_defaults_is_the_basic_node(server, scale_2):
    assert (image(server, advanced()) == scale_2).all()


def test_a_workflow_queued_again_gives_the_same_picture(server, scale_2):
    # the server caches the last workflow only: with another in between, the picture is computed again
    assert (image(server, basic(0.5)) != scale_2).any()
    assert (image(server, basic(2.0)) == scale_2).all()


def test_the_patched_model_leaves_the_plain_one_alone(server, baseline):
    image(server, basic(2.0, seed=2))
    assert (image(server, workflow()) == baseline).all()


@pytest.mark.parametrize("entry", ["d9", "x1"])
def test_a_wrong_block_is_an_error_of_its_node(server, entry):
    found = error(server, advanced(layers="custom", blocks=entry))
    assert found["node_id"] == APPLY
    assert found["node_type"] == "PLADISApplyAdvanced"
    assert found["exception_type"] == "ValueError"
    assert entry in found["exception_message"]
    assert ", ".join(BLOCKS) in found["exception_message"]


@pytest.mark.parametrize("node", [basic, advanced])
def test_a_backward_window_is_an_error_of_its_node(server, node):
    found = error(server, node(scale=2.0, start_percent=0.8, end_percent=0.2))
    assert found["node_id"] == APPLY
    assert found["exception_type"] == "ValueError"
    assert all(word in found["exception_message"] for word in ("start_percent 0.8", "end_percent 0.2"))


def test_the_server_samples_after_an_error(server):
    error(server, advanced(layers="custom", blocks="d9"))
    assert_is_a_picture(image(server, advanced(layers="custom", blocks="d0-1", seed=2)))


def test_an_unknown_word_is_an_error_of_the_text_node(server):
    found = error(server, workflow(text="a red umbrella"))
    assert found["node_type"] == "CLIPTextEncode"
    assert "'umbrella'" in found["exception_message"] and "circle" in found["exception_message"]


@pytest.mark.parametrize("node", [None, "PLADISApply"])
def test_the_picture_shows_the_caption(server, node):
    """A trained model through a whole server: what is asked for is there, by the oracle's reading."""
    wanted, found = 0, 0
    for seed in range(4):
        pixels = image(server, workflow(node, seed=100 + seed, **({**BASIC, "scale": 0.5} if node else {})))
        result = score(read_caption(CAPTION), read(pixels.astype("uint8")))
        wanted, found = wanted + result.named, found + result.found
    assert found / wanted > 0.7


def sweep(scales: str, alphas: str = "1.5", seed: int = 1, batch: int = 1, steps: int = 8, **others) -> dict:
    nodes = workflow(seed=seed)
    sampler = nodes.pop(SAMPLER)["inputs"]
    lists = {"vae": ["demo", 2], "scales": scales, "alphas": alphas, **others}
    nodes["sweep"] = {"class_type": "PLADISSweep", "inputs": {**sampler, "steps": steps, **lists}}
    nodes["latent"]["inputs"]["batch_size"] = batch
    nodes["decode"]["inputs"]["samples"] = ["sweep", 0]
    nodes["grid"] = {"class_type": "SaveImage", "inputs": {"images": ["sweep", 1], "filename_prefix": "grid"}}
    return nodes


def pictures(server, entry: dict, node: str) -> list:
    import numpy
    from PIL import Image

    assert entry["status"]["status_str"] == "success", entry["status"]
    saved = entry["outputs"][node]["images"]
    return [numpy.asarray(Image.open(BytesIO(server.view(image))).convert("RGB")).astype(int) for image in saved]


def same(cell, single) -> bool:
    """Decoded in a batch a picture rounds otherwise, which the host's truncation to 8 bits makes 1 of 255 here and
    there."""
    difference = abs(cell - single)
    return difference.max() <= 1 and (difference > 0).mean() < 1e-3


def sampled_cells(server, workflow: dict) -> tuple[dict, int]:
    """A run, and in how many of its cells the server sampled."""
    before = runs(server)
    entry = server.run(workflow)
    return entry, runs(server) - before


def runs(server) -> int:
    """Progress bars that began: one for each run of a sampler."""
    return server.log().count("| 0/")


def test_a_sweep_is_what_single_nodes_make(server, baseline, scale_2):
    entry, sampled = sampled_cells(server, sweep("0, 2", "1.5, 1"))
    cells = pictures(server, entry, "save")
    assert len(cells) == 4
    assert same(cells[0], baseline)
    assert same(cells[1], scale_2)
    # at alpha 1 everything is the baseline, which is sampled once
    assert same(cells[2], baseline) and same(cells[3], baseline)
    assert sampled <= 2
    (grid,) = pictures(server, entry, "grid")
    # pixels of small pictures are enlarged by a whole factor
    assert grid.shape == (2 * (256 + 20 + 4) + 4, 2 * (256 + 4) + 4, 3)
    # the host truncates to 8 bits, the grid rounds
    assert (abs(grid[24:280:4, 4:260:4] - baseline) <= 1).all()


def test_a_sweep_behind_an_apply_node_has_a_plain_baseline(server, baseline, scale_2):
    behind = sweep("0, 2")
    behind["apply"] = {"class_type": "PLADISApply", "inputs": {"model": ["demo", 0], **BASIC, "scale": 3.0}}
    behind["sweep"]["inputs"]["model"] = ["apply", 0]
    cells = pictures(server, server.run(behind), "save")
    assert same(cells[0], baseline) and same(cells[1], scale_2)


def test_a_list_of_latents_into_a_sweep(server):
    """As a batch of as many: every cell has them all."""
    listed = sweep("0, 2", seed=8, batch=2)
    listed["list"] = {"class_type": "RebatchLatents", "inputs": {"latents": ["latent", 0], "batch_size": 1}}
    listed["sweep"]["inputs"]["latent_image"] = ["list", 0]
    entry = server.run(listed)
    cells = pictures(server, entry, "save")
    assert len(cells) == 4 and len(pictures(server, entry, "grid")) == 2
    assert (cells[0] != cells[2]).any()


def test_only_new_cells_are_sampled(server):
    _, first = sampled_cells(server, sweep("0, 1", seed=5))
    entry, second = sampled_cells(server, sweep("0, 1, 3", seed=5))
    assert (first, second) == (2, 1)
    assert len(pictures(server, entry, "save")) == 3


def test_cells_of_a_shortened_list_are_not_sampled_again(server):
    counts = [sampled_cells(server, sweep(scales, seed=15))[1] for scales in ("0, 1, 2", "1", "0, 1, 2")]
    assert counts == [3, 0, 0]


def test_the_other_axes_are_what_single_nodes_make(server, baseline, scale_2):
    lists = {"seeds": "1, 2", "norm_caps": "0, 1", "layers": "all; d0-1", "end_percents": "1, 0.5"}
    entry, sampled = sampled_cells(server, sweep("0, 2", **lists))
    cells = pictures(server, entry, "save")
    assert len(cells) == 32 and sampled <= 18
    assert same(cells[0], baseline) and same(cells[1], scale_2)
    last = {**BASIC, "end_percent": 0.5}, {"layers": "custom", "blocks": "d0-1", "norm_cap": 1.0}
    single = workflow("PLADISApplyAdvanced", seed=2, **{**ADVANCED, **SINCE, **last[0], **last[1]})
    assert same(cells[31], image(server, single))
    assert len({cell.tobytes() for cell in cells}) == 18


def test_a_sweep_of_a_batch_has_a_grid_for_each_of_its_pictures(server):
    entry = server.run(sweep("0, 2", seed=6, batch=2))
    assert len(pictures(server, entry, "save")) == 4
    grids = pictures(server, entry, "grid")
    assert len(grids) == 2
    assert (grids[0] != grids[1]).any()


def test_interrupting_keeps_the_cells_that_are_done(server):
    import threading
    import time

    long = sweep("0, 0.5, 1, 1.5, 2, 2.5", seed=9, steps=60)
    before = runs(server)

    def interrupt():
        while runs(server) < before + 3:
            time.sleep(0.02)
        server.get("/interrupt", b"{}")

    thread = threading.Thread(target=interrupt)
    thread.start()
    entry = server.run(long)
    thread.join()
    assert "execution_interrupted" in messages(entry)
    # what was done is in the history, as a picture with room for the rest
    drawn = [name for name in entry["outputs"] if name.startswith("sweep.")]
    assert 1 <= len(drawn) <= 3
    entry["status"]["status_str"] = "success"
    for name in drawn:
        (picture,) = pictures(server, entry, name)
        assert picture.shape[1] == 6 * (96 + 4) + 4 and picture[-20:, -90:].max() < 60 < picture[-20:, :90].max()
    entry, sampled = sampled_cells(server, long)
    # two were done when the third began
    assert 1 <= sampled <= 4
    assert len(pictures(server, entry, "save")) == 6


@pytest.mark.parametrize(
    ("scales", "alphas", "message"),
    [("0, x", "1.5", "'x' is not a number"), ("", "1.5", "scales: the list is empty"),
     ("1", "2.5", "2.5 lies outside 1 to 2"),
     (",".join(map(str, range(10))), "1.1,1.2,1.3,1.4,1.5,1.6,1.7", "70 cells")],
    ids=["word", "empty", "range", "too many"],
)
def test_a_wrong_list_is_an_error_of_the_sweep(server, scales, alphas, message):
    found = error(server, sweep(scales, alphas))
    assert found["node_id"] == "sweep"
    assert message in found["exception_message"]


def test_the_attention_map_in_a_workflow(server):
    nodes = workflow()
    nodes["map"] = {
        "class_type": "PLADISAttentionMap",
        "inputs": {
            "model": ["demo", 0], "positive": ["positive", 0], "latent": [SAMPLER, 0], "clip": ["demo", 1],
            "image": ["decode", 0], "words": "red circle, square", "prompt": CAPTION, "percent": 0.3, "scale": 2.0,
            "alpha": 1.5, "layers": "all", "blocks": "", "seed": 0,
        },
    }  # fmt: skip
    nodes["maps"] = {"class_type": "SaveImage", "inputs": {"images": ["map", 0], "filename_prefix": "maps"}}
    nodes["report"] = {"class_type": "SaveImage", "inputs": {"images": ["map", 2], "filename_prefix": "report"}}
    nodes["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["map", 1]}}
    entry = server.run(nodes)
    assert len(pictures(server, entry, "maps")) == 6
    assert len(pictures(server, entry, "report")) == 1
    assert "red circle: tokens #2, #3" in str(entry["outputs"]["text"])
