"""Trains the demo model. By default everything, in order; what was finished is skipped, what was stopped goes on.

Phases: autoencoder, text_encoder and base, on true captions, once; and for each seed: noise, the base model trained on
with each share of mistakes; sink, for the shipped seed alone, with a start token that is made one; student; checks, of
oracle and text attention; export, which writes the shipped seed's models to demo/weights. SIGTERM, Ctrl-C or a file
STOP in the folder end a run after its step, saved.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..config import UNETS
from . import autoencoder, checks, diffusion, export, student, text
from .options import NOISES, SHIPPED, STEPS, Options, device

PHASES = (*STEPS, "checks", "export")


def main() -> None:
    args = _arguments()
    folder = args.folder or Path("training") / args.size
    chosen = [phase for phase in PHASES if phase in args.phases or "all" in args.phases]
    # what is trained once, then everything for one seed after the other
    for seed in args.seeds:
        for phase in chosen:
            steps = args.steps or STEPS.get(phase, 0)
            run(phase, Options(folder, steps, seed, args.every, args.device, args.size))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phases", nargs="*", metavar="phase", default=["all"], help=f"all, {', '.join(PHASES)}")
    parser.add_argument("--size", choices=list(UNETS), default="small", help="small is shipped; large: for a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--folder", type=Path, help="checkpoints and samples (default: training/SIZE)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run, instead of the recipe's")
    parser.add_argument("--every", type=int, default=1000, help="steps between samples (default: 1000)")
    parser.add_argument("--device", default=device())
    args = parser.parse_args()
    unknown = [phase for phase in args.phases if phase not in ("all", *PHASES)]
    if unknown:
        parser.error(f"no phase is called {', '.join(unknown)}; there are all, {', '.join(PHASES)}")
    return args


def run(phase: str, options: Options) -> None:
    """One phase, for one seed, from where it stopped. Autoencoder, text encoder and base are trained once, for all."""
    if phase in ("autoencoder", "text_encoder"):
        if not (options.folder / f"{phase}.safetensors").exists():
            {"autoencoder": autoencoder, "text_encoder": text}[phase].train(replace(options, seed=SHIPPED))
    elif phase == "base":
        diffusion.train_base(replace(options, seed=SHIPPED))
    elif phase == "noise":
        for noise in NOISES:
            diffusion.train_noise(options, noise)
    elif phase == "sink":
        if options.seed == SHIPPED:
            diffusion.train_sink(options, student.NOISE)
    elif phase == "student":
        student.train(options)
    elif phase == "checks":
        print(checks.show(options))
    else:
        export.export(options)


if __name__ == "__main__":
    main()
