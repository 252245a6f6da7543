"""The experience table's client: for workers of the mesh and for trainers outside it; needs grpcio and numpy.

    table = RolloutClient("127.0.0.1:9100")
    await table.create_topic("math", ["prompt", "response_ids", "reward"], ["rollout", "reward", "train"], group_size=8, staleness=1, batch_rows=64)
    await table.put("math", [Row("p0/0", {"prompt": "1+1="}, group="p0"), ...])
    batch = await table.get("math", "rollout", ["prompt"], 8, sampler="grpo_groups", wait_s=10)
    await table.ack(batch, {"response_ids": [np.array([5, 2], np.int32), ...]}, version=3)

A batch is leased: who does not acknowledge it in time loses it to somebody else, and is told so (`StaleIncarnation`) when it comes too late. Every call may be
repeated: a lost answer or a restarted table costs time, not rows. Calls are repeated by themselves for `retry_s` while nobody answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from plugmesh.client.rollout_shared import SharedArea
from plugmesh.client.rollout_values import Value, decode, encode
from plugmesh.errors import DeadlineExceeded, InternalError, InvalidRequest, LimitExceeded, PlugmeshError, Unavailable
from plugmesh.tasks import end
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import rollout_pb2 as pb
from plugmesh_proto.v1 import rollout_pb2_grpc

if TYPE_CHECKING:
    from plugmesh.mesh.api import Mesh

MAX_ROW_BYTES = 7 << 20   # a message has at most 8 MiB
_MESSAGE_BYTES = 2 << 20  # what is more goes in pieces of this size
_SHARE_FROM = 256 << 10   # what is less in one call goes with it, which is as quick
_FIRST_GUESS = 2 << 20    # of what a batch takes, until one has come
_DECLINED_S = 30.0        # before the table is asked for shared memory again
_GRACE_S = 30.0           # beyond wait_s, for a call to be answered
_OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A sample. `version` is that of the weights that made it; `index` is the table's own, known of rows that come from it."""

    id: str
    fields: Mapping[str, Value]
    version: int | None = None
    group: str = ""
    index: int = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows under a lease; falsy without rows. `latest_version` is the topic's at hand-out."""

    topic: str
    task: str
    lease_id: str
    lease_s: float
    rows: tuple[Row, ...]
    latest_version: int | None = None

    @property
    def indexes(self) -> list[int]:
        return [row.index for row in self.rows]

    def column(self, name: str) -> list[Any]:
        """The values of a field, by row."""
        return [row.fields[name] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class TaskState:
    """`num_ready` by the fields asked for, joined with ","; `lags` versions behind at hand-out to rows."""

    num_free: int
    num_held: int
    num_done: int
    num_ready: Mapping[str, int]
    lags: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class TopicState:
    """Figures of a topic; `num_put` counts since it was made, `versions` live rows that have one."""

    name: str
    num_rows: int
    num_bytes: int
    num_put: int
    num_in_flight: int
    num_leases: int
    num_stale: int
    latest_version: int | None
    versions: Mapping[int, int]
    tasks: Mapping[str, TaskState]
    num_waiting_puts: int
    num_waiting_gets: int


@dataclass(frozen=True, slots=True)
class TopicEvent:
    """What a topic is like after a change; `num_ready` by task."""

    topic: str
    sequence: int
    num_rows: int
    num_ready: Mapping[str, int] = field(default_factory=dict)
    latest_version: int | None = None


class RolloutClient:
    """For one event loop.

    Args:
        address: "host:port" of the service's gRPC address; or a function that gives a channel, asked again after a failure (see `of_mesh`).
        shared_bytes: Memory to share with a table on the same host, through which values then move; 0 has them go with the calls, as they do where it declines.
        retry_s: How long to repeat a call while nobody answers (Unavailable, DeadlineExceeded), before raising that.
    """

    def __init__(self, address: str | Callable[[], grpc.aio.Channel], *, retry_s: float = 30.0, shared_bytes: int = 16 << 20) -> None:
        self._own: grpc.aio.Channel | None = None
        if isinstance(address, str):
            channel = self._own = grpc.aio.insecure_channel(address, options=_OPTIONS)
            self._channel: Callable[[], grpc.aio.Channel] = lambda: channel
        else:
            self._channel = address
        self._stub: Any = None
        self._retry_s = retry_s
        self._name = secrets.token_hex(6)
        self._numbers = itertools.count()
        self._shared_bytes = shared_bytes
        self._area: SharedArea | None = None
        self._asking: asyncio.Task[None] | None = None
        self._declined_until = 0.0
        self._batch_bytes: dict[tuple[str, str], int] = {}  # of the largest batch of late, by topic and task

    @classmethod
    def of_mesh(cls, mesh: Mesh, *, retry_s: float = 30.0, shared_bytes: int = 16 << 20) -> RolloutClient:
        """For a member of the mesh: finds the service, also after it was started anew somewhere else."""

        def channel() -> grpc.aio.Channel:
            found = mesh.instances("rollout")
            if not found:
                raise Unavailable("no rollout service is running in this mesh", retry_after_s=1.0)
            return mesh.direct_channel(found[0])

        return cls(channel, retry_s=retry_s, shared_bytes=shared_bytes)

    # -- topics ---------------------------------------------------------------------------------------------------------

    async def create_topic(
        self, name: str, fields: Sequence[str] | Mapping[str, str], tasks: Sequence[str], *, group_size: int = 1, capacity_rows: int = 65536,
        capacity_bytes: int = 256 << 20, staleness: int | None = None, batch_rows: int = 0, admission_task: str = "", auto_clear: bool = True, row_bytes: int = 0,
        remember_rows: int = 1 << 20,
    ) -> bool:  # fmt: skip
        """Whether it is new; the same again is no change.

        Args:
            fields: Names, or name to dtype ("int32", "str", ...); without one the first value's holds.
            staleness: Versions that a row may lie behind the latest; None: any number.
            batch_rows: Rows of one training step: with `staleness`, at most (staleness + 1) * batch_rows rows are in flight, and `put` waits.
            admission_task: Rows are in flight until this task is done with them; "": until all are.
            auto_clear: Rows that all tasks are done with leave by themselves.
            row_bytes: Set aside for every row, so that its later fields find room.

        Raises:
            AlreadyExists: There is another topic of that name.
            InvalidRequest: Arguments that cannot work, such as a capacity below what is in flight.
        """
        dtypes = list(fields.values()) if isinstance(fields, Mapping) else []
        spec = pb.TopicSpec(
            name=name, fields=list(fields), dtypes=dtypes, tasks=tasks, group_size=group_size, capacity_rows=capacity_rows, capacity_bytes=capacity_bytes,
            staleness=staleness, batch_rows=batch_rows, admission_task=admission_task, keep_done=not auto_clear, row_bytes=row_bytes, remember_rows=remember_rows,
        )  # fmt: skip
        return bool((await self._call("CreateTopic", spec)).created)

    async def drop_topic(self, topic: str) -> bool:
        return bool((await self._call("DropTopic", pb.DropTopicRequest(topic=topic))).dropped)

    async def status(self, topic: str) -> TopicState:
        reply = await self._call("Status", pb.TableStatusRequest(topic=topic))
        return _state(reply.topics[0])

    async def statuses(self) -> list[TopicState]:
        """Of every topic."""
        return [_state(t) for t in (await self._call("Status", pb.TableStatusRequest())).topics]

    async def publish_version(self, topic: str, version: int) -> None:
        """The trainer has new weights; versions only grow."""
        await self._call("PublishVersion", pb.PublishVersionRequest(topic=topic, version=version))

    async def checkpoint(self) -> None:
        """Returns when everything so far is durable, and compacts the ledger."""
        await self._call("Checkpoint", pb.CheckpointRequest())

    async def watch(self, topic: str) -> AsyncIterator[TopicEvent]:
        """One event at once, then one after changes, at most one in 20 ms; goes on over a restart of the table. Raises NotFound when there is no such topic."""
        while True:
            try:
                async for e in self._stubs().Watch(pb.WatchRequest(topic=topic)):
                    yield TopicEvent(e.topic, e.sequence, e.num_rows, dict(e.num_ready), _optional(e, "latest_version"))
            except grpc.RpcError as raw:
                error = error_from_rpc(raw)
                if not isinstance(error, Unavailable):
                    raise error from None
            except Unavailable:
                pass
            self._stub = None
            await asyncio.sleep(0.2)

    # -- rows -----------------------------------------------------------------------------------------------------------

    async def put(self, topic: str, rows: Sequence[Row], *, keep_existing: bool = False, wait_s: float = 60.0) -> list[int]:
        """All rows or none; returns their indexes. A row whose id is known with the same content is no change.

        Args:
            keep_existing: Of a known id, other content is no error, and what is there stays: for work that was done again after a lease ended.
            wait_s: For room in the table and for admission.

        Raises:
            AlreadyExists: An id is known with other content.
            Overloaded: No room within `wait_s`.
        """
        names = list(dict.fromkeys(name for row in rows for name in row.fields))
        made = [pb.TableRow(id=row.id, group=row.group, version=row.version) for row in rows]
        cells = [[encode(row.fields[n]) if n in row.fields else b"" for n in names] for row in rows]
        deadline = time.monotonic() + wait_s
        while True:
            left = max(0.0, min(deadline - time.monotonic(), _LONGEST_WAIT_S))
            head = {"topic": topic, "fields": names, "keep_existing": keep_existing, "wait_s": left}
            try:
                reply = await self._send("Put", pb.PutRequest, head, made, cells, left)
                return list(reply.indexes)
            except PlugmeshError as e:
                if e.code != "overloaded" or time.monotonic() + 0.05 > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def put_fields(
        self, topic: str, indexes: Sequence[int], columns: Mapping[str, Sequence[Value]], *, versions: Sequence[int] | None = None, version: int | None = None,
        wait_s: float = 60.0,
    ) -> int:  # fmt: skip
        """Adds fields to rows; returns how many changed. The same values again are no change.

        Args:
            columns: Field to one value for each index.
            versions: Become the rows' versions; or `version` that of all.

        Raises:
            AlreadyExists: A row has another value.
            NotFound: A row has gone.
        """
        return await self._put_fields({"topic": topic, "wait_s": wait_s}, indexes, columns, versions, version, wait_s)

    async def _put_fields(
        self, head: Mapping[str, Any], indexes: Sequence[int], columns: Mapping[str, Sequence[Value]], versions: Sequence[int] | None, version: int | None,
        wait_s: float,
    ) -> int:  # fmt: skip
        if any(len(column) != len(indexes) for column in columns.values()) or (versions is not None and len(versions) != len(indexes)):
            raise InvalidRequest("every column has one value for each index", param="columns")
        made = [pb.TableRow(index=index, version=version if versions is None else versions[i]) for i, index in enumerate(indexes)]
        cells = [[encode(column[i]) for column in columns.values()] for i in range(len(indexes))]
        reply = await self._send("PutFields", pb.PutFieldsRequest, {**head, "fields": list(columns)}, made, cells, min(wait_s, _LONGEST_WAIT_S))
        return int(reply.num_changed)

    async def get(
        self, topic: str, task: str, fields: Sequence[str], batch_size: int, *, sampler: str = "sequential", sampler_options: Mapping[str, Any] | None = None,
        latest_version: int | None = None, any_version: bool = False, stamp_version: int | None = None, min_rows: int | None = None, partial: bool = False,
        rank: int = 0, num_ranks: int = 1, batch_index: int | None = None, lease_s: float = 60.0, wait_s: float = 10.0,
    ) -> Batch:  # fmt: skip
        """Rows that the task has not got and that have these fields; an empty batch when there are not enough within `wait_s`.

        Args:
            min_rows: Fewer than `batch_size` will do, down to this.
            partial: After `wait_s`, any number will do.
            latest_version: The end of the version window, instead of the version published last; `any_version` ignores the window.
            stamp_version: Becomes the rows' version: of the weights that now begin to generate them.
            rank, num_ranks, batch_index: For samplers that serve ranks together.
            lease_s: How long the rows are this caller's; see `keep`.
        """
        lease_id = f"{self._name}-{next(self._numbers)}"
        request = pb.GetRequest(
            topic=topic, task=task, fields=fields, batch_size=batch_size, min_rows=min_rows or 0, partial=partial, sampler=sampler,
            sampler_options=json.dumps(sampler_options, sort_keys=True) if sampler_options else "", latest_version=latest_version, any_version=any_version,
            stamp_version=stamp_version, lease_id=lease_id, lease_s=lease_s, wait_s=wait_s, rank=rank, num_ranks=num_ranks, batch_index=batch_index,
        )  # fmt: skip
        deadline = time.monotonic() + wait_s
        while True:  # a table has a longest wait of its own
            request.wait_s = max(0.0, min(deadline - time.monotonic(), _LONGEST_WAIT_S))
            request.partial = partial and request.wait_s < _LONGEST_WAIT_S
            reply, found = await self._get(request)
            if reply.rows or reply.num_more or time.monotonic() >= deadline:  # of a large row, the place for it may have been too small
                break
        rows = [_row(r, cells, fields) for r, cells in zip(reply.rows, found, strict=True)]
        if reply.num_more:
            try:
                async for piece in self._stubs().Read(pb.ReadRequest(topic=topic, lease_id=lease_id, skip=len(rows)), timeout=_GRACE_S):
                    rows += [_row(r, r.cells, fields) for r in piece.rows]
            except grpc.RpcError as e:
                raise error_from_rpc(e) from None  # the lease ends by itself
        return Batch(topic, task, lease_id, lease_s, tuple(rows), _optional(reply, "latest_version"))

    async def ack(
        self, batch: Batch, outputs: Mapping[str, Sequence[Value]] | None = None, *, versions: Sequence[int] | None = None, version: int | None = None,
        wait_s: float = 60.0,
    ) -> None:  # fmt: skip
        """The task is done with the batch. With outputs, fields and acknowledgement together, or neither.

        Args:
            outputs: Field to one value for each row, as for `put_fields`.

        Raises:
            StaleIncarnation: The lease had ended, so somebody else may be at work on the rows; nothing was written.
        """
        if outputs or versions is not None or version is not None:
            head = {"topic": batch.topic, "lease_id": batch.lease_id, "task": batch.task, "wait_s": wait_s}
            await self._put_fields(head, batch.indexes, outputs or {}, versions, version, wait_s)
            return
        await self._call("Ack", pb.AckRequest(topic=batch.topic, task=batch.task, lease_id=batch.lease_id, indexes=batch.indexes))

    async def extend(self, batch: Batch, lease_s: float | None = None) -> None:
        """The lease lasts so long from now. Raises StaleIncarnation when it had ended."""
        await self._call("Extend", pb.ExtendRequest(topic=batch.topic, lease_id=batch.lease_id, lease_s=batch.lease_s if lease_s is None else lease_s))

    @contextlib.asynccontextmanager
    async def keep(self, batch: Batch) -> AsyncIterator[None]:
        """Extends the lease for the length of a with block, three times as often as needed. A lease that ends all the same shows at the acknowledgement."""

        async def extend() -> None:
            while True:
                await asyncio.sleep(batch.lease_s / 3)
                with contextlib.suppress(PlugmeshError):
                    await self.extend(batch)

        task = asyncio.create_task(extend())
        try:
            yield
        finally:
            await end(task)

    async def release(self, batch: Batch) -> None:
        """The rows go back at once."""
        await self._call("Release", pb.ReleaseRowsRequest(topic=batch.topic, lease_id=batch.lease_id))

    async def clear(self, topic: str, indexes: Iterable[int] = (), *, older_than: int | None = None) -> int:
        """Drops rows, whoever has them, and those of versions below `older_than`; returns how many. Unknown ones are no error."""
        reply = await self._call("Clear", pb.ClearRowsRequest(topic=topic, indexes=list(indexes), older_than=older_than))
        return int(reply.num_cleared)

    async def close(self) -> None:
        if self._asking is not None:
            await end(self._asking)
        self._leave_area()
        if self._own is not None:
            await self._own.close()

    async def __aenter__(self) -> RolloutClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # -- calls ----------------------------------------------------------------------------------------------------------

    def _stubs(self) -> Any:
        if self._stub is None:
            self._stub = rollout_pb2_grpc.RolloutStub(self._channel())
        return self._stub

    async def _call(self, method: str, request: Any, wait_s: float = 0.0) -> Any:
        """A call that may be repeated, as all of these may."""
        return await self._repeat(lambda: getattr(self._stubs(), method)(request, timeout=wait_s + _GRACE_S))

    async def _send(
        self, method: str, kind: Any, head: Mapping[str, Any], rows: Sequence[pb.TableRow], cells: Sequence[Sequence[bytes]], wait_s: float
    ) -> Any:  # fmt: skip
        """Values through shared memory where there is some; else one message, or a stream of pieces when it would be large."""
        value_bytes = [sum(map(len, c)) for c in cells]
        if value_bytes and max(value_bytes) > MAX_ROW_BYTES:
            raise LimitExceeded(f"a row of {max(value_bytes)} bytes; one call carries at most {MAX_ROW_BYTES} per row", param="rows")
        part = self._part(sum(value_bytes))
        if part is not None:
            area, (at, _) = part
            for row, values, num_bytes in zip(rows, cells, value_bytes, strict=True):
                row.spans.extend(area.write(at, values))
                at += num_bytes
            answer = await self._through(part, lambda: getattr(self._stubs(), method)(kind(rows=rows, area=area.name, **head), timeout=wait_s + _GRACE_S))
            if answer is not None:
                return answer
        for row, values in zip(rows, cells, strict=True):
            del row.spans[:]
            row.cells.extend(values)
        sizes = [row.ByteSize() for row in rows]
        if sum(sizes) <= _MESSAGE_BYTES:
            return await self._call(method, kind(rows=rows, **head), wait_s)
        pieces = list(_pieces(rows, sizes))

        def start() -> Any:
            messages = (kind(rows=piece, **(head if i == 0 else {})) for i, piece in enumerate(pieces))
            return getattr(self._stubs(), f"{method}Stream")(messages, timeout=wait_s + _GRACE_S)

        return await self._repeat(start)

    async def _get(self, request: pb.GetRequest) -> tuple[pb.GetReply, list[Sequence[bytes]]]:
        """The reply and each row's values."""
        key = (request.topic, request.task)
        part = self._part(self._batch_bytes.get(key, _FIRST_GUESS))
        if part is not None:
            area, (at, end) = part
            request.area, request.area_offset, request.area_bytes = area.name, at, end - at

            def read(reply: Any) -> tuple[Any, list[Sequence[bytes]]]:
                found: list[Sequence[bytes]] = [area.read(r.spans) for r in reply.rows]
                num_bytes = sum(len(c) for cells in found for c in cells)
                if reply.num_more:
                    self._batch_bytes[key] = max(2 * (end - at), num_bytes * (len(found) + reply.num_more) // max(1, len(found)) * 5 // 4)
                elif found:
                    self._batch_bytes[key] = max(num_bytes * 5 // 4, self._batch_bytes.get(key, 0) // 2)
                return reply, found

            answer: tuple[pb.GetReply, list[Sequence[bytes]]] | None = await self._through(
                part, lambda: self._stubs().Get(request, timeout=request.wait_s + _GRACE_S), read
            )
            request.ClearField("area")
            if answer is not None:
                return answer
        reply = await self._call("Get", request, request.wait_s)
        found: list[Sequence[bytes]] = [list(r.cells) for r in reply.rows]
        if reply.rows:
            self._batch_bytes[key] = sum(len(c) for cells in found for c in cells) * 5 // 4
        return reply, found

    def _part(self, num_bytes: int) -> tuple[SharedArea, tuple[int, int]] | None:
        """A free part of the shared memory; None where values go with the call."""
        if num_bytes < _SHARE_FROM or num_bytes > self._shared_bytes:
            return None
        if self._area is not None and not self._area.is_open:
            self._leave_area()
        if self._area is None and self._asking is None and time.monotonic() >= self._declined_until:
            self._asking = asyncio.create_task(self._ask(), name="rollout.share")  # this call does not wait for it
        area = self._area
        part = area.take(num_bytes) if area is not None else None
        return (area, part) if area is not None and part is not None else None

    async def _ask(self) -> None:
        try:
            self._area = await SharedArea.ask(self._stubs(), self._shared_bytes)
            if self._area is None:
                self._declined_until = time.monotonic() + _DECLINED_S
        except Unavailable:
            pass  # there is no table now
        finally:
            self._asking = None

    async def _through(self, part: tuple[SharedArea, tuple[int, int]], start: Callable[[], Any], read: Callable[[Any], Any] = lambda reply: reply) -> Any:
        """What `read` makes of the answer, while the part is still this call's; None when the call is to be made without shared memory."""
        area, extent = part
        try:
            answer = read(await start())
        except grpc.RpcError as e:
            error = error_from_rpc(e)
            if isinstance(error, Unavailable | DeadlineExceeded | InternalError) or error.param == "area":
                self._leave_area(area)
                return None
            area.give(extent)
            raise error from None
        except BaseException:
            self._leave_area(area)
            raise
        area.give(extent)
        return answer

    def _leave_area(self, area: SharedArea | None = None) -> None:
        """Nothing of it is used again: the table may still be at work there."""
        area = area or self._area
        if area is not None:
            area.close()
        if area is self._area:
            self._area = None

    async def _repeat(self, start: Callable[[], Any]) -> Any:
        waited, pause = 0.0, 0.05  # not by the clock: a machine that slept has not waited
        while True:
            try:
                return await start()
            except grpc.RpcError as e:
                error = error_from_rpc(e)
            except Unavailable as e:
                error = e
            waited += pause + (_GRACE_S if isinstance(error, DeadlineExceeded) else 0.0)
            if not isinstance(error, Unavailable | DeadlineExceeded) or waited > self._retry_s:
                raise error from None
            self._stub = None  # the service may have come back at another address
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2)


_LONGEST_WAIT_S = 30.0


def _pieces(rows: Sequence[pb.TableRow], sizes: Sequence[int]) -> Iterator[list[pb.TableRow]]:
    piece: list[pb.TableRow] = []
    num_bytes = 0
    for row, size in zip(rows, sizes, strict=True):
        if piece and num_bytes + size > _MESSAGE_BYTES:
            yield piece
            piece, num_bytes = [], 0
        piece.append(row)
        num_bytes += size
    if piece:
        yield piece


def _row(m: pb.TableRow, cells: Sequence[bytes], fields: Sequence[str]) -> Row:
    return Row(m.id, {name: decode(cell) for name, cell in zip(fields, cells, strict=True)}, _optional(m, "version"), m.group, m.index)


def _state(m: pb.TopicStatus) -> TopicState:
    tasks = {name: TaskState(t.num_free, t.num_held, t.num_done, dict(t.num_ready), dict(t.lags)) for name, t in m.tasks.items()}
    return TopicState(
        m.spec.name, m.num_rows, m.num_bytes, m.num_put, m.num_in_flight, m.num_leases, m.num_stale, _optional(m, "latest_version"), dict(m.versions), tasks,
        m.num_waiting_puts, m.num_waiting_gets,
    )  # fmt: skip


def _optional(message: Any, name: str) -> int | None:
    return int(getattr(message, name)) if message.HasField(name) else None


__all__ = ["Batch", "RolloutClient", "Row", "TaskState", "TopicEvent", "TopicState"]
