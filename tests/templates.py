"""Writes example_workflows: what each template is made of, from which its file and its thumbnail are made.

    PLADIS_WRITE_TEMPLATES=1 python -m pytest tests/test_hosts.py -k "newest-workflows"

writes all of them on a running ComfyUI, and chooses anew what depends on the demo model: do it after a change of the
model, of a node's inputs, of ComfyUI's oldest version, or here. The same tests without the variable compare.

A page is laid out for a laptop's first fit, which makes a template three quarters of the window wide: about 1060 x 570
units, at which the text of a note is 9 to 10 pixels high. Nodes that a first look does not need are collapsed.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from workflows import FOLDER, THIRD_PARTY, inputs_of, widget_names

PACK, OLDEST = "pladis-comfy", "0.20.0"
NOTE = "MarkdownNote"
HUGGING_FACE = "https://huggingface.co"
TEAPOT = "a red teapot left of a blue vase on a wooden table, morning light from a window"
# what the templates without a download draw, and how far their pictures' pixels are enlarged
# by a rule, never by how it comes out: the first held-out caption of seed 1 (demo/scenes.py, random_prompts), as in
# `python -m demo`
PROMPT = (
    "a red circle and a small orange triangle and a large filled purple diamond and a cyan circle and a filled cyan bar"
)
SEED, ENLARGED = 1, 4
# what was chosen for the demo model by measurement, on other captions, with all tokens and this CFG
DEMO_SCALE = 0.5
DEMO_SAMPLING = {"steps": 20, "cfg": 3, "sampler_name": "euler", "scheduler": "simple"}
NOT_RUN = "Not run by us with these weights; the thumbnail is a drawing of attention weights, not this model's output."
TO_COMPARE = "To compare, set **scale** to 0 and run again: the plain model, bit for bit."
CHOICES = Path(__file__).parent / "template_choices.json"
# thumbnails
# what a collapsed node takes in Nodes 2.0, where the fit goes by what is saved
COLLAPSED = (225, 30)
MARGIN, TITLE_HEIGHT, BACKGROUND, INK = 8, 110, (24, 24, 27), (235, 235, 235)
DRAWING = Path(__file__).parent / "drawing.png"


@dataclass(frozen=True)
class Model:
    """A file to download: its place on Hugging Face and its folder in models/."""

    path: str
    folder: str
    # of a file that is saved under another name
    called: str = ""

    @property
    def name(self) -> str:
        return self.called or self.path.rsplit("/", 1)[1]

    @property
    def url(self) -> str:
        owner, repository, file = self.path.split("/", 2)
        return f"{HUGGING_FACE}/{owner}/{repository}/resolve/main/{file}"


@dataclass
class Node:
    kind: str
    at: tuple[int, int]
    size: tuple[int, int]
    title: str = ""
    values: dict = field(default_factory=dict)
    # an input's name: a node and the place of its output
    links: dict[str, tuple[Node, int]] = field(default_factory=dict)
    models: tuple[Model, ...] = ()
    collapsed: bool = False
    # the first ComfyUI whose node of this kind can do it
    since: str = OLDEST


class Page(list):
    """The nodes of a template, in their order."""

    def add(self, kind: str, at, size, title: str = "", **rest) -> Node:
        values = {name: value for name, value in rest.items() if name not in Node.__annotations__}
        links = {n: v if isinstance(v, tuple) else (v, 0) for n, v in values.items() if _is_link(v)}
        given = {n: v for n, v in values.items() if n not in links}
        options = {name: value for name, value in rest.items() if name in Node.__annotations__}
        self.append(Node(kind, at, size, title, given, links, **options))
        return self[-1]

    def small(self, kind: str, at, title: str = "", **rest) -> Node:
        """Collapsed: what a first look does not need."""
        return self.add(kind, at, COLLAPSED, title, collapsed=True, **rest)

    def note(self, at, size, *paragraphs: str) -> None:
        self.add(NOTE, at, size, text="\n\n".join(paragraphs))


def _is_link(value) -> bool:
    return isinstance(value, Node) or (isinstance(value, tuple) and isinstance(value[0], Node))


# the templates that need no download


def demo(choice: dict) -> Page:
    page = Page()
    page.note(
        (0, 0), (270, 230), "## With and without PLADIS",
        "Press **Run**: the same prompt and the same seed twice, in seconds, also without a GPU.",
        "**Look at** which objects of the prompt are there, and what is there besides. One seed says little: over 1000 "
        "such prompts this tiny model, trained three times, drew all objects in .675 of the pictures with **scale** "
        "0.5, in .582 without, and 1.33 extra ones a picture against .11.",
        "The plot shows what **scale** does to the weights of words. The prompt is the first of a list, not picked.",
    )  # fmt: skip
    loader = page.small("PLADISDemoCheckpoint", (540, 525), "Demo model")
    prompt = page.add("CLIPTextEncode", (295, 380), (230, 183), "Prompt", clip=(loader, 1), text=PROMPT)
    negative = page.small("CLIPTextEncode", (540, 558), "Negative prompt", clip=(loader, 1), text="")
    seed = page.add("PrimitiveInt", (540, 380), (230, 82), "Seed", value=SEED)
    latent = page.small("EmptyLatentImage", (540, 492), width=64, height=64)
    apply = page.add("PLADISApply", (0, 270), (270, 298), model=loader, scale=choice["scale"])
    common = {"positive": prompt, "negative": negative, "latent_image": latent, "seed": seed, **DEMO_SAMPLING}
    for number, (title, model) in enumerate((("Plain model", loader), ("Apply PLADIS", apply))):
        y = 380 + 105 * number
        sampled = page.small("KSampler", (785, y), f"Run: {title}", model=model, **common)
        decoded = page.small("VAEDecode", (785, y + 35), samples=sampled, vae=(loader, 2))
        enlarge(page, (785, y + 70), decoded, (295 + 385 * number, 0), (370, 340), title)
    return page


def enlarge(page: Page, at, decoded: Node, preview_at, size, title: str) -> None:
    """The picture with squares for pixels, and where it is shown."""
    larger = page.small("ImageScaleBy", at, "Pixels as squares", image=decoded, upscale_method="nearest-exact",
                        scale_by=ENLARGED)  # fmt: skip
    page.add("PreviewImage", preview_at, size, title, images=larger)


def sweep(choice: dict) -> Page:
    page = Page()
    page.note(
        (0, 0), (250, 300), "## Compare scales and alphas",
        "Press **Run**: one prompt and one seed at every **scale** and **alpha** of the two lists of **PLADIS Sweep**, "
        "side by side. The first column is the plain model.",
        "**Look at** where along a row the picture starts to change, and where it breaks: your scale lies between. "
        "Then change the seed and see whether that still holds.",
        "Done cells stay cached: add a number, and only its cells are sampled. For your own model put its loader in "
        "the demo's place and set steps, cfg and size to suit it.",
    )  # fmt: skip
    loader = page.small("PLADISDemoCheckpoint", (570, 510), "Demo model")
    prompt = page.add("CLIPTextEncode", (0, 340), (250, 223), "Prompt", clip=(loader, 1), text=PROMPT)
    negative = page.small("CLIPTextEncode", (280, 510), "Negative prompt", clip=(loader, 1), text="")
    latent = page.small("EmptyLatentImage", (280, 545), width=64, height=64)
    swept = page.add(
        "PLADISSweep", (280, 0), (260, 420), model=loader, positive=prompt, negative=negative, latent_image=latent,
        vae=(loader, 2), seed=SEED, **DEMO_SAMPLING, scales="0, 0.5, 1, 2", alphas="1.5, 2",
    )  # fmt: skip
    page.add("SaveImage", (570, 0), (490, 400), "Every scale and alpha", images=(swept, 1),
             filename_prefix="pladis/sweep")  # fmt: skip
    return page


def attention_map(choice: dict) -> Page:
    page = Page()
    page.note(
        (0, 0), (250, 330), "## Where does the model look for each word?",
        "Press **Run**. For each of **words** there are three maps over the picture: dense (softmax), sparse (entmax) "
        "and extrapolated by **scale**.",
        f"**Look at** {choice['seen']}",
        "Sparse takes a word away from some places and gives it more weight at others. Extrapolated: red is weight, "
        "blue below zero.",
        "The text goes to the encoder and to the map, so it stands once, in **Prompt**.",
    )  # fmt: skip
    loader = page.small("PLADISDemoCheckpoint", (570, 485), "Demo model")
    text = page.add("PrimitiveStringMultiline", (0, 370), (250, 150), "Prompt", value=choice["prompt"])
    prompt = page.small("CLIPTextEncode", (570, 520), "Encoded prompt", clip=(loader, 1), text=text)
    negative = page.small("CLIPTextEncode", (570, 555), "Negative prompt", clip=(loader, 1), text="")
    latent = page.small("EmptyLatentImage", (820, 485), width=64, height=64)
    sampled = page.small("KSampler", (820, 520), model=loader, positive=prompt, negative=negative, latent_image=latent,
                         seed=choice["seed"], **DEMO_SAMPLING)  # fmt: skip
    decoded = page.small("VAEDecode", (820, 555), samples=sampled, vae=(loader, 2))
    maps = page.add(
        "PLADISAttentionMap", (280, 0), (260, 450), model=loader, positive=prompt, latent=sampled, clip=(loader, 1),
        image=decoded, prompt=text, words=choice["words"], percent=choice["percent"], layers=choice["layers"],
        blocks=choice["blocks"],
    )  # fmt: skip
    page.add("SaveImage", (570, 0), (490, 400), "Maps: dense, sparse, extrapolated", images=(maps, 0),
             filename_prefix="pladis/maps")  # fmt: skip
    page.small("PreviewAny", (570, 450), "Report", source=(maps, 1))
    page.small("PreviewImage", (820, 450), "Report as bars", images=(maps, 2))
    return page


def schedule(choice: dict) -> Page:
    page = Page()
    page.note(
        (0, 0), (260, 260), "## A scale that falls",
        "**Apply PLADIS (Advanced)** starts at **scale** and ends at **end_scale**: strong while the layout forms, "
        "nothing for the details. Beside it the same scale all along.",
        "**Look at** what stays of the layout, and what the end of the run makes of the details.",
        "It also chooses layers, blocks and prompts; its help page says what for.",
    )  # fmt: skip
    loader = page.small("PLADISDemoCheckpoint", (600, 450), "Demo model")
    prompt = page.add("CLIPTextEncode", (0, 300), (260, 180), "Prompt", clip=(loader, 1), text=PROMPT)
    seed = page.add("PrimitiveInt", (0, 520), (260, 82), "Seed", value=SEED)
    negative = page.small("CLIPTextEncode", (600, 485), "Negative prompt", clip=(loader, 1), text="")
    latent = page.small("EmptyLatentImage", (600, 520), width=64, height=64)
    constant = page.small("PLADISApply", (945, 450), model=loader, scale=2)
    falling = page.add("PLADISApplyAdvanced", (280, 0), (300, 695), model=loader, scale=2, scale_schedule="cosine",
                       end_scale=0)  # fmt: skip
    common = {"positive": prompt, "negative": negative, "latent_image": latent, "seed": seed, **DEMO_SAMPLING}
    for number, (title, model) in enumerate((("Constant scale 2", constant), ("Falling: 2 to 0", falling))):
        x = 600 + 345 * number
        sampled = page.small("KSampler", (x, 570), f"Run: {title.split()[0]}", model=model, **common)
        decoded = page.small("VAEDecode", (x, 605), samples=sampled, vae=(loader, 2))
        enlarge(page, (x, 640), decoded, (x, 0), (330, 390), title)
    return page


# the templates of models to download


def picture(
    heading: str, *paragraphs: str, files: dict[str, Model], sampling: dict, scale: float = 2, clip_type: str = "",
    shift: float | None = None, latent: str = "EmptyLatentImage", size: int = 1024, guidance: float | None = None,
    negative: str | None = "", since: str = OLDEST,
) -> Page:
    """A picture from a text.

    Args:
        files: a checkpoint, or a model, a text encoder and a VAE; each by what it is.
        negative: None where the prompt's zeros take its place.
        since: the first ComfyUI that knows `clip_type`.
    """
    page = Page()
    page.note((0, 0), (250, 300), f"## {heading}", *paragraphs, downloads(files), NOT_RUN)
    models = list(files.values())
    applied_to, clip, vae = load(page, models, clip_type, since)
    model = page.add("PLADISApply", (265, 0), (240, 298), model=applied_to, scale=scale)
    if shift is not None:
        model = page.add("ModelSamplingAuraFlow", (265, 436), (240, 58), model=model, shift=shift)
    several = len(models) > 1
    empty = page.add(latent, (265, 535 if several else 338), (240, 106), width=size, height=size, collapsed=several)
    prompt = page.add("CLIPTextEncode", (520, 0), (230, 130), "Prompt", clip=clip, text=TEAPOT)
    positive, below = prompt, 170
    if guidance is not None:
        positive, below = page.add("FluxGuidance", (520, 170), (230, 58), conditioning=prompt, guidance=guidance), 268
    if negative is None:
        against = page.small("ConditioningZeroOut", (520, below), conditioning=prompt)
    else:
        against = page.add("CLIPTextEncode", (520, below), (230, 90), "Negative prompt", clip=clip, text=negative,
                           collapsed=not negative)  # fmt: skip
    sampled = page.add(
        "KSampler", (520, below + (130 if negative else 40)), (230, 262), model=model, positive=positive,
        negative=against, latent_image=empty, seed=1, **sampling,
    )
    decoded = page.small("VAEDecode", (765, 420), samples=sampled, vae=vae)
    page.add("SaveImage", (765, 0), (295, 370), images=decoded, filename_prefix="pladis/picture")
    return page


def downloads(files: dict[str, Model]) -> str:
    listed = "\n".join(f"- [{what}]({file.url}) into models/{file.folder}" for what, file in files.items())
    return f"ComfyUI offers to download what is missing:\n{listed}"


def load(page: Page, models: list[Model], clip_type: str, since: str = OLDEST):
    """The loaders of a checkpoint, or of a model, a text encoder and a VAE; their model, CLIP and VAE."""
    if len(models) == 1:
        (file,) = models
        checkpoint = page.add("CheckpointLoaderSimple", (0, 340), (250, 126), ckpt_name=file.name, models=(file,))
        return (checkpoint, 0), (checkpoint, 1), (checkpoint, 2)
    network, text_encoder, autoencoder = models
    model = page.add("UNETLoader", (0, 340), (250, 82), unet_name=network.name, models=(network,))
    clip = page.add("CLIPLoader", (0, 462), (250, 106), clip_name=text_encoder.name, type=clip_type,
                    models=(text_encoder,), since=since)  # fmt: skip
    vae = page.add("VAELoader", (265, 338), (240, 58), vae_name=autoencoder.name, models=(autoencoder,))
    return (model, 0), (clip, 0), (vae, 0)


def sampling(steps: int, cfg: float, sampler_name: str, scheduler: str) -> dict:
    return {"steps": steps, "cfg": cfg, "sampler_name": sampler_name, "scheduler": scheduler}


AUTHORS_RANGE = (
    "**scale** 1.5: the authors' README says 1.5 to 2 for all its models, to be adjusted to each. Not measured by "
    "us on "
    "this one."
)
SDXL = Model("stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors", "checkpoints")
QWEN, KREA = "Comfy-Org/Qwen-Image_ComfyUI/split_files", "Comfy-Org/Krea-2"
Z_IMAGE = "Comfy-Org/z_image_turbo/split_files"
WAN = "Comfy-Org/Wan_2.1_ComfyUI_repackaged/split_files"


def sd15(_) -> Page:
    return picture(
        "SD 1.5 with PLADIS",
        "**Apply PLADIS** sits between the checkpoint and the sampler. Nothing else changes.",
        TO_COMPARE, "Where pictures turn mushy, try **scale** 1 to 1.5.",
        files={"v1-5-pruned-emaonly-fp16": Model(
            "Comfy-Org/stable-diffusion-v1-5-archive/v1-5-pruned-emaonly-fp16.safetensors", "checkpoints")},
        sampling=sampling(25, 7, "dpmpp_2m", "karras"), size=512, negative="blurry, low quality",
    )  # fmt: skip


def sdxl(_) -> Page:
    return picture(
        "SDXL with PLADIS", "The paper's own model, at its **scale** 2 and **alpha** 1.5.", TO_COMPARE,
        "On checkpoints trained on tags (Pony, Illustrious) use less: try 0.5 to 1.",
        files={"sd_xl_base_1.0": SDXL}, sampling=sampling(25, 5, "euler", "normal"), negative="blurry, low quality",
    )  # fmt: skip


def few_step(_) -> Page:
    return picture(
        "SDXL Lightning, 4 steps, with PLADIS",
        "PLADIS needs no guidance: it works at CFG 1, where the negative prompt has no effect.",
        "Keep steps, sampler, scheduler and cfg: the model was distilled for them. Other few-step models (Turbo, "
        "Hyper, "
        "DMD2, LCM) are wired in the same way, with their own.", TO_COMPARE,
        files={"sdxl_lightning_4step": Model(
            "ByteDance/SDXL-Lightning/sdxl_lightning_4step.safetensors", "checkpoints")},
        sampling=sampling(4, 1, "euler", "sgm_uniform"),
    )  # fmt: skip


def flux(_) -> Page:
    return picture(
        "Flux.1 dev with PLADIS",
        "Text and image share one attention. PLADIS keeps how much the picture attends to the text, and changes how "
        "that "
        "is spread over the words.",
        "**scale** 1.5: the authors' README says 1.5 to 2, depending on the model. **cfg** stays 1 and the negative "
        "prompt empty: the guidance is in **FluxGuidance**.", TO_COMPARE,
        files={"flux1-dev-fp8": Model("Comfy-Org/flux1-dev/flux1-dev-fp8.safetensors", "checkpoints")},
        sampling=sampling(20, 1, "euler", "simple"), scale=1.5, latent="EmptySD3LatentImage", guidance=3.5,
    )  # fmt: skip


def sd35(_) -> Page:
    return picture(
        "SD 3.5 Large with PLADIS",
        "Text and image share one attention; PLADIS changes how the picture's share for the text is spread over the "
        "words.",
        AUTHORS_RANGE, TO_COMPARE,
        files={"sd3.5_large_fp8_scaled": Model(
            "Comfy-Org/stable-diffusion-3.5-fp8/sd3.5_large_fp8_scaled.safetensors", "checkpoints")},
        sampling=sampling(20, 4, "euler", "sgm_uniform"), scale=1.5, latent="EmptySD3LatentImage",
    )  # fmt: skip


def qwen(_) -> Page:
    return picture(
        "Qwen-Image with PLADIS",
        "**Apply PLADIS** sits between the model and the sampler, before or after **ModelSamplingAuraFlow**.",
        AUTHORS_RANGE, TO_COMPARE,
        files={
            "model": Model(f"{QWEN}/diffusion_models/qwen_image_fp8_e4m3fn.safetensors", "diffusion_models"),
            "text encoder": Model(f"{QWEN}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders"),
            "VAE": Model(f"{QWEN}/vae/qwen_image_vae.safetensors", "vae"),
        },
        clip_type="qwen_image", sampling=sampling(20, 4, "euler", "simple"), scale=1.5, shift=3.1,
        latent="EmptySD3LatentImage", size=1328,
    )  # fmt: skip


def z_image(_) -> Page:
    return picture(
        "Z-Image Turbo with PLADIS",
        "8 steps at CFG 1: PLADIS needs no guidance. The negative prompt has no effect, so it is the prompt's zeros.",
        AUTHORS_RANGE, TO_COMPARE,
        files={
            "model": Model(f"{Z_IMAGE}/diffusion_models/z_image_turbo_bf16.safetensors", "diffusion_models"),
            "text encoder": Model(f"{Z_IMAGE}/text_encoders/qwen_3_4b.safetensors", "text_encoders"),
            "VAE": Model(f"{Z_IMAGE}/vae/ae.safetensors", "vae"),
        },
        clip_type="lumina2", sampling=sampling(8, 1, "res_multistep", "simple"), scale=1.5, shift=3,
        latent="EmptySD3LatentImage", negative=None,
    )  # fmt: skip


def krea2(_) -> Page:
    return picture(
        "Krea 2 Turbo with PLADIS",
        "8 steps at CFG 1: PLADIS needs no guidance. The negative prompt has no effect, so it is the prompt's zeros.",
        AUTHORS_RANGE, TO_COMPARE,
        files={
            "model": Model(f"{KREA}/diffusion_models/krea2_turbo_fp8_scaled.safetensors", "diffusion_models"),
            "text encoder": Model(f"{KREA}/text_encoders/qwen3vl_4b_fp8_scaled.safetensors", "text_encoders"),
            "VAE": Model(f"{KREA}/vae/qwen_image_vae.safetensors", "vae"),
        },
        clip_type="krea2", sampling=sampling(8, 1, "euler", "simple"), scale=1.5, negative=None, since="0.33.0",
    )  # fmt: skip


def wan(_) -> Page:
    files = {
        "model": Model(f"{WAN}/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "diffusion_models"),
        "text encoder": Model(f"{WAN}/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "text_encoders"),
        "VAE": Model(f"{WAN}/vae/wan_2.1_vae.safetensors", "vae"),
    }
    page = Page()
    page.note(
        (0, 0), (250, 300), "## Wan 2.1 text to video with PLADIS",
        "**Apply PLADIS** goes anywhere between the model loader and the sampler. **scale** 2 is the paper's "
        "default for pictures; for video nothing is measured.", TO_COMPARE, downloads(files), NOT_RUN,
    )
    model, clip, vae = load(page, list(files.values()), "wan")
    applied = page.add("PLADISApply", (265, 0), (240, 298), model=model, scale=2)
    shifted = page.add("ModelSamplingSD3", (265, 436), (240, 58), model=applied, shift=8)
    prompt = page.add(
        "CLIPTextEncode", (520, 0), (230, 110), "Prompt", clip=clip,
        text="a red kite left of a white balloon in the wind, clouds pass behind them, the camera follows",
    )
    negative = page.add("CLIPTextEncode", (520, 150), (230, 88), "Negative prompt", clip=clip,
                        text="still image, blurry, subtitles, low quality")  # fmt: skip
    latent = page.add("EmptyHunyuanLatentVideo", (765, 438), (295, 130), width=832, height=480, length=33)
    sampled = page.add("KSampler", (520, 278), (230, 262), model=shifted, positive=prompt, negative=negative,
                       latent_image=latent, seed=1, **sampling(30, 6, "uni_pc", "simple"))  # fmt: skip
    decoded = page.small("VAEDecode", (265, 535), samples=sampled, vae=vae)
    page.add("SaveWEBM", (765, 0), (295, 390), images=decoded, filename_prefix="pladis/video", codec="vp9", fps=16,
             crf=24)  # fmt: skip
    return page


def ipadapter(_) -> Page:
    files = {
        "SDXL": SDXL,
        "image encoder": Model("h94/IP-Adapter/models/image_encoder/model.safetensors", "clip_vision",
                               called="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"),
        "IPAdapter": Model("h94/IP-Adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", "ipadapter"),
    }  # fmt: skip
    page = Page()
    page.note(
        (0, 0), (250, 300), "## IPAdapter and PLADIS",
        "IPAdapter adds the style of a picture to the attention; PLADIS sharpens the part of the text and leaves "
        "IPAdapter's part as it is. The two work in either order. Where the prompt loses against the picture, lower "
        "IPAdapter's **weight** or raise **scale**.",
        "Needs the pack **ComfyUI_IPAdapter_plus**; ComfyUI-Manager installs it. The image encoder must be saved under "
        "the name that its loader shows.", downloads(files), NOT_RUN,
    )
    checkpoint = page.add("CheckpointLoaderSimple", (0, 340), (250, 98), ckpt_name=SDXL.name, models=(SDXL,))
    vision = page.add("CLIPVisionLoader", (265, 460), (240, 58), clip_name=files["image encoder"].name,
                      models=(files["image encoder"],))  # fmt: skip
    adapter = page.add("IPAdapterModelLoader", (0, 478), (250, 58), ipadapter_file=files["IPAdapter"].name,
                       models=(files["IPAdapter"],))  # fmt: skip
    image = page.small("LoadImage", (265, 550), image="example.png")
    adapted = page.small(
        "IPAdapterAdvanced", (265, 338), model=checkpoint, ipadapter=adapter, image=image, clip_vision=vision,
        weight=0.6, weight_type="linear", combine_embeds="concat", start_at=0, end_at=1, embeds_scaling="V only",
    )
    applied = page.add("PLADISApply", (265, 0), (240, 298), model=adapted, scale=2)
    prompt = page.add("CLIPTextEncode", (520, 0), (230, 110), "Prompt", clip=(checkpoint, 1), text=TEAPOT)
    negative = page.add("CLIPTextEncode", (520, 150), (230, 88), "Negative prompt", clip=(checkpoint, 1),
                        text="blurry, low quality")  # fmt: skip
    latent = page.add("EmptyLatentImage", (765, 410), (295, 106), width=1024, height=1024)
    sampled = page.add("KSampler", (520, 278), (230, 262), model=applied, positive=prompt, negative=negative,
                       latent_image=latent, seed=1, **sampling(25, 5, "euler", "normal"))  # fmt: skip
    decoded = page.small("VAEDecode", (765, 550), samples=sampled, vae=(checkpoint, 2))
    page.add("SaveImage", (765, 0), (295, 370), images=decoded, filename_prefix="pladis/picture")
    return page


# by the file's name: a page, and for those with models to download the words of the thumbnail
TEMPLATES = {
    "01_pladis_demo": (demo, ""),
    "02_pladis_sweep": (sweep, ""),
    "03_pladis_attention_map": (attention_map, ""),
    "04_pladis_schedule": (schedule, ""),
    "sd15_text_to_image": (sd15, "SD 1.5|text to image"),
    "sdxl_text_to_image": (sdxl, "SDXL|text to image"),
    "sdxl_few_step": (few_step, "SDXL Lightning|4 steps, CFG 1"),
    "sd35_text_to_image": (sd35, "SD 3.5 Large|text to image"),
    "flux_text_to_image": (flux, "Flux.1 dev|text to image"),
    "qwen_image_text_to_image": (qwen, "Qwen-Image|text to image"),
    "z_image_turbo_text_to_image": (z_image, "Z-Image Turbo|8 steps, CFG 1"),
    "krea2_turbo_text_to_image": (krea2, "Krea 2 Turbo|8 steps, CFG 1"),
    "wan_text_to_video": (wan, "Wan 2.1|text to video"),
    "ipadapter_sdxl": (ipadapter, "IPAdapter + PLADIS|SDXL"),
}


# files


def build(name: str, object_info: dict, choice: dict, version: str) -> dict:
    """The workflow as ComfyUI's front end saves it.

    Args:
        object_info: of a running ComfyUI with this pack.
        choice: what depends on the demo model, from `choices`.
        version: of this pack.
    """
    known = {**object_info, **{kind: info for pack in THIRD_PARTY.values() for kind, info in pack.items()}}
    page = TEMPLATES[name][0](choice)
    numbers = {id(node): number for number, node in enumerate(page, 1)}
    links = []
    for node in page:
        places = list(inputs_of(known[node.kind])) if node.kind != NOTE else []
        for wanted in (n for n in places if n in node.links):
            source, out = node.links[wanted]
            kind = known[source.kind]["output"][out]
            links.append([numbers[id(source)], out, numbers[id(node)], places.index(wanted), kind])
    links = [[number, *link] for number, link in enumerate(sorted(links), 1)]
    nodes = [saved(node, numbers[id(node)], links, known, version) for node in page]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.9, "offset": [200, 120]}},
        "version": 0.4,
    }


def saved(node: Node, number: int, links: list, known: dict, version: str) -> dict:
    size = COLLAPSED if node.collapsed else node.size
    entry = {"id": number, "type": node.kind, "pos": list(node.at), "size": list(size)}
    entry |= {"flags": {"collapsed": True} if node.collapsed else {}, "order": number - 1, "mode": 0}
    if node.kind == NOTE:
        text = node.values["text"]
        return entry | {
            "inputs": [], "outputs": [], "title": "What to look at", "properties": {}, "widgets_values": [text],
            "widgets_values_named": {"text": text}, "color": "#432", "bgcolor": "#653",
        }  # fmt: skip
    info = known[node.kind]
    incoming = {link[4]: link[0] for link in links if link[3] == number}
    entry["inputs"] = [
        slot(name, kind, name in info["input"].get("optional", {}), incoming.get(place))
        for place, (name, (kind, *_)) in enumerate(inputs_of(info).items())
    ]
    entry["outputs"] = [
        {"localized_name": name, "name": name, "type": kind,
         "links": [link[0] for link in links if link[1:3] == [number, out]] or None}
        for out, (kind, name) in enumerate(zip(info["output"], info.get("output_name", info["output"]), strict=True))
    ]  # fmt: skip
    if node.title:
        entry["title"] = node.title
    entry["properties"] = {"Node name for S&R": node.kind, **stamp(node, known, version)}
    if node.models:
        entry["properties"]["models"] = [{"name": m.name, "url": m.url, "directory": m.folder} for m in node.models]
    if named := named_values(node, info):
        entry |= {"widgets_values": list(named.values()), "widgets_values_named": named}
    return entry


def slot(name: str, kind, optional: bool, link: int | None) -> dict:
    choices = isinstance(kind, list)
    entry = {"localized_name": name, "name": name, "type": "COMBO" if choices else kind}
    if optional:
        entry["shape"] = 7
    if choices or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
        entry["widget"] = {"name": name}
    return {**entry, "link": link}


def stamp(node: Node, known: dict, version: str) -> dict:
    for pack, nodes in THIRD_PARTY.items():
        if node.kind in nodes:
            return {"cnr_id": pack, "ver": "2.0.0"}
    ours = known[node.kind]["python_module"].startswith("custom_nodes.")
    return {"cnr_id": PACK, "ver": version} if ours else {"cnr_id": "comfy-core", "ver": node.since}


def named_values(node: Node, info: dict) -> dict:
    """Of every widget, in their order; what a node does not say is the input's default."""
    named = {}
    for name in widget_names(info):
        if name is None:
            last = next(reversed(named))
            named |= {"upload": "image"} if last == "image" else {"control_after_generate": "fixed"}
            continue
        kind, *options = inputs_of(info)[name]
        options = options[0] if options else {}
        of_a_list = (kind if isinstance(kind, list) else options.get("options")) or [0]
        default = options.get("default", "" if kind == "STRING" else of_a_list[0])
        source = node.links.get(name)
        named[name] = source[0].values["value"] if source else node.values.get(name, default)
    assert set(node.values) <= set(named), (node.kind, node.values, named)
    return named


def text_of(workflow: dict) -> str:
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


# thumbnails


def side_by_side(pictures: list[Image.Image], labels: list[str], columns: int = 0) -> Image.Image:
    """Pictures under their labels, small ones enlarged by a whole factor, large ones made smaller."""
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    line = 24 if any(labels) else 0
    factor = min((1000 / columns - MARGIN) / width, (800 / rows - MARGIN - line) / height)
    factor = int(factor) if factor >= 1 else factor
    width, height = round(width * factor), round(height * factor)
    size = (columns * (width + MARGIN) + MARGIN, rows * (height + line + MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (picture_, label) in enumerate(zip(pictures, labels, strict=True)):
        x = MARGIN + number % columns * (width + MARGIN)
        y = MARGIN + number // columns * (height + line + MARGIN)
        draw.text((x + width // 2, y + line // 2 - 2), label, INK, ImageFont.load_default(18), "mm")
        canvas.paste(picture_.resize((width, height), Image.NEAREST if factor >= 1 else Image.BOX), (x, y + line))
    return canvas


def drawing(words: str) -> Image.Image:
    """The title of a template whose model was not run by us, over a drawing of attention weights."""
    canvas = Image.open(DRAWING).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, canvas.width, TITLE_HEIGHT - 1), BACKGROUND)
    title, subtitle = words.split("|")
    draw.text((24, 42), title, INK, ImageFont.load_default(40), "lm")
    draw.text((24, 84), subtitle, (180, 180, 185), ImageFont.load_default(20), "lm")
    return canvas


def save_thumbnail(name: str, picture_: Image.Image) -> None:
    picture_.convert("RGB").save(FOLDER / f"{name}.jpg", quality=88)


def version_of(root: Path) -> str:
    lines = (root / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version"))
