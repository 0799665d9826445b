"""The table of model families: how each reaches its text attention. A new family is one entry here and one fixture in
tests/host/families.py.

Keys are names of host classes, looked up along the inheritance of the loaded model, so a class that this ComfyUI does
not have costs nothing.

Pads: PLADIS sees the text keys that the host's softmax sees. Pads that the host masks are out; pads that it leaves in
take part, as the padding of SD's 77 tokens does in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ..handed import Handed
from . import spans
from .spans import RowOf, Span, image_text, text_image, text_references_image

UNET, CROSS, JOINT, UNSUPPORTED = "U-Net", "cross", "joint", "none"
# where the encoder puts a start token: in front of every 77 tokens, in front of all
CHUNKS, FIRST = "of every 77 tokens", "the first token"
# what tells the padding that takes part: rows of zeros, the text that was encoded, these where there are any and else
# the text, its place behind the prompt's tokens, nothing
PADDING_OF_ZEROS, PADDING_OF_TEXT, PADDING_OF_ZEROS_OR_TEXT, BEHIND, NOT_TOLD = (
    "zeros", "clip and prompt", "zeros, or clip and prompt", "its place behind the prompt", "nothing",
)  # fmt: skip


class Diverted(NamedTuple):
    """A function that text attention calls past transformer_options, in the Python module whose name ends in `module`.

    `calling` is how it is called: as the host's attention ("host", tensors or containers of tensors), as torch's
    ("torch"), as xformers' ("xformers"; where that is not installed, the entry costs nothing).
    """

    module: str
    name: str = "optimized_attention"
    calling: str = "host"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    `classes` are qualified names of networks, or their ends, where a pack's folder comes first. `kind` is UNET or
    CROSS (text has an attention of its own: whole rows), JOINT (text and image share rows: image queries on text
    keys), or UNSUPPORTED, for the `reason` given. `modules` are the paths of the modules that make the text attention,
    `*` for a number, in the order in which block lists count them. `row` says what a joint row is made of. `text` is
    the argument of apply_model that holds it; without it, there is nothing to do.

    `text_tensor` names the parameter of a block's forward that holds its text stream, where it has one; with
    `img_slice` the host tells its other blocks where in their row the image is. `diverted` are
    the functions that carry the attention of modules which never get transformer_options. `flat`: the batch's prompts
    lie one after the other in one row. `calls` tells the attention calls of one module by the length of their keys,
    where not all of them are text. `ahead` counts the queries in front of those of the picture (-1: all that are not
    the picture's), for who draws maps. `experts`: paths of the modules of each network in the network, of
    which a step runs one. `apart`: the end of the paths of modules that read another text than the argument `text`.
    `start` tells where the encoder puts a start token, `padding` what tells the padding that takes part; empty: none.
    `since`: the oldest tested ComfyUI that has the family; empty: a pack's.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    modules: tuple[str, ...] = ()
    row: RowOf | None = None
    pads: str = ""
    text: str = "c_crossattn"
    text_tensor: str = ""
    img_slice: bool = False
    diverted: tuple[Diverted, ...] = ()
    flat: bool = False
    calls: Callable[[Handed], tuple[Span, ...]] = lambda handed: ()
    ahead: Callable[[Any, Mapping[str, Any]], int] = lambda network, arguments: 0
    experts: tuple[tuple[str, ...], ...] = ()
    apart: str = ""
    start: str | Callable[[Any], str] = ""
    padding: str = ""
    reason: str = ""
    since: str = "0.20.0"

    def start_of(self, network: Any) -> str:
        """`start` of one of the family's networks."""
        return self.start(network) if callable(self.start) else self.start


def image_and_text_calls(handed: Handed) -> tuple[Span, ...]:
    """Wan's image-to-video attention attends to the image first, where there is one (wan/model.py)."""
    tokens, image = handed.tokens("context"), handed.get("context_img_len")
    if tokens is None or image is None or not hasattr(handed.module, "k_img"):
        return ()
    return Span("image", image), Span("text", tokens - image)


def wan_reference(network, arguments: Mapping[str, Any]) -> int:
    """Wan's reference frames come first; HuMo and S2V put theirs last (wan/model.py, forward_orig)."""
    reference = arguments.get("reference_latent")
    if reference is None or type(network).__name__ in ("HumoWanModel", "WanModel_S2V"):
        return 0
    return spans.image_tokens(reference.shape, (1, 2, 2)[-(reference.ndim - 2) :])


def lumina_start(network) -> str:
    """Gemma puts a start token, Z-Image's Qwen none (text_encoders/lumina2.py, z_image.py)."""
    return "" if network.pad_tokens_multiple else FIRST


DOUBLE_SINGLE = ("double_blocks.*", "single_blocks.*")
BLOCKS, LAYERS, TRANSFORMER_BLOCKS = ("blocks.*",), ("layers.*",), ("transformer_blocks.*",)
WAN = {"kind": CROSS, "modules": ("blocks.*.cross_attn", "vace_blocks.*.cross_attn"), "calls": image_and_text_calls,
       "ahead": wan_reference, "pads": "zeros to 512 in the text encoder, not masked: take part",
       "padding": PADDING_OF_ZEROS}  # fmt: skip
NO_PADS = "none"
# attention that calls torch or xformers itself
PLAIN = (Diverted("torch.nn.functional", "scaled_dot_product_attention", "torch"),
         Diverted("xformers.ops", "memory_efficient_attention", "xformers"))  # fmt: skip

# fmt: off
TABLE = (
    Family("SD 1.x, SD 2.x, SDXL and its refiner, SSD-1B, Vega, KOALA, InstructPix2Pix, X4 upscaler", UNET,
           ("comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel", "sd.openaimodel.ReUNetModel"),
           pads="end tokens to 77: take part", start=CHUNKS, padding=PADDING_OF_TEXT),
    Family("SVD, SV3D, Zero123", UNSUPPORTED,
           ("comfy.model_base.SVD_img2vid", "comfy.model_base.Stable_Zero123"),
           reason="It has no text attention: it attends to a single image token, where sparse and dense attention are "
                  "the same"),
    Family("Flux.1, Fill, Kontext, Redux, LongCat-Image; Flux.2, Klein", JOINT, ("comfy.ldm.flux.model.Flux",),
           DOUBLE_SINGLE, text_image(),
           "Flux.1: T5's to 256, Flux.2: zeros on the left to 512, not masked: take part. A mask (Redux) is kept",
           text_tensor="txt", img_slice=True, padding=PADDING_OF_ZEROS_OR_TEXT),
    Family("Chroma, Chroma Radiance", JOINT,
           ("comfy.ldm.chroma.model.Chroma", "comfy.ldm.chroma_radiance.model.ChromaRadiance",
           "chroma.model.ReChroma"), DOUBLE_SINGLE, text_image(), NO_PADS, text_tensor="txt", img_slice=True),
    Family("SD3, SD3.5", JOINT, ("comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
           "sd35.mmdit.ReOpenAISignatureMMDITWrapper"), ("joint_blocks.*",), text_image(),
           "of CLIP to 77 and of T5 to 77, not masked: take part", start=FIRST, padding=PADDING_OF_TEXT),
    Family("AuraFlow", JOINT, ("comfy.ldm.aura.mmdit.MMDiT", "aura.mmdit.ReMMDiT"),
           ("double_layers.*", "single_layers.*"), spans.auraflow,
           "zeros to 256, not masked: take part. The 8 registers do not", text_tensor="c",
           padding=PADDING_OF_ZEROS),
    Family("Qwen-Image, Qwen-Image-Edit", JOINT, ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",),
           TRANSFORMER_BLOCKS, text_image(), "none, or masked: out", text_tensor="encoder_hidden_states"),
    Family("Qwen-Image, Qwen-Image-Edit by ComfyUI-nunchaku", JOINT,
           ("models.qwenimage.NunchakuQwenImageTransformer2DModel",), ("transformer_blocks.*.attn",), text_image(),
           "of a batch, not masked by that pack: take part", text_tensor="encoder_hidden_states",
           diverted=(Diverted("models.qwenimage", "optimized_attention_masked"),), since=""),
    Family("MageFlow", JOINT, ("comfy.ldm.mage_flow.model.MageFlowTransformer2DModel",), TRANSFORMER_BLOCKS,
           text_image(), "none, or masked: out", text_tensor="encoder_hidden_states", since="0.33.0"),
    Family("Qwen-Image 2.1", JOINT, ("comfy.ldm.qwen_image21.model.QwenImage21Transformer2DModel",),
           TRANSFORMER_BLOCKS, spans.qwen_image21, NO_PADS, diverted=(Diverted("comfy.ldm.qwen_image21.model"),),
           since="0.38.1"),
    Family("Lumina 2, NewBie, Z-Image (Omni, pixel), Ming-Image", JOINT, ("comfy.ldm.lumina.model.NextDiT",), LAYERS,
           spans.lumina, "Lumina 2: none. Z-Image, Ming-Image-Layer: learned ones to a multiple of 32, not masked, "
           "which carry text after the refiner: take part", start=lumina_start, padding=BEHIND),
    Family("HunyuanVideo 1 and 1.5, SkyReels, HunyuanCustom, HunyuanImage 2.1", JOINT,
           ("comfy.ldm.hunyuan_video.model.HunyuanVideo",), DOUBLE_SINGLE, spans.hunyuan_video,
           "none, or masked: out. Vision tokens do not take part, glyph tokens do", text_tensor="txt",
           img_slice=True),
    Family("HiDream I1, E1", JOINT, ("comfy.ldm.hidream.model.HiDreamImageTransformer2DModel",),
           ("double_stream_blocks.*", "single_stream_blocks.*"), spans.hidream,
           "of T5 and Llama to 128, not masked: take part", padding=NOT_TOLD),
    Family("OmniGen2", JOINT, ("comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel",), LAYERS,
           text_references_image(), NO_PADS),
    Family("Boogu", JOINT, ("comfy.ldm.boogu.model.BooguTransformer2DModel",),
           ("double_stream_layers.*.img_instruct_attn", "single_stream_layers.*"), text_references_image(), NO_PADS,
           since="0.33.0"),
    Family("Mochi", JOINT, ("comfy.ldm.genmo.joint_model.asymm_models_joint.AsymmDiTJoint",), BLOCKS, spans.mochi,
           "of T5 to 256, cut off by the host: out"),
    Family("CogVideoX", JOINT, ("comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel",), BLOCKS, spans.cogvideo,
           "of T5 to 226, not masked: take part", text_tensor="encoder_hidden_states", padding=PADDING_OF_TEXT,
           since="0.33.0"),
    Family("Krea 2", JOINT, ("comfy.ldm.krea2.model.SingleStreamDiT",), BLOCKS, spans.krea2, NO_PADS,
           since="0.33.0"),
    Family("Ideogram 4", JOINT, ("comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel",), LAYERS, text_image(1),
           "masked: out", since="0.33.0"),
    Family("JoyImage", JOINT, ("comfy.ldm.joyimage.model.JoyImageTransformer3DModel",), ("double_blocks.*",),
           image_text(), NO_PADS, since="0.33.0"),
    Family("Lens", JOINT, ("comfy.ldm.lens.model.LensTransformer2DModel",), TRANSFORMER_BLOCKS, image_text(1),
           "masked: out", since="0.33.0"),
    Family("PixelDiT", JOINT, ("comfy.ldm.pixeldit.model.PixDiT_T2I",), ("patch_blocks.*",), spans.pixeldit,
           "to 300, not masked: take part", start=FIRST, padding=PADDING_OF_TEXT, since="0.33.0"),
    Family("ERNIE-Image", JOINT, ("comfy.ldm.ernie.model.ErnieImageModel",), LAYERS, image_text(), NO_PADS,
           diverted=(Diverted("comfy.ldm.ernie.model"),)),
    Family("Stable Cascade, stage C", JOINT, ("comfy.ldm.cascade.stage_c.StageC",),
           ("down_blocks.*.*.attention.attn", "up_blocks.*.*.attention.attn"), spans.cascade_c,
           "end tokens to 77: take part. Pooled prompt and vision tokens do not", text="clip_text", start=CHUNKS,
           padding=PADDING_OF_TEXT),
    Family("Stable Cascade, stage B", JOINT, ("comfy.ldm.cascade.stage_b.StageB",),
           ("down_blocks.*.*.attention.attn", "up_blocks.*.*.attention.attn"), spans.cascade_b,
           "none: the text is one pooled vector, mapped to 4 tokens", text="clip"),
    Family("MiniMax H3", JOINT, ("comfy.ldm.minimax.model.MiniMaxH3Model",), BLOCKS, spans.minimax, NO_PADS,
           since="0.33.0"),
    Family("Wan 2.1 and 2.2: T2V, I2V, FLF, Fun, VACE, Camera, HuMo, S2V, Animate, SCAIL, FlowRVS",
           classes=("comfy.ldm.wan.model.WanModel", "wan.model.ReWanModel"), **WAN),
    Family("Wan: Animate 2, WanDancer, CausalAR (not with its own sampler)", since="0.33.0", classes=(
           "comfy.ldm.wan.model_animate2.WanAnimate2Model", "comfy.ldm.wan.model_wandancer.WanDancerModel",
           "comfy.ldm.wan.ar_model.CausalWanModel"), **WAN),
    Family("LTXV", CROSS, ("comfy.ldm.lightricks.model.LTXVModel",), ("transformer_blocks.*.attn2",),
           pads="masked: out"),
    Family("LTX-2, video and audio", CROSS, ("comfy.ldm.lightricks.av_model.LTXAVModel",),
           ("transformer_blocks.*.attn2", "transformer_blocks.*.audio_attn2"),
           pads="learned registers to 1024, not masked: take part", padding=NOT_TOLD),
    Family("Cosmos 1", CROSS, ("comfy.ldm.cosmos.model.GeneralDIT",), ("blocks.block*.blocks.1.block.attn",),
           pads="zeros to 512, not masked: take part", padding=PADDING_OF_ZEROS),
    Family("Cosmos-Predict2, Anima", CROSS, ("comfy.ldm.cosmos.predict2.MiniTrainDIT",), ("blocks.*.cross_attn",),
           pads="zeros to 512, not masked: take part", padding=PADDING_OF_ZEROS),
    Family("Kandinsky 5", CROSS, ("comfy.ldm.kandinsky5.model.Kandinsky5",),
           ("visual_transformer_blocks.*.cross_attention",), pads=NO_PADS),
    Family("Kandinsky 6, video and audio", CROSS, ("comfy.ldm.kandinsky6.model.Kandinsky6NativeAVDiT",),
           ("visual_blocks.*.videoT.cross_attention", "visual_blocks.*.audioT.cross_attention"), pads=NO_PADS,
           since="0.38.1"),
    Family("Prism, video and audio", CROSS, ("comfy.ldm.prism.model.Prism",),
           ("fusion_blocks.*.video_block.cross_attn", "fusion_blocks.*.audio_block.cross_attn",
           "remaining_video_blocks.*.cross_attn", "video_dit_2.blocks.*.cross_attn"), pads=NO_PADS,
           experts=(("fusion_blocks.*.video_block.*", "remaining_video_blocks.*"), ("video_dit_2.*",)),
           apart=".audio_block.cross_attn", since="0.38.1"),
    Family("PixArt alpha, sigma", CROSS, ("comfy.ldm.pixart.pixartms.PixArtMS",), ("blocks.*.cross_attn",),
           pads=NO_PADS, diverted=(Diverted("comfy.ldm.pixart.blocks"),)),
    Family("HunyuanDiT", CROSS, ("comfy.ldm.hydit.models.HunYuanDiT",), ("blocks.*.attn2",),
           pads="a learned embedding for each, not masked: take part", padding=NOT_TOLD,
           diverted=(Diverted("comfy.ldm.hydit.attn_layers"),)),
    Family("SANA by ComfyUI_ExtraModels", CROSS, ("Sana.models.sana_multi_scale.SanaMS", "Sana.models.sana.Sana"),
           ("blocks.*.cross_attn",), pads="cut off by that pack: out", diverted=PLAIN, flat=True, since=""),
    Family("PixArt by ComfyUI_ExtraModels", CROSS,
           ("PixArt.models.PixArtMS.PixArtMS", "PixArt.models.PixArt.PixArt"), ("blocks.*.cross_attn",), pads=NO_PADS,
           diverted=PLAIN, flat=True, since=""),
    Family("ACE-Step 1", CROSS, ("comfy.ldm.ace.model.ACEStepTransformer2DModel",),
           ("transformer_blocks.*.cross_attn",), pads="none. Speaker and lyrics are in the same rows: whole row"),
    Family("ACE-Step 1.5", CROSS, ("comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel",),
           ("decoder.layers.*.cross_attn",), pads="none. Lyrics and timbre are in the same rows: whole row",
           diverted=(Diverted("comfy.ldm.ace.ace_step15"),)),
    Family("Stable Audio 1, 3", CROSS, ("comfy.ldm.audio.dit.AudioDiffusionTransformer",),
           ("transformer.layers.*.cross_attn",), pads="to 128 (3: 256), not masked: take part, and so do the seconds. "
           "Version 3 subtracts a second attention: PLADIS is in both", padding=NOT_TOLD,
           ahead=lambda network, arguments: -1),
    Family("Hunyuan3D, Trellis 2, TripoSplat", UNSUPPORTED, (
           "comfy.ldm.hunyuan3d.model.Hunyuan3Dv2", "comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain",
           "comfy.ldm.hunyuan3d.paint.unet.UNet2p5DConditionModel", "comfy.ldm.trellis2.model.Trellis2",
           "comfy.ldm.triposplat.model.LatentSeqMMFlowModel"),
           reason="It has no text attention: it attends to an image"),
    Family("SeedVR2, MiniMax-Music, PiD", UNSUPPORTED, (
           "comfy.ldm.seedvr.model.NaDiT", "comfy.ldm.minimax_music.dit.MiniMaxMusic3DiT",
           "comfy.ldm.pixeldit.pid.PidNet"),
           reason="This pack does not cover it: where its attention reads a prompt, if it does, has not been tested"),
    Family("HiDream-O1, SenseNova U1.5, YuE2", UNSUPPORTED, (
           "comfy.ldm.hidream_o1.model.HiDreamO1Transformer", "comfy.ldm.sensenova.model.SenseNovaU15",
           "comfy.ldm.yue2.model.YuE2"),
           reason="It is a language model: the prompt and what is made are one causal sequence, which PLADIS does not "
                  "cover"),
)
# fmt: on
NAMES = {name: family for family in TABLE for name in family.classes}


@cache
def _row_of(network: type) -> Family | None:
    name = f"{network.__module__}.{network.__qualname__}"
    # a pack's folder, which people name as they like, stands in front of the module's name
    return NAMES.get(name) or next((family for end, family in NAMES.items() if name.endswith("." + end)), None)


def is_known(network: type) -> bool:
    return any(_row_of(c) for c in network.__mro__)


def find_family(base, network) -> Family | None:
    """The table's row for a model (comfy.model_base.BaseModel): by its own class, else by its network's."""
    return next((row for c in (*type(base).__mro__, *type(network).__mro__) if (row := _row_of(c))), None)
