"""Which modules of a diffusers network attend to text, and where text is in their attention: one row for each network.

Networks and processors are known by the names of their classes, looked up along the inheritance, so that a class which
an older diffusers lacks costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import nn

CROSS, JOINT = "cross", "joint"
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A joint attention row of `length` tokens: its text columns and its image rows.

    lengths: (B,), the text tokens of every prompt, where rows hold them without padding: text first, then the image,
    padding last. `text` then ends with the longest prompt, `image` begins behind the shortest.
    """

    length: int
    text: slice
    image: slice
    lengths: torch.Tensor | None = None


RowOf = Callable[[nn.Module, Arguments], Row]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    `classes`: names of networks. `kind`: CROSS (text has attentions of its own) or JOINT (text and image share rows).
    `modules`: paths of the modules that make the text attention, `*` for a number or a name. `processors`: the classes
    that are known to compute it by torch's scaled_dot_product_attention. `row`: what a joint row is made of.
    """

    classes: tuple[str, ...]
    kind: str
    modules: tuple[str, ...]
    processors: tuple[str, ...]
    row: RowOf | None = None


def patches(network: Any, latent: torch.Tensor) -> int:
    """Tokens of a latent (B, C, [frames,] height, width)."""
    frames = latent.shape[2] // (getattr(network.config, "patch_size_t", None) or 1) if latent.ndim == 5 else 1
    return frames * prod(side // network.config.patch_size for side in latent.shape[-2:])


def text_first(network: nn.Module, arguments: Arguments) -> Row:
    """Of latents that are tokens already, as Flux has them."""
    text, image = (arguments[name].shape[1] for name in ("encoder_hidden_states", "hidden_states"))
    return Row(text + image, slice(0, text), slice(text, None))


def image_first(network: nn.Module, arguments: Arguments) -> Row:
    text, image = arguments["encoder_hidden_states"].shape[1], patches(network, arguments["hidden_states"])
    return Row(text + image, slice(image, None), slice(0, image))


def auraflow(network: Any, arguments: Arguments) -> Row:
    """Learned registers come first, which are no text."""
    registers = network.register_tokens.shape[1]
    text, image = arguments["encoder_hidden_states"].shape[1], patches(network, arguments["hidden_states"])
    return Row(registers + text + image, slice(registers, registers + text), slice(registers + text, None))


def cogvideox(network: nn.Module, arguments: Arguments) -> Row:
    """Its latents have their frames before their channels."""
    text = arguments["encoder_hidden_states"].shape[1]
    image = patches(network, arguments["hidden_states"].transpose(1, 2))
    return Row(text + image, slice(0, text), slice(text, None))


def lumina2(network: nn.Module, arguments: Arguments) -> Row:
    """The text of every prompt is as long as its mask says."""
    lengths = arguments["encoder_attention_mask"].sum(1)
    shortest, longest = int(lengths.min()), int(lengths.max())
    length = longest + patches(network, arguments["hidden_states"])
    same = shortest == longest
    return Row(length, slice(0, longest), slice(shortest, None), None if same else lengths)


UNET_PROCESSORS = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "IPAdapterAttnProcessor2_0",
                   "CustomDiffusionAttnProcessor2_0")  # fmt: skip
FLUX_PROCESSORS = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")
DOUBLE_SINGLE = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
# fmt: off
TABLE = (
    Family(("UNet2DConditionModel",), CROSS, ("*.attn1", "*.attn2"), UNET_PROCESSORS),
    Family(("SanaTransformer2DModel",), CROSS, ("transformer_blocks.*.attn2",), ("SanaAttnProcessor2_0",)),
    Family(("PixArtTransformer2DModel",), CROSS, ("transformer_blocks.*.attn2",), UNET_PROCESSORS),
    Family(("HunyuanDiT2DModel",), CROSS, ("blocks.*.attn2",),
           ("HunyuanAttnProcessor2_0", "FusedHunyuanAttnProcessor2_0")),
    Family(("WanTransformer3DModel", "WanVACETransformer3DModel"), CROSS, ("blocks.*.attn2", "vace_blocks.*.attn2"),
           ("WanAttnProcessor", "WanAttnProcessor2_0")),
    Family(("LTXVideoTransformer3DModel",), CROSS, ("transformer_blocks.*.attn2",),
           ("LTXVideoAttnProcessor", "LTXVideoAttentionProcessor2_0")),
    Family(("FluxTransformer2DModel", "ChromaTransformer2DModel"), JOINT, DOUBLE_SINGLE, FLUX_PROCESSORS, text_first),
    Family(("SD3Transformer2DModel",), JOINT, ("transformer_blocks.*.attn",),
           ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0", "SD3IPAdapterJointAttnProcessor2_0",
            "PAGJointAttnProcessor2_0", "PAGCFGJointAttnProcessor2_0"), image_first),
    Family(("QwenImageTransformer2DModel",), JOINT, ("transformer_blocks.*.attn",),
           ("QwenDoubleStreamAttnProcessor2_0",), text_first),
    Family(("AuraFlowTransformer2DModel",), JOINT,
           ("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
           ("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"), auraflow),
    Family(("Lumina2Transformer2DModel",), JOINT, ("layers.*.attn",), ("Lumina2AttnProcessor2_0",), lumina2),
    Family(("CogVideoXTransformer3DModel",), JOINT, ("transformer_blocks.*.attn1",),
           ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"), cogvideox),
    Family(("HunyuanVideoTransformer3DModel",), JOINT, DOUBLE_SINGLE, ("HunyuanVideoAttnProcessor2_0",), image_first),
)
# fmt: on
BY_CLASS = {name: family for family in TABLE for name in family.classes}


def family_of(network: nn.Module) -> Family | None:
    return next((BY_CLASS[c.__name__] for c in type(network).__mro__ if c.__name__ in BY_CLASS), None)


def knows_processor(family: Family, processor: object) -> bool:
    return any(c.__name__ in family.processors for c in type(processor).__mro__)


def text_modules(family: Family, network: nn.Module) -> dict[str, nn.Module]:
    """Path and module of every text attention, in the order of the network's modules."""
    # the first attention of a U-Net's block is to the image itself, but for some U-Nets
    return {
        path: module
        for path, module in network.named_modules()
        if any(fnmatchcase(path, pattern) for pattern in family.modules)
        and (family.kind == JOINT or not path.endswith(".attn1") or module.is_cross_attention)
    }


def chosen_layers(layers: str | Sequence[str], paths: list[str]) -> list[str]:
    """The paths that `layers` of `apply_pladis` means.

    Raises:
        ValueError: nothing fits.
    """
    if layers == "all":
        return paths
    if layers == "down + up":
        chosen = [path for path in paths if re.match(r"(down|up)_blocks\.", path)]
    else:
        patterns = [layers] if isinstance(layers, str) else layers
        chosen = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(
            f'layers={layers!r} fits none of the text attentions: choose "all", "down + up" (of a U-Net), or patterns '
            f"of these paths: {', '.join(paths[:3])}, ... {paths[-1]}"
        )
    return chosen
