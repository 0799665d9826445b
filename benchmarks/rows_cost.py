"""What rows.cu, for NVIDIA GPUs without Triton, costs on GPUs that are not here: compiled offline by NVRTC, its machine
code counted. Predicted only.

Per row of the table: registers, bytes of stack, seconds to compile, instructions a score (the solver's loop weighted by
the steps that a warp of Gaussian scores takes); and for the problem three floors in microseconds: `issue`, of this
kernel, if every scheduler issued an instruction a cycle; `products`, of the two around it, by the tensor cores' peak;
and `memory`, if scores and weights went through memory, which they do not where they fit a cache. Needs a torch that
comes with CUDA, and Triton's tools.
"""

from __future__ import annotations

import argparse
import time

import torch

from pladis_core.impl import nvrtc

from .kernel_cost import DTYPES, GPUS, PROBLEMS, Gpu, nvidia_code, solver_steps, weighted

TURING = {"sm_75": Gpu("RTX 2080", "cuda", 75, 32, 46 * 4 * 1.71e9, 0.448e12, 85e12)}
SHAPES = ((77, 40), (77, 64), (77, 160), (154, 64), (300, 72), (512, 128), (1024, 64))
LINE = "{:<26} {:>4} {:>5} {:>7} {:>5} {:>9} {:>8} {:>8} {:>8}"


def cases() -> list[tuple[str, int, int, str, float, bool, bool]]:
    """target, keys, width, dtype, alpha, mask, mix"""
    rows = [(target, *shape, "fp16", 1.5, False, False) for target in ("sm_75", "sm_89", "sm_90") for shape in SHAPES]
    rows += [("sm_89", 77, 64, "fp16", alpha, False, False) for alpha in (2.0, 1.25, 1.02)]
    rows += [("sm_89", 77, 64, dtype, 1.5, False, False) for dtype in ("bf16", "fp32")]
    return rows + [("sm_89", 77, 64, "fp16", 1.5, *extra) for extra in ((True, False), (False, True), (True, True))]


def measure(target: str, keys: int, width: int, dtype: str, alpha: float, mask: bool, mix: bool) -> tuple:
    gpu, kind = (GPUS | TURING)[target], DTYPES[dtype]
    variant = nvrtc.Variant.of(keys, alpha, kind, mask, mix)
    start = time.process_time()
    cubin = nvrtc.compiled(variant, divmod(gpu.arch, 10))
    seconds = time.process_time() - start
    code, registers, stack = nvidia_code(cubin, "pladis_rows")
    settings = nvrtc.numbers(keys, width**-0.5, alpha, -1.0, 2.0, kind)
    rows_of_warp = 32 // variant.lanes
    steps = solver_steps(keys, alpha, rows_of_warp, settings["tolerance"], settings["steps"], 1.0)
    executed = weighted(code, steps, 1)
    heads, queries = PROBLEMS[keys, width]
    scores, size = heads * queries * keys, kind.itemsize
    # score out and in, weight out and in, product out and in, then query, key, value and output
    read = scores * (8 + 2 * size) + heads * queries * width * (8 + 2 * size) + 2 * heads * keys * width * size
    return (
        registers, stack, round(seconds, 1), round(steps, 1), round(executed * 32 / (keys * rows_of_warp), 1),
        round(heads * queries / rows_of_warp * executed / gpu.issues * 1e6, 1),
        round(4 * scores * width / gpu.flops * 1e6, 1), round(read / gpu.bytes_per_second * 1e6, 1),
    )  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"NVRTC of CUDA {torch.version.cuda}, predicted: nothing here ran on a GPU")
    print(LINE.format("row", "regs", "stack", "compile", "steps", "per_score", "issue", "products", "memory"))
    for target, keys, width, dtype, alpha, mask, mix in cases():
        extra = " mask" * mask + " mix" * mix
        name = f"{target} {keys}x{width} {dtype} {alpha:g}{extra}"
        print(LINE.format(name, *measure(target, keys, width, dtype, alpha, mask, mix)), flush=True)


if __name__ == "__main__":
    main()
