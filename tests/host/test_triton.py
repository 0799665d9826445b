"""The fused kernel in the Triton of the host's torch, which knows less than the newest. It needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this torch comes without Triton")


def test_every_form_compiles():
    program = Path(__file__).with_name("triton_on_no_gpu.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-W", "ignore", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["said"] == {}
    assert found["forms"] > 20 and found["whole"] == 3
