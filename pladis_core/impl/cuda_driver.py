"""CUDA C++ at run time: NVRTC, CUDA's compiler, which torch ships, and the driver, which launches what that makes.
Neither a toolkit nor a compiler need be installed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch

WINDOWS = sys.platform == "win32"
DRIVERS = ("nvcuda.dll",) if WINDOWS else ("libcuda.so.1",)
POINTER = ctypes.sizeof(ctypes.c_void_p)
# CUDA_ERROR_INVALID_CONTEXT
NO_CONTEXT = 201
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LARGEST_SHARED_MEMORY = 8


class Functions:
    """The kernels of an image, loaded on a device.

    Args:
        image: what `compiled` gives.
        shared_bytes: of shared memory that every block gets at its launch.

    Raises:
        RuntimeError: the driver fails.
    """

    def __init__(self, device: torch.device, image: bytes, names: Sequence[str], shared_bytes: int = 0) -> None:
        self._driver, self._device, self._shared_bytes = _library(DRIVERS), device, shared_bytes
        self._functions = {}
        with torch.cuda.device(device):
            # the driver loads a module into the context that torch has made
            torch.cuda.current_stream().synchronize()
            module = ctypes.c_void_p()
            self._demand(self._driver.cuModuleLoadData(ctypes.byref(module), image))
            for name in names:
                function = ctypes.c_void_p()
                self._demand(self._driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
                if shared_bytes:
                    self._demand(self._driver.cuFuncSetAttribute(function, LARGEST_SHARED_MEMORY, shared_bytes))
                self._functions[name] = function

    def launch(self, name: str, blocks: int, threads: int, tensors, sizes: ctypes.Structure) -> None:
        """A kernel that takes the addresses of `tensors`, nothing for None, and `sizes` after them."""
        count = len(tensors)
        values = (ctypes.c_void_p * count)(*[None if t is None else t.data_ptr() for t in tensors])
        first = ctypes.addressof(values)
        addresses = (ctypes.c_void_p * (count + 1))(
            *range(first, first + POINTER * count, POINTER), ctypes.addressof(sizes)
        )
        if torch.cuda.current_device() == self._device.index:
            self._start(name, blocks, threads, addresses)
        else:
            with torch.cuda.device(self._device):
                self._start(name, blocks, threads, addresses)

    def _start(self, name: str, blocks: int, threads: int, addresses: ctypes.Array) -> None:
        stream = torch.cuda.current_stream(self._device)
        arguments = (
            self._functions[name], blocks, 1, 1, threads, 1, 1, self._shared_bytes,
            ctypes.c_void_p(stream.cuda_stream), addresses, None,
        )  # fmt: skip
        status = self._driver.cuLaunchKernel(*arguments)
        if status == NO_CONTEXT:
            # of a thread in which torch has not called CUDA yet
            stream.synchronize()
            status = self._driver.cuLaunchKernel(*arguments)
        self._demand(status)

    def _demand(self, status: int) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA error: {(text.value or b'unknown').decode()} ({status})")


def compiled(text: str, name: str, capability: tuple[int, int], options: Sequence[str] = ()) -> bytes:
    """Machine code for a compute capability. Needs no GPU.

    Args:
        text: CUDA C++, without includes.
        name: of the file, in messages.
        options: of NVRTC.

    Raises:
        RuntimeError: there is no NVRTC, it does not know the capability, or it finds an error.
    """
    nvrtc = _library(_compilers())
    flags = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--ftz=true", *options]
    program = ctypes.c_void_p()
    _nvrtc_demand(nvrtc, nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), name.encode(), 0, None, None
    ))  # fmt: skip
    try:
        status = nvrtc.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        )
        if status:
            log = _sized(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"NVRTC: {ctypes.create_string_buffer(log).value.decode(errors='replace') or status}")
        return _sized(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _sized(nvrtc: ctypes.CDLL, size_of, fill, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _nvrtc_demand(nvrtc, size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _nvrtc_demand(nvrtc, fill(program, buffer))
    return buffer.raw


def _nvrtc_demand(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def _compilers() -> tuple[str, ...]:
    """Where torch's NVRTC may be: in torch, in NVIDIA's packages beside it, or wherever the system looks."""
    torch_folder = Path(torch.__file__).parent
    pattern = "nvrtc64_*_0.dll" if WINDOWS else "libnvrtc.so.*"
    folders: Iterator[Path] = (folder for folder in (torch_folder / "lib", *torch_folder.parent.glob("nvidia/*/*")))
    found = [str(file) for folder in folders for file in sorted(folder.glob(pattern))]
    major = (torch.version.cuda or "").split(".")[0]
    named = [f"nvrtc64_{major}0_0.dll"] if WINDOWS else [f"libnvrtc.so.{major}", "libnvrtc.so"]
    return (*found, *named)


@lru_cache
def _library(names: tuple[str, ...]) -> ctypes.CDLL:
    """The first of these that can be loaded.

    Raises:
        RuntimeError: none can.
    """
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"no library {names[-1]} can be loaded")
