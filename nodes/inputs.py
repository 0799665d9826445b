"""The inputs and the output that both Apply nodes share. Saved workflows carry names and order: never change them."""

from __future__ import annotations

from comfy_api.latest import io

# of every node; what the method is known by finds Apply PLADIS, before nodes that merely belong to it
SEARCH_ALIASES = ["pladis"]


def common_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The diffusion model. PLADIS runs in its text cross-attention."),
        io.Float.Input(
            "scale",
            default=2.0,
            min=0.0,
            max=10.0,
            step=0.05,
            tooltip="Lambda. 0 is off, 1 replaces softmax by its sparse form, 2 is the paper's choice and extrapolates "
            "past it. Going higher pushes each place harder towards its words, and above 3 smooths textures and makes "
            "artefacts. "
            "Checkpoints trained on tags (Pony, Illustrious) want less.",
        ),
        io.Float.Input(
            "alpha",
            default=1.5,
            min=1.0,
            max=2.0,
            step=0.05,
            tooltip="How sparse the attention is that scale pushes towards: 1 is softmax (no effect), 1.5 the paper's "
            "choice, 2 sparsemax. Going higher ignores more words at each place of the picture.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Where in the noise schedule PLADIS starts: 0 is the first step. Going higher leaves the layout of "
            "the picture to the plain model.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.001,
            advanced=True,
            tooltip="Where in the noise schedule PLADIS stops: 1 is the last step. Going lower leaves fine texture to "
            "the plain model.",
        ),
    ]


def model_output() -> io.Output:
    return io.Model.Output(
        display_name="model",
        tooltip="A copy of the model with PLADIS. It composes with other model patches in any order of the nodes.",
    )


def unique_id(node: type[io.ComfyNode]) -> str | None:
    """The id of the node that runs, where a person has it in a graph; not of a node that PLADIS Sweep makes."""
    name = getattr(node.hidden, "unique_id", None)
    return None if name is None or "." in str(name) else name
