"""Requests run through a real `BlockStore`, for hit ratios of eviction orders; no network, and blocks without bytes of interest."""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plugmesh.records import EvictionRecord
from plugmesh.types import KvLayout
from plugmesh_kvstore.disk import DiskSpace
from plugmesh_kvstore.store import BlockStore

LAYOUT = KvLayout("replay", "raw", "float32", 1, 1, 32, 16, 4096)


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it. Hits count blocks asked for; of a prompt whose first block is missing nothing hits. `us_per_block` is processor time and includes the store's own work."""

    hits: int
    misses: int
    evicted: int
    demoted: int          # left the arena and stayed on disk
    orders_dropped: int
    us_per_block: float

    @property
    def hit_ratio(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


def replay(requests: Iterable[Sequence[bytes]], num_blocks: int, eviction: EvictionRecord | None = None, *, num_disk_blocks: int = 0) -> Replay:
    """Each request is looked up, what it found is held meanwhile, and what it lacks is stored.

    Args:
        requests: Chains of block ids.
        num_blocks: That the arena holds.
        eviction: None is least recently used first.
        num_disk_blocks: That the disk tier holds; blocks move there after every request, without bytes.
    """
    data = bytes(LAYOUT.block_bytes)
    disk = DiskSpace(num_disk_blocks * len(data), 16 * len(data)) if num_disk_blocks else None
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(pathlib.Path(folder), num_blocks * len(data), disk=disk, eviction=eviction)
        try:
            partition = store.partition_with_arena(LAYOUT)
            num = 0
            began = time.process_time()
            for ids in requests:
                num += len(ids)
                found = store.lookup(partition, ids)
                for block in found:
                    store.hold(block)
                for block in found:
                    if block.slot is None and (slot := store.begin_load(block)) is not None:
                        store.end_load(block, slot, ok=True)
                for block_id in ids[len(found) :]:
                    store.insert(partition, block_id, b"", 16, data, 0)
                for block in found:
                    store.unhold(block)
                for block in store.begin_spill(8, 0.5 * store.arena_bytes):
                    store.end_spill(block, ok=True)
                if disk is not None:
                    disk.take_changes()
                while (change := store.events.peek()) is not None:
                    store.events.published(change)
            took = time.process_time() - began
            counters = store.counters
            assert (audit := store.audit()).num_leaked == audit.num_doubled == 0
            return Replay(counters.hits, counters.misses, counters.evicted, counters.evicted_to_disk, counters.orders_dropped, took / max(1, num) * 1e6)
        finally:
            store.close()
