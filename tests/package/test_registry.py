"""What the registry gets: the metadata, the zip, and what an editable install puts on the path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
CLASSIFIERS = {
    "Operating System :: OS Independent",
    "Environment :: GPU :: NVIDIA CUDA",
    "Environment :: GPU :: AMD ROCm",
    "Environment :: GPU :: Intel Arc",
    "Environment :: GPU :: Apple Metal",
}
VERSION = r"\d+\.\d+\.\d+"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def pack_files() -> list[str]:
    """What a commit of the working tree would hold."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """The comfy command, run in a repository of its own with a home of its own."""
    # not resolved: the interpreter of a virtual environment is a link out of it
    program = Path(sys.executable).with_name("comfy.exe" if os.name == "nt" else "comfy")
    assert program.exists(), 'comfy-cli is missing: pip install -e ".[test]"'
    home, copy = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("pack")
    for name in pack_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    folders = {key: str(home) for key in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    env = {**os.environ, **folders, "COLUMNS": "200", "NO_COLOR": "1"}
    run("git", "init", "--quiet", cwd=copy, env=env)
    run("git", "add", "--all", cwd=copy, env=env)

    def call(*arguments: str) -> str:
        return run(program, "--skip-prompt", "--no-enable-telemetry", *arguments, cwd=copy, env=env)

    call.folder = copy
    return call


@pytest.fixture(scope="module")
def zipped(comfy) -> set[str]:
    comfy("node", "pack")
    with zipfile.ZipFile(comfy.folder / "node.zip") as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_comfy_validates_the_pack(comfy):
    # its exit status is 0 whatever it finds
    output = comfy("node", "validate")
    assert "All validation checks passed" in output
    assert not re.search(r"\b(warning|error|S102|S307|E702)\b", output, re.IGNORECASE), output


def test_the_zip_holds_what_runs(zipped):
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md"} <= zipped
    for folder in ("nodes", "pladis_core", "demo", "web", "locales", "example_workflows"):
        expected = {name for name in pack_files() if name.startswith(f"{folder}/")}
        expected -= {name for name in expected if name.startswith("demo/train")}
        assert expected and expected <= zipped
    assert {"web/docs/PLADISApply.md", "web/docs/images/sweep.png", "locales/zh/nodeDefs.json"} <= zipped
    assert {"example_workflows/01_pladis_demo.json", "example_workflows/01_pladis_demo.jpg"} <= zipped
    # the demo node needs them
    assert len([name for name in zipped if name.endswith(".safetensors")]) == 4


def test_the_readmes_links_work_in_the_zip_and_in_the_repository(zipped):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    links = re.findall(r"(?<=\]\()[^)]+|(?<=\]: )\S+", readme)
    assert [link for link in links if "://" not in link and link not in zipped] == []
    # what the zip leaves out is named by its address
    address = r"https://(?:github\.com|raw\.githubusercontent\.com)/pladis-comfy/pladis-comfy/(?:blob/)?main/([^#]+)"
    ours = [found[1] for link in links if (found := re.match(address, link))]
    assert len(ours) > 5 and [path for path in ours if not (ROOT / path).is_file()] == []


def test_the_zip_holds_nothing_else(zipped):
    paths = [PurePosixPath(name) for name in zipped]
    tops = {path.parts[0] for path in paths}
    assert tops.isdisjoint({"tests", "benchmarks", "shared"})
    assert not [top for top in tops if top.startswith(".")]
    assert not [path for path in paths if path.suffix == ".pyc" or "__pycache__" in path.parts]
    assert not [path for path in paths if path.parts[0] == "demo" and path.name.startswith("train")]
    assert not [part for path in paths for part in path.parts if part.endswith(".egg-info")]


def test_the_name_is_one_the_registry_takes(metadata):
    name = metadata["project"]["name"]
    # it becomes the pack's id, lower-cased, for ever
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) and len(name) < 100
    assert "comfyui" not in name


def test_the_classifiers_are_ones_the_registry_knows(metadata):
    # a single unknown one voids the whole group
    classifiers = metadata["project"]["classifiers"]
    assert set(classifiers) <= CLASSIFIERS and len(set(classifiers)) == len(classifiers)


def test_the_version_is_the_changelogs_newest(metadata):
    version = metadata["project"]["version"]
    assert re.fullmatch(VERSION, version)
    headings = re.findall(rf"^## \[({VERSION})\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version


def test_the_oldest_host_is_a_full_version(metadata):
    assert re.fullmatch(rf">={VERSION}", metadata["tool"]["comfy"]["requires-comfyui"])


def test_publisher_and_addresses_are_set(metadata):
    assert metadata["tool"]["comfy"]["PublisherId"].strip()
    assert metadata["tool"]["comfy"]["DisplayName"].strip()
    assert metadata["project"]["urls"]["Repository"].startswith("https://github.com/")
    assert metadata["project"]["license"] == {"file": "LICENSE"}


def test_nothing_is_installed_into_the_users_host(metadata):
    assert metadata["project"]["dependencies"] == []
    assert not (ROOT / "requirements.txt").exists()


def test_a_wheel_holds_every_package_of_the_core(metadata):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "pladis_core").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} == set(metadata["tool"]["setuptools"]["packages"])


def test_a_wheel_holds_the_kernels_sources(metadata):
    files = (ROOT / "pladis_core" / "impl").iterdir()
    sources = {path.name for path in files if path.suffix in (".cpp", ".cu", ".cuh")}
    assert sources == set(metadata["tool"]["setuptools"]["package-data"]["pladis_core.impl"])


def test_the_scripts_are_served_once(metadata):
    # with WEB_DIRECTORY as well, the host would load every script twice
    assert "web" not in metadata["tool"]["comfy"]


def test_an_install_provides_the_core_alone(tmp_path):
    code = "import importlib.util as i; print([n for n in ('pladis_core', 'nodes', 'tests') if i.find_spec(n)])"
    output = run(sys.executable, "-c", code, cwd=tmp_path)
    assert output.strip() == "['pladis_core']", f'{output.strip()}: is it installed with pip install -e ".[test]"?'


def test_ruff_finds_nothing():
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=ROOT)
