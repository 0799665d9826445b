"""Compiles the kernels for GPUs that need not be there, and prints the shared memory of each as JSON."""

from __future__ import annotations

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pladis_core.impl import triton as backend

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# keys, head width, dtype, alpha, mask kind, mass
CASES = (
    ("cuda:80", 77, 40, torch.float16, 1.5, 0, False),
    ("cuda:80", 77, 160, torch.float16, 2.0, 1, False),
    ("cuda:80", 154, 64, torch.bfloat16, 1.25, 2, False),
    ("cuda:80", 512, 128, torch.bfloat16, 1.5, 0, True),
    ("cuda:80", 333, 88, torch.float16, 1.5, 0, False),
    ("cuda:80", 1024, 128, torch.bfloat16, 1.5, 2, True),
    ("cuda:80", 1024, 256, torch.bfloat16, 1.5, 0, False),
    ("cuda:80", 77, 64, torch.float32, 1.5, 0, False),
    ("cuda:80", 1024, 128, torch.float32, 1.02, 0, False),
    ("cuda:90", 77, 64, torch.bfloat16, 1.5, 0, False),
    ("cuda:90", 512, 128, torch.bfloat16, 2.0, 0, True),
    ("hip:gfx942", 77, 64, torch.bfloat16, 1.5, 0, False),
    ("hip:gfx942", 1024, 128, torch.bfloat16, 1.25, 2, True),
    ("hip:gfx1100", 77, 80, torch.float16, 1.5, 0, False),
)
POINTERS = {"Q", "K", "V", "Mask", "Mass", "Out"}
FLOATS = {"scale", "b", "dense", "sparse", "bound", "mask_min", "largest"}
# contiguous widths, as the host's tensors have them
ONES = {"stride_qd", "stride_kd", "stride_vd", "stride_mk"}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def shared_memory(target: str, keys: int, width: int, dtype: torch.dtype, alpha: float, mask: int, mass: bool) -> int:
    config = backend.configuration(4096, keys, width, dtype)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    resident = backend.is_resident(keys, dtype)
    kernel = backend._resident_kernel if resident else backend._streaming_kernel
    constants = {
        **dict.fromkeys(ONES, 1), "D": width, "DV": width, "ALPHA": alpha if alpha in (1.5, 2.0) else 0,
        "SMALL": alpha - 1.0 < backend.SMALL_B, "STEPS": backend.newton_steps(keys, alpha, dtype), "MASK": mask,
        "MASS": mass, **config,
    }  # fmt: skip
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = f"*{'i1' if name == 'Mask' and mask == 1 else TYPES[dtype]}"
        signature[name] = pointer if name in POINTERS else "fp32" if name in FLOATS else "i32"
        if name in POINTERS or name.startswith("stride"):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options).metadata.shared


print(json.dumps([{"target": case[0], "case": str(case[1:]), "shared": shared_memory(*case)} for case in CASES]))
