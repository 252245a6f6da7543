"""The stack for real: images built, containers started, a chat through them, everything removed."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.docker
@pytest.mark.model
@pytest.mark.timeout(3600)
def test_the_stack_serves_a_chat_and_leaves_nothing_behind(tmp_path):
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, ROOT / "compose" / "stack.py", "smoke", "--json", figures], capture_output=True, text=True, timeout=3500, cwd=tmp_path
    )

    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert json.loads(figures.read_text())["first_chat"]["ttft_s"] > 0
