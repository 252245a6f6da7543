"""Which blocks each kvstore has, as far as its events told: for operators and tools."""

from __future__ import annotations

from collections.abc import Sequence

from plugmesh.kv.feed import KVSTORE, KvFeed, Source
from plugmesh.mesh.api import Mesh
from plugmesh.records import KvEvent


class KvIndex:
    """A set of block ids per instance, kept right by `KvFeed`.

    Answers are hints: a block may be gone by the time somebody asks for it.

    Args:
        check_s: As of `KvFeed`.
    """

    def __init__(self, mesh: Mesh, *, source: Source = KVSTORE, check_s: float = 5.0) -> None:
        self._ids: dict[str, set[bytes]] = {}
        self._feed = KvFeed(mesh, source, self._on_event, check_s=check_s)

    async def start(self) -> None:
        self._feed.start()

    async def close(self) -> None:
        await self._feed.close()

    @property
    def num_gaps(self) -> int:
        """How often an event was missed."""
        return self._feed.num_gaps

    @property
    def num_snapshots(self) -> int:
        return self._feed.num_snapshots

    def stores(self) -> list[str]:
        """Stores whose set is complete as far as known."""
        return self._feed.complete()

    def has(self, store_instance: str, block_id: bytes) -> bool:
        return block_id in self._ids.get(store_instance, ())

    def prefix(self, block_ids: Sequence[bytes]) -> dict[str, int]:
        """Store instance to how many leading blocks of the chain it has; stores with none are left out."""
        found: dict[str, int] = {}
        for name, ids in self._ids.items():
            num = 0
            while num < len(block_ids) and block_ids[num] in ids:
                num += 1
            if num:
                found[name] = num
        return found

    def _on_event(self, event: KvEvent) -> None:
        if event.kind == "stored":
            self._ids.setdefault(event.instance_id, set()).update(event.block_ids)
        elif event.kind == "removed":
            self._ids.get(event.instance_id, set()).difference_update(event.block_ids)
        else:
            self._ids.pop(event.instance_id, None)
