"""A day on a GPU: is the kernel right there, and what does it cost? From the repository's root, in this order:

    python -m benchmarks.gpu correct calls operator tiles joint --json gpu.json
    COMFYUI_PATH=... python benchmarks/step.py --layout sdxl --steps 12 --alpha 1.5 2 --json sdxl.json

Each stage takes minutes. Times are of CUDA graphs, so that no Python stands between kernels: `hot`, the same inputs
again and again, and `cold`, inputs that rotate through more than twice the cache. Baselines are torch's
`scaled_dot_product_attention`, by its own choice and by flash attention; all take turns, and ratios are taken within a
turn. Clocks and temperature are recorded before and after each stage. `cuda` and `nvrtc` run where CUDA's torch is,
Triton or not. Without a GPU the stages run on the CPU in a small form, to show that they run (`--small`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pladis_core import attention_with_lse, joint_correction, log_sum_exp, pladis_attention, pladis_correction

from .attention import describe, formula, ratio

# batch, heads, queries, keys, head width
SHAPES = {
    "SDXL 64x64": (2, 10, 4096, 77, 64), "SDXL 32x32": (2, 20, 1024, 77, 64), "SD1.5 64x64": (2, 8, 4096, 77, 40),
    "SD1.5 32x32": (2, 8, 1024, 77, 80), "SD1.5 16x16": (2, 8, 256, 77, 160), "SDXL 154": (2, 10, 4096, 154, 64),
    "PixArt": (2, 16, 4096, 300, 72), "Flux text": (1, 24, 4096, 512, 128), "Wan 480p": (2, 40, 8190, 512, 128),
    "Wan 720p": (1, 40, 75600, 512, 128), "LTX-2": (1, 32, 8192, 1024, 64),
}  # fmt: skip
# on which every alpha, and the formula on the `entmax` package, are measured too
WHOLE = ("SDXL 64x64", "Flux text")
SMALL = {"small": (2, 2, 40, 77, 16), "small 154": (1, 2, 24, 154, 16)}
# keys, width, dtype, alpha, mask or what else is of a kind
CASES = [
    (keys, width, dtype, alpha, "")
    for keys, width in (
        (1, 16), (77, 40), (77, 64), (77, 80), (77, 160), (154, 64), (231, 64), (300, 72), (333, 88), (512, 128),
        (512, 256), (1024, 128), (4096, 64),
    )
    for dtype in ("bfloat16", "float16")
    for alpha in (1.5, 2.0)
]  # fmt: skip
CASES += [
    (77, 64, dtype, alpha, mask)
    for dtype in ("bfloat16", "float16", "float32")
    for alpha in (1.001, 1.25, 1.75)
    for mask in ("", "boolean", "additive")
]
CASES += [(512, 128, "bfloat16", alpha, mask) for alpha in (1.25, 1.5) for mask in ("boolean", "additive")]
CASES += [(300, 64, "float32", 1.5, ""), (256, 128, "float32", 2.0, "additive")]
# rows of nearly equal scores, as padding makes them
CASES += [
    (keys, 64, dtype, alpha, "equal")
    for keys in (77, 320, 512, 1024)
    for dtype in ("bfloat16", "float16")
    for alpha in (1.5, 1.75, 2.0)
]
# how much further than a rounding of the output an error may be
ROUNDINGS = 6.0
# cold inputs together, and the most that one input set may take to be rotated
COLD_BYTES, LARGEST_SET = 250e6, 120e6
FIRST_CALLS = ((77, 64, 1.5), (512, 128, 1.5), (512, 128, 1.75), (1024, 128, 1.5))

Work = Callable[..., torch.Tensor]
Inputs = tuple[torch.Tensor, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="stage", help=", ".join(STAGES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="of `operator` and `tiles` (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="turns (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--small", action="store_true", help="on the CPU, in a small form: shows that it runs, no more")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("there is no GPU here; --small shows on the CPU that the stages run")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = torch.device("cpu" if args.small else "cuda")
    document: dict = {"machine": describe(device, torch.bfloat16), "small": args.small, "stages": {}}
    print(document["machine"])
    for stage in args.stages:
        before = clocks()
        print(f"\n== {stage} {before}")
        rows = []
        for row in STAGES[stage](device, args):
            rows.append(row)
            print("  ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
        document["stages"][stage] = {"before": before, "rows": rows, "after": clocks()}
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    wrong = [row for stage in document["stages"].values() for row in stage["rows"] if row.get("wrong")]
    sys.exit(f"{len(wrong)} wrong: {wrong}" if wrong else 0)


def shown(value) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clocks() -> str:
    """Clocks, temperature and power of the GPU; nothing where NVIDIA's tool is not."""
    if shutil.which("nvidia-smi") is None:
        return ""
    fields = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def heads(batch: int, count: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B, H, L, D), laid out as hosts do: heads behind positions."""
    flat = torch.randn(batch, length, count * width, device=device).to(dtype)
    return flat.unflatten(-1, (count, width)).transpose(1, 2)


def backends(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["portable"]
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

        return ["triton", "cuda", "nvrtc"]
    return ["cuda", "nvrtc"]


# correct: every branch against float64


def entmax64(scores: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha-entmax of float64 rows by bisection, for which no package is needed; 0 where all are -inf."""
    b = alpha - 1.0
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e300)
    x = b * (scores - peak)
    low, high = torch.full_like(peak, -1.0), torch.zeros_like(peak)
    for _ in range(90):
        middle = (low + high) / 2
        above = (x - middle).clamp(min=0).pow(1 / b).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    weights = (x - low).clamp(min=0).pow(1 / b)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def definition(query, key, value, mask, alpha: float, dense: float, row_lse=None) -> torch.Tensor:
    """The equation in float64, at lambda 2: dense -1 is attention, -2 the correction."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1).double() for t in (key, value))
    scores = query.double() @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = dense * scores.softmax(-1).nan_to_num(0.0) + 2.0 * entmax64(scores, alpha)
    if row_lse is not None:
        weights = weights * (scores.logsumexp(-1, keepdim=True) - row_lse.double()).exp().clamp(max=1)
    return weights @ value


def correct(device: torch.device, args) -> Iterator[dict]:
    """Errors against float64, beside that of rounding the exact output; masked rows must be 0."""
    for rows in in_processes(partial(checked, device), CASES[:: 12 if args.small else 1], args.jobs):
        yield from rows


def in_processes(work: Callable, items: list, jobs: int) -> Iterator:
    """work(item) of each, in order. Most of a first call is the compiler's, which takes one core."""
    if jobs == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(work, items)


def checked(device: torch.device, case: tuple) -> list[dict]:
    keys, width, name, alpha, kind = case
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    query = heads(2, 4, 147, width, dtype, device) * (0.1 if kind == "equal" else 1.5)
    key, value = heads(2, 2, keys, width, dtype, device), heads(2, 2, keys, width, dtype, device) + 1
    mask = None
    if kind in ("boolean", "additive"):
        mask = torch.rand(2, 1, 147, keys, device=device) < 0.7
        mask[:, :, 5] = False
    if kind == "additive":
        mask = torch.randn(mask.shape, device=device).to(dtype).masked_fill(~mask, -torch.inf)
    row_lse = 3 + 6 * torch.rand(2, 4, 147, 1, device=device)
    expected = definition(query, key, value, mask, alpha, -1.0)
    expected_correction = definition(query, key, value, mask, alpha, -2.0, row_lse)
    rounding = max((expected.to(dtype).double() - expected).abs().max().item(), 3e-5)
    rows = []
    for backend in backends(device):
        row = {"case": f"{keys}x{width} {name} {alpha:g} {kind}".strip(), "backend": backend}
        options = {"alpha": alpha, "enable_gqa": True, "backend": backend}
        start = time.perf_counter()
        try:
            out = pladis_attention(query, key, value, mask, **options)
            correction = pladis_correction(query, key, value, mask, row_lse=row_lse, **options)
        except Exception as error:  # a ValueError: a problem that this backend does not take
            rows.append(row | {"error": str(error)[:200], "wrong": not isinstance(error, ValueError)})
            continue
        error = (out.double() - expected).abs().max().item()
        of_correction = (correction.double() - expected_correction).abs().max().item()
        wrong = not out.isfinite().all() or not max(error, of_correction) <= ROUNDINGS * rounding
        wrong = wrong or bool(kind and (out[:, :, 5] != 0).any())
        rows.append(row | {
            "error": error, "of the correction": of_correction, "of rounding": rounding,
            "first call s": round(time.perf_counter() - start, 2), "wrong": wrong,
        })  # fmt: skip
    return rows


# operator: times in graphs


def recorded(work: Work, sets: list[Inputs], device: torch.device) -> Callable[[], None]:
    """What does `work` on every input set, without Python in between on a GPU."""
    for inputs in sets[:2]:
        work(*inputs)
    if device.type == "cpu":
        return lambda: [work(*inputs) for inputs in sets] and None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            work(*inputs)
    return graph.replay


def in_turns(works: dict[str, Work], sets: list[Inputs], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds a call, turn by turn; in another order each turn."""
    runs = {name: recorded(work, sets, device) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for run in runs.values():
        run()
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(microseconds(runs[name], device) / len(sets))
    return times


def microseconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def against(times: dict[str, list[float]], baseline: str) -> Iterator[dict]:
    for name, found in times.items():
        low, middle, high = ratio(found, times[baseline])
        yield {"what": name, "us": median(found), f"to {baseline}": [middle, low, high]}


def flash(query, key, value) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(query, key, value)


def alphas(whole: bool) -> tuple[float, ...]:
    return (1.5, 2.0, 1.25, 1.75) if whole else (1.5, 2.0)


def once(dtype: torch.dtype, device: torch.device, variant: tuple[int, int, float]) -> None:
    keys, width, alpha = variant
    query, key = heads(1, 2, 256, width, dtype, device), heads(1, 2, keys, width, dtype, device)
    pladis_attention(query, key, key, alpha=alpha, backend=backends(device)[0])


def candidates(inputs: Inputs, whole: bool, device: torch.device) -> dict[str, Work]:
    works: dict[str, Work] = {"sdpa": scaled_dot_product_attention}
    with contextlib.suppress(RuntimeError):  # no such kernel for these
        flash(*inputs)
        works["sdpa flash"] = flash
    for backend in backends(device):
        for alpha in alphas(whole):
            work = partial(pladis_attention, alpha=alpha, backend=backend)
            try:
                work(*inputs)
            except Exception as error:  # a ValueError: a problem that this backend does not take
                print(f"left out: {backend} {alpha:g}: {error}")
            else:
                works[f"{backend} {alpha:g}"] = work
    if whole:
        from entmax import entmax15, sparsemax

        works["formula 1.5"] = lambda q, k, v: formula(q, k, v, lambda s: entmax15(s, -1))
        works["formula 2"] = lambda q, k, v: formula(q, k, v, lambda s: sparsemax(s, -1))
    return works


def operator(device: torch.device, args) -> Iterator[dict]:
    """`hot` and `cold`, and how long the memory takes that must be touched, at the rate of a large copy."""
    shapes = SMALL if args.small else {name: SHAPES[name] for name in args.shapes or SHAPES}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    variants = {(*shape[3:], alpha) for name, shape in shapes.items() for alpha in alphas(name in WHOLE)}
    if args.jobs > 1:
        # Triton keeps what it compiles on disk
        list(in_processes(partial(once, dtype, device), sorted(variants), args.jobs))
    for shape, (batch, count, queries, keys, width) in shapes.items():
        size = 2 * batch * count * queries * width * dtype.itemsize
        for heat in ("hot", "cold"):
            rotated = 1 if heat == "hot" else max(2, min(40, int(COLD_BYTES / size) + 1))
            if heat == "cold" and size > LARGEST_SET:
                continue
            calls = 2 if args.small else 3 if size > 1e9 else 20
            made = [
                tuple(heads(batch, count, length, width, dtype, device) for length in (queries, keys, keys))
                for _ in range(2 if args.small and rotated > 1 else rotated)
            ]
            sets = made * calls if heat == "hot" else made
            works = candidates(made[0], heat == "hot" and shape in WHOLE, device)
            for row in against(in_turns(works, sets, max(args.repeats, 2), device), "sdpa"):
                yield {"shape": shape, "cache": heat} | row
            del made, sets


# tiles: is the table of impl/triton.py right for this GPU?


def tile_candidates(queries: int, keys: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple]:
    """The table's sizes of tiles and warps, and others around them."""
    from pladis_core.impl import triton as backend

    tile, warps = backend.configuration(queries, keys, width, dtype, *backend._target(device))
    found = {"table": (tile, warps)}
    for block_q, count in ((32, 4), (64, 4), (64, 8), (128, 4), (128, 8)):
        for block_k in (32, 64, 128) if tile.N == 0 else (tile.BLOCK_K,):
            other = tile._replace(BLOCK_Q=block_q, BLOCK_K=block_k), count
            if other != found["table"]:
                found[f"{block_q} queries, {block_k} keys, {count} warps"] = other
    return found


@contextlib.contextmanager
def tiled(tile, warps: int) -> Iterator[None]:
    from pladis_core.impl import triton as backend

    caches, table = (backend.plan, backend.laid_out), backend.configuration
    try:
        backend.configuration = lambda *problem, **gpu: (tile, warps)  # type: ignore[assignment]
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        backend.configuration = table
        for cache in caches:
            cache.cache_clear()


def tiles(device: torch.device, args) -> Iterator[dict]:
    """Triton's kernel with other tiles than the table's, which is the baseline; hot. An error: what does not fit."""
    shapes = SMALL if args.small else {name: SHAPES[name] for name in args.shapes or SHAPES}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for shape, (batch, count, queries, keys, width) in shapes.items():
        inputs = tuple(heads(batch, count, length, width, dtype, device) for length in (queries, keys, keys))
        calls = 2 if args.small else 3 if batch * count * queries * width > 2e8 else 20
        times: dict[str, list[float]] = {}
        runs = {}
        work = partial(pladis_attention, alpha=1.5, backend=backends(device)[0])
        for name, candidate in tile_candidates(queries, keys, width, dtype, device).items():
            try:
                with tiled(*candidate):
                    runs[name] = recorded(work, [inputs] * calls, device)
            except Exception as error:  # of the compiler or the driver
                yield {"shape": shape, "what": name, "error": str(error)[:120]}
        for _ in range(max(args.repeats, 2)):
            for name, run in runs.items():
                times.setdefault(name, []).append(microseconds(run, device) / calls)
        for row in against(times, "table"):
            yield {"shape": shape} | row


# joint: what a Flux layer costs, and that it is right


def joint_layer(query, key, value, text: int) -> torch.Tensor:
    """The dense part with its log-sum-exp, and the correction of the image's rows."""
    found = attention_with_lse(query, key, value)
    if found is None:
        return beside_another(query, key, value, text)
    out, row_lse = found
    rest = joint_correction(query[:, :, text:], key[:, :, :text], value[:, :, :text], row_lse[:, :, text:])
    out[:, :, text:].add_(rest)
    return out


def beside_another(query, key, value, text: int) -> torch.Tensor:
    """As beside a node or a backend that gives no log-sum-exp."""
    row_lse = log_sum_exp(query[:, :, text:], key)
    out = scaled_dot_product_attention(query, key, value).clone()
    rest = joint_correction(query[:, :, text:], key[:, :, :text], value[:, :, :text], row_lse)
    out[:, :, text:].add_(rest)
    return out


def joint(device: torch.device, args) -> Iterator[dict]:
    """Flux at 1024 x 1024: 4608 rows, 24 heads of 128, the first 512 text. Times, an error, peak memory."""
    count, length, width, text = (2, 96, 16, 24) if args.small else (24, 4608, 128, 512)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = (heads(1, count, length, width, dtype, device) for _ in range(3))
    works: dict[str, Work] = {
        "sdpa": scaled_dot_product_attention,
        "joint": lambda q, k, v: joint_layer(q, k, v, text),
        "joint beside another backend": lambda q, k, v: beside_another(q, k, v, text),
    }
    yield from against(in_turns(works, [(query, key, value)] * 5, max(args.repeats, 2), device), "sdpa")
    few = slice(text, text + 64)
    scores = query[:, :, few].double() @ key.double().mT * width**-0.5
    alone = scores[..., :text]
    mass = (alone.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True)).exp()
    difference = entmax64(alone, 1.5) - alone.softmax(-1)
    expected = scores.softmax(-1) @ value.double() + 2 * mass * (difference @ value[:, :, :text].double())
    rounding = (expected.to(dtype).double() - expected).abs().max().item()
    for name in ("joint", "joint beside another backend"):
        error = (works[name](query, key, value)[:, :, few].double() - expected).abs().max().item()
        wrong = not error <= ROUNDINGS * max(rounding, 3e-5)
        peak = peak_mib(works[name], (query, key, value), device)
        yield {"what": name, "error": error, "of rounding": rounding, "wrong": wrong, "peak MiB": peak}


def peak_mib(work: Work, inputs: Inputs, device: torch.device) -> float | None:
    """Beyond inputs; None on a CPU."""
    if device.type == "cpu":
        return None
    work(*inputs)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(*inputs)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# calls: the CPU's side, and the wait for a compiler


def calls(device: torch.device, args) -> Iterator[dict]:
    """Microseconds of the CPU for a call, queued behind a sleeping GPU; and seconds of a first call, nothing cached."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    query, key, value = (heads(2, 20, length, 64, dtype, device) for length in (1024, 77, 77))
    works: dict[str, Work] = {"sdpa": scaled_dot_product_attention} | {
        name: partial(pladis_attention, backend=name) for name in backends(device)
    }
    # all of them must fit into the driver's queue of a thousand launches
    count = 2 if args.small else 100
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            work(query, key, value)
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda._sleep(int(3e8))
            start = time.perf_counter()
            for _ in range(count):
                work(query, key, value)
            times[name].append((time.perf_counter() - start) / count * 1e6)
            if device.type == "cuda":
                torch.cuda.synchronize()
    yield from against(times, "sdpa")
    for keys, width, alpha in () if args.small else FIRST_CALLS:
        for backend in backends(device):
            yield {"first call": f"{backend} {keys}x{width} {alpha:g}", "s": first_call(backend, keys, width, alpha)}


def first_call(backend: str, keys: int, width: int, alpha: float) -> float:
    code = (
        "import time, torch; from pladis_core import pladis_attention\n"
        f"q, k = (torch.randn(1, 2, n, {width}, device='cuda').bfloat16() for n in (256, {keys}))\n"
        "torch.cuda.synchronize(); start = time.perf_counter()\n"
        f"pladis_attention(q, k, k, alpha={alpha}, backend={backend!r}); torch.cuda.synchronize()\n"
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment, command = os.environ | {"TRITON_CACHE_DIR": folder}, [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


STAGES: dict[str, Callable[[torch.device, argparse.Namespace], Iterable[dict]]] = {
    "correct": correct, "calls": calls, "operator": operator, "tiles": tiles, "joint": joint,
}  # fmt: skip


if __name__ == "__main__":
    main()
