"""All topics of a service: who waits for rows, who waits for room, and when an answer may go out.

One event loop does everything, so nothing interleaves. An answer waits until the ledger has what it says: rows are handed out once they are durable, and a `put`
or an acknowledgement returns when it is.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from plugmesh.errors import (
    AlreadyExists,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Overloaded,
    PluginError,
    PlugmeshError,
)
from plugmesh.records import Sampler, SamplerRecord
from plugmesh_rollout.table import entries as log_of
from plugmesh_rollout.table.controller import Topic, TopicStatus
from plugmesh_rollout.table.index import SavedTopic
from plugmesh_rollout.table.ledger import Ledger
from plugmesh_rollout.table.topic import Lease, NewRow, StoredRow, TopicSpec

log = structlog.get_logger()

_MAX_SAMPLERS = 64  # objects kept per topic


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for a batch; see `Topic.take` and rollout.proto."""

    task: str
    fields: tuple[str, ...]
    batch_size: int
    lease_id: str
    lease_s: float
    sampler: str = "sequential"
    sampler_options: str = ""
    min_rows: int | None = None
    latest_version: int | None = None
    any_version: bool = False
    stamp_version: int | None = None
    rank: int = 0
    num_ranks: int = 1
    batch_index: int | None = None

    def alike(self) -> tuple[Any, ...]:
        """Requests of which one gets nothing when another did not."""
        return (
            self.task, self.fields, self.batch_size, self.sampler, self.sampler_options, self.min_rows, self.latest_version, self.any_version,
            self.rank, self.num_ranks, self.batch_index,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class _Getter:
    ask: Ask
    future: asyncio.Future[Lease]


@dataclass(slots=True, eq=False)
class _Putter:
    has_room: Callable[[], bool]
    apply: Callable[[bool], Any]
    future: asyncio.Future[Any]


class OpenTopic:
    """A topic and who waits for it."""

    def __init__(self, spec: TopicSpec) -> None:
        self.topic = Topic(spec, self._gone)
        self.samplers: dict[tuple[str, str, str], Sampler] = {}  # task, name, options
        self.getters: list[_Getter] = []
        self.putters: collections.deque[_Putter] = collections.deque()
        self.field_putters: collections.deque[_Putter] = collections.deque()
        self.sequence = 0
        self.watchers: set[asyncio.Event] = set()
        self.advancing = False

    def _gone(self, task: str, indexes: Sequence[int]) -> None:
        for key, sampler in list(self.samplers.items()):
            forget = getattr(sampler, "forget", None)
            if forget is not None and task in ("", key[0]):
                try:
                    forget(indexes)
                except Exception as e:  # rows have gone already; a sampler that cannot take that is built anew
                    log.warning("rollout.sampler_failed", sampler=key[1], error=type(e).__name__)
                    del self.samplers[key]

    def num_ready(self) -> dict[str, int]:
        """By task, of the set of fields that fewest rows have."""
        return {name: min((len(v) for v in s.views.values()), default=sum(s.free.values())) for name, s in self.topic.tasks.items()}


class Table:
    """See the module.

    Args:
        samplers: By name.
        ledger: Started by the caller; None keeps nothing.
        memory_bytes: Sum of the topics' capacities at most.
        waiting_bytes: Values of calls that wait for room at most; what would exceed it is refused at once.
    """

    def __init__(
        self, samplers: Mapping[str, SamplerRecord], ledger: Ledger | None = None, *, memory_bytes: int = 8 << 30, waiting_bytes: int = 64 << 20,
        max_topics: int = 256, max_waiting: int = 1024, clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[OpenTopic], None] = lambda topic: None,
    ) -> None:  # fmt: skip
        self.topics: dict[str, OpenTopic] = {}
        self.num_waiting_bytes = 0
        self.num_expired = 0
        self._records = samplers
        self._ledger = ledger
        self._memory_bytes = memory_bytes
        self._waiting_bytes = waiting_bytes
        self._max_topics = max_topics
        self._max_waiting = max_waiting
        self._clock = clock
        self._on_change = on_change

    # -- topics ---------------------------------------------------------------------------------------------------------

    async def create_topic(self, spec: TopicSpec) -> bool:
        """Whether it is new.

        Raises:
            AlreadyExists: There is another topic of that name.
            InvalidRequest: See `TopicSpec.checked`.
            LimitExceeded: The service's memory does not hold it beside the others.
        """
        spec = spec.checked()
        known = self.topics.get(spec.name)
        if known is not None:
            if known.topic.spec != spec:
                raise AlreadyExists(f"there is another topic {spec.name!r}", param="name")
            await self._committed(self._append([]))
            return False
        left = self._memory_bytes - sum(t.topic.spec.capacity_bytes for t in self.topics.values())
        if spec.capacity_bytes > left:
            raise LimitExceeded(f"capacity_bytes {spec.capacity_bytes} is above the {left} bytes that services.rollout.memory_bytes leaves", param="capacity_bytes")
        if len(self.topics) >= self._max_topics:
            raise LimitExceeded(f"there are {self._max_topics} topics already")
        number = self._append([log_of.TopicMade(spec.name, spec.to_json())])
        self.topics[spec.name] = OpenTopic(spec)
        await self._committed(number)
        log.info("rollout.topic_made", topic=spec.name, num_fields=len(spec.fields), num_tasks=len(spec.tasks))
        return True

    async def drop_topic(self, name: str) -> bool:
        """Whether there was one. Who waits gets NotFound."""
        opened = self.topics.pop(name, None)
        if opened is None:
            return False
        futures: list[asyncio.Future[Any]] = [w.future for queue in (opened.getters, opened.putters, opened.field_putters) for w in queue]
        for future in futures:
            if not future.done():
                future.set_exception(NotFound(f"topic {name!r} was dropped", param="topic"))
        self._changed(opened)
        await self._committed(self._append([log_of.TopicDropped(name)]))
        return True

    def restore(self, saved: Sequence[SavedTopic]) -> None:
        """What a ledger holds; before anything else."""
        for s in saved:
            opened = self.topics[s.name] = OpenTopic(TopicSpec.from_json(s.spec))
            for row in s.rows:
                if row.cells is None:
                    opened.topic.restore_cleared(row.index, row.id, row.digest)
                else:
                    opened.topic.restore_row(row.index, row.id, row.group, row.version, row.digest, row.cells)
            for task, lease_id, indexes in s.acks:
                opened.topic.restore_ack(lease_id, task, indexes)
            for task, num in s.done.items():
                opened.topic.tasks[task].num_done += num
            if s.latest_version is not None:
                opened.topic.publish_version(s.latest_version)
            log.info("rollout.topic_restored", topic=s.name, num_rows=len(opened.topic.rows), num_acks=len(s.acks))

    def find(self, name: str) -> OpenTopic:
        """Raises NotFound."""
        opened = self.topics.get(name)
        if opened is None:
            raise NotFound(f"there is no topic {name[:80]!r}", param="topic")
        return opened

    # -- rows come ------------------------------------------------------------------------------------------------------

    async def put(self, name: str, rows: Sequence[NewRow], *, keep_existing: bool = False, wait_s: float = 0.0) -> list[int]:
        """Indexes of the rows, in order; see `Topic.sort_out`. Raises Overloaded when there is no room within `wait_s`."""
        opened = self.find(name)
        topic = opened.topic
        at_first = topic.sort_out(rows, keep_existing=keep_existing)
        new = at_first[1]
        cost = sum(topic.storage.cost(row.cells) for row, _ in new)

        def has_room() -> bool:
            return topic.has_room(len(new), cost)

        def apply(has_waited: bool) -> tuple[list[int], int]:
            # Others may have put some of them meanwhile.
            indexes, fresh = topic.sort_out(rows, keep_existing=keep_existing) if has_waited else at_first
            added = topic.put(fresh)
            by_id = {r.id: r.index for r in added}
            indexes = [i if i >= 0 else by_id[r.id] for i, r in zip(indexes, rows, strict=True)]
            number = self._append(
                [log_of.RowPut(name, r.index, r.id, r.group, r.version, r.digest, n.cells) for r, (n, _) in zip(added, fresh, strict=True)]
            )
            _stamp(added, number)
            if added:
                self._changed(opened)
            return indexes, number

        indexes, number = await self._when_there_is_room(opened, opened.putters, bool(new), has_room, apply, cost, wait_s)
        await self._committed(number)
        return indexes

    async def put_fields(
        self, name: str, indexes: Sequence[int], cells: Sequence[Mapping[str, bytes]], versions: Sequence[int | None] | None = None, *,
        lease_id: str = "", task: str = "", wait_s: float = 0.0,
    ) -> int:  # fmt: skip
        """Number of rows that changed; see `Topic.put_fields`."""
        opened = self.find(name)
        topic = opened.topic
        cost = topic.fields_cost(indexes, cells)

        def has_room() -> bool:
            return topic.storage.num_bytes + cost <= topic.spec.capacity_bytes

        def apply(has_waited: bool) -> tuple[int, int]:
            again = bool(lease_id) and topic.is_acked(lease_id)
            changed = topic.put_fields(indexes, cells, versions, lease_id=lease_id, task=task, now=self._clock())
            entries: list[log_of.Entry] = [log_of.FieldsPut(name, row.index, row.version, new) for row, new in changed]
            if lease_id and not again:
                done = [i for i in indexes if topic.is_done(i, task)]  # not those that another rank's lease owns
                entries += self._acked(opened, task, lease_id, done)
            number = self._append(entries)
            _stamp([row for row, _ in changed], number)
            if entries:
                self._changed(opened)
            return len(changed), number

        num, number = await self._when_there_is_room(opened, opened.field_putters, cost > 0, has_room, apply, cost, wait_s)
        await self._committed(number)
        return num

    async def _when_there_is_room(
        self, opened: OpenTopic, queue: collections.deque[_Putter], needs: bool, has_room: Callable[[], bool], apply: Callable[[bool], Any], cost: int, wait_s: float,
    ) -> Any:  # fmt: skip
        """`apply(whether it waited)` as soon as there is room and nobody waits longer."""
        if not needs or (not queue and has_room()):
            return apply(False)
        if wait_s <= 0 or self.num_waiting_bytes + cost > self._waiting_bytes or len(queue) >= self._max_waiting:
            raise Overloaded(self._full(opened), retry_after_s=1.0)
        putter = _Putter(has_room, apply, asyncio.get_running_loop().create_future())
        queue.append(putter)
        self.num_waiting_bytes += cost
        try:
            await asyncio.wait({putter.future}, timeout=wait_s)
            if not putter.future.done():
                raise Overloaded(self._full(opened), retry_after_s=1.0)
            return putter.future.result()
        finally:
            self.num_waiting_bytes -= cost
            if putter in queue:
                queue.remove(putter)
                self._schedule(opened)  # a smaller one behind it may fit
            elif putter.future.done() and not putter.future.cancelled():
                putter.future.exception()  # seen, also when the caller is gone

    @staticmethod
    def _full(opened: OpenTopic) -> str:
        topic, spec = opened.topic, opened.topic.spec
        bound = f", {topic.num_in_flight} of {spec.num_in_flight} in flight" if spec.num_in_flight else ""
        return f"topic {spec.name!r} is full: {len(topic.rows)} of {spec.capacity_rows} rows, {topic.storage.num_bytes} of {spec.capacity_bytes} bytes{bound}"

    # -- rows are handed out --------------------------------------------------------------------------------------------

    async def get(self, name: str, ask: Ask, *, wait_s: float = 0.0, partial: bool = False) -> Lease | None:
        """A batch, or None when there is none within `wait_s`.

        Args:
            partial: Then any number of rows will do, in whole groups where the sampler keeps groups.
        """
        opened = self.find(name)
        opened.topic.check_fields(ask.task, ask.fields)
        if not 0 < len(ask.lease_id) <= 64 or not 0 < ask.lease_s <= 86400:
            raise InvalidRequest("a lease has an id of 1 to 64 characters and lasts more than 0 s and at most a day", param="lease_id")
        # Who came first is served first; a request unlike those that wait takes nothing from them that they could have had.
        lease = None if any(g.ask.alike() == ask.alike() for g in opened.getters) else self._take(opened, ask)
        if lease is None and wait_s > 0:
            lease = await self._wait_for_rows(opened, ask, wait_s)
        if lease is None and partial and self.topics.get(name) is opened:
            lease = self._take(opened, dataclasses.replace(ask, min_rows=1))
        if lease is not None:
            try:
                rows = opened.topic.rows
                await self._committed(max((rows[i].entry for i in lease.rows if i in rows), default=0))
            except BaseException:
                opened.topic.release(lease.lease_id)
                raise
        return lease

    async def _wait_for_rows(self, opened: OpenTopic, ask: Ask, wait_s: float) -> Lease | None:
        if len(opened.getters) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests wait for rows of topic {opened.topic.spec.name!r}", retry_after_s=1.0)
        getter = _Getter(ask, asyncio.get_running_loop().create_future())
        opened.getters.append(getter)
        try:
            await asyncio.wait({getter.future}, timeout=wait_s)
            return getter.future.result() if getter.future.done() else None
        except asyncio.CancelledError:
            if getter.future.done() and getter.future.exception() is None:
                opened.topic.release(getter.future.result().lease_id)  # the caller has gone
                self._schedule(opened)
            raise
        finally:
            if getter in opened.getters:
                opened.getters.remove(getter)

    def _take(self, opened: OpenTopic, ask: Ask) -> Lease | None:
        return opened.topic.take(
            ask.task, ask.fields, ask.batch_size, self._sampler(opened, ask), lease_id=ask.lease_id, expires_at=self._clock() + ask.lease_s,
            min_rows=ask.min_rows, latest_version=ask.latest_version, any_version=ask.any_version, stamp_version=ask.stamp_version,
            rank=ask.rank, num_ranks=ask.num_ranks, batch_index=ask.batch_index,
        )  # fmt: skip

    def _sampler(self, opened: OpenTopic, ask: Ask) -> Sampler:
        key = (ask.task, ask.sampler, ask.sampler_options)
        sampler = opened.samplers.get(key)
        if sampler is not None:
            return sampler
        record = self._records.get(ask.sampler)
        if record is None:
            raise InvalidRequest(f"there is no sampler {ask.sampler[:80]!r}; known: {', '.join(self._records)}", param="sampler")
        try:
            options = json.loads(ask.sampler_options or "{}")
        except ValueError as e:
            raise InvalidRequest("sampler_options is no JSON object", param="sampler_options") from e
        if not isinstance(options, dict):
            raise InvalidRequest("sampler_options is no JSON object", param="sampler_options")
        if len(opened.samplers) >= _MAX_SAMPLERS:
            raise LimitExceeded(f"a topic has at most {_MAX_SAMPLERS} samplers with their options", param="sampler_options")
        try:
            sampler = record.build(options)
        except PlugmeshError:
            raise
        except Exception as e:
            raise PluginError(f"the sampler {ask.sampler!r} could not be built", plugin=ask.sampler) from e
        opened.samplers[key] = sampler
        return sampler

    def read(self, name: str, lease_id: str) -> tuple[Lease, OpenTopic]:
        """The lease whose rows may be read. Raises StaleIncarnation when it has ended."""
        opened = self.find(name)
        return opened.topic.live_lease(lease_id, self._clock()), opened

    async def ack(self, name: str, task: str, lease_id: str, indexes: Sequence[int]) -> int:
        """See `Topic.ack`."""
        opened = self.find(name)
        if opened.topic.is_acked(lease_id):
            await self._committed(self._append([]))
            return 0
        done = opened.topic.ack(lease_id, task, indexes, self._clock())
        number = self._append(self._acked(opened, task, lease_id, done))
        self._changed(opened)
        await self._committed(number)
        return len(done)

    def _acked(self, opened: OpenTopic, task: str, lease_id: str, done: list[int]) -> list[log_of.Entry]:
        """Entries of an acknowledgement; rows that all tasks are done with leave."""
        topic = opened.topic
        entries: list[log_of.Entry] = [log_of.Acked(topic.spec.name, task, lease_id, tuple(done))]
        if topic.spec.auto_clear:
            cleared = topic.clear(topic.finished(done))
            if cleared:
                entries.append(log_of.Cleared(topic.spec.name, tuple(cleared)))
        return entries

    def extend(self, name: str, lease_id: str, lease_s: float) -> None:
        if not 0 < lease_s <= 86400:
            raise InvalidRequest("a lease lasts more than 0 s and at most a day", param="lease_s")
        now = self._clock()
        self.find(name).topic.extend(lease_id, now + lease_s, now)

    def release(self, name: str, lease_id: str) -> int:
        opened = self.find(name)
        back = opened.topic.release(lease_id)
        if back:
            self._changed(opened)
        return len(back)

    def sweep(self) -> None:
        """Takes the rows of expired leases back; called every now and then."""
        now = self._clock()
        for opened in list(self.topics.values()):
            back = opened.topic.expire(now)
            if back:
                self.num_expired += len(back)
                log.info("rollout.leases_expired", topic=opened.topic.spec.name, num_rows=len(back))
                self._changed(opened)

    # -- rows go --------------------------------------------------------------------------------------------------------

    async def clear(self, name: str, indexes: Sequence[int], older_than: int | None = None) -> int:
        opened = self.find(name)
        wanted = [*indexes, *(opened.topic.stale(older_than) if older_than is not None else ())]
        cleared = opened.topic.clear(dict.fromkeys(wanted))
        number = self._append([log_of.Cleared(name, tuple(cleared))] if cleared else [])
        if cleared:
            self._changed(opened)
        await self._committed(number)
        return len(cleared)

    async def publish_version(self, name: str, version: int) -> None:
        opened = self.find(name)
        opened.topic.publish_version(version)
        number = self._append([log_of.VersionPublished(name, version)])
        self._changed(opened)
        await self._committed(number)

    async def checkpoint(self) -> int:
        """Compacts the ledger; returns the number of topics."""
        number = self._append([log_of.Compacted(n, t.topic.spec.remember_rows) for n, t in self.topics.items()])
        if self._ledger is not None:
            await self._ledger.in_tables(number)
        return len(self.topics)

    def statuses(self, name: str = "") -> list[tuple[OpenTopic, TopicStatus]]:
        found = [self.find(name)] if name else list(self.topics.values())
        return [(t, t.topic.status()) for t in found]

    # -- who waits ------------------------------------------------------------------------------------------------------

    def _changed(self, opened: OpenTopic) -> None:
        opened.sequence += 1
        for event in opened.watchers:
            event.set()
        self._on_change(opened)
        self._schedule(opened)

    def _schedule(self, opened: OpenTopic) -> None:
        """Many changes of one turn of the loop are looked at once."""
        if not opened.advancing and (opened.getters or opened.putters or opened.field_putters):
            opened.advancing = True
            asyncio.get_running_loop().call_soon(self._advance, opened)

    def _advance(self, opened: OpenTopic) -> None:
        opened.advancing = False
        for queue in (opened.field_putters, opened.putters):  # rows that are here come before new ones, or neither could go on
            while queue and (queue[0].future.done() or queue[0].has_room()):
                putter = queue.popleft()
                if not putter.future.done():
                    _settle(putter.future, functools.partial(putter.apply, True))
        failed: set[tuple[Any, ...]] = set()
        for getter in list(opened.getters):
            key = getter.ask.alike()
            if getter.future.done() or key in failed:
                continue
            try:
                lease = self._take(opened, getter.ask)
            except PlugmeshError as e:
                getter.future.set_exception(e)
                continue
            if lease is None:
                failed.add(key)
            else:
                getter.future.set_result(lease)
                opened.getters.remove(getter)

    # -- the ledger -----------------------------------------------------------------------------------------------------

    def _append(self, entries: Sequence[log_of.Entry]) -> int:
        return self._ledger.append(entries) if self._ledger is not None else 0

    async def _committed(self, number: int) -> None:
        if self._ledger is not None:
            await self._ledger.committed(number)


def _stamp(rows: Sequence[StoredRow], number: int) -> None:
    for row in rows:
        row.entry = number


def _settle(future: asyncio.Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except PlugmeshError as e:
        future.set_exception(e)
