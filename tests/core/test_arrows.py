"""Who may import whom (the rooms of the repository)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_core_imports_neither_the_host_nor_an_optional_package():
    others = ("comfy", "nodes", "entmax", "triton", "diffusers")
    code = f"import sys, pladis_core; print([m for m in {others} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("missing, module", (("torch", "pladis_core"), ("diffusers", "pladis_core.diffusers")))
def test_what_is_missing_is_said_with_the_way_to_get_it(missing, module):
    code = f"import sys; sys.modules[{missing!r}] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and f'pip install "pladis-comfy[{missing}]"' in last


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_only_hosting_knows_the_hosts_hooks_and_the_core():
    for path in (ROOT / "nodes").glob("*.py"):
        names = imports(path)
        assert not any(name.startswith("comfy.") or "pladis_core" in name for name in names), path


def test_core_never_reaches_out():
    for path in (ROOT / "pladis_core").rglob("*.py"):
        assert not any(name.startswith(("comfy", "nodes", "...")) for name in imports(path)), path


def test_the_demo_model_is_read_by_the_host_and_never_reads_it():
    """ComfyUI gets the demo's plain sizes and words; its weights are built from the host's own classes."""
    for path in (ROOT / "demo").rglob("*.py"):
        assert not any(name.startswith(("comfy", "nodes", "benchmarks")) for name in imports(path)), path
    for path in (ROOT / "nodes").rglob("*.py"):
        read = {name for name in imports(path) if "demo" in name.split(".") and name.startswith("...")}
        assert read <= {"...demo", "...demo.vocabulary"}, path


def test_what_the_host_reads_of_the_demo_needs_neither_diffusers_nor_transformers():
    code = "import sys, demo.config; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"
