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

from benchmarks import alignment, alignment_server
from benchmarks.alignment_server import TEMPERATURE_FOLDER, Job, Setting, Template, _identity, make_images
from comfy_server import Server

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle left of a blue square", "a green bar and a black diamond"]
SEEDS, LAMBDAS = [3, 4], [0, 1, 2]
FILES = sorted(Job(p, s, Setting(lam)).file for p in range(len(PROMPTS)) for s in SEEDS for lam in LAMBDAS)
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
    link = base / "custom_nodes" / "temperature-control"
    if not link.exists():
        link.parent.mkdir(parents=True)
        link.symlink_to(TEMPERATURE_FOLDER)
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


@pytest.fixture
def refused(monkeypatch, capsys):
    """What a command says that is refused before any server is asked; in this process, which is quick."""

    def refusal(folder: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["alignment", *command(folder, *options)[3:]])
        with pytest.raises(SystemExit, match="2"):
            alignment.main()
        return capsys.readouterr().err

    return refusal


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
        assert [len(rows[f"l{lam}"]) for lam in LAMBDAS] == [len(PROMPTS) * len(SEEDS)] * len(LAMBDAS)
    first, second = (torch.tensor(written["scores"]["CLIPScore"][key]) for key in ("l0", "l2"))
    row = written["table"][2]["CLIPScore"]
    assert row["mean"] == pytest.approx(second.mean().item())
    assert row["difference"] == pytest.approx((second - first).mean().item())
    # over prompts: seeds of one prompt are alike
    per_prompt = (second - first).view(len(PROMPTS), len(SEEDS)).mean(1)
    assert row["difference_se"] == pytest.approx((per_prompt.std() / len(PROMPTS) ** 0.5).item())
    table = (folder / "out" / "results.md").read_text()
    assert f"| lambda 2 | 1 | {row['mean']:.3f}" in table and table.strip() in result.stdout


def test_the_scores_are_transformers(finished, clip):
    """CLIPScore: 100 times the cosine, not below 0; a preference model: the logit."""
    from transformers import CLIPModel, CLIPProcessor

    folder, _ = finished
    scores = json.loads((folder / "out" / "results.json").read_text())["scores"]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    picture = Image.open(folder / "out" / "images" / Job(1, SEEDS[0], Setting(2)).file)
    inputs = processor(
        text=[PROMPTS[1]], images=[picture], return_tensors="pt", padding="max_length", truncation=True, max_length=48
    )
    with torch.no_grad():
        logit = model(**inputs).logits_per_image.item()
    assert scores["tiny-clip"]["l2"][len(SEEDS)] == pytest.approx(logit, rel=1e-4)
    cosine = logit / model.logit_scale.exp().item()
    assert scores["CLIPScore"]["l2"][len(SEEDS)] == pytest.approx(100 * max(cosine, 0), rel=1e-4)


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


def test_two_servers_behind_ray_make_the_same_pictures(finished, server, second, tmp_path):
    forget(server)
    before = computed(server), computed(second)
    result = run(tmp_path, "--server", server.url, second.url, "--ray", "local")
    assert result.returncode == 0, result.stderr
    assert images(tmp_path) == images(finished[0])
    shares = computed(server) - before[0], computed(second) - before[1]
    assert sum(shares) == len(FILES) and min(shares) > 0, shares


def test_a_server_that_comes_back_is_waited_for(tmp_path, finished, second):
    """It stops for good: whoever else needs `second` stands above."""
    process = subprocess.Popen(
        command(tmp_path, "--server", second.url), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list((tmp_path / "out" / "images").glob("*.png")) and process.poll() is None:
        time.sleep(0.05)
    second.stop()
    with start_server(second.log_file.parent, second.port):
        output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    assert images(tmp_path) == images(finished[0])


def test_a_server_that_is_lost_leaves_its_work_to_the_others(finished, server, tmp_path):
    forget(server)
    servers = [server.url, "http://127.0.0.1:9"]
    folder = tmp_path / "out" / "images"
    settings = [Setting(lam) for lam in LAMBDAS]
    make_images(Template(workflow()), PROMPTS, SEEDS, settings, folder, servers, "local", patience=0.5)
    assert images(tmp_path) == images(finished[0])


def test_a_run_without_any_server_ends(tmp_path):
    servers = ["http://127.0.0.1:9", "http://127.0.0.1:10"]
    with pytest.raises(ConnectionError, match="is ComfyUI running"):
        make_images(Template(workflow()), PROMPTS, SEEDS, [Setting()], tmp_path, servers, "local", patience=0.2)


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
    (folder / "prompts.txt").write_text("a yellow bar\n")
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


@pytest.mark.parametrize("option", ["--seeds", "--lambdas", "--norm-caps", "--cfgs", "--temperatures"])
def test_nothing_counts_twice(tmp_path, refused, option):
    assert "1" in (said := refused(tmp_path, option, "1", "2", "1")) and "given twice" in said


def test_a_workflow_that_is_not_in_api_format_is_named(tmp_path):
    line = command(tmp_path)
    (tmp_path / "workflow.json").write_text(json.dumps({"id": "x", "nodes": [], "links": []}))
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "Export (API)" in result.stderr and "Traceback" not in result.stderr


def test_a_workflow_with_two_saved_pictures_is_refused(server):
    from benchmarks.comfy_client import ComfyClient, WorkflowError

    two = Template(workflow()).filled(PROMPTS[0], 1, Setting())
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
    filled = Template(original).filled("a red bar", 9, Setting(0.5))
    assert filled["positive"]["inputs"]["text"] == "a picture of a red bar"
    assert filled["sampler"]["inputs"]["seed"] == 9
    assert filled["pladis"]["inputs"]["scale"] == 0.5
    assert original == workflow()
    changed = ("positive", "sampler", "pladis", "save")
    assert all(filled[name] == original[name] for name in original if name not in changed)


VARIED = (
    "--seeds", "3", "--lambdas", "2", "--tokens", "all", "words only", "--norm-caps", "0", "0.5", "--cfgs", "1", "3",
    "--temperatures", "2",
)  # fmt: skip
KEYS = ["l0", "l2", "l2_c0.5", "l2_words-only", "t2"]


@pytest.fixture(scope="module")
def varied(finished, server, clip):
    """The run of `finished` goes on with more settings; all in one folder."""
    folder, _ = finished
    before, pictures = computed(server), images(folder)
    first = (folder / "out" / "results.json").read_bytes()
    result = run(folder, "--server", server.url, "--clip", str(clip), *VARIED)
    assert result.returncode == 0, result.stderr
    written = json.loads((folder / "out" / "results.json").read_text())
    made = {name: content for name, content in images(folder).items() if name not in pictures}
    count = computed(server) - before
    # other tests compare the folder with theirs
    for name in made:
        (folder / "out" / "images" / name).unlink()
    (folder / "out" / "results.json").write_bytes(first)
    return made, written, result, count


def test_everything_that_is_varied_changes_the_picture(varied, finished):
    made, *_ = varied
    keys = [key + cfg for key in KEYS for cfg in ("", "_g3")]
    new = [f"p{p:04}_s3_{key}.png" for p in range(len(PROMPTS)) for key in keys if key not in ("l0", "l2")]
    assert sorted(made) == sorted(new)
    # none is a picture of another setting; 0 and 2 at the workflow's CFG are of the first run
    assert len({*made.values(), *images(finished[0]).values()}) == len(new) + len(FILES)


def test_only_what_is_new_is_made(varied):
    made, _, _, count = varied
    assert count == len(made)


def test_the_json_has_what_a_report_needs(varied, server):
    _, written, result, _ = varied
    assert [setting["key"] for setting in written["settings"]] == [
        *("l0", "l2", "l2_c0.5", "l2_words-only", "t2"), *(f"{key}_g3" for key in KEYS),
    ]  # fmt: skip
    words = next(setting for setting in written["settings"] if setting["key"] == "l2_words-only_g3")
    assert words == {
        "key": "l2_words-only_g3", "label": "lambda 2, words only", "lambda": 2.0, "tokens": "words only",
        "norm_cap": 0.0, "temperature": None, "cfg": 3.0,
    }  # fmt: skip
    system = json.loads(server.get("/system_stats"))["system"]
    assert written["versions"]["servers"] == [
        {"comfyui": system["comfyui_version"], "pytorch": system["pytorch_version"], "device": "cpu"}
    ]
    assert written["models"] == ["PLADIS demo model, few-step"] and written["scorers"] == {"CLIPScore": "tiny-clip"}
    assert written["workflow"]["sampler"]["inputs"]["steps"] == 4
    # with two prompts it says nothing
    assert result.stdout.splitlines()[-1] == written["advice"] and "2 prompts are too few" in written["advice"]


def test_a_report_can_be_checked(varied, tmp_path):
    file = tmp_path / "report.json"
    check = [sys.executable, "-m", "benchmarks.alignment", "check", str(file)]
    written = varied[1]
    file.write_text(json.dumps(written))
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and written["advice"] in result.stdout, result.stderr
    written = json.loads(json.dumps(written))
    written["scores"]["CLIPScore"]["l2"][0] += 1
    file.write_text(json.dumps(written))
    result = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "report.json: the tables" in result.stderr


def test_a_server_without_the_control_is_told_what_to_link(server, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(alignment_server, "TEMPERATURE", "PLADISNoSuchControl")
    before = computed(server)
    said = refused(tmp_path, "--server", server.url, "--temperatures", "2")
    assert computed(server) == before
    assert "has no node PLADISNoSuchControl, which --temperatures needs: link or copy the folder" in said
    assert f"ln -s {TEMPERATURE_FOLDER}" in said


def test_pictures_of_earlier_versions_are_of_the_same_run():
    """Their names, and the folder's mark, are those of the first version of this benchmark."""
    assert [Job(1, 0, Setting(lam)).file for lam in (2.0, 0.5)] == ["p0001_s0_l2.png", "p0001_s0_l0.5.png"]
    prompts = ["a red circle left of a blue square", "a green ring and a black cross"]
    assert str(_identity(Template(workflow()), prompts)) == "b91e18fa-bb59-eb86-736c-db642b9ce7b8"


def advanced(**inputs) -> dict:
    changed = workflow()
    changed["pladis"]["class_type"] = "PLADISApplyAdvanced"
    changed["pladis"]["inputs"] |= {"layers": "down + up", "blocks": "", "apply_to": "positive", **inputs}
    return changed


def test_which_combinations_are_run():
    def keys(**options) -> list[str]:
        return [setting.key for setting in Template(workflow()).settings([0, 1, 2], **options)]

    assert keys() == ["l0", "l1", "l2"]
    two = {"tokens": ["all", "words only"], "norm_caps": [0.0, 1.0]}
    each = ["l1", "l2", "l1_c1", "l2_c1", "l1_words-only", "l2_words-only"]
    assert keys(**two) == ["l0", *each]
    assert keys(**two, product=True) == ["l0", *each, "l1_words-only_c1", "l2_words-only_c1"]
    assert keys(temperatures=[2.0], cfgs=[1.0, 5.0]) == [
        "l0", "l1", "l2", "t2", "l0_g5", "l1_g5", "l2_g5", "t2_g5",
    ]  # fmt: skip


def test_what_the_workflow_has_has_one_name():
    """Its own tokens, asked for by name, are the same pictures."""
    template = Template(advanced(tokens="words only", norm_cap=1.0))
    settings = template.settings([1], tokens=["words only", "all"], norm_caps=[1.0], temperatures=[2.0])
    assert [setting.key for setting in settings] == ["l0", "l1", "l1_all", "t2"]
    labels = [template.whole(setting).label for setting in settings]
    kept = "words only, norm_cap 1"
    assert labels == ["softmax", f"lambda 1, {kept}", "lambda 1, norm_cap 1", f"temperature 2, {kept}"]


def test_the_simple_node_becomes_the_advanced_one_that_does_the_same():
    filled = Template(workflow()).filled("a red bar", 9, Setting(0.5, norm_cap=1.0))
    assert filled["pladis"]["class_type"] == "PLADISApplyAdvanced"
    assert filled["pladis"]["inputs"] == {
        "model": ["demo", 0], "scale": 0.5, "alpha": 1.5, "start_percent": 0.0, "end_percent": 1.0, "layers": "all",
        "blocks": "", "apply_to": "both", "norm_cap": 1.0,
    }  # fmt: skip


def test_words_only_gets_what_was_encoded():
    filled = Template(workflow()).filled("a red bar", 9, Setting(0.5, "words only"))
    assert filled["pladis"]["inputs"]["clip"] == ["demo", 1]
    assert filled["pladis"]["inputs"]["prompt"] == "a picture of a red bar\n---\n"
    own = Template(advanced(clip=["other", 0], prompt="of {prompt}")).filled("it", 9, Setting(1.0, "words only"))
    assert own["pladis"]["inputs"]["clip"] == ["other", 0] and own["pladis"]["inputs"]["prompt"] == "of it"


def test_the_control_takes_the_nodes_place_in_its_layers():
    filled = Template(advanced(norm_cap=1.0, end_scale=1.0)).filled("it", 9, Setting(temperature=2.0, cfg=5.0))
    assert filled["pladis"] == {"class_type": "PLADISTemperatureControl", "inputs": {
        "model": ["demo", 0], "start_percent": 0.0, "end_percent": 1.0, "layers": "down + up", "blocks": "",
        "apply_to": "positive", "norm_cap": 1.0, "temperature": 2.0,
    }}  # fmt: skip
    assert filled["sampler"]["inputs"]["cfg"] == 5.0


def test_a_schedule_has_no_control():
    with pytest.raises(ValueError, match="scale_schedule 'linear'"):
        Template(advanced(scale_schedule="linear")).settings([1], temperatures=[2.0])


def test_cfg_must_be_told():
    linked = workflow()
    linked["sampler"]["inputs"]["cfg"] = ["number", 0]
    with pytest.raises(ValueError, match="exactly one; the workflow has: none. .* leave --cfgs out"):
        Template(linked).settings([1], cfgs=[2.0])
    two = workflow()
    two["second"] = {"class_type": "KSampler", "inputs": {"cfg": 4.0}, "_meta": {"title": "Second pass"}}
    with pytest.raises(ValueError, match="has: sampler .., second .Second pass.. Name one with --cfg-node"):
        Template(two).settings([1], cfgs=[2.0])
    # who does not vary it need not tell
    assert [setting.key for setting in Template(two).settings([1])] == ["l0", "l1"]
    named = Template(two, cfg_node="Second pass")
    assert [setting.key for setting in named.settings([1], cfgs=[4.0, 2.0])] == ["l0", "l1", "l0_g2", "l1_g2"]
    # pictures of another node's cfg have the same names
    assert _identity(named, PROMPTS) != _identity(Template(two, cfg_node="sampler"), PROMPTS)
    filled = named.filled("it", 1, Setting(1.0, cfg=2.0))
    assert filled["second"]["inputs"]["cfg"] == 2.0 and filled["sampler"]["inputs"]["cfg"] == 1.0


def test_a_report_has_no_folders_of_the_machine():
    loads = workflow()
    loads["loader"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "mine\\sd_xl_base.safetensors"}}
    loads["image"] = {"class_type": "LoadImage", "inputs": {"image": "/home/somebody/in.png", "text": "a/b and c"}}
    template = Template(loads)
    assert template.models() == ["PLADIS demo model, few-step", "sd_xl_base.safetensors"]
    assert template.public()["loader"]["inputs"] == {"ckpt_name": "sd_xl_base.safetensors"}
    assert template.public()["image"]["inputs"] == {"image": "in.png", "text": "a/b and c"}


@pytest.mark.parametrize("t", ["0", "1"])
def test_a_temperature_that_is_none(tmp_path, refused, t):
    assert f"temperature {t}: give a number above 0" in refused(tmp_path, "--temperatures", t)
