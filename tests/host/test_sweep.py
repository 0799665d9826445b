"""The parts of PLADIS Sweep that need no server; test_server.py runs it in one."""

from __future__ import annotations

import re

import pytest
import torch
from comfy.nested_tensor import NestedTensor

from pladis_pack.nodes.hosting import numbers
from pladis_pack.nodes.sweep import PLADISSweepCell, PLADISSweepGrid


def collect(latents: list, images: list) -> tuple:
    cells = {}
    for number, (latent, image) in enumerate(zip(latents, images, strict=True)):
        (before,) = PLADISSweepCell.execute([{"samples": latent}], [image], [f"cell {number}"], **cells).result
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
    ((latent, image, label),) = PLADISSweepCell.execute(latents, pictures, ["scale 2"]).result[0]
    assert latent["samples"][:, 0, 0, 0].tolist() == [0.0, 1.0] and image.shape[0] == 2 and label == "scale 2"
    with pytest.raises(ValueError, match="several sizes: 16 x 16, 32 x 24"):
        PLADISSweepCell.execute(latents, [pictures[0], torch.rand(1, 24, 32, 3)], ["scale 2"])


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
