"""The experience table on the wire: translates RPCs into calls of `Table`."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import structlog

from plugmesh.errors import InvalidRequest, LimitExceeded, NotFound, PlugmeshError, Unavailable
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.records import RowView, SampleContext, Sampler, SamplerRecord
from plugmesh_proto.v1 import rollout_pb2 as pb
from plugmesh_proto.v1 import rollout_pb2_grpc
from plugmesh_rollout.config import Settings
from plugmesh_rollout.measure import Gauges
from plugmesh_rollout.shared import Area, Areas, Window
from plugmesh_rollout.table.controller import TopicStatus
from plugmesh_rollout.table.ledger import Ledger
from plugmesh_rollout.table.samplers import CoreSamplers
from plugmesh_rollout.table.table import Ask, OpenTopic, Table
from plugmesh_rollout.table.topic import Lease, NewRow, TopicSpec

log = structlog.get_logger()

TOPIC = "rollout.events"
FULL_NAME = "plugmesh_proto.v1.Rollout"
WATCH_EVERY_S = 0.02
_INLINE_BYTES = 2 << 20    # of a batch, in the answer itself; a message may have 8 MiB
_PIECE_BYTES = 1 << 20
_STREAM_BYTES = 256 << 20  # of one put in pieces
_ROW_BYTES = 7 << 20       # as a message of its own would hold
_MAX_ROWS = 65536          # of one call


class RolloutServicer(rollout_pb2_grpc.RolloutServicer):
    """One method per RPC; see rollout.proto for what each promises."""

    def __init__(self, table: Table, settings: Settings, areas: Areas) -> None:
        self._table = table
        self._areas = areas
        self._settings = settings
        self._ended = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self._ended.is_set()

    def close(self) -> None:
        """Calls that go on by themselves end; new ones are refused."""
        self._ended.set()

    async def CreateTopic(self, request: pb.TopicSpec, context: Any) -> pb.CreateTopicReply:
        self._check_open()
        return pb.CreateTopicReply(created=await self._table.create_topic(_spec_from_pb(request)))

    async def DropTopic(self, request: pb.DropTopicRequest, context: Any) -> pb.DropTopicReply:
        self._check_open()
        return pb.DropTopicReply(dropped=await self._table.drop_topic(request.topic))

    async def Put(self, request: pb.PutRequest, context: Any) -> pb.PutReply:
        self._check_call(len(request.rows))
        return await self._put(request, _new_rows(request.fields, request.rows, self._area(request)))

    async def PutStream(self, request_iterator: AsyncIterator[pb.PutRequest], context: Any) -> pb.PutReply:
        rows: list[NewRow] = []
        head = await self._collect(request_iterator, lambda piece, head: rows.extend(_new_rows(head.fields, piece.rows)))
        self._check_call(len(rows))
        return await self._put(head, rows)

    async def _put(self, head: pb.PutRequest, rows: Sequence[NewRow]) -> pb.PutReply:
        indexes = await self._table.put(head.topic, rows, keep_existing=head.keep_existing, wait_s=self._wait(head.wait_s))
        return pb.PutReply(indexes=indexes)

    async def PutFields(self, request: pb.PutFieldsRequest, context: Any) -> pb.PutFieldsReply:
        self._check_call(len(request.rows))
        return await self._put_fields(request, *_changes(request.fields, request.rows, self._area(request)))

    async def PutFieldsStream(self, request_iterator: AsyncIterator[pb.PutFieldsRequest], context: Any) -> pb.PutFieldsReply:
        indexes: list[int] = []
        cells: list[Mapping[str, bytes]] = []
        versions: list[int | None] = []

        def add(piece: pb.PutFieldsRequest, head: pb.PutFieldsRequest) -> None:
            for total, part in zip((indexes, cells, versions), _changes(head.fields, piece.rows), strict=True):
                total.extend(part)  # type: ignore[attr-defined]

        head = await self._collect(request_iterator, add)
        self._check_call(len(indexes))
        return await self._put_fields(head, indexes, cells, versions)

    async def _put_fields(
        self, head: pb.PutFieldsRequest, indexes: Sequence[int], cells: Sequence[Mapping[str, bytes]], versions: Sequence[int | None]
    ) -> pb.PutFieldsReply:
        num = await self._table.put_fields(
            head.topic, indexes, cells, versions, lease_id=head.lease_id, task=head.task, wait_s=self._wait(head.wait_s)
        )
        return pb.PutFieldsReply(num_changed=num)

    async def _collect(self, pieces: AsyncIterator[Any], add: Callable[[Any, Any], None]) -> Any:
        """The first message of a stream, after all were added."""
        head, num_bytes = None, 0
        async for piece in pieces:
            self._check_open()
            head = head or piece
            num_bytes += piece.ByteSize()
            if num_bytes > _STREAM_BYTES:
                raise InvalidRequest(f"one call carries at most {_STREAM_BYTES} bytes; put the rows in several", param="rows")
            add(piece, head)
        if head is None:
            raise InvalidRequest("a stream without a message")
        return head

    async def Get(self, request: pb.GetRequest, context: Any) -> pb.GetReply:
        self._check_call(request.batch_size)
        ask = Ask(
            request.task, tuple(request.fields), request.batch_size, request.lease_id, request.lease_s, request.sampler or "sequential", request.sampler_options,
            request.min_rows or None, _optional(request, "latest_version"), request.any_version, _optional(request, "stamp_version"),
            request.rank, request.num_ranks or 1, _optional(request, "batch_index"),
        )  # fmt: skip
        opened = self._table.find(request.topic)
        lease = await self._table.get(request.topic, ask, wait_s=self._wait(request.wait_s), partial=request.partial)
        reply = pb.GetReply(latest_version=opened.topic.latest_version)
        if lease is not None:
            area = self._area(request)  # not before: it may have gone while this call waited, and its file with it
            num = (
                _fill(reply, opened, lease, lease.rows, _INLINE_BYTES) if area is None
                else _fill_window(reply, opened, lease, area.window(request.area_offset, request.area_bytes))
            )  # fmt: skip
            reply.num_more = len(lease.rows) - num
        return reply

    async def Read(self, request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.GetReply]:
        self._check_open()
        lease, opened = self._table.read(request.topic, request.lease_id)
        left = lease.rows[max(0, request.skip) :]
        while left:
            reply = pb.GetReply()
            left = left[_fill(reply, opened, lease, left, _PIECE_BYTES) :]
            reply.num_more = len(left)
            yield reply

    async def Share(self, request: pb.ShareRequest, context: Any) -> AsyncIterator[pb.ShareReply]:
        self._check_open()
        opened = await self._areas.open(request.boot_id, request.num_bytes)
        if opened is None:
            yield pb.ShareReply()
            return
        name, area = opened
        try:
            yield pb.ShareReply(area=name, path=str(area.path), num_bytes=area.num_bytes, nonce=area.nonce)
            await self._ended.wait()  # or until the caller ends the call, or its death does
        finally:
            self._areas.drop(name)

    def _area(self, request: Any) -> Area | None:
        return self._areas.find(request.area) if request.area else None

    async def Ack(self, request: pb.AckRequest, context: Any) -> pb.AckReply:
        self._check_call(len(request.indexes))
        return pb.AckReply(num_done=await self._table.ack(request.topic, request.task, request.lease_id, list(request.indexes)))

    async def Extend(self, request: pb.ExtendRequest, context: Any) -> pb.ExtendReply:
        self._check_open()
        self._table.extend(request.topic, request.lease_id, request.lease_s)
        return pb.ExtendReply()

    async def Release(self, request: pb.ReleaseRowsRequest, context: Any) -> pb.ReleaseRowsReply:
        self._check_open()
        return pb.ReleaseRowsReply(num_released=self._table.release(request.topic, request.lease_id))

    async def Clear(self, request: pb.ClearRowsRequest, context: Any) -> pb.ClearRowsReply:
        self._check_call(len(request.indexes))
        return pb.ClearRowsReply(num_cleared=await self._table.clear(request.topic, list(request.indexes), _optional(request, "older_than")))

    async def PublishVersion(self, request: pb.PublishVersionRequest, context: Any) -> pb.PublishVersionReply:
        self._check_open()
        await self._table.publish_version(request.topic, request.version)
        return pb.PublishVersionReply()

    async def Status(self, request: pb.TableStatusRequest, context: Any) -> pb.TableStatus:
        self._check_open()
        return pb.TableStatus(topics=[_status_to_pb(t, s) for t, s in self._table.statuses(request.topic)], durability=self._settings.durability)

    async def Watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.TableEvent]:
        self._check_open()
        opened = self._table.find(request.topic)
        changed = asyncio.Event()
        opened.watchers.add(changed)
        try:
            while not self.closed:
                yield event_of(opened)
                while not changed.is_set() and not self.closed:
                    try:
                        async with asyncio.timeout(1.0):
                            await changed.wait()
                    except TimeoutError:
                        pass
                if self._table.topics.get(request.topic) is not opened:
                    raise NotFound(f"topic {request.topic!r} was dropped", param="topic")
                await asyncio.sleep(WATCH_EVERY_S)
                changed.clear()
        finally:
            opened.watchers.discard(changed)

    async def Checkpoint(self, request: pb.CheckpointRequest, context: Any) -> pb.CheckpointReply:
        self._check_open()
        return pb.CheckpointReply(num_topics=await self._table.checkpoint())

    def _wait(self, wait_s: float) -> float:
        return min(max(0.0, wait_s), self._settings.max_wait_s)

    def _check_call(self, num_rows: int) -> None:
        self._check_open()
        if num_rows > _MAX_ROWS:
            raise InvalidRequest(f"{num_rows} rows in one call; {_MAX_ROWS} are allowed", param="rows")

    def _check_open(self) -> None:
        if self.closed:
            raise Unavailable("the rollout service is stopping", retry_after_s=1.0)


class RolloutService:
    """Life cycle: restores the table from its ledger, sweeps leases, publishes events."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._settings: Settings = context.settings
        self._ledger: Ledger | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._servicer: RolloutServicer | None = None
        self._changed: dict[str, OpenTopic] = {}
        self._wake = asyncio.Event()
        self._areas = Areas(self._settings.shared_bytes)
        self.table: Table | None = None

    async def start(self) -> None:
        """Raises ConfigError for a ledger in use or a plugin that fails, DataLoss for a ledger that is damaged."""
        s = self._settings
        self._context.plugins.register_builtin(CoreSamplers())
        core = {record.name for record in CoreSamplers().register_samplers()}
        samplers = {r.name: r if r.name in core else self._guarded(r) for r in self._context.plugins.records("samplers")}
        saved = []
        if s.durability != "none":
            folder = (s.ledger_dir or pathlib.Path(self._context.config.mesh.data_dir) / "rollout").expanduser()
            self._ledger = await asyncio.to_thread(Ledger, folder, s.durability, segment_bytes=s.segment_bytes)
            saved = await asyncio.to_thread(self._ledger.load)
        self.table = Table(
            samplers, self._ledger, memory_bytes=s.memory_bytes, waiting_bytes=s.waiting_bytes, max_topics=s.max_topics, max_waiting=s.max_waiting,
            on_change=self._on_change,
        )  # fmt: skip
        self.table.restore(saved)
        if self._ledger is not None:
            self._ledger.start()
        self._servicer = RolloutServicer(self.table, s, self._areas)
        gauges = Gauges(self._context.metrics, self.table, self._ledger)
        self._tasks = [
            asyncio.create_task(_forever(lambda: self._sweep(gauges), s.sweep_s), name="rollout.sweep"),
            asyncio.create_task(_forever(self._publish, WATCH_EVERY_S), name="rollout.publish"),
        ]
        log.info("rollout.started", durability=s.durability, num_topics=len(self.table.topics), num_samplers=len(samplers))

    def bindings(self) -> Sequence[Binding]:
        return [
            Binding(
                rollout_pb2_grpc.add_RolloutServicer_to_server, self._servicer, FULL_NAME,
                grpc_only=frozenset({"Put", "PutStream", "PutFields", "PutFieldsStream", "Get", "Read", "Share"}),
            )
        ]  # fmt: skip

    async def drain(self, deadline_s: float) -> None:
        """Nothing to wait for: who has a lease finishes with the table's next life."""

    async def stop(self) -> None:
        """What was answered is in the ledger; who waits gets Unavailable. Safe after a failed start."""
        if self._servicer is not None:
            self._servicer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._areas.close()
        if self._ledger is not None:
            await asyncio.to_thread(self._ledger.close)

    def describe(self) -> dict[str, Any]:
        return {"roles": ("rollout",)}

    def _guarded(self, record: SamplerRecord) -> SamplerRecord:
        """A plugin's record whose samplers cannot hold up the event loop for ever, and whose errors name the plugin."""
        guard = self._context.plugins.guard

        def build(options: Mapping[str, Any]) -> Sampler:
            return GuardedSampler(record.name, guard(record.name, record.build, options), guard)

        return dataclasses.replace(record, build=build)

    def _on_change(self, opened: OpenTopic) -> None:
        self._changed[opened.topic.spec.name] = opened
        self._wake.set()

    async def _sweep(self, gauges: Gauges) -> None:
        assert self.table is not None
        self.table.sweep()
        gauges.update()
        self._context.mesh.set_load(rollout_rows=float(sum(len(t.topic.rows) for t in self.table.topics.values())))

    async def _publish(self) -> None:
        """What changed since the last time, a message per topic. A lost one is made up for by the next: events are facts, not steps."""
        await self._wake.wait()
        self._wake.clear()
        changed, self._changed = self._changed, {}
        for opened in changed.values():
            try:
                await self._context.mesh.publish(TOPIC, event_of(opened).SerializeToString())
            except PlugmeshError:
                return  # the broker is away; `Watch` goes on


class GuardedSampler:
    """Another's sampler, called through `PluginHost.guard`."""

    def __init__(self, name: str, inner: Sampler, guard: Callable[..., Any]) -> None:
        self._name = name
        self._inner = inner
        self._guard = guard

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        answer: tuple[list[int], list[int]] = self._guard(self._name, self._inner.sample, ready, batch_size, context)
        return answer

    def forget(self, indexes: Sequence[int]) -> None:
        forget = getattr(self._inner, "forget", None)
        if forget is not None:
            self._guard(self._name, forget, indexes)


async def _forever(work: Callable[[], Awaitable[None]], every_s: float) -> None:
    while True:
        try:
            await work()
        except Exception as e:
            log.error("rollout.background_failed", error=type(e).__name__, exc_info=True)
            await asyncio.sleep(1.0)
        await asyncio.sleep(every_s)


def event_of(opened: OpenTopic) -> pb.TableEvent:
    topic = opened.topic
    return pb.TableEvent(
        topic=topic.spec.name, sequence=opened.sequence, num_rows=len(topic.rows), num_ready=opened.num_ready(), latest_version=topic.latest_version
    )


def _optional(message: Any, name: str) -> int | None:
    return int(getattr(message, name)) if message.HasField(name) else None


def _new_rows(fields: Sequence[str], rows: Iterable[pb.TableRow], area: Area | None = None) -> list[NewRow]:
    names = list(fields)
    return [NewRow(r.id, _cells(names, r, area), _optional(r, "version"), r.group) for r in rows]


def _changes(fields: Sequence[str], rows: Sequence[pb.TableRow], area: Area | None = None) -> tuple[list[int], list[Mapping[str, bytes]], list[int | None]]:
    names = list(fields)
    return [r.index for r in rows], [_cells(names, r, area) for r in rows], [_optional(r, "version") for r in rows]


def _cells(names: list[str], row: pb.TableRow, area: Area | None) -> dict[str, bytes]:
    cells = row.cells if area is None else area.cells(row.spans)
    if len(cells) > len(names):
        raise InvalidRequest(f"a row has {len(cells)} cells for {len(names)} fields", param="rows")
    if area is not None and sum(map(len, cells)) > _ROW_BYTES:
        raise LimitExceeded(f"a row of {sum(map(len, cells))} bytes; it has at most {_ROW_BYTES}", param="rows")
    return {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def _fill_window(reply: pb.GetReply, opened: OpenTopic, lease: Lease, window: Window) -> int:
    """As `_fill`, with values in the caller's shared memory."""
    for num, index in enumerate(lease.rows):
        spans = window.write(opened.topic.storage.read(index, lease.fields))
        if spans is None:
            return num
        row = opened.topic.rows[index]
        reply.rows.add(id=row.id, group=row.group, version=row.version, spans=spans, index=index)
    return len(lease.rows)


def _fill(reply: pb.GetReply, opened: OpenTopic, lease: Lease, rows: Sequence[int], max_bytes: int) -> int:
    """Adds rows until they have `max_bytes`; returns how many."""
    num_bytes = num = 0
    for index in rows:
        cells = opened.topic.storage.read(index, lease.fields)
        num_bytes += sum(map(len, cells))
        if num and num_bytes > max_bytes:
            break
        row = opened.topic.rows[index]
        reply.rows.add(id=row.id, group=row.group, version=row.version, cells=cells, index=index)
        num += 1
    return num


def _spec_from_pb(m: pb.TopicSpec) -> TopicSpec:
    if m.dtypes and len(m.dtypes) != len(m.fields):
        raise InvalidRequest("one dtype for each field, or none at all", param="dtypes")
    if len(set(m.fields)) != len(m.fields):
        raise InvalidRequest("a field is named twice", param="fields")
    dtypes = m.dtypes or [""] * len(m.fields)
    remember = _optional(m, "remember_rows")
    return TopicSpec(
        m.name, dict(zip(m.fields, dtypes, strict=True)), tuple(m.tasks), m.group_size, m.capacity_rows, m.capacity_bytes, _optional(m, "staleness"),
        m.batch_rows, m.admission_task, not m.keep_done, m.row_bytes, *(() if remember is None else (remember,)),
    )  # fmt: skip


def _spec_to_pb(s: TopicSpec) -> pb.TopicSpec:
    return pb.TopicSpec(
        name=s.name, fields=list(s.fields), dtypes=list(s.fields.values()), tasks=s.tasks, group_size=s.group_size, capacity_rows=s.capacity_rows,
        capacity_bytes=s.capacity_bytes, staleness=s.staleness, batch_rows=s.batch_rows, admission_task=s.admission_task, keep_done=not s.auto_clear,
        row_bytes=s.row_bytes, remember_rows=s.remember_rows,
    )  # fmt: skip


def _status_to_pb(opened: OpenTopic, s: TopicStatus) -> pb.TopicStatus:
    return pb.TopicStatus(
        spec=_spec_to_pb(s.spec), num_rows=s.num_rows, num_bytes=s.num_bytes, num_put=s.num_put, num_in_flight=s.num_in_flight, num_leases=s.num_leases,
        num_stale=s.num_stale, latest_version=s.latest_version, versions={v: n for v, n in s.versions.items() if v is not None},
        tasks={
            name: pb.TaskStatus(
                num_free=t.num_free, num_held=t.num_held, num_done=t.num_done, num_ready={",".join(f): n for f, n in t.num_ready.items()}, lags=t.lags
            )
            for name, t in s.tasks.items()
        },
        num_waiting_puts=len(opened.putters) + len(opened.field_putters), num_waiting_gets=len(opened.getters),
    )  # fmt: skip


def create(context: ServiceContext) -> RolloutService:
    """Light: the ledger is opened in `start`."""
    return RolloutService(context)
