"""docs/request.md follows a request by `file:function`; each of them must exist."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEP = re.compile(r"`((?:shared|services|plugins)/[\w/]+\.py):([\w.]+)`")


def names_in(path: pathlib.Path) -> set[str]:
    """Functions, methods and classes of a file as `name` and `Class.name`."""
    found: set[str] = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")
    walk(ast.parse(path.read_text()), "")
    return found


def test_every_step_of_the_request_page_exists():
    steps = STEP.findall((ROOT / "docs" / "request.md").read_text())

    assert len(steps) >= 20
    missing = [f"{file}:{name}" for file, name in steps if not (ROOT / file).is_file() or name not in names_in(ROOT / file)]
    assert [] == missing


def test_the_page_visits_every_service():
    text = (ROOT / "docs" / "request.md").read_text()
    for service in ("gateway", "tokenizer", "grammar", "prefill", "decode", "kvstore", "weightstore"):
        assert f"services/plugmesh_{service}/" in text
