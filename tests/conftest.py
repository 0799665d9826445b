"""Makes the pack importable as `pladis_pack`: with the root on sys.path, `nodes` would shadow ComfyUI's."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]

# each of several workers, and the hosts they start, keeps to its own core
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

# before anything imports Triton: its kernels then run on the CPU
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

package = types.ModuleType("pladis_pack")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("pladis_pack", package)

# test_hosts.py starts these for every ComfyUI, tests/host in its own Python
ON_A_HOST = ["host", *(f"web/test_{name}.py" for name in ("nodes", "words", "looks", "workflows", "help"))]
collect_ignore = [] if "PLADIS_HOST" in os.environ else ON_A_HOST
if "PLADIS_HOST" not in os.environ:
    # `demo` and `benchmarks` are run from the root
    sys.path.insert(0, str(ROOT))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "host":
                terminalreporter.write_line(value)
    skipped = [r for r in terminalreporter.getreports("skipped") if "no ComfyUI at" in str(r.longrepr)]
    if "PLADIS_HOST" not in os.environ:
        terminalreporter.write_line(f"{len(skipped)} runs of host tests skipped because no ComfyUI was found for them")
