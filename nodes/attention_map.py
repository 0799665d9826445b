"""PLADIS Attention Map: where each word of a prompt is looked at, before and after PLADIS."""

from __future__ import annotations

import logging

import torch
from comfy_api.latest import io
from typing_extensions import override

from .hosting import LAYER_CHOICES, Settings, choose_layers, find_target, layer_names
from .hosting.looking.attention_map import KINDS, AttentionMaps, watch_attention
from .hosting.looking.regime import regime_table, sentence
from .hosting.looking.words import NotInPrompt, Word, encoded_texts, find_words, said_of_another_prompt
from .inputs import SEARCH_ALIASES
from .pictures import draw_bars, draw_map, drawable, fitted, map_size

LOGGER = logging.getLogger(__name__)
# pladis_core.LayerReport's: the head of the bars, and what it means
FIGURES = {
    "zeros": ("pruned", "share of tokens that sparse attention gives exactly no weight"),
    "support": ("support", "tokens that keep a weight"),
    "negative": ("negative weight", "sum of the weights below zero after extrapolation"),
    "length_ratio": ("length ratio", "length of what attention takes from the text, with PLADIS / without"),
}


class PLADISAttentionMap(io.ComfyNode):
    @classmethod
    @override
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PLADISAttentionMap",
            display_name="PLADIS Attention Map",
            category="model/patch",
            description="Shows where in the picture the model looks for each word: with softmax (dense), with entmax "
            "(sparse) and as PLADIS mixes them (extrapolated). Runs the model once, at one point of the noise "
            "schedule, on a finished latent that it noises again.",
            search_aliases=[*SEARCH_ALIASES, "attention map", "heatmap", "daam", "explain", "where a word looks"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to look into, with or without Apply PLADIS: here it runs with the scale and "
                    "alpha below.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The encoded prompt whose words are looked for. Of several combined the first, on the "
                    "whole picture.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="A finished latent, from a sampler or VAE Encode. It gets noise again up to percent. Of a "
                    "batch the first is taken, of a video the mean over its frames is drawn.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    tooltip="Words of the prompt, with commas or line breaks between: red circle, square. Or token "
                    "positions: #1, #2-4 (#0 is the start token in most models). Empty: every word of the prompt.",
                ),
                io.Float.Input(
                    "percent",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The point of the noise schedule: 0 is pure noise, 1 the finished picture. Going lower "
                    "shows the layout being decided, going higher the details.",
                ),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Lambda of the extrapolated map, and of the run. Going higher puts more weight below zero.",
                ),
                io.Float.Input(
                    "alpha",
                    default=1.5,
                    min=1.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Of the sparse map: 1 is softmax, 2 sparsemax. Going higher leaves fewer places to a word.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_CHOICES),
                    default="all",
                    tooltip="Which layers the maps are averaged over and the report lists, as in Apply PLADIS "
                    "(Advanced). PLADIS runs in all of them.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Used when layers is custom: d2.2-9,m0,u0.4, or b0-11 in transformers.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the noise that the latent gets."
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The CLIP that encoded the prompt; needed to find words by name."
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The text that was encoded, weights such as (red:1.3) included; needed to find words by "
                    "name.",
                ),
                io.Image.Input("image", optional=True, tooltip="The finished picture, to shine through the maps."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="maps", tooltip="For each word three maps: dense, sparse, extrapolated, with legends."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What this model's attention is like and what to try, then figures of every layer.",
                ),
                io.Image.Output(display_name="report_image", tooltip="The same figures as bars."),
                io.Mask.Output(
                    display_name="masks",
                    tooltip="For each word its sparse map, 0 where nothing looks at it, 1 where most does; as large as "
                    "image, else as the map is.",
                ),
            ],
        )

    @classmethod
    @override
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        latent: io.Latent.Type,
        words: str,
        percent: float,
        scale: float,
        alpha: float,
        layers: str,
        blocks: str,
        seed: int,
        clip: io.Clip.Type | None = None,
        prompt: str = "",
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        target = find_target(model)
        every = target.layers
        watched = choose_layers(layers, blocks, every)
        note = said_of_another_prompt(prompt, clip, positive[0][0]) if clip is not None and prompt.strip() else ""
        if note:
            LOGGER.warning("PLADIS Attention Map: %s", note)
        try:
            found = find_words(words, prompt, clip, positive[0][0].shape[1])
        except NotInPrompt as error:
            raise ValueError(f"{error} {note}".rstrip()) from None
        known = encoded_texts(prompt, clip, bool(target.family.start_of(target.network()))) if clip is not None else ()
        settings = Settings(frozenset(every), scale, alpha, texts=known)
        seen = watch_attention(model, positive, latent, percent, seed, settings, target, found, watched)
        names = {layer: name for layer, name in zip(every, layer_names(every), strict=True) if layer in seen.reports}
        figures = {head: [mean(seen, layer, head) for layer in names] for head in FIGURES}
        reports = [report for layer in names for report in seen.reports[layer][:1]]
        regime = sentence(reports, scale, alpha)
        title = f"percent {percent:g}, scale {scale:g}, alpha {alpha:g}" + (f". {note}" if note else "")
        return io.NodeOutput(
            draw_words(seen.maps(), found, image),
            "\n".join([
                regime, "", table(list(names.values()), figures, found, title), "",
                *regime_table(list(names.values()), reports),
            ]),
            draw_bars(list(names.values()), {FIGURES[head][0]: column for head, column in figures.items()}, title),
            masks(seen.maps(), image),
        )


def mean(seen: AttentionMaps, layer, figure: str) -> float:
    reports = seen.reports[layer]
    return sum(getattr(report, figure) for report in reports) / len(reports)


def draw_words(maps: torch.Tensor, words: list[Word], image: torch.Tensor | None) -> torch.Tensor:
    """For each word its maps (kinds, words, h, w), dense and sparse on one scale, as one IMAGE batch."""
    size = map_size(tuple(maps.shape[-2:]), image)
    behind = None if image is None else fitted(image, size)
    pictures = []
    for index, word in enumerate(words):
        label = word.label if drawable(word.label) else ", ".join(f"#{position}" for position in word.positions)
        top = max(float(maps[:2, index].max()), 1e-12)
        furthest = max(float(maps[2, index].abs().max()), 1e-12)
        for kind, name in enumerate(KINDS):
            low, high = (-furthest, furthest) if name == "extrapolated" else (0.0, top)
            pictures.append(draw_map(maps[kind, index], f"{label}: {name}", low, high, size, behind))
    return torch.stack(pictures)


def masks(maps: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """The sparse map of each word of (kinds, words, h, w) as a MASK batch (words, H, W) from 0 to 1."""
    sparse = maps[KINDS.index("sparse")].float().cpu().nan_to_num(0.0)
    sparse = sparse / sparse.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    if image is None:
        return sparse
    return torch.nn.functional.interpolate(sparse[:, None], tuple(image.shape[1:3]), mode="bilinear")[:, 0]


def table(names: list[str], figures: dict[str, list[float]], words: list[Word], title: str) -> str:
    """The report as text: which tokens each word is, then a line per layer and their mean."""
    lines = [title, ""]
    lines += [f"{word.label}: tokens " + ", ".join(f"#{p}" for p in word.positions) for word in words]
    lines += ["", *(f"{head}: {meaning}" for head, meaning in FIGURES.values()), ""]
    lines.append(f"{'layer':<12}" + "".join(f"{FIGURES[figure][0]:>17}" for figure in figures))
    columns = list(figures.values())
    rows = [*zip(names, zip(*columns, strict=True), strict=True)]
    rows.append(("mean", tuple(sum(column) / len(column) for column in columns)))
    lines += [f"{name:<12}" + "".join(f"{figure:>17.4g}" for figure in row) for name, row in rows]
    return "\n".join(lines)
