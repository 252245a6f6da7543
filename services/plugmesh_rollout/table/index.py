"""What the journal amounts to, as SQL tables: live rows and where their values are, ids that are remembered, acknowledgements, versions.

The tables are brought up to date seldom and in large steps: of what came and went between two of them only the end is written, with one statement for hundreds of
rows. (A statement for each row would hand the interpreter lock over twice for each; beside a busy event loop that took longer than all the rest together.)
"""

from __future__ import annotations

import collections
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import xxhash

from plugmesh.errors import ConfigError, DataLoss
from plugmesh_rollout.table.entries import Item, place, unpack
from plugmesh_rollout.table.journal import Place

SCHEMA_VERSION = "2"
_KEPT_ACKS = 1 << 14  # per topic: a consumer may repeat one of these
_MANY = 500           # rows of one statement

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


class Index:
    """The tables in one SQLite file; one thread at a time. `live` has segments that live rows point at, with how often; `position` is the place in the journal
    (segment, offset) up to which the tables are.

    Raises:
        ConfigError: The file is of another schema.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.pool.NullPool, connect_args={"check_same_thread": False})
        sa.event.listen(self._engine, "connect", _set_pragmas)
        self._db = self._engine.connect()
        with self._db.begin():
            _meta.create_all(self._db)
            facts: dict[str, str] = {r.name: r.value for r in self._db.execute(sa.select(_facts))}
            if not facts:
                self._db.execute(_facts.insert(), [{"name": "schema_version", "value": SCHEMA_VERSION}, {"name": "position", "value": "0 0"}])
            elif facts.get("schema_version") != SCHEMA_VERSION:
                raise ConfigError(
                    f"the ledger in {path.parent} has schema version {facts.get('schema_version')}, not {SCHEMA_VERSION}", key="services.rollout.ledger_dir"
                )
            segment, offset = facts.get("position", "0 0").split()
            self.position = (int(segment), int(offset))
            self._topic_ids: dict[str, int] = {t.name: t.topic for t in self._db.execute(sa.select(_topics.c.name, _topics.c.topic))}
            self._segments: dict[tuple[int, int], list[int]] = {}  # of the records of a live row that the tables have
            self.live: collections.Counter[int] = collections.Counter()
            for r in self._db.execute(sa.select(_records.c.topic, _records.c.idx, _records.c.segment)):
                self._segments.setdefault((r.topic, r.idx), []).append(r.segment)
                self.live[r.segment] += 1

    def close(self) -> None:
        """Idempotent."""
        self._db.close()
        self._engine.dispose()

    # -- a former life --------------------------------------------------------------------------------------------------

    def load(self, path_of: Callable[[int], pathlib.Path]) -> list[SavedTopic]:
        """All that is there. Raises DataLoss when a value does not fit its checksum, or its file is missing; names the topic and row."""
        with self._db.begin():
            return [self._load_topic(t, path_of) for t in self._db.execute(sa.select(_topics).order_by(_topics.c.topic)).all()]

    def _load_topic(self, topic: Any, path_of: Callable[[int], pathlib.Path]) -> SavedTopic:
        cells: dict[int, dict[str, bytes]] = {}
        files: dict[int, Any] = {}
        try:
            for r in self._db.execute(sa.select(_records).where(_records.c.topic == topic.topic).order_by(_records.c.record)):
                if r.segment not in files:
                    files[r.segment] = path_of(r.segment).open("rb")
                data = os.pread(files[r.segment].fileno(), r.length, r.offset)
                if len(data) != r.length or xxhash.xxh3_64_digest(data) != r.checksum:
                    raise DataLoss(f"row {r.idx} of topic {topic.name!r} is damaged in segment {r.segment}", topic=topic.name, index=r.idx)
                cells.setdefault(r.idx, {}).update(unpack(data))
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

    # -- changes --------------------------------------------------------------------------------------------------------

    def apply(self, frames: Sequence[Place], position: tuple[int, int], sync: Callable[[Iterable[int]], None] = lambda segments: None) -> None:
        """The changes of some frames and the new position, in one transaction that is on disk when this returns.

        Args:
            sync: Called with segments that the tables are about to point at: brings them to the disk.
        """
        with self._db.begin():
            step = _Step()
            for frame in frames:
                values = frame.values
                for item in frame.items:
                    length, checksum = place(item)
                    where = (frame.segment, values, length, bytes.fromhex(checksum)) if length else None
                    values += length
                    if item[0] in ("dropped", "compacted"):
                        self._write(step, sync)
                        step = _Step()
                        (self._drop if item[0] == "dropped" else self._compact)(*item[1:])
                    elif item[0] == "made":
                        made = self._db.execute(_topics.insert().values(name=item[1], spec=item[2]).returning(_topics.c.topic))
                        self._topic_ids[item[1]] = int(made.scalar_one())
                    else:
                        step.note(self._topic_ids[item[1]], item, where)
            self._write(step, sync)
            self._db.execute(_facts.update().where(_facts.c.name == "position").values(value=f"{position[0]} {position[1]}"))
        self.position = position
        if any(item[0] == "compacted" for f in frames for item in f.items):
            self._db.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.rollback()  # what the pragma began

    def _write(self, step: _Step, sync: Callable[[Iterable[int]], None]) -> None:
        gone: dict[int, list[int]] = {}
        for topic, index in step.cleared:
            gone.setdefault(topic, []).append(index)
        for topic, indexes in gone.items():
            for some in _some(indexes):
                marks = ",".join("?" * len(some))
                self._db.exec_driver_sql(f"DELETE FROM records WHERE topic=? AND idx IN ({marks})", (topic, *some))  # noqa: S608  question marks only
                self._db.exec_driver_sql(f"UPDATE rows SET cleared=1 WHERE topic=? AND idx IN ({marks})", (topic, *some))  # noqa: S608
            for index in indexes:
                self._forget((topic, index))
        same: dict[tuple[int, int], list[int]] = {}
        for (topic, index), version in step.versions.items():
            same.setdefault((topic, version), []).append(index)
        for (topic, version), indexes in same.items():
            for some in _some(indexes):
                marks = ",".join("?" * len(some))
                self._db.exec_driver_sql(f"UPDATE rows SET version=? WHERE topic=? AND idx IN ({marks})", (version, topic, *some))  # noqa: S608
        self._insert("rows(topic,idx,id,grp,version,digest,cleared)", [(*key, *row) for key, row in step.rows.items()])
        records = [(*key, *where) for key, wheres in step.records.items() for where in wheres]
        if records:
            sync({r[2] for r in records})
        self._insert("records(topic,idx,segment,offset,length,checksum)", records)
        for topic, index, segment, *_ in records:
            self._segments.setdefault((topic, index), []).append(segment)
            self.live[segment] += 1
        self._insert("acks(topic,task,lease,indexes)", step.acks)
        for topic, version in step.latest.items():
            self._db.execute(_topics.update().where(_topics.c.topic == topic).values(latest_version=version))

    def _insert(self, columns: str, rows: Sequence[Sequence[Any]]) -> None:
        for some in _some(rows):
            marks = ",".join(["(" + ",".join("?" * len(some[0])) + ")"] * len(some))
            self._db.exec_driver_sql(f"INSERT INTO {columns} VALUES {marks}", tuple(x for row in some for x in row))  # noqa: S608  our own names

    def _forget(self, row: tuple[int, int]) -> None:
        for segment in self._segments.pop(row, ()):
            self.live[segment] -= 1
            if not self.live[segment]:
                del self.live[segment]

    def _drop(self, name: str) -> None:
        topic = self._topic_ids.pop(name)
        for table in (_records, _rows, _acks, _done, _topics):
            self._db.execute(table.delete().where(table.c.topic == topic))
        for row in [r for r in self._segments if r[0] == topic]:
            self._forget(row)

    def _compact(self, name: str, remember_rows: int) -> None:
        db, topic = self._db, self._topic_ids[name]
        cleared = sa.select(_rows.c.idx).where(_rows.c.topic == topic, _rows.c.cleared)
        limit = db.execute(cleared.order_by(_rows.c.idx.desc()).offset(remember_rows).limit(1)).scalar()
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


class _Step:
    """What some changes amount to. Rows are named by (topic, index)."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], list[Any]] = {}               # new ones: id, group, version, digest, whether cleared
        self.records: dict[tuple[int, int], list[tuple[Any, ...]]] = {}  # new ones: segment, offset, length, checksum
        self.versions: dict[tuple[int, int], int] = {}                 # of rows that the tables have
        self.cleared: dict[tuple[int, int], None] = {}                 # of rows that the tables have
        self.acks: list[tuple[Any, ...]] = []
        self.latest: dict[int, int] = {}

    def note(self, topic: int, item: Item, where: tuple[Any, ...] | None) -> None:
        kind = item[0]
        if kind == "put":
            key = (topic, item[2])
            self.rows[key] = [item[3], item[4], item[5], bytes.fromhex(item[6]), 0]
            if where:
                self.records[key] = [where]
        elif kind == "fields":
            key, version = (topic, item[2]), item[3]
            if version is not None:
                if key in self.rows:
                    self.rows[key][2] = version
                else:
                    self.versions[key] = version
            if where:
                self.records.setdefault(key, []).append(where)
        elif kind == "acked":
            self.acks.append((topic, item[2], item[3], struct.pack(f"<{len(item[4])}q", *item[4])))
        elif kind == "version":
            self.latest[topic] = item[2]
        elif kind == "cleared":
            for index in item[2]:
                key = (topic, index)
                self.records.pop(key, None)
                self.versions.pop(key, None)
                if key in self.rows:
                    self.rows[key][4] = 1
                else:
                    self.cleared[key] = None
        else:
            raise DataLoss(f"the journal has an entry of an unknown kind: {str(kind)[:20]!r}")


def _some(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), _MANY):
        yield rows[start : start + _MANY]


def _set_pragmas(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")  # one transaction in a while; a segment may go once nothing on the disk points at it
