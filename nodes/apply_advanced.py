"""Apply PLADIS with a choice of layers and of prompts."""

from __future__ import annotations

from comfy_api.latest import io
from typing_extensions import override

from .hosting import (
    APPLY_TO,
    LAYER_CHOICES,
    SCHEDULES,
    TOKENS,
    Settings,
    apply_settings,
    block_names,
    check_tokens,
    choose_layers,
    find_target,
)
from .hosting.looking.words import encoded_texts
from .inputs import SEARCH_ALIASES, common_inputs, model_output, unique_id


class PLADISApplyAdvanced(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISApplyAdvanced",
            display_name="Apply PLADIS (Advanced)",
            category="model/patch",
            description="Apply PLADIS with a choice of layers and of prompts. A second Apply node further down "
            "replaces this one on the layers that both cover.",
            search_aliases=[*SEARCH_ALIASES, "layers", "block list", "schedule", "norm cap", "padding", "start token"],
            inputs=[
                *common_inputs(),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default="all",
                    tooltip="all: every text cross-attention, as the paper defines it. down + up: without the middle "
                    "block, as the authors' released code does; only U-Nets have these. custom: the list in blocks.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Used when layers is custom. Comma-separated: d, m or u (down, middle, up), the block's "
                    "number counted from 0 among those with text attention, then optionally a dot and the layer "
                    "inside it. Ranges work in both places: d2.2-9,m0,u0.4. In a transformer (Flux, Wan, ...) b "
                    "and the number of the block, counted through the network: b0-11,b30",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default="both",
                    tooltip="Which prompts get PLADIS. both: as in the paper. positive: all but the negative prompt. "
                    "negative: only the negative prompt. With CFG 1 there is no negative prompt to apply it to.",
                ),
                io.Boolean.Input(
                    "force_unknown",
                    default=False,
                    # workflows in API format from before it was there do not name it
                    optional=True,
                    advanced=True,
                    tooltip="Only for a model that PLADIS does not know: take every attention for text whose keys are "
                    "as many as the prompt's tokens and whose queries are not. It may miss, or hit something else.",
                ),
                io.Combo.Input(
                    "scale_schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    optional=True,
                    advanced=True,
                    tooltip="constant: scale throughout. linear, cosine: from scale at start_percent to end_scale at "
                    "end_percent, evenly or with a gentle start and end. Words are placed early, texture comes late: "
                    "a schedule that falls keeps the first and spares the second.",
                ),
                io.Float.Input(
                    "end_scale",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Where a linear or cosine scale_schedule ends. Going lower leaves more of the fine texture "
                    "to the plain model. No effect with constant.",
                ),
                io.Float.Input(
                    "norm_cap",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Against mushy or burnt images: at most this many times the length that each attention "
                    "output has without PLADIS, its direction kept. 0 is no limit. Going lower holds it nearer to the "
                    "plain model; 1 is never longer. Costs a second attention in the text layers.",
                ),
                io.Combo.Input(
                    "tokens",
                    options=list(TOKENS),
                    default="all",
                    optional=True,
                    advanced=True,
                    tooltip="Which tokens are mixed; the others keep their softmax weight. all: as in the paper. "
                    "without start token: where it takes most of the attention, words are otherwise pruned against "
                    "it. words only: without start token, end token and padding. The report of PLADIS Attention Map "
                    "says where a model looks.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP that encoded the prompt. Only for tokens words only, in models whose padding "
                    "nothing else tells (SD, SDXL, SD3, Flux.1).",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    # a text box would share the node's height with the plot
                    optional=True,
                    advanced=True,
                    tooltip="For tokens words only, with clip: the text that was encoded. Several, such as positive "
                    "and negative, with a line --- between; the empty prompt is always known.",
                ),
            ],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
            # the receipt goes to this node, not to another with the same inputs
            not_idempotent=True,
            # what it reports for the picker in web/ comes from the host's cache too
            has_intermediate_output=True,
        )

    @classmethod
    @override
    def execute(
        cls,
        model: io.Model.Type,
        scale: float,
        alpha: float,
        start_percent: float,
        end_percent: float,
        layers: str,
        blocks: str,
        apply_to: str,
        force_unknown: bool = False,
        scale_schedule: str = "constant",
        end_scale: float = 0.0,
        norm_cap: float = 0.0,
        tokens: str = "all",
        clip: io.Clip.Type | None = None,
        prompt: str = "",
    ) -> io.NodeOutput:
        target = find_target(model, force_unknown)
        check_tokens(tokens, target.family, target.network(), clip is not None and bool(prompt.strip()))
        wanted = tokens == "words only" and clip is not None
        texts = encoded_texts(prompt, clip, bool(target.family.start_of(target.network()))) if wanted else ()
        settings = Settings(
            choose_layers(layers, blocks, target.layers), scale, alpha, start_percent, end_percent, apply_to,
            scale_schedule, end_scale, norm_cap, tokens, texts,
        )  # fmt: skip
        name = unique_id(cls)
        # one that PLADIS Sweep makes has no picker: what it reports would take the place of the sweep's picture
        shown = None if name is None else {"pladis_blocks": block_names(target.layers)}
        return io.NodeOutput(apply_settings(model, settings, target, name), ui=shown)
