"""What a topic, a row and a lease are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from plugmesh.client import rollout_values
from plugmesh.errors import InvalidRequest

ROW_OVERHEAD = 512  # bytes of bookkeeping counted for a row, so that many empty rows are bounded, too
MAX_NAME = 200


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """How a topic was created.

    Attributes:
        fields: Name to dtype ("" takes that of the first value).
        tasks: Every one gets every row once.
        group_size: Rows of one group; above 1, every row names its group.
        capacity_rows: Live rows at most.
        capacity_bytes: Bytes of live rows at most, bookkeeping included.
        staleness: Versions that a row may lie behind the latest one when a task gets it; None: any number.
        batch_rows: Rows that one training step takes. Above 0, at most (staleness + 1) * batch_rows rows are in flight.
        admission_task: A row is in flight until this task is done with it; "": until all are.
        auto_clear: Rows that all tasks are done with leave the table by themselves.
        row_bytes: Bytes set aside for every row when it comes, so that its later fields find room.
        remember_rows: Ids of cleared rows that are remembered, so that a late repetition of a `put` does not bring one back.
    """

    name: str
    fields: Mapping[str, str]
    tasks: tuple[str, ...]
    group_size: int = 1
    capacity_rows: int = 65536
    capacity_bytes: int = 1 << 30
    staleness: int | None = None
    batch_rows: int = 0
    admission_task: str = ""
    auto_clear: bool = True
    row_bytes: int = 0
    remember_rows: int = 1 << 20

    def checked(self) -> TopicSpec:
        """Itself with dtypes as `rollout_values.Facts` writes them.

        Raises:
            InvalidRequest: Names the argument; among others when the table could never hold what one training step needs.
        """
        _name("topic", self.name)
        for kind, names in (("fields", tuple(self.fields)), ("tasks", self.tasks)):
            if not names or len(set(names)) != len(names) or len(names) > 256:
                raise InvalidRequest(f"topic {self.name!r} needs between 1 and 256 {kind}, each once", param=kind)
            for name in names:
                _name(kind, name)
        for name in ("group_size", "capacity_rows", "capacity_bytes"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}", param=name)
        for name in ("batch_rows", "row_bytes", "remember_rows", "staleness"):
            if (getattr(self, name) or 0) < 0:
                raise InvalidRequest(f"{name} must not be negative", param=name)
        if self.batch_rows % self.group_size:
            raise InvalidRequest(f"batch_rows {self.batch_rows} is no multiple of group_size {self.group_size}", param="batch_rows")
        if self.admission_task and self.admission_task not in self.tasks:
            raise InvalidRequest(f"admission_task {self.admission_task!r} is no task of the topic", param="admission_task")
        needed = max(self.group_size, self.num_in_flight or self.batch_rows)
        if self.capacity_rows < needed:
            raise InvalidRequest(
                f"capacity_rows {self.capacity_rows} is below the {needed} rows that (staleness + 1) * batch_rows and group_size need: the loop would stop",
                param="capacity_rows",
            )
        if self.capacity_bytes < needed * max(self.row_bytes, ROW_OVERHEAD):
            raise InvalidRequest(f"capacity_bytes {self.capacity_bytes} is below what {needed} rows need", param="capacity_bytes")
        return dataclasses.replace(self, fields={f: rollout_values.dtype_name(d) for f, d in self.fields.items()})

    @property
    def num_in_flight(self) -> int | None:
        """Rows that may be in flight, None without a bound."""
        return (self.staleness + 1) * self.batch_rows if self.staleness is not None and self.batch_rows else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> TopicSpec:
        data: dict[str, Any] = json.loads(text)
        return TopicSpec(**{**data, "tasks": tuple(data["tasks"])})


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row that somebody wants to put; cells are encoded values."""

    id: str
    cells: Mapping[str, bytes]
    version: int | None = None
    group: str = ""

    def digest(self) -> bytes:
        """Equal for equal content."""
        h = xxhash.xxh3_128()
        h.update(f"{self.version}\0{self.group}\0".encode())
        for name in sorted(self.cells):
            cell = self.cells[name]
            h.update(f"{name}\0{len(cell)}\0".encode())
            h.update(cell)
        return h.digest()


class StoredRow:
    """A live row, without its values; a `plugmesh.records.RowView`.

    `entry` numbers the last change in the ledger. `holders` has the tasks that have got the row: a lease while the task works on it, None once it is done.
    """

    __slots__ = ("digest", "entry", "group", "holders", "id", "index", "scalars", "sizes", "version")

    def __init__(self, index: int, id: str, group: str, version: int | None, digest: bytes) -> None:
        self.index = index
        self.id = id
        self.group = group
        self.version = version
        self.digest = digest
        self.entry = 0
        self.sizes: dict[str, int] = {}
        self.scalars: dict[str, float] = {}
        self.holders: dict[str, Lease | None] = {}


@dataclass(slots=True, eq=False)
class Lease:
    """What one consumer has until it says that it is done, or `expires_at` (the table's clock) passes.

    `rows` were handed out in this order; `owned` is what the task has thereby got (a sampler may hand out rows that another lease owns).
    """

    lease_id: str
    task: str
    rows: tuple[int, ...]
    owned: tuple[int, ...]
    expires_at: float
    fields: tuple[str, ...] = field(default=())


def _name(kind: str, name: str) -> None:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"a name among {kind} is empty, longer than {MAX_NAME} characters or not printable", param=kind)
