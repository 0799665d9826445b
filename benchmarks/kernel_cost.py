"""What the fused kernel costs on GPUs that are not here: compiled offline, its machine code counted. Predicted only.

Per row of the table: registers, spilled bytes, shared memory, instructions a score (the solver's loop weighted by the
steps that Gaussian scores take), seconds to compile, and for the row's problem two floors in microseconds: `issue`, if
every scheduler issued an instruction a cycle, and `memory`, to read query, key, value and write the output once, or to
multiply them, whichever is longer. `L2` is what the programs read of key and value together, which no floor contains.
Needs Triton; without TRITON_INTERPRET. NVIDIA code is counted by the tools that come with Triton.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

# recorded by --record; a row that is worse by more than these fails --check and the test
RECORD = Path(__file__).with_name("kernel_cost.json")
MORE_INSTRUCTIONS = 1.03
COMPILE_SECONDS = 10.0
# rows of Gaussian scores, a thousand tiles or fewer, from which the mean of the steps of a tile is taken
SAMPLE_ROWS = 4096


@dataclass(frozen=True)
class Gpu:
    """A product with the target's code: its published peak rates. `issues` are instructions of a warp a second."""

    name: str
    backend: str
    arch: int | str
    warp: int
    issues: float
    bytes_per_second: float
    flops: float


GPUS = {
    "sm_80": Gpu("A100", "cuda", 80, 32, 108 * 4 * 1.41e9, 2.0e12, 312e12),
    "sm_89": Gpu("RTX 4090", "cuda", 89, 32, 128 * 4 * 2.52e9, 1.01e12, 165e12),
    "sm_90": Gpu("H100", "cuda", 90, 32, 132 * 4 * 1.755e9, 3.35e12, 989e12),
    "sm_120": Gpu("RTX 5090", "cuda", 120, 32, 170 * 4 * 2.41e9, 1.79e12, 209e12),
    # a wave of 64 takes a unit of 16 lanes four cycles
    "gfx942": Gpu("MI300X", "hip", "gfx942", 64, 304 * 4 * 2.1e9 / 4, 5.3e12, 1307e12),
    "gfx1100": Gpu("RX 7900 XTX", "hip", "gfx1100", 32, 96 * 2 * 2.5e9, 0.96e12, 122e12),
    "gfx1201": Gpu("RX 9070 XT", "hip", "gfx1201", 32, 64 * 2 * 2.97e9, 0.64e12, 195e12),
}
# keys, width: heads of all batches, queries
PROBLEMS = {
    (77, 40): (16, 4096),
    (77, 64): (20, 4096),
    (77, 80): (16, 1024),
    (77, 160): (16, 256),
    (154, 64): (20, 4096),
    (231, 64): (20, 4096),
    (256, 128): (24, 4096),
    (300, 72): (32, 4096),
    (333, 88): (32, 4096),
    (512, 128): (24, 4096),
    (512, 256): (10, 4096),
    (1000, 128): (24, 4096),
    (1024, 64): (32, 8192),
    (1024, 128): (24, 4096),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MATRIX = re.compile(r"HMMA|HGMMA|UTCHMMA|v_mfma|v_wmma|v_smfma")


@dataclass(frozen=True)
class Case:
    target: str
    keys: int
    width: int
    dtype: str = "bf16"
    alpha: float = 1.5
    mask: str = "none"  # none, bool or add
    mass: int = 0  # 0 none, 1 given, 2 from a log-sum-exp
    mix: bool = False

    def __str__(self) -> str:
        extra = "".join(f" {name}" for name, there in ((self.mask, self.mask != "none"), ("mix", self.mix)) if there)
        return f"{self.target} {self.keys}x{self.width} {self.dtype} {self.alpha:g}{extra}" + " mass" * bool(self.mass)


@dataclass(frozen=True)
class Row:
    case: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    static_instructions: int
    steps: float
    per_score: float
    compile_seconds: float
    issue_us: float
    memory_us: float
    l2_megabytes: float


def cases() -> list[Case]:
    """Every shape of the table at alpha 1.5 on every target, and the variants on sm_90."""
    from pladis_core.impl.triton import spills_on_amd

    rows = [
        Case(name, *shape)
        for name, gpu in GPUS.items()
        for shape in PROBLEMS
        if gpu.backend == "cuda" or not spills_on_amd(*shape, torch.bfloat16, gpu.warp)
    ]
    shapes = ((77, 64), (512, 128), (1024, 128))
    rows += [Case("sm_90", *shape, alpha=alpha) for shape in shapes for alpha in (2.0, 1.25, 1.75)]
    rows += [Case("sm_90", 77, 64, alpha=1.02), Case("sm_90", 1024, 64, alpha=2.0), Case("sm_90", 77, 64, "fp16")]
    rows += [Case(target, 77, 64, "fp32") for target in ("sm_80", "sm_90", "gfx1100")]
    rows += [Case(target, 256, 128, "fp32") for target in ("sm_80", "sm_90")]
    rows += [Case("sm_90", *shape, "fp32", alpha=2.0) for shape in ((77, 64), (256, 128))]
    rows += [Case("sm_90", 77, 64, mask=mask) for mask in ("bool", "add")]
    rows += [Case("sm_90", 1024, 128, mask="bool"), Case("sm_90", 77, 64, mix=True)]
    return rows + [Case("sm_90", *shape, **extra) for shape in shapes[1:] for extra in ({"mass": 2}, {"mix": True})]


def compiled(case: Case):
    """The kernel that `pladis_core` would launch, compiled anew, its plan and the processor's seconds."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUS[case.target]
    source, plan = read(case)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        # of this process and of the assembler that it starts
        before = os.times()
        result = triton.compile(source, target=GPUTarget(gpu.backend, gpu.arch, gpu.warp), options=dict(plan.options))
        after = os.times()
    seconds = sum(
        getattr(after, f) - getattr(before, f) for f in ("user", "system", "children_user", "children_system")
    )
    return result, plan, seconds


def read(case: Case):
    """What Triton compiles for it, and the plan."""
    from triton.compiler import ASTSource

    from pladis_core.impl import triton as backend

    if backend.INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET is set: Triton compiles nothing in its interpreter")
    gpu = GPUS[case.target]
    dtype = DTYPES[case.dtype]
    mask = {"none": None, "bool": torch.bool, "add": dtype}[case.mask]
    plan = backend.plan(
        PROBLEMS.get((case.keys, case.width), (1, 4096))[1], case.keys, case.width, case.width, dtype,
        case.width**-0.5, case.alpha, -2.0 if case.mass else -1.0, 2.0, mask, case.mix, case.mass,
        gpu.arch if gpu.backend == "cuda" else 0, gpu.warp if gpu.backend == "hip" else 0, False, True,
    )  # fmt: skip
    kinds = {"Mix": "i1", "Mask": "i1" if case.mask == "bool" else case.dtype}
    head = "i32" if case.width % 16 else "i32:16"
    types: dict[str, tuple] = {
        # widths are contiguous and every query head has its key head, as in the host's models
        name: backend.Tensor(f"*{kinds.get(name, case.dtype)}:16", "i32:16", head, "i32:16", "1")
        for name in ("Q", "K", "V", "Mask", "Mix", "Mass", "Out")
    }
    types |= {"sizes": backend.Sizes("i32", "i32", "1"), "scale": backend.Scale(*["fp32"] * 4)}
    types |= {"solver": backend.Solver("i32", "i32", *["fp32"] * 5), "weights": backend.Weights(*["fp32"] * 4)}
    types |= zip(("HOW", "TILE"), plan.constants, strict=True)
    return ASTSource(plan.kernel, *specialised(types)), plan


def specialised(types: Mapping[str, tuple]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of arguments in groups, as Triton makes them of a call. "i32:16" is a
    multiple of 16; "1" an integer that is 1, which becomes a constant.
    """
    signature, constants, attributes = {}, {}, {}
    for place, (name, group) in enumerate(types.items()):
        found = []
        for member, kind in enumerate(group):
            if not isinstance(kind, str) or kind == "1":
                constants[place, member] = 1 if kind == "1" else kind.value
                kind = "constexpr"
            kind, _, factor = kind.partition(":")
            if factor:
                attributes[place, member] = [["tt.divisibility", int(factor)]]
            found.append(kind)
        signature[name] = type(group)(*found)
    return signature, constants, attributes


def measure(case: Case, sigma: float = 1.0) -> Row:
    result, plan, seconds = compiled(case)
    gpu, tile = GPUS[case.target], plan.tile
    tiles = -(-case.keys // tile.BLOCK_K)
    resident = tile.N > 0
    steps = solver_steps(
        case.keys, case.alpha, tile.BLOCK_Q, plan.solver.tolerance, plan.solver.steps, sigma,
        0 if resident else tile.BLOCK_K, "norm" if plan.constants[0].NORM.value else "step",
    )  # fmt: skip
    if gpu.backend == "cuda":
        code, registers, spilled = nvidia_code(result.asm["cubin"])
    else:
        code, registers, spilled = amd_code(result.asm["amdgcn"])
    inner = -(-case.width // tile.BLOCK_D) if resident else tiles
    # the resident kernel's first step stands before its loops: one that does not ask whether it is done, one that does
    least = plan.solver.least
    executed = weighted(code, (least, steps - 1 - least) if resident else (steps,), inner)
    warps = result.metadata.num_warps
    scores = tile.BLOCK_Q * tiles * tile.BLOCK_K / warps / gpu.warp
    heads, queries = PROBLEMS[case.keys, case.width]
    programs = heads * -(-queries // tile.BLOCK_Q)
    size = DTYPES[case.dtype].itemsize
    read = 2 * heads * (queries + case.keys) * case.width * size
    flops = 4 * heads * queries * case.keys * case.width
    return Row(
        str(case), registers, spilled, result.metadata.shared, len(code), round(steps, 2), round(executed / scores, 1),
        round(seconds, 1), round(programs * warps * executed / gpu.issues * 1e6, 1),
        round(max(read / gpu.bytes_per_second, flops / gpu.flops) * 1e6, 1),
        round(programs * 2 * case.keys * case.width * size / 1e6, 1),
    )  # fmt: skip


@lru_cache
def solver_steps(
    keys: int, alpha: float, block_q: int, tolerance: float, most: int, sigma: float, block_k: int = 0,
    of: str = "step",
) -> float:
    """Steps of the kernel's solver until the slowest row of a tile is done: the mean over tiles of Gaussian scores.

    block_k: of the streaming form, whose start is what its first pass makes of tiles of so many keys. of: as in
    `resident_steps`.
    """
    scores = gaussian_scores(keys, sigma)
    if block_k:
        taken = streaming_steps(scores, alpha, block_q, tolerance, most, block_k, of)
    else:
        taken, _ = resident_steps(scores, alpha, block_q, tolerance, most, of=of)
    return float(taken.float().mean())


def gaussian_scores(keys: int, sigma: float) -> torch.Tensor:
    """(SAMPLE_ROWS, keys), always the same."""
    return torch.randn(SAMPLE_ROWS, keys, generator=torch.Generator().manual_seed(0)) * sigma


def resident_steps(
    scores: torch.Tensor, alpha: float, block_q: int, tolerance: float, most: int, u: torch.Tensor | None = None,
    of: str = "step",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(tiles,) of scores (rows, keys): steps that the resident form takes, as `impl/triton_kernel.py` has it; and
    (rows, 1), where they lead.

    u: (rows, 1), from where. of: what the tolerance is of, a `step`, or what the p-`norm` is beside 1, or, as in
    fused.cu, the `sum`.
    """
    b = alpha - 1.0
    scores = scores - scores.amax(1, keepdim=True)
    u = torch.zeros(len(scores), 1) if u is None else u
    tiles = len(scores) // block_q
    taken = torch.full((tiles,), most)
    goes_on = torch.ones(tiles, 1, 1, dtype=torch.bool)
    for done in range(1, most + 1):
        total, slope = _sums(scores, u, b)
        step = -torch.expm1(-b * total.log()) * total / (b * slope)
        u = u + (step.clamp(min=0.0).view(tiles, block_q, 1) * goes_on).view_as(u)
        far = step if of == "step" else ((total if of == "sum" else total**b) - 1.0).abs()
        ends = goes_on & (far.view(tiles, block_q, 1).amax(1, keepdim=True) <= tolerance)
        taken[ends.view(tiles)] = done
        goes_on &= ~ends
        if not goes_on.any():
            break
    return taken, u


def streaming_steps(
    scores: torch.Tensor, alpha: float, block_q: int, tolerance: float, most: int, block_k: int, of: str
) -> torch.Tensor:
    """The same of the streaming form: `_started` and the loop of `streaming_kernel`, whose steps by `norm` are bent."""
    b = alpha - 1.0
    u = torch.zeros(len(scores), 1)
    fall, peak = torch.ones_like(u), torch.full_like(u, -1e30)
    for tile in scores.split(block_k, 1):
        higher = torch.maximum(peak, tile.amax(1, keepdim=True))
        u -= higher - peak
        near = (1.0 - 0.25 * fall * (-u).clamp(min=0.0)).clamp(min=0.0)
        u, peak = u.clamp(min=0.0), higher
        total, slope = _sums(tile - peak, u, b)
        total, slope = total + near**4, slope + near**3 * fall
        root = total ** (-0.5 * b)
        u += 2.0 / b * total / slope * (1.0 - root)
        fall = slope / (total * root)
    farthest = -math.expm1(-b * math.log(scores.shape[1])) / b
    u = u.clamp(max=farthest)
    norm, pace, step = u + 1e30, u * 0.0, u * 0.0
    left = torch.ones(len(scores) // block_q, dtype=torch.bool)
    taken = torch.zeros(len(left), dtype=torch.long)
    for done in range(most):
        total, slope = _sums(scores - peak, u, b)
        norm_before, pace_before, norm = norm, pace, total**b
        pace = total / (norm * b * slope)
        last, over = step, norm - 1.0
        step = over * pace
        if of == "norm":
            apart = norm - norm_before
            apart = torch.where(apart.abs() > 1e-6, apart, 1e30)
            bend = 0.5 * over**2 * (pace_before - pace) / apart
            between = torch.where(over.abs() > tolerance, 0.5 * (step - last * over / apart), step)
            step = step + bend.maximum(-0.5 * step.abs()).minimum(step.abs())
            step = torch.where(over * last < 0.0, between, step)
        elif done:
            step = step.clamp(min=-1.2e-7)
        step = step.maximum(-u).minimum(farthest - u)
        far = over.maximum(-over * scores.shape[1] ** b) if of == "norm" else step.maximum(-3.0 * step)
        u = u + step
        taken += left
        left &= (far > tolerance).view(-1, block_q).any(1)
        if not left.any():
            break
    return taken


def _sums(scores: torch.Tensor, u: torch.Tensor, b: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 1): of r^p and of r^(p - 1)."""
    r = (1.0 + b * (scores - u)).clamp(0.0, 1.0)
    slopes = (r > 0).float() if b == 1.0 else r ** (1.0 / b - 1.0)
    return (r * slopes).sum(1, keepdim=True), slopes.sum(1, keepdim=True)


Code = list[tuple[int, str, "int | None"]]


def nvidia_code(cubin: bytes, kernel: str = "") -> tuple[Code, int, int]:
    """Instructions as (address, text, address of the branch), registers a thread, bytes of its stack; of the kernel of
    that name, where there are several."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", "-res-usage", *(["-fun", kernel] if kernel else []), file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text.stdout)
    code = [(int(address, 16), line, _target(line)) for address, line in found]
    # what follows the end is for warps that diverge, which these do not
    end = max(place for place, (_, line, _) in enumerate(code) if "EXIT" in line)
    usage = re.search(rf"{kernel}:?\s+REG:(\d+) STACK:(\d+)", text.stdout)
    return code[: end + 1], int(usage[1]), int(usage[2])


def _target(line: str) -> int | None:
    branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
    return int(branch[1], 16) if branch else None


def amd_code(assembly: str) -> tuple[Code, int, int]:
    """The same of the text that the assembler reads; waits and hints are no instructions."""
    labels, code = {}, []
    for line in assembly[: assembly.index("s_endpgm")].splitlines():
        text = line.split(";")[0].strip()
        label = re.match(r"(\.LBB\w+):", text)
        if label:
            labels[label[1]] = len(code)
        elif re.match(r"(v|s|ds|global|buffer|scratch|flat)_", text) and not re.match(
            r"s_(wait|nop|clause|delay)", text
        ):
            code.append(text)
    goal = [re.match(r"s_c?branch\w*\s+(\.LBB\w+)", text) for text in code]
    found = [
        (place, text, labels.get(to[1]) if to else None)
        for place, (text, to) in enumerate(zip(code, goal, strict=True))
    ]
    count = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return found, count["vgpr_count"], count["private_segment_fixed_size"]


def weighted(code: Code, steps: Sequence[float], inner: int) -> float:
    """Instructions that a warp executes. A loop that multiplies matrices, and holds no other, runs `inner` times (over
    slices of the width, or tiles of keys); the others, in their order, as often as `steps` says.
    """
    ends: dict[int, int] = {}
    for address, _, goal in code:
        if goal is not None and goal < address:
            # of several ways back to the head of a loop the last one ends it
            ends[goal] = address
    loops = sorted(ends.items())
    weights = dict.fromkeys((address for address, _, _ in code), 1.0)
    of_solver = iter(steps)
    for first, last in loops:
        leaf = not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        multiplies = any(MATRIX.search(text) for address, text, _ in code if first <= address <= last)
        times = inner if leaf and multiplies else next(of_solver, steps[-1])
        for address in weights:
            if first <= address <= last:
                weights[address] *= times
    return sum(weights.values())


def line(row: Row) -> str:
    return (
        f"{row.case:<28} {row.registers:>4} {row.spilled_bytes:>7} {row.shared_bytes:>7} {row.static_instructions:>7} "
        f"{row.steps:>5} {row.per_score:>9} {row.compile_seconds:>8} {row.issue_us:>9} {row.memory_us:>9} "
        f"{row.l2_megabytes:>8}"
    )


def worse(row: Row, recorded: dict) -> str | None:
    """What is worse than recorded; None where nothing is."""
    if row.spilled_bytes > recorded["spilled_bytes"]:
        return f"{row.case}: {row.spilled_bytes} B spilled, {recorded['spilled_bytes']} recorded"
    if row.per_score > recorded["per_score"] * MORE_INSTRUCTIONS:
        return f"{row.case}: {row.per_score} instructions a score, {recorded['per_score']} recorded"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name begins so, e.g. 'sm_90 77x64'")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the scores (default: 1)")
    parser.add_argument("--check", action="store_true", help="fail where a row is worse than recorded")
    parser.add_argument("--record", action="store_true", help=f"write the rows to {RECORD.name}")
    args = parser.parse_args()
    import triton

    print(f"Triton {triton.__version__}, predicted: nothing here ran on a GPU")
    print(f"{'row':<28} regs spilled  shared  static steps per_score compile issue_us memory_us    L2_MB")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["rows"] if args.check else {}
    rows, problems = [], []
    for case in cases():
        if str(case).startswith(tuple(args.only)):
            rows.append(measure(case, args.sigma))
            print(line(rows[-1]), flush=True)
            if args.check and (problem := worse(rows[-1], recorded[str(case)])):
                problems.append(problem)
    document = {"triton": triton.__version__, "sigma": args.sigma, "rows": {row.case: asdict(row) for row in rows}}
    for path in ([args.json] if args.json else []) + ([RECORD] if args.record else []):
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
