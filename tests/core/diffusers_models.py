"""Tiny random networks of diffusers' own classes, their inputs, and where text is in their attention."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import diffusers
import torch

# tokens of the longest prompt, and of the shorter one where a network takes a mask
TEXT, SHORT = 7, 4
# of a latent of 8 x 8 in patches of 2
IMAGE = 16
REGISTERS = 8


class Case(NamedTuple):
    """`inputs` makes the arguments of a batch. `row`: where text is in a joint row; None for cross-attention.
    `texts`: how many text attentions there are."""

    network: Callable[[], torch.nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    texts: int
    row: str | None = None


def text(batch: int, width: int) -> torch.Tensor:
    return torch.randn(batch, TEXT, width)


def text_mask(batch: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """The first prompt is shorter than the others."""
    lengths = torch.tensor([SHORT, *[TEXT] * (batch - 1)])
    return (torch.arange(TEXT) < lengths[:, None]).to(dtype)


def unet(**kwargs):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (16, 32)}  # fmt: skip
    return diffusers.UNet2DConditionModel(**{
        "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 12,
        "attention_head_dim": 4, **blocks, **kwargs,
    })  # fmt: skip


def sdxl(**kwargs):
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 12,
        **kwargs,
    )  # fmt: skip


def of_unet(batch: int, **others) -> dict[str, Any]:
    return {"sample": torch.randn(batch, 4, 8, 8), "timestep": 500, "encoder_hidden_states": text(batch, 12), **others}


def of_sdxl(batch: int) -> dict[str, Any]:
    added = {"text_embeds": torch.randn(batch, 12), "time_ids": torch.arange(6).float().repeat(batch, 1)}
    return of_unet(batch, added_cond_kwargs=added)


def latent(batch: int, channels: int = 4, frames: int | None = None) -> torch.Tensor:
    return torch.randn(batch, channels, *([] if frames is None else [frames]), 8, 8)


def steps(batch: int) -> torch.Tensor:
    return torch.full((batch,), 500)


def hunyuan_dit():
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=2, activation_fn="gelu-approximate", cross_attention_dim=12, cross_attention_dim_t5=16,
        pooled_projection_dim=8, text_len=TEXT - 3, text_len_t5=3, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def of_hunyuan_dit(batch: int) -> dict[str, Any]:
    mask = text_mask(batch)
    return {
        "hidden_states": latent(batch), "timestep": steps(batch).float(),
        "encoder_hidden_states": torch.randn(batch, TEXT - 3, 12), "text_embedding_mask": mask[:, 3:],
        "encoder_hidden_states_t5": torch.randn(batch, 3, 16), "text_embedding_mask_t5": mask[:, 4:],
        "image_rotary_emb": (torch.ones(IMAGE, 8), torch.zeros(IMAGE, 8)),
    }  # fmt: skip


# fmt: off
WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
       "out_channels": 4, "text_dim": 12, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 32}
# fmt: on


def of_wan(batch: int, **others) -> dict[str, Any]:
    return {"hidden_states": latent(batch, frames=2), "timestep": steps(batch),
            "encoder_hidden_states": text(batch, 12), **others}  # fmt: skip


def of_wan_with_a_picture(batch: int) -> dict[str, Any]:
    """Its processors know text by its 512 tokens."""
    return of_wan(batch, encoder_hidden_states=torch.randn(batch, 512, 12),
                  encoder_hidden_states_image=torch.randn(batch, 5, 6))  # fmt: skip


def of_ltx(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, IMAGE, 4), "encoder_hidden_states": text(batch, 12),
        "timestep": steps(batch)[:, None], "encoder_attention_mask": text_mask(batch), "num_frames": 1, "height": 4,
        "width": 4,
    }  # fmt: skip


def of_flux(batch: int, **others) -> dict[str, Any]:
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
    return {
        "hidden_states": torch.randn(batch, IMAGE, 4), "encoder_hidden_states": text(batch, 12),
        "timestep": torch.full((batch,), 0.5), "img_ids": ids.reshape(IMAGE, 3), "txt_ids": torch.zeros(TEXT, 3),
        **others,
    }  # fmt: skip


FLUX = {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "axes_dims_rope": (4, 2, 2)}  # fmt: skip


def of_chroma(batch: int) -> dict[str, Any]:
    mask = torch.cat([text_mask(batch, torch.bool), torch.ones(batch, IMAGE, dtype=torch.bool)], 1)
    return of_flux(batch, attention_mask=mask)


def of_sd3(batch: int) -> dict[str, Any]:
    return {"hidden_states": latent(batch), "encoder_hidden_states": text(batch, 12),
            "pooled_projections": torch.randn(batch, 8), "timestep": steps(batch)}  # fmt: skip


def of_qwen(batch: int) -> dict[str, Any]:
    forward = diffusers.QwenImageTransformer2DModel.forward
    older = {"txt_seq_lens": [TEXT] * batch} if "txt_seq_lens" in signature(forward).parameters else {}
    return {
        "hidden_states": torch.randn(batch, IMAGE, 4), "encoder_hidden_states": text(batch, 12),
        "encoder_hidden_states_mask": text_mask(batch), "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 4, 4)]] * batch, **older,
    }  # fmt: skip


def of_lumina(batch: int) -> dict[str, Any]:
    return {"hidden_states": latent(batch), "timestep": torch.full((batch,), 0.5),
            "encoder_hidden_states": text(batch, 12), "encoder_attention_mask": text_mask(batch)}  # fmt: skip


def of_cogvideox(batch: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch, 1, 4, 8, 8), "encoder_hidden_states": text(batch, 12),
            "timestep": steps(batch)}  # fmt: skip


def of_hunyuan_video(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": latent(batch, frames=1), "timestep": steps(batch), "encoder_hidden_states": text(batch, 12),
        "encoder_attention_mask": text_mask(batch), "pooled_projections": torch.randn(batch, 8),
    }  # fmt: skip


# fmt: off
CASES = {
    "SD 1.x": Case(unet, of_unet, 4),
    "SD 2.x": Case(lambda: unet(use_linear_projection=True, upcast_attention=True), of_unet, 4),
    "SDXL": Case(sdxl, of_sdxl, 8),
    "x4 upscaler": Case(lambda: unet(only_cross_attention=(True, False)), of_unet, 7),
    "U-Net, masked": Case(unet, lambda batch: of_unet(batch, encoder_attention_mask=text_mask(batch)), 4),
    "SANA": Case(lambda: diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
        sample_size=8, mlp_ratio=1.0),
        lambda batch: {"hidden_states": latent(batch), "encoder_hidden_states": text(batch, 12),
                       "timestep": steps(batch), "encoder_attention_mask": text_mask(batch)}, 2),
    "PixArt": Case(lambda: diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        cross_attention_dim=16, caption_channels=12, use_additional_conditions=False),
        lambda batch: {"hidden_states": latent(batch), "encoder_hidden_states": text(batch, 12),
                       "timestep": steps(batch), "encoder_attention_mask": text_mask(batch),
                       "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, 2),
    "HunyuanDiT": Case(hunyuan_dit, of_hunyuan_dit, 2),
    "Wan": Case(lambda: diffusers.WanTransformer3DModel(**WAN), of_wan, 2),
    "Wan, image to video": Case(lambda: diffusers.WanTransformer3DModel(
        **WAN, image_dim=6, added_kv_proj_dim=24), of_wan_with_a_picture, 2),
    "Wan, VACE": Case(lambda: diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=4),
                      lambda batch: of_wan(batch, control_hidden_states=latent(batch, frames=2)), 3),
    "LTX": Case(lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12), of_ltx, 2),
    "Flux": Case(lambda: diffusers.FluxTransformer2DModel(**FLUX, pooled_projection_dim=8),
                 lambda batch: of_flux(batch, pooled_projections=torch.randn(batch, 8)), 3, "text, image"),
    "Chroma": Case(lambda: diffusers.ChromaTransformer2DModel(
        **FLUX, approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1),
        of_chroma, 3, "text, image"),
    "SD3": Case(lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm"), of_sd3, 2, "image, text"),
    "Qwen-Image": Case(lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 2, 2)), of_qwen, 2, "text, image"),
    "AuraFlow": Case(lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pos_embed_max_size=64),
        lambda batch: {"hidden_states": latent(batch), "encoder_hidden_states": text(batch, 12),
                       "timestep": torch.full((batch,), 0.5)}, 3, "registers, text, image"),
    "Lumina 2": Case(lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 8, 8), cap_feat_dim=12),
        of_lumina, 2, "lengths"),
    "CogVideoX": Case(lambda: diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=8, sample_height=8, sample_frames=1, max_text_seq_length=TEXT),
        of_cogvideox, 2, "text, image"),
    "HunyuanVideo": Case(lambda: diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, guidance_embeds=False, text_embed_dim=12, pooled_projection_dim=8,
        rope_axes_dim=(4, 2, 2)), of_hunyuan_video, 3, "image, text"),
}
# fmt: on


def network(name: str) -> torch.nn.Module:
    """Its queries are long, so that entmax prunes, and its values, so that it shows: fresh weights attend evenly."""
    made = CASES[name].network().eval()
    longer = ("to_q.", "add_q_proj.", "norm_q.", "norm_added_q.", "to_v.", "add_v_proj.")
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if any(part in path for part in longer):
                parameter.mul_(8.0)
    return made


def places(row: str | None, batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(B, 1, 1, Lk) text columns and (B, 1, Lq, 1) image rows of an attention; None where it is not the text's."""
    if row is None:
        text_keys = keys in (TEXT, 512) and queries != keys
        return (torch.ones(batch, 1, 1, keys, dtype=torch.bool), torch.tensor(True)) if text_keys else None
    before = REGISTERS if "registers" in row else IMAGE if row.startswith("image") else 0
    total = TEXT + IMAGE + (REGISTERS if "registers" in row else 0)
    if not queries == keys == (max(_lengths(batch)) + IMAGE if row == "lengths" else total):
        return None
    at = torch.arange(keys)
    if row == "lengths":
        ends = torch.tensor(_lengths(batch))[:, None]
        is_text, is_image = at < ends, (at >= ends) & (at < ends + IMAGE)
    else:
        is_text = ((at >= before) & (at < before + TEXT)).expand(batch, -1)
        is_image = (at < IMAGE if row.startswith("image") else at >= before + TEXT).expand(batch, -1)
    return is_text[:, None, None], is_image[:, None, :, None]


def _lengths(batch: int) -> list[int]:
    return [SHORT, *[TEXT] * (batch - 1)]
