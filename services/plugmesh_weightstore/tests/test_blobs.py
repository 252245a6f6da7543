"""The blob folder: complete or absent, never rewritten, never swept from under a writer."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from plugmesh.errors import DataLoss, NotFound, Unavailable
from plugmesh_weightstore.blobs import Blob, BlobStore


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def test_a_blob_is_named_by_its_content_and_read_only(store: BlobStore) -> None:
    blob = store.put([b"ab", memoryview(b"c"), b""])

    assert blob == Blob(hashlib.sha256(b"abc").hexdigest(), 3)
    path = store.path(blob.sha256)
    assert path.read_bytes() == b"abc" and path.parent.name == blob.sha256[:2]
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list(store.temporary.iterdir()) == []


def test_equal_content_is_kept_once_and_not_rewritten(store: BlobStore) -> None:
    first = store.put([b"same"])
    inode = store.path(first.sha256).stat().st_ino

    assert store.put([b"sa", b"me"]) == first
    assert store.path(first.sha256).stat().st_ino == inode
    assert store.usage() == (1, 4)


def test_a_failing_writer_leaves_nothing(store: BlobStore) -> None:
    def pieces():
        yield b"begin"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        store.put(pieces())

    assert store.usage() == (0, 0) and list(store.temporary.iterdir()) == []


def test_names_that_are_no_hashes_reach_no_file(store: BlobStore) -> None:
    for name in ("", "..", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        with pytest.raises(NotFound):
            store.path(name)
    with pytest.raises(NotFound):
        store.open("0" * 64)


def test_damage_is_noticed_when_a_small_blob_is_read(store: BlobStore) -> None:
    blob = store.put([b"hello"])
    os.chmod(store.path(blob.sha256), 0o644)
    store.path(blob.sha256).write_bytes(b"hellx")

    with pytest.raises(DataLoss):
        store.read(blob.sha256, 5)


def test_a_sweep_takes_what_nobody_refers_to_and_waits_for_writers(store: BlobStore) -> None:
    keep, orphan = store.put([b"keep"]), store.put([b"orphan"])
    (store.temporary / "left-over").write_bytes(b"x")
    entered, leave = threading.Event(), threading.Event()

    def write() -> None:
        with store.writing():
            entered.set()
            leave.wait(30)

    writer = threading.Thread(target=write)
    writer.start()
    assert entered.wait(30)
    try:
        with store.writing(timeout_s=0):
            pass  # writers do not exclude each other
        with pytest.raises(Unavailable), store.sweeping(timeout_s=0.05):
            pass
    finally:
        leave.set()
        writer.join(30)
    with store.sweeping(timeout_s=5):
        assert store.sweep({keep.sha256}) == (1, 6)

    assert store.has(keep.sha256, 4) and not store.has(orphan.sha256, 6)
    assert list(store.temporary.iterdir()) == []


def test_readers_keep_what_a_sweep_unlinks(store: BlobStore) -> None:
    blob = store.put([b"mapped"])
    fd = store.open(blob.sha256)
    with store.sweeping(timeout_s=5):
        store.sweep(set())

    assert os.pread(fd, 6, 0) == b"mapped"
    os.close(fd)
