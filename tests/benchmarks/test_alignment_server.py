"""benchmarks.alignment on real ComfyUI servers, with the demo model and a tiny CLIP of random weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_hosts import host_path, host_python

from benchmarks.alignment_server import Job, Template, make_images
from comfy_server import Server

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle left of a blue square", "a green ring and a black cross"]
SEEDS, LAMBDAS = [3, 4], [0, 1, 2]
FILES = sorted(Job(p, s, lam).file for p in range(len(PROMPTS)) for s in SEEDS for lam in LAMBDAS)
WORKFLOW = {
    "demo": ("PLADISDemoCheckpoint", {"variant": "few-step"}),
    "pladis": ("PLADISApply", {
        "model": ["demo", 0], "scale": 2.0, "alpha": 1.5, "start_percent": 0.0, "end_percent": 1.0,
    }),
    "positive": ("CLIPTextEncode", {"clip": ["demo", 1], "text": "a picture of {prompt}"}),
    "negative": ("CLIPTextEncode", {"clip": ["demo", 1], "text": ""}),
    "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "sampler": ("KSampler", {
        "model": ["pladis", 0], "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0],
        "seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
    }),
    "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["demo", 2]}),
    "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "alignment"}),
}  # fmt: skip


def workflow() -> dict:
    nodes = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in WORKFLOW.items()}
    nodes["pladis"]["_meta"] = {"title": "Apply PLADIS"}
    return nodes


def start_server(base: Path, port: int | None = None) -> Server:
    path = host_path("newest")
    return Server(host_python("newest", path), path, base, port)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    with start_server(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of random weights that reads letters, saved as real ones are."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokens), "max_position_embeddings": 48}
    text |= {"bos_token_id": numbers["<|startoftext|>"], "eos_token_id": numbers["<|endoftext|>"]}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def command(folder: Path, *options: str) -> list[str]:
    (folder / "workflow.json").write_text(json.dumps(workflow()))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return [
        sys.executable, "-m", "benchmarks.alignment", "server",
        "--workflow", str(folder / "workflow.json"), "--prompts", str(folder / "prompts.txt"),
        "--seeds", *map(str, SEEDS), "--lambdas", *map(str, LAMBDAS), "--out", str(folder / "out"), *options,
    ]  # fmt: skip


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, *options), cwd=ROOT, capture_output=True, text=True, timeout=300)


def images(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "out" / "images").glob("*.png"))}


def computed(server: Server) -> int:
    """Workflows that the server has run."""
    return server.log().count("Prompt executed in")


def forget(server: Server) -> None:
    """Else pictures of the same jobs, made by another test, would be fetched from the server's history."""
    server.get("/history", json.dumps({"clear": True}).encode())


@pytest.fixture(scope="module")
def finished(server, clip, tmp_path_factory):
    """Folder and output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("run")
    result = run(folder, "--server", server.url, "--clip", str(clip), "--preference", str(clip))
    assert result.returncode == 0, result.stderr
    return folder, result


def test_every_picture_is_made(finished):
    folder, _ = finished
    assert list(images(folder)) == FILES
    for name in FILES:
        assert Image.open(folder / "out" / "images" / name).size == (64, 64)
    # lambda changes the picture, and the prompt does
    made = images(folder)
    assert len(set(made.values())) == len(FILES)


def test_the_table_says_what_the_scores_are(finished):
    folder, result = finished
    written = json.loads((folder / "out" / "results.json").read_text())
    assert set(written["scores"]) == {"CLIPScore", "tiny-clip"}
    for rows in written["scores"].values():
        assert [len(rows[f"{lam}"]) for lam in LAMBDAS] == [len(PROMPTS) * len(SEEDS)] * len(LAMBDAS)
    first, second = (torch.tensor(written["scores"]["CLIPScore"][lam]) for lam in ("0", "2"))
    row = written["table"][2]["CLIPScore"]
    assert row["mean"] == pytest.approx(second.mean().item())
    assert row["difference"] == pytest.approx((second - first).mean().item())
    # over prompts: seeds of one prompt are alike
    per_prompt = (second - first).view(len(PROMPTS), len(SEEDS)).mean(1)
    assert row["difference_se"] == pytest.approx((per_prompt.std() / len(PROMPTS) ** 0.5).item())
    table = (folder / "out" / "results.md").read_text()
    assert f"| 2 | {row['mean']:.3f}" in table and table.strip() in result.stdout


def test_the_scores_are_transformers(finished, clip):
    """CLIPScore: 100 times the cosine, not below 0; a preference model: the logit."""
    from transformers import CLIPModel, CLIPProcessor

    folder, _ = finished
    scores = json.loads((folder / "out" / "results.json").read_text())["scores"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    picture = Image.open(folder / "out" / "images" / Job(1, SEEDS[0], 2).file)
    inputs = processor(
        text=[PROMPTS[1]], images=[picture], return_tensors="pt", padding="max_length", truncation=True, max_length=48
    )
    with torch.no_grad():
        logit = model(**inputs).logits_per_image.item()
    assert scores["tiny-clip"]["2"][len(SEEDS)] == pytest.approx(logit, rel=1e-4)
    cosine = logit / model.logit_scale.exp().item()
    assert scores["CLIPScore"]["2"][len(SEEDS)] == pytest.approx(100 * max(cosine, 0), rel=1e-4)


def test_the_grid_shows_every_prompt_at_every_lambda(finished):
    grid = Image.open(finished[0] / "out" / "grid.png")
    assert grid.width == 256 * len(LAMBDAS) and grid.height > 256 * len(PROMPTS)


def test_progress_says_how_long_it_will_take(finished):
    assert f"{len(FILES)}/{len(FILES)}" in finished[1].stderr and "<00:00" in finished[1].stderr


def test_a_second_run_makes_nothing_twice(finished, server):
    before, pictures = computed(server), images(finished[0])
    assert run(finished[0], "--server", server.url).returncode == 0
    assert computed(server) == before and images(finished[0]) == pictures


def test_a_run_that_was_killed_goes_on(finished, server, tmp_path):
    """Finished pictures stay; what the server had made when the driver died is fetched, not made again."""
    forget(server)
    before = computed(server)
    process = subprocess.Popen(
        command(tmp_path, "--server", server.url), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out" / "images").glob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    part = images(tmp_path)
    assert 3 <= len(part) < len(FILES)
    assert run(tmp_path, "--server", server.url).returncode == 0
    made = images(tmp_path)
    assert made == images(finished[0]) and all(made[name] == content for name, content in part.items())
    assert computed(server) - before == len(FILES)


def test_a_server_that_comes_back_is_waited_for(tmp_path, finished):
    base = tmp_path / "comfyui"
    with start_server(base) as first:
        process = subprocess.Popen(
            command(tmp_path, "--server", first.url), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not list((tmp_path / "out" / "images").glob("*.png")) and process.poll() is None:
            time.sleep(0.05)
    with start_server(base, first.port):
        output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    assert images(tmp_path) == images(finished[0])


def test_two_servers_behind_ray_make_the_same_pictures(finished, server, second, tmp_path):
    forget(server)
    before = computed(server), computed(second)
    result = run(tmp_path, "--server", server.url, second.url, "--ray", "local")
    assert result.returncode == 0, result.stderr
    assert images(tmp_path) == images(finished[0])
    shares = computed(server) - before[0], computed(second) - before[1]
    assert sum(shares) == len(FILES) and min(shares) > 0, shares


def test_a_server_that_is_lost_leaves_its_work_to_the_others(finished, server, tmp_path):
    forget(server)
    servers = [server.url, "http://127.0.0.1:9"]
    folder = tmp_path / "out" / "images"
    make_images(Template(workflow()), PROMPTS, SEEDS, LAMBDAS, folder, servers, "local", patience=0.5)
    assert images(tmp_path) == images(finished[0])


def test_a_run_without_any_server_ends(tmp_path):
    servers = ["http://127.0.0.1:9", "http://127.0.0.1:10"]
    with pytest.raises(ConnectionError, match="is ComfyUI running"):
        make_images(Template(workflow()), PROMPTS, SEEDS, [0], tmp_path, servers, "local", patience=0.2)


def test_a_server_that_is_not_there_is_named():
    from benchmarks.comfy_client import ComfyClient

    with pytest.raises(ConnectionError, match="127.0.0.1:9.*is ComfyUI running"):
        ComfyClient("http://127.0.0.1:9", patience=0.2).named_image(workflow(), "job")


def test_an_error_in_the_workflow_is_the_servers(server, tmp_path):
    result = run(tmp_path, "--server", server.url, "--lambdas", "0", "99")
    assert result.returncode == 2
    assert "scale" in result.stderr and "Traceback" not in result.stderr


def test_an_error_in_a_node_names_the_node(server, tmp_path):
    line = command(tmp_path, "--server", server.url)
    (tmp_path / "prompts.txt").write_text("an umbrella\n")
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "CLIPTextEncode" in result.stderr and "'umbrella'" in result.stderr and "Traceback" not in result.stderr


def test_other_prompts_need_another_folder(finished, server):
    folder, _ = finished
    line = command(folder, "--server", server.url)
    (folder / "prompts.txt").write_text("a yellow ring\n")
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "choose another --out" in result.stderr


def test_two_servers_need_ray(server, tmp_path):
    result = run(tmp_path, "--server", server.url, "http://127.0.0.1:9")
    assert result.returncode == 2 and "--ray local" in result.stderr


def test_a_folder_without_pictures_can_be_used_again(server, tmp_path):
    """After a first try that failed, before anything was made."""
    line = command(tmp_path, "--server", server.url)
    (tmp_path / "prompts.txt").write_text("an umbrella\n")
    assert subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120).returncode == 2
    assert run(tmp_path, "--server", server.url).returncode == 0


@pytest.mark.parametrize("option", ["--seeds", "--lambdas"])
def test_nothing_counts_twice(server, tmp_path, option):
    result = run(tmp_path, "--server", server.url, option, "1", "2", "1")
    assert result.returncode == 2 and "1" in result.stderr and "given twice" in result.stderr


def test_a_workflow_that_is_not_in_api_format_is_named(tmp_path):
    line = command(tmp_path)
    (tmp_path / "workflow.json").write_text(json.dumps({"id": "x", "nodes": [], "links": []}))
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "Export (API)" in result.stderr and "Traceback" not in result.stderr


def test_a_workflow_with_two_saved_pictures_is_refused(server):
    from benchmarks.comfy_client import ComfyClient, WorkflowError

    two = Template(workflow()).filled(PROMPTS[0], 1, 0.0)
    two["again"] = two["save"]
    with pytest.raises(WorkflowError, match="exactly one node .* here: again, save"):
        ComfyClient(server.url).named_image(two, str(uuid.uuid4()))


def test_every_picture_has_a_name_of_its_own_on_the_server(server, finished):
    """Servers that share an output folder would otherwise choose the same number for two pictures."""
    history = [entry for entry in json.loads(server.get("/history")).values() if "save" in entry["outputs"]]
    files = [image["filename"] for entry in history for image in entry["outputs"]["save"]["images"]]
    # without the number that the server appends
    assert len(files) > 1 and len({file.rsplit("_", 2)[0] for file in files}) == len(files)


def without(*names: str) -> dict:
    return {name: node for name, node in workflow().items() if name not in names}


def test_a_workflow_without_pladis_is_refused():
    with pytest.raises(ValueError, match="Apply PLADIS node, exactly one; it has: none"):
        Template(without("pladis"))


def test_a_workflow_with_two_needs_a_name():
    two = {**workflow(), "other": {**workflow()["pladis"], "_meta": {"title": "Second"}}}
    with pytest.raises(ValueError, match="exactly one; it has: pladis .Apply PLADIS., other .Second."):
        Template(two)
    assert Template(two, "Second").apply == "other"
    assert Template(two, "pladis").apply == "pladis"


def test_a_workflow_without_a_place_for_the_prompt_is_refused():
    with pytest.raises(ValueError, match="{prompt}"):
        Template(without("positive"))


def test_a_filled_workflow_changes_prompt_seed_and_lambda_only():
    original = workflow()
    filled = Template(original).filled("a red ring", 9, 0.5)
    assert filled["positive"]["inputs"]["text"] == "a picture of a red ring"
    assert filled["sampler"]["inputs"]["seed"] == 9
    assert filled["pladis"]["inputs"]["scale"] == 0.5
    assert original == workflow()
    changed = ("positive", "sampler", "pladis", "save")
    assert all(filled[name] == original[name] for name in original if name not in changed)
