"""Which rows of one topic every task may have, has, and is done with: plain synchronous code, one caller at a time.

For each task a row is *free*, *held* by a lease, or *done*. It is *ready* for a task and a set of fields when it is free and has these fields. Ready rows are
kept by task and set of fields as they change, so a request costs what it takes rather than what the table holds.

An index is never used again; values are dropped before the row is, so an index never points at another row's values (TransferQueue's pull request 137).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from plugmesh.client.rollout_values import inspect
from plugmesh.errors import (
    AlreadyExists,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PluginError,
    PlugmeshError,
    StaleIncarnation,
)
from plugmesh.records import SampleContext, Sampler
from plugmesh_rollout.table.admission import in_window
from plugmesh_rollout.table.storage import Storage
from plugmesh_rollout.table.topic import MAX_NAME, Lease, NewRow, StoredRow, TopicSpec

_MAX_VIEWS = 16          # sets of fields that one task asks for
_REMEMBERED_ACKS = 1 << 16
_FREE = object()


class View:
    """Rows of one task that have a set of fields and are free, by index."""

    def __init__(self, fields: frozenset[str]) -> None:
        self.fields = fields
        self.by_version: collections.Counter[int | None] = collections.Counter()
        self._rows: dict[int, StoredRow] = {}
        self._last = -1
        self._sorted = True

    def add(self, row: StoredRow) -> None:
        if row.index not in self._rows:
            self._sorted = self._sorted and row.index > self._last
            self._last = max(self._last, row.index)
            self._rows[row.index] = row
            self.by_version[row.version] += 1

    def discard(self, row: StoredRow) -> None:
        if self._rows.pop(row.index, None) is not None:
            self.by_version[row.version] -= 1

    def rows(self) -> Iterable[StoredRow]:
        if not self._sorted:
            self._rows = dict(sorted(self._rows.items()))
            self._sorted = True
        return self._rows.values()

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def __len__(self) -> int:
        return len(self._rows)


class TaskState:
    """One task's side of the topic. `free` counts free rows by version, whether they are ready or not."""

    def __init__(self) -> None:
        self.views: dict[frozenset[str], View] = {}
        self.free: collections.Counter[int | None] = collections.Counter()
        self.num_done = 0                                                # since the topic was made
        self.lags: collections.Counter[int] = collections.Counter()      # versions behind at hand-out, rows


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """`num_ready` by the fields that the task asked for."""

    num_free: int
    num_held: int
    num_done: int
    num_ready: Mapping[tuple[str, ...], int]
    lags: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class TopicStatus:
    """Figures of one topic; `num_put` counts since it was made, `num_stale` are live rows too old for every task that still wants them."""

    spec: TopicSpec
    num_rows: int
    num_bytes: int
    num_put: int
    num_in_flight: int
    num_leases: int
    num_stale: int
    latest_version: int | None
    versions: Mapping[int | None, int]
    tasks: Mapping[str, TaskStatus]


class Topic:
    """One topic. Every method either does all that it says or raises and does nothing.

    Args:
        on_gone: Called with (task, indexes) when rows came back from a lease of that task, with ("", indexes) when they were cleared.
    """

    def __init__(self, spec: TopicSpec, on_gone: Callable[[str, Sequence[int]], None] = lambda task, indexes: None) -> None:
        self.spec = spec.checked()
        self.storage = Storage(spec.row_bytes)
        self.rows: dict[int, StoredRow] = {}
        self.latest_version: int | None = None
        self.leases: dict[str, Lease] = {}
        self.num_in_flight = 0
        self.next_index = 0
        self._on_gone = on_gone
        self._ids: dict[str, int] = {}
        self._remembered: collections.OrderedDict[str, tuple[int, bytes]] = collections.OrderedDict()
        self._groups: dict[str, list[int]] = {}  # label to [rows ever, rows live]
        self._kinds: dict[str, tuple[str, int | None]] = {f: (d, None) for f, d in self.spec.fields.items() if d}
        self._acked: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.tasks = {name: TaskState() for name in self.spec.tasks}

    # -- rows come ------------------------------------------------------------------------------------------------------

    def sort_out(self, rows: Sequence[NewRow], *, keep_existing: bool = False) -> tuple[list[int], list[tuple[NewRow, bytes]]]:
        """Of rows to put: the index of each that is known (-1 for a new one), and the new ones with their digests. Changes nothing.

        Args:
            keep_existing: An id that is known is left as it is, whatever the new row holds.

        Raises:
            AlreadyExists: An id is known with other content.
            InvalidRequest: A field that the topic has not, a value of another dtype, a group that is missing or full.
            LimitExceeded: More than the table could ever hold.
        """
        indexes: list[int] = []
        new: dict[str, tuple[NewRow, bytes]] = {}
        kinds = dict(self._kinds)
        groups: collections.Counter[str] = collections.Counter()
        for row in rows:
            if not 0 < len(row.id) <= MAX_NAME or len(row.group) > MAX_NAME:
                raise InvalidRequest(f"the id of a row has 1 to {MAX_NAME} characters, its group at most that", param="id")
            digest = row.digest()
            known = self._known(row.id)
            if known is None and row.id in new:
                known = (-1, new[row.id][1])
            if known is not None:
                if known[1] != digest and not keep_existing:
                    raise AlreadyExists(f"row {row.id[:80]!r} of topic {self.spec.name!r} exists with other content", id=row.id[:80])
                indexes.append(known[0])
                continue
            self._check_cells(row.cells, kinds)
            if self.spec.group_size > 1 and not row.group:
                raise InvalidRequest(f"topic {self.spec.name!r} has groups of {self.spec.group_size}: a row must name its group", param="group")
            if row.group:
                groups[row.group] += 1
                if self.spec.group_size > 1 and self._groups.get(row.group, (0,))[0] + groups[row.group] > self.spec.group_size:
                    raise InvalidRequest(f"group {row.group[:80]!r} has {self.spec.group_size} rows already", param="group")
            indexes.append(-1)
            new[row.id] = (row, digest)
        cost = sum(self.storage.cost(row.cells) for row, _ in new.values())
        limit = self.spec.num_in_flight or self.spec.capacity_rows
        if len(new) > limit or cost > self.spec.capacity_bytes:
            raise LimitExceeded(f"{len(new)} rows of {cost} bytes at once; topic {self.spec.name!r} never holds more than {limit} and {self.spec.capacity_bytes}")
        return indexes, list(new.values())

    def has_room(self, num_rows: int, num_bytes: int) -> bool:
        """Whether so much more may come now. `num_bytes` as `Storage.cost` counts."""
        in_flight = self.spec.num_in_flight
        return (
            (in_flight is None or num_rows == 0 or self.num_in_flight + num_rows <= in_flight)
            and len(self.rows) + num_rows <= self.spec.capacity_rows
            and self.storage.num_bytes + num_bytes <= self.spec.capacity_bytes
        )

    def put(self, rows: Sequence[tuple[NewRow, bytes]]) -> list[StoredRow]:
        """Adds new rows that `sort_out` gave, at once before anything else is done with the topic."""
        added = []
        for row, digest in rows:
            added.append(self._add(StoredRow(self.next_index, row.id, row.group, row.version, digest), row.cells))
        return added

    def _add(self, row: StoredRow, cells: Mapping[str, bytes]) -> StoredRow:
        self.next_index = max(self.next_index, row.index + 1)
        self.storage.add(row.index, cells)
        self._note_cells(row, cells)
        self.rows[row.index] = row
        self._ids[row.id] = row.index
        self.num_in_flight += 1
        if row.group:
            counts = self._groups.setdefault(row.group, [0, 0])
            counts[0] += 1
            counts[1] += 1
        for task in self.tasks.values():
            task.free[row.version] += 1
            for view in task.views.values():
                if view.fields <= row.sizes.keys():
                    view.add(row)
        return row

    def put_fields(
        self, indexes: Sequence[int], cells: Sequence[Mapping[str, bytes]], versions: Sequence[int | None] | None = None, *,
        lease_id: str = "", task: str = "", now: float = 0.0,
    ) -> list[tuple[StoredRow, dict[str, bytes]]]:
        """Adds fields to rows; returns the rows that changed with what is new of each. The same value again is no change.

        Args:
            versions: Replace the rows' versions, where not None.
            lease_id: The writer's lease for `task`; the fields are refused when it has ended, and the rows are done for the task with this call.

        Raises:
            AlreadyExists: A row has another value in a field.
            NotFound: A row has gone.
            StaleIncarnation: The lease has ended, so somebody else may be at work on the rows.
        """
        if lease_id and self.is_acked(lease_id):
            return []
        if len(indexes) != len(cells) or (versions is not None and len(versions) != len(indexes)) or len(set(indexes)) != len(indexes):
            raise InvalidRequest("one set of cells for each index, each index once", param="indexes")
        if lease_id:
            self._check_ack(lease_id, task, indexes, now)
            if lease_id in self.leases and set(indexes) != set(self.leases[lease_id].rows):
                raise InvalidRequest("fields that end a lease must be for all of its rows", param="indexes")
        kinds = dict(self._kinds)
        changes: list[tuple[StoredRow, dict[str, bytes]]] = []
        for i, (index, values) in enumerate(zip(indexes, cells, strict=True)):
            row = self.rows.get(index)
            if row is None:
                raise NotFound(f"row {index} of topic {self.spec.name!r} has gone", param="indexes")
            self._check_cells(values, kinds)
            new = {}
            for name, value in values.items():
                before = self.storage.get(index, name)
                if before is None:
                    new[name] = value
                elif before != value:
                    raise AlreadyExists(f"row {index} of topic {self.spec.name!r} has another value in {name!r}", param=name)
            version = versions[i] if versions is not None else None
            if new or (version is not None and version != row.version):
                changes.append((row, new))
        for i, index in enumerate(indexes):
            if versions is not None and versions[i] is not None:
                self._set_version(self.rows[index], versions[i])
        for row, new in changes:
            self.storage.add(row.index, new)
            self._note_cells(row, new)
            for name, state in self.tasks.items():
                if name not in row.holders:
                    for view in state.views.values():
                        if view.fields <= row.sizes.keys():
                            view.add(row)
        if lease_id:
            self._ack(lease_id, task, indexes)
        return changes

    def fields_cost(self, indexes: Sequence[int], cells: Sequence[Mapping[str, bytes]]) -> int:
        """Bytes that `put_fields` would add; rows that have gone count nothing."""
        return sum(
            self.storage.added_cost(i, {f: v for f, v in c.items() if self.storage.get(i, f) is None})
            for i, c in zip(indexes, cells, strict=False) if i in self.rows
        )  # fmt: skip

    # -- rows are handed out --------------------------------------------------------------------------------------------

    def take(
        self, task: str, fields: Sequence[str], batch_size: int, sampler: Sampler, *, lease_id: str, expires_at: float, min_rows: int | None = None,
        latest_version: int | None = None, any_version: bool = False, stamp_version: int | None = None,
        rank: int = 0, num_ranks: int = 1, batch_index: int | None = None,
    ) -> Lease | None:  # fmt: skip
        """A batch for one consumer, or None while the sampler wants more rows. The same lease id again gives the same lease.

        Args:
            min_rows: Fewer than `batch_size` rows will do, down to this.
            latest_version: What the version window ends with; the topic's own when None.
            any_version: Ignores the version window.
            stamp_version: Becomes the version of the rows: of weights that begin to generate them now.

        Raises:
            InvalidRequest: A task or field that the topic has not.
            PluginError: The sampler raised or chose rows that it may not.
            StaleIncarnation: The lease id was used up.
        """
        state = self._task(task)
        if lease_id in self.leases:
            return self.leases[lease_id]
        if self.is_acked(lease_id):
            raise StaleIncarnation("this lease was acknowledged; a lease id is used once", lease=lease_id[:16])
        if batch_size < 1:
            raise InvalidRequest("a batch has at least one row", param="batch_size")
        view = self._view(state, fields)
        latest = self.latest_version if latest_version is None else latest_version
        staleness = None if any_version or latest is None else self.spec.staleness
        rows = view.rows()
        if staleness is not None:
            assert latest is not None
            rows = [r for r in rows if in_window(r.version, latest, staleness)]
        ready = list(itertools.islice(rows, batch_size) if getattr(sampler, "takes_first", False) else rows)
        if not ready and batch_index is None:  # with a number, a sampler may have kept the rows of this rank
            return None
        pending = {v: n - view.by_version[v] for v, n in state.free.items() if v is not None and n > view.by_version[v]}
        context = SampleContext(
            self.spec.name, task, self.spec.group_size, batch_size if min_rows is None else max(1, min(min_rows, batch_size)), staleness, latest,
            pending, self.spec.batch_rows, rank, num_ranks, batch_index,
        )  # fmt: skip
        sampled, consumed = _choose(sampler, ready, batch_size, context)
        if not sampled:
            return None
        allowed = {r.index for r in ready}
        if len(set(consumed)) != len(consumed) or not allowed.issuperset(consumed) or not all(i in self.rows for i in sampled):
            raise PluginError("the sampler chose rows that are not ready", plugin=type(sampler).__name__)
        lease = Lease(lease_id, task, tuple(sampled), tuple(consumed), expires_at, tuple(fields))
        for index in consumed:
            row = self.rows[index]
            self._unlist(state, row)
            row.holders[task] = lease
            if stamp_version is not None:
                self._set_version(row, stamp_version)
            if latest is not None and row.version is not None:
                state.lags[latest - row.version] += 1
        self.leases[lease_id] = lease
        return lease

    def extend(self, lease_id: str, expires_at: float, now: float) -> None:
        """Raises StaleIncarnation when it has ended."""
        self.live_lease(lease_id, now).expires_at = expires_at

    def is_acked(self, lease_id: str) -> bool:
        return lease_id in self._acked

    def ack(self, lease_id: str, task: str, indexes: Sequence[int], now: float) -> list[int]:
        """Says that the task is done with a lease's rows; returns the rows that became done. Again: no change.

        A lease from before a restart is unknown; it is honoured as long as nobody else got any of its rows, which is why the caller names them.

        Raises:
            StaleIncarnation: It ended. All or nothing: none of its rows is done by this call.
        """
        if self.is_acked(lease_id):
            return []
        self._check_ack(lease_id, task, indexes, now)
        return self._ack(lease_id, task, indexes)

    def _check_ack(self, lease_id: str, task: str, indexes: Sequence[int], now: float) -> None:
        state = self._task(task)
        lease = self.leases.get(lease_id)
        if lease is not None:
            self.live_lease(lease_id, now)
            if lease.task != task or not set(indexes) <= set(lease.rows):
                raise InvalidRequest("these rows are not what the lease is for", param="indexes")
            return
        assert state is not None
        if not indexes or any(self.rows[i].holders.get(task, _FREE) is not _FREE if i in self.rows else True for i in indexes):
            raise StaleIncarnation("the lease has ended and its rows may be with somebody else", lease=lease_id[:16])

    def _ack(self, lease_id: str, task: str, indexes: Sequence[int]) -> list[int]:
        lease = self.leases.pop(lease_id, None)
        self._acked[lease_id] = None
        if len(self._acked) > _REMEMBERED_ACKS:
            self._acked.popitem(last=False)
        state = self.tasks[task]
        done = [i for i in (indexes if lease is None else lease.owned) if i in self.rows]
        for index in done:
            row = self.rows[index]
            if lease is None:
                self._unlist(state, row)
            self._finish(row, task)
        return done

    def _finish(self, row: StoredRow, task: str) -> None:
        was = self._is_in_flight(row)
        row.holders[task] = None
        self.tasks[task].num_done += 1
        self.num_in_flight -= was and not self._is_in_flight(row)

    def is_done(self, index: int, task: str) -> bool:
        """Whether a live row is done for a task."""
        return index in self.rows and self.rows[index].holders.get(task, _FREE) is None

    def finished(self, indexes: Iterable[int]) -> list[int]:
        """Of these rows, those that every task is done with."""
        return [i for i in indexes if i in self.rows and self._is_done(self.rows[i])]

    def release(self, lease_id: str) -> list[int]:
        """Gives a lease's rows back; returns them. A lease that has ended is no error."""
        lease = self.leases.pop(lease_id, None)
        return self._give_back([lease] if lease else [])

    def expire(self, now: float) -> list[int]:
        """Gives the rows of all expired leases back."""
        late = [x for x in self.leases.values() if x.expires_at <= now]
        for lease in late:
            del self.leases[lease.lease_id]
        return self._give_back(late)

    def _give_back(self, leases: Sequence[Lease]) -> list[int]:
        back = []
        for lease in leases:
            own = []
            for index in lease.owned:
                row = self.rows.get(index)
                if row is not None and row.holders.get(lease.task) is lease:
                    del row.holders[lease.task]
                    self._list(self.tasks[lease.task], row)
                    own.append(index)
            if own:
                self._on_gone(lease.task, own)
            back += own
        return back

    # -- rows go --------------------------------------------------------------------------------------------------------

    def clear(self, indexes: Iterable[int]) -> list[int]:
        """Drops rows, whoever has them; unknown ones are no error. Returns those that were here."""
        cleared = []
        for index in indexes:
            row = self.rows.get(index)
            if row is None:
                continue
            self.storage.drop(index)  # first: see the module's docstring
            self.num_in_flight -= self._is_in_flight(row)
            for name, state in self.tasks.items():
                if name not in row.holders:
                    self._unlist(state, row)
            del self.rows[index]
            del self._ids[row.id]
            if row.group:
                counts = self._groups[row.group]
                counts[1] -= 1
                if not counts[1]:
                    del self._groups[row.group]
            self._remember(row.id, index, row.digest)
            cleared.append(index)
        if cleared:
            self._on_gone("", cleared)
        return cleared

    def stale(self, older_than: int | None = None) -> list[int]:
        """Rows of a version below `older_than`, by default those that lie outside the window and that nobody holds."""
        if older_than is not None:
            return [i for i, r in self.rows.items() if r.version is not None and r.version < older_than]
        if self.latest_version is None or self.spec.staleness is None:
            return []
        limit = self.latest_version - self.spec.staleness
        return [i for i, r in self.rows.items() if r.version is not None and r.version < limit and not any(r.holders.values())]

    def publish_version(self, version: int) -> None:
        """Versions only grow; the same again is no change. Raises InvalidRequest for a smaller one."""
        if version < 0 or (self.latest_version is not None and version < self.latest_version):
            raise InvalidRequest(f"version {version} is older than {self.latest_version}", param="version")
        self.latest_version = version

    # -- a former life --------------------------------------------------------------------------------------------------

    def restore_row(self, index: int, id: str, group: str, version: int | None, digest: bytes, cells: Mapping[str, bytes]) -> None:
        """A live row of the ledger."""
        self._add(StoredRow(index, id, group, version, digest), cells)

    def restore_cleared(self, index: int, id: str, digest: bytes) -> None:
        self.next_index = max(self.next_index, index + 1)
        self._remember(id, index, digest)

    def restore_ack(self, lease_id: str, task: str, indexes: Sequence[int]) -> None:
        live = [i for i in indexes if i in self.rows and task not in self.rows[i].holders]
        self._ack(lease_id, task, live)
        self.tasks[task].num_done += len(indexes) - len(live)  # the others were done and then cleared

    # -- what is here ---------------------------------------------------------------------------------------------------

    def status(self) -> TopicStatus:
        held = collections.Counter(lease.task for lease in self.leases.values() for _ in lease.owned)
        tasks = {
            name: TaskStatus(
                sum(s.free.values()), held[name], s.num_done, {tuple(sorted(v.fields)): len(v) for v in s.views.values()}, dict(s.lags)
            )
            for name, s in self.tasks.items()
        }  # fmt: skip
        versions = collections.Counter(r.version for r in self.rows.values())
        return TopicStatus(
            self.spec, len(self.rows), self.storage.num_bytes, self.next_index, self.num_in_flight, len(self.leases), len(self.stale()),
            self.latest_version, versions, tasks,
        )  # fmt: skip

    def check_fields(self, task: str, fields: Sequence[str]) -> None:
        """Raises InvalidRequest for a task or field that the topic has not."""
        self._task(task)
        for name in fields:
            if name not in self.spec.fields:
                raise InvalidRequest(f"topic {self.spec.name!r} has no field {name[:80]!r}; it has {', '.join(self.spec.fields)}", param="fields")
        if len(set(fields)) != len(fields):
            raise InvalidRequest("a field is named twice", param="fields")

    def _task(self, task: str) -> TaskState:
        state = self.tasks.get(task)
        if state is None:
            raise InvalidRequest(f"topic {self.spec.name!r} has no task {task[:80]!r}; it has {', '.join(self.tasks)}", param="task")
        return state

    def _view(self, state: TaskState, fields: Sequence[str]) -> View:
        key = frozenset(fields)
        view = state.views.get(key)
        if view is None:
            for name in key:
                if name not in self.spec.fields:
                    raise InvalidRequest(f"topic {self.spec.name!r} has no field {name[:80]!r}; it has {', '.join(self.spec.fields)}", param="fields")
            if len(state.views) >= _MAX_VIEWS:
                raise LimitExceeded(f"one task asks for at most {_MAX_VIEWS} sets of fields", param="fields")
            view = state.views[key] = View(key)
            name = next(n for n, s in self.tasks.items() if s is state)
            for row in self.rows.values():
                if name not in row.holders and key <= row.sizes.keys():
                    view.add(row)
        return view

    def live_lease(self, lease_id: str, now: float) -> Lease:
        lease = self.leases.get(lease_id)
        if lease is None or lease.expires_at <= now:
            raise StaleIncarnation("the lease has ended and its rows may be with somebody else", lease=lease_id[:16])
        return lease

    def _known(self, id: str) -> tuple[int, bytes] | None:
        index = self._ids.get(id)
        return (index, self.rows[index].digest) if index is not None else self._remembered.get(id)

    def _remember(self, id: str, index: int, digest: bytes) -> None:
        self._remembered[id] = (index, digest)
        while len(self._remembered) > self.spec.remember_rows:
            self._remembered.popitem(last=False)

    def _is_done(self, row: StoredRow) -> bool:
        return len(row.holders) == len(self.tasks) and not any(row.holders.values())

    def _is_in_flight(self, row: StoredRow) -> bool:
        task = self.spec.admission_task
        return row.holders.get(task, _FREE) is not None if task else not self._is_done(row)

    def _set_version(self, row: StoredRow, version: int | None) -> None:
        if row.version == version:
            return
        free = [s for name, s in self.tasks.items() if name not in row.holders]
        listed = [v for s in free for v in s.views.values() if row.index in v]
        for counter in [*(s.free for s in free), *(v.by_version for v in listed)]:
            counter[row.version] -= 1
            if not counter[row.version]:
                del counter[row.version]  # there is no end of versions
            counter[version] += 1
        row.version = version

    def _list(self, state: TaskState, row: StoredRow) -> None:
        state.free[row.version] += 1
        for view in state.views.values():
            if view.fields <= row.sizes.keys():
                view.add(row)

    def _unlist(self, state: TaskState, row: StoredRow) -> None:
        state.free[row.version] -= 1
        if not state.free[row.version]:
            del state.free[row.version]
        for view in state.views.values():
            view.discard(row)
            if not view.by_version[row.version]:
                del view.by_version[row.version]

    def _check_cells(self, cells: Mapping[str, bytes], kinds: dict[str, tuple[str, int | None]]) -> None:
        """Raises InvalidRequest for an unknown field or another dtype than before; adds to `kinds` what is seen first."""
        for name, cell in cells.items():
            if name not in self.spec.fields:
                raise InvalidRequest(f"topic {self.spec.name!r} has no field {name[:80]!r}; it has {', '.join(self.spec.fields)}", param="fields")
            facts = inspect(cell)
            dtype, num_dimensions = kinds.get(name, (facts.dtype, facts.num_dimensions))
            if facts.dtype != dtype or num_dimensions not in (None, facts.num_dimensions):
                shape = "" if num_dimensions is None else f" of {num_dimensions} dimensions"
                raise InvalidRequest(f"field {name!r} holds {dtype}{shape}, not {facts.dtype} of {facts.num_dimensions}", param=name)
            kinds[name] = (dtype, facts.num_dimensions)

    def _note_cells(self, row: StoredRow, cells: Mapping[str, bytes]) -> None:
        for name, cell in cells.items():
            facts = inspect(cell)
            self._kinds.setdefault(name, (facts.dtype, facts.num_dimensions))
            if self._kinds[name][1] is None:
                self._kinds[name] = (facts.dtype, facts.num_dimensions)
            row.sizes[name] = facts.size
            if facts.scalar is not None:
                row.scalars[name] = float(facts.scalar)


def _choose(sampler: Sampler, ready: list[StoredRow], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
    try:
        sampled, consumed = sampler.sample(ready, batch_size, context)
        return list(sampled), list(consumed)
    except PlugmeshError:
        raise
    except Exception as e:
        raise PluginError(f"the sampler {type(sampler).__name__} raised {type(e).__name__}", plugin=type(sampler).__name__) from e
