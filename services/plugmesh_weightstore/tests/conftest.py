"""Small model files and real databases (SQLite and PostgreSQL)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plugmesh.testing.databases import database_url, postgres_server, postgres_url  # noqa: F401 - fixtures
from plugmesh_weightstore.testing import write_gguf, write_hf


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """`make_gguf("Q4_1", seed=0, ...)` writes a model into the test's folder; see `write_gguf`."""
    return lambda dtype="Q4_1", seed=0, **kwargs: write_gguf(tmp_path / f"{dtype}-{seed}.gguf", dtype, seed=seed, **kwargs)


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., Path]:
    """`make_hf(shards=2, ...)` writes a folder into the test's folder; see `write_hf`."""
    return lambda name="tiny-hf", **kwargs: write_hf(tmp_path / name, **kwargs)
