"""Who may import whom (the rooms of the repository)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_core_imports_neither_the_host_nor_an_optional_package():
    code = "import sys, pladis_core; print([m for m in ('comfy', 'nodes', 'entmax', 'triton') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


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
