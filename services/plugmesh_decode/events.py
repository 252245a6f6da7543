"""What the prefix cache of this instance holds, told to whoever routes: a snapshot, then changes on the bus.

Publishing begins with the first snapshot: a change is of no use to anybody who does not know what came before it, so an
instance that nobody asked costs nothing. From the engine's thread a change takes one append to a bounded queue; what came
and went within one interval is one message.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator, Sequence

import structlog

from plugmesh.errors import PlugmeshError
from plugmesh.kv.feed import DECODE
from plugmesh.mesh.api import Mesh
from plugmesh.tasks import end
from plugmesh_engine.driver import EngineDriver
from plugmesh_proto.v1 import kvstore_pb2 as pb

log = structlog.get_logger()

INTERVAL_S = 0.02      # between two batches; the first change after a pause goes out at once
MAX_IDS = 4096         # per message: 128 KiB, half of what the bus carries
MAX_WAITING = 1 << 17  # changes not published yet; beyond it subscribers see a gap and take a snapshot

Change = tuple[bytes, bool]


class BlockLog:
    """Changes from the engine's thread on their way to the event loop, at most `max_waiting`.

    `append` may run on any one thread, `take` in the event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_waiting: int = MAX_WAITING) -> None:
        self._loop = loop
        self._max_waiting = max_waiting
        self._waiting: collections.deque[Change] = collections.deque()
        self._has_overflowed = False
        self._is_woken = False
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, block_id: bytes, is_stored: bool) -> None:
        if len(self._waiting) >= self._max_waiting:
            self._has_overflowed = True
        else:
            self._waiting.append((block_id, is_stored))
        if not self._is_woken:
            self._is_woken = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:  # the loop is closed: nobody is left to tell
                pass

    async def wait(self) -> None:
        """Returns when there is something to take."""
        await self._wake.wait()

    def take(self) -> tuple[list[Change], bool]:
        """All changes since the last call, and whether some were lost; then none of them may be used."""
        self._wake.clear()
        self._is_woken = False  # before the queue is read: what comes from here on wakes again
        lost, self._has_overflowed = self._has_overflowed, False
        changes = []
        for _ in range(len(self._waiting)):
            changes.append(self._waiting.popleft())
        return changes, lost


def net(changes: Sequence[Change]) -> tuple[list[bytes], list[bytes]]:
    """(removed, stored): what a row of changes amounts to. Each block is in one of the lists, by its last change."""
    last: dict[bytes, bool] = {}
    for block_id, is_stored in changes:
        last.pop(block_id, None)  # so that the order is that of the last changes
        last[block_id] = is_stored
    return [b for b, stored in last.items() if not stored], [b for b, stored in last.items() if stored]


class KvEvents:
    """Publisher of one instance; lives in its event loop.

    Numbers are consecutive within an incarnation. Where changes were lost (the queue was full, the broker away) one number
    is left out, which subscribers answer with a snapshot.
    """

    def __init__(self, mesh: Mesh, driver: EngineDriver, *, interval_s: float = INTERVAL_S, max_waiting: int = MAX_WAITING) -> None:
        self.sequence = 0
        self._mesh = mesh
        self._driver = driver
        self._interval_s = interval_s
        self._max_waiting = max_waiting
        self._log: BlockLog | None = None
        self._task: asyncio.Task[None] | None = None

    async def snapshot(self) -> tuple[int, list[bytes]]:
        """A sequence number, and names that hold at that number or somewhat later.

        Whoever applies all later events to the names has the true set: an event holds final states, not differences.
        """
        if self._log is None:
            self._log = BlockLog(asyncio.get_running_loop(), self._max_waiting)
            self._task = asyncio.create_task(self._run(self._log), name="decode.kv_events")
        observer, sequence = self._log.append, self.sequence
        return sequence, await self._driver.call(lambda engine: engine.watch_blocks(observer))

    async def close(self) -> None:
        await end(self._task)

    async def _run(self, waiting: BlockLog) -> None:
        while True:
            await waiting.wait()
            changes, lost = waiting.take()
            try:
                if lost:
                    self.sequence += 1
                else:
                    for event in self._events(changes):
                        await self._mesh.publish(DECODE.topic, event.SerializeToString())
            except PlugmeshError as e:  # the broker is away; the number is used up, so that subscribers see the hole
                log.debug("decode.kv_event_lost", error=e.code)
            except Exception as e:
                log.warning("decode.kv_events_failed", error=type(e).__name__)
            await asyncio.sleep(self._interval_s)

    def _events(self, changes: Sequence[Change]) -> Iterator[pb.KvEvent]:
        me = self._mesh.self_info
        for kind, ids in zip((pb.KvEvent.REMOVED, pb.KvEvent.STORED), net(changes), strict=True):
            for start in range(0, len(ids), MAX_IDS):
                self.sequence += 1
                yield pb.KvEvent(
                    sequence=self.sequence, store_instance=me.instance_id, incarnation=me.incarnation, kind=kind,
                    block_ids=ids[start : start + MAX_IDS],
                )
