"""Weights in shared memory: one copy for all, gone with the last user, also after kill -9."""

from __future__ import annotations

import gc
import pathlib
import subprocess
import sys
import tempfile
import threading

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh_engine.executors import shared_weights

pytestmark = [
    pytest.mark.skipif(not plugmesh_kernels.available(), reason=f"no native kernels: {plugmesh_kernels.why_not()}"),
    pytest.mark.skipif(not pathlib.Path("/dev/shm").is_dir(), reason="no shared memory in a folder"),
]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="plugmesh-test-") as name:
        yield pathlib.Path(name)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"t{i}": rng.integers(0, 256, n, dtype=np.uint8) for i, n in enumerate((1, 100, 3 << 20, 0, 64))}


def load(folder: pathlib.Path, version: str = "v", seed: int = 0):
    return shared_weights.load(plugmesh_kernels.native(), version, tensors(seed), folder)


def test_two_users_read_one_file_and_the_last_one_removes_it(folder):
    first, how = load(folder)
    second, _ = load(folder)
    assert how == "shared"
    assert len(list(folder.iterdir())) == 1
    for name, data in tensors().items():
        assert np.array_equal(data, first[name])
        assert np.array_equal(data, second[name])
        assert first[name].ctypes.data % 64 == 0 or not len(data)
        assert not first[name].flags.writeable

    view = first["t1"]
    del first
    gc.collect()
    assert len(list(folder.iterdir())) == 1
    del second
    gc.collect()
    assert len(list(folder.iterdir())) == 1  # `view` still uses it
    assert view[0] == tensors()["t1"][0]
    del view
    gc.collect()
    assert list(folder.iterdir()) == []


def test_another_version_gets_a_file_of_its_own(folder):
    one, _ = load(folder, "one", 1)
    two, _ = load(folder, "two", 2)

    assert len(list(folder.iterdir())) == 2
    assert np.array_equal(tensors(1)["t2"], one["t2"])
    assert np.array_equal(tensors(2)["t2"], two["t2"])


def test_a_killed_users_file_is_removed_by_the_next_one(folder):
    code = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import pathlib, numpy as np, plugmesh_kernels
from plugmesh_engine.executors import shared_weights
kept = shared_weights.load(plugmesh_kernels.native(), "old", {{"a": np.ones(100, np.uint8)}}, pathlib.Path({str(folder)!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -9
    (old,) = folder.iterdir()
    _, how = load(folder)

    assert how == "shared"
    assert not old.exists()


def test_a_half_filled_file_is_filled_again(folder):
    kept, _ = load(folder)
    (path,) = folder.iterdir()
    size = path.stat().st_size
    del kept
    gc.collect()
    path.write_bytes(b"x" * (size // 2))
    again, how = load(folder)

    assert how == "shared"
    assert np.array_equal(tensors()["t2"], again["t2"])


def test_many_at_once_end_up_with_the_same_bytes(folder):
    results, errors = [], []

    def one() -> None:
        try:
            for _ in range(5):
                loaded, how = load(folder)
                results.append(how == "shared" and all(np.array_equal(data, loaded[name]) for name, data in tensors().items()))
                del loaded
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert errors == []
    assert results == [True] * 30
    gc.collect()
    assert list(folder.iterdir()) == []


def test_without_room_the_copy_is_private_and_a_large_model_stays_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(shared_weights.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    loaded, how = load(folder)
    assert how == "private"
    assert np.array_equal(tensors()["t2"], loaded["t2"])
    assert list(folder.iterdir()) == []

    monkeypatch.setattr(shared_weights, "_available", lambda: 1 << 20)
    given = tensors()
    loaded, how = shared_weights.load(plugmesh_kernels.native(), "v", given, folder)
    assert how == "mapped"
    assert all(loaded[name] is data for name, data in given.items())
