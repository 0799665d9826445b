"""Apply PLADIS (https://arxiv.org/abs/2503.07677) to every text cross-attention of a model."""

from __future__ import annotations

from comfy_api.latest import io
from typing_extensions import override

from .hosting import Settings, apply_settings, find_target
from .inputs import SEARCH_ALIASES, common_inputs, model_output, unique_id


class PLADISApply(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISApply",
            display_name="Apply PLADIS",
            category="model/patch",
            description="Pushes each place of the picture towards the words that matter most there: extrapolates the "
            "model's text cross-attention from softmax towards sparse alpha-entmax. Its paper reports images that "
            "follow the prompt better. No training, no extra network evaluation; works with and without CFG and with "
            "few-step models.",
            search_aliases=[
                *SEARCH_ALIASES, "prompt adherence", "prompt following", "follow prompt", "sparse attention",
                "sparse cross-attention", "entmax", "sparsemax",
            ],
            inputs=common_inputs(),
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
            # the receipt goes to this node, not to another with the same inputs
            not_idempotent=True,
        )

    @classmethod
    @override
    def execute(
        cls, model: io.Model.Type, scale: float, alpha: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        target = find_target(model)
        settings = Settings(frozenset(target.layers), scale, alpha, start_percent, end_percent)
        return io.NodeOutput(apply_settings(model, settings, target, unique_id(cls)))
