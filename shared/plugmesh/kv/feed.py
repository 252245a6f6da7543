"""What the block caches of a role's instances hold, as a stream of changes without holes."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from plugmesh.errors import PlugmeshError
from plugmesh.mesh.api import Event, Mesh
from plugmesh.records import KvEvent
from plugmesh.tasks import end
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import decode_pb2_grpc, kvstore_pb2_grpc
from plugmesh_proto.v1 import kvstore_pb2 as pb

log = structlog.get_logger()

_MAX_EARLY = 1024       # events kept while a snapshot is on its way
_SNAPSHOT_S = 10.0
_MAX_IDS = 4_000_000    # per instance; one with more counts as empty
_RETRY_S = 0.2
_KINDS: dict[int, Any] = {pb.KvEvent.STORED: "stored", pb.KvEvent.REMOVED: "removed", pb.KvEvent.CLEARED: "cleared"}


@dataclass(frozen=True, slots=True)
class Source:
    """Who publishes `kvstore.proto`'s KvEvent where, and how a snapshot is asked for: `snapshot(channel)` is the call."""

    role: str
    topic: str
    snapshot: Callable[[grpc.aio.Channel], Any]


KVSTORE = Source("kvstore", "kv.events", lambda channel: kvstore_pb2_grpc.KvStoreStub(channel).Snapshot)
DECODE = Source("decode", "decode.kv_events", lambda channel: decode_pb2_grpc.DecodeStub(channel).KvSnapshot)


@dataclass(slots=True)
class _View:
    """How far one instance has been followed. `incarnation` is empty until the first snapshot."""

    incarnation: str = ""
    sequence: int = 0
    stale: bool = True
    early: collections.deque[pb.KvEvent] = field(default_factory=lambda: collections.deque(maxlen=_MAX_EARLY))


class KvFeed:
    """Turns events and snapshots of every instance of a role into calls of `on_event`, in the order of `KvEvent`'s promise.

    A hole in the numbers or another incarnation gives "cleared" at once; a snapshot, as "stored", follows as soon as the
    instance answers. Duplicates, late events and those of an incarnation that the mesh does not list are dropped.

    Args:
        on_event: Called in the event loop; must neither wait nor raise.
        check_s: How often the sequence in an instance's load is compared, which finds a lost last event.
    """

    def __init__(self, mesh: Mesh, source: Source, on_event: Callable[[KvEvent], None], *, check_s: float = 5.0) -> None:
        self._mesh = mesh
        self._source = source
        self._on_event = on_event
        self._check_s = check_s
        self._views: dict[str, _View] = {}
        self._wake = asyncio.Event()
        self._undo: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self.num_gaps = 0
        self.num_snapshots = 0

    def start(self) -> None:
        """Begins to follow; call it in the event loop."""
        self._undo = [self._mesh.subscribe(self._source.topic, self._on_bus), self._mesh.watch(self._on_peer)]
        for info in self._mesh.instances(self._source.role):
            self._views.setdefault(info.instance_id, _View())
        self._task = asyncio.create_task(self._run(), name=f"kv.feed:{self._source.role}")
        self._wake.set()

    async def close(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        if self._task is not None:
            await end(self._task)
            self._task = None

    def complete(self) -> list[str]:
        """Instances whose set is complete as far as known."""
        return [name for name, view in self._views.items() if not view.stale]

    async def _on_bus(self, event: Event) -> None:
        try:
            e = pb.KvEvent.FromString(event.data)
        except DecodeError:
            log.warning("kv.feed_bad_event", role=self._source.role, num_bytes=len(event.data))
            return
        view = self._views.get(e.store_instance)
        if view is None:
            return  # not listed (yet): its lease brings a snapshot
        if view.stale:
            view.early.append(e)
            self._wake.set()
        elif e.incarnation != view.incarnation:
            # A new life is found by its lease; an old one that woke up means nothing any more.
            log.debug("kv.feed_other_life", role=self._source.role, peer=e.store_instance)
        elif e.sequence > view.sequence + 1:
            self.num_gaps += 1
            self._clear(e.store_instance, view)
            view.early.append(e)
            self._wake.set()
        elif e.sequence == view.sequence + 1:
            self._apply(view, e)

    def _apply(self, view: _View, e: pb.KvEvent) -> None:
        view.sequence = e.sequence
        kind = _KINDS.get(e.kind)
        if kind is not None:
            self._on_event(KvEvent(e.store_instance, e.incarnation, e.sequence, kind, tuple(e.block_ids)))

    def _clear(self, name: str, view: _View) -> None:
        """Nothing is known of this instance until the next snapshot."""
        if not view.stale:
            view.stale = True
            self._on_event(KvEvent(name, view.incarnation, view.sequence, "cleared"))

    def _forget(self, name: str) -> None:
        view = self._views.pop(name, None)
        if view is not None:
            self._clear(name, view)

    def _on_peer(self, kind: str, info: InstanceInfo) -> None:
        if info.role != self._source.role:
            return
        if kind == "left":
            self._forget(info.instance_id)
        elif kind == "joined":
            view = self._views.setdefault(info.instance_id, _View())
            if view.incarnation != info.incarnation:
                self._clear(info.instance_id, view)
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            failed = False
            known = self._mesh.instances(self._source.role, include_suspect=True)
            for name in set(self._views) - {info.instance_id for info in known}:
                self._forget(name)
            for info in known:
                view = self._views.setdefault(info.instance_id, _View())
                behind = info.load.get("kv_event_sequence", 0) > view.sequence
                if view.stale or (behind and info.incarnation == view.incarnation):
                    failed |= not await self._snapshot(info, view)
            try:
                async with asyncio.timeout(_RETRY_S if failed else self._check_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            if failed:
                await asyncio.sleep(_RETRY_S)  # events of one that does not answer must not make this a busy loop

    async def _snapshot(self, info: InstanceInfo, view: _View) -> bool:
        """Replaces the set and replays what came meanwhile. False when it has to be tried again."""
        self._clear(info.instance_id, view)  # events go to `early` from here on
        ids: dict[bytes, None] = {}
        page = pb.SnapshotPage()
        try:
            call = self._source.snapshot(self._mesh.channel(self._source.role, info.instance_id))
            async for page in call(pb.SnapshotRequest(), timeout=_SNAPSHOT_S):
                ids.update(dict.fromkeys(page.block_ids))
                if len(ids) > _MAX_IDS:
                    log.warning("kv.feed_too_large", role=info.role, peer=info.instance_id)
                    ids.clear()
                    break
        except (grpc.aio.AioRpcError, PlugmeshError) as e:
            log.debug("kv.feed_snapshot_failed", role=info.role, peer=info.instance_id, error=type(e).__name__)
            return False
        if self._views.get(info.instance_id) is not view:
            return True  # it left meanwhile
        self.num_snapshots += 1
        full = len(view.early) == _MAX_EARLY
        early, view.early = list(view.early), collections.deque(maxlen=_MAX_EARLY)
        if full or not page.incarnation:
            return False  # some may have been pushed out
        later = [e for e in early if e.incarnation == page.incarnation and e.sequence > page.as_of_sequence]
        if not _follows(page.as_of_sequence, later):
            return False
        view.incarnation, view.sequence, view.stale = page.incarnation, page.as_of_sequence, False
        self._on_event(KvEvent(info.instance_id, view.incarnation, view.sequence, "stored", tuple(ids)))
        for event in later:
            if event.sequence == view.sequence + 1:
                self._apply(view, event)
        return True


def _follows(sequence: int, events: Iterable[pb.KvEvent]) -> bool:
    """Whether events continue a sequence without a hole; repeated ones are none."""
    for e in events:
        if e.sequence > sequence + 1:
            return False
        sequence = max(sequence, e.sequence)
    return True
