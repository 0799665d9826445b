"""What other nodes' patches do to the two streams of a transformer between its input and its blocks.

ComfyUI's `post_input` patches (comfy/ldm/flux/model.py and others) may put tokens into the text stream, before or
behind the prompt's (USOStyleReference), or take some off the image stream (FluxKVCache). Two patches of ours, one
before and one after all others, see how long the streams are and where the prompt went. A patch that keeps the length
is taken to keep the places.
"""

from __future__ import annotations

from typing import Any

import torch

from ..models.spans import Inserted

PATCH = "post_input"


class StreamProbe:
    """Of one model call. `inserted` is what its patches put in."""

    def __init__(self):
        self.inserted = Inserted()
        self._before: dict[str, torch.Tensor] = {}

    def between(self, transformer_options: dict[str, Any]) -> dict[str, Any]:
        """A copy of transformer_options with the probe around the patches of other nodes; as it is, without any."""
        patches = transformer_options.get("patches", {})
        if not patches.get(PATCH):
            return transformer_options
        around = [self._see_before, *patches[PATCH], self._see_after]
        return {**transformer_options, "patches": {**patches, PATCH: around}}

    def _see_before(self, streams: dict[str, Any]) -> dict[str, Any]:
        self._before = {name: streams[name] for name in ("txt", "img") if isinstance(streams.get(name), torch.Tensor)}
        return streams

    def _see_after(self, streams: dict[str, Any]) -> dict[str, Any]:
        changes = {name: _change(name, before, streams[name]) for name, before in self._before.items()}
        self._before = {}
        text, image = changes.get("txt", (0, 0)), changes.get("img", (0, 0))
        removed = -min(image[1], 0)
        self.inserted = Inserted(text, (image[0], max(image[1], 0)), removed)
        return streams


def _change(name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    """How many tokens were put in front of and behind a stream (B, L, C); (0, -n) where n were taken off its end.

    Where the old stream is in the new is told by its content, which costs a synchronisation, and only where the length
    changed.

    Raises:
        RuntimeError: the old stream is not in one piece in the new.
    """
    old, new = before.shape[1], after.shape[1]
    if new == old:
        return 0, 0
    short, long = (before, after) if new > old else (after, before)
    length = min(old, new)
    # another node's patch may work in place, on rows of a batch that it enlarged, or not
    if short.shape[::2] == long.shape[::2]:
        starts = range(abs(new - old) + 1) if new > old else (0,)
        equal = torch.stack([(long[:, start : start + length] == short).all() for start in starts]).tolist()
        if True in equal:
            start = equal.index(True)
            return (start, new - old - start) if new > old else (0, new - old)
    stream = "text" if name == "txt" else "image"
    raise RuntimeError(
        f"PLADIS: another node's patch made {new} tokens of the {old} of the {stream}, and the {old} are not among "
        "them in one piece, so which tokens are the prompt's cannot be told. Remove that node or Apply PLADIS."
    )
