"""PLADIS Sweep: the same sampling with several settings and seeds, side by side.

The host expands the node into one Apply node, one KSampler and one VAE Decode per cell, so that every cell shows its
progress and is cached: a list that grows by one scale samples that one alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import GraphBuilder
from typing_extensions import override

from .hosting import LAYER_CHOICES, concatenate, layer_lists, numbers, samplers, schedulers, whole_numbers
from .inputs import SEARCH_ALIASES
from .pictures import draw_grid, draw_preview

MAX_CELLS, MAX_SEED = 64, 0xFFFFFFFFFFFFFFFF
Cells = io.Custom("PLADIS_CELLS")


class Cell(NamedTuple):
    """What a cell is sampled with."""

    seed: int
    scale: float = 0.0
    alpha: float = 1.5
    end_percent: float = 1.0
    norm_cap: float = 0.0
    layers: str = "all"


# of earlier lists, the newest last; MOST_KEPT latents are small beside one model
_earlier: dict[Cell, None] = {}
MOST_KEPT = 128


class PLADISSweep(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISSweep",
            display_name="PLADIS Sweep",
            category="model/patch",
            description="Samples the same latent with the same seed at every scale and alpha of two lists, and draws "
            "the pictures side by side as they come; also with several seeds, windows, caps and layers. Finished cells "
            "stay cached: interrupt, change the lists, and only new cells are sampled.",
            search_aliases=[*SEARCH_ALIASES, "xy plot", "grid", "compare", "sweep", "several seeds"],
            # links, not values, go into the cells: the host's cache cannot compare models
            inputs=[
                io.Model.Input(
                    "model",
                    raw_link=True,
                    tooltip="Each cell applies its own PLADIS, in place of an Apply node before this one.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
                    tooltip="The noise, the same in every cell. Not used where seeds has a list.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of each cell."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Classifier-free guidance. 1 for guidance-distilled and few-step models. Going higher "
                    "pushes harder towards the prompt and burns colours.",
                ),
                io.Combo.Input("sampler_name", options=samplers(), tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=schedulers(), tooltip="As in KSampler."),
                io.Conditioning.Input("positive", raw_link=True, tooltip="The encoded prompt."),
                io.Conditioning.Input("negative", raw_link=True, tooltip="The encoded negative prompt."),
                io.Latent.Input(
                    "latent_image", raw_link=True, tooltip="The latent to denoise, the same in every cell."
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Going lower keeps more of latent_image.",
                ),
                io.Vae.Input("vae", raw_link=True, tooltip="Decodes the cells for the grid."),
                io.String.Input(
                    "scales",
                    default="0, 1, 2, 3",
                    tooltip="Lambdas, with commas between; one column each. 0 is the baseline, without PLADIS.",
                ),
                io.String.Input("alphas", default="1.5", tooltip="From 1 to 2, with commas between; one row each."),
                # from here on, workflows that were saved before do not have them
                io.String.Input(
                    "seeds",
                    default="",
                    optional=True,
                    tooltip="Seeds, with commas between; all rows once for each. One seed says little: three or more "
                    "show what a setting does and what is chance. Empty: the seed above.",
                ),
                io.String.Input(
                    "end_percents",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Where PLADIS stops in the noise schedule, as end_percent of Apply PLADIS: from 0 to 1, "
                    "with commas between; one row each. Empty: 1, the last step.",
                ),
                io.String.Input(
                    "norm_caps",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="As norm_cap of Apply PLADIS (Advanced), with commas between; one row each. 0 or empty: no "
                    "limit.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="all, down + up, or lists of blocks as in Apply PLADIS (Advanced), with semicolons "
                    "between: all; d0-1,m0; u1-3. One row each. Empty: all.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", tooltip="All cells in one batch, row by row."),
                io.Image.Output(
                    display_name="grid",
                    tooltip="The labelled pictures: one image, or one per picture of the batch and frame of a video.",
                ),
            ],
            enable_expand=True,
        )  # fmt: skip

    @classmethod
    @override
    def execute(
        cls,
        model,
        vae,
        seed: int,
        scales: str,
        alphas: str,
        seeds: str = "",
        end_percents: str = "",
        norm_caps: str = "",
        layers: str = "",
        **sampling,
    ) -> io.NodeOutput:
        columns = numbers("scales", scales, 0.0, 10.0)
        # the last varies fastest: what is compared stands below each other, with one seed
        rows = {
            "seeds": whole_numbers("seeds", seeds, 0, MAX_SEED) if seeds.strip() else [seed],
            "alphas": numbers("alphas", alphas, 1.0, 2.0),
            "layers": layer_lists(layers) or ["all"],
            "end_percents": numbers("end_percents", end_percents, 0.0, 1.0) if end_percents.strip() else [1.0],
            "norm_caps": numbers("norm_caps", norm_caps, 0.0, 10.0) if norm_caps.strip() else [0.0],
        }
        check_size({"scales": columns, **rows})
        varied = {name for name, values in rows.items() if len(values) > 1}
        cells = [
            cell(Cell(number, scale, alpha, end, cap, chosen), varied)
            for number, alpha, chosen, end, cap in product(*rows.values())
            for scale in columns
        ]
        graph = GraphBuilder()
        sampled, collected = {}, None
        for settings, label in cells:
            if settings not in sampled:
                latent = sample(graph, model, settings, sampling)
                sampled[settings] = latent, graph.node("VAEDecode", samples=latent, vae=vae).out(0)
            latent, image = sampled[settings]
            shape = {"columns": len(columns), "total": len(cells)}
            link = {} if collected is None else {"before": collected}
            collected = graph.node("PLADISSweepCell", latent=latent, image=image, label=label, **shape, **link).out(0)
        keep_earlier(graph, model, sampled, sampling)
        grid = graph.node("PLADISSweepGrid", cells=collected, columns=len(columns))
        return io.NodeOutput(grid.out(0), grid.out(1), expand=graph.finalize())


def check_size(lists: dict[str, list]) -> None:
    total = 1
    for values in lists.values():
        total *= len(values)
    if total > MAX_CELLS:
        longer = {name: values for name, values in lists.items() if len(values) > 1}
        described = " x ".join(f"{len(values)} {name}" for name, values in longer.items())
        raise ValueError(f"{described} are {total} cells, more than {MAX_CELLS}: shorten {' or '.join(longer)}.")


def cell(asked: Cell, varied: set[str]) -> tuple[Cell, str]:
    """What to sample, the same for every baseline of a seed; and the label: all that differs between the cells."""
    seed = [f"seed {asked.seed}"] if "seeds" in varied else []
    if asked.scale == 0.0 or asked.alpha == 1.0:
        # off, whatever the row; set, and not left out: the model may come from an Apply node
        kind = "scale 0" if asked.scale == 0.0 else "alpha 1"
        return Cell(asked.seed), ", ".join([f"baseline ({kind})", *seed])
    said = {
        "alphas": f"alpha {asked.alpha:g}",
        "layers": asked.layers,
        "end_percents": f"end {asked.end_percent:g}",
        "norm_caps": f"cap {asked.norm_cap:g}" if asked.norm_cap else "no cap",
    }
    return asked, ", ".join([f"scale {asked.scale:g}", *(text for name, text in said.items() if name in varied), *seed])


def sample(graph: GraphBuilder, model, cell: Cell, sampling: dict):
    """The nodes that sample one cell; the link to its latent."""
    seed, scale, alpha, end_percent, norm_cap, layers = cell
    inputs = {"model": model, "scale": scale, "alpha": alpha, "start_percent": 0.0, "end_percent": end_percent}
    node = "PLADISApply"
    if norm_cap or layers != "all":
        node = "PLADISApplyAdvanced"
        named = layers in LAYER_CHOICES
        chosen = {"layers": layers, "blocks": ""} if named else {"layers": "custom", "blocks": layers}
        inputs |= {**chosen, "apply_to": "both", "norm_cap": norm_cap}
    # its id is part of what the host caches it by, so a longer list must not change it
    name = f"apply_{scale:g}_{alpha:g}_{end_percent:g}_{norm_cap:g}_{layers}"
    apply = graph.node(node, name, **inputs)
    return graph.node("KSampler", model=apply.out(0), seed=seed, **sampling).out(0)


def keep_earlier(graph: GraphBuilder, model, cells: dict[Cell, tuple], sampling: dict) -> None:
    """Puts the cells of earlier lists into the graph, too.

    Nothing asks for them, so they do not run; but what is not in the graph leaves the host's cache, and a list that is
    shortened and then longer again would be sampled anew.
    """
    for earlier in [*_earlier]:
        if earlier in cells:
            del _earlier[earlier]
        else:
            sample(graph, model, earlier, sampling)
    _earlier.update(dict.fromkeys(cells))
    for oldest in [*_earlier][:-MOST_KEPT]:
        del _earlier[oldest]


class PLADISSweepCell(io.ComfyNode):
    """Collects one cell of a sweep after those `before`. Made by PLADIS Sweep, not by people.

    Where a list of latents or of prompts goes into the sweep, the host samples the cell for each of them: together they
    are the cell's batch.
    """

    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISSweepCell",
            display_name="PLADIS Sweep: cell",
            category="model/patch",
            description="A part of PLADIS Sweep, which makes it while it runs.",
            search_aliases=SEARCH_ALIASES,
            is_dev_only=True,
            is_input_list=True,
            # the host then decodes a cell before it samples the next, and shows on PLADIS Sweep what this one draws
            is_output_node=True,
            inputs=[
                io.Latent.Input("latent", tooltip="The cell's latent."),
                io.Image.Input("image", tooltip="The cell's picture."),
                io.String.Input("label", tooltip="What stands over it."),
                io.Int.Input("columns", default=1, min=1, tooltip="Cells in a row."),
                io.Int.Input("total", default=1, min=1, tooltip="Cells of the whole sweep."),
                Cells.Input("before", optional=True, tooltip="The cells before it."),
            ],
            outputs=[Cells.Output(display_name="cells", tooltip="The cells up to this one.")],
        )

    @classmethod
    @override
    def execute(
        cls,
        latent: list[dict],
        image: list[torch.Tensor],
        label: list[str],
        columns: list[int],
        total: list[int],
        before: Sequence[tuple] = ((),),
    ) -> io.NodeOutput:
        sizes = {tuple(picture.shape[1:3]) for picture in image}
        if len(sizes) > 1:
            described = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise ValueError(f"The list that goes into PLADIS Sweep has pictures of several sizes: {described}.")
        cells = (*before[0], (together(latent), torch.cat(image), label[0]))
        _, images, labels = zip(*cells, strict=True)
        return io.NodeOutput(cells, ui=ui.PreviewImage(draw_preview(images, labels, columns[0], total[0])))


class PLADISSweepGrid(io.ComfyNode):
    """Puts the cells of a sweep together. Made by PLADIS Sweep, not by people."""

    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISSweepGrid",
            display_name="PLADIS Sweep: grid",
            category="model/patch",
            description="A part of PLADIS Sweep, which makes it while it runs.",
            search_aliases=SEARCH_ALIASES,
            is_dev_only=True,
            inputs=[
                Cells.Input("cells", tooltip="All cells, row by row."),
                io.Int.Input("columns", default=1, min=1, tooltip="Cells in a row."),
            ],
            outputs=[
                io.Latent.Output(display_name="latents", tooltip="All cells in one batch."),
                io.Image.Output(display_name="grid", tooltip="The labelled pictures."),
            ],
        )

    @classmethod
    @override
    def execute(cls, cells: tuple, columns: int) -> io.NodeOutput:
        latents, images, labels = zip(*cells, strict=True)
        return io.NodeOutput(together(latents), draw_grid([enlarged(i) for i in images], labels, columns))


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """Small pictures (B, H, W, 3) by a whole factor: their pixels are seen as squares, and labels fit over them."""
    factor = max(1, 256 // max(images.shape[1:3]))
    return images.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def together(latents: Sequence[dict]) -> dict:
    """LATENTs in one batch."""
    if len(latents) == 1:
        return latents[0]
    batch = {**latents[0], "samples": concatenate([latent["samples"] for latent in latents])}
    # of one of them
    batch.pop("batch_index", None)
    return batch
