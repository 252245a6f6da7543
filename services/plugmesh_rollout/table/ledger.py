"""What survives the process: topics, rows, what tasks are done with, in SQL; values in files beside it.

Every change is a list of entries that become durable together, in the order in which they were appended. A thread of its own takes all that wait, writes their
values to the current segment file, then their rows in one transaction, and only then tells those who wait (group commit). A crash leaves at most bytes in a
segment that no row points at.

| durability | a commit waits for | lost by kill -9 of the service | lost by a power cut |
|---|---|---|---|
| commit | fsync of segment and database | nothing that was answered | nothing that was answered |
| batch | the operating system's cache | nothing that was answered | what the system had not written yet; the rest stays consistent |
| none | (there is no ledger) | everything | everything |

Leases are not written: a restart ends them, see `Topic.ack`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pathlib
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
import structlog
import xxhash

from plugmesh.errors import ConfigError, DataLoss, Unavailable

log = structlog.get_logger()

SCHEMA_VERSION = "1"
_KEPT_ACKS = 1 << 14  # per topic: a consumer may repeat one of these
Durability = Literal["commit", "batch", "none"]

_meta = sa.MetaData()
_facts = sa.Table("facts", _meta, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.String, nullable=False))
_topics = sa.Table(
    "topics", _meta,
    sa.Column("topic", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("latest_version", sa.BigInteger),
)
_rows = sa.Table(
    "rows", _meta,
    sa.Column("topic", sa.Integer, primary_key=True),
    sa.Column("idx", sa.BigInteger, primary_key=True),
    sa.Column("id", sa.String, nullable=False),
    sa.Column("grp", sa.String, nullable=False),
    sa.Column("version", sa.BigInteger),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("cleared", sa.Boolean, nullable=False),
    sqlite_with_rowid=False,
)
_records = sa.Table(  # values that came together
    "records", _meta,
    sa.Column("record", sa.Integer, primary_key=True),
    sa.Column("topic", sa.Integer, nullable=False),
    sa.Column("idx", sa.BigInteger, nullable=False),
    sa.Column("segment", sa.Integer, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
    sa.Column("length", sa.BigInteger, nullable=False),
    sa.Column("checksum", sa.LargeBinary, nullable=False),
    sa.Index("records_by_row", "topic", "idx"),
)
_acks = sa.Table(  # one row per batch, not per row of it
    "acks", _meta,
    sa.Column("ack", sa.Integer, primary_key=True),
    sa.Column("topic", sa.Integer, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column("lease", sa.String, nullable=False),
    sa.Column("indexes", sa.LargeBinary, nullable=False),
)
_done = sa.Table(  # rows of acknowledgements that were forgotten
    "done", _meta,
    sa.Column("topic", sa.Integer, primary_key=True),
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("num", sa.BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class TopicMade:
    topic: str
    spec: str


@dataclass(frozen=True, slots=True)
class TopicDropped:
    topic: str


@dataclass(frozen=True, slots=True)
class VersionPublished:
    topic: str
    version: int


@dataclass(frozen=True, slots=True)
class RowPut:
    topic: str
    index: int
    id: str
    group: str
    version: int | None
    digest: bytes
    cells: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class FieldsPut:
    topic: str
    index: int
    version: int | None
    cells: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Acked:
    topic: str
    task: str
    lease_id: str
    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    topic: str
    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compacted:
    """Cleared rows beyond the newest `remember_rows` are forgotten, and acknowledgements of rows that have all been cleared but for the newest ones."""

    topic: str
    remember_rows: int


Entry: TypeAlias = TopicMade | TopicDropped | VersionPublished | RowPut | FieldsPut | Acked | Cleared | Compacted


@dataclass(frozen=True, slots=True)
class SavedRow:
    """`cells` is None for a row that was cleared."""

    index: int
    id: str
    group: str
    version: int | None
    digest: bytes
    cells: dict[str, bytes] | None


@dataclass(frozen=True, slots=True)
class SavedTopic:
    """What `Ledger.load` finds, rows by index, acknowledgements oldest first."""

    name: str
    spec: str
    latest_version: int | None
    rows: list[SavedRow]
    acks: list[tuple[str, str, tuple[int, ...]]]  # task, lease id, indexes
    done: dict[str, int]                          # task to rows of acknowledgements that were forgotten


class Ledger:
    """One folder, one process (a lock keeps others out). Made and loaded in a thread; `append` and `committed` belong to one event loop.

    Raises:
        ConfigError: The folder is in use, or holds a ledger of another schema.
    """

    def __init__(self, folder: pathlib.Path, durability: Durability = "commit", *, segment_bytes: int = 64 << 20) -> None:
        self.folder = folder
        self._fsync = durability == "commit"
        self._segment_bytes = segment_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._lock.close()
            raise ConfigError(f"another process uses the ledger in {folder}", key="services.rollout.ledger_dir") from e
        self._engine = sa.create_engine(f"sqlite:///{folder / 'ledger.sqlite'}", poolclass=sa.pool.NullPool, connect_args={"check_same_thread": False})
        sa.event.listen(self._engine, "connect", self._set_pragmas)
        self._db = self._engine.connect()
        with self._db.begin():
            _meta.create_all(self._db)
            found = self._db.execute(sa.select(_facts.c.value).where(_facts.c.name == "schema_version")).scalar()
            if found is None:
                self._db.execute(_facts.insert().values(name="schema_version", value=SCHEMA_VERSION))
        if found not in (None, SCHEMA_VERSION):
            raise ConfigError(f"the ledger in {folder} has schema version {found}, not {SCHEMA_VERSION}", key="services.rollout.ledger_dir")
        self._topic_ids: dict[str, int] = {}
        self._live: dict[int, int] = {}  # segment to records in use
        self._segment = max((int(p.stem) for p in folder.glob("*.values")), default=0)
        self._file: Any = None
        self._offset = 0
        self._cond = threading.Condition()
        self._queue: list[tuple[int, Sequence[Entry]]] = []
        self._appended = 0
        self._committed = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.num_commits = 0

    def _set_pragmas(self, connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={'FULL' if self._fsync else 'NORMAL'}")

    # -- a former life --------------------------------------------------------------------------------------------------

    def load(self) -> list[SavedTopic]:
        """Everything that was committed; removes segments that nothing points at. Call it once, before `start`.

        Raises:
            DataLoss: A value does not fit its checksum, or its file is missing; names the topic and row.
        """
        with self._db.begin():
            found = [self._load_topic(t) for t in self._db.execute(sa.select(_topics).order_by(_topics.c.topic)).all()]
        for path in self.folder.glob("*.values"):
            if int(path.stem) not in self._live:
                path.unlink()
        return found

    def _load_topic(self, topic: Any) -> SavedTopic:
        self._topic_ids[topic.name] = topic.topic
        cells: dict[int, dict[str, bytes]] = {}
        files: dict[int, Any] = {}
        try:
            for r in self._db.execute(sa.select(_records).where(_records.c.topic == topic.topic).order_by(_records.c.record)):
                if r.segment not in files:
                    files[r.segment] = self._path(r.segment).open("rb")
                data = os.pread(files[r.segment].fileno(), r.length, r.offset)
                if len(data) != r.length or xxhash.xxh3_64_digest(data) != r.checksum:
                    raise DataLoss(f"row {r.idx} of topic {topic.name!r} is damaged in segment {r.segment}", topic=topic.name, index=r.idx)
                cells.setdefault(r.idx, {}).update(unpack(data))
                self._live[r.segment] = self._live.get(r.segment, 0) + 1
        except FileNotFoundError as e:
            raise DataLoss(f"a segment of topic {topic.name!r} is missing: {pathlib.Path(e.filename).name}", topic=topic.name) from e
        finally:
            for file in files.values():
                file.close()
        rows = [
            SavedRow(r.idx, r.id, r.grp, r.version, r.digest, None if r.cleared else cells.get(r.idx, {}))
            for r in self._db.execute(sa.select(_rows).where(_rows.c.topic == topic.topic).order_by(_rows.c.idx))
        ]
        acks = [
            (a.task, a.lease, struct.unpack(f"<{len(a.indexes) // 8}q", a.indexes))
            for a in self._db.execute(sa.select(_acks).where(_acks.c.topic == topic.topic).order_by(_acks.c.ack))
        ]
        done = {d.task: d.num for d in self._db.execute(sa.select(_done).where(_done.c.topic == topic.topic))}
        return SavedTopic(topic.name, topic.spec, topic.latest_version, rows, acks, done)

    # -- the event loop's side ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts writing, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="rollout-ledger", daemon=True)
        self._thread.start()

    def append(self, entries: Sequence[Entry]) -> int:
        """Queues entries that belong together; returns the number to wait for with `committed`. Raises Unavailable after a failure."""
        self._check()
        if not entries:
            return self._appended
        with self._cond:
            self._appended += 1
            self._queue.append((self._appended, entries))
            self._cond.notify()
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
        with self._cond:
            self._closing = True
            self._cond.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._lock.closed:
            self._db.close()
            self._engine.dispose()
            self._lock.close()

    # -- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._cond:
                while not self._queue and not self._closing:
                    self._cond.wait()
                batch, self._queue = self._queue, []
                if not batch:
                    return
            failure: BaseException | None = None
            try:
                self._commit([entry for _, entries in batch for entry in entries])
            except BaseException as e:
                failure = e
                log.error("rollout.ledger_failed", error=type(e).__name__, exc_info=True)
            try:
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._told, batch[-1][0] if failure is None else 0, failure)
            except RuntimeError:
                pass  # the loop has ended; nobody waits
            if failure is not None:
                return

    def _commit(self, entries: Sequence[Entry]) -> None:
        """Values first: a row must not point at bytes that are not there."""
        places = self._write_values([e for e in entries if isinstance(e, RowPut | FieldsPut) and e.cells])
        with self._db.begin():
            gone: list[int] = []
            for kind, run in _runs(entries):
                gone += self._insert(kind, run, places)
        self.num_commits += 1
        if any(isinstance(e, Compacted) for e in entries):
            self._db.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.rollback()  # what the pragma began
        for segment in gone:
            self._live[segment] -= 1
            if not self._live[segment] and segment != self._segment:
                del self._live[segment]
                self._path(segment).unlink(missing_ok=True)

    def _insert(self, kind: type[Any], run: Sequence[Any], places: Mapping[int, Mapping[str, Any]]) -> list[int]:
        """One kind of entries in a row; returns the segments of records that were dropped, one mention per record."""
        db, ids = self._db, self._topic_ids
        if kind is TopicMade:
            for e in run:
                ids[e.topic] = int(db.execute(_topics.insert().values(name=e.topic, spec=e.spec).returning(_topics.c.topic)).scalar_one())
        elif kind is VersionPublished:
            for e in run:
                db.execute(_topics.update().where(_topics.c.topic == ids[e.topic]).values(latest_version=e.version))
        elif kind is RowPut:
            db.execute(
                _rows.insert(),
                [
                    {"topic": ids[e.topic], "idx": e.index, "id": e.id, "grp": e.group, "version": e.version, "digest": e.digest, "cleared": False}
                    for e in run
                ],
            )
            self._insert_records(run, places)
        elif kind is FieldsPut:
            versions = [{"v": e.version, "t": ids[e.topic], "i": e.index} for e in run if e.version is not None]
            if versions:
                db.execute(_rows.update().where(_OF_ROW_T, _OF_ROW_I).values(version=sa.bindparam("v")), versions)
            self._insert_records(run, places)
        elif kind is Acked:
            db.execute(
                _acks.insert(),
                [
                    {"topic": ids[e.topic], "task": e.task, "lease": e.lease_id, "indexes": struct.pack(f"<{len(e.indexes)}q", *e.indexes)}
                    for e in run
                ],
            )
        elif kind is Cleared:
            return self._clear(run)
        elif kind is Compacted:
            for e in run:
                self._compact(e)
        elif kind is TopicDropped:
            dropped: list[int] = []
            for e in run:
                topic = ids.pop(e.topic)
                dropped += db.execute(sa.select(_records.c.segment).where(_records.c.topic == topic)).scalars()
                for table in (_records, _rows, _acks, _done, _topics):
                    db.execute(table.delete().where(table.c.topic == topic))
            return dropped
        return []

    def _insert_records(self, run: Sequence[RowPut | FieldsPut], places: Mapping[int, Mapping[str, Any]]) -> None:
        values = [{"topic": self._topic_ids[e.topic], "idx": e.index, **places[id(e)]} for e in run if id(e) in places]
        if values:
            self._db.execute(_records.insert(), values)
            for v in values:
                self._live[v["segment"]] = self._live.get(v["segment"], 0) + 1

    def _clear(self, run: Sequence[Cleared]) -> list[int]:
        keys = [{"t": self._topic_ids[e.topic], "i": i} for e in run for i in e.indexes]
        dropped: list[int] = []
        for key in keys:
            dropped += self._db.execute(_SEGMENTS_OF_ROW, key).scalars()
        if keys:
            self._db.execute(_records.delete().where(_records.c.topic == sa.bindparam("t"), _records.c.idx == sa.bindparam("i")), keys)
            self._db.execute(_rows.update().where(_OF_ROW_T, _OF_ROW_I).values(cleared=True), keys)
        return dropped

    def _write_values(self, entries: Sequence[RowPut | FieldsPut]) -> dict[int, dict[str, Any]]:
        """Appends the entries' values; returns each one's place by the entry's identity."""
        places: dict[int, dict[str, Any]] = {}
        for entry in entries:
            if self._file is None or self._offset >= self._segment_bytes:
                self._next_segment()
            data = pack(entry.cells)
            self._file.write(data)
            places[id(entry)] = {
                "segment": self._segment, "offset": self._offset, "length": len(data), "checksum": xxhash.xxh3_64_digest(data),
            }  # fmt: skip
            self._offset += len(data)
        if places:
            self._sync()
        return places

    def _next_segment(self) -> None:
        """A life of the ledger never appends to a segment of an earlier one, whose end may be torn."""
        if self._file is not None:
            self._sync()
            self._file.close()
            if not self._live.get(self._segment):
                self._live.pop(self._segment, None)
                self._path(self._segment).unlink(missing_ok=True)
        self._segment += 1
        self._file = self._path(self._segment).open("xb", buffering=1 << 18)
        self._offset = 0
        if self._fsync:
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too
            finally:
                os.close(folder)

    def _sync(self) -> None:
        self._file.flush()
        if self._fsync:
            os.fdatasync(self._file.fileno())

    def _compact(self, entry: Compacted) -> None:
        db, topic = self._db, self._topic_ids[entry.topic]
        cleared = sa.select(_rows.c.idx).where(_rows.c.topic == topic, _rows.c.cleared)
        limit = db.execute(cleared.order_by(_rows.c.idx.desc()).offset(entry.remember_rows).limit(1)).scalar()
        if limit is not None:
            db.execute(_rows.delete().where(_rows.c.topic == topic, _rows.c.cleared, _rows.c.idx <= limit))
        live = set(db.execute(sa.select(_rows.c.idx).where(_rows.c.topic == topic, sa.not_(_rows.c.cleared))).scalars())
        old = db.execute(sa.select(_acks).where(_acks.c.topic == topic).order_by(_acks.c.ack.desc()).offset(_KEPT_ACKS)).all()
        for ack in old:
            indexes = struct.unpack(f"<{len(ack.indexes) // 8}q", ack.indexes)
            if live.isdisjoint(indexes):
                db.execute(_acks.delete().where(_acks.c.ack == ack.ack))
                num = db.execute(sa.select(_done.c.num).where(_done.c.topic == topic, _done.c.task == ack.task)).scalar()
                change = _done.insert().values(topic=topic, task=ack.task) if num is None else _done.update().where(_done.c.topic == topic, _done.c.task == ack.task)
                db.execute(change.values(num=(num or 0) + len(indexes)))

    def _path(self, segment: int) -> pathlib.Path:
        return self.folder / f"{segment:08d}.values"


_OF_ROW_T = _rows.c.topic == sa.bindparam("t")
_OF_ROW_I = _rows.c.idx == sa.bindparam("i")
_SEGMENTS_OF_ROW = sa.select(_records.c.segment).where(_records.c.topic == sa.bindparam("t"), _records.c.idx == sa.bindparam("i"))


def pack(cells: Mapping[str, bytes]) -> bytes:
    """Cells as one record: length of the name, length of the value, name, value, for each."""
    parts: list[bytes] = []
    for name, cell in cells.items():
        raw = name.encode()
        parts += (struct.pack("<HQ", len(raw), len(cell)), raw, cell)
    return b"".join(parts)


def unpack(data: bytes) -> dict[str, bytes]:
    """The inverse of `pack`."""
    cells, at = {}, 0
    while at < len(data):
        name_length, length = struct.unpack_from("<HQ", data, at)
        at += 10
        name = data[at : at + name_length].decode()
        at += name_length
        cells[name] = data[at : at + length]
        at += length
    return cells


def _runs(entries: Sequence[Entry]) -> Iterator[tuple[type[Any], list[Entry]]]:
    """Neighbours of one kind together."""
    run: list[Entry] = []
    for entry in entries:
        if run and type(entry) is not type(run[0]):
            yield type(run[0]), run
            run = []
        run.append(entry)
    if run:
        yield type(run[0]), run
