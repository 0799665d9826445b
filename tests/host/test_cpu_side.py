"""What PLADIS costs the CPU in a layer: a step of a fast GPU waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this system")


def test_a_text_attention_costs_the_cpu_no_more_than_the_hosts_own(tmp_path):
    """With PyTorch's attention on an NVIDIA GPU; views, choices and Triton's launch, all but what the driver does."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    program = Path(__file__).with_name("calls_on_no_gpu.py")
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    of_host, with_pladis = json.loads(result.stdout.splitlines()[-1])
    assert with_pladis <= 1.2 * of_host, (with_pladis, of_host)
