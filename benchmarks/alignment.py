"""Do pictures follow their prompts better with PLADIS?

    python -m benchmarks.alignment demo                      the demo models of training/, read back by an oracle
    python -m benchmarks.alignment server --workflow W.json --prompts P.txt --clip FOLDER
                                                             your checkpoint, on a running ComfyUI
    python -m benchmarks.alignment check results.json        whether a report says what its scores say
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from .alignment_demo import CAPTION_SEED, PARTS, ROBUSTNESS_CAPTIONS
from .comfy_client import PATIENCE, WorkflowError

SERVER = """Pictures of every prompt and seed with every setting, their scores, and what follows from them.

At every CFG are run: softmax; every lambda with the first of --tokens and --norm-caps; every lambda with each other
one of --tokens, and each other one of --norm-caps, in the place of the first (--product: with every pair); every
temperature, with the tokens and the norm_cap of the workflow. So 2 lambdas, 3 tokens, 2 norm_caps, 2 temperatures
and 2 CFGs are 2 * (1 + 2 * (1 + 2 + 1) + 2) = 22 pictures of each prompt and seed. Nothing is made twice: the same
command goes on where it stopped, and further values, prompts left alone, add to what is there.

Everything is compared with softmax at the same CFG, and each setting at its best CFG with softmax at its best CFG.
The last line is an advice with its standard error. results.json is what a report needs: docs/reports/README.md.
"""
TOKENS = ("all", "without start token", "words only")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _demo_arguments(commands.add_parser("demo", help="the trained demo models, without ComfyUI"))
    _server_arguments(commands.add_parser("server", help="any checkpoint, on a running ComfyUI server"))
    _check_arguments(commands.add_parser("check", help="a report, by the scores in it"))
    args = parser.parse_args()
    try:
        {"demo": _demo, "server": _server, "check": _check}[args.command](args)
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
    parser.add_argument("--tune", type=int, default=150, help="captions to choose on (default: %(default)s)")
    parser.add_argument(
        "--report", type=int, default=1000,
        help=f"captions to report on, robustness to noise on the first {ROBUSTNESS_CAPTIONS} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--caption-seed", type=int, default=CAPTION_SEED, help="of both (default: %(default)s)")
    parser.add_argument("--precise", action="store_true", help="float32; else bfloat16 where the device has it")
    parser.add_argument("--jobs", type=int, default=1, help="processes that draw (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="that draws (default: %(default)s)")
    parser.add_argument("--forecast", action="store_true", help="say how long it will take, and stop")
    parser.add_argument("--out", type=Path, default=Path("alignment"), help="folder of scores, tables.json, tables.md")


def _demo(args: argparse.Namespace) -> None:
    from .alignment_demo import command

    command.run(args)


def _server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = SERVER
    parser.add_argument("--workflow", type=Path, required=True, help="in API format; {prompt} stands for the prompt")
    parser.add_argument("--node", help="title or id of the Apply PLADIS node, where there are several")
    parser.add_argument("--cfg-node", help="title or id of the node whose cfg --cfgs sets, where there are several")
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--lambdas", type=float, nargs="+", default=[0, 1, 2], help="scales; softmax (0) is run in any case"
    )
    # what is left out is as the workflow has it
    parser.add_argument("--tokens", nargs="+", default=[], choices=TOKENS, help="which tokens are mixed")
    parser.add_argument("--norm-caps", type=float, nargs="+", default=[], help="values of norm_cap; 0 is no limit")
    parser.add_argument("--cfgs", type=float, nargs="+", default=[], help="CFG scales, all with every setting")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[],
        help="control: softmax of that many times the scores, by a node that you link into the server's custom_nodes",
    )  # fmt: skip
    parser.add_argument("--product", action="store_true", help="every pair of --tokens and --norm-caps")
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
    from . import alignment_report as report
    from . import alignment_server as server

    template = server.Template(json.loads(args.workflow.read_text(encoding="utf-8")), args.node, args.cfg_node)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts} holds no prompt")
    varied = (
        ("prompt", prompts), ("seed", args.seeds), ("lambda", args.lambdas), ("tokens", args.tokens),
        ("norm_cap", args.norm_caps), ("CFG", args.cfgs), ("temperature", args.temperatures),
    )  # fmt: skip
    for name, given in varied:
        twice = [value for value in given if given.count(value) > 1]
        if twice:
            raise ValueError(f"{name} {twice[0]!r} is given twice: the same pictures would count twice")
    for t in args.temperatures:
        if not t > 0.0 or t == 1.0:
            raise ValueError(f"temperature {t:g}: give a number above 0; 1 is softmax, which is run in any case")
    settings = template.settings(
        args.lambdas, args.tokens, args.norm_caps, args.temperatures, args.cfgs, args.product
    )
    whole = {setting.key: template.whole(setting) for setting in settings}
    by_cfg = {cfg: {whole[s.key].label: s for s in settings if s.cfg == cfg} for cfg in {s.cfg: None for s in settings}}
    for cfg, columns in by_cfg.items():
        print(f"{'as in the workflow' if cfg is None else f'CFG {cfg:g}'}: {'; '.join(columns)}", flush=True)
    # before the pictures, which take long
    scorers = _scorers(args)
    images = args.out / "images"
    server.make_images(template, prompts, args.seeds, settings, images, args.server, args.ray, args.patience)
    for cfg, columns in by_cfg.items():
        name = "grid.png" if cfg is None else f"grid_g{cfg:g}.png"
        server.grid(prompts, args.seeds[0], columns, images).save(args.out / name)
    result = report.summarised({
        "format": 1,
        "versions": {"benchmark": _version(), "servers": server.made_by(images)},
        "models": template.models(),
        "scorers": {name: Path(folder).resolve().name for name, folder in _scorer_folders(args).items()},
        "workflow": template.public(),
        "prompts": prompts,
        "seeds": args.seeds,
        "settings": [
            {"key": key, "label": setting.label, "lambda": setting.lam, "tokens": setting.tokens,
             "norm_cap": setting.norm_cap, "temperature": setting.temperature, "cfg": setting.cfg}
            for key, setting in whole.items()
        ],
        "scores": server.measure(prompts, args.seeds, settings, images, scorers),
    })  # fmt: skip
    server.write_whole(args.out / "results.json", json.dumps(result, indent=1).encode())
    count = len(prompts) * len(args.seeds) * len(settings)
    print(f"{count} pictures in {images}, grids and results.json in {args.out}")
    text = report.markdown(result)
    server.write_whole(args.out / "results.md", (text + "\n").encode())
    # its last line is the advice
    print(text)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, nargs="+", help="results.json of a run")


def _check(args: argparse.Namespace) -> None:
    from . import alignment_report as report

    for file in args.report:
        result = json.loads(file.read_text(encoding="utf-8"))
        try:
            report.check(result)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        print(report.markdown(result))


def _version() -> str:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]


def _scorer_folders(args: argparse.Namespace) -> dict[str, Path]:
    return ({"CLIPScore": args.clip} if args.clip else {}) | {folder.name: folder for folder in args.preference}


def _scorers(args: argparse.Namespace) -> dict:
    folders = _scorer_folders(args)
    if not folders:
        return {}
    from .preference import DualEncoder

    return {
        name: DualEncoder(folder, clipscore=name == "CLIPScore", device=args.device).score
        for name, folder in folders.items()
    }


if __name__ == "__main__":
    main()
