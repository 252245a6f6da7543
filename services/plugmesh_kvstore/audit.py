"""Who owns each slot of the arenas: every slot that was ever handed out has exactly one owner."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from dataclasses import dataclass

from plugmesh_kvstore.blocks import Partition, Quarantine
from plugmesh_kvstore.leases import Lease


@dataclass(slots=True)
class Counters:
    """Since start. Hits and misses count blocks asked for by `match`."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    evicted_to_disk: int = 0   # left the arena, stayed on disk
    evicted: int = 0           # left the store
    fenced: int = 0            # leases that ended otherwise than by detaching
    orders_dropped: int = 0    # eviction orders of plugins, at most one per tier


@dataclass(frozen=True, slots=True)
class Audit:
    """Arena bytes by owner. `used = committed + reserved + quarantined`; the leaks must be 0."""

    capacity: int
    committed: int
    pinned: int        # part of committed
    reserved: int      # uncommitted reservations and running loads
    quarantined: int   # slots that a fenced, living holder may still write
    num_leaked: int    # slots with no owner
    num_doubled: int   # slots with two owners

    @property
    def used(self) -> int:
        return self.committed + self.reserved + self.quarantined


def count_owners(capacity: int, partitions: Iterable[Partition], leases: Iterable[Lease], quarantines: Iterable[Quarantine]) -> Audit:
    """Linear in the slots in use."""
    leases, quarantines = list(leases), list(quarantines)
    committed = pinned = reserved = quarantined = leaked = doubled = 0
    for partition in partitions:
        arena = partition.arena
        if arena is None:
            continue
        owners: collections.Counter[int] = collections.Counter(arena.free_slots())
        for block in partition.blocks.values():
            if block.slot is not None:
                owners[block.slot] += 1
                committed += partition.slot_bytes
                pinned += partition.slot_bytes * (block.pins > 0)
        in_reserve = [s for x in leases if x.partition is partition for s in x.reserved.values()]
        in_reserve += partition.loading
        in_quarantine = [s for q in quarantines if q.partition is partition for s in q.slots]
        owners.update(in_reserve)
        owners.update(in_quarantine)
        reserved += partition.slot_bytes * len(in_reserve)
        quarantined += partition.slot_bytes * len(in_quarantine)
        leaked += sum(slot not in owners for slot in range(arena.num_touched))
        doubled += sum(count > 1 for count in owners.values())
    return Audit(capacity, committed, pinned, reserved, quarantined, leaked, doubled)
