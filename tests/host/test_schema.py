"""What saved workflows carry: ids, input names and their order, defaults. New inputs go last; nothing else changes."""

from __future__ import annotations

import asyncio

import pytest

from pladis_pack.nodes import comfy_entrypoint

COMMON = [("model", None), ("scale", 2.0), ("alpha", 1.5), ("start_percent", 0.0), ("end_percent", 1.0)]
NODES = {
    "PLADISApply": COMMON,
    "PLADISApplyAdvanced": [
        *COMMON, ("layers", "all"), ("blocks", ""), ("apply_to", "both"), ("force_unknown", False),
        ("scale_schedule", "constant"), ("end_scale", 0.0), ("norm_cap", 0.0), ("tokens", "all"),
        ("clip", None), ("prompt", ""),
    ],
    "PLADISAttentionMap": [
        ("model", None), ("positive", None), ("latent", None), ("words", ""), ("percent", 0.3), ("scale", 2.0),
        ("alpha", 1.5), ("layers", "all"), ("blocks", ""), ("seed", 0), ("clip", None), ("prompt", ""), ("image", None),
    ],
    "PLADISDemoCheckpoint": [("variant", "standard")],
    "PLADISSweep": [
        ("model", None), ("seed", 0), ("steps", 20), ("cfg", 8.0), ("sampler_name", None), ("scheduler", None),
        ("positive", None), ("negative", None), ("latent_image", None), ("denoise", 1.0), ("vae", None),
        ("scales", "0, 1, 2, 3"), ("alphas", "1.5"), ("seeds", ""), ("end_percents", ""), ("norm_caps", ""),
        ("layers", ""),
    ],
    # made by PLADIS Sweep while it runs
    "PLADISSweepCell": [
        ("latent", None), ("image", None), ("label", None), ("columns", 1), ("total", 1), ("before", None),
    ],
    "PLADISSweepGrid": [("cells", None), ("columns", 1)],
}
OUTPUTS = {
    "PLADISApply": ["MODEL"],
    "PLADISApplyAdvanced": ["MODEL"],
    "PLADISAttentionMap": ["IMAGE", "STRING", "IMAGE", "MASK"],
    "PLADISDemoCheckpoint": ["MODEL", "CLIP", "VAE"],
    "PLADISSweep": ["LATENT", "IMAGE"],
    "PLADISSweepCell": ["PLADIS_CELLS"],
    "PLADISSweepGrid": ["LATENT", "IMAGE"],
}

# what people type to find each; the order of what is found is tests/web/test_words.py's
FOUND_BY = {
    "PLADISApply": {"prompt adherence", "follow prompt", "sparse attention", "entmax"},
    "PLADISApplyAdvanced": {"layers", "block list", "schedule"},
    "PLADISAttentionMap": {"attention map", "heatmap", "daam"},
    "PLADISDemoCheckpoint": {"demo", "example", "test model"},
    "PLADISSweep": {"xy plot", "grid", "compare"},
    "PLADISSweepCell": set(),
    "PLADISSweepGrid": set(),
}


@pytest.fixture(scope="module")
def schemas():
    async def load():
        return await (await comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node.define_schema() for node in asyncio.run(load())}


def test_ids_inputs_and_defaults(schemas):
    assert {
        name: [(i.id, getattr(i, "default", None)) for i in schema.inputs] for name, schema in schemas.items()
    } == NODES


def test_everything_explains_itself(schemas):
    for name, schema in schemas.items():
        assert schema.category == "model/patch"
        assert schema.description
        assert {"pladis", *FOUND_BY[name]} <= set(schema.search_aliases)
        # an alias that two share would find both
        assert not FOUND_BY[name] & {a for other in schemas if other != name for a in schemas[other].search_aliases}
        assert all(item.tooltip for item in (*schema.inputs, *schema.outputs))
        assert [output.io_type for output in schema.outputs] == OUTPUTS[name]
