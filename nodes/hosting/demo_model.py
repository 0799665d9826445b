"""The demo model (demo/) built from ComfyUI's own classes, so that every node works on it as on any model.

It is not one of the models that ComfyUI recognises: its configuration is given instead of detected
(comfy/supported_models_base.py, comfy/sd.py load_state_dict_guess_config).
"""

from __future__ import annotations

import os
from pathlib import Path

import comfy.clip_model
import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError, safe_open

from ...demo import config
from ...demo.vocabulary import END, LENGTH, START, TOKENS, split_words

Weights = dict[str, torch.Tensor]


class DemoLatents(comfy.latent_formats.LatentFormat):
    latent_channels = config.LATENT_CHANNELS
    spacial_downscale_ratio = config.DOWNSCALE
    # the best linear guess at the colours, for the sampler's previews
    latent_rgb_factors = [
        [-0.0089, 0.1909, 0.2794],
        [-0.1280, -0.0788, -0.0995],
        [-0.1198, -0.1715, -0.2648],
        [0.0388, -0.1890, -0.3854],
    ]
    latent_rgb_factors_bias = [0.9198, 0.9142, 0.8988]


class DemoConfig(comfy.supported_models_base.BASE):
    unet_extra_config: dict = {}
    latent_format = DemoLatents
    sampling_settings = {"shift": config.SHIFT}
    # as small as it is, half precision would save nothing and cost the identity with diffusers
    supported_inference_dtypes = [torch.float32]

    def model_type(self, state_dict: Weights, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def inpaint_model(self) -> bool:
        return False

    def clip_target(self, state_dict: Weights | None = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClip)


# under which names the host saves the parts of a checkpoint (comfy/supported_models_base.py, BASE)
SAVED_UNET, SAVED_TEXT, SAVED_VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
# bytes: a checkpoint of the demo model in float32 has some 10 MB, any other kind of model hundreds
LARGEST = 1 << 26


def load_demo_model(unet: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE; `unet` names a diffusion model of demo/weights, or a checkpoint that was saved of one."""
    return load_unet(unet), load_clip(unet), load_vae(unet)


def saved_checkpoints() -> list[str]:
    """The checkpoints in ComfyUI's folders that Save Checkpoint made of the demo model.

    ComfyUI's own loaders do not know this kind of model.
    """
    names = folder_paths.get_filename_list("checkpoints")
    return [name for name in names if _is_demo_model(folder_paths.get_full_path("checkpoints", name))]


def _is_demo_model(file: str | None) -> bool:
    if file is None or not file.endswith(".safetensors") or os.path.getsize(file) > LARGEST:
        return False
    try:
        with safe_open(file, "pt") as checkpoint:
            return _weight_names() <= set(checkpoint.keys())
    except SafetensorError:
        return False


def _weight_names() -> set[str]:
    """Of the diffusion model, in a checkpoint."""
    names = unet_names()
    with safe_open(config.WEIGHTS / "unet.safetensors", "pt") as shipped:
        keys = shipped.keys()
    return {SAVED_UNET + names[key] for key in keys}


def _read(unet: str, prefix: str, shipped: str) -> tuple[Weights, bool]:
    """The weights of a part, and whether they have the host's names: a saved checkpoint's, where it holds the part."""
    saved = folder_paths.get_full_path("checkpoints", unet)
    weights = _floats(saved) if saved else {}
    weights = comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True)
    return (weights, True) if weights else (_floats(config.WEIGHTS / f"{shipped}.safetensors"), False)


def _floats(file: str | Path) -> Weights:
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is missing: install the pack again, its demo model comes with it")
    return {key: value.float() for key, value in comfy.utils.load_torch_file(str(file)).items()}


def unet_config() -> dict:
    """The layout in ComfyUI's terms, from that in diffusers' terms."""
    size = config.UNET
    channels, layers = size["channels"], size["layers"]
    attention = [int(text) for text in size["attention"]]
    return {
        "image_size": config.LATENT_SIZE,
        "in_channels": config.LATENT_CHANNELS,
        "out_channels": config.LATENT_CHANNELS,
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for depth in attention for _ in range(layers)],
        "transformer_depth_output": [depth for depth in attention for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "num_heads": -1,
        "num_head_channels": size["head_width"],
        "context_dim": config.TEXT_ENCODER["hidden_size"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def unet_names() -> dict[str, str]:
    """diffusers' names of the diffusion model's weights to ComfyUI's."""
    return comfy.utils.unet_to_diffusers(unet_config())


def load_unet(unet: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """As comfy/sd.py load_state_dict_guess_config does it; the host calls it again for copies of the model."""
    weights, hosts = _read(unet, SAVED_UNET, unet)
    if not hosts:
        names = unet_names()
        weights = {names[key]: value for key, value in weights.items()}
    demo = DemoConfig(unet_config())
    demo.set_inference_dtype(torch.float32, None)
    model = demo.get_model({}, device=torch.device("cpu"))
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_unet, (unet,))
    return patcher


class DemoTextModel(comfy.clip_model.CLIPTextModel):
    """The host's CLIP, whose vocabulary is fixed at CLIP's own size, with ours."""

    def __init__(self, size: dict, dtype, device, operations) -> None:
        super().__init__(size, dtype, device, operations)
        self.set_input_embeddings(
            operations.Embedding(size["vocab_size"], size["hidden_size"], dtype=dtype, device=device)
        )


class DemoClipModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options: dict | None = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options or {},
            max_length=LENGTH,
            textmodel_json_config={**config.TEXT_ENCODER, "eos_token_id": TOKENS[END]},
            special_tokens={"start": TOKENS[START], "end": TOKENS[END], "pad": TOKENS[END]},
            model_class=DemoTextModel,
            return_projected_pooled=False,
        )


class DemoClip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options: dict | None = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DemoClipModel)


class Words:
    """The vocabulary as a tokenizer of transformers, as far as the host uses one."""

    @classmethod
    def from_pretrained(cls, path: str, **_) -> Words:
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [TOKENS[START], *(TOKENS[word] for word in split_words(text)), TOKENS[END]]}

    def get_vocab(self) -> dict[str, int]:
        return TOKENS

    def decode(self, numbers: list[int], skip_special_tokens: bool = True) -> str:
        words = list(TOKENS)
        hidden = (START, END) if skip_special_tokens else ()
        return " ".join(words[number] for number in numbers if words[number] not in hidden)


class DemoSDTokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            tokenizer_path="",
            max_length=LENGTH,
            embedding_directory=embedding_directory,
            embedding_size=config.TEXT_ENCODER["hidden_size"],
            tokenizer_class=Words,
            tokenizer_data=tokenizer_data or {},
        )


class DemoTokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}, tokenizer=DemoSDTokenizer
        )


def load_clip(unet: str, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    weights, hosts = _read(unet, SAVED_TEXT, "text_encoder")
    if not hosts:
        prefix = "clip_l.transformer."
        weights = {f"{prefix}text_model.{key}": value for key, value in weights.items()}
        # the host projects the pooled state, which a model without pooled conditioning never looks at
        weights[f"{prefix}text_projection.weight"] = torch.eye(config.TEXT_ENCODER["hidden_size"])
    clip = comfy.sd.CLIP(
        DemoConfig({}).clip_target(),
        state_dict=weights,
        parameters=comfy.utils.calculate_parameters(weights),
        model_options={"dtype": torch.float32},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_clip_patcher, (unet,))
    return clip


def _clip_patcher(unet: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(unet, disable_dynamic).patcher


def load_vae(unet: str) -> comfy.sd.VAE:
    size = config.AUTOENCODER
    levels = len(size["channels"])
    layout = {
        "double_z": True,
        "z_channels": config.LATENT_CHANNELS,
        "resolution": config.LATENT_SIZE * config.DOWNSCALE,
        "in_channels": 3,
        "out_ch": 3,
        "ch": size["channels"][0],
        "ch_mult": [width // size["channels"][0] for width in size["channels"]],
        "num_res_blocks": size["layers"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    weights, hosts = _read(unet, SAVED_VAE, "autoencoder")
    if not hosts:
        weights = comfy.diffusers_convert.convert_vae_state_dict(weights)
        # the host numbers the decoder's levels as if there were four of them
        for level in range(4 - levels, 4):
            there, here = f"decoder.up.{level}.", f"decoder.up.{level + levels - 4}."
            weights = comfy.utils.state_dict_prefix_replace(weights, {there: here})
    vae = comfy.sd.VAE(
        sd=weights, config={"params": {"ddconfig": layout, "embed_dim": config.LATENT_CHANNELS}}, dtype=torch.float32
    )
    vae.downscale_ratio = vae.upscale_ratio = config.DOWNSCALE
    vae.latent_channels = config.LATENT_CHANNELS
    vae.patcher.cached_patcher_init = (_vae_patcher, (unet,))
    return vae


def _vae_patcher(unet: str, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    # the host's VAE leaves no choice (comfy/sd.py, load_checkpoint_vae_patcher)
    return load_vae(unet).patcher
