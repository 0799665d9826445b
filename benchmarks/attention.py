"""Time and memory of PLADIS attention against torch's softmax attention, the named baseline of every ratio; on a CPU,
or roughly on a GPU, whose kernels are shorter than the Python that starts them: `benchmarks/gpu.py` times these.

Candidates: our fused kernel (`triton`, where it runs), `eager` (on a CPU with GCC the loop in C++, else as the next),
`portable` PyTorch, the `reference` on the `entmax` package (exact at alpha 1.5 and 2), the same formula on the
package's `bisection`, and on `adasplash`'s row kernel where that is installed. `no start` is the fastest of ours with
the first token left out of the mix. All run in turns, so that a busy machine slows all of them; ratios are taken within
a turn. Needs `pip install -e ".[demo]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn.functional import scaled_dot_product_attention

from pladis_core import pladis_attention

# heads, queries, keys, head width of the largest text attentions
SHAPES = {
    "SD1.5 64x64": (8, 4096, 77, 40),
    "SDXL 64x64": (10, 4096, 77, 64),
    "SDXL 32x32": (20, 1024, 77, 64),
    "PixArt 1024": (16, 4096, 300, 72),
    "Wan 480p": (12, 8190, 512, 128),
    "Flux text": (24, 4096, 512, 128),
}
ALPHAS = (1.5, 2.0, 1.25, 1.75)
SAMPLE_SECONDS = 0.02
MIB = 2**20

Work = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One candidate on one shape at one alpha. Ratios are (first quartile, median, third quartile); peak_bytes leaves
    out inputs and output; bandwidth_limit_ms is the time to read query, key and value and to write the output once.
    """

    shape: str
    alpha: float
    candidate: str
    ms: float
    to_sdpa: tuple[float, float, float]
    peak_bytes: int
    bandwidth_limit_ms: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the machine and the rows to this file")
    parser.add_argument("--repeats", type=int, default=7, help="turns per row (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="default: all")
    parser.add_argument("--batch", type=int, default=1, help="2 is a CFG step (default: %(default)s)")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles are printed")
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    machine = describe(device, dtype)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"batch {args.batch}; time: median [quartiles] of {args.repeats} turns; peak: beyond inputs and output\n")
    header = ("shape", "alpha", "candidate", "ms", "time / sdpa", "peak MiB", "limit ms")
    print("{:<12} {:>5} {:<10} {:>9}  {:<24} {:>8} {:>9}".format(*header))
    rows = []
    for row in measure(args.shapes, args.batch, device, dtype, args.repeats):
        rows.append(row)
        print(line(row), flush=True)
    if args.json:
        document = {"machine": machine, "batch": args.batch, "repeats": args.repeats, "rows": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def candidates(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alpha: float) -> dict[str, Work]:
    """Every way to compute PLADIS that runs here, and `sdpa`."""
    works = {"sdpa": lambda: scaled_dot_product_attention(query, key, value)}
    backends = ["eager", "portable", "reference"]
    if find_spec("triton") is not None and query.device.type in ("cuda", "xpu"):
        backends.insert(0, "triton")
    for name in backends:
        works[name] = lambda name=name: pladis_attention(query, key, value, alpha=alpha, backend=name)
    # all keys but the first are mixed, as Apply PLADIS does without start token
    mixed = torch.arange(key.shape[2], device=key.device)[None] > 0
    works["no start"] = lambda: pladis_attention(query, key, value, alpha=alpha, mix_mask=mixed)
    row_kernels = {}
    from entmax import entmax_bisect

    row_kernels["bisection"] = lambda scores: entmax_bisect(scores, alpha, -1)
    if find_spec("adasplash") is not None:
        from adasplash import triton_entmax

        row_kernels["adasplash"] = lambda scores: triton_entmax(scores, alpha)
    for name, sparse in row_kernels.items():
        works[name] = lambda sparse=sparse: formula(query, key, value, sparse)
    return works


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sparse: Callable) -> torch.Tensor:
    """PLADIS at lambda 2 on a whole map of scores, as implementations without a fused kernel write it."""
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
    return (2.0 * sparse(scores) - scores.softmax(-1)).to(value.dtype) @ value


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": f"{device.type} ({name})",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        # above the idle level something else runs: do not trust the times of such a run
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
    }


def processor() -> str:
    """The processor's name. Python's own answer on Linux is only its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(
    shapes: list[str], batch: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    rate = bandwidth(device)
    for shape in shapes:
        heads, queries, keys, width = SHAPES[shape]
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(batch, heads, n, width, generator=generator).to(device, dtype) for n in (queries, keys, keys)
        )
        limit = None if rate is None else (2 * q.nbytes + k.nbytes + v.nbytes) / rate * 1e3
        for alpha in ALPHAS:
            works = candidates(q, k, v, alpha)
            with torch.no_grad():
                times = in_turns(works, device, repeats)
                for name, work in works.items():
                    ratios = ratio(times[name], times["sdpa"])
                    peak = peak_bytes(work, device)
                    yield Row(shape, alpha, name, median(times[name]) * 1e3, ratios, peak, limit)


def bandwidth(device: torch.device) -> float | None:
    """Bytes per second of a large copy on a GPU, reads and writes together; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), 20, device) for _ in range(3))


def in_turns(works: dict[str, Work], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds per call: every turn times each of `works` once, over enough calls to be measurable."""
    calls = {}
    for name, work in works.items():
        seconds(work, 1, device)
        calls[name] = max(1, round(SAMPLE_SECONDS / seconds(work, 1, device)))
    turns = [{name: seconds(work, calls[name], device) for name, work in works.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in works}


def seconds(work: Work, calls: int, device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(of: list[float], to: list[float]) -> tuple[float, float, float]:
    return tuple(quantiles([a / b for a, b in zip(of, to, strict=True)], n=4, method="inclusive"))


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most bytes allocated at once during a call, without its inputs and its output."""
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        out = work()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        out, peak = cpu_peak(work)
    return peak - out.untyped_storage().nbytes()


def cpu_peak(work: Work) -> tuple[torch.Tensor, int]:
    """The output, and the highest running sum of what the call allocates and frees through torch's CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return out, peak


def line(row: Row) -> str:
    low, middle, high = (f"{value:.2f}" for value in row.to_sdpa)
    limit = "" if row.bandwidth_limit_ms is None else f"{row.bandwidth_limit_ms:.3f}"
    return (
        f"{row.shape:<12} {row.alpha:>5g} {row.candidate:<10} {row.ms:>9.3f}  {f'{middle} [{low}, {high}]':<24} "
        f"{row.peak_bytes / MIB:>8.1f} {limit:>9}"
    )


if __name__ == "__main__":
    main()
