"""What the training runs share: pictures as tensors, precision, and the run itself."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from .options import Options

# between checkpoints
SAVE_SECONDS = 240


def mixed(device: str) -> torch.autocast:
    """bfloat16 where the device computes it faster than float32; weights and their gradients stay float32."""
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast)


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] to B pictures (H, W, 3) uint8."""
    return list(((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


class Average:
    """Exponential moving average of a module's weights; the decay grows with the steps, so that the start is soon
    forgotten."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


class Stop:
    """Whether the run is asked to end early: by SIGTERM, SIGINT (Ctrl-C) or a file STOP in its folder."""

    def __init__(self, folder: Path) -> None:
        self.file, self.told = folder / "STOP", False

    def __enter__(self) -> Stop:
        self.handlers = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _hear(self, *_) -> None:
        self.told = True

    def asked(self) -> bool:
        return self.told or self.file.exists()


class Run:
    """One training run: AdamW, averaged weights, a progress bar, and a checkpoint that it goes on from.

    Args:
        name: of the checkpoint, in the options' folder, and of the bar.
        model: what is trained and averaged.
        peak, warm_up: of the learning rate.
        decay: of the average.
        parts: modules that belong to the checkpoint too; those that need gradients are trained along.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        model: torch.nn.Module,
        peak: float,
        warm_up: int = 200,
        decay: float = 0.999,
        **parts: torch.nn.Module,
    ) -> None:
        self.name, self.options, self.model, self.peak, self.warm_up = name, options, model, peak, warm_up
        self.average = Average(model, decay)
        trained = [p for module in (model, *parts.values()) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.parts = {"model": model, "average": self.average.module, "optimizer": self.optimizer, **parts}
        self.file = options.folder / f"{name}.pt"

    def finished(self) -> bool:
        return self.file.exists() and torch.load(self.file, weights_only=True)["step"] >= self.options.steps

    def steps(self) -> Iterator[int]:
        """The steps that are still to be made."""
        start = self._load()
        total = self.options.steps
        saved = time.monotonic()
        with (
            trange(start, total, initial=start, total=total, desc=self.name, mininterval=10) as self.bar,
            Stop(self.options.folder) as stop,
        ):
            for step in self.bar:
                yield step
                if stop.asked() or time.monotonic() - saved > SAVE_SECONDS:
                    self._save(step + 1)
                    saved = time.monotonic()
                if stop.asked():
                    raise SystemExit(f"{self.name} stopped after step {step + 1} of {total}; it goes on from there")

    def descend(self, step: int, loss: torch.Tensor, **shown: float) -> None:
        """One optimizer step; `shown` appears beside the bar."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.options.steps, self.peak, self.warm_up)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.model, step)
        self.bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)

    def due(self, step: int) -> bool:
        """Whether it is time for samples; then everything is saved first."""
        due = (step + 1) % self.options.every == 0 or step + 1 == self.options.steps
        if due:
            self._save(step + 1)
        return due

    def _load(self) -> int:
        if not self.file.exists():
            return 0
        saved = torch.load(self.file, weights_only=True, map_location=self.options.device)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["step"]

    def _save(self, step: int) -> None:
        """In one file that is replaced whole: a run that dies while saving loses nothing."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".new")
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"step": step, "steps": self.options.steps, **states}, fresh)
        fresh.replace(self.file)


def averaged(file: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a finished run.

    Raises:
        ValueError: the run has not come to its end.
    """
    saved = torch.load(file, weights_only=True, map_location="cpu")
    if saved["step"] < saved["steps"]:
        raise ValueError(f"{file} is at step {saved['step']} of {saved['steps']}: finish it with python -m demo.train")
    return saved["average"]
