"""Every change of the set of blocks, numbered without holes."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Sequence
from dataclasses import dataclass

MAX_IDS = 1024  # per event: 32 KiB


@dataclass(frozen=True, slots=True)
class Change:
    """`kind` is "stored", "removed" or "cleared" (everything of every model is gone; survivors follow as "stored")."""

    sequence: int
    kind: str
    block_ids: tuple[bytes, ...] = ()
    parent_id: bytes = b""
    tier: str = ""
    model: str = ""


class EventLog:
    """Numbers changes and keeps the unpublished ones, at most `cap`.

    When the publisher cannot keep up the oldest are dropped: subscribers see a gap and take a snapshot.
    """

    def __init__(self, cap: int) -> None:
        self.sequence = 0
        self.num_dropped = 0
        self._cap = cap
        self._waiting: collections.deque[Change] = collections.deque()
        self._wake = asyncio.Event()

    def append(
        self, kind: str, block_ids: Sequence[bytes] = (), *, parent_id: bytes = b"", tier: str = "", model: str = ""
    ) -> None:
        for start in range(0, max(1, len(block_ids)), MAX_IDS):
            self.sequence += 1
            part = tuple(block_ids[start : start + MAX_IDS])
            self._waiting.append(Change(self.sequence, kind, part, parent_id, tier, model))
            if len(self._waiting) > self._cap:
                self._waiting.popleft()
                self.num_dropped += 1
        self._wake.set()

    def peek(self) -> Change | None:
        """The oldest unpublished change."""
        return self._waiting[0] if self._waiting else None

    def published(self, change: Change) -> None:
        """Forgets a change after the bus took it."""
        if self._waiting and self._waiting[0] is change:
            self._waiting.popleft()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def wait(self, timeout_s: float) -> None:
        """Returns when something was appended since the last call, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()
