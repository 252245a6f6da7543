"""Which block lies where on disk, in SQL.

The rows are the durable truth after a restart; while the store runs its memory is. Rows are written after their
bytes and deleted before their place is used again, so a row never points at bytes that were not once its own; what a
crash or a failing disk does beyond that, the checksum finds. It is a cache: an index that is unreadable or of another
schema version is thrown away with its segments.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from plugmesh.types import KvLayout
from plugmesh_kvstore.blocks import Place

SCHEMA_VERSION = "1"

_meta = sa.MetaData()
_facts = sa.Table("facts", _meta, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.String, nullable=False))
_layouts = sa.Table(
    "layouts", _meta,
    sa.Column("key", sa.LargeBinary, primary_key=True),
    sa.Column("layout", sa.JSON, nullable=False),
)
_segments = sa.Table(
    "segments", _meta,
    sa.Column("segment", sa.Integer, primary_key=True),
    sa.Column("layout_key", sa.LargeBinary, sa.ForeignKey("layouts.key"), nullable=False),
    sa.Column("slot_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_slots", sa.Integer, nullable=False),
)
_blocks = sa.Table(
    "blocks", _meta,
    sa.Column("layout_key", sa.LargeBinary, primary_key=True),
    sa.Column("block_id", sa.LargeBinary, primary_key=True),
    sa.Column("parent_id", sa.LargeBinary, nullable=False),
    sa.Column("num_tokens", sa.Integer, nullable=False),
    sa.Column("num_bytes", sa.BigInteger, nullable=False),
    sa.Column("checksum", sa.LargeBinary, nullable=False),  # 8 bytes: SQL integers are signed
    sa.Column("segment", sa.Integer, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column("written", sa.Integer, nullable=False),       # grows with every row: the order of recency at a restart
    sa.UniqueConstraint("segment", "slot"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One block on disk."""

    layout_key: bytes
    block_id: bytes
    parent_id: bytes
    num_tokens: int
    num_bytes: int
    checksum: int
    place: Place


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment file."""

    segment: int
    layout_key: bytes
    slot_bytes: int
    num_slots: int


class UnusableIndex(Exception):
    """The file is damaged or of another schema version; start over."""


class DiskIndex:
    """The SQLite file. Blocking; called from the disk thread only. Every method is one transaction."""

    def __init__(self, path: pathlib.Path) -> None:
        """Raises UnusableIndex."""
        self._engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.pool.SingletonThreadPool, connect_args={"timeout": 5})
        sa.event.listen(self._engine, "connect", _set_pragmas)
        try:
            with self._engine.begin() as db:
                if db.execute(sa.text("PRAGMA quick_check(1)")).scalar() != "ok":
                    raise UnusableIndex("quick_check")
                _meta.create_all(db)
                version = db.execute(sa.select(_facts.c.value).where(_facts.c.name == "schema_version")).scalar()
                if version is None:
                    db.execute(_facts.insert().values(name="schema_version", value=SCHEMA_VERSION))
                elif version != SCHEMA_VERSION:
                    raise UnusableIndex(f"schema version {version}")
                self._written = db.execute(sa.select(sa.func.max(_blocks.c.written))).scalar() or 0
        except sa.exc.DatabaseError as e:
            self.close()
            raise UnusableIndex(type(e.orig).__name__) from e
        except UnusableIndex:
            self.close()
            raise

    def load(self) -> tuple[dict[bytes, KvLayout], list[SegmentRow], list[Row]]:
        """Everything, blocks oldest first. Raises UnusableIndex on rows that cannot be."""
        try:
            with self._engine.begin() as db:
                layouts = {r.key: KvLayout(**r.layout) for r in db.execute(sa.select(_layouts))}
                segments = [SegmentRow(r.segment, r.layout_key, r.slot_bytes, r.num_slots) for r in db.execute(sa.select(_segments))]
                rows = [_row(r) for r in db.execute(sa.select(_blocks).order_by(_blocks.c.written))]
        except (sa.exc.SQLAlchemyError, TypeError, ValueError) as e:
            raise UnusableIndex(type(e).__name__) from e
        if any(layout.key() != key for key, layout in layouts.items()):
            raise UnusableIndex("a layout does not fit its key")
        return layouts, segments, rows

    def change(
        self,
        *,
        layouts: Iterable[KvLayout] = (),
        add_segments: Iterable[SegmentRow] = (),
        drop_segments: Iterable[int] = (),
        forget: Sequence[tuple[bytes, bytes]] = (),
        add: Sequence[Row] = (),
    ) -> None:
        """One transaction: `forget` (layout key, block id) first, then the rest."""
        with self._engine.begin() as db:
            for layout_key, block_id in forget:
                db.execute(_blocks.delete().where(_blocks.c.layout_key == layout_key, _blocks.c.block_id == block_id))
            for segment in drop_segments:
                db.execute(_blocks.delete().where(_blocks.c.segment == segment))
                db.execute(_segments.delete().where(_segments.c.segment == segment))
            for layout in layouts:
                db.execute(_layouts.insert().prefix_with("OR IGNORE").values(key=layout.key(), layout=asdict(layout)))
            for row in add_segments:
                db.execute(_segments.insert().values(**asdict(row)))
            values: list[dict[str, Any]] = []
            for block in add:
                self._written += 1
                values.append({
                    "layout_key": block.layout_key, "block_id": block.block_id, "parent_id": block.parent_id,
                    "num_tokens": block.num_tokens, "num_bytes": block.num_bytes,
                    "checksum": block.checksum.to_bytes(8, "little"), "segment": block.place.segment,
                    "slot": block.place.slot, "written": self._written,
                })
            if values:
                db.execute(_blocks.insert().prefix_with("OR REPLACE"), values)

    def close(self) -> None:
        self._engine.dispose()


def _row(r: Any) -> Row:
    return Row(
        r.layout_key, r.block_id, r.parent_id, r.num_tokens, r.num_bytes, int.from_bytes(r.checksum, "little"),
        Place(r.segment, r.slot),
    )


def _set_pragmas(connection: Any, _record: Any) -> None:
    # WAL survives kill -9 without an fsync per transaction; a power cut may lose the last rows, which is a miss.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
