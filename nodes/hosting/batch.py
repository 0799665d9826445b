"""Which prompt each row of a batch belongs to, and how many tokens that prompt really has: one rule for every road.

ComfyUI computes several conditionings in one batch. Where their contexts differ in length it repeats each up to the
least common multiple (comfy/conds.py, CONDCrossAttn.concat: "padding with repeat doesn't change result"). Softmax does
not notice; entmax does, by about a fifth. So PLADIS reads each prompt's own length before the host batches it.

The host gives every conditioning as many rows as transformer_options["sigmas"] has, whoever cut the batch before
(sliding windows). Whoever cuts it afterwards (tiles, one conditioning at a time) leaves the rows to be told by their
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch

# what model families call the tokens of a prompt (Stable Cascade: the second)
CONTEXT_KEYS = ("c_crossattn", "clip_text")
# what Attention Couple of ComfyUI-ppm and of prompt-control leave in extra_options
COUPLE_KEYS = ("cond_or_uncond_couple", "cond_or_uncond_hook_couple")
# relative to the largest entry: projections of equal tokens may differ in the last bits, other tokens do by far more
REPEAT_TOLERANCE = 1e-2


class Prompt(NamedTuple):
    """Whose a row is: "positive" or "negative", that prompt's own number of tokens (None: not known), and what these
    are (models/tokens.py; empty: not known, or not asked for)."""

    role: str
    length: int | None
    kinds: str = ""


@dataclass(frozen=True)
class Known:
    """A conditioning that rows may belong to: its place in a `calc_cond_batch` call (None: not known), and its text."""

    prompt: Prompt
    index: int | None
    uuid: Any
    context: torch.Tensor | None


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that are computed alike. `length` is the prompt's own length; None: not known. `kinds` has every
    row's tokens; empty: not known."""

    rows: slice
    length: int | None
    active: bool
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """The batch of one model call: its rows, its context's tokens, and every row's prompt (empty: not to be told).

    `batched`: the rows that the host put together for it, before another pack changed them.
    """

    rows: int
    tokens: int
    prompts: tuple[Prompt, ...] = ()
    batched: int | None = None

    @property
    def roles(self) -> set[str]:
        """Whose rows may be in it."""
        return {prompt.role for prompt in self.prompts} or {"positive", "negative"}

    def segments(self, rows: int, apply_to: str, options: Mapping[str, Any] | None = None) -> Sequence[Segment]:
        """The `rows` of an attention call, as few segments as can be.

        Other packs may have changed the batch in between; where they marked their rows in `options`, these are told.

        Raises:
            RuntimeError: the rows that are `apply_to` cannot be told.
        """
        if rows == self.rows and self.prompts:
            return _cut(self.prompts, apply_to)
        if apply_to == "both":
            return (Segment(slice(0, rows), None, True),)
        couple = next((options[key] for key in COUPLE_KEYS if options.get(key)), None) if options else None
        if couple and rows % len(couple) == 0:
            share = rows // len(couple)
            return _cut(tuple(Prompt(usual_role(index), None) for index in couple for _ in range(share)), apply_to)
        raise RuntimeError(
            "PLADIS: another node (Attention Couple, tiled diffusion, a sampler of its own) rearranged the batch ("
            + (f"{self.batched} rows of ComfyUI's, " if self.batched not in (None, self.rows) else "")
            + f"{self.rows} rows into the model, {rows} in its attention), so which rows are {apply_to} cannot be "
            "told. Set apply_to to both."
        )


@lru_cache(maxsize=64)
def _cut(prompts: tuple[Prompt, ...], apply_to: str) -> tuple[Segment, ...]:
    """Cached: every layer of a model call asks."""
    segments, start = [], 0
    for (length, active), group in groupby(prompts, lambda p: (p.length, apply_to in ("both", p.role))):
        kinds = tuple(prompt.kinds for prompt in group)
        stop = start + len(kinds)
        segments.append(Segment(slice(start, stop), length, active, kinds))
        start = stop
    return tuple(segments)


def usual_role(index: int) -> str:
    """The role of a conditioning by its index in the host's own sampling_function; only where nothing else tells it."""
    return "negative" if index == 1 else "positive"


def read_conditioning(
    groups: Iterable[list[dict] | None], named: Mapping[str, list[dict] | None] | None
) -> tuple[Known, ...]:
    """The conditionings of a `calc_cond_batch(model, groups, ...)` call; `named` are the guider's, by name."""
    return tuple(
        _known(cond, _role(group, index, named), index)
        for index, group in enumerate(groups)
        for cond in group or ()
    )


def read_guider(named: Mapping[str, list[dict] | None]) -> tuple[Known, ...]:
    """The guider's conditionings, for a model call that went past `calc_cond_batch`."""
    return tuple(
        _known(cond, _role_of(name), None)
        for name, group in named.items()
        for cond in group or ()
        if "model_conds" in cond
    )


def _known(cond: dict, role: str, index: int | None) -> Known:
    contexts = (cond["model_conds"].get(key) for key in CONTEXT_KEYS)
    context = next((c.cond for c in contexts if isinstance(getattr(c, "cond", None), torch.Tensor)), None)
    length = None if context is None else context.shape[1]
    return Known(Prompt(role, length), index, cond.get("uuid"), context)


def _role_of(name: str) -> str:
    return "negative" if "negative" in name else "positive"


def _role(group: list[dict] | None, index: int, named: Mapping[str, list[dict] | None] | None) -> str:
    """The guider's word decides "negative"; all else is "positive". Position does not: DualCFG puts negative first."""
    if not named or not group:
        return usual_role(index)
    uuids = {cond.get("uuid") for cond in group}
    others = [(name, conds) for name, conds in named.items() if conds is not None]
    tests = (
        lambda conds: conds is group,
        lambda conds: {cond.get("uuid") for cond in conds} == uuids,
        lambda conds: {cond.get("uuid") for cond in conds} >= uuids,
    )
    for test in tests:
        for name, conds in others:
            if test(conds):
                return _role_of(name)
    return usual_role(index)


def read_batch(
    rows: int, text: torch.Tensor, options: Mapping[str, Any], known: Sequence[Known], wants_roles: bool,
    rearranged: bool,
) -> Batch:  # fmt: skip
    """The batch of a model call with `rows` rows and context `text` (rows, L, C).

    `wants_roles`: somebody must know whose the rows are. `rearranged`: another pack stands between the host's batching
    and this call, and may have changed the order too. Where only the text tells, that costs a synchronisation.
    """
    # SANA's context has a dimension more
    tokens = text.shape[-2] if text.ndim > 2 else text.shape[1]
    chunks, sigmas = _chunks(options, known), options.get("sigmas")
    if len(set(chunks)) == 1:
        return Batch(rows, tokens, chunks[:1] * rows)
    by_text: tuple[Prompt, ...] = ()
    batched = len(chunks) * sigmas.numel() if chunks and isinstance(sigmas, torch.Tensor) else None
    if (rearranged or rows != batched) and (wants_roles or len({k.prompt.length for k in known}) > 1):
        by_text = _told_by_text(rows, text, known)
    if rows == batched and not by_text:
        by_text = tuple(chunk for chunk in chunks for _ in range(rows // len(chunks)))
    return Batch(rows, tokens, by_text, batched)


def _chunks(options: Mapping[str, Any], known: Sequence[Known]) -> tuple[Prompt, ...]:
    """The conditionings of a model call, in their order; empty where one cannot be told."""
    indices, uuids = options.get("cond_or_uncond") or (), options.get("uuids") or ()
    if len(uuids) != len(indices):
        uuids = (None,) * len(indices)
    chunks = []
    for index, uuid in zip(indices, uuids, strict=True):
        # an area conditioning and its counterpart on the other side share a uuid, so a uuid alone does not identify one
        fitting = [k for k in known if k.index in (index, None) and uuid in (k.uuid, None)]
        if len({k.prompt.role for k in fitting}) > 1:
            fitting = [k for k in fitting if k.prompt.role == usual_role(index)]
        if not fitting:
            return ()
        lengths, kinds = {k.prompt.length for k in fitting}, {k.prompt.kinds for k in fitting}
        length = lengths.pop() if len(lengths) == 1 else None
        chunks.append(Prompt(fitting[0].prompt.role, length, kinds.pop() if len(kinds) == 1 else ""))
    return tuple(chunks)


def _told_by_text(rows: int, text: torch.Tensor, known: Sequence[Known]) -> tuple[Prompt, ...]:
    """Every row's prompt by its context; empty where a row has none of the prompts, or those of several roles."""
    candidates = [k for k in known if k.context is not None and k.context.ndim == text.ndim == 3]
    candidates = [k for k in candidates if k.prompt.length and text.shape[1] % k.prompt.length == 0]
    if not candidates or len(text) != rows:
        return ()
    equal = [
        (text[:, : k.prompt.length] == k.context[:1].to(text)).flatten(1).all(1) for k in candidates
    ]
    prompts = []
    for row in torch.stack(equal, 1).tolist():
        fitting = {candidate.prompt for candidate, fits in zip(candidates, row, strict=True) if fits}
        if len(fitting) != 1:
            return ()
        prompts += fitting
    return tuple(prompts)


def repeat_mask(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Additive mask (B, 1, 1, Lk), -inf on the tokens that only repeat earlier ones; for when lengths are not known.

    A row of key and value (B, Lk, C) repeats with period p where every token equals the one p before it; the smallest
    such divisor of Lk counts. On the device, without synchronisation.
    """
    tokens = key.shape[1]
    length = torch.full((key.shape[0],), tokens, device=key.device)
    for period in (p for p in range(tokens // 2, 0, -1) if tokens % p == 0):
        repeats = _repeats(key, period) & _repeats(value, period)
        length = torch.where(repeats, period, length)
    extra = torch.arange(tokens, device=key.device) >= length[:, None]
    mask = torch.zeros(extra.shape, dtype=torch.float32, device=key.device).masked_fill_(extra, -torch.inf)
    return mask[:, None, None]


def _repeats(tensor: torch.Tensor, period: int) -> torch.Tensor:
    change = (tensor[:, period:] - tensor[:, :-period]).abs().amax((1, 2))
    return change <= REPEAT_TOLERANCE * tensor.abs().amax((1, 2))
