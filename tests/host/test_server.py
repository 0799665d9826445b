"""The pack in a real ComfyUI server: it loads, samples, and reports errors at its own node.

This file is also a script, `python test_server.py FILE`, which writes the checkpoint. It runs as a second process so
that the tests themselves import nothing of ComfyUI.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
SHIPPED = ("__init__.py", "nodes", "pladis_core", "web", "pyproject.toml")
# as a git clone of the repository names it: not a Python identifier
PACK_FOLDER = "pladis-comfy"
CHECKPOINT = "tiny-sd15.safetensors"
START_SECONDS, RUN_SECONDS = 120, 120

SAMPLER, APPLY = "sampler", "apply"
BASIC = {"scale": 2.0, "alpha": 1.5, "start_percent": 0.0, "end_percent": 1.0}
ADVANCED = {**BASIC, "layers": "all", "blocks": "", "apply_to": "both"}
BLOCKS = [f"d{i}.0" for i in range(6)] + ["m0.0"] + [f"u{i}.0" for i in range(9)]

# SD 1.5 with its sixteen cross-attentions, but as wide at the bottom as at the top: a tenth of the parameters
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 1, 1, 1],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
# ComfyUI knows no other shape for an SD 1.5 VAE (comfy/sd.py, VAE)
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def write_checkpoint(path: Path) -> None:
    """An SD 1.5 checkpoint with random weights; fails if ComfyUI would take it for another model."""
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_detection
    import comfy.supported_models
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    weights = {key: _random_weight(key, shape) for key, shape in _checkpoint_shapes().items()}
    config = comfy.model_detection.model_config_from_unet(weights, "model.diffusion_model.")
    assert type(config) is comfy.supported_models.SD15, config
    known = {key: value for key, value in UNET.items() if key in config.unet_config}
    assert known == {key: config.unet_config[key] for key in known}, config.unet_config
    safetensors.torch.save_file(weights, path)


def _checkpoint_shapes() -> dict:
    import comfy.ops
    import comfy.sd1_clip
    import torch
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    operations = comfy.ops.disable_weight_init
    clip = json.loads(Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json").read_text())
    with torch.device("meta"):
        modules = {
            "model.diffusion_model.": UNetModel(**UNET, operations=operations, device="meta"),
            "cond_stage_model.transformer.text_model.": CLIPTextModel(clip, None, "meta", operations).text_model,
            "first_stage_model.": AutoencoderKL(ddconfig=VAE, embed_dim=4),
        }
    return {
        prefix + key: tensor.shape for prefix, module in modules.items() for key, tensor in module.state_dict().items()
    }


def _random_weight(key: str, shape):
    import torch

    if key.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    std = 1.0 if "embedding" in key else shape[1:].numel() ** -0.5
    # attention peaked on a few tokens, as a trained model's is: on a uniform one PLADIS does nothing
    gain = 2.0 if key.endswith(("attn2.to_q.weight", "attn2.to_k.weight")) else 1.0
    return (torch.randn(shape) * (std * gain)).half()


class Server:
    """A ComfyUI server process with a base directory of its own."""

    def __init__(self, base: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = base / "server.log"
        command = [sys.executable, "main.py", "--cpu", "--base-directory", str(base), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--force-fp32", "--fp32-vae", "--fp32-text-enc"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=os.environ["COMFYUI_PATH"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self) -> None:
        self._poll(self._is_ready, START_SECONDS, "the start")

    def _is_ready(self) -> bool:
        try:
            return bool(self.get("/system_stats"))
        except OSError:
            return False

    def _poll(self, probe, seconds: float, what: str):
        """The first true value of `probe`; fails with the end of the log if the server ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if value := probe():
                return value
            time.sleep(0.1)
        state = "is still running" if self.process.poll() is None else f"ended with {self.process.returncode}"
        pytest.fail(f"Waited for {what}; the server {state}. End of its log:\n{self.log()[-4000:]}", pytrace=False)

    def get(self, path: str, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(self.url + path, data, timeout=30) as response:
            return response.read()

    def run(self, workflow: dict) -> dict:
        """The history entry of a workflow: outputs, and status with the messages of the run."""
        try:
            answer = self.get("/prompt", json.dumps({"prompt": workflow}).encode())
        except urllib.error.HTTPError as error:
            pytest.fail(f"The server refused the workflow: {error.read().decode()}", pytrace=False)
        prompt_id = json.loads(answer)["prompt_id"]

        def finished() -> dict | None:
            return json.loads(self.get(f"/history/{prompt_id}")).get(prompt_id)

        return self._poll(finished, RUN_SECONDS, f"workflow {prompt_id}")

    def image(self, workflow: dict):
        """The pixels that a workflow saves, as an int array; fails if it did not run or if sampling was skipped."""
        entry = self.run(workflow)
        assert entry["status"]["status_str"] == "success", entry["status"]
        assert SAMPLER not in messages(entry)["execution_cached"]["nodes"], "taken from the server's cache"
        (saved,) = entry["outputs"]["save"]["images"]
        return decode(self.get("/view?" + urllib.parse.urlencode(saved)))

    def error(self, workflow: dict) -> dict:
        """What the server reports about a workflow that fails."""
        entry = self.run(workflow)
        assert entry["status"]["status_str"] == "error", entry["status"]
        return messages(entry)["execution_error"]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def messages(entry: dict) -> dict[str, dict]:
    return dict(entry["status"]["messages"])


def decode(png: bytes):
    # both come with the host; not at the top, which the checkpoint writer does not need
    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


def workflow(node: str | None = None, seed: int = 1, **inputs) -> dict:
    """Text to image in 64 x 64 pixels, through Apply node `node` if one is given."""
    model = [APPLY, 0] if node else ["checkpoint", 0]
    sampling = {"seed": seed, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": model, "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    nodes = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}),
        "positive": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": "a red fox under a blue umbrella"}),
        "negative": ("CLIPTextEncode", {"clip": ["checkpoint", 1], "text": "blurry"}),
        "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        SAMPLER: ("KSampler", {**sampling, **links}),
        "decode": ("VAEDecode", {"samples": [SAMPLER, 0], "vae": ["checkpoint", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "pladis"}),
    }
    if node:
        nodes[APPLY] = (node, {"model": ["checkpoint", 0], **inputs})
    return {name: {"class_type": kind, "inputs": values} for name, (kind, values) in nodes.items()}


def basic(scale: float, **inputs) -> dict:
    return workflow("PLADISApply", **{**BASIC, "scale": scale, **inputs})


def advanced(**inputs) -> dict:
    return workflow("PLADISApplyAdvanced", **{**ADVANCED, **inputs})


def install_pack(folder: Path) -> None:
    """Only what ships, so that nothing else of the repository can be needed."""
    folder.mkdir(parents=True)
    for source in (PACK / name for name in SHIPPED):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("models/checkpoints", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    install_pack(base / "custom_nodes" / PACK_FOLDER)
    checkpoint = base / "models" / "checkpoints" / CHECKPOINT
    host = os.environ["COMFYUI_PATH"]
    subprocess.run(
        [sys.executable, __file__, str(checkpoint)], cwd=host, env={**os.environ, "PYTHONPATH": host}, check=True
    )
    running = Server(base)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()
        # pytest keeps temporary folders of several runs
        checkpoint.unlink()


@pytest.fixture(scope="module")
def baseline(server):
    """The picture without PLADIS."""
    return server.image(workflow())


@pytest.fixture(scope="module")
def scale_2(server):
    """The same picture with PLADIS."""
    return server.image(basic(2.0))


@pytest.mark.parametrize(
    ("node", "inputs"), [("PLADISApply", BASIC), ("PLADISApplyAdvanced", ADVANCED)], ids=["basic", "advanced"]
)
def test_the_server_offers_the_documented_node(server, node, inputs):
    info = json.loads(server.get(f"/object_info/{node}"))[node]
    offered = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert list(offered) == ["model", *inputs]
    assert all(options.get("tooltip") for _, options in offered.values())
    assert {name: offered[name][1].get("default") for name in inputs} == inputs
    assert info["output"] == ["MODEL"]
    assert len(info["output_tooltips"]) == 1 and all(info["output_tooltips"])
    assert info["category"] == "model/patch"
    assert info["python_module"] == f"custom_nodes.{PACK_FOLDER}"


def test_nothing_fails_to_import(server):
    log = server.log()
    assert PACK_FOLDER in log
    assert "IMPORT FAILED" not in log, log[-4000:]


def test_the_checkpoint_is_complete_and_makes_a_picture(server, baseline):
    """Else the other tests would say nothing."""
    assert not re.findall(r".*(?:clip|unet) (?:missing|unexpected).*|.*Missing VAE keys.*", server.log())
    assert_is_a_picture(baseline)


def assert_is_a_picture(pixels) -> None:
    assert pixels.shape == (64, 64, 3)
    # a blank picture has one colour; NaN is saved as black
    assert pixels.std() > 8
    assert 16 < pixels.mean() < 240


def test_scale_0_changes_no_pixel(server, baseline):
    assert (server.image(basic(0.0)) == baseline).all()


def test_alpha_1_changes_no_pixel(server, baseline):
    assert (server.image(basic(2.0, alpha=1.0)) == baseline).all()


def test_scale_2_changes_the_picture(baseline, scale_2, record_property):
    assert_is_a_picture(scale_2)
    difference = abs(scale_2 - baseline)
    record_property("mean_difference", float(difference.mean()))
    record_property("max_difference", int(difference.max()))
    print(f"scale 2: mean difference {difference.mean():.2f}, max {difference.max()}, of 255")
    assert difference.mean() > 2


def test_advanced_with_its_defaults_is_the_basic_node(server, scale_2):
    assert (server.image(advanced()) == scale_2).all()


def test_a_workflow_queued_again_gives_the_same_picture(server, scale_2):
    # the server caches the last workflow only: with another in between, the picture is computed again
    assert (server.image(basic(0.5)) != scale_2).any()
    assert (server.image(basic(2.0)) == scale_2).all()


def test_the_patched_model_leaves_the_plain_one_alone(server, baseline):
    server.image(basic(2.0, seed=2))
    assert (server.image(workflow()) == baseline).all()


@pytest.mark.parametrize("entry", ["d9", "x1"])
def test_a_wrong_block_is_an_error_of_its_node(server, entry):
    error = server.error(advanced(layers="custom", blocks=entry))
    assert error["node_id"] == APPLY
    assert error["node_type"] == "PLADISApplyAdvanced"
    assert error["exception_type"] == "ValueError"
    assert entry in error["exception_message"]
    assert ", ".join(BLOCKS) in error["exception_message"]


@pytest.mark.parametrize("node", [basic, advanced])
def test_a_backward_window_is_an_error_of_its_node(server, node):
    error = server.error(node(scale=2.0, start_percent=0.8, end_percent=0.2))
    assert error["node_id"] == APPLY
    assert error["exception_type"] == "ValueError"
    assert all(word in error["exception_message"] for word in ("start_percent 0.8", "end_percent 0.2"))


def test_the_server_samples_after_an_error(server):
    server.error(advanced(layers="custom", blocks="d9"))
    assert_is_a_picture(server.image(advanced(layers="custom", blocks="d0-5", seed=2)))


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]))
