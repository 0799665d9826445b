"""Runs inside ComfyUI's Python, on the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, os.environ["COMFYUI_PATH"])
arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402, F401

sys.argv = arguments

# demo/ is run from the repository's root, beside an installed pladis_core: here they are parts of the pack
import pladis_pack.pladis_core  # noqa: E402

sys.modules["pladis_core"] = pladis_pack.pladis_core

from comfy_server import Server  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One for all files that a process runs: to start it takes as long as most of them."""
    with Server(sys.executable, Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
