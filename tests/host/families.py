"""One small randomly initialised model of every transformer family that attends to text, from the host's own classes.

Unlike the U-Nets of `tiny` in float32: the host's kernels for rotary embeddings take nothing wider.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.ldm.anima.model
import comfy.ldm.chroma_radiance.model
import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import pytest
import torch
from comfy.ldm.audio.embedders import NumberConditioner
from comfy.nested_tensor import NestedTensor

TOKENS = 7
# an independent standard normal tensor of the given shape at each call
Random = Callable[..., torch.Tensor]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A network, what its prompts hold besides a context of `TOKENS` tokens, and where its text attention sees text.

    `config` is a class of comfy.supported_models, `layout` the size of its network. `latent` is the shape of one image,
    or of one video and its sound. `text` gives the rest of what depends on the prompt's words, `extras` what does not.
    In the first text attention `columns` of the keys are text and `rows` of the queries are the image that is denoised;
    `reached` tells whether transformer_options["optimized_attention_override"] sees that attention, `diverted` that
    PLADIS comes another way all the same.
    """

    name: str
    config: str
    layout: dict[str, Any]
    latent: tuple
    columns: str = f"0:{TOKENS}"
    rows: str = "0:32"
    reached: bool = True
    diverted: bool = False
    width: int = 24
    text: Callable[[Random, int], dict[str, Any]] = lambda random, tokens: {}
    extras: Callable[[Random], dict[str, Any]] = lambda random: {}
    # prompts of other lengths fail in the host
    fixed_length: bool = False
    # why the host cannot compute two images in one batch
    no_batch: str = ""
    # parts of the network that the layout cannot shrink
    shrink: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    # what the host wants to read from the checkpoint while it builds the model
    weights: Callable[[], Weights] = dict
    sampling: dict[str, Any] = field(default_factory=dict)


def masked(pads: int):
    """A mask over the prompt that hides its last tokens; zero `pads` for the families that need a mask anyhow."""

    def text(random: Random, tokens: int) -> dict[str, Any]:
        mask = torch.ones(1, tokens, dtype=torch.long)
        mask[:, tokens - pads :] = 0
        return {"attention_mask": mask}

    return text


def pooled(**options: tuple[int, ...]):
    """A pooled prompt embedding, and latents or embeddings of the given shapes."""
    return lambda random: {"pooled_output": random(1, 16), **{name: random(*shape) for name, shape in options.items()}}


def reference(*shape: int):
    return lambda random: {"reference_latents": [random(1, *shape)]}


def clip_vision(tokens: int):
    return lambda random: {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=random(1, tokens, 1280))}


def glyphs(random: Random, tokens: int) -> dict[str, Any]:
    return {"conditioning_byt5small": random(1, 4, 1472)}


def t5_ids(random: Random, tokens: int) -> dict[str, Any]:
    return {"t5xxl_ids": (random(tokens + 2).abs() * 1000).int(), "t5xxl_weights": torch.ones(tokens + 2)}


def two_encoders(random: Random, tokens: int) -> dict[str, Any]:
    mask_t5 = torch.tensor([[1, 1, 1, 1, 0]])
    return {**masked(2)(random, tokens), "conditioning_mt5xl": random(1, 5, 16), "attention_mask_mt5xl": mask_t5}


def seconds(**kinds: str) -> Weights:
    embedders = {name: NumberConditioner(768, 0, 512, **kind) for name, kind in kinds.items()}
    return {
        f"conditioner.conditioners.{name}.{key}": torch.zeros_like(value)
        for name, embedder in embedders.items()
        for key, value in embedder.state_dict().items()
    }


def stable_audio_3() -> Weights:
    padding = {"conditioner.conditioners.prompt.padding_embedding": torch.ones(768)}
    return {**seconds(seconds_total={"fourier_features_type": "expo"}), **padding}


def small_adapter() -> contextlib.AbstractContextManager:
    anima = comfy.ldm.anima.model
    small = functools.partial(anima.LLMAdapter, source_dim=24, target_dim=24, model_dim=24, num_layers=2, num_heads=2)
    return mock.patch.object(anima, "LLMAdapter", small)


# fmt: off
FLUX = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 32, "num_heads": 2, "context_in_dim": 24,
    "axes_dim": [4, 6, 6], "depth": 2, "depth_single_blocks": 2, "mlp_ratio": 2.0, "theta": 10000, "qkv_bias": True,
    "vec_in_dim": 16, "guidance_embed": True, "txt_ids_dims": [],
}
FLUX2 = {
    **FLUX, "in_channels": 128, "out_channels": 128, "patch_size": 1, "axes_dim": [4, 4, 4, 4], "vec_in_dim": None,
    "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "txt_ids_dims": [3],
    "default_ref_method": "index", "ref_index_scale": 10.0,
}
CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"}, "vec_in_dim": None, "in_channels": 64,
    "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 2,
}
RADIANCE = {
    **CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2,
    "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 16, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False,
}
if "use_sequential_txt_ids" in comfy.ldm.chroma_radiance.model.ChromaRadianceParams.__dataclass_fields__:
    RADIANCE["use_sequential_txt_ids"] = False
SD3 = {
    "out_channels": 16, "input_size": None, "num_patches": 144, "pos_embed_max_size": 12, "depth": 2, "patch_size": 2,
    "adm_in_channels": 16, "qk_norm": "rms", "context_size": 24,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}},
}
QWEN = {
    "in_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
LUMINA = {
    "in_channels": 16, "dim": 48, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 2,
    "multiple_of": 16, "ffn_dim_multiplier": 1.0, "qk_norm": True, "cap_feat_dim": 24, "axes_dims": [4, 4, 4],
    "axes_lens": [300, 512, 512],
}
# its modulation is 256 wide, whatever the rest is
ZIMAGE = {
    **LUMINA, "dim": 256, "n_kv_heads": 4, "axes_dims": [32, 16, 16], "z_image_modulation": True,
    "pad_tokens_multiple": 32,
}
ZIMAGE_PIXEL = {
    **ZIMAGE, "in_channels": 3, "patch_size": 8, "decoder_in_channels": 192, "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 2, "decoder_max_freqs": 4,
}
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 16, "context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 2.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
    "vision_in_dim": None, "meanflow_sum": False,
}
HUNYUAN15 = {
    **HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "byt5": True,
    "use_cond_type_embedding": True, "vision_in_dim": 20, "meanflow_sum": True, "guidance_embed": False,
}
HUNYUAN_IMAGE = {
    **HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [8, 8], "vec_in_dim": None,
    "byt5": True,
}
HIDREAM = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [24, 20], "text_emb_dim": 16,
    "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 4, 4), "max_resolution": (16, 16),
    "llama_layers": [0, 1, 2, 2],
}
OMNIGEN = {
    "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
    "multiple_of": 16, "axes_dim_rope": (4, 4, 4), "axes_lens": (300, 64, 64), "timestep_scale": 1000.0,
}
OMNIGEN2 = {**OMNIGEN, "text_feat_dim": 24}
# mlp_ratio_x: it insists on a width of 12288
MOCHI = {
    "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32, "mlp_ratio_x": 192.0,
    "mlp_ratio_y": 2.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True,
    "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
    "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 24, "t5_token_length": TOKENS,
    "rope_theta": 10000.0,
}
COGVIDEO = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 16, "time_embed_dim": 32,
    "text_embed_dim": 24, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
    "max_text_seq_length": TOKENS, "use_rotary_positional_embeddings": True,
}
KREA2 = {
    "features": 32, "tdim": 16, "txtdim": 24, "heads": 2, "kvheads": 1, "multiplier": 2, "layers": 2, "txtlayers": 3,
    "txtheads": 2, "txtkvheads": 2,
}
IDEOGRAM4 = {
    "in_channels": 128, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "intermediate_size": 64,
    "adaln_dim": 16, "llm_features_dim": 24, "mrope_section": (4, 2, 2),
}
JOY = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "num_layers": 2, "rope_dim_list": [4, 6, 6]}
LENS = {
    "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "enc_hidden_dim": 12,
    "axes_dims_rope": (4, 6, 6), "selected_layer_index": (0, 1),
}
PIXELDIT = {
    "num_groups": 2, "hidden_size": 32, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32, "pixel_num_groups": 2,
    "patch_depth": 2, "pixel_depth": 2, "patch_size": 8, "txt_embed_dim": 24,
}
ERNIE = {
    "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "text_in_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}
AURA = {
    "cond_seq_dim": 24, "max_seq": 64, "n_double_layers": 2, "n_layers": 4, "dim": 32, "n_heads": 2,
    "global_conddim": 32,
}
CASCADE_C = {
    "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]], "c_clip_text": 24,
    "c_clip_text_pooled": 16,
}
CASCADE_B = {
    "c_cond": 32, "c_hidden": [16, 16, 32, 32], "nhead": [-1, -1, 2, 2], "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "block_repeat": [[1, 1, 1, 1], [1, 1, 2, 1]], "c_clip": 16,
}
WAN = {
    "dim": 32, "ffn_dim": 64, "freq_dim": 16, "text_dim": 24, "num_heads": 2, "num_layers": 2, "in_dim": 16,
    "out_dim": 16,
}
WAN36 = {**WAN, "in_dim": 36}
VIDEO = (16, 2, 8, 8)
LTXV = {
    "in_channels": 16, "cross_attention_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2,
    "caption_channels": 24, "num_layers": 2,
}
LTXAV = {
    **LTXV, "audio_in_channels": 128, "audio_cross_attention_dim": 16, "audio_attention_head_dim": 8,
    "audio_num_attention_heads": 2, "connector_attention_head_dim": 12, "connector_num_attention_heads": 2,
}
MINIMAX = {
    "hidden_size": 64, "num_layers": 2, "token_refiner_num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 32, "ffn_hidden_size": 64, "text_dim": 24, "timestep_input_dim": 16,
    "time_embed_hidden_size": 32, "time_embed_dim": 16, "rope_inv_freq_len": 4,
}
COSMOS = {
    "max_img_h": 32, "max_img_w": 32, "max_frames": 16, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16,
}
COSMOS1 = {
    **COSMOS, "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}
PREDICT2 = {**COSMOS, "pos_emb_learnable": True, "rope_enable_fps_modulation": False}
KANDINSKY = {
    "in_text_dim": 24, "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 64, "visual_embed_dim": 132,
    "num_text_blocks": 2, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
}
PIXART = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 24, "model_max_length": 300,
    "pe_interpolation": 1,
}
HYDIT = {
    "hidden_size": 32, "depth": 4, "num_heads": 2, "text_states_dim": 24, "text_states_dim_t5": 16,
    "text_len": TOKENS, "text_len_t5": 5,
}
ACE = {
    "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "mlp_ratio": 2.0, "text_embedding_dim": 24,
    "ssl_latent_dims": [16, 16], "lyric_encoder_vocab_size": 100,
}
ACE15 = {
    "hidden_size": 32, "text_hidden_dim": 24, "num_dit_layers": 2, "num_lyric_layers": 1, "num_timbre_layers": 1,
    "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 64,
    "fsq_dim": 32, "encoder_hidden_size": 32, "encoder_intermediate_size": 64, "encoder_num_heads": 2,
}
STABLE_AUDIO = {"embed_dim": 128, "depth": 2, "num_heads": 2, "project_cond_tokens": True}
STABLE_AUDIO_3 = {
    **STABLE_AUDIO, "io_channels": 256, "global_cond_dim": 768, "global_cond_type": "adaLN",
    "timestep_features_type": "expo", "num_memory_tokens": 4, "local_add_cond_dim": 257, "norm_type": "rms_norm",
    "attn_kwargs": {"qk_norm": "rms", "differential": True},
}

# learned pads and frames; without them, zeros that the host leaves out only shift positions
MING_LAYER = ZIMAGE
MING = {**{key: value for key, value in ZIMAGE.items() if key != "pad_tokens_multiple"}, "masked_pad_multiple": 32}
QWEN21 = {
    "in_channels": 64, "out_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "context_in_dim": 24, "mlp_ratio": 2, "axes_dims_rope": (4, 6, 6),
}
KANDINSKY6 = {
    "in_visual_dim": 16, "out_visual_dim": 16, "visual_embed_dim": 132, "in_audio_dim": 8, "in_text_dim": 24,
    "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 64, "time_dim_a": 16, "model_dim_a": 32,
    "ff_dim_a": 64, "head_dim_a": 16, "num_text_blocks": 2, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
}
PRISM = {"video_layers": 2, "audio_layers": 1}


def direct(random: Random, tokens: int) -> dict[str, Any]:
    """Ming-Image: what its language model says of the prompt goes past the caption's embedder."""
    return {"direct_context": random(1, tokens + 2, 256)}


def between(*slots: int):
    """Qwen-Image 2.1: references, with how many tokens of the prompt each stands behind."""
    return lambda random: {
        "reference_latents": [random(1, 64, 3, 2 + i) for i in range(len(slots))], "image_slots": list(slots),
    }


def first_frame_and_sound(random: Random) -> dict[str, Any]:
    return {"prism_reference": random(1, 20, 2, 8, 8), "prism_audio_context": random(1, 5, 4096), "prism_fps": 24.0}


@contextlib.contextmanager
def small_towers():
    """Prism's sizes are written into its class: widths, heads, feed-forward layers. A head is always 128 wide."""
    prism = importlib.import_module("comfy.ldm.prism.model")
    sizes = {5120: 256, 40: 2, 13824: 64, 1536: 128, 12: 1, 8960: 64}
    small = {
        "Tower": lambda *given, kind=prism.Tower: kind(*(sizes[size] for size in given[:3]), *given[3:]),
        "Conditioner": lambda *given, kind=prism.Conditioner: kind(*(sizes[size] for size in given[:2]), *given[2:]),
    }
    with mock.patch.multiple(prism, **small):
        yield


JOINT = (
    Family("Flux.1", "Flux", FLUX, (16, 8, 8), rows="7:23", extras=pooled()),
    Family("Flux.1 schnell", "FluxSchnell", {**FLUX, "guidance_embed": False}, (16, 8, 8), rows="7:23",
           extras=pooled()),
    Family("Flux.1 Fill", "FluxInpaint", {**FLUX, "in_channels": 96}, (16, 8, 8), rows="7:23", extras=pooled()),
    Family("Flux.1 Kontext", "Flux", FLUX, (16, 8, 8), rows="7:23",
           extras=lambda random: {**pooled()(random), **reference(16, 8, 4)(random)}),
    Family("Flux.1 Redux", "Flux", FLUX, (16, 8, 8), rows="7:23", fixed_length=True,
           extras=lambda random: {**pooled(attention_mask=(1, 23, 23))(random), "attention_mask_img_shape": (4, 4)}),
    Family("LongCat-Image", "LongCatImage",
           {**FLUX, "guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}, (16, 8, 8), rows="7:23"),
    Family("Flux.2", "Flux2", FLUX2, (128, 4, 4), "505:512", "512:528"),
    Family("Flux.2 edit", "Flux2", FLUX2, (128, 4, 4), "505:512", "512:528", extras=reference(128, 4, 2)),
    Family("Chroma", "Chroma", CHROMA, (16, 8, 8), rows="7:23"),
    Family("Chroma Radiance", "ChromaRadiance", RADIANCE, (3, 64, 64), rows="7:23"),
    Family("SD3", "SD3", SD3, (16, 8, 8), rows="7:23", extras=pooled()),
    Family("SD3.5 medium", "SD3", {**SD3, "x_block_self_attn_layers": [0]}, (16, 8, 8), rows="7:23", extras=pooled()),
    Family("AuraFlow", "AuraFlow", AURA, (4, 8, 8), "8:15", "15:31"),
    Family("Qwen-Image", "QwenImage", QWEN, (16, 1, 8, 8), rows="7:23"),
    Family("Qwen-Image masked", "QwenImage", QWEN, (16, 1, 8, 8), rows="7:23", text=masked(2)),
    Family("Qwen-Image-Edit", "QwenImage", QWEN, (16, 1, 8, 8), rows="7:23", extras=reference(16, 1, 8, 4)),
    Family("Qwen-Image 2.1", "QwenImage21", QWEN21, (64, 4, 4), rows="0:16", diverted=True),
    Family("Qwen-Image 2.1 edit", "QwenImage21", QWEN21, (64, 4, 4), rows="0:16", extras=reference(64, 3, 2),
           diverted=True),
    Family("Qwen-Image 2.1 edit, in front", "QwenImage21", QWEN21, (64, 4, 4), "6:13", "0:16", extras=between(0),
           diverted=True),
    Family("Qwen-Image 2.1 edit, between", "QwenImage21", QWEN21, (64, 4, 4), "0:2 8:11 20:22", "0:16",
           extras=between(2, 5), diverted=True),
    Family("MageFlow", "MageFlow", {**QWEN, "in_channels": 128}, (128, 4, 4), rows="7:23"),
    Family("Lumina 2", "Lumina2", LUMINA, (16, 8, 8), rows="7:23", text=masked(0)),
    Family("NewBie", "Lumina2", {**LUMINA, "clip_text_dim": 16}, (16, 8, 8), rows="7:23", text=masked(0),
           extras=pooled()),
    Family("Z-Image", "ZImage", ZIMAGE, (16, 8, 8), "0:32", "32:64"),
    Family("Z-Image Omni", "ZImage", {**ZIMAGE, "siglip_feat_dim": 24}, (16, 8, 8), "0:64", "128:192",
           extras=reference(16, 8, 4)),
    Family("Z-Image pixel", "ZImagePixelSpace", ZIMAGE_PIXEL, (3, 32, 32), "0:32", "32:64"),
    Family("Ming-Image", "MingImage", MING, (16, 1, 8, 8), "0:16", "16:32", text=direct),
    Family("Ming-Image edit", "MingImage", MING, (16, 1, 8, 8), "0:16", "16:40", text=direct,
           extras=reference(16, 1, 8, 4)),
    Family("Ming-Image Layer", "MingImage", MING_LAYER, (16, 2, 8, 8), "0:32", "32:64", text=direct),
    Family("HunyuanVideo", "HunyuanVideo", HUNYUAN, VIDEO, rows="7:39", extras=pooled()),
    Family("HunyuanVideo masked", "HunyuanVideo", HUNYUAN, VIDEO, rows="7:39", text=masked(2), extras=pooled(),
           no_batch="its mask has room for one prompt"),
    Family("HunyuanVideo I2V", "HunyuanVideoI2V", {**HUNYUAN, "in_channels": 33}, VIDEO, rows="7:39", extras=pooled()),
    Family("HunyuanVideo I2V replace", "HunyuanVideo", {**HUNYUAN, "guidance_embed": False}, VIDEO, rows="7:39",
           extras=lambda random: {**pooled()(random), "guiding_frame_index": 0}),
    Family("SkyReels I2V", "HunyuanVideoSkyreelsI2V", {**HUNYUAN, "in_channels": 32}, VIDEO, rows="7:39",
           extras=pooled()),
    Family("HunyuanCustom", "HunyuanVideo", HUNYUAN, VIDEO, rows="23:55", extras=pooled(ref_latent=(1, 16, 1, 8, 8)),
           no_batch="it writes into an expanded tensor"),
    Family("HunyuanVideo 1.5", "HunyuanVideo15", HUNYUAN15, (32, 2, 4, 4), "3:14", "14:46", text=glyphs,
           extras=lambda random: {
               "pooled_output": None, "clip_vision_output": SimpleNamespace(last_hidden_state=random(1, 3, 20))}),
    Family("HunyuanImage 2.1", "HunyuanImage21", HUNYUAN_IMAGE, (64, 4, 4), "0:11", "11:27", text=glyphs),
    Family("HiDream I1", "HiDream", HIDREAM, (16, 8, 8), "16:33", "0:16", extras=pooled(),
           text=lambda random, tokens: {"conditioning_llama3": random(1, 3, 5, 20)}),
    Family("HiDream E1", "HiDream", HIDREAM, (16, 8, 8), "32:49", "0:4 8:12 16:20 24:28",
           text=lambda random, tokens: {"conditioning_llama3": random(1, 3, 5, 20)},
           extras=pooled(concat_latent_image=(1, 16, 8, 8))),
    Family("OmniGen2", "Omnigen2", OMNIGEN2, (16, 8, 8), rows="7:23", text=masked(0)),
    Family("OmniGen2 edit", "Omnigen2", OMNIGEN2, (16, 8, 8), rows="15:31", text=masked(0),
           extras=reference(16, 8, 4)),
    Family("Boogu", "Boogu", {**OMNIGEN, "instruction_feat_dim": 24, "num_double_stream_layers": 2}, (16, 8, 8),
           rows="7:23", text=masked(0)),
    Family("Mochi", "GenmoMochi", MOCHI, (12, 2, 8, 8), "32:37", text=masked(2)),
    Family("CogVideoX", "CogVideoX_T2V", COGVIDEO, VIDEO, rows="7:39",
           # it gets the noise unscaled: the first step's, 4000 times as strong, would drown the text
           sampling={"zsnr": False, "linear_end": 0.002}),
    Family("Krea 2", "Krea2", KREA2, (16, 1, 8, 8), rows="7:23", width=72),
    Family("Ideogram 4", "Ideogram4", IDEOGRAM4, (128, 4, 4), rows="7:23"),
    Family("Ideogram 4 masked", "Ideogram4", IDEOGRAM4, (128, 4, 4), "0:5", "7:23", text=masked(2)),
    Family("JoyImage", "JoyImage", JOY, (16, 1, 8, 8), "16:23", "0:16"),
    Family("JoyImage edit", "JoyImage", JOY, (16, 1, 8, 8), "24:31", "0:16", extras=reference(16, 1, 8, 4)),
    Family("Lens", "Lens", LENS, (128, 4, 4), "16:23", "0:16"),
    Family("PixelDiT", "PixelDiTT2I", PIXELDIT, (3, 32, 32), rows="7:23"),
    Family("ERNIE-Image", "ErnieImage", ERNIE, (128, 4, 4), "16:23", "0:16", reached=False),
    Family("Stable Cascade C", "Stable_Cascade_C", CASCADE_C, (16, 8, 8), "64:71", "0:64", extras=pooled()),
    Family("Stable Cascade B", "Stable_Cascade_B", CASCADE_B, (4, 32, 32), "16:20", "0:16",
           text=lambda random, tokens: {"pooled_output": random(1, 16)}),
    Family("MiniMax H3", "MiniMaxH3", MINIMAX, ((24, 2, 8, 8), (32, 2, 6)), rows="7:51",
           no_batch="it supports batch size 1"),
)
CROSS = (
    Family("Wan 2.1 T2V", "WAN21_T2V", WAN, VIDEO),
    Family("Wan 2.1 reference", "WAN21_T2V", {**WAN, "in_dim_ref_conv": 16}, VIDEO, rows="0:48",
           extras=reference(16, 1, 8, 8)),
    Family("Wan 2.2", "WAN22_T2V", {**WAN, "in_dim": 48, "out_dim": 48}, (48, 2, 8, 8)),
    Family("Wan 2.1 I2V", "WAN21_I2V", WAN36, VIDEO, extras=clip_vision(5)),
    Family("Wan 2.1 I2V without image", "WAN21_I2V", WAN36, VIDEO),
    Family("Wan 2.1 FLF", "WAN21_I2V", {**WAN36, "flf_pos_embed_token_number": 10}, VIDEO, extras=clip_vision(10)),
    Family("Wan 2.1 Fun Control", "WAN21_FunControl2V", {**WAN, "in_dim": 48}, VIDEO),
    Family("Wan VACE", "WAN21_Vace", {**WAN, "vace_layers": 2, "vace_in_dim": 96}, VIDEO),
    Family("Wan 2.1 Camera", "WAN21_Camera", {**WAN, "in_dim": 32}, VIDEO, extras=clip_vision(5)),
    Family("Wan 2.2 Camera", "WAN22_Camera", WAN36, VIDEO),
    Family("Wan HuMo", "WAN21_HuMo", WAN, VIDEO, rows="0:48", extras=lambda random: {
        **reference(16, 1, 8, 8)(random), "audio_embed": random(1, 2, 8, 5, 1280)}),
    Family("Wan 2.2 S2V", "WAN22_S2V", {**WAN, "audio_inject_layers": [0, 1], "audio_dim": 24}, VIDEO, rows="0:48",
           extras=lambda random: {**reference(16, 1, 8, 8)(random), "audio_embed": random(1, 25, 24, 8)}),
    Family("Wan 2.2 Animate", "WAN22_Animate", WAN36, VIDEO, extras=clip_vision(5)),
    Family("Wan Animate 2", "WAN_Animate2", WAN36, VIDEO, extras=clip_vision(5)),
    Family("Wan CausalAR", "WAN21_CausalAR_T2V", WAN, VIDEO),
    # it starts from the latent image, not from noise
    Family("Wan FlowRVS", "WAN21_FlowRVS", WAN, VIDEO, rows=""),
    Family("Wan SCAIL", "WAN21_SCAIL", {**WAN, "in_dim": 20}, VIDEO, extras=clip_vision(5)),
    Family("Wan SCAIL 2", "WAN21_SCAIL2", {**WAN, "in_dim": 20}, VIDEO, extras=clip_vision(5)),
    Family("WanDancer", "WAN22_WanDancer", {**WAN36, "audio_inject_layers": [0], "music_dim": 32, "music_heads": 2},
           VIDEO, extras=clip_vision(5)),
    Family("LTXV", "LTXV", LTXV, (16, 2, 4, 4), text=masked(2)),
    Family("LTXV adaLN", "LTXV", {**LTXV, "cross_attention_adaln": True}, (16, 2, 4, 4), text=masked(2)),
    Family("LTXAV", "LTXAV", LTXAV, ((16, 2, 4, 4), (8, 3, 16)), width=48, text=masked(2)),
    Family("Cosmos 1", "CosmosT2V", COSMOS1, VIDEO, text=masked(2)),
    Family("Cosmos-Predict2", "CosmosT2IPredict2", PREDICT2, (16, 1, 8, 8), rows="0:16"),
    Family("Cosmos-Predict2 I2V", "CosmosI2VPredict2", {**PREDICT2, "in_channels": 17}, VIDEO),
    Family("Anima", "Anima", PREDICT2, (16, 1, 8, 8), "0:9", "0:16", text=t5_ids, shrink=small_adapter),
    Family("Kandinsky 5 video", "Kandinsky5", KANDINSKY, VIDEO, extras=pooled()),
    Family("Kandinsky 5 image", "Kandinsky5Image", {**KANDINSKY, "visual_embed_dim": 64}, (16, 8, 8), rows="0:16",
           extras=pooled()),
    Family("Kandinsky 6", "Kandinsky6", KANDINSKY6, ((16, 2, 8, 8), (6, 8)), extras=pooled()),
    Family("Kandinsky 6 I2VA", "Kandinsky6", KANDINSKY6, ((16, 2, 8, 8), (6, 8)), rows="0:48",
           extras=pooled(k6_reference=(1, 16, 1, 8, 8))),
    Family("Prism", "Prism", PRISM, ((16, 2, 8, 8), (128, 6)), width=4096, extras=first_frame_and_sound,
           shrink=small_towers, diverted=True),
    # smaller than 64 wide divides by zero
    Family("PixArt Alpha", "PixArtAlpha", {**PIXART, "hidden_size": 48, "micro_condition": True}, (4, 8, 64),
           rows="0:128", reached=False),
    Family("PixArt Sigma", "PixArtSigma", {**PIXART, "micro_condition": False}, (4, 8, 64), rows="0:128",
           reached=False),
    # the columns that change with the prompt: a learned embedding stands in for each padding token
    Family("HunyuanDiT", "HunyuanDiT", HYDIT, (4, 8, 8), "0:5 7:11", "0:16", reached=False, text=two_encoders,
           fixed_length=True),
    Family("HunyuanDiT 1.0", "HunyuanDiT1", {**HYDIT, "size_cond": True, "use_style_cond": True}, (4, 8, 8),
           "0:5 7:11", "0:16", reached=False, text=two_encoders, fixed_length=True),
    Family("ACE-Step", "ACEStep", ACE, (8, 16, 12), "1:13", "0:12",
           text=lambda random, tokens: {"conditioning_lyrics": (random(1, 5).abs() * 20).long()}),
    Family("ACE-Step 1.5", "ACEStep15", ACE15, (64, 16), "0:5 6:13", "0:8", reached=False,
           text=lambda random, tokens: {"conditioning_lyrics": random(1, 5, 24)}),
    Family("Stable Audio", "StableAudio", STABLE_AUDIO, (64, 24), rows="0:25", width=768,
           weights=lambda: seconds(seconds_start={}, seconds_total={})),
    Family("Stable Audio 3", "StableAudio3", STABLE_AUDIO_3, (256, 24), rows="0:28", width=768,
           weights=stable_audio_3),
)
# fmt: on
FAMILIES = JOINT + CROSS
BY_NAME = {family.name: family for family in FAMILIES}

# norms of queries and keys, projections to them, and modulations that would leave a block next to silent; a pooled
# prompt, on the other hand, would reach every token and hide which of them are text
SHARP_NORM = re.compile(r"(^|[._])(q|k|query|key)_(rms_)?norm|norm_(added_)?[qk]\b|ln_[qk]\b|qknorm")
SHARP_LINEAR = re.compile(r"to_q|to_k|qkv|\.q_|\.kv_")
LOUD_LINEAR = re.compile(r"mod[CX]|norm[12]\.linear")
SILENT_LINEAR = re.compile(r"t5_y_embedder\.to_out|pooler\.c_proj")


def initialise(model: torch.nn.Module) -> None:
    """The host leaves weights uninitialised. Attention far from uniform, and text that matters to the output."""
    generator = torch.Generator().manual_seed(1)

    def fill(tensor: torch.Tensor, scale: float) -> None:
        tensor.data = torch.randn(tensor.shape, generator=generator).to(tensor) * scale

    for path, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        gains = ((SHARP_LINEAR, 1.6), (LOUD_LINEAR, 4.0), (SILENT_LINEAR, 0.0))
        gain = next((gain for pattern, gain in gains if pattern.search(path)), 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith(("bias", "beta")):
                parameter.data.zero_()
            elif is_norm or parameter.ndim == 1:
                parameter.data.fill_(2.0 if SHARP_NORM.search(path) else 1.0)
            else:
                fill(parameter, gain * parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("pos_embed", "inv_freq"):
                fill(buffer, 1.0)


def patcher(family: Family) -> comfy.model_patcher.ModelPatcher:
    """Skips the test where this ComfyUI has no such family."""
    config_class = getattr(comfy.supported_models, family.config, None)
    if config_class is None:
        pytest.skip(f"this ComfyUI has no comfy.supported_models.{family.config}")
    config = config_class({**config_class.unet_config, **family.layout})
    config.unet_config.update(family.layout)
    config.sampling_settings.update(family.sampling)
    config.set_inference_dtype(torch.float32, None)
    with family.shrink():
        model = config.get_model(family.weights(), device="cpu")
    initialise(model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def source(seed: int) -> Random:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def prompt(family: Family, seed: int, tokens: int = TOKENS) -> list:
    """Another `seed` is another text; pooled embeddings and everything else that is not one token's stay the same."""
    text = source(seed)
    context = text(1, tokens, family.width)
    return [[context, {**family.extras(source(3)), **family.text(text, tokens)}]]


def noise(family: Family, batch: int = 1, seed: int = 5):
    random = source(seed)
    if isinstance(family.latent[0], tuple):
        return NestedTensor([random(batch, *shape) for shape in family.latent])
    return random(batch, *family.latent)


@torch.inference_mode()
def sample(model, family: Family, positive=None, negative=None, *, cfg=4.0, steps=1, batch=1, seed=5) -> torch.Tensor:
    """The image; of a video with sound, the video. In inference mode as in the host: outside, Anima does otherwise."""
    positive, negative = positive or prompt(family, 11), negative or prompt(family, 12)
    latent = noise(family, batch, seed)
    out = comfy.sample.sample(
        model, latent, steps, cfg, "euler", "normal", positive, negative, latent * 0.0, disable_pbar=True, seed=seed
    )
    return out.unbind()[0] if isinstance(out, NestedTensor) else out
