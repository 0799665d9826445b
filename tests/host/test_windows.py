"""Where the table sees text and image in a joint row, at other sizes and lengths than the fixtures have."""

from __future__ import annotations

from dataclasses import replace

import pytest

import families
from attention_trace import Tracer, changed
from families import JOINT
from pladis_pack.nodes.hosting.families import find_family
from pladis_pack.nodes.hosting.transformer import _span

# latents (height, width); the second is no whole number of patches
SIZES = ((12, 6), (7, 9))
# the host's own fixtures cannot be enlarged: an attention mask of their size, reference latents that must fit
FIXED = ("Flux.1 Redux", "HunyuanCustom", "HiDream E1", "MiniMax H3")
# the host fails on half patches
WHOLE = (
    "Stable Cascade B", "Stable Cascade C", "Chroma Radiance", "Z-Image pixel", "PixelDiT", "HunyuanVideo",
    "HunyuanVideo masked", "HunyuanVideo I2V", "HunyuanVideo I2V replace", "SkyReels I2V", "Mochi",
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [family.name for family in JOINT if family.name not in FIXED])
def test_text_columns_and_image_rows_at_other_sizes(name, size):
    family = families.BY_NAME[name]
    height, width = size
    if name in WHOLE:
        # of pixels more than of latents
        height, width = (side // 2 * 2 * (family.latent[-1] // 8) for side in size)
    family = replace(family, latent=(*family.latent[:-2], height, width))
    model = families.patcher(family)
    runs = []
    for prompt, noise in ((11, 5), (13, 5), (11, 6)):
        tracer = Tracer()
        families.sample(tracer.attach(model), family, families.prompt(family, prompt, 11), cfg=1.0, seed=noise)
        runs.append(tracer.evaluations[0])
    window = find_family(model.model).window(model.model.diffusion_model, runs[0].arguments)
    for call, other_text, other_noise in zip(*(run.calls for run in runs), strict=True):
        columns, rows = changed(call, other_text, "k"), changed(call, other_noise, "q")
        if columns and rows and call.q_length >= window.least:
            break
    assert call.k_length >= window.least
    start = window.text[0] % call.k_length
    text = range(start, start + window.text[1])
    assert columns and set(columns) <= set(text)
    span = _span(window.rows, call.q_length)
    image = list(range(*span.indices(call.q_length))) if isinstance(span, slice) else span.tolist()
    # references that mix with the noise before: Z-Image Omni
    assert image == rows[-len(image) :] if name == "Z-Image Omni" else image == rows
    pads = 512 - 11 if name.startswith("Flux.2") else 0
    assert len(text) - len(columns) <= pads + 2
