"""python -m demo.train autoencoder | diffusion | student | export: each goes on where it stopped."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .options import Options, device

# the model card has what the shipped weights were trained with
STEPS = {"autoencoder": 2500, "diffusion": 11000, "student": 600}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument("run", choices=[*STEPS, "export"])
    parser.add_argument("--folder", type=Path, default=Path("training"), help="checkpoints and samples")
    parser.add_argument("--steps", type=int, help="optimizer steps in all; the learning rate falls to 0 over them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints and samples")
    parser.add_argument("--device", default=device())
    args = parser.parse_args()
    run = importlib.import_module(f".{args.run}", __package__)
    if args.run == "export":
        run.export(args.folder)
    else:
        run.train(Options(args.folder, args.steps or STEPS[args.run], args.seed, args.every, args.device))


if __name__ == "__main__":
    main()
