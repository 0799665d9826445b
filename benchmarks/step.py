"""A whole sampling step in real ComfyUI, with and without Apply PLADIS: layouts of real models, random weights.

Run it in ComfyUI's own Python, from the repository's root:

    COMFYUI_PATH=~/comfy/ComfyUI ~/comfy/ComfyUI/.venv/bin/python benchmarks/step.py --layout sd15

`--peer PATH` adds the PLADIS node of a checkout of sd-perturbed-attention on the same model. The candidates take turns
within one process, in another order each turn, so that a busy machine slows all of them; ratios are taken within a
turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_temporal_attention": False,
    "use_spatial_transformer": True, "legacy": False, "use_checkpoint": False,
}  # fmt: skip
SDXL = {
    **UNET,
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True,
    "num_head_channels": 64, "num_heads": -1,
}  # fmt: skip
SD15 = {
    **UNET,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1] * 9 + [0] * 3, "context_dim": 768,
    "adm_in_channels": None, "use_linear_in_transformer": False, "num_heads": 8, "num_head_channels": -1,
}  # fmt: skip
# a nineteenth of the depth, with its mix of blocks: they cost the same all the way down, and 12 billion weights of 4
# bytes fit into few machines
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768,
    "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 1,
    "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip

# the 1.3 B model's width, a third of its depth
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "patch_size": [1, 2, 2], "in_dim": 16, "out_dim": 16, "dim": 1536,
    "ffn_dim": 8960, "freq_dim": 256, "text_len": 512, "text_dim": 4096, "num_heads": 12, "num_layers": 10,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A host class and its network; the model's own picture size, its latent, its prompts and its guidance. frames: of
    the latent of a video, 0 for pictures.
    """

    host_class: str
    network: dict
    size: int
    latent_channels: int
    tokens: int
    context: int
    pooled: int
    cfg: float
    frames: int = 0

    def latent(self, size: int):
        import torch

        frames = (self.frames,) if self.frames else ()
        return torch.zeros(1, self.latent_channels, *frames, size // 8, size // 8)


LAYOUTS = {
    "sd15": Layout("SD15", SD15, 512, 4, 77, 768, 1280, 5.0),
    "sdxl": Layout("SDXL", SDXL, 1024, 4, 77, 2048, 1280, 5.0),
    "flux": Layout("Flux", FLUX, 1024, 16, 512, 4096, 768, 1.0),
    "wan": Layout("WAN21_T2V", WAN, 640, 16, 512, 4096, 1, 5.0, frames=9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="sd15")
    parser.add_argument("--size", type=int, help="picture size in pixels (default: the model's own)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="timed in a turn; on a GPU 12 (default: %(default)s)")
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.5], help="one candidate each (default: 1.5)")
    parser.add_argument("--peer", type=Path, help="a checkout of sd-perturbed-attention")
    parser.add_argument("--pytorch-attention", action="store_true", help="as ComfyUI's --use-pytorch-cross-attention")
    parser.add_argument("--without-triton", action="store_true", help="as on a GPU where there is none")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles are printed")
    import_host(["--use-pytorch-cross-attention"] if args.pytorch_attention else [])

    if args.without_triton:
        api = importlib.import_module("pladis_pack.pladis_core.api")
        api._trials = [trials for trials in api._trials if trials.backend != "triton"]
    base = build(LAYOUTS[args.layout])
    models = candidates(base, args.alpha, args.peer)
    layout = LAYOUTS[args.layout]
    size = args.size or layout.size
    turns = measure(models, layout, size, args.repeats, args.steps)
    machine = describe(base)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    what = f"{args.layout} layout, {size} x {size}, CFG {layout.cfg:g}, a step of {args.steps}"
    print(f"{what}; median [quartiles] of {args.repeats} turns\n")
    rows = []
    for name in models:
        seconds = [turn[name] for turn in turns]
        ratio = quantiles([turn[name] / turn["plain"] for turn in turns], n=4, method="inclusive")
        rows.append({"candidate": name, "seconds": median(seconds), "ratio": ratio})
        print(f"{name:<22} {median(seconds):>9.3f} s   {ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}] x plain")
    if args.json:
        settings = {
            "layout": args.layout, "size": size, "steps": args.steps, "without_triton": args.without_triton
        }  # fmt: skip
        document = {"machine": machine, **settings, "turns": turns, "rows": rows}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def import_host(arguments: list[str]) -> None:
    """ComfyUI and this pack, importable; ComfyUI's other arguments stay at their defaults (--cpu without a GPU)."""
    path = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()
    if not (path / "main.py").is_file():
        sys.exit(f"no ComfyUI at {path}: set $COMFYUI_PATH")
    sys.path.insert(0, str(path))
    package = types.ModuleType("pladis_pack")
    package.__path__ = [str(ROOT)]
    sys.modules["pladis_pack"] = package
    import torch

    ours, sys.argv = sys.argv, ["main.py", *arguments, *([] if torch.cuda.is_available() else ["--cpu"])]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.cli_args")
    sys.argv = ours


def build(layout: Layout):
    """A MODEL of the layout with random weights, in the dtype that the host would load it in."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    device = comfy.model_management.get_torch_device()
    config = {"dtype": torch.float16 if device.type == "cuda" else torch.float32, **layout.network}
    description = getattr(comfy.supported_models, layout.host_class)(config)
    description.unet_config.update(config)
    model = description.get_model({}, device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data.uniform_(-bound, bound, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def candidates(base, alphas: list[float], peer: Path | None) -> dict[str, object]:
    from pladis_pack.nodes.apply import PLADISApply

    models = {"plain": base}
    for alpha in alphas:
        settings = {"scale": 2.0, "alpha": alpha, "start_percent": 0.0, "end_percent": 1.0}
        models[f"PLADIS, alpha {alpha:g}"] = PLADISApply.execute(base, **settings).result[0]
    if peer is not None:
        # its node at its defaults, from its modules as a package
        package = types.ModuleType("peer")
        package.__path__ = [str(peer)]
        sys.modules["peer"] = package
        node = importlib.import_module("peer.pladis_nodes").NODE_CLASS_MAPPINGS["PLADIS"]
        models["sd-perturbed-attention"] = node().patch(base)[0]
    return models


def measure(
    models: dict[str, object], layout: Layout, size: int, repeats: int, steps: int
) -> list[dict[str, float]]:
    """Seconds of one step by candidate, turn by turn. The first turn only warms up."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def prompt() -> list:
        context = torch.randn(1, layout.tokens, layout.context, generator=generator)
        return [[context, {"pooled_output": torch.randn(1, layout.pooled, generator=generator), "guidance": 3.5}]]

    prompts = [prompt(), prompt()]
    names, turns = list(models), []
    for turn in range(repeats + 1):
        order = names[turn % len(names):] + names[: turn % len(names)]
        turns.append({name: step_seconds(models[name], layout, prompts, size, steps) for name in order})
    return turns[1:]


def step_seconds(model, layout: Layout, prompts: list, size: int, steps: int) -> float:
    """The mean of all steps but the first: loading and preparing lie before their start."""
    import comfy.sample
    import torch

    marks = []

    def mark(step, *_):
        # in between the CPU runs ahead of the GPU, as it does for people
        if step in (0, steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    latent = layout.latent(size)
    noise = comfy.sample.prepare_noise(latent, 0)
    count = steps + 1
    comfy.sample.sample(
        model, noise, count, layout.cfg, "euler", "normal", *prompts, latent, callback=mark, disable_pbar=True, seed=0
    )
    return (marks[1] - marks[0]) / steps


def describe(base) -> dict[str, str]:
    import comfyui_version

    sys.modules["pladis_core"] = importlib.import_module("pladis_pack.pladis_core")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    attention = importlib.import_module("attention")
    machine = attention.describe(base.load_device, base.model.model_config.unet_config["dtype"])
    return {**machine, "ComfyUI": comfyui_version.__version__}


if __name__ == "__main__":
    main()
