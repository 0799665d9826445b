"""The nodes of the pack, one file per technique."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .apply import PLADISApply
from .apply_advanced import PLADISApplyAdvanced
from .attention_map import PLADISAttentionMap
from .demo_checkpoint import PLADISDemoCheckpoint
from .sweep import PLADISSweep, PLADISSweepCell, PLADISSweepGrid


class PLADISExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            PLADISApply, PLADISApplyAdvanced, PLADISAttentionMap, PLADISDemoCheckpoint, PLADISSweep, PLADISSweepCell,
            PLADISSweepGrid,
        ]  # fmt: skip


async def comfy_entrypoint() -> PLADISExtension:
    return PLADISExtension()
