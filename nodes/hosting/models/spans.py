"""What a joint attention row is made of, from what the host gives the network.

Every row is a partition into named spans. Their lengths are computed from the arguments of apply_model
(comfy/model_base.py; "x" is the latent) and from what the network says of itself, and must add up to the row that
arrives: `place` raises an error with the numbers where they do not, and guesses nothing.

Only "text" spans are text keys: prompt, captions and glyphs, with the pads that the host leaves in. Only "image" spans
are queries that change: all that is denoised. What else is in a row keeps its dense attention.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch

Arguments = Mapping[str, Any]


class Span(NamedTuple):
    """Tokens of one kind: "text", "image", "references", "registers", "vision", "pooled", "conditions", "added"."""

    name: str
    length: int


@dataclass(frozen=True)
class Row:
    """The key row in order, and which of its spans travel together through a block.

    `queries`: None where they are the same row, else the names of the spans that they hold. `levels`: what other
    lengths the image has in a U-Net, where each level attends to the same text. `others`: how many queries and keys the
    block's attention has where it is not the image's.
    """

    keys: tuple[Span, ...]
    queries: tuple[str, ...] | None = None
    text_stream: tuple[str, ...] = ("text",)
    image_stream: tuple[str, ...] = ("image", "references")
    levels: tuple[int, ...] = ()
    others: tuple[tuple[int, int], ...] = ()


RowOf = Callable[[Any, Arguments], Row]


class Places(NamedTuple):
    """`text`: columns of the keys. `image`: rows of the queries; None: all of them. Slices, or indices on the CPU."""

    text: slice | torch.Tensor
    image: slice | torch.Tensor | None


@dataclass(frozen=True)
class Inserted:
    """What another node's patches did to the streams after the host embedded them: tokens put (in front, behind) of the
    prompt's or the image's, and how many were taken off the image stream's end.

    ComfyUI's FluxKVCache takes off the references; their keys come back from its cache, at the end of the row.
    """

    text: tuple[int, int] = (0, 0)
    image: tuple[int, int] = (0, 0)
    removed: int = 0


def image_tokens(shape: Sequence[int], patch: int | Sequence[int]) -> int:
    """Tokens of a latent (B, C, [T,] H, W), padded to whole patches."""
    if isinstance(patch, int):
        patch = (1,) * (len(shape) - 4) + (patch, patch)
    return math.prod(-(-size // p) for size, p in zip(shape[-len(patch) :], patch, strict=True))


def context(arguments: Arguments) -> int:
    return arguments["c_crossattn"].shape[1]


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _partition(*spans: tuple[str, int]) -> tuple[Span, ...]:
    return tuple(Span(name, length) for name, length in spans if length)


@cache
def _takes_references(network: type) -> bool:
    """Chroma gets Flux's ref_latents from the host too, and has no parameter for them."""
    methods = (getattr(network, name, None) for name in ("forward", "_forward"))
    return any("ref_latents" in inspect.signature(method).parameters for method in methods if method is not None)


def text_image(patch: str | int = "patch_size") -> RowOf:
    """[registers, text, image, references] (flux, qwen_image: model.py; registers: mmdit.py, zero in SD3)."""
    return partial(_in_order, ("registers", "text", "image", "references"), patch)


def text_references_image(patch: str | int = "patch_size") -> RowOf:
    """[text, references, image] (omnigen/omnigen2.py, boogu/model.py)."""
    return partial(_in_order, ("text", "references", "image"), patch)


def image_text(patch: str | int = "patch_size") -> RowOf:
    """[image, references, text] (joyimage, lens, ernie: model.py)."""
    return partial(_in_order, ("image", "references", "text"), patch)


def _in_order(names: tuple[str, ...], patch: str | int, network, arguments: Arguments) -> Row:
    """Each reference is padded and cut into patches by itself, frames included; where its positions are (offset, index,
    uxo, ...) does not matter."""
    patch = getattr(network, patch) if isinstance(patch, str) else patch
    references = arguments.get("ref_latents") or () if _takes_references(type(network)) else ()
    lengths = {
        "registers": getattr(network, "register_length", 0),
        "text": context(arguments),
        "image": image_tokens(arguments["x"].shape, patch),
        "references": sum(image_tokens(reference.shape, patch) for reference in references),
    }
    return Row(_partition(*((name, lengths[name]) for name in names)), text_stream=("registers", "text"))


def auraflow(network, arguments: Arguments) -> Row:
    """[registers, text, image] (aura/mmdit.py)."""
    registers, image = network.register_tokens.shape[1], image_tokens(arguments["x"].shape, network.patch_size)
    keys = _partition(("registers", registers), ("text", context(arguments)), ("image", image))
    return Row(keys, text_stream=("registers", "text"))


def lumina(network, arguments: Arguments) -> Row:
    """[reference captions, caption, more captions, vision, references, image], in Z-Image each padded by itself; in
    Ming-Image [caption, what the language model says of it, image, frames of references] (lumina/model.py)."""
    multiple = network.pad_tokens_multiple or 1
    direct, frames = arguments.get("direct_context"), arguments.get("ref_frames") or ()
    references = arguments.get("ref_latents") or []
    captions, vision = [], 0
    if references:
        given = [None if text is None else text.shape[1] for text in arguments.get("ref_contexts") or []]
        # a reference without a caption gets one multiple of learned pads; captions without a reference come last
        given += [None] * (len(references) - len(given))
        captions = [multiple if length is None else length for length in given]
        if getattr(network, "siglip_embedder", None) is not None:
            seen = [math.prod(f.shape[1:3]) for f in (arguments.get("siglip_feats") or [])[: len(references)]]
            # so does one without vision tokens, and the image that is denoised
            vision = sum(_up(tokens, multiple) for tokens in seen) + multiple * (len(references) - len(seen) + 1)
    # learned pads of the image carry image after the refiner, as those of the text carry text
    sizes = [_up(image_tokens(latent.shape, network.patch_size), multiple) for latent in (*references, arguments["x"])]
    caption = context(arguments) + (0 if direct is None else direct.shape[1])
    text = sum(_up(length, multiple) for length in (*captions, caption))
    if not frames:
        keys = ("text", text), ("vision", vision), ("references", sum(sizes[:-1])), ("image", sizes[-1])
        return Row(_partition(*keys))
    # the pads are behind the references
    image, *others = (image_tokens(latent.shape, network.patch_size) for latent in (arguments["x"], *frames))
    return Row(_partition(("text", text), ("image", image), ("references", _up(image + sum(others), multiple) - image)))


def qwen_image21(network, arguments: Arguments) -> Row:
    """Queries are image alone, keys [text with references between its tokens, image] (qwen_image21/model.py).

    A block attends to this row piece by piece, each piece to what is in front of it and to itself; from the second step
    on the host keeps all but the image's piece in a cache.
    """
    text, references = context(arguments), arguments.get("ref_latents") or []
    slots = [*(arguments.get("image_slots") or []), *[text] * len(references)][: len(references)]
    keys, others, start, length = [], [], 0, 0
    for slot, latent in zip((*slots, text), (*references, None), strict=True):
        keys.append(("text", slot - start))
        if latent is not None:
            keys.append(("references", image_tokens(latent.shape, 1)))
        start = slot
    for _, tokens in keys:
        length += tokens
        others.append((tokens, length))
    keys.append(("image", image_tokens(arguments["x"].shape, 1)))
    return Row(_partition(*keys), ("image",), others=tuple(others))


def hunyuan_video(network, arguments: Arguments) -> Row:
    """[vision, glyphs, text, reference, image], in HunyuanImage [text, glyphs, image] (hunyuan_video/model.py).

    Glyphs are text. A guiding frame replaces a frame and adds none.
    """
    vision, glyphs, reference = (arguments.get(key) for key in ("clip_fea", "txt_byt5", "ref_latent"))
    text = context(arguments)
    if glyphs is not None and network.byt5_in is not None:
        text += glyphs.shape[1]
    keys = (
        ("vision", 0 if vision is None else vision.shape[1]),
        ("text", text),
        ("references", 0 if reference is None else image_tokens(reference.shape, network.patch_size)),
        ("image", image_tokens(arguments["x"].shape, network.patch_size)),
    )
    return Row(_partition(*keys), text_stream=("vision", "text"))


def hidream(network, arguments: Arguments) -> Row:
    """[image, T5, last Llama, block's Llama]; an edit image lies beside the image, row by row (hidream/model.py)."""
    x, beside, patch = arguments["x"], arguments.get("image_cond"), network.patch_size
    own = -(-x.shape[-1] // patch)
    width = own if beside is None else -(-(x.shape[-1] + beside.shape[-1]) // patch)
    image = (("image", own), ("references", width - own)) * -(-x.shape[-2] // patch)
    if beside is None:
        image = (("image", image_tokens(x.shape, patch)),)
    text = context(arguments) + 2 * arguments["encoder_hidden_states_llama3"].shape[2]
    return Row(_partition(*image, ("text", text)))


def mochi(network, arguments: Arguments) -> Row:
    """[image, the prompt's own tokens] (genmo/joint_model/asymm_models_joint.py)."""
    # a batch of masks is counted together, and cuts nothing off
    text = min(arguments.get("num_tokens", 256), context(arguments))
    return Row(_partition(("image", image_tokens(arguments["x"].shape, network.patch_size)), ("text", text)))


def cogvideo(network, arguments: Arguments) -> Row:
    """[text, image] (cogvideo/model.py)."""
    patch = (network.patch_size_t or 1, network.patch_size, network.patch_size)
    return Row(_partition(("text", context(arguments)), ("image", image_tokens(arguments["x"].shape, patch))))


def krea2(network, arguments: Arguments) -> Row:
    """[text, image, references]; frames are rows of the batch (krea2/model.py)."""
    patch = (network.patch, network.patch)
    # without a method the host leaves them out
    method = arguments.get("ref_latents_method", getattr(network, "default_ref_method", None))
    references = arguments.get("ref_latents") or () if method is not None else ()
    image, *others = (image_tokens(latent.shape, patch) for latent in (arguments["x"], *references))
    return Row(_partition(("text", context(arguments)), ("image", image), ("references", sum(others))))


def pixeldit(network, arguments: Arguments) -> Row:
    """[text, cut at the longest it was trained on; image] (pixeldit/model.py)."""
    text = min(context(arguments), network.txt_max_length)
    return Row(_partition(("text", text), ("image", image_tokens(arguments["x"].shape, network.patch_size))))


def minimax(network, arguments: Arguments) -> Row:
    """[text, conditions, audio, video]; both streams come packed in one latent (minimax/model.py, PackedLayout).

    Audio is denoised with the video and counts as image. Conditions are keyframes and references, each with its sound.
    """
    video, *audio = arguments.get("latent_shapes") or [arguments["x"].shape]
    payload = arguments.get("minimax_payload") or {}
    frame = image_tokens(video[-2:], network.patch_size[1:])
    conditions = 0
    for keyframe in payload.get("keyframes") or ():
        latent, sound = keyframe.get("latent"), keyframe.get("audio_latent")
        # it shares the video's grid
        conditions += 0 if latent is None else latent.shape[2] * frame
        conditions += 0 if sound is None else 2 * sound.shape[-1]
    for reference in payload.get("refs") or ():
        # two channels
        conditions += 2 * reference.get("ref_audio_t", 0)
        if "latent_h" in reference:
            conditions += reference.get("latent_t", 1) * (reference["latent_h"] // 2) * (reference["latent_w"] // 2)
    keys = (
        ("text", context(arguments)),
        ("conditions", conditions),
        ("image", sum(math.prod(shape[2:]) for shape in audio)),
        ("image", image_tokens(video, network.patch_size)),
    )
    return Row(_partition(*keys), image_stream=("conditions", "image"))


def cascade_c(network, arguments: Arguments) -> Row:
    """Queries are image alone, keys [image, text, pooled prompt, vision] (cascade/stage_c.py)."""
    pooled, vision = (_rows(arguments[key]) * network.c_clip_seq for key in ("clip_text_pooled", "clip_img"))
    text = ("text", arguments["clip_text"].shape[1])
    return _cascade(network, arguments, text, ("pooled", pooled), ("vision", vision))


def cascade_b(network, arguments: Arguments) -> Row:
    """Queries are image alone, keys [image, pooled prompt as a few tokens] (cascade/stage_b.py)."""
    return _cascade(network, arguments, ("text", _rows(arguments["clip"]) * network.c_clip_seq))


def _cascade(network, arguments: Arguments, *text: tuple[str, int]) -> Row:
    """Every level of the U-Net has an image of its own size, which its downscaler's own modules tell."""
    sides = [side // network.embedding[0].downscale_factor for side in arguments["x"].shape[-2:]]
    levels = [math.prod(sides)]
    for scaler in network.down_downscalers:
        for module in scaler.modules():
            if isinstance(module, torch.nn.Upsample):
                sides = [math.floor(side * module.scale_factor) for side in sides]
            elif isinstance(module, torch.nn.Conv2d):
                sides = [
                    (side - kernel) // stride + 1
                    for side, kernel, stride in zip(sides, module.kernel_size, module.stride, strict=True)
                ]
        levels.append(math.prod(sides))
    finest, *others = dict.fromkeys(levels)
    names = tuple(name for name, _ in text)
    return Row(_partition(("image", finest), *text), ("image",), names, ("image",), tuple(others))


def _rows(pooled: torch.Tensor) -> int:
    return pooled.shape[1] if pooled.ndim == 3 else 1


def place(row: Row, inserted: Inserted, queries: int, keys: int) -> Places | None:
    """Where text keys and image queries are in an attention call with `queries` and `keys` tokens.

    The keys are the row with what was inserted; what was removed is behind everything, or missing. The queries are
    `row.queries`; else the row without what was removed, or without references, or its image stream alone.

    None where there is no text, and where this is another attention of the same block: `row.others`, or as its keys
    tell, those of the image stream alone, or of the text stream alone. ValueError where nothing adds up, or more than
    one thing does.
    """
    if (queries, keys) in row.others:
        return None
    levels = [_as_it_runs(row, inserted, image) for image in (None, *row.levels)]
    readings = [
        (key_row, query_row)
        for level in levels
        for key_row in (level.whole, level.kept)
        for query_row in _query_rows(row, level)
    ]
    fitting = {
        (_runs(key_row, "text"), _runs(query_row, "image"))
        for key_row, query_row in readings
        if (_sum(key_row), _sum(query_row)) == (keys, queries)
    }
    if len(fitting) == 1:
        return _places(*fitting.pop(), queries)
    expected = " or ".join(dict.fromkeys(_addition(level.whole) for level in levels))
    if fitting:
        raise ValueError(f"{expected} keys: {queries} queries on {keys} keys can be read in more than one way")
    counts = sorted({_sum(query_row) for key_row, query_row in readings if _sum(key_row) == keys})
    if counts:
        either = " or ".join(map(str, counts))
        raise ValueError(f"{expected} keys, as there are, but with {queries} queries, not {either}")
    if keys in {_sum(stream) for level in levels for stream in level.streams}:
        return None
    raise ValueError(f"{expected} keys, but the attention row has {keys} (and {queries} queries)")


class _Level(NamedTuple):
    """A row as it runs: with what was inserted, without what was removed; and those of its streams that a block may
    attend to alone."""

    kept: tuple[Span, ...]
    removed: tuple[Span, ...]
    image: tuple[Span, ...]
    streams: tuple[tuple[Span, ...], ...]

    @property
    def whole(self) -> tuple[Span, ...]:
        return (*self.kept, *self.removed)


def _as_it_runs(row: Row, inserted: Inserted, image: int | None) -> _Level:
    """`image`: how long it is at another level of a U-Net."""
    spans = row.keys if image is None else tuple(Span(s.name, image) if s.name == "image" else s for s in row.keys)
    before, stream, after = _around(spans, row.image_stream)
    stream, removed = _take_off(stream, inserted.removed)
    stream = _enclosed(stream, inserted.image)
    before, text, after = _around((*before, *stream, *after), row.text_stream)
    text = _enclosed(text, inserted.text)
    return _Level((*before, *text, *after), removed, stream, (text, stream, (*stream, *removed)))


def _around(spans: tuple[Span, ...], names: Iterable[str]) -> tuple[tuple[Span, ...], ...]:
    """`spans` in three: in front of the stream of these names, the stream, behind it."""
    inside = [i for i, span in enumerate(spans) if span.name in names]
    start, stop = (inside[0], inside[-1] + 1) if inside else (0, 0)
    return spans[:start], spans[start:stop], spans[stop:]


def _enclosed(stream: tuple[Span, ...], added: tuple[int, int]) -> tuple[Span, ...]:
    front, behind = added
    return _partition(("added", front), *stream, ("added", behind))


def _take_off(stream: tuple[Span, ...], count: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """What is left of the stream, and the `count` tokens at its end."""
    left = _sum(stream) - count
    if left < 0:
        raise ValueError(f"{_addition(stream)} tokens in the image stream, but {count} were removed")
    kept, removed = [], []
    for name, length in stream:
        stays = min(length, left)
        left -= stays
        kept.append((name, stays))
        removed.append((name, length - stays))
    return _partition(*kept), _partition(*removed)


def _query_rows(row: Row, level: _Level) -> list[tuple[Span, ...]]:
    if row.queries is not None:
        return [tuple(span for span in level.kept if span.name in row.queries)]
    rows = [level.kept, level.image]
    if not level.removed:
        rows.append(tuple(span for span in level.kept if span.name != "references"))
    return rows


def _runs(spans: Iterable[Span], name: str) -> tuple[tuple[int, int], ...]:
    """(start, stop) of every unbroken run of spans of this name."""
    runs, start = [], 0
    for span in spans:
        stop = start + span.length
        if span.name == name:
            runs.append((runs.pop()[0] if runs and runs[-1][1] == start else start, stop))
        start = stop
    return tuple(runs)


def _places(text: tuple[tuple[int, int], ...], image: tuple[tuple[int, int], ...], queries: int) -> Places | None:
    if not text:
        return None
    return Places(_indices(text), None if image == ((0, queries),) else _indices(image))


def _indices(runs: tuple[tuple[int, int], ...]) -> slice | torch.Tensor:
    if len(runs) == 1:
        return slice(*runs[0])
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


def _sum(spans: Iterable[Span]) -> int:
    return sum(span.length for span in spans)


def _addition(spans: tuple[Span, ...]) -> str:
    """`text 7 + image 16 = 23`; spans of one name are summed, as HiDream-E1 has two for each row of its image."""
    sums: dict[str, int] = {}
    for name, length in spans:
        sums[name] = sums.get(name, 0) + length
    return f"{' + '.join(f'{name} {length}' for name, length in sums.items())} = {_sum(spans)}"
