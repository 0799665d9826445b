"""Do pictures follow their prompts better with PLADIS?

    python -m benchmarks.alignment demo                      the demo models of training/, read back by an oracle
    python -m benchmarks.alignment server --workflow W.json --prompts P.txt --clip FOLDER
                                                             your checkpoint, on a running ComfyUI
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from .alignment_demo import CAPTION_SEED, PARTS
from .comfy_client import PATIENCE, WorkflowError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _demo_arguments(commands.add_parser("demo", help="the trained demo models, without ComfyUI"))
    _server_arguments(commands.add_parser("server", help="any checkpoint, on a running ComfyUI server"))
    args = parser.parse_args()
    try:
        {"demo": _demo, "server": _server}[args.command](args)
    except (ValueError, ImportError, OSError, WorkflowError) as error:
        parser.error(str(error))


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trained", type=Path, default=Path("training/small"), help="folder of trained models")
    parser.add_argument(
        "--models", nargs="+", default=["all"],
        help="names (noise15-0), kinds (noise15, sink, student) or seeds (seed0) to report on; settings are chosen on "
        "seed 0 all the same",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--tune", type=int, default=300, help="captions to choose on (default: %(default)s)")
    parser.add_argument("--report", type=int, default=1000, help="captions to report on (default: %(default)s)")
    parser.add_argument("--caption-seed", type=int, default=CAPTION_SEED, help="of both (default: %(default)s)")
    parser.add_argument("--precise", action="store_true", help="float32; else bfloat16 where the CPU has it")
    parser.add_argument("--forecast", action="store_true", help="say how long it will take, and stop")
    parser.add_argument("--out", type=Path, default=Path("alignment"), help="folder of scores, tables.json, tables.md")


def _demo(args: argparse.Namespace) -> None:
    from .alignment_demo import command

    command.run(args)


def _server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workflow", type=Path, required=True, help="in API format; {prompt} stands for the prompt")
    parser.add_argument("--node", help="title or id of the Apply PLADIS node, where there are several")
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--lambdas", type=float, nargs="+", default=[0, 1, 2], help="the first is what the others are compared with"
    )
    parser.add_argument("--out", type=Path, default=Path("alignment-server"), help="folder of all that is written")
    parser.add_argument("--server", nargs="+", default=["http://127.0.0.1:8188"], help="several need --ray")
    parser.add_argument("--ray", help="'local', or the address of a Ray cluster; one worker per server")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds that a server may be away before it counts as lost"
    )
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model, for CLIPScore")
    parser.add_argument(
        "--preference", type=Path, nargs="+", default=[], help="folders of preference models (PickScore, ...)"
    )
    parser.add_argument("--device", default="cpu", help="where the scores are computed")


def _server(args: argparse.Namespace) -> None:
    from . import alignment_server as server

    template = server.Template(json.loads(args.workflow.read_text(encoding="utf-8")), args.node)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompt")
    for name, given in (("prompt", prompts), ("seed", args.seeds), ("lambda", args.lambdas)):
        twice = [value for value in given if given.count(value) > 1]
        if twice:
            raise ValueError(f"{name} {twice[0]!r} is given twice: the same pictures would count twice")
    # before the pictures, which take long
    scorers = _scorers(args)
    images = args.out / "images"
    server.make_images(template, prompts, args.seeds, args.lambdas, images, args.server, args.ray, args.patience)
    server.grid(prompts, args.seeds[0], args.lambdas, images).save(args.out / "grid.png")
    result = server.tabulate(prompts, args.seeds, args.lambdas, images, scorers)
    server.write_whole(args.out / "results.json", json.dumps(result, indent=1).encode())
    if scorers:
        text = server.markdown(result)
        server.write_whole(args.out / "results.md", (text + "\n").encode())
        print(text)
    print(f"{len(prompts) * len(args.seeds) * len(args.lambdas)} pictures in {images}, grid in {args.out / 'grid.png'}")


def _scorers(args: argparse.Namespace) -> dict:
    if not args.clip and not args.preference:
        return {}
    from .preference import DualEncoder

    load = partial(DualEncoder, device=args.device)
    scorers = {"CLIPScore": load(args.clip, clipscore=True).score} if args.clip else {}
    return scorers | {folder.name: load(folder, clipscore=False).score for folder in args.preference}


if __name__ == "__main__":
    main()
