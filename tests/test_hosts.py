"""Runs every file of tests/host in the Python of a real ComfyUI: the newest of which there is a checkout, the oldest
that is supported, and the next; and the browser's tests, in this Python, on a server of each.

The newest is looked for at $COMFYUI_PATH, else ~/comfy/ComfyUI; the oldest at $COMFYUI_PATH_OLDEST, else
~/comfy/ComfyUI-0.20.0; the next, whatever of a newer version could be had, at $COMFYUI_PATH_NEXT, else
~/comfy/ComfyUI-next. Its Python is $COMFYUI_PYTHON (for the newest), else the `.venv` inside the checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = {
    "newest": ("COMFYUI_PATH", "~/comfy/ComfyUI"),
    "oldest": ("COMFYUI_PATH_OLDEST", "~/comfy/ComfyUI-0.20.0"),
    "next": ("COMFYUI_PATH_NEXT", "~/comfy/ComfyUI-next"),
}
# pytest and entmax come from this environment where the host has none; last in line, so the host's own packages win
BOOTSTRAP = """
import sys
sys.path.extend(sys.argv.pop(1).splitlines())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
# what shares a process: to start one takes as long as a short file's tests
SHARED = {
    "networks": ("contracts", "families", "family_fixtures", "spans"),
    "graphs": ("attention_map", "demo_model", "distilled", "matrix", "sampling"),
    # and one server
    "short files": (
        "compatibility", "composition", "cpu_side", "fuzz", "help", "layers", "locales", "more_peers", "nvrtc", "peers",
        "preferences", "reached", "regime", "schema", "server", "strength", "sweep", "tokens", "transformers", "triton",
        "workflows",
    ),
}  # fmt: skip
# about our fixtures, samplers, inputs and kernels, which do not differ between hosts: for time, on the newest alone
NEWEST_ALONE = ("family_fixtures", "distilled", "fuzz", "nvrtc", "triton", "cpu_side")
# a way to call attention that the oldest does not have; and, for time, what is long and hardly the host's: run these by
# hand on the oldest before a release (CONTRIBUTING.md)
NEWER_ALONE = ("preferences", "compiled", "matrix", "sampling")
# what depends on how the host calls attention, what its networks look like and what languages it offers; for time, no
# more
NEXT = (
    "compatibility", "contracts", "families", "locales", "preferences", "reached", "spans", "transformers",
)  # fmt: skip


def files_of(host: str, shared: bool = True) -> dict[str, list[Path]]:
    """What one process runs, by name; with `shared`, several files in one."""
    files = {file.stem.removeprefix("test_"): [file] for file in sorted((ROOT / "tests" / "host").glob("test_*.py"))}
    left_out = {"newest": (), "oldest": NEWEST_ALONE + NEWER_ALONE, "next": files.keys() - set(NEXT)}[host]
    files = {name: group for name, group in files.items() if name not in left_out}
    if not shared:
        return files
    for name, members in SHARED.items():
        if group := [file for member in members for file in files.pop(member, ())]:
            files[name] = group
    return files


def pytest_generate_tests(metafunc) -> None:
    """With -k every file is a run of its own, which its name finds; without it, some share one."""
    if "files" in metafunc.fixturenames:
        runs = {
            f"{host}-{name}": (host, files)
            for host in HOSTS
            for name, files in files_of(host, shared=not metafunc.config.option.keyword).items()
        }
        metafunc.parametrize(("host", "files"), runs.values(), ids=runs)


# in the browser, by name: host, files, which of their tests. For time, workflows, help pages, words and looks on the
# newest alone; an old front end has people who did not change to the new renderer, the next has the new one
WEB = {
    "newest, both renderers": ("newest", ("nodes",), ""),
    "newest, the other files": ("newest", ("workflows", "help", "words", "looks"), ""),
    "oldest": ("oldest", ("nodes",), "classic"),
    "next": ("next", ("nodes",), "not classic"),
}


def host_path(host: str) -> Path:
    variable, default = HOSTS[host]
    path = Path(os.environ.get(variable) or default).expanduser()
    if not (path / "main.py").is_file():
        pytest.skip(f"no ComfyUI at {path}: set ${variable}")
    return path


def host_python(host: str, path: Path) -> str:
    candidates = [path / ".venv" / "bin" / "python", path / ".venv" / "Scripts" / "python.exe"]
    if host == "newest" and "COMFYUI_PYTHON" in os.environ:
        candidates = [Path(os.environ["COMFYUI_PYTHON"])]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    pytest.fail(f"{path} has no .venv: set $COMFYUI_PYTHON to the Python that runs this ComfyUI")


def test_host(host, files, record_property):
    path = host_path(host)
    ours = "\n".join(p for p in sys.path if "site-packages" in p)
    run([host_python(host, path), "-c", BOOTSTRAP, ours], host, path, files, record_property)


@pytest.mark.parametrize("name", WEB)
def test_web(name, record_property):
    """Each in one process, so that workers share no file's tests and start no second server."""
    host, names, expression = WEB[name]
    files = [ROOT / "tests" / "web" / f"test_{file}.py" for file in names]
    output = run([sys.executable, "-m", "pytest", "-k", expression], host, host_path(host), files, record_property)
    if "no browser" in output:
        pytest.skip("no browser: python -m playwright install chromium")


def run(pytest_command: list[str], host: str, path: Path, files: list[Path], record_property) -> str:
    result = subprocess.run(
        [*pytest_command, "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "COMFYUI_PATH": str(path), "PLADIS_HOST": host},
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{result.stdout[-8000:]}\n{result.stderr[-4000:]}"
    names = ", ".join(file.name for file in files)
    record_property("host", f"{host} ComfyUI, {names}: {result.stdout.strip().splitlines()[-1].strip('= ')}")
    return result.stdout
