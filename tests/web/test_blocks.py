"""Block lists mean in the browser what nodes/hosting/models/layers.py says that they mean."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_hosts import host_path, host_python

TEXTS = (
    "d0", "m0", "u0", "b0", "d2.2-9,m0,u0.4", "U3-5.1 , ", " d0 ,,M0", "d0-d1.0", "d0-1", "d0.1,d0.1,m0.9", "b0-11",
    "b0-b3.1", "b3.2", "b2-3.0-1", "d00", "u0-2.0-9", "d1-1", "b11", "d0,m0,u3", "d0-5,m0,u0-8",
    "d0\u00a0,m0",
    # refused, whatever the model
    "", " , ", "x1", "d", "d1.", "d-1", ".1", "1", "input4", "d0;d1", "d0 d1", "d0-u1", "d0--1", "d0-1-2", "d0.1.2",
    "d0.-1", "d0.0-", "d 0", "d0 -1", "m0,x", "d1-0", "d0.1-0", "b3-b1", "d\u0660", "d0.\u0661", "+d0", "dd0", "d0-dd1",
    "d0.0-d1", "d1e1", "d0x1",
    # refused where the model has no such block or layer
    "d4", "d99999999999", "d0-99999999999", "m1", "u0-9", "u3.2", "d0.0-99", "b12", "b0.3",
)  # fmt: skip
MODELS = ("SD 1.x", "SDXL", "the demo model", "alike", "not alike", "single")
READ = """async ([texts, blocks]) => {
    const { layoutNamedBy, readBlocks, writeBlocks } = await import("/pladis_blocks.js");
    const layout = layoutNamedBy(blocks);
    return texts.map((text) => {
        const { chosen, wrong } = readBlocks(text, layout);
        const written = writeBlocks(chosen, layout, wrong);
        const again = readBlocks(written, layout);
        return { chosen: [...chosen].sort(), wrong, written, again: [...again.chosen].sort(), wrongAgain: again.wrong };
    });
}"""
WRITE = """async ([blocks, keys]) => {
    const { layoutNamedBy, writeBlocks } = await import("/pladis_blocks.js");
    return writeBlocks(new Set(keys), layoutNamedBy(blocks));
}"""


@pytest.fixture(scope="module")
def host() -> dict[str, dict]:
    """By model: its blocks as the node reports them, and what becomes of each text."""
    path = host_path("newest")
    result = subprocess.run(
        [host_python("newest", path), str(Path(__file__).with_name("block_lists.py"))],
        input=json.dumps(TEXTS),
        env={**os.environ, "COMFYUI_PATH": str(path), "PLADIS_HOST": "newest"},
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module", params=MODELS)
def read(request, modules, host) -> list[tuple[str, dict, dict]]:
    """Every text with what the host and what the browser make of it, for one model."""
    model = host[request.param]
    found = modules.evaluate(READ, [TEXTS, ",".join(model["blocks"])])
    return list(zip(TEXTS, model["outcomes"], found, strict=True))


def test_the_browser_reads_what_the_host_reads(read):
    for text, expected, found in read:
        if "error" in expected:
            # an empty list has no entry to blame
            assert found["wrong"] or not text.strip(", "), text
        else:
            assert found["wrong"] == [] and found["chosen"] == expected["chosen"], text


def test_the_browser_blames_the_entry_that_the_host_blames(read):
    blamed = [(expected["error"], found["wrong"][0]) for _, expected, found in read if found["wrong"]]
    assert len(blamed) > 20
    for error, wrong in blamed:
        assert wrong["problem"] in error or wrong["entry"].lower() in error


def test_what_the_browser_writes_means_the_same(read):
    for text, _, found in read:
        assert found["again"] == found["chosen"], text
        assert found["wrongAgain"] == found["wrong"], text


@pytest.mark.parametrize(
    ("keys", "written"),
    (
        (["d0.0", "d0.1"], "d0"),
        (["d2.2", "d2.3", "d2.4", "d2.9", "m0.0"], "d2.2-4,d2.9,m0.0"),
        (["d0.0", "d0.1", "d1.0", "d1.1", "u3.1"], "d0-1,u3.1"),
        ([], ""),
    ),
)
def test_the_browser_writes_the_shortest_list(modules, host, keys, written):
    assert modules.evaluate(WRITE, [",".join(host["SDXL"]["blocks"]), keys]) == written


def test_the_browser_knows_the_blocks_of_common_models(modules, host):
    known = modules.evaluate("""async () => {
        const { KNOWN } = await import("/pladis_models.js");
        const { layoutNamedBy } = await import("/pladis_blocks.js");
        return Object.fromEntries(Object.entries(KNOWN).map(([name, blocks]) => [name, layoutNamedBy(blocks)]));
    }""")
    layout = """async (blocks) => (await import("/pladis_blocks.js")).layoutNamedBy(blocks)"""
    assert set(known) == {"SD 1.x", "SDXL", "the demo model"}
    for name, blocks in known.items():
        assert blocks == modules.evaluate(layout, ",".join(host[name]["blocks"])), name


@pytest.mark.parametrize(
    ("loader", "file", "named"),
    (
        ("CheckpointLoaderSimple", "sd_xl_base_1.0.safetensors", "SDXL"),
        ("CheckpointLoaderSimple", "juggernautXL_v9.safetensors", "SDXL"),
        ("CheckpointLoaderSimple", "ponyDiffusionV6.safetensors", "SDXL"),
        ("CheckpointLoaderSimple", "v1-5-pruned-emaonly-fp16.safetensors", "SD 1.x"),
        ("UNETLoader", "flux1-dev.safetensors", None),
        ("CheckpointLoaderSimple", "sd3.5_large.safetensors", None),
        ("CheckpointLoaderSimple", "wan2.1_t2v_1.3B.safetensors", None),
    ),
)  # fmt: skip
def test_a_file_name_tells_a_model_only_where_it_is_plain(modules, loader, file, named):
    blocks = modules.evaluate("""async ([comfyClass, value]) => {
        const { KNOWN, blocksAt } = await import("/pladis_models.js");
        const name = comfyClass === "UNETLoader" ? "unet_name" : "ckpt_name";
        const loader = { comfyClass, inputs: [], widgets: [{ name, value }] };
        const node = { inputs: [{ type: "MODEL" }], isInputConnected: () => true, getInputNode: () => loader };
        const { blocks } = blocksAt(node);
        return Object.keys(KNOWN).find((known) => KNOWN[known] === blocks) ?? null;
    }""", [loader, file])
    assert blocks == named
