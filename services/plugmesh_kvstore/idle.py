"""The blocks of one tier that nobody holds, and which of them leaves next: a plugin's order says so as long as it behaves, else recency."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from plugmesh import host
from plugmesh.records import EvictionContext, EvictionOrder, EvictionRecord
from plugmesh.watchdog import WATCHDOG, Hung
from plugmesh_kvstore.blocks import Block

log = structlog.get_logger()

LATE_S = 0.05   # a call longer than this is late: the event loop stood still meanwhile
MAX_LATE = 5    # so many late calls of a method end the order ...
FORGIVEN = 20   # ... but so many in time make up for one: a busy machine interrupts any call, and slow code is slow nearly always
FIRST_PIECE = 64


def key_of(block: Block) -> bytes:
    """What a plugin knows a block by."""
    return block.partition.key + block.block_id


class IdleBlocks:
    """Least recently used first, and beside it the order of a plugin, which is told the same and asked first.

    What recency says is always up to date, so that an order that fails is dropped between two lines and nothing is lost. Every call of a plugin is
    ended after `plugmesh.host.REQUEST_LIMIT_S`.

    Args:
        record: Whose order decides; None leaves it to recency.
        on_dropped: Called once, when the order is dropped.
    """

    def __init__(self, context: EvictionContext, record: EvictionRecord | None = None, *, on_dropped: Callable[[], None] = lambda: None) -> None:
        self.tier = context.tier
        self._lru: collections.OrderedDict[Block, None] = collections.OrderedDict()
        self._name = record.name if record is not None else ""
        self._order: EvictionOrder | None = record.build(context) if record is not None else None
        self._told: dict[bytes, Block] = {}  # blocks that the order was given and that have not left, idle or busy
        self._late: dict[str, float] = {}    # method to late calls not made up for
        self._on_dropped = on_dropped

    def __contains__(self, block: Block) -> bool:
        return block in self._lru

    def __len__(self) -> int:
        return len(self._lru)

    # --- what happens to blocks: each call is harmless when it is repeated ---------------------------------------------

    def add(self, block: Block) -> None:
        """The block is in the tier and nobody holds it."""
        if block in self._lru:
            return
        self._lru[block] = None
        if self._order is not None:
            key = key_of(block)
            self._told[key] = block
            self._ask("add", key, block.partition.slot_bytes)

    def discard(self, block: Block) -> None:
        """Somebody holds it."""
        if block not in self._lru:
            return
        del self._lru[block]
        if self._order is not None:
            self._ask("discard", key_of(block))

    def touch(self, block: Block) -> None:
        """Somebody asked for it."""
        if block in self._lru:
            self._lru.move_to_end(block)
        if self._order is not None and (key := key_of(block)) in self._told:
            self._ask("touch", key)

    def left(self, block: Block, *, evicted: bool) -> None:
        """It is not in the tier any more."""
        self._lru.pop(block, None)
        if self._order is not None and self._told.pop(key := key_of(block), None) is not None:
            self._ask("left", key, evicted)

    # --- what goes next ----------------------------------------------------------------------------------------------

    def victim(self) -> Block | None:
        """The idle block that should leave next; None when there is none."""
        if not self._lru:
            return None
        if self._order is not None:
            key = self._ask("victim")
            block = self._idle(key)
            if block is not None:
                return block
            self._drop("victim", "names no idle block")
        return next(iter(self._lru))

    def coldest(self, n: int) -> list[Block]:
        """About the next `n` victims, the first in front; fewer when fewer are idle."""
        if self._order is not None and n > 0:
            keys = self._ask("coldest", n)
            blocks = [self._idle(key) for key in keys or ()]
            if self._order is not None and None not in blocks:
                return list(dict.fromkeys(b for b in blocks if b is not None))
            self._drop("coldest", "names no idle block")
        return list(itertools.islice(self._lru, n))

    def coldest_first(self) -> Iterator[Block]:
        """Every idle block once, in about the order of leaving. Blocks may be added and discarded meanwhile."""
        seen: set[Block] = set()
        n = FIRST_PIECE
        while True:
            piece = self.coldest(n)
            for block in piece:
                if block not in seen and block in self._lru:
                    seen.add(block)
                    yield block
            if len(piece) < n:
                break
            n *= 4
        for block in list(self._lru):  # an order may have named fewer than there are
            if block not in seen and block in self._lru:
                yield block

    # --- the plugin ----------------------------------------------------------------------------------------------------

    def _idle(self, key: Any) -> Block | None:
        block = self._told.get(key) if isinstance(key, bytes) else None
        return block if block is not None and block in self._lru else None

    def _ask(self, method: str, *args: Any) -> Any:
        """The order's answer; None, too, when it was dropped because of this call."""
        began = time.monotonic()
        try:
            answer = WATCHDOG.call(f"plugin {self._name}: {method}", host.REQUEST_LIMIT_S, _answer, self._order, method, args)
        except (Exception, SystemExit) as e:
            self._drop(method, "hangs" if isinstance(e, Hung) else f"raised {type(e).__name__}")
            return None
        is_late = time.monotonic() - began > LATE_S
        if (is_late or self._late) and self._is_slow(method, is_late):
            self._drop(method, "is late again and again")
            return None
        return answer

    def _is_slow(self, method: str, is_late: bool) -> bool:
        late = self._late.pop(method, 0.0) + (1.0 if is_late else -1.0 / FORGIVEN)
        if late > 0:
            self._late[method] = late
        return late >= MAX_LATE

    def _drop(self, method: str, reason: str) -> None:
        if self._order is None:
            return
        self._order = None
        self._told.clear()
        log.error("kvstore.eviction_order_dropped", order=self._name, tier=self.tier, method=method, reason=reason, num_idle=len(self._lru))
        self._on_dropped()


def _answer(order: Any, method: str, args: tuple[Any, ...]) -> Any:
    """Whole, so that nothing of the plugin runs outside of the watch: a generator would."""
    answer = getattr(order, method)(*args)
    return list(itertools.islice(answer, args[0])) if method == "coldest" else answer
