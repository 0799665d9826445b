"""Which prompt each row of a batch belongs to, and how many tokens that prompt really has.

ComfyUI computes several conditionings in one batch. Where their contexts differ in length it repeats each up to the
least common multiple (comfy/conds.py, CONDCrossAttn.concat: "padding with repeat doesn't change result"). Softmax does
not notice; entmax does, by about a fifth. So PLADIS reads each prompt's own length before the host batches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TABLE_KEY = "pladis_conditioning"
GUIDER_KEY = "pladis_guider"
# what model families call the tokens of a prompt (Stable Cascade: the second)
CONTEXT_KEYS = ("c_crossattn", "clip_text")
# relative to the largest entry: projections of equal tokens may differ in the last bits, other tokens do by far more
REPEAT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class GuiderConds:
    """The guider's conditionings by name. An object, because the host copies every dict in transformer_options."""

    conds: Mapping[str, list[dict[str, Any]] | None]


@dataclass(frozen=True)
class ConditioningTable:
    """What one `calc_cond_batch` call says about its conditionings, by their index in that call."""

    roles: dict[int, str]
    # rows of each conditioning
    rows: int
    # an area conditioning and its counterpart on the other side share a uuid, so a uuid alone does not identify one
    lengths: dict[tuple[int, Any], int]


@dataclass(frozen=True)
class Chunk:
    """An equal share of the rows of one model call: one conditioning."""

    role: str
    length: int | None


def read_conditioning(conds: list[list[dict] | None], rows: int, guider: GuiderConds | None) -> ConditioningTable:
    """The table of a `calc_cond_batch(model, conds, x_in, ...)` call; `rows` is x_in's batch."""
    roles, lengths = {}, {}
    for index, group in enumerate(conds):
        if group is None:
            continue
        roles[index] = _role(group, index, guider)
        for cond in group:
            context = next((c for key in CONTEXT_KEYS if (c := cond["model_conds"].get(key)) is not None), None)
            if context is not None:
                lengths[index, cond["uuid"]] = context.cond.shape[1]
    return ConditioningTable(roles, rows, lengths)


def usual_role(index: int) -> str:
    """The role of a conditioning by its index in the host's own sampling_function; only where nothing else tells it."""
    return "negative" if index == 1 else "positive"


def _role(group: list[dict], index: int, guider: GuiderConds | None) -> str:
    """The guider's word decides "negative"; all else is "positive". Position does not: DualCFG puts negative first."""
    if guider is None:
        return usual_role(index)
    uuids = {cond["uuid"] for cond in group}
    named = [(name, conds) for name, conds in guider.conds.items() if conds is not None]
    tests = (
        lambda conds: conds is group,
        lambda conds: {cond["uuid"] for cond in conds} == uuids,
        lambda conds: {cond["uuid"] for cond in conds} >= uuids,
    )
    for test in tests:
        for name, conds in named:
            if test(conds):
                return "negative" if "negative" in name else "positive"
    return usual_role(index)


def batch_chunks(transformer_options: dict[str, Any], rows: int) -> tuple[Chunk, ...]:
    """The conditionings of a model call with `rows` rows, in their order; empty where that cannot be told.

    The host gives every conditioning the rows of the sampler's batch. A function wrapper may call the model with
    others: tiled diffusion packs put several tiles into one batch, tile by tile, under the same transformer_options.
    """
    table: ConditioningTable | None = transformer_options.get(TABLE_KEY)
    indices = transformer_options.get("cond_or_uncond", [0])
    uuids = transformer_options.get("uuids", [])
    if table is None or rows != table.rows * len(indices) or len(uuids) != len(indices):
        return ()
    if not table.roles.keys() >= set(indices):
        return ()
    return tuple(
        Chunk(table.roles[index], table.lengths.get((index, uuid)))
        for index, uuid in zip(indices, uuids, strict=True)
    )


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
