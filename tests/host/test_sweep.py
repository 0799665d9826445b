"""The parts of PLADIS Sweep that need no server; test_server.py runs it in one."""

from __future__ import annotations

import re

import pytest
import torch
from comfy.nested_tensor import NestedTensor

from pladis_pack.nodes.hosting import layer_lists, numbers, whole_numbers
from pladis_pack.nodes.sweep import Cell, PLADISSweep, PLADISSweepCell, PLADISSweepGrid, cell, check_size


def collect(latents: list, images: list) -> tuple:
    cells = {}
    for number, (latent, image) in enumerate(zip(latents, images, strict=True)):
        (before,) = PLADISSweepCell.execute(
            [{"samples": latent}], [image], [f"cell {number}"], [2], [len(images)], **cells
        ).result
        cells = {"before": [before]}
    return before


def test_latents_of_a_video_with_sound_stay_two_tensors():
    latents = [NestedTensor([torch.full((1, 4, 2, 3, 3), float(i)), torch.full((1, 2, 5), float(i))]) for i in range(3)]
    batch, grid = PLADISSweepGrid.execute(collect(latents, [torch.rand(2, 16, 16, 3)] * 3), 3).result
    video, sound = batch["samples"].unbind()
    assert video[:, 0, 0, 0, 0].tolist() == sound[:, 0, 0].tolist() == [0.0, 1.0, 2.0]
    # a grid for every frame
    assert grid.shape[0] == 2


def test_cells_stay_in_order_and_the_grid_holds_them():
    images = [torch.full((1, 100, 120, 3), i / 4) for i in range(4)]
    latents = [torch.full((1, 4, 2, 2), float(i)) for i in range(4)]
    batch, grid = PLADISSweepGrid.execute(collect(latents, images), 2).result
    assert batch["samples"][:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    # twice as large: below 256 pixels a cell is enlarged by a whole factor
    assert grid.shape == (1, 2 * 224 + 4, 2 * 244 + 4, 3)
    centres = [grid[0, y, x, 0] for y in (124, 348) for x in (124, 368)]
    assert [round(float(c) * 4) for c in centres] == [0, 1, 2, 3]


def test_a_list_is_a_batch_of_the_cell():
    latents = [{"samples": torch.full((1, 4, 2, 2), float(i))} for i in range(2)]
    pictures = [torch.rand(1, 16, 16, 3), torch.rand(1, 16, 16, 3)]
    ((latent, image, label),) = PLADISSweepCell.execute(latents, pictures, ["scale 2"], [1], [1]).result[0]
    assert latent["samples"][:, 0, 0, 0].tolist() == [0.0, 1.0] and image.shape[0] == 2 and label == "scale 2"
    with pytest.raises(ValueError, match="several sizes: 16 x 16, 32 x 24"):
        PLADISSweepCell.execute(latents, [pictures[0], torch.rand(1, 24, 32, 3)], ["scale 2"], [1], [1])


@pytest.mark.parametrize("text", ("0, 1.5,2", " 0;1.5 2\r\n", "0,1.5,2,,", "0 0 1.5 2", "0，1.5、2", "0；1.5\n2"))
def test_lists_are_read_as_people_write_them(text):
    assert numbers("scales", text, 0.0, 10.0) == [0.0, 1.5, 2.0]


@pytest.mark.parametrize(("text", "message"), (
    ("0, 0,5, 1", "0,5 could be one number or two. Write 0.5"), ("0;1,5", "Write 1.5"), ("0,5 1,5", "Write 0.5"),
    ("", "scales: the list is empty"), (" ,； ", "scales: the list is empty"), ("1" * 5000, "inf lies outside 0 to 10"),
    ("x" * 5000, f"'{'x' * 40}...' is not a number"), ("nan", "nan lies outside"),
))  # fmt: skip
def test_what_is_no_list_of_numbers_is_said(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        numbers("scales", text, 0.0, 10.0)


def test_numbers_without_a_space_behind_their_commas_are_a_list():
    assert numbers("scales", "0,1,2", 0.0, 10.0) == [0.0, 1.0, 2.0]
    assert numbers("scales", "0,2", 0.0, 10.0) == [0.0, 2.0]


def test_whole_numbers_keep_every_digit():
    assert whole_numbers("seeds", "18446744073709551615，3 3;0", 0, 2**64 - 1) == [2**64 - 1, 3, 0]
    for text, message in {"1.5": "'1.5' is not a whole number", "x": "'x'", "-1": "-1 lies outside 0 to 9",
                          "1" * 5000: "lies outside", ",": "the list is empty"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^seeds: .*{re.escape(message)}"):
            whole_numbers("seeds", text, 0, 9)


@pytest.mark.parametrize(("text", "choices"), (
    ("", []), ("all", ["all"]), ("all; d0-1,m0; u1-3", ["all", "d0-1,m0", "u1-3"]), ("d0, m0\nAll", ["d0,m0", "all"]),
    ("all, down+up, d0, d1", ["all", "down + up", "d0,d1"]), ("Down + Up；all；all", ["down + up", "all"]),
))  # fmt: skip
def test_lists_of_blocks_keep_their_commas(text, choices):
    assert layer_lists(text) == choices


def test_a_label_says_all_that_differs():
    asked = Cell(3, 2.0, 1.25, 0.5, 0.0, "d0,m0")
    every = {"seeds", "alphas", "layers", "end_percents", "norm_caps"}
    assert cell(asked, set()) == (asked, "scale 2")
    assert cell(asked, every) == (asked, "scale 2, alpha 1.25, d0,m0, end 0.5, no cap, seed 3")
    # whatever else its row says
    assert cell(asked._replace(scale=0.0), every) == (Cell(3), "baseline (scale 0), seed 3")
    assert cell(asked._replace(alpha=1.0), {"alphas"}) == (Cell(3), "baseline (alpha 1)")


def test_too_many_cells_are_refused_by_the_lists_that_are_long():
    with pytest.raises(ValueError, match="^5 scales x 13 seeds are 65 cells, more than 64: shorten scales or seeds.$"):
        check_size({"scales": [*range(5)], "alphas": [1.5], "seeds": [*range(13)]})


def graph_of(**lists) -> dict:
    links = {name: [name, 0] for name in ("model", "vae", "positive", "negative", "latent_image")}
    sampling = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return PLADISSweep.execute(seed=7, **{"scales": "0, 2", "alphas": "1.5"}, **links, **sampling, **lists).expand


def of_kind(graph: dict, kind: str) -> list[dict]:
    return [node["inputs"] for node in graph.values() if node["class_type"] == kind]


def test_a_workflow_from_before_the_other_axes_means_what_it_meant(monkeypatch):
    monkeypatch.setattr("pladis_pack.nodes.sweep._earlier", {})
    graph = graph_of()
    assert [inputs["seed"] for inputs in of_kind(graph, "KSampler")] == [7, 7]
    applied = of_kind(graph, "PLADISApply")
    assert [(a["scale"], a["alpha"], a["start_percent"], a["end_percent"]) for a in applied] == [
        (0.0, 1.5, 0.0, 1.0), (2.0, 1.5, 0.0, 1.0),
    ]  # fmt: skip
    assert not of_kind(graph, "PLADISApplyAdvanced")
    assert [c["label"] for c in of_kind(graph, "PLADISSweepCell")] == ["baseline (scale 0)", "scale 2"]


def test_every_axis_comes_to_its_node(monkeypatch):
    monkeypatch.setattr("pladis_pack.nodes.sweep._earlier", {})
    graph = graph_of(seeds="1, 2", end_percents="0.5, 1", norm_caps="0, 1", layers="all; d0,m0; down + up")
    # two baselines, and of each seed 3 x 2 x 2
    assert sorted(inputs["seed"] for inputs in of_kind(graph, "KSampler")) == [1] * 13 + [2] * 13
    assert len(of_kind(graph, "VAEDecode")) == 26 and len(of_kind(graph, "PLADISSweepCell")) == 48
    found = {(a["layers"], a["blocks"], a["norm_cap"], a["end_percent"]) for a in of_kind(graph, "PLADISApplyAdvanced")}
    chosen = ("custom", "d0,m0"), ("down + up", "")
    others = {(*name, cap, end) for name in chosen for cap in (0.0, 1.0) for end in (0.5, 1.0)}
    assert found == others | {("all", "", 1.0, 0.5), ("all", "", 1.0, 1.0)}
    assert all(a["apply_to"] == "both" and a["start_percent"] == 0.0 for a in of_kind(graph, "PLADISApplyAdvanced"))


def test_a_long_label_is_broken_and_a_grid_has_room_for_what_comes():
    from pladis_pack.nodes.pictures import _lines, draw_grid, draw_preview

    cells = [torch.ones(1, 64, 64, 3)]
    one, long = draw_grid(cells, ["scale 2"], 1), draw_grid(cells, ["scale 2, alpha 1.5, d0-1,m0, end 0.5, seed 3"], 1)
    assert one.shape[1:3] == (64 + 20 + 8, 104) and (long.shape[1] - one.shape[1]) % 20 == 0
    assert long.shape[1] > one.shape[1]
    assert _lines("scale 2, d0-1.0-1,d2-3.0-9,m0, seed 3", 60) == ["scale 2", "d0-1.0-1,", "d2-3.0-9,m0", "seed 3"]
    # every line stands inside: the outermost columns are the background's
    assert (long[0, :, :2] == long[0, 0, 0]).all() and (long[0, :, -2:] == long[0, 0, 0]).all()
    grown = draw_preview([torch.ones(2, 2048, 1024, 3)] * 3, ["a", "b", "c"], 2, 6)
    assert grown.shape[0] == 1 and 768 <= grown.shape[1] <= 768 + 3 * 24 + 4
    # the fourth and later are not there yet
    assert grown[0, : grown.shape[1] // 3, grown.shape[2] // 4].max() == 1 and grown[0, -200:].max() < 0.2
