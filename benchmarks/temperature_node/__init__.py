"""PLADIS Temperature Control: a custom node of the benchmark's own, for `python -m benchmarks.alignment server`.

Link or copy this folder into custom_nodes of the ComfyUI that has the PLADIS pack. In the text attention that Apply
PLADIS (Advanced) would act on (layers, prompts, tokens), it takes the softmax of t times the scores: sharper attention
without sparsity. Where text shares its rows with the image, or only some tokens are meant, these keep their mass, as
with PLADIS.

It goes the pack's own ways to the attention, with a lambda that the functions at their ends know.
"""

from __future__ import annotations

import functools
import math
import sys

import torch
from comfy_api.latest import ComfyExtension, io

import nodes

# more than pladis_core takes for a lambda: a function that was not taught refuses it
NO_LAMBDA = 2e6
# what computes the text attention, by road
TAUGHT = {
    "unet": ("pladis_attention", "pladis_correction"),
    "transformer": ("pladis_attention", "pladis_correction", "joint_correction"),
}


class Temperature(float):
    """In the place of lambda; `t` is the factor on the scores."""

    t: float

    def __new__(cls, t: float) -> Temperature:
        lam = super().__new__(cls, NO_LAMBDA)
        lam.t = t
        return lam

    def __format__(self, spec: str) -> str:
        # in the pack's receipt, behind the word lambda
        return f"none, temperature {self.t:g}"


class PLADISTemperatureControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return io.Schema(
            node_id="PLADISTemperatureControl",
            display_name="PLADIS Temperature Control",
            category="model/patch",
            description="For benchmarks: softmax of temperature times the scores where Apply PLADIS would act.",
            # as those of Apply PLADIS (Advanced), which they go to
            inputs=[
                io.Model.Input("model"),
                io.Float.Input("temperature", default=2.0, min=0.01, max=100.0, step=0.05,
                               tooltip="The factor on the scores: 1 is no change, going higher is sharper."),
                io.Float.Input("start_percent", default=0.0, **percent),
                io.Float.Input("end_percent", default=1.0, **percent),
                io.String.Input("layers", default="all", optional=True),
                io.String.Input("blocks", default="", optional=True),
                io.String.Input("apply_to", default="both", optional=True),
                io.Boolean.Input("force_unknown", default=False, optional=True),
                io.Float.Input("norm_cap", default=0.0, min=0.0, max=10.0, step=0.05, optional=True),
                io.String.Input("tokens", default="all", optional=True),
                io.Clip.Input("clip", optional=True),
                io.String.Input("prompt", default="", multiline=True, optional=True),
            ],
            outputs=[io.Model.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: io.Model.Type, temperature: float, layers="all", blocks="", apply_to="both", **others
    ) -> io.NodeOutput:
        apply = nodes.NODE_CLASS_MAPPINGS["PLADISApplyAdvanced"]
        teach(apply.__module__.rpartition(".nodes.")[0])
        settings = {"alpha": 1.5, "layers": layers, "blocks": blocks, "apply_to": apply_to, **others}
        return apply.execute(model=model, scale=Temperature(temperature), **settings)


def teach(pack: str) -> None:
    """The functions of every road learn what a Temperature is; with any other lambda they are what they were."""
    core = sys.modules[f"{pack}.pladis_core"]
    at_temperature = {
        "pladis_attention": attention, "pladis_correction": correction, "joint_correction": joint_correction,
    }  # fmt: skip
    for road, names in TAUGHT.items():
        module = sys.modules[f"{pack}.nodes.hosting.roads.{road}"]
        for name in names:
            plain = getattr(core, name)
            # once: the node runs often
            if getattr(module, name) is plain:
                setattr(module, name, dispatching(plain, functools.partial(at_temperature[name], core)))


def dispatching(plain, at_temperature):
    @functools.wraps(plain)
    def function(*args, lam: float, alpha: float, **kwargs) -> torch.Tensor:
        if isinstance(lam, Temperature):
            return at_temperature(lam.t, *args, **kwargs)
        return plain(*args, lam=lam, alpha=alpha, **kwargs)

    return function


def attention(core, t: float, q, k, v, mask=None, scale=None, *, mix_mask=None, enable_gqa=False) -> torch.Tensor:
    """softmax(t S) @ v, S the scaled and masked scores; keys outside mix_mask (B, Lk) keep their weight in softmax(S).

    q (B, H, Lq, D), k and v (B, Hkv, Lk, D[v]).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mix_mask is None:
        return softmax(core, q, k, v, mask, scale, enable_gqa, t)
    change = correction(core, t, q, k, v, mask, scale, mix_mask=mix_mask, enable_gqa=enable_gqa)
    return softmax(core, q, k, v, mask, scale, enable_gqa) + change


def correction(
    core, t: float, q, k, v, mask=None, scale=None, *, row_lse=None, mix_mask=None, enable_gqa=False
) -> torch.Tensor:
    """mass * (softmax(t S) - softmax(S)) @ v over the keys that are mixed; mass is theirs in the row.

    row_lse (B, H, Lq, 1): log-sum-exp of the scores of a row that is longer than these keys.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    # a difference of two outputs alike
    q, k, v = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (q, k, v))
    if mix_mask is not None:
        row_lse = core.log_sum_exp(q, k, mask, scale, enable_gqa=enable_gqa) if row_lse is None else row_lse
        mask = only(mask, mix_mask[:, None, None])
    change = softmax(core, q, k, v, mask, scale, enable_gqa, t) - softmax(core, q, k, v, mask, scale, enable_gqa)
    if row_lse is not None:
        mass = (core.log_sum_exp(q, k, mask, scale, enable_gqa=enable_gqa) - row_lse).exp()
        # of rows without such keys
        change = change * mass.nan_to_num(0.0, 0.0, 0.0).clamp(max=1.0)
    return change.to(dtype)


def joint_correction(core, t: float, q, k, v, row_lse, mask=None, scale=None, *, copies=1, **kwargs) -> torch.Tensor:
    return correction(core, t, q, k, v, mask, scale, row_lse=row_lse - math.log(copies), **kwargs)


def only(mask: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """The mask, boolean or additive, with all other keys masked too."""
    if mask is None:
        return keys
    return mask & keys if mask.dtype == torch.bool else mask.masked_fill(~keys, -torch.inf)


def softmax(core, q, k, v, mask, scale: float, enable_gqa: bool, t: float = 1.0) -> torch.Tensor:
    # what an additive mask adds is of the scores, to entmax too
    mask = mask if mask is None or mask.dtype == torch.bool else mask * t
    # the pack's, for what it promises of masks; at lambda 0 nothing is sparse
    return core.pladis_attention(q, k, v, mask, scale * t, lam=0.0, enable_gqa=enable_gqa)


class TemperatureExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [PLADISTemperatureControl]


async def comfy_entrypoint() -> TemperatureExtension:
    return TemperatureExtension()
