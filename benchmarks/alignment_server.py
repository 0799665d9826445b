"""The same question on real checkpoints: a workflow, prompts, seeds and settings -> pictures, scores, a table, a grid.

Every picture is one file, written whole; what is there is not made again. So a run that was stopped, crashed or lost
its server goes on with the same command.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from . import comfy_client
from .comfy_client import PATIENCE, ComfyClient

APPLY, ADVANCED = "PLADISApply", "PLADISApplyAdvanced"
# what the simple node amounts to
LIKE_APPLY = {"layers": "all", "blocks": "", "apply_to": "both"}
TEMPERATURE = "PLADISTemperatureControl"
TEMPERATURE_FOLDER = Path(__file__).parent / "temperature_node"
# of Apply PLADIS: the rest is about entmax
TEMPERATURE_INPUTS = (
    "model", "start_percent", "end_percent", "layers", "blocks", "apply_to", "force_unknown", "norm_cap", "tokens",
    "clip", "prompt",
)  # fmt: skip
SEED_INPUTS = ("seed", "noise_seed")
PLACEHOLDER = "{prompt}"
# as ComfyUI's loaders list them, with folders
WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
FOLDERS, ABSOLUTE = re.compile(r"^.*[\\/]"), re.compile(r"/\w|\\\\|[A-Za-z]:[\\/]")
# in the folder of pictures: which servers made them
VERSIONS = "servers.json"
# attempts at a job on a worker that died, and restarts of a worker: Ray's own
RETRIES = 3


@dataclass(frozen=True)
class Setting:
    """What a picture is made with besides its prompt and seed; None: as the workflow has it.

    Lambda 0 is softmax. With a temperature, softmax of that many times the scores takes the place of PLADIS.
    """

    lam: float = 0.0
    tokens: str | None = None
    norm_cap: float | None = None
    temperature: float | None = None
    cfg: float | None = None

    @property
    def key(self) -> str:
        """Of file names: what differs from the workflow."""
        parts = [f"l{self.lam:g}" if self.temperature is None else f"t{self.temperature:g}"]
        parts += [] if self.tokens is None else [self.tokens.replace(" ", "-")]
        parts += [] if self.norm_cap is None else [f"c{self.norm_cap:g}"]
        parts += [] if self.cfg is None else [f"g{self.cfg:g}"]
        return "_".join(parts)

    @property
    def label(self) -> str:
        """`lambda 2, words only, norm_cap 1`, at whatever CFG; of a setting that `Template.whole` gave."""
        parts = ["softmax" if self.lam == 0.0 else f"lambda {self.lam:g}"]
        if self.temperature is not None:
            parts = [f"temperature {self.temperature:g}"]
        parts += [self.tokens] if self.tokens not in (None, "all") else []
        return ", ".join(parts + ([f"norm_cap {self.norm_cap:g}"] if self.norm_cap else []))


@dataclass(frozen=True)
class Job:
    """One picture to be made: number of its prompt, seed, setting."""

    prompt: int
    seed: int
    setting: Setting

    @property
    def file(self) -> str:
        return f"p{self.prompt:04}_s{self.seed}_{self.setting.key}.png"


# a job, its workflow, its name in the server's queue
Task = tuple[Job, dict, str]
Run = Callable[[Sequence[Task]], Iterator[tuple[Job, bytes]]]
Scorer = Callable[[Sequence[str], Sequence[Path]], list[float]]


class Template:
    """A workflow in ComfyUI's API format with places for prompt, seed and setting.

    Args:
        workflow: node id -> {"class_type", "inputs"}, as `Export (API)` writes it.
        node: id or title of the Apply PLADIS node; the only one there is when None.
        cfg_node: id or title of the node whose cfg is varied; the only one that has a number there when None.

    Raises:
        ValueError: not in API format, no such node or more than one, no {prompt} in any text, no seed.
    """

    def __init__(self, workflow: dict, node: str | None = None, cfg_node: str | None = None) -> None:
        nodes = workflow.values() if isinstance(workflow, dict) else [None]
        if not all(isinstance(entry, dict) and {"class_type", "inputs"} <= entry.keys() for entry in nodes):
            raise ValueError("the workflow is not in API format: in ComfyUI, Workflow > Export (API)")
        self.workflow = workflow
        self.apply = self._find_apply(node)
        self.cfg_node = cfg_node
        texts = [value for entry in workflow.values() for value in entry["inputs"].values() if isinstance(value, str)]
        self.seeds = [
            (key, name)
            for key, entry in workflow.items()
            for name in SEED_INPUTS
            if isinstance(entry["inputs"].get(name), int)
        ]
        if not any(PLACEHOLDER in text for text in texts):
            raise ValueError(f"no text of the workflow holds {PLACEHOLDER}: put it where the prompt belongs")
        if not self.seeds:
            raise ValueError(f"no node of the workflow has {' or '.join(SEED_INPUTS)} as a value")

    def _find_apply(self, node: str | None) -> str:
        named, listed = self._named(node, lambda entry: entry["class_type"] in (APPLY, ADVANCED))
        if len(named) != 1:
            asked = "an Apply PLADIS node" if node is None else f"an Apply PLADIS node named {node!r}"
            raise ValueError(f"the workflow must have {asked}, exactly one; it has: {listed}")
        return named[0]

    def _named(self, name: str | None, fits: Callable[[dict], bool]) -> tuple[list[str], str]:
        """The nodes that fit and have this id or title, and all that fit, listed."""
        found = {
            key: entry.get("_meta", {}).get("title", "") for key, entry in self.workflow.items() if fits(entry)
        }
        named = [key for key, title in found.items() if name in (None, key, title)]
        return named, ", ".join(f"{key} ({title})" for key, title in found.items()) or "none"

    def _cfgs(self) -> tuple[list[str], str]:
        def has_a_number(entry: dict) -> bool:
            value = entry["inputs"].get("cfg")
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        return self._named(self.cfg_node, has_a_number)

    def find_cfg(self) -> str:
        """The node whose cfg is varied.

        Raises:
            ValueError: there is none, or several.
        """
        named, listed = self._cfgs()
        if len(named) != 1:
            asked = "a node with cfg as a number" if self.cfg_node is None else f"such a node named {self.cfg_node!r}"
            raise ValueError(
                f"--cfgs needs {asked} (KSampler, CFGGuider, ...), exactly one; the workflow has: {listed}. Name one "
                "with --cfg-node, write the number into the node where it comes by a link, or leave --cfgs out"
            )
        return named[0]

    def own(self) -> dict[str, Any]:
        """What the workflow has where a setting may differ; None where that cannot be told."""
        inputs = self.workflow[self.apply]["inputs"]
        named, _ = self._cfgs()
        own = {
            "tokens": inputs.get("tokens", "all"), "norm_cap": inputs.get("norm_cap", 0.0),
            "cfg": self.workflow[named[0]]["inputs"]["cfg"] if len(named) == 1 else None,
        }  # fmt: skip
        return {name: None if isinstance(value, list) else value for name, value in own.items()}

    def whole(self, setting: Setting) -> Setting:
        """The setting with what it leaves to the workflow; softmax has no tokens to choose."""
        own = self.own()
        names = ("cfg",) if setting.lam == 0.0 and setting.temperature is None else tuple(own)
        return replace(setting, **{name: own[name] for name in names if getattr(setting, name) is None})

    def settings(
        self,
        lambdas: Sequence[float],
        tokens: Sequence[str] = (),
        norm_caps: Sequence[float] = (),
        temperatures: Sequence[float] = (),
        cfgs: Sequence[float] = (),
        product: bool = False,
    ) -> list[Setting]:
        """Softmax, every lambda and every temperature, at every CFG.

        Every lambda is run with the first of tokens and of norm_caps, and with each other one of the two in its place;
        with `product` with each pair of them. Temperatures keep what the workflow has.

        Raises:
            ValueError: the workflow has no one cfg, or a schedule that temperatures cannot follow.
        """
        schedule = self.workflow[self.apply]["inputs"].get("scale_schedule", "constant")
        if temperatures and schedule != "constant":
            raise ValueError(
                f"--temperatures cannot follow scale_schedule {schedule!r} of the workflow: set it to constant there, "
                "or leave --temperatures out"
            )
        if cfgs:
            self.find_cfg()
        own = self.own()

        def named(name: str, values: Sequence) -> list:
            """None is the workflow's own, so that it has one name."""
            return [None if value == own[name] else value for value in values] or [None]

        kinds, caps = named("tokens", tokens), named("norm_cap", norm_caps)
        pairs = [(kind, cap) for kind in kinds for cap in caps if product or kind == kinds[0] or cap == caps[0]]
        arms = [Setting()]
        arms += [Setting(lam, kind, cap) for kind, cap in pairs for lam in lambdas if lam != 0.0]
        arms += [Setting(temperature=t) for t in temperatures]
        return [replace(arm, cfg=cfg) for cfg in named("cfg", cfgs) for arm in arms]

    def filled(self, prompt: str, seed: int, setting: Setting, prefix: str = "pladis") -> dict:
        """The workflow of one picture, saved under names that begin with `prefix`."""
        workflow = copy.deepcopy(self.workflow)
        for entry in workflow.values():
            entry.pop("_meta", None)
            if isinstance(entry["inputs"].get("filename_prefix"), str):
                entry["inputs"]["filename_prefix"] = prefix
        self._set(workflow, setting)
        for entry in workflow.values():
            for name, value in entry["inputs"].items():
                if isinstance(value, str):
                    entry["inputs"][name] = value.replace(PLACEHOLDER, prompt)
        for key, name in self.seeds:
            workflow[key]["inputs"][name] = seed
        return workflow

    def _set(self, workflow: dict, setting: Setting) -> None:
        node = workflow[self.apply]
        if setting.cfg is not None:
            workflow[self.find_cfg()]["inputs"]["cfg"] = setting.cfg
        if setting.temperature is not None:
            node["class_type"] = TEMPERATURE
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name in TEMPERATURE_INPUTS}
            node["inputs"]["temperature"] = setting.temperature
            return
        node["inputs"]["scale"] = setting.lam
        changes = {"tokens": setting.tokens, "norm_cap": setting.norm_cap}
        changes = {name: value for name, value in changes.items() if value is not None}
        if changes and node["class_type"] == APPLY:
            node["class_type"] = ADVANCED
            node["inputs"].update(LIKE_APPLY)
        node["inputs"].update(changes)
        if setting.tokens == "words only" and "clip" not in node["inputs"]:
            _name_texts(workflow, node)

    def public(self) -> dict:
        """The workflow without folders of the machine that it is from."""

        def cut(value: Any) -> Any:
            is_file = isinstance(value, str) and (value.lower().endswith(WEIGHTS) or ABSOLUTE.match(value))
            return FOLDERS.sub("", value) if is_file else value

        return {
            key: {
                "class_type": entry["class_type"],
                "inputs": {name: cut(value) for name, value in entry["inputs"].items()},
            }
            for key, entry in self.workflow.items()
        }

    def models(self) -> list[str]:
        """The files of weights that the workflow loads; of the pack's own model the variant."""
        found = set()
        for entry in self.public().values():
            for value in entry["inputs"].values():
                if isinstance(value, str) and value.lower().endswith(WEIGHTS):
                    found.add(value)
            if entry["class_type"] == "PLADISDemoCheckpoint":
                found.add(f"PLADIS demo model, {entry['inputs']['variant']}")
        return sorted(found)


def _name_texts(workflow: dict, apply: dict) -> None:
    """words only needs what was encoded, and by whom: all texts of the one CLIP that there is."""
    encoders = [
        entry["inputs"]
        for entry in workflow.values()
        if isinstance(entry["inputs"].get("clip"), list) and isinstance(entry["inputs"].get("text"), str)
    ]
    clips = {tuple(inputs["clip"]) for inputs in encoders}
    # else the node says what it misses, where it needs it
    if len(clips) == 1:
        apply["inputs"]["clip"] = list(*clips)
        apply["inputs"]["prompt"] = "\n---\n".join(inputs["text"] for inputs in encoders)


def make_images(
    template: Template,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[Setting],
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
        ValueError: `folder` holds pictures of another workflow or of other prompts, or a server lacks a node.
        WorkflowError, ConnectionError: as `ComfyClient.named_image`; finished pictures stay.
    """
    identity = _identity(template, prompts)
    _claim(folder, identity)
    jobs = [Job(number, seed, setting) for number in range(len(prompts)) for seed in seeds for setting in settings]
    missing = [job for job in jobs if not (folder / job.file).exists()]
    if missing:
        _meet(servers, {job.setting for job in missing}, folder, patience)
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
    return job, template.filled(prompt, job.seed, job.setting, prefix=f"pladis-alignment/{name}"), name


def _identity(template: Template, prompts: Sequence[str]) -> uuid.UUID:
    """Of everything that a picture depends on besides its job."""
    parts = [template.filled(PLACEHOLDER, 0, Setting()), template.apply, list(prompts)]
    # left out where it is not chosen: folders of earlier versions are recognised by the rest
    parts += [] if template.cfg_node is None else [template.find_cfg()]
    return uuid.UUID(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32])


def _meet(servers: Sequence[str], settings: Set[Setting], folder: Path, patience: float) -> None:
    """Before the pictures, which take long: whether every server has the nodes; writes down what servers these are.

    Raises:
        ValueError: one lacks a node or an input.
        ConnectionError: the only one is away.
    """
    met = made_by(folder)
    for server in servers:
        # of several, others do the work of one that is away
        client = ComfyClient(server, patience if len(servers) == 1 else 0.0)
        try:
            if any(setting.temperature is not None for setting in settings) and client.inputs(TEMPERATURE) is None:
                raise ValueError(
                    f"{server} has no node {TEMPERATURE}, which --temperatures needs: link or copy the folder "
                    f"{TEMPERATURE_FOLDER} into custom_nodes there and restart it (ln -s {TEMPERATURE_FOLDER} "
                    "ComfyUI/custom_nodes/), or leave --temperatures out"
                )
            for name in ("tokens", "norm_cap"):
                # the host drops an input that its node does not have, and says nothing
                if any(getattr(s, name) is not None for s in settings) and name not in (client.inputs(ADVANCED) or ()):
                    raise ValueError(f"Apply PLADIS (Advanced) on {server} has no input {name}: update the pack there")
            met.append(client.versions())
        except ConnectionError:
            if len(servers) == 1:
                raise
    unique = [version for i, version in enumerate(met) if version not in met[:i]]
    write_whole(folder / VERSIONS, json.dumps(unique).encode())


def made_by(folder: Path) -> list[dict[str, str]]:
    """What the servers run on that made the pictures; empty for those of an earlier benchmark."""
    file = folder / VERSIONS
    return json.loads(file.read_text()) if file.exists() else []


def _claim(folder: Path, identity: uuid.UUID) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "identity"
    if any(folder.glob("*.png")) and mark.exists() and mark.read_text() != str(identity):
        raise ValueError(
            f"{folder} holds pictures of another workflow, of other prompts or with another --cfg-node: choose "
            "another --out"
        )
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


def measure(
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[Setting],
    folder: Path,
    scorers: Mapping[str, Scorer],
    batch: int = 16,
) -> dict[str, dict[str, list[float]]]:
    """{scorer: {setting's key: one score per prompt and seed}}"""
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in scorers}
    pairs = [(number, seed) for number in range(len(prompts)) for seed in seeds]
    with tqdm(total=len(scorers) * len(settings) * len(pairs), desc="scores", unit="picture") as bar:
        for name, scorer in scorers.items():
            for setting in settings:
                row = scores[name][setting.key] = []
                for start in range(0, len(pairs), batch):
                    chunk = pairs[start : start + batch]
                    files = [folder / Job(number, seed, setting).file for number, seed in chunk]
                    row += scorer([prompts[number] for number, _ in chunk], files)
                    bar.update(len(chunk))
    return scores


def grid(
    prompts: Sequence[str], seed: int, settings: Mapping[str, Setting], folder: Path, rows: int = 8
) -> Image.Image:
    """The first prompts, one a row, with every setting by its label, one a column, all with the same seed."""
    size, margin = 256, 22
    shown = list(prompts)[:rows]
    canvas = Image.new("RGB", (size * len(settings), margin + (size + margin) * len(shown)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (label, setting) in enumerate(settings.items()):
        pen.text((column * size + 6, 5), label, fill="black")
        for line in range(len(shown)):
            picture = Image.open(folder / Job(line, seed, setting).file).convert("RGB")
            scale = min(size / picture.width, size / picture.height)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            canvas.paste(picture, (column * size, margin + line * (size + margin)))
    for line, prompt in enumerate(shown):
        pen.text((6, margin + line * (size + margin) + size + 4), prompt[: size * len(settings) // 7], fill="black")
    return canvas
