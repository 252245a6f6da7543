"""What prefill and decode use of the kvstore. Failures are misses: nothing here stops a request."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog

from plugmesh import wire
from plugmesh.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    PlugmeshError,
    StaleIncarnation,
    Unavailable,
)
from plugmesh.kv.attachment import ArenaNotHere, Attachment, BlockRef
from plugmesh.kv.pieces import Assembler, checksum, split
from plugmesh.mesh.api import Mesh
from plugmesh.mesh.hostid import host_id
from plugmesh.tasks import end
from plugmesh.types import InstanceInfo, KvLayout
from plugmesh_proto.v1 import kvstore_pb2 as pb
from plugmesh_proto.v1 import kvstore_pb2_grpc

log = structlog.get_logger()

T = TypeVar("T")

ROLE = "kvstore"
_GROUP = 16                # blocks reserved, written and committed together
_BACKOFF_S = (0.2, 5.0)    # after a failure the store is left alone for this long, doubling up to the second
_STREAM_BYTES_PER_S = 10e6  # slower than this a stream between hosts is given up
_MAX_RETIRED = 64


@dataclass(slots=True)
class KvClientStats:
    """Counts since the client was made. `failures` maps an error code to how often it turned into a miss."""

    num_hits: int = 0
    num_misses: int = 0
    num_put: int = 0
    num_put_refused: int = 0
    num_corrupt: int = 0
    num_attached: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    failures: dict[str, int] = dataclasses.field(default_factory=dict)


class KvClient:
    """Blocks of one layout in one kvstore instance.

    Attaches at the first use and again whenever the store was restarted or the lease was lost. One event loop owns it;
    copies and checksums run on its default executor. Every method returns within a few `rpc_timeout_s`.

    Args:
        holder, incarnation: This instance, as discovery knows it; a newer incarnation fences this one. When the
            holder is the mesh's own instance and discovery gave it a new incarnation (its lease had lapsed), later
            leases are taken under that one; what the earlier leases held is lost.
        store_instance: Which store; default one on this host, else any.
        verify_on_read: Check every block's checksum at `match`; a bad block is a miss.
        strict: Raise instead of returning a miss. For tests and tools.
        allow_arena: False forces the path that is used between hosts.
    """

    def __init__(
        self,
        mesh: Mesh,
        layout: KvLayout,
        *,
        holder: str,
        incarnation: str,
        store_instance: str | None = None,
        verify_on_read: bool = True,
        rpc_timeout_s: float = 2.0,
        strict: bool = False,
        allow_arena: bool = True,
    ) -> None:
        self.layout = layout
        self.stats = KvClientStats()
        self._mesh = mesh
        self._holder = holder
        self._incarnation = incarnation
        self._store_instance = store_instance
        self._verify = verify_on_read
        self._timeout_s = rpc_timeout_s
        self._strict = strict
        self._allow_arena = allow_arena
        self._arena_unreachable: set[str] = set()  # incarnations of stores whose arena this process cannot map
        self._current: Attachment | None = None
        self._retired: list[Attachment] = []
        self._attaching = asyncio.Lock()
        self._refs: dict[bytes, list[BlockRef]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewer: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._backoff_s = _BACKOFF_S[0]
        self._fenced = ""  # the incarnation of ours that the store does not accept any more
        self._closed = False

    # --- what callers use -----------------------------------------------------------------------------------------

    async def match(self, block_ids: Sequence[bytes], pin: bool = True) -> list[BlockRef]:
        """The longest prefix of `block_ids` that the store has; empty when it has none or cannot be asked.

        With `pin`, each ref's `data` is valid until `release`. Without, refs only say that the block is known and
        `data` is empty; they need no release. A cancelled call leaves nothing pinned.
        """
        if not block_ids:
            return []
        nothing: list[BlockRef] = []
        undo = self.release_nowait if pin else None
        refs = await self._guarded(lambda: self._match(list(block_ids), pin), nothing, undo)
        self.stats.num_hits += len(refs)
        self.stats.num_misses += len(block_ids) - len(refs)
        return refs

    async def put(self, blocks: Sequence[tuple[bytes, bytes, int, Any]]) -> int:
        """Stores (block id, parent id or b"", number of tokens, C-contiguous buffer) in chain order.

        The buffers are read until this returns, and until it has really ended when it is cancelled: hand over
        memory that nobody reuses. Returns how many of the blocks the store has now, from the front.

        Raises:
            InvalidRequest: A buffer larger than the layout's block, or a malformed id: the caller's defect.
        """
        views = [(i, p or b"", n, self._flat(i, p, n, data)) for i, p, n, data in blocks]
        if not views:
            return 0
        num = await self._guarded(lambda: self._put(views), 0)
        self.stats.num_put += num
        self.stats.num_put_refused += len(views) - num
        return num

    async def release(self, refs: Iterable[BlockRef | bytes]) -> None:
        """Gives refs back, or one ref per block id. Releasing twice is harmless; failures only cost the lease."""
        by_attachment: dict[Attachment, list[bytes]] = {}
        for item in list(refs):
            ref = item if isinstance(item, BlockRef) else next(iter(self._refs.get(item, ())), None)
            if ref is None or ref.released:
                continue
            ref.released = True
            ref.data = memoryview(b"")
            same = self._refs.get(ref.block_id, [])
            if ref in same:
                same.remove(ref)
            if not same:
                self._refs.pop(ref.block_id, None)
            by_attachment.setdefault(ref.attachment, []).append(ref.block_id)
        for attachment, ids in by_attachment.items():
            try:
                if attachment.is_local and not attachment.lease_lost:
                    await self._release(attachment, ids)
            except PlugmeshError as e:
                self._count(e, "release")
            finally:
                self._drop_use(attachment, len(ids))

    async def _release(self, attachment: Attachment, ids: list[bytes]) -> None:
        request = pb.ReleaseRequest(lease_id=attachment.lease_id, block_ids=ids)
        await self._call(attachment, lambda stub: stub.Release(request, timeout=self._timeout_s))

    def release_nowait(self, refs: Iterable[BlockRef | bytes]) -> None:
        """`release` in a task of this client."""
        self._spawn(self.release(list(refs)))

    async def close(self) -> None:
        """Ends the leases; refs that are still out become invalid. Safe to call twice."""
        self._closed = True
        if self._renewer is not None:
            await end(self._renewer)
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=2 * self._timeout_s)
        self._refs.clear()
        for attachment in [*self._retired, *([self._current] if self._current else [])]:
            await self._detach(attachment)
        self._retired.clear()
        self._current = None

    # --- reading --------------------------------------------------------------------------------------------------

    async def _match(self, block_ids: list[bytes], pin: bool) -> list[BlockRef]:
        attachment = await self._attached()
        attachment.uses += 1
        try:
            if pin and not attachment.is_local:
                return await self._fetch(attachment, block_ids)
            request = pb.MatchRequest(lease_id=attachment.lease_id, block_ids=block_ids, pin=pin)
            reply = await self._call(attachment, lambda stub: stub.Match(request, timeout=self._timeout_s))
            if not pin:
                nothing = memoryview(b"")
                return [BlockRef(attachment, x.block_id, nothing, x.checksum, is_local=False) for x in reply.found]
            return await self._take(attachment, block_ids, reply.found)
        finally:
            self._drop_use(attachment, 1)

    async def _take(self, attachment: Attachment, block_ids: list[bytes], found: Iterable[pb.BlockLocation]) -> list[BlockRef]:
        """Refs on pinned blocks, up to the first that is damaged."""
        refs: list[BlockRef] = []
        for want, x in zip(block_ids, found, strict=False):
            fits = 0 <= x.slot < attachment.num_slots and 0 < x.num_bytes <= attachment.slot_bytes
            if x.block_id != want or not fits:
                self._retire(attachment)
                raise DataLoss("the store answered with a location outside the arena")
            data = attachment.read(x.slot, x.num_bytes)
            refs.append(BlockRef(attachment, x.block_id, data, x.checksum, is_local=True))
        self._register(refs)
        if not self._verify:
            return refs
        good = await asyncio.to_thread(_count_good, refs)
        if good < len(refs):
            self.stats.num_corrupt += 1
            log.warning("kv.read_corrupt", store=attachment.info.instance_id, num_bytes=refs[good].num_bytes)
            bad = refs[good].block_id
            self.release_nowait(refs[good:])
            self._spawn(self._report(attachment, bad))
            refs = refs[:good]
        self.stats.bytes_read += sum(r.num_bytes for r in refs)
        return refs

    async def _report(self, attachment: Attachment, block_id: bytes) -> None:
        """Asks the store to send a block that looked damaged: it checks before it sends, and drops what is bad."""
        stub = kvstore_pb2_grpc.KvStoreStub(self._mesh.direct_channel(attachment.info))
        stream = stub.GetBlocks(pb.GetBlocksRequest(lease_id=attachment.lease_id, block_ids=[block_id]), timeout=self._timeout_s)
        try:
            async for _ in stream:
                stream.cancel()
                break
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # best effort; the block stays a miss for whoever verifies

    async def _fetch(self, attachment: Attachment, block_ids: list[bytes]) -> list[BlockRef]:
        """Bytes over a gRPC stream; what arrived whole before a failure counts."""
        stub = kvstore_pb2_grpc.KvStoreStub(self._mesh.direct_channel(attachment.info))
        request = pb.GetBlocksRequest(lease_id=attachment.lease_id, block_ids=block_ids)
        timeout_s = self._timeout_s + len(block_ids) * self.layout.block_bytes / _STREAM_BYTES_PER_S
        assembler = Assembler(self.layout.block_bytes)
        refs: list[BlockRef] = []
        try:
            async for piece in stub.GetBlocks(request, timeout=timeout_s):
                whole = assembler.add(piece)
                if whole is None:
                    continue
                if whole.block_id != block_ids[len(refs)]:
                    raise DataLoss("the store sent another block than the next one asked for")
                data = memoryview(whole.data).toreadonly()
                refs.append(BlockRef(attachment, whole.block_id, data, whole.checksum, is_local=False))
        except (grpc.aio.AioRpcError, PlugmeshError) as e:
            error = wire.error_from_rpc(e) if isinstance(e, grpc.RpcError) else e
            self._note_failure(attachment, error)
            if not refs:
                raise error from e
            self._count(error, "fetch")
        self._register(refs)
        self.stats.bytes_read += sum(r.num_bytes for r in refs)
        return refs

    def _register(self, refs: list[BlockRef]) -> None:
        for ref in refs:
            ref.attachment.uses += 1
            self._refs.setdefault(ref.block_id, []).append(ref)

    # --- writing --------------------------------------------------------------------------------------------------

    async def _put(self, blocks: list[tuple[bytes, bytes, int, memoryview]]) -> int:
        attachment = await self._attached()
        attachment.uses += 1
        try:
            if not attachment.is_local:
                return await self._send(attachment, blocks)
            num = 0
            for start in range(0, len(blocks), _GROUP):
                group = blocks[start : start + _GROUP]
                stored = await self._put_group(attachment, group)
                num += stored
                if stored < len(group):
                    break  # blocks after a hole can never be matched
            return num
        finally:
            self._drop_use(attachment, 1)

    async def _put_group(self, attachment: Attachment, blocks: list[tuple[bytes, bytes, int, memoryview]]) -> int:
        request = pb.ReserveRequest(lease_id=attachment.lease_id, block_ids=[b[0] for b in blocks])
        reply = await self._call(attachment, lambda stub: stub.Reserve(request, timeout=self._timeout_s))
        num_known = 0
        todo: list[tuple[int, tuple[bytes, bytes, int, memoryview]]] = []
        for slot, block in zip(reply.slots, blocks, strict=False):
            if slot >= attachment.num_slots:
                self._retire(attachment)
                raise DataLoss(f"the store offered slot {slot} of {attachment.num_slots}")
            if slot >= 0:
                todo.append((slot, block))
            elif slot == -1:
                num_known += 1
        if not todo:
            return num_known
        digests = await asyncio.to_thread(_write, attachment, todo)
        commit = pb.CommitRequest(lease_id=attachment.lease_id)
        for (slot, (block_id, parent_id, num_tokens, data)), digest in zip(todo, digests, strict=True):
            commit.blocks.add(
                block_id=block_id, slot=slot, checksum=digest, parent_id=parent_id, num_tokens=num_tokens, num_bytes=len(data)
            )
        done = await self._call(attachment, lambda stub: stub.Commit(commit, timeout=self._timeout_s))
        self.stats.bytes_written += sum(len(b[3]) for _, b in todo)
        return num_known + done.num_committed

    async def _send(self, attachment: Attachment, blocks: list[tuple[bytes, bytes, int, memoryview]]) -> int:
        request = pb.MatchRequest(lease_id=attachment.lease_id, block_ids=[b[0] for b in blocks])
        known = await self._call(attachment, lambda stub: stub.Match(request, timeout=self._timeout_s))
        rest = blocks[len(known.found) :]
        if not rest:
            return len(blocks)
        stub = kvstore_pb2_grpc.KvStoreStub(self._mesh.direct_channel(attachment.info))

        async def pieces() -> AsyncIterator[pb.BlockPiece]:
            for block_id, parent_id, num_tokens, data in rest:
                digest = await asyncio.to_thread(checksum, data)
                for piece in split(block_id, parent_id, num_tokens, data, digest, lease_id=attachment.lease_id):
                    yield piece

        num_bytes = sum(len(b[3]) for b in rest)
        try:
            reply = await stub.PutBlocks(pieces(), timeout=self._timeout_s + num_bytes / _STREAM_BYTES_PER_S)
        except grpc.aio.AioRpcError as e:
            error = wire.error_from_rpc(e)
            self._note_failure(attachment, error)
            raise error from e
        self.stats.bytes_written += num_bytes
        return len(known.found) + reply.num_stored + reply.num_known

    def _flat(self, block_id: bytes, parent_id: bytes, num_tokens: int, data: Any) -> memoryview:
        view = memoryview(data)
        if not view.c_contiguous:
            raise InvalidRequest("a block's buffer must be C-contiguous", param="data")
        view = view.cast("B")
        if not 0 < len(view) <= self.layout.block_bytes:
            raise InvalidRequest(f"a block has 1 to {self.layout.block_bytes} bytes, got {len(view)}", param="data")
        if len(block_id) != 32 or len(parent_id or b"") not in (0, 32) or not 0 < num_tokens <= self.layout.block_tokens:
            raise InvalidRequest("malformed block id, parent id or token count", param="block_id")
        return view

    # --- attachments ----------------------------------------------------------------------------------------------

    async def _attached(self) -> Attachment:
        """The attachment for new work, made when there is none. Raises Unavailable during back-off."""
        if self._closed:
            raise Unavailable("the kv client is closed")
        if self._current is not None and self._current.usable:
            return self._current
        async with self._attaching:
            if self._current is not None:
                if self._current.usable:
                    return self._current
                self._retire(self._current)
            if self._fenced == self._incarnation_now():
                raise StaleIncarnation("a newer incarnation of this holder is attached")
            if time.monotonic() < self._not_before:
                raise Unavailable("the store failed a moment ago", retry_after_s=self._not_before - time.monotonic())
            if len(self._retired) >= _MAX_RETIRED:
                raise Unavailable("too many leases wait for their refs to be released")
            try:
                self._current = await self._attach()
            except PlugmeshError as e:
                if isinstance(e, StaleIncarnation):
                    self._fenced = self._incarnation_now()
                    log.error("kv.fenced", holder=self._holder)
                self._back_off()
                raise
            if self._renewer is None:
                self._renewer = asyncio.create_task(self._renew_forever(), name="kv.renew")
            return self._current

    async def _attach(self) -> Attachment:
        info = self._choose()
        wants_arena = self._allow_arena and info.incarnation not in self._arena_unreachable
        request = pb.AttachRequest(
            layout=wire.layout_to_pb(self.layout), holder=self._holder, incarnation=self._incarnation_now(),
            host=host_id() if wants_arena else "",
        )
        asked = time.monotonic()
        try:
            reply = await self._stub(info).Attach(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as e:
            raise wire.error_from_rpc(e) from e
        attachment = Attachment(reply, info)
        attachment.valid_until = asked + reply.lease_ttl_s
        if reply.arena_path:
            try:
                await attachment.map_arena(reply)
            except ArenaNotHere as e:
                # The same machine but not the same file system (containers): bytes go over gRPC.
                log.warning("kv.arena_unreachable", store=info.instance_id, reason=e.message)
                self._arena_unreachable.add(info.incarnation)
                await self._detach(attachment)
                return await self._attach()
            except PlugmeshError:
                await self._detach(attachment)
                raise
        self.stats.num_attached += 1
        self._not_before, self._backoff_s = 0.0, _BACKOFF_S[0]
        log.info("kv.attached", store=info.instance_id, arena=attachment.is_local)
        return attachment

    def _incarnation_now(self) -> str:
        me = self._mesh.self_info
        return me.incarnation if me.instance_id == self._holder else self._incarnation

    def _choose(self) -> InstanceInfo:
        infos = sorted(self._mesh.instances(ROLE), key=lambda i: i.instance_id)
        if self._store_instance is not None:
            infos = [i for i in infos if i.instance_id == self._store_instance]
        here = host_id()
        best = next((i for i in infos if i.host == here), None) or next(iter(infos), None)
        if best is None:
            raise Unavailable("no kvstore is known", retry_after_s=1.0)
        return best

    def _stub(self, info: InstanceInfo) -> Any:
        """Over the bus while it is there, else straight to the instance."""
        channel = self._mesh.channel(ROLE, info.instance_id) if self._mesh.connected else self._mesh.direct_channel(info)
        return kvstore_pb2_grpc.KvStoreStub(channel)

    def _retire(self, attachment: Attachment) -> None:
        """No new work on it; it closes when its last use ends."""
        if attachment.retired:
            return
        attachment.retired = True
        if self._current is attachment:
            self._current = None
        self._retired.append(attachment)
        self._drop_use(attachment, 0)

    def _drop_use(self, attachment: Attachment, num: int) -> None:
        attachment.uses -= num
        if attachment.retired and attachment.uses == 0 and attachment in self._retired:
            self._retired.remove(attachment)
            self._spawn(self._detach(attachment))

    async def _detach(self, attachment: Attachment) -> None:
        """Unmaps first: afterwards the store may reuse everything at once."""
        attachment.close()
        if attachment.lease_lost:
            return
        try:
            await self._stub(attachment.info).Detach(pb.DetachRequest(lease_id=attachment.lease_id), timeout=self._timeout_s)
        except (grpc.aio.AioRpcError, PlugmeshError) as e:
            log.debug("kv.detach_failed", error=type(e).__name__)  # the freed guard tells the store as well

    async def _renew_forever(self) -> None:
        while True:
            attachments = [*([self._current] if self._current else []), *self._retired]
            for attachment in attachments:
                await self._renew(attachment)
            ttl_s = min((a.ttl_s for a in attachments), default=1.0)
            await asyncio.sleep(ttl_s / 3)

    async def _renew(self, attachment: Attachment) -> None:
        if attachment.lease_lost:
            return
        asked = time.monotonic()
        try:
            request = pb.RenewRequest(lease_id=attachment.lease_id)
            timeout_s = min(self._timeout_s, attachment.ttl_s / 3)
            reply = await self._stub(attachment.info).Renew(request, timeout=timeout_s)
            attachment.valid_until = asked + reply.lease_ttl_s
        except grpc.aio.AioRpcError as e:
            error = wire.error_from_rpc(e)
            if isinstance(error, StaleIncarnation):
                self._lose(attachment)
            else:
                log.debug("kv.renew_failed", code=error.code)  # `usable` turns false when the lease runs out
        except PlugmeshError as e:
            log.debug("kv.renew_failed", code=e.code)

    def _lose(self, attachment: Attachment) -> None:
        if not attachment.lease_lost:
            attachment.lease_lost = True
            log.warning("kv.lease_lost", store=attachment.info.instance_id)
        self._retire(attachment)

    # --- failures -------------------------------------------------------------------------------------------------

    async def _guarded(
        self, work: Callable[[], Coroutine[Any, Any, T]], nothing: T, undo: Callable[[T], None] | None = None
    ) -> T:
        """Runs `work` to its end even when the caller is cancelled; once more after a lost lease; a failure is `nothing`."""
        task = self._spawn(self._attempt(work, nothing))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if undo is not None:
                task.add_done_callback(lambda t: undo(t.result()) if not t.cancelled() and t.exception() is None else None)
            raise

    async def _attempt(self, work: Callable[[], Coroutine[Any, Any, T]], nothing: T) -> T:
        error: PlugmeshError
        for attempt in (1, 2):
            try:
                return await work()
            except PlugmeshError as e:
                error = e
                if not isinstance(e, StaleIncarnation) or self._fenced == self._incarnation_now() or attempt == 2:
                    break
        self._count(error, "kv")
        if self._strict:
            raise error
        return nothing

    async def _call(self, attachment: Attachment, call: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await call(self._stub(attachment.info))
        except grpc.aio.AioRpcError as e:
            error = wire.error_from_rpc(e)
            self._note_failure(attachment, error)
            raise error from e

    def _note_failure(self, attachment: Attachment, error: PlugmeshError) -> None:
        if isinstance(error, StaleIncarnation):
            self._lose(attachment)
        elif not isinstance(error, (InvalidRequest, FailedPrecondition)):
            # Whether the store did what was asked is unknown; the lease may hold more than we know of. A new one for
            # new work, and this one ends, with all it holds, as soon as its refs are released.
            self._retire(attachment)
            self._back_off()

    def _back_off(self) -> None:
        self._not_before = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])

    def _count(self, error: PlugmeshError, where: str) -> None:
        self.stats.failures[error.code] = self.stats.failures.get(error.code, 0) + 1
        log.debug("kv.failed", where=where, code=error.code, message=error.message)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _count_good(refs: list[BlockRef]) -> int:
    for i, ref in enumerate(refs):
        if checksum(ref.data) != ref.checksum:
            return i
    return len(refs)


def _write(attachment: Attachment, todo: list[tuple[int, tuple[bytes, bytes, int, memoryview]]]) -> list[int]:
    """Copies blocks into their slots; the checksum is that of the source, so a torn copy cannot pass."""
    digests = []
    for slot, (_, _, _, data) in todo:
        with attachment.write(slot, len(data)) as view:
            view[:] = data
        digests.append(checksum(data))
    return digests
