"""A backend's kernel where it works: what to do when it fails, and not to try again what failed."""

from __future__ import annotations

import logging
from functools import cached_property
from importlib import import_module

import torch

from .common import is_recorded

# of the environment: backends that are not tried
LEFT_OUT = "PLADIS_WITHOUT"
LOGGER = logging.getLogger(__name__)
OUT_OF_MEMORY = "out of memory"
# afterwards nothing runs on that device any more in this process, a slower kernel neither
BROKEN_CONTEXT = (
    "illegal memory access", "illegal address", "misaligned address", "illegal instruction", "launch failure",
    "device-side assert", "hardware exception", "memory access fault", "launch timed out", "unknown error",
    "invalid program counter", "hardware stack error", "operation not supported on global/shared address space",
)  # fmt: skip


def is_broken(error: Exception) -> bool:
    """Whether the device is beyond use."""
    return any(words in str(error).lower() for words in BROKEN_CONTEXT)


class Trials:
    """Devices, and problems on devices where the kernel has run before, on which it failed.

    Args:
        backend: a module here with `unusable` and `attend`, imported when it is first needed.
        name: what it is called in the log.
    """

    def __init__(self, backend: str, name: str) -> None:
        self.backend, self._name = backend, name
        self._ran: set[torch.device] = set()
        self._failed: set = set()

    @cached_property
    def _loaded(self):
        return import_module(f".{self.backend}", __package__)

    def attend(self, query, key, value, mask, mix_mask, scale, alpha, *rest) -> torch.Tensor | None:
        """The kernel's output; None where it cannot take the tensors, or failed at such a problem.

        Raises:
            torch.cuda.OutOfMemoryError: also after everything unused was given back.
            RuntimeError: the device is beyond use.
        """
        device = query.device
        problem = (
            device, query.dtype, key.shape[-2], query.shape[-1], value.shape[-1], alpha, mask is None, mix_mask is None
        )  # fmt: skip
        if device in self._failed or problem in self._failed:
            return None
        inputs = (query, key, value, mask, mix_mask, scale, alpha, *rest)
        try:
            if self._loaded.unusable(query, key, value) is not None:
                return None
            out = _with_memory(self._loaded.attend, inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # compilers, linkers, drivers and old releases fail each in a way of its own
            if is_broken(error):
                LOGGER.error(
                    "PLADIS: %s is beyond use (%s). If the kernel that %s compiles should be the cause, start with "
                    "%s=%s in the environment: same images.", device, error, self._name, LEFT_OUT, self.backend,
                )  # fmt: skip
                raise
            if is_recorded(device):
                # compiling and comparing are not for a CUDA graph; elsewhere the kernel may work
                raise
            # a device that runs it is not given up for one problem
            whole = device not in self._ran
            self._failed.add(device if whole else problem)
            LOGGER.warning(
                "PLADIS: %s fails on %s%s (%s: %s). From now on without its kernel there: same images, slower.",
                self._name, device,
                "" if whole else f" with {key.shape[-2]} keys of width {query.shape[-1]} in {query.dtype}",
                type(error).__name__, next(iter(str(error).splitlines()), ""),
            )  # fmt: skip
            return None
        if device not in self._ran:
            LOGGER.info("PLADIS: attention on %s runs in a kernel that %s compiles.", device, self._name)
            self._ran.add(device)
        return out


def _with_memory(attend, inputs) -> torch.Tensor:
    """attend(*inputs), once more after giving unused memory back where there was too little: a driver loads a kernel
    into what torch holds in its cache.
    """
    try:
        return attend(*inputs)
    except Exception as error:
        if not _says_out_of_memory(error):
            raise
    getattr(torch.get_device_module(inputs[0].device), "empty_cache", lambda: None)()
    try:
        return attend(*inputs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if not _says_out_of_memory(error):
            raise
        # by this type hosts know that they have to free memory
        raise torch.cuda.OutOfMemoryError(str(error)) from error


def _says_out_of_memory(error: Exception) -> bool:
    # Triton's OutOfResources is about a program's registers and shared memory, which no freeing enlarges
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        OUT_OF_MEMORY in str(error).lower() and "resource" not in type(error).__name__.lower()
    )
