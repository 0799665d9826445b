"""What rows.cu and fused.cu, for NVIDIA GPUs without Triton, cost on GPUs that are not here: compiled offline by NVRTC,
their machine code counted. Predicted only.

Per row of the table: registers, bytes of stack, seconds to compile, instructions a score (the solver's loop weighted by
the steps that a tile of Gaussian scores takes); and for the problem three floors in microseconds: `issue`, if every
scheduler issued an instruction a cycle; `products`, of the two with keys and values, by the tensor cores' peak; and
`memory`: query, key, value and output once, and for rows.cu scores and weights through memory, which they do not where
they fit a cache. fused.cu is counted from a tile to the next, the path for scores beyond the usual included. Needs a
torch that comes with CUDA, and Triton's tools.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pladis_core.impl import cuda, nvrtc

from .kernel_cost import (
    DTYPES,
    GPUS,
    MORE_INSTRUCTIONS,
    PROBLEMS,
    Code,
    Gpu,
    gaussian_scores,
    nvidia_code,
    resident_steps,
    solver_steps,
    weighted,
)

# recorded by --record, of fused.cu; a row that is worse fails --check and the test
RECORD = Path(__file__).with_name("nvrtc_cost.json")
TURING = {"sm_75": Gpu("RTX 2080", "cuda", 75, 32, 46 * 4 * 1.71e9, 0.448e12, 85e12)}
SHAPES = ((77, 40), (77, 64), (77, 160), (154, 64), (300, 72), (512, 128), (1024, 64))
LINE = "{:<34} {:>4} {:>5} {:>7} {:>5} {:>9} {:>8} {:>8} {:>8}"


@dataclass(frozen=True)
class Case:
    kernel: str  # fused or rows
    target: str
    keys: int
    width: int
    dtype: str = "fp16"
    alpha: float = 1.5
    mask: bool = False
    mix: bool = False

    def __str__(self) -> str:
        extra = " mask" * self.mask + " mix" * self.mix
        return f"{self.kernel} {self.target} {self.keys}x{self.width} {self.dtype} {self.alpha:g}{extra}"


@dataclass(frozen=True)
class Row:
    registers: int
    stack_bytes: int
    compile_seconds: float
    steps: float
    per_score: float
    issue_us: float
    products_us: float
    memory_us: float


def cases() -> Iterator[Case]:
    for kernel in ("fused", "rows"):
        for target in ("sm_75", "sm_89", "sm_90", *(("sm_80", "sm_120") if kernel == "fused" else ())):
            for shape in SHAPES:
                yield Case(kernel, target, *shape)
        for alpha in (2.0, 1.25, 1.02):
            yield Case(kernel, "sm_89", 77, 64, alpha=alpha)
        for extra in ({"mask": True}, {"mix": True}, {"mask": True, "mix": True}, {"dtype": "bf16"}):
            yield Case(kernel, "sm_89", 77, 64, **extra)
    yield Case("rows", "sm_89", 77, 64, "fp32")
    for shape in ((77, 64), (512, 128)):
        for alpha in (1.5, 2.0, 1.25, 1.75):
            yield Case("fused", "sm_90", *shape, "bf16", alpha)


def measure(case: Case) -> Row:
    gpu, kind = (GPUS | TURING)[case.target], DTYPES[case.dtype]
    start = time.process_time()
    count = fused if case.kernel == "fused" else rows
    registers, stack, steps, executed, rows_of_warp, keys_of_warp = count(case, divmod(gpu.arch, 10), kind)
    seconds = time.process_time() - start
    heads, queries = PROBLEMS[case.keys, case.width]
    scores, size = heads * queries * case.keys, kind.itemsize
    warps = heads * queries / rows_of_warp * case.keys / keys_of_warp
    read = 2 * heads * (queries + case.keys) * case.width * size
    if case.kernel == "rows":
        # score out and in, weight out and in, product out and in
        read += scores * (8 + 2 * size) + heads * queries * case.width * 8
    return Row(
        registers, stack, round(seconds, 1), round(steps, 1), round(executed * 32 / (keys_of_warp * rows_of_warp), 1),
        round(warps * executed / gpu.issues * 1e6, 1), round(4 * scores * case.width / gpu.flops * 1e6, 1),
        round(read / gpu.bytes_per_second * 1e6, 1),
    )  # fmt: skip


def fused(case: Case, capability: tuple[int, int], dtype: torch.dtype) -> tuple[int, int, float, float, int, float]:
    """registers, stack, steps, instructions of a warp, and its rows and keys."""
    variant = fused_variant(case, dtype)
    code, registers, stack = nvidia_code(cuda.compiled(variant, capability), cuda.KERNEL)
    tile = of_a_tile(code)
    in_halves, steps = fused_steps(case, dtype, any("HFMA2.SAT" in text for _, text, _ in tile))
    # the loop over tiles, within it the solver's: that in half precision ends in a product of matrices
    executed = weighted(tile, (1, steps), in_halves)
    return registers, stack, in_halves + steps, executed, cuda.ROWS, case.keys / variant.share


def fused_steps(case: Case, dtype: torch.dtype, has_halves: bool) -> tuple[float, float]:
    """Mean steps in half precision, whose rounding is left out here, and in float32, for a tile of Gaussian scores."""
    scores, most, u = gaussian_scores(case.keys, 1.0), cuda.solver_steps(case.keys, case.alpha, dtype), None
    last, in_halves = cuda.tolerance(case.alpha, dtype), torch.zeros(1)
    if has_halves:
        in_halves, u = resident_steps(scores, case.alpha, cuda.ROWS, last**0.5, most, of="sum")
    steps, _ = resident_steps(scores, case.alpha, cuda.ROWS, last, most, u, of="sum")
    return float(in_halves.float().mean()), float(steps.float().mean())


def fused_variant(case: Case, dtype: torch.dtype) -> cuda.Variant:
    shape = torch.Size((1, 1, 4096, case.width)), torch.Size((1, 1, case.keys, case.width))
    return cuda.variant_of(
        *shape, dtype, case.width**-0.5, case.alpha, -1.0, 2.0, mask=case.mask, mix=case.mix, mass=0
    )


def of_a_tile(code: Code) -> Code:
    """Without what comes before the loop over tiles, where there is one."""
    loops = [(goal, address) for address, _, goal in code if goal is not None and goal < address]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    if not any("HMMA" in text for address, text, _ in code if first <= address <= last):
        return code
    return [line for line in code if first <= line[0] <= last]


def rows(case: Case, capability: tuple[int, int], dtype: torch.dtype) -> tuple[int, int, float, float, int, float]:
    """As `fused`."""
    variant = nvrtc.Variant.of(case.keys, case.alpha, dtype, case.mask, case.mix)
    code, registers, stack = nvidia_code(nvrtc.compiled(variant, capability), "pladis_rows")
    settings = nvrtc.numbers(case.keys, case.width**-0.5, case.alpha, -1.0, 2.0, dtype)
    rows_of_warp = 32 // variant.lanes
    steps = solver_steps(case.keys, case.alpha, rows_of_warp, settings["tolerance"], settings["steps"], 1.0)
    return registers, stack, steps, weighted(code, steps=(steps,), inner=1), rows_of_warp, case.keys


def worse(row: Row, recorded: dict) -> str | None:
    """What is worse than recorded; None where nothing is."""
    if row.stack_bytes > recorded["stack_bytes"]:
        return f"{row.stack_bytes} bytes of stack, {recorded['stack_bytes']} recorded"
    if row.per_score > recorded["per_score"] * MORE_INSTRUCTIONS:
        return f"{row.per_score} instructions a score, {recorded['per_score']} recorded"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name begins so, e.g. 'fused sm_90 77x64'")
    parser.add_argument("--check", action="store_true", help="fail where a row of fused.cu is worse than recorded")
    parser.add_argument("--record", action="store_true", help=f"write the rows of fused.cu to {RECORD.name}")
    args = parser.parse_args()
    print(f"NVRTC of CUDA {torch.version.cuda}, predicted: nothing here ran on a GPU")
    print(LINE.format("row", "regs", "stack", "compile", "steps", "per_score", "issue", "products", "memory"))
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if args.check else {}
    found, problems = {}, []
    for case in cases():
        if not str(case).startswith(tuple(args.only)):
            continue
        row = measure(case)
        print(LINE.format(str(case), *asdict(row).values()), flush=True)
        if case.kernel == "fused":
            found[str(case)] = row
            if args.check and (problem := worse(row, recorded[str(case)])):
                problems.append(f"{case}: {problem}")
    if args.record:
        document = {"cuda": torch.version.cuda, "rows": {name: asdict(row) for name, row in found.items()}}
        RECORD.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
