"""The values of one topic and the memory that they take. Knows nothing of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from plugmesh.errors import NotFound
from plugmesh_rollout.table.topic import ROW_OVERHEAD


class Storage:
    """Encoded values by row and field. They are immutable bytes, so who reads a row that is being dropped still has it whole.

    Args:
        row_bytes: Counted for a row at least, however little it has yet.
    """

    def __init__(self, row_bytes: int = 0) -> None:
        self._row_bytes = row_bytes
        self._cells: dict[int, dict[str, bytes]] = {}
        self._bytes: dict[int, int] = {}  # of values, by row
        self.num_bytes = 0

    def cost(self, cells: Mapping[str, bytes]) -> int:
        """Bytes that a new row of these values would take."""
        return ROW_OVERHEAD + max(self._row_bytes, sum(map(len, cells.values())))

    def added_cost(self, index: int, cells: Mapping[str, bytes]) -> int:
        """Bytes that these further values would take of a row that is there."""
        before = self._bytes[index]
        return max(self._row_bytes, before + sum(map(len, cells.values()))) - max(self._row_bytes, before)

    def add(self, index: int, cells: Mapping[str, bytes]) -> None:
        """Makes a row, or adds fields to it."""
        if index not in self._cells:
            self._cells[index] = dict(cells)
            self._bytes[index] = sum(map(len, cells.values()))
            self.num_bytes += ROW_OVERHEAD + max(self._row_bytes, self._bytes[index])
            return
        self.num_bytes += self.added_cost(index, cells)
        self._cells[index].update(cells)
        self._bytes[index] += sum(map(len, cells.values()))

    def get(self, index: int, field: str) -> bytes | None:
        return self._cells[index].get(field)

    def read(self, index: int, fields: Iterable[str]) -> list[bytes]:
        """Raises NotFound when the row has gone or lacks a field."""
        try:
            cells = self._cells[index]
            return [cells[f] for f in fields]
        except KeyError:
            raise NotFound(f"row {index} has gone or lacks a field", param="index") from None

    def drop(self, index: int) -> None:
        del self._cells[index]
        self.num_bytes -= ROW_OVERHEAD + max(self._row_bytes, self._bytes.pop(index))

    def __len__(self) -> int:
        return len(self._cells)

    def __contains__(self, index: int) -> bool:
        return index in self._cells
