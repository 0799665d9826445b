"""Where the text and the image are in a joint attention row, from what the host gives the network.

Each function takes the network and the arguments of apply_model (comfy/model_base.py; "x" is the latent) and returns a
Window. Reference images, registers and vision tokens are neither text keys nor image queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Arguments = Mapping[str, Any]


class Window(NamedTuple):
    """Spans are (start, count); a negative start counts from the end of the row.

    `rows` are the queries of the image that is denoised: a span, their indices where other tokens lie between, or None
    for all. Attention with fewer than `least` queries is not this one (image only, text only).
    """

    text: tuple[int, int]
    rows: tuple[int, int] | torch.Tensor | None
    least: int


WindowOf = Callable[[Any, Arguments], Window]


def image_tokens(shape: Sequence[int], patch: int | Sequence[int]) -> int:
    """Tokens of a latent (B, C, [T,] H, W), padded to whole patches."""
    if isinstance(patch, int):
        patch = (1,) * (len(shape) - 4) + (patch, patch)
    return math.prod(-(-size // p) for size, p in zip(shape[-len(patch) :], patch, strict=True))


def context(arguments: Arguments) -> int:
    return arguments["c_crossattn"].shape[1]


def _image(network, arguments: Arguments, patch: str | int) -> int:
    return image_tokens(arguments["x"].shape, getattr(network, patch) if isinstance(patch, str) else patch)


def text_image(patch: str | int = "patch_size") -> WindowOf:
    """[text, image, references]."""

    def window(network, arguments: Arguments) -> Window:
        text, image = context(arguments), _image(network, arguments, patch)
        return Window((0, text), (text, image), text + image)

    return window


def text_references_image(patch: str | int = "patch_size") -> WindowOf:
    """[text, references, image]."""

    def window(network, arguments: Arguments) -> Window:
        text, image = context(arguments), _image(network, arguments, patch)
        return Window((0, text), (-image, image), text + image)

    return window


def image_text(patch: str | int = "patch_size") -> WindowOf:
    """[image, references, text]."""

    def window(network, arguments: Arguments) -> Window:
        text, image = context(arguments), _image(network, arguments, patch)
        return Window((-text, text), (0, image), text + image)

    return window


def auraflow(network, arguments: Arguments) -> Window:
    """[registers, text, image] (aura/mmdit.py)."""
    registers, text = network.register_tokens.shape[1], context(arguments)
    image = _image(network, arguments, "patch_size")
    return Window((registers, text), (registers + text, image), registers + text + image)


def lumina(network, arguments: Arguments) -> Window:
    """[reference captions, caption, vision, references, image], in Z-Image each padded (lumina/model.py)."""
    multiple = network.pad_tokens_multiple or 1
    captions = [context(arguments)]
    references = arguments.get("ref_latents") or []
    if references:
        given = [None if text is None else text.shape[1] for text in arguments.get("ref_contexts") or []]
        given += [None] * (len(references) - len(given))
        # a reference without a caption gets one multiple of learned pads
        captions = [*(length or multiple for length in given), *captions]
    text = sum(-(-length // multiple) * multiple for length in captions)
    # learned pads of the image carry image after the refiner, as those of the text carry text
    image = -(-_image(network, arguments, "patch_size") // multiple) * multiple
    return Window((0, text), (-image, image), text + image)


def hunyuan_video(network, arguments: Arguments) -> Window:
    """[vision, glyphs, text, reference, image], in HunyuanImage [text, glyphs, image] (hunyuan_video/model.py)."""
    vision, glyphs = (arguments.get(key) for key in ("clip_fea", "txt_byt5"))
    before = 0 if vision is None else vision.shape[1]
    text = context(arguments) + (0 if glyphs is None else glyphs.shape[1])
    image = _image(network, arguments, "patch_size")
    return Window((before, text), (-image, image), before + text + image)


def hidream(network, arguments: Arguments) -> Window:
    """[image, T5, last Llama, block's Llama]; an edit image lies beside the image, row by row (hidream/model.py)."""
    text = context(arguments) + 2 * arguments["encoder_hidden_states_llama3"].shape[2]
    x, beside = arguments["x"], arguments.get("image_cond")
    image = _image(network, arguments, "patch_size")
    if beside is None:
        return Window((-text, text), (0, image), text + image)
    patch = network.patch_size
    width, own = -(-(x.shape[-1] + beside.shape[-1]) // patch), -(-x.shape[-1] // patch)
    rows = torch.arange(-(-x.shape[-2] // patch) * width, device=x.device).view(-1, width)[:, :own].flatten()
    return Window((-text, text), rows, text + image)


def mochi(network, arguments: Arguments) -> Window:
    """[image, the prompt's own tokens] (genmo/joint_model/asymm_models_joint.py)."""
    text, image = arguments.get("num_tokens", 256), _image(network, arguments, "patch_size")
    return Window((-text, text), (0, image), text + image)


def cogvideo(network, arguments: Arguments) -> Window:
    """[text, image] (cogvideo/model.py)."""
    patch = (network.patch_size_t or 1, network.patch_size, network.patch_size)
    text, image = context(arguments), image_tokens(arguments["x"].shape, patch)
    return Window((0, text), (text, image), text + image)


def krea2(network, arguments: Arguments) -> Window:
    """[text, image, references]; frames are rows of the batch (krea2/model.py)."""
    text, image = context(arguments), image_tokens(arguments["x"].shape[-4:], (network.patch, network.patch))
    return Window((0, text), (text, image), text + image)


def pixeldit(network, arguments: Arguments) -> Window:
    """[text, cut at the longest it was trained on; image] (pixeldit/model.py)."""
    text = min(context(arguments), network.txt_max_length)
    image = _image(network, arguments, "patch_size")
    return Window((0, text), (text, image), text + image)


def minimax(network, arguments: Arguments) -> Window:
    """[text, conditions, audio, video]; both streams come packed in one latent (minimax/model.py)."""
    video, *audio = arguments.get("latent_shapes") or [arguments["x"].shape]
    text, image = context(arguments), image_tokens(video, network.patch_size) + sum(math.prod(s[2:]) for s in audio)
    return Window((0, text), (-image, image), text + image)


def cascade_c(network, arguments: Arguments) -> Window:
    """Queries are image alone, keys [image, text, pooled prompt, vision] (cascade/stage_c.py)."""
    text = arguments["clip_text"].shape[1]
    others = sum(_rows(arguments[key]) for key in ("clip_text_pooled", "clip_img")) * network.c_clip_seq
    return Window((-text - others, text), None, 1)


def cascade_b(network, arguments: Arguments) -> Window:
    """Queries are image alone, keys [image, pooled prompt as a few tokens] (cascade/stage_b.py)."""
    text = network.c_clip_seq * _rows(arguments["clip"])
    return Window((-text, text), None, 1)


def _rows(pooled: torch.Tensor) -> int:
    return pooled.shape[1] if pooled.ndim == 3 else 1
