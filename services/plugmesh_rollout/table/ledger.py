"""What survives the process: a journal of every change, and SQL tables that say what it amounts to.

Every change is a list of entries that become durable together, in the order in which they were appended. A thread takes all that wait, writes them to the current
segment file of the journal, and then tells those who wait (group commit). Another thread brings the SQL tables up to date afterwards, with the place in the journal
up to which they are, in one transaction; a row that came and went meanwhile costs next to nothing there. A start reads the rest of the journal again.

Values stay in the journal, and the tables point at them: a segment is removed when nothing points at it and the tables are beyond it.

| durability | an answer waits for | lost by kill -9 of the service | lost by a power cut |
|---|---|---|---|
| commit | fsync of the journal | nothing that was answered | nothing that was answered |
| batch | the operating system's cache | nothing that was answered | what the system had not written yet; the rest stays consistent |
| none | (there is no ledger) | everything | everything |

Leases are not written: a restart ends them, see `Topic.ack`.
"""

from __future__ import annotations

import asyncio
import fcntl
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

import structlog

from plugmesh.errors import ConfigError, Unavailable
from plugmesh_rollout.table.entries import Entry
from plugmesh_rollout.table.index import Index, SavedTopic
from plugmesh_rollout.table.journal import Journal, Place

log = structlog.get_logger()

_MAX_BEHIND = 1 << 17  # changes that are in the journal and not in the tables yet; writing waits then
Durability = Literal["commit", "batch", "none"]


class Ledger:
    """One folder, one process (a lock keeps others out). Made and loaded in a thread; `append` and `committed` belong to one event loop.

    Raises:
        ConfigError: The folder is in use, or holds a ledger of another schema.
    """

    def __init__(self, folder: pathlib.Path, durability: Durability = "commit", *, segment_bytes: int = 64 << 20, apply_s: float = 0.5) -> None:
        self.folder = folder
        self._apply_s = apply_s
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()
            raise ConfigError(f"another process uses the ledger in {folder}", key="services.rollout.ledger_dir") from e
        self._index = Index(folder / "ledger.sqlite")
        self._journal = Journal(folder, segment_bytes=segment_bytes, fsync=durability == "commit")
        self._journal.segment = max(self._journal.segment, self._index.position[0] - 1)
        self._known = set(self._journal.segments())
        lock = threading.Lock()
        self._to_write = threading.Condition(lock)
        self._to_apply = threading.Condition(lock)
        self._queue: list[tuple[int, Sequence[Entry]]] = []
        self._behind: list[Place] = []  # written, not in the tables yet
        self._num_behind = 0
        self._appended = 0
        self._committed = 0
        self._written = 0
        self._in_tables = 0
        self._writer_ended = False
        self._hurry = False
        self._closing = False
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.num_commits = 0

    # -- a former life --------------------------------------------------------------------------------------------------

    def load(self) -> list[SavedTopic]:
        """Everything that was committed; removes segments that nothing points at. Call it once, before `start`.

        Raises:
            DataLoss: A value does not fit its checksum, or its file is missing; names the topic and row.
        """
        segment, offset = self._index.position
        frames: list[Place] = []
        for frame in self._journal.replay(segment, offset):
            frames.append(frame)
            if len(frames) >= 4096:
                self._apply(frames)
                frames = []
        self._apply(frames)
        self._index.apply([], (self._journal.segment + 1, 0))  # a torn end is never looked at again
        found = self._index.load(self._journal.path)
        self._remove_segments()
        return found

    # -- the event loop's side ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts writing, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        for name, work in (("rollout-journal", self._write), ("rollout-tables", self._bring_up_to_date)):
            thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def append(self, entries: Sequence[Entry]) -> int:
        """Queues entries that belong together; returns the number to wait for with `committed`. Raises Unavailable after a failure."""
        self._check()
        if not entries:
            return self._appended
        with self._to_write:
            self._appended += 1
            self._queue.append((self._appended, entries))
            self._to_write.notify()
        return self._appended

    @property
    def num_waiting(self) -> int:
        """Appended and not yet committed."""
        return self._appended - self._committed

    async def committed(self, number: int) -> None:
        """Returns when everything up to `number` is durable. Raises Unavailable when writing failed: the process must be started anew."""
        self._check()
        if self._committed < number:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((number, future))
            await future

    async def in_tables(self, number: int) -> None:
        """Returns when the SQL tables have everything up to `number`; makes them hurry. Raises as `committed`."""
        while self._in_tables < number:
            self._check()
            with self._to_apply:
                self._hurry = True
                self._to_apply.notify()
            await asyncio.sleep(0.005)

    def _check(self) -> None:
        if self._failure is not None:
            raise Unavailable("the table's ledger cannot be written", retry_after_s=5.0)

    def _told(self, number: int, failure: BaseException | None) -> None:
        self._committed = max(self._committed, number)
        if failure is not None:
            self._failure = failure
        still = []
        for wanted, future in self._waiting:
            if future.done():
                continue
            if failure is not None:
                future.set_exception(Unavailable("the table's ledger cannot be written", retry_after_s=5.0))
            elif wanted <= self._committed:
                future.set_result(None)
            else:
                still.append((wanted, future))
        self._waiting = still

    def close(self) -> None:
        """Writes what is queued and ends. Blocks; idempotent."""
        with self._to_write:
            self._closing = True
            self._wake()
        for thread in self._threads:
            thread.join()
        self._threads = []
        self._journal.close()
        if not self._lock.closed:
            self._index.close()
            self._lock.close()

    # -- the threads ----------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as e:
            log.error("rollout.ledger_failed", error=type(e).__name__, exc_info=True)
            with self._to_write:
                self._failure = e
                self._wake()
            self._tell(0, e)

    def _wake(self) -> None:
        self._to_write.notify_all()
        self._to_apply.notify_all()

    def _tell(self, number: int, failure: BaseException | None = None) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._told, number, failure)
        except RuntimeError:
            pass  # the loop has ended; nobody waits

    def _write(self) -> None:
        while True:
            with self._to_write:
                while self._failure is None and ((not self._queue and not self._closing) or self._num_behind > _MAX_BEHIND):
                    self._to_write.wait()
                batch, self._queue = self._queue, []
                if not batch or self._failure is not None:
                    self._writer_ended = True
                    self._to_apply.notify()
                    return
            places = self._journal.append([entries for _, entries in batch])
            self.num_commits += 1
            self._tell(batch[-1][0])
            with self._to_apply:
                self._num_behind += sum(len(p.items) for p in places)
                if not self._behind or self._num_behind > _MAX_BEHIND // 2:
                    self._to_apply.notify()
                self._behind += places
                self._written = batch[-1][0]

    def _bring_up_to_date(self) -> None:
        while True:
            with self._to_apply:
                while not self._behind and not self._writer_ended and self._failure is None:
                    self._to_apply.wait()
                due = time.monotonic() + self._apply_s
                while not (self._hurry or self._closing or self._failure or self._num_behind > _MAX_BEHIND // 2) and (left := due - time.monotonic()) > 0:
                    self._to_apply.wait(left)
                frames, self._behind = self._behind, []
                number, self._hurry = self._written, False
                if self._failure is not None or (not frames and self._writer_ended):
                    return
            self._apply(frames)
            self._remove_segments()
            with self._to_write:
                self._num_behind -= sum(len(p.items) for p in frames)
                self._in_tables = number
                self._to_write.notify()

    def _apply(self, frames: Sequence[Place]) -> None:
        """Values that the tables will point at are on disk first."""
        if not frames:
            return
        self._known |= {f.segment for f in frames}
        self._index.apply(frames, (frames[-1].segment, frames[-1].end), self._journal.sync)

    def _remove_segments(self) -> None:
        for segment in [s for s in self._known if s < self._index.position[0] and s not in self._index.live]:
            self._journal.path(segment).unlink(missing_ok=True)
            self._known.discard(segment)
