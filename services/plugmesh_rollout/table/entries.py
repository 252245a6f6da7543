"""What changes in a table, as the ledger is told and as its journal writes it.

A list of entries that belong together becomes one frame: a header, a description of each entry as JSON, then the values themselves. Nothing is pickled.

    magic (4 bytes) | length of the description (u32) | length of the values (u64) | xxh3-64 of the description | description | values
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import xxhash

MAGIC = b"pmj1"
HEADER = struct.Struct("<4sIQ8s")


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

Item: TypeAlias = list[Any]
"""An entry without its values: what the description holds of it. The first element says which, the second is the topic:

    made, topic, spec            put, topic, index, id, group, version, digest in hex, length, checksum in hex
    dropped, topic               fields, topic, index, version, length, checksum in hex
    version, topic, version      acked, topic, task, lease, indexes
    cleared, topic, indexes      compacted, topic, remember_rows

`length` bytes of the frame's values belong to the entry, in order; 0 when it has none, then without a checksum.
"""


def frame(entries: Sequence[Entry]) -> tuple[list[bytes], list[Item]]:
    """The pieces of one frame, in the order in which they are written, values from the second on; and what the description says."""
    items: list[Item] = []
    values: list[bytes] = []
    num_bytes = 0
    for e in entries:
        if isinstance(e, RowPut | FieldsPut):
            length, checksum = 0, ""
            if e.cells:
                parts = pack(e.cells)
                h = xxhash.xxh3_64()
                for part in parts:
                    h.update(part)
                    length += len(part)
                checksum = h.hexdigest()
                values += parts
                num_bytes += length
            if isinstance(e, RowPut):
                items.append(["put", e.topic, e.index, e.id, e.group, e.version, e.digest.hex(), length, checksum])
            else:
                items.append(["fields", e.topic, e.index, e.version, length, checksum])
        elif isinstance(e, Acked):
            items.append(["acked", e.topic, e.task, e.lease_id, e.indexes])
        elif isinstance(e, Cleared):
            items.append(["cleared", e.topic, e.indexes])
        elif isinstance(e, VersionPublished):
            items.append(["version", e.topic, e.version])
        elif isinstance(e, TopicMade):
            items.append(["made", e.topic, e.spec])
        elif isinstance(e, TopicDropped):
            items.append(["dropped", e.topic])
        else:
            items.append(["compacted", e.topic, e.remember_rows])
    text = json.dumps(items, separators=(",", ":")).encode()
    return [HEADER.pack(MAGIC, len(text), num_bytes, xxhash.xxh3_64_digest(text)) + text, *values], items


def place(item: Item) -> tuple[int, str]:
    """Length and checksum of an entry's values; (0, "") of one without."""
    return (item[-2], item[-1]) if item[0] in ("put", "fields") else (0, "")


def pack(cells: Mapping[str, bytes]) -> list[bytes]:
    """Cells as one record, in pieces: length of the name, length of the value, name, value, for each."""
    parts: list[bytes] = []
    for name, cell in cells.items():
        raw = name.encode()
        parts += (struct.pack("<HQ", len(raw), len(cell)) + raw, cell)
    return parts


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
