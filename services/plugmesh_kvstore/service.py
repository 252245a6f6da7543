"""The kvstore on the wire: translates RPCs into calls of `BlockStore`, `Mover` and `pull`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import structlog

from plugmesh import wire
from plugmesh.arena import ArenaFolder, default_base
from plugmesh.errors import InvalidRequest, NotFound, PlugmeshError, Unavailable
from plugmesh.kv.pieces import Assembler, split
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.mesh.hostid import host_id
from plugmesh.types import InstanceInfo
from plugmesh_kvstore.blocks import Block
from plugmesh_kvstore.checks import check_id
from plugmesh_kvstore.config import Settings
from plugmesh_kvstore.disk import DiskFiles, DiskSpace
from plugmesh_kvstore.events import Change
from plugmesh_kvstore.measure import Gauges
from plugmesh_kvstore.mover import Mover
from plugmesh_kvstore.pull import pull_blocks
from plugmesh_kvstore.store import BlockStore
from plugmesh_proto.v1 import kvstore_pb2 as pb
from plugmesh_proto.v1 import kvstore_pb2_grpc

log = structlog.get_logger()

TOPIC = "kv.events"
FULL_NAME = "plugmesh_proto.v1.KvStore"
_SNAPSHOT_IDS = 4096  # per page: 128 KiB, half of what the bus carries
_YIELD_EVERY = 8      # blocks whose checksum is computed before other work gets a turn
_KINDS = {"stored": pb.KvEvent.STORED, "removed": pb.KvEvent.REMOVED, "cleared": pb.KvEvent.CLEARED}


class KvStoreServicer(kvstore_pb2_grpc.KvStoreServicer):
    """One method per RPC; see kvstore.proto for what each promises."""

    def __init__(self, context: ServiceContext, store: BlockStore, mover: Mover) -> None:
        self._mesh = context.mesh
        self._settings: Settings = context.settings
        self._store = store
        self._mover = mover
        self.closed = False

    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.AttachReply:
        self._check_open()
        me = self._mesh.self_info
        local = bool(request.host) and request.host == host_id()
        lease = self._store.attach(wire.layout_from_pb(request.layout), request.holder, request.incarnation, local=local)
        arena = lease.partition.arena
        assert arena is not None
        log.info("kvstore.attached", holder=request.holder, local=local)
        return pb.AttachReply(
            lease_id=lease.lease_id,
            lease_ttl_s=self._store.leases.ttl_s,
            arena_path=str(arena.path) if local else "",
            arena_bytes=arena.num_bytes,
            slot_bytes=arena.slot_bytes,
            store_instance=me.instance_id,
            grpc_address=me.grpc_address,
        )

    async def Detach(self, request: pb.DetachRequest, context: Any) -> pb.DetachReply:
        self._check_open()
        self._store.detach(request.lease_id)
        return pb.DetachReply()

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:
        self._check_open()
        self._store.leases.renew(request.lease_id)
        return pb.RenewReply(lease_ttl_s=self._store.leases.ttl_s)

    async def Match(self, request: pb.MatchRequest, context: Any) -> pb.MatchReply:
        self._check_call(request.block_ids)
        lease = self._store.leases.get(request.lease_id)
        found = self._store.lookup(lease.partition, request.block_ids)
        if not request.pin:
            return pb.MatchReply(found=[_location(b) for b in found])
        for block in found:
            self._store.hold(block)
        try:
            ready = 0
            for block in found:
                if not await self._mover.load(block):
                    break
                ready += 1
            lease = self._store.leases.get(request.lease_id)  # it may have ended during a load
            for block in found[:ready]:
                self._store.pin(lease, block)
            return pb.MatchReply(found=[_location(b) for b in found[:ready]])
        finally:
            for block in found:
                self._store.unhold(block)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseReply:
        self._check_call(request.block_ids)
        lease = self._store.leases.get(request.lease_id)
        return pb.ReleaseReply(num_released=self._store.release(lease, request.block_ids))

    async def Reserve(self, request: pb.ReserveRequest, context: Any) -> pb.ReserveReply:
        self._check_call(request.block_ids)
        lease = self._store.leases.get(request.lease_id)
        return pb.ReserveReply(slots=[self._store.reserve(lease, block_id) for block_id in request.block_ids])

    async def Commit(self, request: pb.CommitRequest, context: Any) -> pb.CommitReply:
        self._check_call([b.block_id for b in request.blocks])
        num = 0
        for i, b in enumerate(request.blocks):
            lease = self._store.leases.get(request.lease_id)  # each time: others ran in between
            num += self._store.commit(lease, b.block_id, b.slot, b.checksum, b.parent_id, b.num_tokens, b.num_bytes)
            if i % _YIELD_EVERY == _YIELD_EVERY - 1:
                await asyncio.sleep(0)
        self._mover.wake()
        return pb.CommitReply(num_committed=num)

    async def PutBlocks(self, request_iterator: AsyncIterator[pb.BlockPiece], context: Any) -> pb.PutBlocksReply:
        lease_id = ""
        assembler: Assembler | None = None
        reply = pb.PutBlocksReply()
        async for piece in request_iterator:
            self._check_open()
            lease_id = lease_id or piece.lease_id
            lease = self._store.leases.get(lease_id)
            if assembler is None:
                assembler = Assembler(lease.partition.layout.block_bytes)
            whole = assembler.add(piece)
            if whole is None:
                continue
            outcome = self._store.insert(
                lease.partition, whole.block_id, whole.parent_id, whole.num_tokens, whole.data, whole.checksum
            )
            reply.num_stored += outcome == "stored"
            reply.num_known += outcome == "known"
            self._mover.wake()
        if assembler is not None and assembler.in_middle:
            raise InvalidRequest("the stream ended in the middle of a block")
        return reply

    async def GetBlocks(self, request: pb.GetBlocksRequest, context: Any) -> AsyncIterator[pb.BlockPiece]:
        self._check_call(request.block_ids)
        lease = self._store.leases.get(request.lease_id)
        for block in self._store.lookup(lease.partition, request.block_ids):
            self._store.hold(block)
            try:
                if block.partition.blocks.get(block.block_id) is not block or not await self._mover.load(block):
                    return
                if not self._store.verify(block):
                    return
                with self._store.view(block) as view:
                    for piece in split(
                        block.block_id, block.parent_id, block.num_tokens, view, block.checksum, lease_id=request.lease_id
                    ):
                        yield piece
            finally:
                self._store.unhold(block)

    async def Pull(self, request: pb.PullRequest, context: Any) -> pb.PullReply:
        self._check_call(request.block_ids)
        layout = wire.layout_from_pb(request.layout)
        peer = next((i for i in self._mesh.instances("kvstore") if i.grpc_address == request.from_address), None)
        if peer is None or peer.instance_id == self._mesh.self_info.instance_id:
            # Only addresses of the registry: an RPC must not make this process call arbitrary hosts.
            raise NotFound(f"no other live kvstore has the address {request.from_address!r}", param="from_address")
        num, num_bytes = await pull_blocks(self._mesh, peer, self._store, layout, list(request.block_ids))
        self._mover.wake()
        return pb.PullReply(num_pulled=num, num_bytes=num_bytes)

    async def Snapshot(self, request: pb.SnapshotRequest, context: Any) -> AsyncIterator[pb.SnapshotPage]:
        self._check_open()
        ids = [
            block_id
            for p in self._store.partitions.values()
            if request.model in ("", p.layout.model)
            for block_id in p.blocks
        ]
        sequence, incarnation = self._store.events.sequence, self._mesh.self_info.incarnation
        for start in range(0, max(1, len(ids)), _SNAPSHOT_IDS):
            yield pb.SnapshotPage(
                as_of_sequence=sequence, incarnation=incarnation, block_ids=ids[start : start + _SNAPSHOT_IDS]
            )

    async def Stats(self, request: pb.KvStatsRequest, context: Any) -> pb.KvStats:
        self._check_open()
        store, audit = self._store, self._store.audit()
        return pb.KvStats(
            arena_bytes=audit.capacity,
            arena_used_bytes=audit.used,
            arena_pinned_bytes=audit.pinned,
            arena_reserved_bytes=audit.reserved,
            disk_bytes=store.disk.capacity_bytes if store.disk else 0,
            disk_used_bytes=store.disk.used_bytes if store.disk else 0,
            num_blocks=store.num_blocks,
            num_leases=len(store.leases),
            num_hits=store.counters.hits,
            num_misses=store.counters.misses,
            num_corrupt=store.counters.corrupt,
            num_evicted=store.counters.evicted,
            event_sequence=store.events.sequence,
        )

    async def Clear(self, request: pb.ClearRequest, context: Any) -> pb.ClearReply:
        self._check_open()
        num = await self._mover.clear()
        log.info("kvstore.cleared", num_blocks=num)
        return pb.ClearReply(num_removed=num)

    def _check_call(self, block_ids: Sequence[bytes]) -> None:
        self._check_open()
        if len(block_ids) > self._settings.max_blocks_per_call:
            raise InvalidRequest(
                f"{len(block_ids)} blocks in one call; {self._settings.max_blocks_per_call} are allowed", param="block_ids"
            )
        for block_id in block_ids:
            check_id(block_id)

    def _check_open(self) -> None:
        if self.closed:
            raise Unavailable("the kvstore is stopping", retry_after_s=1.0)


class KvStoreService:
    """Life cycle: makes the tiers, sweeps leases, publishes events, and leaves nothing behind."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._settings: Settings = context.settings
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvstore-disk")
        self._folder: ArenaFolder | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._unwatch: Callable[[], None] = lambda: None
        self.store: BlockStore | None = None
        self.mover: Mover | None = None
        self._servicer: KvStoreServicer | None = None

    async def start(self) -> None:
        s, mesh_settings = self._settings, self._context.config.mesh
        self._folder = ArenaFolder((s.arena_dir or default_base(mesh_settings.runtime_dir)).expanduser())
        files: DiskFiles | None = None
        space: DiskSpace | None = None
        if s.disk_bytes:
            base = (s.disk_dir or pathlib.Path(mesh_settings.data_dir) / "kvstore").expanduser()
            loop = asyncio.get_running_loop()
            files = await loop.run_in_executor(self._executor, DiskFiles, base)
            found = await loop.run_in_executor(self._executor, files.recover)
            space = DiskSpace(s.disk_bytes, s.segment_bytes)
            space.adopt(found.segments, [row.place for row in found.rows])
        plugins = self._context.plugins
        eviction = plugins.last("evictions") if plugins is not None else None
        store = BlockStore(
            self._folder.path, s.arena_bytes, disk=space, lease_ttl_s=s.lease_ttl_s, max_leases=s.max_leases,
            max_layouts=s.max_layouts, verify_on_commit=s.verify_on_commit, event_buffer=s.event_buffer,
            eviction=eviction,
        )
        if files is not None:
            for key, layout in found.layouts.items():
                rows = [r for r in found.rows if r.layout_key == key]
                if rows:
                    store.restore(
                        layout, [(r.block_id, r.parent_id, r.num_tokens, r.num_bytes, r.checksum, r.place) for r in rows]
                    )
        self.store = store
        self.mover = Mover(store, files, self._executor, spill_above=s.spill_above, spill_batch=s.spill_batch)
        self.mover.start()
        self._servicer = KvStoreServicer(self._context, store, self.mover)
        gauges = Gauges(self._context.metrics, store)
        self._unwatch = self._context.mesh.watch(self._on_peer)
        self._tasks = [
            asyncio.create_task(_forever(functools.partial(self._sweep, gauges), s.sweep_s), name="kvstore.sweep"),
            asyncio.create_task(_forever(self._publish, 0.0), name="kvstore.publish"),
        ]
        log.info(
            "kvstore.started", arena_bytes=s.arena_bytes, disk_bytes=s.disk_bytes, num_blocks=store.num_blocks,
            eviction=eviction.name if eviction is not None else "lru",
        )

    def bindings(self) -> Sequence[Binding]:
        return [
            Binding(
                kvstore_pb2_grpc.add_KvStoreServicer_to_server, self._servicer, FULL_NAME,
                grpc_only=frozenset({"PutBlocks", "GetBlocks"}),
            )
        ]

    async def drain(self, deadline_s: float) -> None:
        """Nothing to wait for: clients treat a store that goes as a miss."""

    async def stop(self) -> None:
        """Stops tasks, flushes the arena to disk, removes arena files. Safe after a failed start."""
        if self._servicer is not None:
            self._servicer.closed = True
        self._unwatch()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.store is not None:
            self.store.end_leases()
        try:
            if self.mover is not None:
                await self.mover.stop(self._settings.flush_on_stop_s)
        finally:
            if self.store is not None:
                self.store.close()
            if self._folder is not None:
                self._folder.close()
                self._folder = None
            self._executor.shutdown(wait=True)

    def describe(self) -> dict[str, Any]:
        return {"roles": ("kvstore",)}

    def _on_peer(self, kind: str, info: InstanceInfo) -> None:
        if self.store is None:
            return
        if kind == "left":
            self.store.drop_holder(info.instance_id, info.incarnation)
        elif kind in ("joined", "updated"):
            self.store.note_incarnation(info.instance_id, info.incarnation)

    async def _sweep(self, gauges: Gauges) -> None:
        assert self.store is not None and self.mover is not None
        self.store.sweep()
        audit = gauges.update()
        self._context.mesh.set_load(
            arena_used_bytes=float(audit.used), kv_num_blocks=float(self.store.num_blocks),
            kv_event_sequence=float(self.store.events.sequence), kv_blocks_leaked=float(audit.num_leaked),
        )

    async def _publish(self) -> None:
        assert self.store is not None
        events = self.store.events
        change = events.peek()
        if change is None:
            await events.wait(1.0)
            return
        me = self._context.mesh.self_info
        try:
            await self._context.mesh.publish(TOPIC, _event(change, me).SerializeToString())
        except PlugmeshError:
            await asyncio.sleep(0.5)  # the broker is away; the buffer is bounded, subscribers repair by snapshot
            return
        events.published(change)


async def _forever(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    while True:
        try:
            await work()
        except Exception as e:
            log.error("kvstore.background_failed", work=getattr(work, "__name__", "sweep"), error=type(e).__name__, exc_info=True)
            await asyncio.sleep(1.0)
        await asyncio.sleep(every_s)


def _location(block: Block) -> pb.BlockLocation:
    return pb.BlockLocation(
        block_id=block.block_id, slot=-1 if block.slot is None else block.slot, checksum=block.checksum,
        tier=block.tier, num_bytes=block.num_bytes,
    )


def _event(change: Change, me: InstanceInfo) -> pb.KvEvent:
    return pb.KvEvent(
        sequence=change.sequence, store_instance=me.instance_id, incarnation=me.incarnation, kind=_KINDS[change.kind],
        block_ids=change.block_ids, parent_id=change.parent_id, tier=change.tier, model=change.model,
    )


def create(context: ServiceContext) -> KvStoreService:
    """Light: the tiers are made in `start`."""
    return KvStoreService(context)
