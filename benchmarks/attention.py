"""Time and memory of PLADIS attention against torch's softmax attention and against the `entmax`-package reference.

The three run in turns, so that a busy machine slows all of them; ratios are taken within a turn. Needs
`pip install -e ".[demo]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch.nn.functional import scaled_dot_product_attention

from pladis_core import pladis_attention

# heads, queries, keys, head width of the largest text cross-attentions
SHAPES = {
    "SD1.5 64x64": (8, 4096, 77, 40),
    "SDXL 64x64": (10, 4096, 77, 64),
    "SDXL 32x32": (20, 1024, 77, 64),
}
ALPHAS = (1.5, 2.0, 1.25)
SAMPLE_SECONDS = 0.02
MIB = 2**20

Work = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One shape at one alpha. Ratios are (first quartile, median, third quartile); bytes exclude inputs and output."""

    shape: str
    heads: int
    queries: int
    keys: int
    width: int
    alpha: float
    sdpa_ms: float
    eager_to_sdpa: tuple[float, float, float]
    reference_to_sdpa: tuple[float, float, float]
    reference_to_eager: tuple[float, float, float]
    eager_peak_bytes: int
    reference_peak_bytes: int
    score_map_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the machine and the rows to this file")
    parser.add_argument("--repeats", type=int, default=7, help="turns per row (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles are printed")
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    machine = describe(device, dtype)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"median [quartiles] of {args.repeats} turns; peak: beyond inputs and output; map: one float32 score map\n")
    print(
        f"{'shape':<12} {'alpha':>5} {'sdpa ms':>8}  {'eager/sdpa':<20} {'reference/sdpa':<22} "
        f"{'speed-up over ref.':<22} {'peak MiB eager, ref., map':>26}"
    )
    rows = []
    for row in measure(device, dtype, args.repeats):
        rows.append(row)
        print(line(row), flush=True)
    if args.json:
        document = {"machine": machine, "repeats": args.repeats, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


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


def measure(device: torch.device, dtype: torch.dtype, repeats: int) -> Iterator[Row]:
    for shape, (heads, queries, keys, width) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, n, width, generator=generator).to(device, dtype) for n in (queries, keys, keys)
        )
        for alpha in ALPHAS:
            works = {
                "sdpa": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v),
                "eager": lambda q=q, k=k, v=v, a=alpha: pladis_attention(q, k, v, alpha=a, backend="eager"),
                "reference": lambda q=q, k=k, v=v, a=alpha: pladis_attention(q, k, v, alpha=a, backend="reference"),
            }
            with torch.no_grad():
                times = in_turns(works, device, repeats)
                peaks = {name: peak_bytes(works[name], device) for name in ("eager", "reference")}
            yield Row(
                shape, heads, queries, keys, width, alpha,
                sdpa_ms=median(times["sdpa"]) * 1e3,
                eager_to_sdpa=ratio(times["eager"], times["sdpa"]),
                reference_to_sdpa=ratio(times["reference"], times["sdpa"]),
                reference_to_eager=ratio(times["reference"], times["eager"]),
                eager_peak_bytes=peaks["eager"],
                reference_peak_bytes=peaks["reference"],
                score_map_bytes=4 * heads * queries * keys,
            )  # fmt: skip


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
    def spread(ratios: tuple[float, float, float], digits: int) -> str:
        low, middle, high = (f"{value:.{digits}f}" for value in ratios)
        return f"{middle} [{low}, {high}]"

    peaks = (row.eager_peak_bytes, row.reference_peak_bytes, row.score_map_bytes)
    return (
        f"{row.shape:<12} {row.alpha:>5g} {row.sdpa_ms:>8.2f}  {spread(row.eager_to_sdpa, 2):<20} "
        f"{spread(row.reference_to_sdpa, 1):<22} {spread(row.reference_to_eager, 1):<22} "
        + " ".join(f"{value / MIB:>8.1f}" for value in peaks)
    )


if __name__ == "__main__":
    main()
