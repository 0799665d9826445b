"""Whatever a person types: a result or an error that says what is wrong, never a traceback from deep inside."""

from __future__ import annotations

import itertools
import json
import os
import random
import urllib.error
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from pladis_pack.nodes.hosting import choose_layers, find_target, numbers
from pladis_pack.nodes.hosting.looking.words import find_words

PIECES = (
    "d", "m", "u", "b", "0", "1", "2", "9", "99999999999999999999", "-", ".", ",", " ", "\n", "x", "D", "", "d0",
    "m0.0", "u0-2", "u3.0-9", "d1.0-0", "\u0663", "\u00b2", "#", "#3", "#1-2", "e", "1e9", "nan", "inf", "-1", "0.5",
)  # fmt: skip


def texts(count: int):
    generator = random.Random(0)
    for _ in range(count):
        yield "".join(generator.choices(PIECES, k=generator.randint(0, 8)))


def test_block_lists():
    layers = find_target(tiny.patcher("SD15")).layers
    chosen = 0
    for text in texts(4000):
        try:
            found = choose_layers("custom", text, layers)
        except ValueError as error:
            assert "This model has d0.0" in str(error) or "runs backwards" in str(error), (text, error)
        else:
            chosen += 1
            assert found and found <= set(layers), text
    assert chosen > 30


def test_lists_of_numbers():
    taken = 0
    for text in texts(4000):
        try:
            found = numbers("scales", text, 0.0, 10.0)
        except ValueError as error:
            assert "scales: " in str(error), (text, error)
        else:
            taken += 1
            assert found and all(0 <= number <= 10 for number in found), text
    assert taken > 20


def test_words():
    for text in texts(4000):
        try:
            found = find_words(text, "", None, 77)
        except ValueError as error:
            assert "words" in str(error), (text, error)
        else:
            assert all(0 <= p < 77 for word in found for p in word.positions), text


NUMBERS = itertools.count()


def graph(inputs: dict, node: str = "PLADISApplyAdvanced", steps: int = 1) -> dict:
    """The few-step demo model through an Apply node, sampled in 64 x 64."""
    sampling = {"seed": 1, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    model = ["apply", 0] if inputs else ["demo", 0]
    nodes = {
        "demo": ("PLADISDemoCheckpoint", {"variant": "few-step"}),
        "text": ("CLIPTextEncode", {"clip": ["demo", 1], "text": "a red circle"}),
        "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "sampler": ("KSampler", {**sampling, "model": model, **links}),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["demo", 2]}),
        # another name each time: a server says nothing of outputs that it takes from its cache
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": f"run{next(NUMBERS)}_"}),
    }
    if inputs:
        nodes["apply"] = (node, {"model": ["demo", 0], **inputs})
    return {name: {"class_type": kind, "inputs": values} for name, (kind, values) in nodes.items()}


VALUES = (
    None, "", "all", "custom", "both", "d0", "x", -1, 0, 1, 2, 1.5, 1e9, -1e9, float("nan"), True, [], {}, ["a", 1],
    "\u0000", "x" * 10000,
)  # fmt: skip
DEFAULTS = {
    "scale": 2.0, "alpha": 1.5, "start_percent": 0.0, "end_percent": 1.0, "layers": "all", "blocks": "",
    "apply_to": "both", "force_unknown": False, "scale_schedule": "constant", "end_scale": 0.0, "norm_cap": 0.0,
    "tokens": "all", "prompt": "",
}  # fmt: skip


def test_any_value_in_any_input(server):
    """The server refuses, or the run ends; it never hangs, and afterwards it makes the picture it made before."""
    before = pixels(server, graph(DEFAULTS))
    generator = random.Random(1)
    ran = refused = 0
    for _ in range(120):
        inputs = {**DEFAULTS, **{name: generator.choice(VALUES) for name in generator.sample(list(DEFAULTS), k=2)}}
        for name in generator.sample(list(DEFAULTS), k=generator.choice((0, 0, 1))):
            del inputs[name]
        try:
            answer = server.get("/prompt", json.dumps({"prompt": graph(inputs)}).encode())
        except urllib.error.HTTPError as error:
            assert error.code == 400, (inputs, error.read())
            refused += 1
            continue
        prompt_id = json.loads(answer)["prompt_id"]
        entry = server._poll(lambda id=prompt_id: json.loads(server.get(f"/history/{id}")).get(id), 30, str(inputs))
        if entry["status"]["status_str"] == "error":
            found = dict(entry["status"]["messages"])["execution_error"]
            assert found["node_id"] == "apply", (inputs, found)
            assert found["exception_type"] == "ValueError", (inputs, found)
        ran += 1
    assert ran > 5 and refused > 5
    assert pixels(server, graph(DEFAULTS)) == before


def pixels(server, workflow: dict) -> bytes:
    entry = server.run(workflow)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (image,) = entry["outputs"]["save"]["images"]
    # the file also holds the workflow
    return Image.open(BytesIO(server.view(image))).tobytes()


def resident_mib(server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the server's memory from /proc")
def test_200_runs_leak_neither_memory_nor_state(server, record_property):
    plain = pixels(server, graph({}))
    settings = [
        {**DEFAULTS, "scale": scale, "alpha": alpha, **other}
        for scale in (0.5, 1.0, 2.0, 3.0)
        for alpha in (1.25, 1.5, 2.0)
        for other in ({}, {"layers": "custom", "blocks": "u0-1"}, {"norm_cap": 1.2}, {"end_percent": 0.4})
    ]
    first = [pixels(server, graph(inputs)) for inputs in settings[:5]]
    memory = []
    # on the oldest host fewer: what is tested is this pack's memory, not the host's
    count = 200 if os.environ["PLADIS_HOST"] == "newest" else 80
    for number in range(count):
        assert server.run(graph(settings[number % len(settings)]))["status"]["status_str"] == "success"
        if number >= count // 4:
            memory.append(resident_mib(server))
    growth = sum(memory[-30:]) / 30 - sum(memory[:30]) / 30
    record_property("host", f"resident memory grew by {growth:.1f} MiB over the last three quarters of {count} runs")
    # 9 MB of weights, 64 x 64 pictures: one model or its activations left behind per run would be hundreds of MiB
    assert growth < 30, memory
    assert [pixels(server, graph(inputs)) for inputs in settings[:5]] == first
    assert pixels(server, graph({})) == plain


def test_an_interrupted_run_leaves_the_model_clean(server):
    plain = pixels(server, graph({}))
    answer = server.get("/prompt", json.dumps({"prompt": graph(DEFAULTS, steps=500)}).encode())
    prompt_id = json.loads(answer)["prompt_id"]
    server._poll(lambda: "1/500" in server.log() or "2/500" in server.log(), 60, "the first step")
    server.get("/interrupt", b"{}")
    entry = server._poll(lambda: json.loads(server.get(f"/history/{prompt_id}")).get(prompt_id), 60, "the interruption")
    assert "execution_interrupted" in dict(entry["status"]["messages"])
    assert pixels(server, graph({})) == plain


def test_an_interrupted_transformer_keeps_no_hook():
    import families

    family = families.BY_NAME["Wan 2.1 T2V"]
    model = families.patcher(family)
    expected = families.sample(model, family)
    network = model.model.diffusion_model

    def stop(*_):
        raise KeyboardInterrupt

    handle = network.blocks[-1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        families.sample(tiny.apply(model), family)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert torch.equal(families.sample(model, family), expected)
