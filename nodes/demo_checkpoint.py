"""Load PLADIS Demo Model: a small text-to-image model that comes with the pack, to see PLADIS in seconds."""

from __future__ import annotations

from comfy_api.latest import io
from typing_extensions import override

from .hosting.demo_model import load_demo_model, saved_checkpoints
from .inputs import SEARCH_ALIASES

# in the node's menu: the file in demo/weights
UNETS = {"standard": "unet", "few-step": "unet_few_step"}


class PLADISDemoCheckpoint(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISDemoCheckpoint",
            display_name="Load PLADIS Demo Model",
            category="model/patch",
            description="A small text-to-image model that comes with this pack and draws coloured shapes in seconds, "
            "without a GPU. Wire it like a checkpoint, with an Empty Latent Image of 64 x 64. It knows only words such "
            "as 'a red circle left of a blue square'; an unknown word gets an error that lists those it knows.",
            search_aliases=[*SEARCH_ALIASES, "demo", "example", "test model"],
            inputs=[
                io.Combo.Input(
                    "variant",
                    options=[*UNETS, *saved_checkpoints()],
                    default="standard",
                    tooltip="standard: 20 steps of euler with the simple scheduler, CFG 3. few-step: distilled from "
                    "it, 4 steps of the same, CFG 1. Checkpoints that you saved from either follow them in the list.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The diffusion model; every model node works on it."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder, for CLIP Text Encode."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder: 64 x 64 pixels, four to a latent."),
            ],
        )

    @classmethod
    @override
    def execute(cls, variant: str) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_model(UNETS.get(variant, variant)))
