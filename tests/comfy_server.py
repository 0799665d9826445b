"""A real ComfyUI server with this pack and nothing else in it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

PACK = Path(__file__).parents[1]
SHIPPED = (
    "__init__.py", "nodes", "pladis_core", "demo", "web", "locales", "example_workflows", "pyproject.toml",
)  # fmt: skip
# as a git clone of the repository names it: not a Python identifier
PACK_FOLDER = "pladis-comfy"
START_SECONDS, RUN_SECONDS = 120, 120


class Server:
    """A ComfyUI server process with a base directory of its own.

    Args:
        python, host: the interpreter and the checkout of ComfyUI.
        base: a folder for its models, outputs and custom nodes, made here.
        port: of an earlier server that this one takes the place of; a free one when None.
    """

    def __init__(self, python: str, host: Path, base: Path, port: int | None = None) -> None:
        for name in ("models/checkpoints", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        install_pack(base / "custom_nodes" / PACK_FOLDER)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "server.log"
        command = [python, "main.py", "--cpu", "--base-directory", str(base), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--force-fp32", "--fp32-vae", "--fp32-text-enc"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=host, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

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

    def set(self, name: str, value) -> None:
        """One of the settings of its front end."""
        self.get(f"/settings/{name}", json.dumps(value).encode())

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

    def view(self, saved: dict) -> bytes:
        """A file that a workflow saved, as its history names it."""
        return self.get("/view?" + urllib.parse.urlencode(saved))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def install_pack(folder: Path) -> None:
    """Only what ships, so that nothing else of the repository can be needed."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for source in (PACK / name for name in SHIPPED):
        if source.is_dir():
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "train"))
        elif source.exists():
            shutil.copy(source, folder)
