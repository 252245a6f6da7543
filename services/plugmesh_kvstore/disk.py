"""The disk tier: segment files of equal slots, mapped for reading, with an index in SQL.

Two halves: `DiskSpace` decides in memory which place is free (owner: the store), `DiskFiles` does the slow work
in the order in which it is asked to (owner: one worker thread).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from plugmesh.errors import ConfigError
from plugmesh.kv.pieces import checksum
from plugmesh.types import KvLayout
from plugmesh_kvstore.blocks import Place
from plugmesh_kvstore.disk_index import DiskIndex, Row, SegmentRow, UnusableIndex

log = structlog.get_logger()


@dataclass(slots=True)
class _Segment:
    layout_key: bytes
    slot_bytes: int
    num_slots: int
    free: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return self.slot_bytes * self.num_slots


@dataclass(slots=True)
class Changes:
    """What the store decided since the last time; `DiskFiles.apply` makes it true before any new bytes are written."""

    forget: list[tuple[bytes, bytes]] = field(default_factory=list)
    add_segments: list[SegmentRow] = field(default_factory=list)
    drop_segments: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.forget or self.add_segments or self.drop_segments)


class DiskSpace:
    """Free places under a cap on the bytes of all segment files. No input or output.

    An emptied segment is dropped, so that another layout can have its bytes.
    """

    def __init__(self, capacity_bytes: int, segment_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes
        self._segments: dict[int, _Segment] = {}
        self._next = 1
        self.allocated_bytes = 0
        self.used_bytes = 0
        self.changes = Changes()

    def adopt(self, segments: Sequence[SegmentRow], places: Sequence[Place]) -> None:
        """State found on disk at start."""
        taken: dict[int, set[int]] = {}
        for place in places:
            taken.setdefault(place.segment, set()).add(place.slot)
        for row in segments:
            used = taken.get(row.segment, set())
            free = [slot for slot in reversed(range(row.num_slots)) if slot not in used]
            segment = self._segments[row.segment] = _Segment(row.layout_key, row.slot_bytes, row.num_slots, free)
            self.allocated_bytes += segment.num_bytes
            self.used_bytes += len(used) * row.slot_bytes
            self._next = max(self._next, row.segment + 1)
            self._drop_if_empty(row.segment)

    def take(self, layout_key: bytes, slot_bytes: int) -> Place | None:
        """A free place, from a new segment when need be; None when the cap forbids one."""
        for number, segment in self._segments.items():
            if segment.layout_key == layout_key and segment.free:
                self.used_bytes += slot_bytes
                return Place(number, segment.free.pop())
        room = min(self._segment_bytes, self.capacity_bytes - self.allocated_bytes)
        num_slots = max(1, room // slot_bytes)
        if self.allocated_bytes + num_slots * slot_bytes > self.capacity_bytes:
            return None
        number = self._next
        self._next += 1
        segment = _Segment(layout_key, slot_bytes, num_slots, list(reversed(range(num_slots))))
        self._segments[number] = segment
        self.allocated_bytes += segment.num_bytes
        self.used_bytes += slot_bytes
        self.changes.add_segments.append(SegmentRow(number, layout_key, slot_bytes, num_slots))
        return Place(number, segment.free.pop())

    def give(self, layout_key: bytes, block_id: bytes, place: Place) -> None:
        segment = self._segments[place.segment]
        segment.free.append(place.slot)
        self.used_bytes -= segment.slot_bytes
        self.changes.forget.append((layout_key, block_id))
        self._drop_if_empty(place.segment)

    def _drop_if_empty(self, number: int) -> None:
        segment = self._segments[number]
        if len(segment.free) == segment.num_slots:
            del self._segments[number]
            self.allocated_bytes -= segment.num_bytes
            self.changes.drop_segments.append(number)

    def take_changes(self) -> Changes:
        """Hands over what `DiskFiles.apply` must do next."""
        changes, self.changes = self.changes, Changes()
        return changes


@dataclass(frozen=True, slots=True)
class Found:
    """What an earlier life left: layouts, segments and blocks, the blocks least recently written first."""

    layouts: dict[bytes, KvLayout]
    segments: list[SegmentRow]
    rows: list[Row]


class DiskFiles:
    """Segment files and index in one folder, locked against a second store. Blocking; one thread at a time.

    Args:
        base: Numbered folders below it, the first that is not in use is taken, so that several stores share a base
            and each finds a cache again after a restart whatever its instance id.
    """

    def __init__(self, base: pathlib.Path) -> None:
        self.path, self._lock_fd = _claim(base)
        self._fds: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._slot_bytes: dict[int, int] = {}
        self._known_layouts: set[bytes] = set()
        self._index = self._open_index()

    def _open_index(self) -> DiskIndex:
        path = self.path / "index.sqlite"
        try:
            return DiskIndex(path)
        except UnusableIndex as e:
            log.warning("kvstore.disk_index_discarded", reason=str(e))
            self._wipe()
            return DiskIndex(path)

    def _wipe(self) -> None:
        for child in self.path.iterdir():
            if child.name != "owner.lock":
                child.unlink()

    def recover(self) -> Found:
        """Opens what is there; rows without a whole segment file behind them are dropped, stray files removed."""
        try:
            layouts, segments, rows = self._index.load()
        except UnusableIndex as e:
            log.warning("kvstore.disk_index_discarded", reason=str(e))
            self._index.close()
            self._wipe()
            self._index = self._open_index()
            layouts, segments, rows = {}, [], []
        good: dict[int, SegmentRow] = {}
        for row in segments:
            path = self._segment_path(row.segment)
            whole = row.layout_key in layouts and row.slot_bytes > 0 and row.num_slots > 0
            if whole and path.is_file() and path.stat().st_size == row.slot_bytes * row.num_slots:
                good[row.segment] = row
                self._open_segment(row, create=False)
        dropped = [row.segment for row in segments if row.segment not in good]
        kept = [r for r in rows if r.place.segment in good and self._sane(r, good[r.place.segment], layouts)]
        kept_keys = {(r.layout_key, r.block_id) for r in kept}
        forget = [key for r in rows if (key := (r.layout_key, r.block_id)) not in kept_keys]
        self._index.change(drop_segments=dropped, forget=forget)
        for path in self.path.glob("segment-*.kv"):
            if path.stem.removeprefix("segment-") not in {f"{n:08d}" for n in good}:
                path.unlink()
        self._known_layouts = set(layouts)
        if dropped or forget:
            log.warning("kvstore.disk_rows_dropped", num_segments=len(dropped), num_blocks=len(forget))
        return Found(layouts, list(good.values()), kept)

    @staticmethod
    def _sane(row: Row, segment: SegmentRow, layouts: dict[bytes, KvLayout]) -> bool:
        layout = layouts[segment.layout_key]
        return (
            row.layout_key == segment.layout_key
            and 0 <= row.place.slot < segment.num_slots
            and 0 < row.num_bytes <= min(segment.slot_bytes, layout.block_bytes)
            and 0 < row.num_tokens <= layout.block_tokens
            and len(row.block_id) == 32
        )

    def apply(self, changes: Changes, layouts: Sequence[KvLayout] = ()) -> None:
        """Makes decisions of `DiskSpace` true: rows first, files after. Raises OSError."""
        new = [x for x in layouts if x.key() not in self._known_layouts]
        dropped = set(changes.drop_segments)
        added = [row for row in changes.add_segments if row.segment not in dropped]
        self._index.change(layouts=new, add_segments=added, drop_segments=changes.drop_segments, forget=changes.forget)
        self._known_layouts.update(x.key() for x in new)
        for number in changes.drop_segments:
            self._close_segment(number)
            self._segment_path(number).unlink(missing_ok=True)
        for row in added:
            self._open_segment(row, create=True)

    def write(self, rows: Sequence[Row], data: Sequence[memoryview]) -> list[bool]:
        """Writes blocks, then their rows. False for a block whose bytes could not be written (disk full, I/O error)."""
        written: list[bool] = []
        for row, view in zip(rows, data, strict=True):
            try:
                offset = row.place.slot * self._slot_bytes[row.place.segment]
                done = 0
                while done < len(view):
                    # pwrite, not the map: a full disk is an error here and SIGBUS there.
                    done += os.pwrite(self._fds[row.place.segment], view[done:], offset + done)
                written.append(True)
            except (OSError, KeyError) as e:
                log.warning("kvstore.disk_write_failed", error=type(e).__name__, segment=row.place.segment)
                written.append(False)
        self._index.change(add=[row for row, ok in zip(rows, written, strict=True) if ok])
        return written

    def read(self, place: Place, into: memoryview, digest: int) -> bool:
        """Copies a block into `into` and says whether the copy fits the checksum."""
        fd, mapped = self._fds.get(place.segment), self._maps.get(place.segment)
        if fd is None or mapped is None:
            return False
        start = place.slot * self._slot_bytes[place.segment]
        if os.fstat(fd).st_size < start + len(into):
            return False  # truncated from outside: touching the map would be SIGBUS
        with memoryview(mapped) as whole, whole[start : start + len(into)] as source:
            into[:] = source
        return checksum(into) == digest

    def _segment_path(self, number: int) -> pathlib.Path:
        return self.path / f"segment-{number:08d}.kv"

    def _open_segment(self, row: SegmentRow, *, create: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        fd = os.open(self._segment_path(row.segment), flags, 0o600)
        if create:
            os.ftruncate(fd, row.slot_bytes * row.num_slots)
        self._fds[row.segment] = fd
        self._maps[row.segment] = mmap.mmap(fd, row.slot_bytes * row.num_slots, prot=mmap.PROT_READ)
        self._slot_bytes[row.segment] = row.slot_bytes

    def _close_segment(self, number: int) -> None:
        mapped, fd = self._maps.pop(number, None), self._fds.pop(number, None)
        if mapped is not None:
            mapped.close()
        if fd is not None:
            os.close(fd)
        self._slot_bytes.pop(number, None)

    def close(self) -> None:
        for number in list(self._fds):
            self._close_segment(number)
        self._index.close()
        os.close(self._lock_fd)




def _claim(base: pathlib.Path) -> tuple[pathlib.Path, int]:
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(64):
        path = base / f"{number:02d}"
        path.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            continue
        return path, fd
    raise ConfigError(f"all 64 disk tiers below {base} are in use", key="services.kvstore.disk_dir")
