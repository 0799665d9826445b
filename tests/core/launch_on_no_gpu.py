"""Run by test_launch.py in a process of its own: Triton compiles for a GPU that is not there, whose driver only notes
what it is told to launch. Prints, as JSON, what came of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))
from function_calls import functions_called  # noqa: E402

from pladis_core import api, pladis_attention  # noqa: E402
from pladis_core.impl import triton as backend  # noqa: E402

launches: list[tuple] = []


class Utils:
    @staticmethod
    def load_binary(*_):
        # module, function, registers, spills, and since 3.4 threads of a block
        return (None, 0, 0, 0, 1024)[: 4 if triton.__version__.startswith("3.3") else 5]

    @staticmethod
    def get_device_properties(_):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    def __init__(self, *_):
        pass

    def __call__(self, *args):
        # grid, then arguments behind stream, function, metadata and hooks
        launches.append((args[:3], args[9:]))


class NoGpu(DriverBase):
    launcher_cls, utils = Launcher, Utils()

    def __init__(self):
        pass

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_device_capability(self, _=0):
        return 9, 0

    def map_python_to_cpp_type(self, name):
        return name

    def get_benchmarker(self):
        raise NotImplementedError


def inputs(queries=64, heads=2, offset=0):
    """q, k, v as hosts have them: (1, L, H * D) seen as (1, H, L, D); `offset` elements behind an aligned address."""
    flat = (torch.zeros(length * heads * 64 + offset, dtype=torch.bfloat16)[offset:] for length in (queries, 77, 77))
    return [t.view(1, -1, heads, 64).transpose(1, 2) for t in flat]


def attend(query, key, value):
    return backend.attend(query, key, value, None, None, 0.125, 1.5, -1.0, 2.0, None, None)


def comparable(args: tuple) -> list:
    """Groups as lists, tensors by their addresses."""
    flat = [comparable(arg) if isinstance(arg, tuple) else arg for arg in args]
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in flat]


def main() -> None:
    driver.set_active(NoGpu())
    backend._target = lambda device: (90, 0)
    binder, calls = triton.JITFunction.run, []
    triton.JITFunction.run = lambda self, *args, **kwargs: (calls.append(1), binder(self, *args, **kwargs))[1]
    found: dict = {"calls": {}}
    first = inputs()
    attend(*first)
    attend(*first)
    (grid, args), (grid_again, args_again) = launches
    out, out_again = args[6][0], args_again[6][0]
    given, given_again = (comparable(all_args[:6] + all_args[7:]) for all_args in (args, args_again))
    found["same"] = grid == grid_again and given == given_again
    found["output"] = out.shape == out_again.shape and out.stride() == out_again.stride()
    for name, others in {
        "again": first, "new tensors": inputs(), "more queries": inputs(128), "more heads": inputs(heads=3),
        "misaligned": inputs(offset=1), "misaligned again": inputs(offset=1),
    }.items():  # fmt: skip
        calls.clear()
        attend(*others)
        found["calls"][name] = len(calls)
    direct = functions_called(lambda: attend(*first))
    backend.LAUNCHES_COMPILED = False
    backend.laid_out.cache_clear()
    attend(*first)
    found["functions called"] = direct, functions_called(lambda: attend(*first))
    # as on a GPU, with checks, choices and what stands by for a kernel that fails
    backend.LAUNCHES_COMPILED, backend.INTERPRETED = True, tl.constexpr(1)
    api._has_gpu_compiler = lambda device: True
    backend.laid_out.cache_clear()
    with torch.inference_mode():
        for _ in range(2):
            pladis_attention(*first)
        found["functions called"] += (functions_called(lambda: pladis_attention(*first)),)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
