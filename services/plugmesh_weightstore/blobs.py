"""Content-addressed files: `blobs/sha256/ab/<64 hex digits>`, read-only, complete from the moment they have their name.

A blob is written under a temporary name, flushed to disk and renamed. Who writes blobs holds the folder's lock shared
until the catalogue refers to them; who deletes unreferenced ones holds it alone. So a sweep never takes a blob between
its writing and its first reference, and the lock of a killed process is gone with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from plugmesh.errors import DataLoss, FailedPrecondition, NotFound, Unavailable

log = structlog.get_logger()

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob."""

    sha256: str
    num_bytes: int


class BlobStore:
    """The blob folder of one host. Thread-safe; several processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.folder = self.root / "blobs" / "sha256"
        self.temporary = self.root / "tmp"
        for folder in (self.folder, self.temporary):
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)

    def path(self, sha256: str) -> Path:
        """Where a blob is or would be. Raises NotFound for what is not 64 lower-case hex digits."""
        if not _HEX.fullmatch(sha256):
            raise NotFound(f"{sha256[:80]!r} is not a sha256", param="sha256")
        return self.folder / sha256[:2] / sha256

    def has(self, sha256: str, num_bytes: int) -> bool:
        """Whether the blob is there with its full size."""
        try:
            return self.path(sha256).stat().st_size == num_bytes
        except OSError:
            return False

    def put(self, pieces: Iterable[bytes | memoryview]) -> Blob:
        """Stores the concatenation of `pieces`; an equal blob that exists is kept. Call below `writing()`.

        Raises:
            FailedPrecondition: The disk is full.
        """
        digest, num_bytes = hashlib.sha256(), 0
        fd, name = tempfile.mkstemp(dir=self.temporary)
        try:
            for piece in pieces:
                digest.update(piece)
                num_bytes += len(piece)
                view = memoryview(piece)
                while view:
                    view = view[os.write(fd, view) :]
            blob = Blob(digest.hexdigest(), num_bytes)
            if not self.has(blob.sha256, num_bytes):
                os.fsync(fd)
                os.fchmod(fd, 0o444)
                target = self.path(blob.sha256)
                target.parent.mkdir(exist_ok=True)
                os.replace(name, target)
                name = ""
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FailedPrecondition("the disk of the weightstore is full") from e
        finally:
            os.close(fd)
            if name:
                os.unlink(name)
        return blob

    def flush(self, blobs: Iterable[Blob]) -> None:
        """Makes the names of these blobs durable; call once before the catalogue refers to them."""
        for folder in {self.path(b.sha256).parent for b in blobs} | {self.folder}:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def open(self, sha256: str) -> int:
        """A read-only descriptor. Raises NotFound."""
        try:
            return os.open(self.path(sha256), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"there is no blob {sha256}", param="sha256") from None

    def read(self, sha256: str, num_bytes: int) -> bytes:
        """A small blob as a whole, its hash checked. Raises DataLoss."""
        fd = self.open(sha256)
        try:
            data = os.pread(fd, num_bytes, 0)
        finally:
            os.close(fd)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataLoss(f"the blob {sha256} is damaged", sha256=sha256)
        return data

    @contextlib.contextmanager
    def writing(self, timeout_s: float = 60.0) -> Iterator[None]:
        """Held from the first `put` to the commit that refers to it. Raises Unavailable after `timeout_s`."""
        with self._lock(fcntl.LOCK_SH, timeout_s):
            yield

    @contextlib.contextmanager
    def sweeping(self, timeout_s: float) -> Iterator[None]:
        """Held while unreferenced blobs are deleted. Raises Unavailable while somebody writes."""
        with self._lock(fcntl.LOCK_EX, timeout_s):
            yield

    @contextlib.contextmanager
    def _lock(self, kind: int, timeout_s: float) -> Iterator[None]:
        deadline = time.monotonic() + timeout_s
        with (self.root / "blobs.lock").open("a") as f:
            while True:
                try:
                    fcntl.flock(f, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise Unavailable("the blob folder is in use", retry_after_s=5.0) from None
                    time.sleep(0.02)
            yield

    def sweep(self, referenced: set[str]) -> tuple[int, int]:
        """Deletes temporary files and every blob that is not in `referenced`; returns (blobs, bytes). Call below `sweeping()`.

        Maps and descriptors that readers hold stay valid.
        """
        num_blobs = num_bytes = 0
        for path in self.temporary.iterdir():
            path.unlink(missing_ok=True)
        for path in self.folder.glob("??/*"):
            if path.name not in referenced:
                num_bytes += path.stat().st_size
                num_blobs += 1
                path.unlink(missing_ok=True)
        return num_blobs, num_bytes

    def usage(self) -> tuple[int, int]:
        """(blobs, bytes) on disk."""
        sizes = [p.stat().st_size for p in self.folder.glob("??/*")]
        return len(sizes), sum(sizes)
