"""Run by test_triton.py in a process of its own: what this Python's Triton makes of the kernel's every form for GPUs
that are not there. Prints, as JSON, how many forms it understood and what it said of those that it did not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import kernel_cost  # noqa: E402

# from the source to machine code
WHOLE = ("sm_90 77x64 bf16 1.5", "sm_89 300x72 bf16 1.5", "gfx1100 77x64 bf16 1.5")


class Understood(Exception):
    pass


def form(plan) -> tuple:
    """Plans of the same one take the same branches."""
    how, tile = plan.constants
    sizes = (how.D, how.DV, how.ALIGNED, how.PTX)
    branches = [part.value for part in how if part not in sizes]
    whole_width = how.D.value <= tile.BLOCK_D.value
    ptx, resident = how.PTX.value, tile.N.value > 0
    return (*branches, ptx > 0, ptx >= 86, resident, tile.AHEAD.value > 0, tile.SLICED.value, whole_width)


def main() -> None:
    make_ir = ASTSource.make_ir

    def understood(*args, **kwargs):
        make_ir(*args, **kwargs)
        raise Understood

    forms = {form(kernel_cost.read(case)[1]): case for case in kernel_cost.cases()}
    whole = [case for case in kernel_cost.cases() if str(case) in WHOLE]
    said = {}
    for cases, reader in ((forms.values(), understood), (whole, make_ir)):
        ASTSource.make_ir = reader
        for case in cases:
            try:
                kernel_cost.compiled(case)
            except Understood:
                pass
            except Exception as error:
                said[str(case)] = str(error.__cause__ or error)[-300:]
    print(json.dumps({"forms": len(forms), "whole": len(whole), "said": said}))


if __name__ == "__main__":
    main()
