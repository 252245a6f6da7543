"""Shared memory for values: an area for each caller on the same host, which it writes what it puts into and has what it gets written into.

Who calls says where in its area things are; nothing there is trusted. Values are copied out before they are looked at, and an area goes when the call that holds it
ends, which it does when its caller dies.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import pathlib
import secrets
from collections.abc import Callable, Sequence

import structlog

from plugmesh.arena import ArenaFolder, default_base
from plugmesh.errors import InvalidRequest, NotFound

log = structlog.get_logger()

MIN_BYTES = 1 << 16
NONCE_BYTES = 64  # the first bytes of an area; values begin behind them


class Area:
    """One caller's memory. The pages are there from the beginning, so a full file system shows when it is made and not as SIGBUS."""

    def __init__(self, path: pathlib.Path, num_bytes: int, nonce: bytes) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self.nonce = nonce
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
            self._map = mmap.mmap(fd, num_bytes)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        self._map[: len(nonce)] = nonce

    def cells(self, spans: Sequence[int]) -> list[bytes]:
        """Copies of the values there. Raises InvalidRequest for what is no part of the area."""
        if len(spans) % 2:
            raise InvalidRequest("a span has an offset and a length", param="spans")
        found = []
        for at, length in zip(spans[::2], spans[1::2], strict=True):
            self._check(at, length)
            found.append(self._map[at : at + length])
        return found

    def window(self, at: int, num_bytes: int) -> Window:
        """A part of it to write into."""
        self._check(at, num_bytes)
        return Window(self._map, at, at + num_bytes)

    def _check(self, at: int, length: int) -> None:
        if length < 0 or (length and not NONCE_BYTES <= at <= self.num_bytes - length):
            raise InvalidRequest(f"bytes {at} to {at + length} are not in an area of {self.num_bytes}", param="spans")

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        self._map.close()


class Window:
    """Takes values one after another, until it is full."""

    def __init__(self, memory: mmap.mmap, at: int, end: int) -> None:
        self._memory = memory
        self._at = at
        self._end = end

    def write(self, cells: Sequence[bytes]) -> list[int] | None:
        """All of a row's values, or none when they do not fit any more: then None."""
        at = self._at
        if at + sum(map(len, cells)) > self._end:
            return None
        spans: list[int] = []
        for cell in cells:
            self._memory[at : at + len(cell)] = cell
            spans += (at, len(cell))
            at += len(cell)
        self._at = at
        return spans


class Areas:
    """All areas of a table, `max_bytes` together; the folder is made with the first.

    Args:
        base: Where the private folder is; None takes the system's shared memory.
    """

    def __init__(self, max_bytes: int, base: Callable[[], pathlib.Path] = lambda: default_base(None)) -> None:
        self._left = max_bytes
        self._base = base
        self._folder: ArenaFolder | None = None
        self._areas: dict[str, Area] = {}

    async def open(self, boot_id: str, num_bytes: int) -> tuple[str, Area] | None:
        """A new area and its name; None for a caller of another host, or where there is no memory to share."""
        num_bytes = min(num_bytes, self._left) // mmap.PAGESIZE * mmap.PAGESIZE
        if not boot_id or boot_id != own_boot_id() or num_bytes < MIN_BYTES:
            return None
        name = secrets.token_hex(8)
        self._left -= num_bytes
        making = None
        try:
            if self._folder is None:
                self._folder = ArenaFolder(self._base())
            # A thread, since the system clears each page: milliseconds in which the table would stand still.
            making = asyncio.create_task(asyncio.to_thread(Area, self._folder.path / f"{name}.values", num_bytes, secrets.token_bytes(16)))
            self._areas[name] = area = await asyncio.shield(making)
        except asyncio.CancelledError:
            if making is not None:
                making.add_done_callback(lambda done: self._unwanted(done, num_bytes))
            raise
        except OSError as e:
            self._left += num_bytes
            if e.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ENOENT):
                raise
            log.warning("rollout.no_shared_memory", error=e.strerror, num_bytes=num_bytes)
            return None
        return name, area

    def _unwanted(self, done: asyncio.Task[Area], num_bytes: int) -> None:
        """Its caller went while it was made."""
        self._left += num_bytes
        if not done.cancelled() and done.exception() is None:
            done.result().close()

    def find(self, name: str) -> Area:
        """Raises NotFound with `param` "area": the caller does without one or asks for another."""
        area = self._areas.get(name)
        if area is None:
            raise NotFound("this shared memory has gone", param="area")
        return area

    def drop(self, name: str) -> None:
        """Idempotent."""
        area = self._areas.pop(name, None)
        if area is not None:
            self._left += area.num_bytes
            area.close()

    @property
    def num_bytes(self) -> int:
        return sum(a.num_bytes for a in self._areas.values())

    def close(self) -> None:
        """Nothing is left of it in the file system; idempotent."""
        for name in list(self._areas):
            self.drop(name)
        if self._folder is not None:
            self._folder.close()
            self._folder = None


def own_boot_id() -> str:
    """Of this kernel; "" where it does not say."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
