"""What PLADIS did in a sampling run: counted per layer and step, said once at its end in the log and on the node.

A run in which PLADIS should act and reaches nothing ends in its first step with an error. Nothing here waits for the
device or evaluates anything.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from .models.layers import Layer, layer_names
from .models.target import Target
from .running import ModelCall
from .settings import Settings
from .suspects import advice

LOGGER = logging.getLogger(__name__)
# more layers than this are counted, not named
NAMED = 8


@dataclass(frozen=True)
class Applied:
    """What one Apply node asks for, and the node on which to report."""

    settings: Settings
    node: str | None = None


@dataclass
class Step:
    """One step of the sampler: its model calls, which Apply nodes were on in them, and what became of their layers."""

    calls: int = 0
    # evaluations of the network that no wrapper of ours saw
    past: int = 0
    on: set[int] = field(default_factory=set)
    # those whose window holds it, with their prompts or without
    due: set[int] = field(default_factory=set)
    reached: set[Layer] = field(default_factory=set)
    # their blocks ran, but their attention went past PLADIS
    missed: set[Layer] = field(default_factory=set)

    @property
    def ran(self) -> set[Layer]:
        return self.reached | self.missed


# what a step can be for an Apply node, and the words for it
KINDS = {
    "whole": "",
    "lost": "in which something went past it",
    "part": "answered from a cache in part",
    "cached": "answered from a cache",
    "prompt": "without its prompt",
    "outside": "outside its range",
}


def _kind(step: Step, i: int, layers: frozenset[Layer], ever: Set[Layer]) -> str:
    """What a step was for the Apply node at place `i`; `ever` are those of its layers that were reached in the run and
    that this step's expert has."""
    reached = step.reached & layers
    # of a layer that is never reached the words tell by its name
    if step.past or step.missed & layers & (ever or layers):
        return "lost"
    if reached:
        return "whole" if ever <= reached else "part"
    # LazyCache answers a step before any model call
    if i in step.on or not step.calls:
        return "cached"
    return "prompt" if i in step.due else "outside"


class Receipt:
    """Of one sampling run; model calls on several devices come from several threads.

    `suspects` gives the names of packs that took hold of the model, for messages. `knows_steps`: somebody tells when a
    step of the sampler is done.
    """

    def __init__(
        self, applied: Sequence[Applied], target: Target, suspects: Callable[[], Sequence[str]],
        knows_steps: bool = True,
    ):  # fmt: skip
        self.knows_steps = knows_steps
        self._applied, self._target, self._suspects = applied, target, suspects
        self._lock = threading.Lock()
        self._steps: list[Step] = []
        self._step = self._calls = Step()
        self._seen: set[Layer] = set()

    def add(self, call: ModelCall | None, on: Sequence[int] = (), due: Sequence[int] = ()) -> None:
        """A model call has ended; `on` are the places of the Apply nodes that were on in it, `due` of those whose
        window held it.

        Raises:
            RuntimeError: PLADIS was on, and has reached none of a node's layers in this run.
        """
        with self._lock:
            step = self._step
            step.calls += 1
            step.on.update(on)
            step.due.update(due)
            if call is None:
                return
            step.reached |= call.reached
            step.missed |= call.ran - call.reached
            self._seen |= call.reached
            for i in on:
                layers = self._applied[i].settings.layers & call.active.keys()
                layers = self._target.expected(layers, call.ran | call.reached)
                if layers and not layers & self._seen:
                    raise RuntimeError(self._nothing(layers))

    def went_past(self) -> None:
        """The network was evaluated without a model call of ours."""
        with self._lock:
            self._step.past += 1

    def end_step(self) -> None:
        """The sampler is done with a step. One without an evaluation was answered from a cache.

        Raises:
            RuntimeError: it evaluated the network past PLADIS alone, and so did every step before.
        """
        with self._lock:
            step = self._step
            self._steps.append(step)
            self._step = Step()
            due = {layer for a in self._applied if a.settings.is_due_at_first for layer in a.settings.layers}
            if step.past and not step.calls and due and not self._seen:
                raise RuntimeError(self._nothing(due))

    def finish(self) -> list[tuple[str | None, str]]:
        """Says it in the log. Returns every node's words, which take the place of the last run's."""
        self._close()
        said = []
        for i, applied in enumerate(self._applied):
            if not applied.settings.layers:
                words = "replaced by an Apply node behind this one"
            elif applied.settings.is_off:
                words = f"off, {applied.settings.describe()}"
                LOGGER.info("PLADIS: %s", words)
            else:
                words, complete = self._words(i)
                LOGGER.log(logging.INFO if complete else logging.WARNING, "PLADIS: %s", words)
            said.append((applied.node, words))
        return said

    def _close(self) -> None:
        """What came after the last step that the sampler told of."""
        rest, self._step = self._step, Step()
        if not (rest.calls or rest.past) or not self._steps:
            self._calls = rest
            return
        first = self._steps[0]
        if not (first.calls or first.past):
            # a sampler that tells before it evaluates
            self._steps = [*self._steps[1:], rest]
            return
        # a second evaluation of the last step
        last = self._steps[-1]
        last.past += rest.past
        for name in ("on", "due", "reached", "missed"):
            getattr(last, name).update(getattr(rest, name))

    def _words(self, i: int) -> tuple[str, bool]:
        """`70 of 70 text layers in 20 of 20 steps, lambda 2, alpha 1.5`, and whether all that ought to run did."""
        settings, layers = self._applied[i].settings, self._applied[i].settings.layers
        steps = self._steps or [self._calls]
        ever = {layer for step in steps for layer in step.reached} & layers
        expected = self._target.expected
        kinds = [_kind(step, i, layers, expected(ever, step.ran)) for step in steps]
        count = {kind: kinds.count(kind) for kind in KINDS}
        total, unit = (len(steps), "steps") if self._steps else (self._calls.calls, "model calls")
        whole = count["whole"] if self._steps else total * count["whole"]
        chosen = "text layers" if len(layers) == len(self._target.layers) else "chosen text layers"
        what = f"{len(ever)} of {len(layers)} {chosen}" if self._target.family else "text attention by its shape"
        words = f"{what} in {whole} of {total} {unit}, {settings.describe()}"
        for kind, meaning in KINDS.items():
            if meaning and count[kind]:
                at_zero = " or at scale 0" if kind == "outside" and settings.schedule != "constant" else ""
                words += f"; {count[kind]} {meaning}{at_zero}"
        if count["outside"] + count["prompt"] == len(steps):
            return words + settings.why_it_did_nothing(bool(count["prompt"])), False
        missed = {layer for step in steps for layer in step.missed} & layers
        due = expected(layers, {layer for step in steps for layer in step.ran})
        if idle := len(layers - due):
            words += f"; {idle} of an expert that did not run"
        missing = (due - ever) | missed if ever else set()
        if missing:
            words += f". Not reached: {self._names(missing)}"
        # a cache has nothing to answer from before the first evaluation
        complete = not missing and not count["lost"] and bool(ever or not count["cached"])
        return words if complete else words + self._blame(), complete

    def _nothing(self, layers: set[Layer]) -> str:
        return (
            f"PLADIS reached none of its {len(layers)} text layers ({self._names(layers)}), so the picture would be as "
            f"without it: something else computes their attention{self._blame()}"
        )

    def _blame(self) -> str:
        packs = self._suspects()
        if not packs:
            return ". Remove nodes between Apply PLADIS and the sampler to find out which, or remove Apply PLADIS."
        ways = list(dict.fromkeys(way for pack in packs if (way := advice(pack))))
        likely = f". Likely {' or '.join(packs)}, which took hold of this model. "
        return likely + (" ".join(ways) if ways else "Remove its node, or Apply PLADIS.")

    def _names(self, layers: set[Layer]) -> str:
        every = self._target.layers
        names = [name for layer, name in zip(every, layer_names(every), strict=True) if layer in layers]
        return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def show_on_node(node: str, words: str) -> None:
    """The words on the node, in the browser that queued the run (web/pladis_receipt.js)."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    # without a client they would go to every browser, on whatever node has this id there
    if server is not None and server.client_id is not None:
        # of several samplers in a run all are shown
        told = {"node": node, "text": words, "run": getattr(server, "last_prompt_id", None)}
        server.send_sync("pladis.receipt", told, server.client_id)
