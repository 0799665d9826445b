"""`python -m benchmarks.alignment demo`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import PARTS, scope
from .choices import ships_by_rule
from .measure import measure
from .models import Models, find
from .parallel import draw_ahead, forecast
from .regime import figures
from .results import results
from .scorers import Captions, Drawn, unit_costs
from .store import Store
from .tables import about_shipped, markdown


def run(args: argparse.Namespace) -> None:
    if min(args.tune, args.report) < 2:
        raise ValueError("--tune and --report must be at least 2")
    models = find(args.trained, args.models)
    for name, reason in models.skipped.items():
        print(f"skipped: {name}: {reason}", flush=True)
    if not models.measured:
        raise ValueError(f"none of the models is in {args.trained}: train them with python -m demo.train")
    captions = Captions(args.tune, args.report, args.caption_seed)
    drawn = Drawn(captions, Store(args.out / "scores"), args.precise, args.device)
    if args.precise:
        torch.backends.cudnn.allow_tf32 = False
    work = forecast(drawn, models, args.parts).work
    if work:
        _print_scope(drawn.captions, args.parts)
        _print_forecast(work, *unit_costs(drawn, models.there[models.measured[0]]))
    if not args.forecast:
        with tqdm(total=sum(pictures for _, pictures in work.values()), unit="picture", mininterval=10) as bar:
            if args.jobs > 1:
                draw_ahead(drawn, models, args.parts, args.jobs, bar.update)
            drawn.done = bar.update
            result = tabulate(drawn, models, args.parts)
        write(args.out, result)


def _print_scope(captions: Captions, parts: Sequence[str]) -> None:
    """What is measured on what."""
    counts = {split: len(prompts) for split, prompts in captions.prompts.items()}
    print(f"{counts['tune']} captions to choose on, {counts['report']} to report on.")
    print(scope.about_arms(scope.SHIPPED_KIND))
    if "tuned" in parts:
        print(scope.about_tuned(scope.SHIPPED_KIND))
    if "noise" in parts:
        print(f"Robustness: {scope.about_robustness(scope.SHIPPED_KIND, counts['robustness'])}", flush=True)


def _print_forecast(work: dict[str, list[int]], evaluation: float, picture: float) -> None:
    """evaluation, picture: CPU seconds of one."""
    print(f"one network evaluation takes {1000 * evaluation:.1f} ms, decoding and reading a picture "
          f"{1000 * picture:.1f} ms of CPU time; still to come, about:")  # fmt: skip
    minutes = {name: (count * evaluation + pictures * picture) / 60 for name, (count, pictures) in work.items()}
    for name, number in minutes.items():
        count, pictures = work[name]
        print(f"  {name}: {number:.0f} CPU minutes ({pictures} pictures, {count} evaluations)")
    print(f"  altogether {sum(minutes.values()):.0f} CPU minutes", flush=True)


def tabulate(drawn: Drawn, models: Models, parts: Sequence[str]) -> dict[str, Any]:
    """All that was asked for, measured, as plain data."""
    captions = drawn.captions
    by_rule, shares = ships_by_rule(drawn, models)
    tqdm.write(about_shipped(scope.SHIPPED_KIND, by_rule, shares))
    measured = measure(drawn, models, parts)
    skipped = {f"part {part}": "left out by --parts" for part in PARTS if part not in parts}
    return {
        "captions": {**{split: len(p) for split, p in captions.prompts.items()}, "seed": captions.seed},
        "models": {name: models.there[name].digest for name in models.measured},
        "skipped": {**models.skipped, **skipped},
        "shipped": scope.SHIPPED_KIND, "ships by the rule": by_rule,
        "all objects at CFG 3 on the captions to tune on": shares,
        **results(measured), **figures(models, drawn.store),
    }  # fmt: skip


def write(folder: Path, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)
