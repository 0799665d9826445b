"""The same question on real checkpoints: a workflow, prompts, seeds and lambdas -> pictures, scores, a table, a grid.

Every picture is one file, written whole; what is there is not made again. So a run that was stopped, crashed or lost
its server goes on with the same command.
"""

from __future__ import annotations

import copy
import hashlib
import json
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from . import comfy_client
from .comfy_client import PATIENCE, ComfyClient

APPLY = ("PLADISApply", "PLADISApplyAdvanced")
SEED_INPUTS = ("seed", "noise_seed")
PLACEHOLDER = "{prompt}"
# attempts at a job on a worker that died, and restarts of a worker: Ray's own
RETRIES = 3
Scorer = Callable[[Sequence[str], Sequence[Path]], list[float]]


@dataclass(frozen=True)
class Job:
    """One picture to be made: number of its prompt, seed, lambda."""

    prompt: int
    seed: int
    lam: float

    @property
    def file(self) -> str:
        return f"p{self.prompt:04}_s{self.seed}_l{self.lam:g}.png"


# a job, its workflow, its name in the server's queue
Task = tuple[Job, dict, str]
Run = Callable[[Sequence[Task]], Iterator[tuple[Job, bytes]]]


class Template:
    """A workflow in ComfyUI's API format with places for prompt, seed and lambda.

    Args:
        workflow: node id -> {"class_type", "inputs"}, as `Export (API)` writes it.
        node: id or title of the Apply PLADIS node; the only one there is when None.

    Raises:
        ValueError: not in API format, no such node or more than one, no {prompt} in any text, no seed.
    """

    def __init__(self, workflow: dict, node: str | None = None) -> None:
        nodes = workflow.values() if isinstance(workflow, dict) else [None]
        if not all(isinstance(entry, dict) and {"class_type", "inputs"} <= entry.keys() for entry in nodes):
            raise ValueError("the workflow is not in API format: in ComfyUI, Workflow > Export (API)")
        self.workflow = workflow
        self.apply = self._find_apply(node)
        self.texts = [
            (key, name)
            for key, entry in workflow.items()
            for name, value in entry["inputs"].items()
            if isinstance(value, str) and PLACEHOLDER in value
        ]
        self.seeds = [
            (key, name)
            for key, entry in workflow.items()
            for name in SEED_INPUTS
            if isinstance(entry["inputs"].get(name), int)
        ]
        if not self.texts:
            raise ValueError(f"no text of the workflow holds {PLACEHOLDER}: put it where the prompt belongs")
        if not self.seeds:
            raise ValueError(f"no node of the workflow has {' or '.join(SEED_INPUTS)} as a value")

    def _find_apply(self, node: str | None) -> str:
        found = {
            key: entry.get("_meta", {}).get("title", "")
            for key, entry in self.workflow.items()
            if entry["class_type"] in APPLY
        }
        named = [key for key, title in found.items() if node in (None, key, title)]
        if len(named) != 1:
            listed = ", ".join(f"{key} ({title})" for key, title in found.items()) or "none"
            asked = "an Apply PLADIS node" if node is None else f"an Apply PLADIS node named {node!r}"
            raise ValueError(f"the workflow must have {asked}, exactly one; it has: {listed}")
        return named[0]

    def filled(self, prompt: str, seed: int, lam: float, prefix: str = "pladis") -> dict:
        """The workflow of one picture, saved under names that begin with `prefix`."""
        workflow = copy.deepcopy(self.workflow)
        for entry in workflow.values():
            entry.pop("_meta", None)
            if isinstance(entry["inputs"].get("filename_prefix"), str):
                entry["inputs"]["filename_prefix"] = prefix
        for key, name in self.texts:
            workflow[key]["inputs"][name] = workflow[key]["inputs"][name].replace(PLACEHOLDER, prompt)
        for key, name in self.seeds:
            workflow[key]["inputs"][name] = seed
        workflow[self.apply]["inputs"]["scale"] = lam
        return workflow


def make_images(
    template: Template,
    prompts: Sequence[str],
    seeds: Sequence[int],
    lambdas: Sequence[float],
    folder: Path,
    servers: Sequence[str],
    ray_address: str | None = None,
    patience: float = PATIENCE,
) -> None:
    """Makes every picture that is not in `folder` yet.

    Args:
        servers: addresses of ComfyUI servers: one, or with Ray as many as there are.
        ray_address: "local" for Ray on this machine, else a cluster's address; one worker per server.
        patience: seconds that a server may be away before it counts as lost.

    Raises:
        ValueError: `folder` holds pictures of another workflow or of other prompts.
        WorkflowError, ConnectionError: as `ComfyClient.named_image`; finished pictures stay.
    """
    identity = _identity(template, prompts)
    _claim(folder, identity)
    jobs = [Job(number, seed, lam) for number in range(len(prompts)) for seed in seeds for lam in lambdas]
    missing = [job for job in jobs if not (folder / job.file).exists()]
    tasks = [_task(template, prompts[job.prompt], job, str(uuid.uuid5(identity, job.file))) for job in missing]
    with (
        tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc="pictures", unit="picture") as bar,
        _runner(servers, ray_address, patience) as run,
    ):
        for job, image in run(tasks):
            write_whole(folder / job.file, image)
            bar.update()


def _task(template: Template, prompt: str, job: Job, name: str) -> Task:
    # under a name of its own: servers that share an output folder would choose the same number
    return job, template.filled(prompt, job.seed, job.lam, prefix=f"pladis-alignment/{name}"), name


def _identity(template: Template, prompts: Sequence[str]) -> uuid.UUID:
    """Of everything that a picture depends on besides its job."""
    text = json.dumps([template.filled(PLACEHOLDER, 0, 0.0), template.apply, list(prompts)], sort_keys=True)
    return uuid.UUID(hashlib.sha256(text.encode()).hexdigest()[:32])


def _claim(folder: Path, identity: uuid.UUID) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "identity"
    if any(folder.glob("*.png")) and mark.exists() and mark.read_text() != str(identity):
        raise ValueError(f"{folder} holds pictures of another workflow or of other prompts: choose another --out")
    write_whole(mark, str(identity).encode())


def write_whole(file: Path, content: bytes) -> None:
    """A file that exists is complete, whenever the writer dies."""
    fresh = file.with_name(file.name + ".new")
    fresh.write_bytes(content)
    fresh.replace(file)


@contextmanager
def _runner(servers: Sequence[str], ray_address: str | None, patience: float) -> Iterator[Run]:
    if ray_address is None:
        if len(servers) > 1:
            raise ValueError(f"{len(servers)} servers need Ray to share the work: add --ray local, or give one server")
        yield lambda tasks: _on_one(ComfyClient(servers[0], patience), tasks)
    else:
        with _ray(ray_address) as ray:
            yield lambda tasks: _on_ray(ray, servers, patience, tasks)


def _on_one(client: ComfyClient, tasks: Sequence[Task]) -> Iterator[tuple[Job, bytes]]:
    for job, workflow, name in tasks:
        yield job, client.named_image(workflow, name)[1]


@contextmanager
def _ray(address: str):
    try:
        import ray
    except ImportError:
        raise ImportError('Ray is not installed: pip install -e ".[cluster]"') from None
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def _on_ray(
    ray, servers: Sequence[str], patience: float, tasks: Sequence[Task]
) -> Iterator[tuple[Job, bytes]]:
    """One worker per server; what a server that is away leaves undone goes to the others. Pictures travel back through
    Ray, and the client's code with the worker: the machines need neither a common disk nor this repository."""
    ray.cloudpickle.register_pickle_by_value(comfy_client)
    worker = ray.remote(num_cpus=0, max_restarts=RETRIES, max_task_retries=RETRIES)(ComfyClient)
    idle = [worker.remote(server, patience) for server in servers]
    waiting, running = deque(tasks), {}
    while waiting or running:
        while idle and waiting:
            actor, task = idle.pop(), waiting.popleft()
            running[actor.attempt.remote(*task[1:])] = (actor, task)
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        actor, task = running.pop(done)
        _, image = ray.get(done)
        if isinstance(image, bytes):
            idle.append(actor)
            yield task[0], image
        else:
            # this server gets no more
            waiting.appendleft(task)
            if not (idle or running):
                raise image


def tabulate(
    prompts: Sequence[str],
    seeds: Sequence[int],
    lambdas: Sequence[float],
    folder: Path,
    scorers: dict[str, Scorer],
    batch: int = 16,
) -> dict:
    """Scores of all pictures: means, and differences from the first lambda paired by prompt and seed. Standard errors
    are over prompts: pictures of one prompt resemble each other.

    Returns:
        {"prompts", "seeds", "lambdas", "scores": {name: {lambda: [one number per prompt and seed]}},
        "table": [{"lambda", name: {"mean", "se", "difference", "difference_se"}}]}; se is the standard error.
    """
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in scorers}
    pairs = [(number, seed) for number in range(len(prompts)) for seed in seeds]
    with tqdm(total=len(scorers) * len(lambdas) * len(pairs), desc="scores", unit="picture") as bar:
        for name, scorer in scorers.items():
            for lam in lambdas:
                row = scores[name][f"{lam:g}"] = []
                for start in range(0, len(pairs), batch):
                    chunk = pairs[start : start + batch]
                    row += scorer([prompts[n] for n, _ in chunk], [folder / Job(n, s, lam).file for n, s in chunk])
                    bar.update(len(chunk))
    base = f"{lambdas[0]:g}"
    table = [
        {"lambda": lam}
        | {name: _compare(rows[f"{lam:g}"], rows[base], len(seeds)) for name, rows in scores.items()}
        for lam in lambdas
    ]
    return {
        "prompts": list(prompts), "seeds": list(seeds), "lambdas": list(lambdas), "scores": scores, "table": table,
    }  # fmt: skip


def _compare(row: Sequence[float], base: Sequence[float], seeds: int) -> dict[str, float]:
    values = np.array(row).reshape(-1, seeds).mean(1)
    gains = values - np.array(base).reshape(-1, seeds).mean(1)
    error, gain_error = (
        float(x.std(ddof=1) * len(x) ** -0.5) if len(x) > 1 else float("nan") for x in (values, gains)
    )
    return {
        "mean": float(values.mean()), "se": error, "difference": float(gains.mean()), "difference_se": gain_error,
    }  # fmt: skip


def markdown(result: dict) -> str:
    names = list(result["scores"])
    base = result["lambdas"][0]
    head = " | ".join(f"{name} | {name} - lambda {base:g}" for name in names)
    lines = [f"| lambda | {head} |", "|---" * (1 + 2 * len(names)) + "|"]
    for row in result["table"]:
        cells = []
        for name in names:
            s = row[name]
            cells += [f"{s['mean']:.3f} ± {s['se']:.3f}", f"{s['difference']:+.3f} ± {s['difference_se']:.3f}"]
        lines.append(f"| {row['lambda']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def grid(prompts: Sequence[str], seed: int, lambdas: Sequence[float], folder: Path, rows: int = 8) -> Image.Image:
    """The first prompts, one a row, at every lambda, one a column, all with the same seed."""
    size, margin = 256, 22
    shown = list(prompts)[:rows]
    canvas = Image.new("RGB", (size * len(lambdas), margin + (size + margin) * len(shown)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, lam in enumerate(lambdas):
        pen.text((column * size + 6, 5), f"lambda {lam:g}", fill="black")
        for line in range(len(shown)):
            picture = Image.open(folder / Job(line, seed, lam).file).convert("RGB")
            scale = min(size / picture.width, size / picture.height)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            canvas.paste(picture, (column * size, margin + line * (size + margin)))
    for line, prompt in enumerate(shown):
        pen.text((6, margin + line * (size + margin) + size + 4), prompt[: size * len(lambdas) // 7], fill="black")
    return canvas
