"""Exactly the groups of one step: those whose number, divided by the groups of a step, is the step's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.records import RowView, SampleContext


class InOrder:
    """Waits for every group of step `batch_index`, and for no other. Group names end with the group's number; a batch is a whole number of groups."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        if options:
            raise InvalidRequest("the sampler in_order has no options", param="sampler")

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        if context.batch_index is None:
            raise InvalidRequest("the sampler in_order needs the number of the step (batch_index)", param="batch_index")
        if batch_size % context.group_size:
            raise InvalidRequest(f"a batch of {batch_size} rows is no whole number of groups of {context.group_size}", param="batch_size")
        num = batch_size // context.group_size
        wanted: dict[int, list[int]] = {}
        for row in ready:
            number = _number(row)
            if context.batch_index * num <= number < (context.batch_index + 1) * num:
                wanted.setdefault(number, []).append(row.index)
        if len(wanted) < num or any(len(rows) != context.group_size for rows in wanted.values()):
            return [], []
        rows = [index for number in sorted(wanted) for index in wanted[number]]
        return rows, rows


def _number(row: RowView) -> int:
    """Of the row's group; of the row itself where there are no groups. -1 for a name without one."""
    if not row.group:
        return row.index
    digits = len(row.group) - len(row.group.rstrip("0123456789"))
    return int(row.group[-digits:]) if digits else -1
