"""S3-FIFO: new blocks wait in a small queue, those asked for there go on to the main one, and who was sent away too early is remembered.

Source: AIBrix, arXiv:2504.03648 (KV cache, first level; share 0.3, threshold 1), after Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass

MAX_HITS = 3  # two bits: what was popular once leaves after at most three more rounds


class _Queue:
    """Keys, the oldest first. `num_bytes` counts parked blocks, too, which are in the tier but not in line."""

    __slots__ = ("keys", "num_bytes")

    def __init__(self) -> None:
        self.keys: OrderedDict[bytes, None] = OrderedDict()
        self.num_bytes = 0


@dataclass(slots=True, eq=False)
class _Block:
    num_bytes: int
    queue: _Queue
    hits: int = 0
    is_busy: bool = False
    is_parked: bool = False


class S3Fifo:
    """Implements `plugmesh.records.EvictionOrder`. Every method but `coldest` takes constant time, amortised over the blocks that come and go.

    A block that is busy keeps its place in line. When its turn to leave comes it steps out ("parked") and stands at the end of its queue again as soon as
    it is idle: in use at that moment is as good as new.

    Args:
        capacity_bytes: Of the tier.
        small_share: Part of it for blocks that have not proved themselves.
        promote_hits: Times that a block must have been asked for in the small queue to go on to the main one; 1 to 3.
        max_ghosts: Names remembered of blocks that left from the small queue; their sizes together stay below the main queue's share as well.
    """

    def __init__(self, capacity_bytes: int, small_share: float = 0.3, promote_hits: int = 1, max_ghosts: int = 1 << 18) -> None:
        self.small_bytes = int(capacity_bytes * small_share)
        self.main_bytes = capacity_bytes - self.small_bytes
        self.promote_hits = promote_hits
        self.max_ghosts = max_ghosts
        self._small, self._main = _Queue(), _Queue()
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()
        self._ghost_bytes = 0
        self._blocks: dict[bytes, _Block] = {}
        self._num_idle = 0
        self._named: bytes | None = None  # the last answer of `victim`, while nothing has changed it

    def add(self, key: bytes, num_bytes: int) -> None:
        block = self._blocks.get(key)
        if block is None:
            was_ghost = key in self._ghosts
            if was_ghost:
                self._ghost_bytes -= self._ghosts.pop(key)
            queue = self._main if was_ghost else self._small
            self._blocks[key] = _Block(num_bytes, queue)
            queue.keys[key] = None
            queue.num_bytes += num_bytes
        elif block.is_busy:
            block.is_busy = False
            if block.is_parked:
                block.is_parked = False
                block.queue.keys[key] = None
        else:
            return
        self._num_idle += 1

    def discard(self, key: bytes) -> None:
        block = self._blocks.get(key)
        if block is not None and not block.is_busy:
            block.is_busy = True
            self._num_idle -= 1
            self._changed(key)

    def touch(self, key: bytes) -> None:
        block = self._blocks.get(key)
        if block is not None:
            block.hits = min(block.hits + 1, MAX_HITS)
            self._changed(key)

    def left(self, key: bytes, evicted: bool) -> None:
        block = self._blocks.pop(key, None)
        if block is None:
            return
        block.queue.keys.pop(key, None)
        block.queue.num_bytes -= block.num_bytes
        self._num_idle -= not block.is_busy
        self._named = None
        if evicted and block.queue is self._small:
            self._remember(key, block.num_bytes)

    def victim(self) -> bytes | None:
        if not self._num_idle:
            return None
        while self._named is None:
            if self._small.keys and (self._small.num_bytes > self.small_bytes or not self._main.keys):
                self._turn_of_small()
            else:
                self._turn_of_main()
        return self._named

    def coldest(self, n: int) -> list[bytes]:
        """Looks at the old end of both queues first, and at more of them only where few are idle there."""
        window = 8 * n
        while True:
            found = self._ranked(window)
            if len(found) >= n or window >= len(self._blocks):
                return found[:n]
            window *= 8

    # -- the two queues ---------------------------------------------------------------------------------------------------

    def _turn_of_small(self) -> None:
        """The oldest of the small queue goes on, steps out, or is named."""
        key = next(iter(self._small.keys))
        block = self._blocks[key]
        if block.hits >= self.promote_hits:
            del self._small.keys[key]
            self._small.num_bytes -= block.num_bytes
            block.queue, block.hits = self._main, 0
            self._main.keys[key] = None
            self._main.num_bytes += block.num_bytes
            if self._main.num_bytes > self.main_bytes:
                self._turn_of_main()
        else:
            self._leaves(key, block)

    def _turn_of_main(self) -> None:
        """The oldest of the main queue goes round again for one hit less, steps out, or is named."""
        key = next(iter(self._main.keys))
        block = self._blocks[key]
        if block.hits:
            block.hits -= 1
            self._main.keys.move_to_end(key)
        else:
            self._leaves(key, block)

    def _leaves(self, key: bytes, block: _Block) -> None:
        if block.is_busy:
            block.is_parked = True
            del block.queue.keys[key]
        else:
            self._named = key

    def _changed(self, key: bytes) -> None:
        if key == self._named:
            self._named = None

    def _remember(self, key: bytes, num_bytes: int) -> None:
        self._ghosts[key] = num_bytes
        self._ghost_bytes += num_bytes
        while self._ghosts and (self._ghost_bytes > self.main_bytes or len(self._ghosts) > self.max_ghosts):
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _ranked(self, window: int) -> list[bytes]:
        """Idle keys among the oldest `window` of each queue: those without hits, then those that would go on or round."""
        fresh: list[bytes] = []
        warm: list[bytes] = []
        cold: list[bytes] = []
        hot: list[bytes] = []
        for key in itertools.islice(self._small.keys, window):
            block = self._blocks[key]
            if not block.is_busy:
                (warm if block.hits >= self.promote_hits else fresh).append(key)
        for key in itertools.islice(self._main.keys, window):
            block = self._blocks[key]
            if not block.is_busy:
                (hot if block.hits else cold).append(key)
        first = fresh + cold if self._small.num_bytes > self.small_bytes or not self._main.keys else cold + fresh
        return first + hot + warm
