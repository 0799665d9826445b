"""What a launch of the fused kernel costs the CPU, without a GPU: Triton compiles, and a driver of the test's notes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this system")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("launch_on_no_gpu.py")
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_second_launch_is_told_what_the_first_was(found):
    assert found["same"] and found["output"]


def test_a_layout_or_alignment_that_is_new_goes_through_triton_once(found):
    assert found["calls"] == {
        "again": 0, "new tensors": 0, "more queries": 1, "more heads": 1, "misaligned": 1, "misaligned again": 0,
    }  # fmt: skip


def test_it_costs_the_cpu_a_fraction(found):
    direct, through_triton, whole = found["functions called"]
    assert direct < 0.25 * through_triton
    # with everything around it
    assert whole < 0.5 * through_triton
