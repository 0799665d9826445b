"""Small randomly initialised models of every U-Net layout, built from the host's own classes, and how to sample them.

In float64: random weights make a network chaotic, and rounding errors must stay apart from differences that count.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_base
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.supported_models as supported
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock

from pladis_pack.nodes.apply import PLADISApply
from pladis_pack.nodes.apply_advanced import PLADISApplyAdvanced
from pladis_pack.nodes.hosting.batch import Batch
from pladis_pack.nodes.hosting.models.layers import BY_SHAPE
from pladis_pack.nodes.hosting.models.target import Target
from pladis_pack.nodes.hosting.running import ModelCall

TEXT_WIDTH = 24
SD = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3,
}  # fmt: skip
XL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True,
}  # fmt: skip
KOALA = {**XL, "num_res_blocks": [1, 1, 1]}
# name: (host class, U-Net layout, number of text cross-attentions)
LAYOUTS = {
    "SD15": (supported.SD15, SD, 16),
    "SD15 inpaint": (supported.SD15, {**SD, "in_channels": 9}, 16),
    "SD15 ip2p": (supported.SD15_instructpix2pix, {**SD, "in_channels": 8}, 16),
    "SD2": (supported.SD20, {**SD, "use_linear_in_transformer": True}, 16),
    "SDXL": (supported.SDXL, XL, 70),
    "SDXL ip2p": (supported.SDXL_instructpix2pix, {**XL, "in_channels": 8}, 70),
    "SDXL refiner": (
        supported.SDXLRefiner,
        {**XL, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "adm_in_channels": 2560,
         "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0], "transformer_depth_middle": 4,
         "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0]},
        44,
    ),
    "SSD-1B": (
        supported.SSD1B,
        {**XL, "transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1,
         "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]},
        34,
    ),
    "Vega": (
        supported.Segmind_Vega,
        {**XL, "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": -1,
         "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2]},
        15,
    ),
    "KOALA-700M": (
        supported.KOALA_700M,
        {**KOALA, "transformer_depth": [0, 2, 5], "transformer_depth_middle": -2,
         "transformer_depth_output": [0, 0, 2, 2, 5, 5]},
        21,
    ),
    "KOALA-1B": (
        supported.KOALA_1B,
        {**KOALA, "transformer_depth": [0, 2, 6], "transformer_depth_middle": 6,
         "transformer_depth_output": [0, 0, 2, 2, 6, 6]},
        30,
    ),
    # attn1 is cross-attention too, in some of its blocks
    "X4 upscaler": (
        supported.SD_X4Upscaler,
        {**SD, "in_channels": 7, "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1],
         "transformer_depth_output": [1] * 9 + [0] * 3, "disable_self_attentions": [True, True, True, False],
         "num_classes": 1000, "use_linear_in_transformer": True},
        None,
    ),
}  # fmt: skip


def initialise(module: torch.nn.Module) -> None:
    """The host leaves weights uninitialised. Attention far from uniform, yet a network that does
    not blow rounding errors up."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            # single numbers are gates
            parameter.data.fill_(1.0 if name.endswith("weight") or parameter.ndim == 0 else 0.0)
        else:
            gain = 1.6 if ".to_q" in name or ".to_k" in name else 0.6
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * gain * fan_in**-0.5


def base_model(name: str, **changes) -> comfy.model_base.BaseModel:
    model_class, layout, _ = LAYOUTS[name]
    unet = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True,
        "legacy": False, "use_checkpoint": False, "context_dim": TEXT_WIDTH, "num_head_channels": 16, "num_heads": -1,
        "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
        "dtype": torch.float64, **layout, **changes,
    }  # fmt: skip
    config = model_class(unet)
    config.unet_config.update(unet)
    model = config.get_model({}, device="cpu")
    initialise(model.diffusion_model)
    return model.eval()


def patcher(name: str = "SD15", **changes) -> comfy.model_patcher.ModelPatcher:
    """`changes` to the layout of that name."""
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base_model(name, **changes), load_device=cpu, offload_device=cpu)


def prompt(seed: int, tokens: int = 77, **options) -> list:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, TEXT_WIDTH, generator=generator)
    pooled = torch.randn(1, 1280, generator=generator)
    return [[context, {"pooled_output": pooled, **options}]]


POSITIVE, NEGATIVE = prompt(11), prompt(12)


def sample(
    model, positive=POSITIVE, negative=NEGATIVE, *, cfg=4.0, steps=2, batch=1, size=8, sampler="euler", seed=5,
    scheduler="normal", noise=None, denoise=1.0,
) -> torch.Tensor:  # fmt: skip
    if noise is None:
        noise = comfy.sample.prepare_noise(torch.zeros(batch, 4, size, size), seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=seed, denoise=denoise,
    )  # fmt: skip


DEFAULTS = {"scale": 2.0, "alpha": 1.5, "start_percent": 0.0, "end_percent": 1.0}
ADVANCED = {**DEFAULTS, "layers": "all", "blocks": "", "apply_to": "both", "force_unknown": False}


def apply(model, *, unique_id=None, **options):
    """MODEL through the simple node, or through the advanced one where an option asks for it; of a graph's node."""
    node = PLADISApplyAdvanced if set(options) - set(DEFAULTS) else PLADISApply
    defaults = ADVANCED if node is PLADISApplyAdvanced else DEFAULTS
    if unique_id is not None:
        node = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id=unique_id)})
    return node.execute(model, **{**defaults, **options}).result[0]


def call_of_two_rows(*prompts) -> ModelCall:
    """A model call for hooks that are called by hand: two rows, 77 tokens."""
    return ModelCall(Target(None, lambda: None, {BY_SHAPE: lambda: None}), {}, Batch(2, 77, prompts), {}, {})


def oracle_attention(module):
    """CrossAttention.forward with PLADIS written out in float64 on the entmax package."""
    # not every user of this module has it
    import entmax

    def forward(x, context=None, value=None, mask=None, transformer_options=None):
        q, k, v = module.to_q(x), module.to_k(context), module.to_v(context if value is None else value)
        q, k, v = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT * module.dim_head**-0.5
        out = (2 * entmax.entmax15(scores, -1) - scores.softmax(-1)) @ v
        return module.to_out(out.transpose(1, 2).flatten(2))

    return forward


def write_pladis_into(model):
    """The text attention of the network itself becomes the paper's equation: what the node must amount to."""
    for block in model.model.diffusion_model.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn2.forward = oracle_attention(block.attn2)
            if block.disable_self_attn:
                block.attn1.forward = oracle_attention(block.attn1)
    return model


class Evaluations:
    """Counts the network's evaluations and the rows of each, through a wrapper of its own."""

    def __init__(self):
        self.rows = []

    def attach(self, model):
        model = model.clone()
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        model.add_wrapper_with_key(kind, "count", self._count)
        return model

    def _count(self, executor, x, *args, **kwargs):
        self.rows.append(x.shape[0])
        return executor(x, *args, **kwargs)
