"""The core's ways of choosing rows.

| name | chooses |
|---|---|
| sequential | the first rows |
| grpo_groups | the first complete groups, whole |
| rank_aware | like grpo_groups, and gives every rank of a batch number the same rows |
| length_balanced | whole groups for all ranks of a batch number, shared out so that the ranks' sums of a field's sizes are about equal |
| version_window | complete groups, oldest or newest version first, or the first ones; can wait for groups that would be too old by the next step |
| same_version | complete groups of one version |

A group counts as complete when all its rows are ready; its version is the oldest of its rows. With groups of one row every row is a group.
"""

from __future__ import annotations

import collections
import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.hookspecs import hookimpl
from plugmesh.records import RowView, SampleContext, Sampler, SamplerRecord
from plugmesh_rollout.table.admission import must_wait

_ORDERS = {"oldest": 1, "newest": -1, "first": 0}  # sign of the version in the order of a version window
_KEPT_BATCHES = 64  # batch numbers whose rows are kept for slow ranks


def complete_groups(ready: Iterable[RowView], group_size: int) -> Iterator[list[RowView]]:
    """Groups all of whose rows are among `ready`, in the order in which they become complete there."""
    if group_size == 1:
        for row in ready:
            yield [row]
        return
    open_groups: dict[str, list[RowView]] = {}
    for row in ready:
        group = open_groups.setdefault(row.group, [])
        group.append(row)
        if len(group) == group_size:
            yield open_groups.pop(row.group)


def _num_groups(batch_size: int, context: SampleContext) -> tuple[int, int]:
    """Wanted and least number of groups. Raises InvalidRequest when the batch is no whole number of groups."""
    if batch_size % context.group_size:
        raise InvalidRequest(f"a batch of {batch_size} rows is no whole number of groups of {context.group_size}", param="batch_size")
    return batch_size // context.group_size, -(-context.min_rows // context.group_size)


def _indexes(groups: Iterable[Sequence[RowView]]) -> list[int]:
    return [row.index for group in groups for row in group]


def _version(group: Sequence[RowView]) -> int | None:
    return min((r.version for r in group if r.version is not None), default=None)


class Sequential:
    takes_first = True  # the table need not list more rows than the batch has

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ())

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        if len(ready) < context.min_rows:
            return [], []
        rows = [r.index for r in ready[:batch_size]]
        return rows, rows


class GrpoGroups:
    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ())

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        num, least = _num_groups(batch_size, context)
        groups = list(itertools.islice(complete_groups(ready, context.group_size), num))
        rows = _indexes(groups) if len(groups) >= least else []
        return rows, rows


class RankAware:
    """Data-parallel ranks that must see the same rows. The first caller of a batch number owns them: its acknowledgement counts, the others' do nothing."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ())
        self._batches: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        self._inner = GrpoGroups({})

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        number = _batch_number(context)
        if number in self._batches:
            return list(self._batches[number]), []
        rows, consumed = self._inner.sample(ready, batch_size, context)
        if rows:
            _keep(self._batches, number, rows)
        return rows, consumed

    def forget(self, indexes: Iterable[int]) -> None:
        """A batch with a row that has gone is drawn anew."""
        gone = set(indexes)
        for number in [n for n, rows in self._batches.items() if not gone.isdisjoint(rows)]:
            del self._batches[number]


class LengthBalanced:
    """Shares `num_ranks` batches out so that every rank gets as many groups and about as many tokens.

    The first caller of a batch number fixes all shares; a rank whose share was not fetched yet keeps it until some of its rows go elsewhere.

    Args:
        options: "field", whose sizes are summed ("response_ids" by default); of a field of single numbers, their values.

    Source: Karmarkar and Karp, The differencing method of set partitioning, 1982; TransferQueue's seqlen-balanced sampler.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ("field",))
        self._field = str(options.get("field", "response_ids"))
        self._shares: collections.OrderedDict[int, list[list[int]]] = collections.OrderedDict()
        self._fetched: set[tuple[int, int]] = set()

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        number = _batch_number(context)
        here = {r.index for r in ready}
        if number in self._shares:
            share = self._shares[number][context.rank]
            if not here.issuperset(share):
                return [], []  # fetched by this rank before
            self._fetched.add((number, context.rank))
            return list(share), list(share)
        taken = {i for shares in self._shares.values() for share in shares for i in share}
        num, _ = _num_groups(batch_size, context)
        free = (r for r in ready if r.index not in taken)
        groups = list(itertools.islice(complete_groups(free, context.group_size), num * context.num_ranks))
        if len(groups) < num * context.num_ranks:
            return [], []
        weights = [sum(self._weight(r) for r in group) for group in groups]
        shares = [_indexes(groups[i] for i in sorted(part)) for part in balanced(weights, context.num_ranks)]
        _keep(self._shares, number, shares)
        self._fetched = {(n, rank) for n, rank in self._fetched if n in self._shares} | {(number, context.rank)}
        return list(shares[context.rank]), list(shares[context.rank])

    def _weight(self, row: RowView) -> float:
        if self._field not in row.sizes:
            raise InvalidRequest(f"the sampler length_balanced needs rows with the field {self._field!r}", param="sampler")
        return row.scalars.get(self._field, row.sizes[self._field])

    def forget(self, indexes: Iterable[int]) -> None:
        """Shares are drawn anew when rows of one that nobody fetched have gone. A rank that lost its lease finds its share as it was."""
        gone = set(indexes)
        for number, shares in list(self._shares.items()):
            if any(not gone.isdisjoint(s) and (number, rank) not in self._fetched for rank, s in enumerate(shares)):
                del self._shares[number]


def balanced(weights: Sequence[float], num_parts: int) -> list[list[int]]:
    """`karmarkar_karp`, made better by exchanging single items between the heaviest and the lightest part, and never worse than cutting the sequence up.

    With equal counts, differencing alone leaves small companions beside one very heavy item in one batch of a hundred.
    """
    each = len(weights) // num_parts
    naive = [list(range(i * each, (i + 1) * each)) for i in range(num_parts)]
    best = min((karmarkar_karp(weights, num_parts), naive), key=lambda parts: _spread(parts, weights))
    sums = [sum(weights[i] for i in part) for part in best]
    for _ in range(len(weights)):
        high, low = max(range(num_parts), key=sums.__getitem__), min(range(num_parts), key=sums.__getitem__)
        gap = sums[high] - sums[low]
        # An exchange that moves more than nothing and less than the whole gap lowers the heaviest, and lifts the lightest, without changing places.
        moves = ((abs(gap - 2 * (weights[i] - weights[j])), i, j) for i in best[high] for j in best[low] if 0 < weights[i] - weights[j] < gap)
        move = min(moves, default=None)
        if move is None:
            break
        _, i, j = move
        best[high] = sorted([*(x for x in best[high] if x != i), j])
        best[low] = sorted([*(x for x in best[low] if x != j), i])
        sums[high] -= weights[i] - weights[j]
        sums[low] += weights[i] - weights[j]
    return best


def _spread(parts: Sequence[Sequence[int]], weights: Sequence[float]) -> float:
    """Heaviest over lightest part."""
    sums = [sum(weights[i] for i in part) for part in parts]
    return max(sums, default=0.0) / max(min(sums, default=0.0), 1e-9)


def karmarkar_karp(weights: Sequence[float], num_parts: int) -> list[list[int]]:
    """Indexes in `num_parts` parts of equal count and about equal weight, by largest differencing.

    Starts with tuples of `num_parts` neighbours in order of weight, one item to a part; merges the two tuples of the largest spread, heaviest part with
    lightest, until one is left. `len(weights)` must be a multiple of `num_parts`.
    """
    if len(weights) % num_parts:
        raise InvalidRequest(f"{len(weights)} groups cannot be shared out evenly among {num_parts} ranks", param="num_ranks")
    if not weights:
        return [[] for _ in range(num_parts)]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    heap = []
    for tie, start in enumerate(range(0, len(order), num_parts)):
        parts = [(weights[i], [i]) for i in order[start : start + num_parts]]  # heaviest first
        heap.append((parts[-1][0] - parts[0][0], tie, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, a = heapq.heappop(heap)
        _, _, b = heapq.heappop(heap)
        merged = sorted(((x + y, i + j) for (x, i), (y, j) in zip(a, reversed(b), strict=True)), key=lambda p: -p[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], tie, merged))
    return [sorted(items) for _, items in heap[0][2]]


class VersionWindow:
    """Complete groups by version.

    Args:
        options: "order", "oldest" (default) or "newest" version first, or the "first" rows; "wait" (default but for "newest"): holds the batch back while training it would make rows that are
            still being generated too old (`admission.must_wait`), which needs the topic's staleness and batch_rows.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ("order", "wait"))
        self._order = options.get("order", "oldest")
        if self._order not in _ORDERS:
            raise InvalidRequest(f"order is {', '.join(map(repr, _ORDERS))}, not {self._order!r}", param="sampler")
        self._wait = bool(options.get("wait", self._order != "newest"))

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        num, least = _num_groups(batch_size, context)
        sign = _ORDERS[self._order]
        groups = sorted(complete_groups(ready, context.group_size), key=lambda g: (sign * (-1 if (v := _version(g)) is None else v), g[0].index))[:num]
        if len(groups) < least:
            return [], []
        rows = _indexes(groups)
        if self._wait and context.staleness is not None and context.latest_version is not None:
            taken = set(rows)
            left = collections.Counter(r.version for r in ready if r.version is not None and r.index not in taken)
            if must_wait(left, context.pending, context.latest_version, context.staleness, context.batch_rows or batch_size):
                return [], []
        return rows, rows


class SameVersion:
    """Complete groups whose rows all have one version, the oldest version that has enough of them."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ())

    def sample(self, ready: Sequence[RowView], batch_size: int, context: SampleContext) -> tuple[list[int], list[int]]:
        num, least = _num_groups(batch_size, context)
        by_version: dict[int, list[list[RowView]]] = {}
        for group in complete_groups(ready, context.group_size):
            versions = {r.version for r in group}
            version = versions.pop()
            if not versions and version is not None:
                by_version.setdefault(version, []).append(group)
        for wanted in dict.fromkeys((num, least)):
            for version in sorted(by_version):
                if len(by_version[version]) >= wanted:
                    rows = _indexes(by_version[version][:num])
                    return rows, rows
        return [], []


def _batch_number(context: SampleContext) -> int:
    if context.batch_index is None:
        raise InvalidRequest("this sampler needs the number of the batch (batch_index)", param="batch_index")
    if not 0 <= context.rank < context.num_ranks:
        raise InvalidRequest(f"rank {context.rank} is not one of {context.num_ranks}", param="rank")
    return context.batch_index


def _keep(kept: collections.OrderedDict[int, Any], number: int, value: Any) -> None:
    kept[number] = value
    while len(kept) > _KEPT_BATCHES:
        kept.popitem(last=False)


def _only(options: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            raise InvalidRequest(f"unknown option {name[:80]!r} of the sampler" + (f"; it has {', '.join(known)}" if known else ""), param="sampler")


_BUILT: dict[str, type[Any]] = {
    "sequential": Sequential,
    "grpo_groups": GrpoGroups,
    "rank_aware": RankAware,
    "length_balanced": LengthBalanced,
    "version_window": VersionWindow,
    "same_version": SameVersion,
}


def build_core(name: str, options: Mapping[str, Any] | None = None) -> Sampler:
    """One of the core's samplers."""
    sampler: Sampler = _BUILT[name](options or {})
    return sampler


class CoreSamplers:
    """The core's own, through the plugins' door."""

    @hookimpl
    def register_samplers(self) -> list[SamplerRecord]:
        return [SamplerRecord(name, build) for name, build in _BUILT.items()]
