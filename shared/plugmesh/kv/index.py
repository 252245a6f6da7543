"""Which blocks each kvstore has, as far as its events told: for routers and operators."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import structlog
from google.protobuf.message import DecodeError

from plugmesh.errors import PlugmeshError
from plugmesh.mesh.api import Event, Mesh
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import kvstore_pb2 as pb
from plugmesh_proto.v1 import kvstore_pb2_grpc

log = structlog.get_logger()

TOPIC = "kv.events"
ROLE = "kvstore"
_MAX_EARLY = 1024       # events kept while a snapshot is on its way
_SNAPSHOT_S = 10.0
_MAX_IDS = 4_000_000    # per store; beyond it the store counts as empty


@dataclass(slots=True)
class _View:
    """What is known of one store. `incarnation` is empty until the first snapshot."""

    incarnation: str = ""
    sequence: int = 0
    ids: set[bytes] = field(default_factory=set)
    stale: bool = True
    early: collections.deque[pb.KvEvent] = field(default_factory=lambda: collections.deque(maxlen=_MAX_EARLY))


class KvIndex:
    """A set of block ids per store instance, kept right by sequence numbers: a hole leads to a snapshot.

    Answers are hints: a block may be gone by the time somebody asks for it.

    Args:
        check_s: How often the sequence in a store's load is compared, which finds a lost last event.
    """

    def __init__(self, mesh: Mesh, *, check_s: float = 5.0) -> None:
        self._mesh = mesh
        self._check_s = check_s
        self._views: dict[str, _View] = {}
        self._wake = asyncio.Event()
        self._undo: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None
        self.num_gaps = 0
        self.num_snapshots = 0

    async def start(self) -> None:
        self._undo = [self._mesh.subscribe(TOPIC, self._on_event), self._mesh.watch(self._on_peer)]
        for info in self._mesh.instances(ROLE):
            self._views.setdefault(info.instance_id, _View())
        self._task = asyncio.create_task(self._run(), name="kv.index")
        self._wake.set()

    async def close(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def stores(self) -> list[str]:
        """Stores whose set is complete as far as known."""
        return [name for name, view in self._views.items() if not view.stale]

    def has(self, store_instance: str, block_id: bytes) -> bool:
        view = self._views.get(store_instance)
        return view is not None and block_id in view.ids

    def prefix(self, block_ids: Sequence[bytes]) -> dict[str, int]:
        """Store instance to how many leading blocks of the chain it has; stores with none are left out."""
        found: dict[str, int] = {}
        for name, view in self._views.items():
            num = 0
            while num < len(block_ids) and block_ids[num] in view.ids:
                num += 1
            if num:
                found[name] = num
        return found

    async def _on_event(self, event: Event) -> None:
        try:
            e = pb.KvEvent.FromString(event.data)
        except DecodeError:
            log.warning("kv.index_bad_event", num_bytes=len(event.data))
            return
        view = self._views.setdefault(e.store_instance, _View())
        if view.stale:
            view.early.append(e)
            self._wake.set()
        elif e.incarnation != view.incarnation or e.sequence > view.sequence + 1:
            self.num_gaps += 1
            view.stale = True
            view.early.append(e)
            self._wake.set()
        elif e.sequence == view.sequence + 1:
            self._apply(view, e)

    @staticmethod
    def _apply(view: _View, e: pb.KvEvent) -> None:
        view.sequence = e.sequence
        if e.kind == pb.KvEvent.STORED:
            view.ids.update(e.block_ids)
        elif e.kind == pb.KvEvent.REMOVED:
            view.ids.difference_update(e.block_ids)
        elif e.kind == pb.KvEvent.CLEARED:
            view.ids.clear()

    def _on_peer(self, kind: str, info: InstanceInfo) -> None:
        if info.role != ROLE:
            return
        if kind == "left":
            self._views.pop(info.instance_id, None)
        elif kind == "joined":
            view = self._views.setdefault(info.instance_id, _View())
            view.stale = view.stale or view.incarnation != info.incarnation
            self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            failed = False
            known = self._mesh.instances(ROLE, include_suspect=True)
            for name in set(self._views) - {info.instance_id for info in known}:
                del self._views[name]
            for info in known:
                view = self._views.setdefault(info.instance_id, _View())
                behind = info.load.get("kv_event_sequence", 0) > view.sequence
                if view.stale or (behind and info.incarnation == view.incarnation):
                    failed |= not await self._snapshot(info, view)
            try:
                await asyncio.wait_for(self._wake.wait(), 0.2 if failed else self._check_s)
            except TimeoutError:
                pass

    async def _snapshot(self, info: InstanceInfo, view: _View) -> bool:
        """Replaces the set and replays what came meanwhile. False when it has to be tried again."""
        view.stale = True  # events go to `early` from here on
        ids: set[bytes] = set()
        page = pb.SnapshotPage()
        try:
            stub = kvstore_pb2_grpc.KvStoreStub(self._mesh.channel(ROLE, info.instance_id))
            async for page in stub.Snapshot(pb.SnapshotRequest(), timeout=_SNAPSHOT_S):
                ids.update(page.block_ids)
                if len(ids) > _MAX_IDS:
                    log.warning("kv.index_too_large", store=info.instance_id)
                    ids.clear()
                    break
        except (grpc.aio.AioRpcError, PlugmeshError) as e:
            log.debug("kv.index_snapshot_failed", store=info.instance_id, error=type(e).__name__)
            return False
        self.num_snapshots += 1
        view.incarnation, view.sequence, view.ids = page.incarnation, page.as_of_sequence, ids
        full = len(view.early) == _MAX_EARLY
        early, view.early = list(view.early), collections.deque(maxlen=_MAX_EARLY)
        for event in early:
            if event.incarnation != view.incarnation or event.sequence <= view.sequence:
                continue
            if event.sequence != view.sequence + 1:
                return False
            self._apply(view, event)
        view.stale = full  # some may have been pushed out
        return not full
