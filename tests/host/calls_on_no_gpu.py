"""Run by test_cpu_side.py in a process of its own: what a text attention costs the CPU with PLADIS, and what the host's
own does where there is an NVIDIA GPU. Triton's kernel is compiled for one that is not there; its driver only notes.
Prints, as JSON, how many functions each enters.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "core")]


def main() -> None:
    # the pack as pladis_pack, and the host
    for folder in (TESTS, TESTS / "host"):
        runpy.run_path(str(folder / "conftest.py"))
    os.environ.pop("TRITON_INTERPRET", None)
    import comfy.ops
    import triton.language as tl
    from comfy.ldm.modules import attention
    from function_calls import functions_called
    from launch_on_no_gpu import NoGpu
    from triton.runtime import driver

    from pladis_pack.nodes.hosting.batch import Batch, Prompt
    from pladis_pack.nodes.hosting.models.layers import Layer
    from pladis_pack.nodes.hosting.roads.unet import PladisHook
    from pladis_pack.nodes.hosting.running import ModelCall, running
    from pladis_pack.nodes.hosting.settings import Settings
    from pladis_pack.pladis_core import api
    from pladis_pack.pladis_core.impl import triton as backend

    use_what_a_gpu_gets(comfy.ops)
    driver.set_active(NoGpu())
    backend._target = lambda device: (90, 0)
    backend.LAUNCHES_COMPILED, backend.INTERPRETED = True, tl.constexpr(1)
    api._has_gpu_compiler = lambda device: True

    layer, prompts = Layer("attn2", "input", 4, 0), (Prompt("positive", 77), Prompt("negative", 77))
    block = SimpleNamespace(attn2=torch.nn.Identity())
    target = SimpleNamespace(found={layer: lambda: block})
    call = ModelCall(target, {layer: Settings(frozenset([layer]))}, Batch(2, 77, prompts), {}, {})
    hook = PladisHook(call.active[layer], call, layer, None)
    # as many elements as it takes to have the host choose among torch's kernels
    q, k, v = (torch.zeros(2, length, 128, dtype=torch.bfloat16) for length in (1024, 77, 77))
    options = {"n_heads": 2, "dim_head": 64, "cond_or_uncond": [0, 1]}

    def of_host():
        return attention.attention_pytorch(q, k, v, 2, attn_precision=None, transformer_options=options)

    with torch.inference_mode(), running(call):
        for _ in range(2):
            hook(q, k, v, options)
            of_host()
        assert layer in call.reached and api._trials[0]._ran
        print(json.dumps([functions_called(of_host), functions_called(lambda: hook(q, k, v, options))]))


def use_what_a_gpu_gets(ops) -> None:
    """comfy/ops.py chooses what calls torch's attention when it is imported."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    importlib.reload(ops)
    torch.cuda.is_available = available
    assert hasattr(ops, "SDPA_BACKEND_PRIORITY")


if __name__ == "__main__":
    main()
