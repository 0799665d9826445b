"""The types in the comments of web/, checked by TypeScript, which Deno brings: no npm, and nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

WEB = Path(__file__).parents[2] / "web"
HOST = Path(__file__).with_name("comfyui.d.ts")


def check(folder: Path, files: list[Path], cache: Path) -> subprocess.CompletedProcess:
    deno = pytest.importorskip("deno", reason='no TypeScript: pip install -e ".[web]"')
    scripts = {(folder / "../../scripts" / name).resolve().as_uri(): HOST.as_uri() for name in ("app.js", "api.js")}
    options = {"checkJs": True, "strict": False, "lib": ["esnext", "dom", "dom.iterable"]}
    config = cache / "deno.json"
    config.write_text(json.dumps({"compilerOptions": options, "imports": scripts}), encoding="utf-8")
    return subprocess.run(
        [deno.find_deno_bin(), "check", "--no-lock", "--no-remote", "--config", config, *files],
        env={**os.environ, "DENO_DIR": str(cache), "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )


def test_the_types_of_the_front_end(tmp_path):
    result = check(WEB, sorted(WEB.glob("*.js")), tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_wrong_type_is_found(tmp_path):
    """Else the test above would say nothing."""
    wrong = tmp_path / "wrong.js"
    layout = f"import({json.dumps((WEB / 'pladis_blocks.js').as_uri())}).Layout"
    wrong.write_text(f"/** @type {{{layout}}} */\nexport const layout = 'd0';\n", encoding="utf-8")
    result = check(WEB, [wrong], tmp_path)
    assert result.returncode != 0 and "TS2322" in result.stderr, result.stderr
