"""Committed generated code is what the protos generate."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_generated_code_equals_a_fresh_generation(tmp_path: pathlib.Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/generate_protos", tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    fresh = {p.name: p.read_bytes() for p in (tmp_path / "plugmesh_proto/v1").iterdir()}
    folder = ROOT / "shared/plugmesh_proto/v1"
    committed = {p.name: p.read_bytes() for p in folder.iterdir() if "_pb2" in p.name and p.is_file()}

    assert len(fresh) >= 21
    assert sorted(committed) == sorted(fresh), "run scripts/generate_protos"
    assert [name for name in fresh if committed[name] != fresh[name]] == [], "run scripts/generate_protos"
