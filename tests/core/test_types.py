"""The types of pladis_core, checked by mypy with the settings of pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_types_of_pladis_core():
    pytest.importorskip("mypy", reason='no mypy: pip install -e ".[core]"')
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
