"""Segment files: frames of entries one after another (see `entries`), and what can be read back of them.

A life of the table never appends to a segment of an earlier one, whose end may be torn. A frame that is torn was never answered; it and what lies behind it in
its segment do not count.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import structlog
import xxhash

from plugmesh.errors import DataLoss
from plugmesh_rollout.table.entries import HEADER, MAGIC, Entry, Item, frame, place

log = structlog.get_logger()

_JOIN_BELOW = 1 << 18   # smaller pieces are joined, which is cheaper than a system call for each
_MAX_IOV = 512


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame ends and where its values begin, with what it says."""

    segment: int
    values: int
    end: int
    items: list[Item]


class Journal:
    """Appends to segments of about `segment_bytes`. One thread at a time."""

    def __init__(self, folder: pathlib.Path, *, segment_bytes: int, fsync: bool) -> None:
        self.folder = folder
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._fd = -1
        self._offset = 0
        self.segment = max(self.segments(), default=0)

    def segments(self) -> list[int]:
        return sorted(int(p.stem) for p in self.folder.glob("*.values"))

    def path(self, segment: int) -> pathlib.Path:
        return self.folder / f"{segment:08d}.values"

    def append(self, groups: Sequence[Sequence[Entry]]) -> list[Place]:
        """Each group becomes a frame; returns when all are where the durability wants them. Raises OSError."""
        places: list[Place] = []
        pieces: list[bytes] = []
        for group in groups:
            if self._fd < 0 or self._offset >= self._segment_bytes:
                self._write(pieces)
                pieces = []
                self._next_segment()
            parts, items = frame(group)
            values = self._offset + len(parts[0])
            self._offset += sum(map(len, parts))
            pieces += parts
            places.append(Place(self.segment, values, self._offset, items))
        self._write(pieces)
        self._sync()
        return places

    def _write(self, pieces: Sequence[bytes]) -> None:
        for many in _joined(pieces):
            left = sum(map(len, many))
            while left:
                done = os.writev(self._fd, many)
                left -= done
                if left:  # a signal, or the disk is nearly full
                    many = [b"".join(many)[done:]]

    def _next_segment(self) -> None:
        self.close()
        self.segment += 1
        self._fd = os.open(self.path(self.segment), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._offset = 0
        if self._fsync:
            self.sync_folder()

    def sync_folder(self) -> None:
        """The names of segments are on disk, too."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _sync(self) -> None:
        if self._fsync and self._fd >= 0:
            os.fdatasync(self._fd)

    def sync(self, segments: Iterable[int]) -> None:
        """These segments and their names are on disk, whatever the durability; from any thread."""
        for segment in segments:
            fd = os.open(self.path(segment), os.O_RDONLY)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        self.sync_folder()

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            self._sync()
            os.close(self._fd)
            self._fd = -1

    def replay(self, segment: int, offset: int) -> Iterator[Place]:
        """Every whole frame from there on, in the order in which they were written.

        Raises:
            DataLoss: A segment is missing.
        """
        found = [s for s in self.segments() if s >= segment]
        expected = segment if offset or not found else found[0]
        for s in found:
            if s != expected:
                raise DataLoss(f"segment {expected} of the journal is missing", segment=expected)
            expected += 1
            with self.path(s).open("rb") as file:
                at = offset if s == segment else 0
                size = os.fstat(file.fileno()).st_size
                while (read := _read(file.fileno(), at, s)) is not None:
                    yield read
                    at = read.end
                if at < size:
                    log.warning("rollout.journal_torn", segment=s, offset=at, num_bytes=size - at)


def _read(fd: int, at: int, segment: int) -> Place | None:
    """The frame there; None where the segment ends or what follows is torn."""
    head = os.pread(fd, HEADER.size, at)
    if len(head) < HEADER.size:
        return None
    magic, text_bytes, value_bytes, checksum = HEADER.unpack(head)
    if magic != MAGIC or os.fstat(fd).st_size < at + HEADER.size + text_bytes + value_bytes:
        return None
    text = os.pread(fd, text_bytes, at + HEADER.size)
    if xxhash.xxh3_64_digest(text) != checksum:
        return None
    items: list[Item] = json.loads(text)
    values = position = at + HEADER.size + text_bytes
    for item in items:
        length, wanted = place(item)
        if length and xxhash.xxh3_64_hexdigest(os.pread(fd, length, position)) != wanted:
            return None
        position += length
    return Place(segment, values, position, items)


def _joined(pieces: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The same bytes in few pieces, not more at once than one system call takes."""
    many: list[bytes] = []
    small: list[bytes] = []
    for piece in pieces:
        if len(piece) < _JOIN_BELOW:
            small.append(piece)
            continue
        many += [b"".join(small), piece] if small else [piece]
        small = []
        if len(many) >= _MAX_IOV:
            yield many
            many = []
    if small:
        many.append(b"".join(small))
    if many:
        yield many
