"""Finished work in files: a run that was stopped goes on, and no figure is taken for another's."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import demo

# what a picture and its reading depend on, besides weights, settings and captions
SOURCES = (
    *(Path(demo.__file__).parent / f"{name}.py" for name in
      ("config", "model", "oracle", "sampling", "scenes", "vocabulary")),
    *(Path(__file__).parent / f"{name}.py" for name in ("attention", "pictures")),
)  # fmt: skip


class Store:
    """A folder with one file for each finished piece of work, named by a hash of all that it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: dict[str, Any]) -> Any | None:
        """What was kept under the key, None where nothing was."""
        file = self._file(key)
        return json.loads(file.read_text(encoding="utf-8"))["value"] if file.exists() else None

    def keep(self, key: dict[str, Any], value: Any) -> None:
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
        fresh.replace(file)

    def take(self, key: dict[str, Any], make: Callable[[], Any]) -> Any:
        """What is kept under the key, made now if it is not there."""
        if self.get(key) is None:
            self.keep(key, make())
        return self.get(key)

    def _file(self, key: dict[str, Any]) -> Path:
        whole = json.dumps([key, code()], sort_keys=True)
        return self.folder / str(key["model"]) / f"{hashlib.sha256(whole.encode()).hexdigest()[:20]}.json"


@cache
def code() -> str:
    """Hash of the code in SOURCES; of what it does, not of its comments and layout."""
    return hashlib.sha256("".join(meaning(file.read_text(encoding="utf-8")) for file in SOURCES).encode()).hexdigest()


def meaning(source: str) -> str:
    """A program without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
