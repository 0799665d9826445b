"""PLADIS Sweep: the same sampling at several scales and alphas, side by side.

The host expands the node into one Apply PLADIS, one KSampler and one VAE Decode per cell, so that every cell shows its
progress and is cached: a list that grows by one scale samples that one alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder
from typing_extensions import override

from .hosting import concatenate, numbers, samplers, schedulers
from .inputs import SEARCH_ALIASES
from .pictures import draw_grid

MAX_CELLS = 64
Cells = io.Custom("PLADIS_CELLS")


class PLADISSweep(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISSweep",
            display_name="PLADIS Sweep",
            category="model/patch",
            description="Samples the same latent with the same seed at every scale and alpha of two lists, and draws "
            "the pictures side by side. Finished cells stay cached: interrupt, change the lists, and only new cells "
            "are sampled.",
            search_aliases=[*SEARCH_ALIASES, "xy plot", "grid", "compare", "sweep"],
            # links, not values, go into the cells: the host's cache cannot compare models
            inputs=[
                io.Model.Input(
                    "model",
                    raw_link=True,
                    tooltip="Each cell applies its own PLADIS, in place of an Apply node before this one.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="The noise, the same in every cell.",
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
    def execute(cls, model, vae, scales: str, alphas: str, **sampling) -> io.NodeOutput:
        columns = numbers("scales", scales, 0.0, 10.0)
        rows = numbers("alphas", alphas, 1.0, 2.0)
        if len(columns) * len(rows) > MAX_CELLS:
            raise ValueError(
                f"{len(columns)} scales x {len(rows)} alphas are {len(columns) * len(rows)} cells, more than "
                f"{MAX_CELLS}: shorten scales or alphas."
            )
        graph = GraphBuilder()
        sampled, cells = {}, None
        for alpha in rows:
            for scale in columns:
                settings, label = cell(scale, alpha, len(rows) > 1)
                if settings not in sampled:
                    sampled[settings] = sample(graph, model, vae, settings, sampling)
                latent, image = sampled[settings]
                link = {} if cells is None else {"before": cells}
                cells = graph.node("PLADISSweepCell", latent=latent, image=image, label=label, **link).out(0)
        grid = graph.node("PLADISSweepGrid", cells=cells, columns=len(columns))
        return io.NodeOutput(grid.out(0), grid.out(1), expand=graph.finalize())


# off, whatever the row's alpha; set, and not left out: the model may come from an Apply node
BASELINE = 0.0, 1.5


def cell(scale: float, alpha: float, several_alphas: bool) -> tuple[tuple[float, float], str]:
    """(scale, alpha), the same for every baseline; and the cell's label."""
    if scale == 0.0 or alpha == 1.0:
        return BASELINE, "baseline (scale 0)" if scale == 0.0 else "baseline (alpha 1)"
    return (scale, alpha), f"scale {scale:g}" + (f", alpha {alpha:g}" if several_alphas else "")


def sample(graph: GraphBuilder, model, vae, settings: tuple[float, float], sampling: dict):
    """The nodes of one cell; the links to its latent and its image."""
    scale, alpha = settings
    # its id is part of what the host caches it by, so a longer list must not change it
    apply = graph.node(
        "PLADISApply", f"apply_{scale:g}_{alpha:g}", model=model, scale=scale, alpha=alpha, start_percent=0.0,
        end_percent=1.0,
    )  # fmt: skip
    latent = graph.node("KSampler", model=apply.out(0), **sampling).out(0)
    return latent, graph.node("VAEDecode", samples=latent, vae=vae).out(0)


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
            inputs=[
                io.Latent.Input("latent", tooltip="The cell's latent."),
                io.Image.Input("image", tooltip="The cell's picture."),
                io.String.Input("label", tooltip="What stands over it."),
                Cells.Input("before", optional=True, tooltip="The cells before it."),
            ],
            outputs=[Cells.Output(display_name="cells", tooltip="The cells up to this one.")],
        )

    @classmethod
    @override
    def execute(
        cls, latent: list[dict], image: list[torch.Tensor], label: list[str], before: Sequence[tuple] = ((),)
    ) -> io.NodeOutput:
        sizes = {tuple(picture.shape[1:3]) for picture in image}
        if len(sizes) > 1:
            described = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise ValueError(f"The list that goes into PLADIS Sweep has pictures of several sizes: {described}.")
        cell = together(latent), torch.cat(image), label[0]
        return io.NodeOutput((*before[0], cell))


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
