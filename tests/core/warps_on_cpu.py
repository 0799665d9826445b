"""Kernels in CUDA C++ on a CPU: compiled by g++, every thread of a block a fiber (warps_on_cpu.cpp)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SHIM = Path(__file__).with_name("warps_on_cpu.cpp")


def gcc_version() -> int:
    if shutil.which("g++") is None:
        return 0
    return int(subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0])


needs_gcc = pytest.mark.skipif(gcc_version() < 12, reason="needs g++ 12, for float16")


def built(folder: Path, name: str, definitions: str, *texts: str) -> ctypes.CDLL:
    """The definitions, what CUDA gives, and `texts`, compiled and loaded."""
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text("".join((definitions, SHIM.read_text(), *texts)))
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


def run(function, blocks: int, tensors, sizes: ctypes.Structure) -> None:
    """A loop over blocks that takes the addresses of `tensors` and `sizes`."""
    addresses = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors)
    function.restype = ctypes.c_bool
    assert function(blocks, *addresses, sizes), "threads wait for each other in vain"


@pytest.fixture(autouse=True)
def nothing_in_new_tensors():
    """torch.empty gives NaN, so that whatever is not written shows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
