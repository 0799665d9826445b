"""One caption, the same noise, several strengths of PLADIS: writes a labelled picture and prints what the oracle sees.

    python -m demo "a red circle left of a blue square"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from .attention import TextAttention
from .oracle import Score, read, score
from .pipeline import VARIANTS, Pipeline
from .sampling import noise
from .scenes import Placed, Prompt
from .vocabulary import read_caption, tokenize

LAMBDAS = (0.0, 0.5, 1.0, 2.0)


def main() -> None:
    args = _arguments()
    pipeline = Pipeline(args.variant)
    steps = args.steps or pipeline.steps
    prompt = read_caption(args.caption)
    start = noise(args.seed, args.count)
    rows = []
    with tqdm(total=len(args.lambdas) * steps, desc="sampling", unit="step") as bar:
        for lam in args.lambdas:
            attention = TextAttention(lam, args.alpha)
            captions = [args.caption] * args.count
            latents = pipeline.latents(captions, start, attention, steps, args.cfg, callback=bar.update)
            rows.append(pipeline.decode(latents))
    seen = [[read(picture) for picture in pictures] for pictures in rows]
    labels = [f"lambda {lam:g}" if lam else "softmax" for lam in args.lambdas]
    _print(prompt, labels, seen)
    _draw(prompt, labels, rows, seen, args.out)
    print(f"\n{args.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("caption", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS, help="0 is softmax (default: %(default)s)")
    parser.add_argument("--alpha", type=float, default=1.5, help="1 is softmax, 2 is sparsemax (default: %(default)s)")
    parser.add_argument("--variant", choices=VARIANTS, default="standard", help="few-step: distilled, without guidance")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the variant's own)")
    parser.add_argument("--cfg", type=float, help="guidance scale (default: the variant's own)")
    parser.add_argument("--count", type=int, default=6, help="pictures per lambda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pladis_demo.png"))
    args = parser.parse_args()
    if args.count < 1 or (args.steps is not None and args.steps < 1):
        parser.error("--count and --steps must be at least 1")
    if not 1 <= args.alpha <= 2:
        parser.error(f"--alpha must be from 1 to 2, not {args.alpha}")
    try:
        tokenize(args.caption)
    except ValueError as error:
        parser.error(str(error))
    return args


def _print(prompt: Prompt, labels: Sequence[str], seen: Sequence[Sequence[list[Placed]]]) -> None:
    print(f"\nThe oracle's reading of {prompt.text!r}, from top to bottom of each picture:")
    for label, pictures in zip(labels, seen, strict=True):
        print(f"{label}:")
        for objects in pictures:
            there = ", ".join(str(placed.kind) for placed in sorted(objects, key=lambda placed: placed.y)) or "nothing"
            print(f"    {there:<58} {_verdict(score(prompt, objects)) if prompt.objects else ''}".rstrip())


def _verdict(result: Score) -> str:
    relation = {None: "", True: ", in place", False: ", out of place"}[result.relation]
    extra = max(result.seen - result.found, 0)
    return f"{result.found} of {result.named}{f' and {extra} more' if extra else ''}{relation}"


def _draw(prompt: Prompt, labels: Sequence[str], rows: Sequence[np.ndarray], seen, out: Path) -> None:
    count = len(rows[0])
    figure, axes = plt.subplots(
        len(rows), count, figsize=(1.45 * count + 0.6, 1.62 * len(rows) + 0.5), squeeze=False, layout="constrained"
    )
    figure.suptitle(prompt.text, fontsize=11)
    for line, label, pictures, objects in zip(axes, labels, rows, seen, strict=True):
        line[0].set_ylabel(label, fontsize=10)
        for axis, picture, there in zip(line, pictures, objects, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            if prompt.objects:
                axis.set_xlabel(_verdict(score(prompt, there)), fontsize=7, labelpad=2)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
