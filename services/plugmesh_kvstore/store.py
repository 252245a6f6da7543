"""The store itself: which block is where, who holds it, and what must go when room is needed.

Synchronous and single-threaded: one owner calls it (the event loop of the service, or a test), and no call waits. Slow
work is handed out as begin/end pairs (`begin_load`/`end_load`, `begin_spill`/`end_spill`), between which the block is
held. The one invariant: every slot that was ever handed out belongs to exactly one of free list, block,
reservation, load or quarantine; `audit` counts what does not.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence

import structlog

from plugmesh.arena import PAGE, Arena
from plugmesh.errors import FailedPrecondition, InvalidRequest, Overloaded
from plugmesh.kv.guard import GuardProbe, guard_path
from plugmesh.kv.pieces import checksum
from plugmesh.records import EvictionContext, EvictionRecord
from plugmesh.types import KvLayout
from plugmesh_kvstore.audit import Audit, Counters, count_owners
from plugmesh_kvstore.blocks import Block, Partition, Place, Quarantine
from plugmesh_kvstore.checks import check_id, check_layout, check_sizes
from plugmesh_kvstore.disk import DiskSpace
from plugmesh_kvstore.events import EventLog
from plugmesh_kvstore.idle import IdleBlocks
from plugmesh_kvstore.leases import Lease, Leases

log = structlog.get_logger()

NO_ROOM = -2
KNOWN = -1
CLEAN_AMONG = 65  # coldest blocks of the arena; the background writer starts at the cold end, so further on there is nothing clean


class BlockStore:
    """Blocks of all layouts in the arena and on disk.

    Args:
        folder: Where arena files and guards go; private to this store.
        disk: Space accounting of the disk tier; None switches it off.
        eviction: A plugin's order of leaving, for both tiers; None is least recently used first.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        arena_bytes: int,
        *,
        disk: DiskSpace | None = None,
        lease_ttl_s: float = 4.0,
        max_leases: int = 1024,
        max_layouts: int = 4,
        verify_on_commit: bool = True,
        event_buffer: int = 4096,
        eviction: EvictionRecord | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.arena_bytes = arena_bytes
        self.disk = disk
        self.verify_on_commit = verify_on_commit
        self.max_layouts = max_layouts
        self.clock = clock
        self.leases = Leases(lease_ttl_s, max_leases, clock)
        self.events = EventLog(event_buffer)
        self.counters = Counters()
        self.partitions: dict[bytes, Partition] = {}
        self.quarantines: list[Quarantine] = []
        self._used = 0  # bytes of slots handed out, all partitions
        # Only blocks that may go: in the arena (on disk) and not busy.
        disk_bytes = disk.capacity_bytes if disk is not None else 0
        self._arena_idle = IdleBlocks(EvictionContext("arena", arena_bytes), eviction, on_dropped=self._order_dropped)
        self._disk_idle = IdleBlocks(EvictionContext("disk", disk_bytes), eviction if disk_bytes else None, on_dropped=self._order_dropped)

    def _order_dropped(self) -> None:
        self.counters.orders_dropped += 1

    # --- leases ---------------------------------------------------------------------------------------------------

    def attach(self, layout: KvLayout, holder: str, incarnation: str, *, local: bool) -> Lease:
        """A new lease. A new incarnation of a known holder fences the earlier one.

        Raises:
            InvalidRequest: A layout that cannot be, or whose block does not fit the arena.
            StaleIncarnation: This incarnation was replaced.
            Overloaded: Too many leases, or layouts in use.
        """
        if not holder or not incarnation:
            raise InvalidRequest("holder and incarnation must be given", param="holder")
        self.leases.check_incarnation(holder, incarnation)
        partition = self.partition_with_arena(layout)
        lease = self.leases.open(partition, holder, incarnation)
        for old in self.leases.note_incarnation(holder, incarnation):
            self._end_lease(old, fenced=True)
        partition.last_attached = self.clock()
        if local:
            assert partition.arena is not None
            lease.guard = GuardProbe(guard_path(str(partition.arena.path), lease.lease_id))
        return lease

    def detach(self, lease_id: str) -> None:
        """Idempotent."""
        lease = self.leases.pop(lease_id)
        if lease is not None:
            self._end_lease(lease, fenced=False)

    def note_incarnation(self, holder: str, incarnation: str) -> None:
        """Discovery says who the holder is now."""
        for lease in self.leases.note_incarnation(holder, incarnation):
            self._end_lease(lease, fenced=True)

    def drop_holder(self, holder: str, incarnation: str) -> None:
        """Discovery says that the holder left."""
        for lease in self.leases.of_holder(holder, incarnation):
            self._end_lease(lease, fenced=True)

    def sweep(self) -> None:
        """Ends leases that expired or whose process died, and frees quarantined slots nobody can touch any more."""
        for lease in self.leases.expired():
            self._end_lease(lease, fenced=True)
        for lease in list(self.leases):
            guard = lease.guard
            if guard is not None and not guard.held() and guard.seen_held:
                self._end_lease(lease, fenced=True)
        for q in list(self.quarantines):
            if q.guard.retire():
                self.quarantines.remove(q)
                self._free_quarantine(q)

    def _end_lease(self, lease: Lease, *, fenced: bool) -> None:
        self.leases.pop(lease.lease_id)
        blocks = list(lease.pins)
        slots = list(lease.reserved.values())
        lease.reserved.clear()
        # A living process keeps its mapping: what it may still write or read must not get new contents under it.
        quarantine = None
        if lease.guard is not None and not lease.guard.retire():
            quarantine = Quarantine(lease.guard, lease.partition, lease.holder, slots, blocks)
            for block in blocks:
                block.holds += 1
            self.quarantines.append(quarantine)
        for block, count in lease.pins.items():
            block.pins -= count
            self._settle(block)
        lease.pins.clear()
        if quarantine is None:
            for slot in slots:
                self._give_slot(lease.partition, slot)
        if fenced:
            self.counters.fenced += 1
            log.info(
                "kvstore.lease_fenced", holder=lease.holder, num_pins=len(blocks), num_reserved=len(slots),
                quarantined=quarantine is not None,
            )

    def _free_quarantine(self, q: Quarantine) -> None:
        for slot in q.slots:
            self._give_slot(q.partition, slot)
        for block in q.blocks:
            block.holds -= 1
            self._settle(block)

    # --- reading --------------------------------------------------------------------------------------------------

    def lookup(self, partition: Partition, block_ids: Sequence[bytes]) -> list[Block]:
        """The longest prefix of `block_ids` that is in any tier. Counts hits and misses, renews recency."""
        found: list[Block] = []
        for block_id in block_ids:
            block = partition.blocks.get(block_id)
            if block is None or block.condemned:
                break
            self._touch(block)
            found.append(block)
        self.counters.hits += len(found)
        self.counters.misses += len(block_ids) - len(found)
        return found

    def pin(self, lease: Lease, block: Block) -> None:
        """Keeps a block of the arena where it is until released or the lease ends. Counted."""
        assert block.slot is not None
        if lease.guard is not None and not lease.guard.seen_held:
            lease.guard.held()  # from now on a freed guard means that the holder died
        lease.pins[block] = lease.pins.get(block, 0) + 1
        block.pins += 1
        self._settle(block)

    def release(self, lease: Lease, block_ids: Sequence[bytes]) -> int:
        """Undoes one pin per id; without ids, all. Unknown ids are ignored."""
        if not block_ids:
            num = sum(lease.pins.values())
            for block, count in list(lease.pins.items()):
                block.pins -= count
                self._settle(block)
            lease.pins.clear()
            return num
        num = 0
        for block_id in block_ids:
            pinned = lease.partition.blocks.get(block_id)
            if pinned is None or pinned not in lease.pins:
                continue
            lease.pins[pinned] -= 1
            if not lease.pins[pinned]:
                del lease.pins[pinned]
            pinned.pins -= 1
            self._settle(pinned)
            num += 1
        return num

    def hold(self, block: Block) -> None:
        """Keeps a block from moving during a transfer of our own. Undo with `unhold`."""
        block.holds += 1
        self._settle(block)

    def unhold(self, block: Block) -> None:
        block.holds -= 1
        self._settle(block)

    def view(self, block: Block) -> memoryview:
        """The block's bytes in the arena; hold or pin it while you look."""
        assert block.slot is not None and block.partition.arena is not None
        return block.partition.arena.view(block.slot, block.num_bytes)

    def verify(self, block: Block) -> bool:
        """Checks a block of the arena; a damaged one is invisible from now on and gone as soon as nobody holds it."""
        with self.view(block) as view:
            if checksum(view) == block.checksum:
                return True
        if not block.condemned:
            block.condemned = True
            self.counters.corrupt += 1
            log.warning("kvstore.arena_corrupt", slot=block.slot, num_bytes=block.num_bytes)
            self._settle(block)
        return False

    # --- writing --------------------------------------------------------------------------------------------------

    def reserve(self, lease: Lease, block_id: bytes) -> int:
        """A slot to write, KNOWN when the block is here, NO_ROOM when everything is pinned. Repeats give the same slot.

        Two leases may reserve the same block: the first commit wins, the other's slot goes back at its commit.
        """
        check_id(block_id)
        if lease.guard is None:
            raise FailedPrecondition("only a client that maps the arena can reserve slots; use PutBlocks")
        if not lease.guard.seen_held and not lease.guard.held():
            raise FailedPrecondition("the lease's guard file must be locked before slots are reserved")
        if block_id in lease.reserved:
            return lease.reserved[block_id]
        block = lease.partition.blocks.get(block_id)
        if block is not None:
            self._touch(block)
            return NO_ROOM if block.condemned else KNOWN
        slot = self._take_slot(lease.partition)
        if slot is None:
            return NO_ROOM
        lease.reserved[block_id] = slot
        return slot

    def commit(
        self, lease: Lease, block_id: bytes, slot: int, digest: int, parent_id: bytes, num_tokens: int, num_bytes: int
    ) -> bool:
        """Makes a written slot visible under its block's name. Committing twice is harmless.

        Returns:
            True when the block is here now. False when the bytes do not fit the checksum (the slot goes back) or
            nothing is reserved under that name.

        Raises:
            InvalidRequest: Another slot than the one reserved, or sizes that the layout does not allow.
        """
        check_id(block_id)
        partition = lease.partition
        check_sizes(partition.layout, parent_id, num_tokens, num_bytes)
        reserved = lease.reserved.get(block_id)
        if reserved is None:
            return block_id in partition.blocks
        if slot != reserved:
            raise InvalidRequest(f"slot {slot} is not the one reserved for this block ({reserved})", param="slot")
        del lease.reserved[block_id]
        if block_id in partition.blocks:
            self._give_slot(partition, slot)
            return True
        assert partition.arena is not None
        if self.verify_on_commit:
            with partition.arena.view(slot, num_bytes) as view:
                fits = checksum(view) == digest
            if not fits:
                self.counters.corrupt += 1
                log.warning("kvstore.commit_corrupt", holder=lease.holder, num_bytes=num_bytes)
                self._give_slot(partition, slot)
                return False
        self._publish(Block(partition, block_id, parent_id, num_tokens, num_bytes, digest, slot=slot))
        return True

    def insert(
        self, partition: Partition, block_id: bytes, parent_id: bytes, num_tokens: int, data: bytes | bytearray, digest: int
    ) -> str:
        """Stores bytes that came over the wire and were verified: "stored", "known" or "full"."""
        check_id(block_id)
        check_sizes(partition.layout, parent_id, num_tokens, len(data))
        block = partition.blocks.get(block_id)
        if block is not None:
            self._touch(block)
            return "full" if block.condemned else "known"
        if partition.arena is None:  # retired while the bytes travelled
            return "full"
        slot = self._take_slot(partition)
        if slot is None:
            return "full"
        with partition.arena.view(slot, len(data)) as view:
            view[:] = data
        self._publish(Block(partition, block_id, parent_id, num_tokens, len(data), digest, slot=slot))
        return "stored"

    def _publish(self, block: Block) -> None:
        block.partition.blocks[block.block_id] = block
        self._settle(block)
        self.events.append(
            "stored", [block.block_id], parent_id=block.parent_id, tier=block.tier, model=block.partition.layout.model
        )

    # --- the disk tier --------------------------------------------------------------------------------------------

    def restore(self, layout: KvLayout, blocks: Sequence[tuple[bytes, bytes, int, int, int, Place]]) -> None:
        """Blocks that the disk index knows from an earlier life, least recently used first."""
        partition = self._partition(layout)
        for block_id, parent_id, num_tokens, num_bytes, digest, place in blocks:
            block = Block(partition, block_id, parent_id, num_tokens, num_bytes, digest, place=place)
            partition.blocks[block_id] = block
            self._settle(block)
        for start in range(0, len(blocks), 256):
            self.events.append("stored", [b[0] for b in blocks[start : start + 256]], tier="disk", model=layout.model)

    def begin_load(self, block: Block) -> int | None:
        """A slot to read a block of the disk into, or None without room. `end_load` must follow."""
        assert block.slot is None and block.place is not None
        self.hold(block)
        slot = self._take_slot(block.partition)
        if slot is None:
            self.unhold(block)
            return None
        block.partition.loading[slot] = block
        return slot

    def end_load(self, block: Block, slot: int, *, ok: bool) -> None:
        """With `ok` the slot holds the verified bytes; without, the block is corrupt and gone."""
        del block.partition.loading[slot]
        block.holds -= 1
        if ok:
            block.slot = slot
            self._settle(block)
            return
        self._give_slot(block.partition, slot)
        self.counters.corrupt += 1
        self.drop_corrupt(block)

    def drop_corrupt(self, block: Block) -> None:
        """Removes a block whose bytes on disk are bad."""
        log.warning("kvstore.disk_corrupt", place=str(block.place), num_bytes=block.num_bytes)
        self._leave_disk(block)
        if block.slot is None:
            self._forget(block)

    def begin_spill(self, max_blocks: int, above_bytes: float) -> list[Block]:
        """Up to `max_blocks` cold blocks to copy to disk, given a place and held; nothing below `above_bytes` of use.

        Copied blocks stay in the arena; evicting them later is free. `end_spill` must follow for each.
        """
        if self.disk is None or self._used <= above_bytes:
            return []
        chosen: list[Block] = []
        for block in self._arena_idle.coldest_first():
            if len(chosen) >= max_blocks:
                break
            if block.place is not None or block.tried_disk:
                continue
            place = self._take_place(block.partition)
            if place is None:
                block.tried_disk = True
                continue
            block.place = place
            block.holds += 1
            self._settle(block)
            chosen.append(block)
        return chosen

    def end_spill(self, block: Block, *, ok: bool) -> None:
        block.holds -= 1
        if not ok:
            block.tried_disk = True
            self._leave_disk(block)
        self._settle(block)

    def _take_place(self, partition: Partition) -> Place | None:
        assert self.disk is not None
        while True:
            place = self.disk.take(partition.key, partition.slot_bytes)
            if place is not None:
                return place
            victim = self._disk_idle.victim()
            if victim is None:
                return None
            self._leave_disk(victim, evicted=True)
            if victim.slot is None:
                self.counters.evicted += 1
                self._forget(victim)

    def _leave_disk(self, block: Block, *, evicted: bool = False) -> None:
        self._disk_idle.left(block, evicted=evicted)
        if block.place is not None and self.disk is not None:
            self.disk.give(block.partition.key, block.block_id, block.place)
        block.place = None

    # --- room -----------------------------------------------------------------------------------------------------

    def _take_slot(self, partition: Partition) -> int | None:
        """Evicts until a slot is free; None when all that is left is busy."""
        assert partition.arena is not None
        while True:
            if self._used + partition.slot_bytes <= self.arena_bytes:
                slot = partition.arena.take()
                if slot is not None:
                    self._used += partition.slot_bytes
                    return slot
            victim = self._victim()
            if victim is None:
                return None
            self._leave_arena(victim)

    def _victim(self) -> Block | None:
        """The coldest block that is on disk too, else the coldest."""
        coldest = self._arena_idle.victim()
        if coldest is None or coldest.place is not None or self.disk is None:
            return coldest
        return next((b for b in self._arena_idle.coldest(CLEAN_AMONG) if b.place is not None), coldest)

    def _leave_arena(self, block: Block) -> None:
        assert block.slot is not None and not block.busy
        self._arena_idle.left(block, evicted=True)
        slot, block.slot = block.slot, None
        self._give_slot(block.partition, slot)
        if block.place is None:
            self.counters.evicted += 1
            self._forget(block)
        else:
            self.counters.evicted_to_disk += 1
            self._settle(block)
            self.events.append(
                "stored", [block.block_id], parent_id=block.parent_id, tier="disk", model=block.partition.layout.model
            )

    def _give_slot(self, partition: Partition, slot: int) -> None:
        assert partition.arena is not None
        # With one layout the freed memory is its own to reuse; with several another may need it.
        partition.arena.give(slot, trim=self._num_arenas() > 1)
        self._used -= partition.slot_bytes

    def _forget(self, block: Block) -> None:
        """The block is in no tier any more."""
        assert block.slot is None and block.place is None
        block.partition.blocks.pop(block.block_id, None)
        self.events.append("removed", [block.block_id], model=block.partition.layout.model)

    def _drop(self, block: Block) -> None:
        """Takes the block out of every tier, without an event."""
        self._arena_idle.left(block, evicted=False)
        self._leave_disk(block)
        if block.slot is not None:
            slot, block.slot = block.slot, None
            self._give_slot(block.partition, slot)
        block.partition.blocks.pop(block.block_id, None)

    def _remove(self, block: Block) -> None:
        self._drop(block)
        self._forget(block)

    def _settle(self, block: Block) -> None:
        """Puts the block into, or takes it out of, the lists of what may go."""
        if block.condemned and not block.busy:
            if block.slot is not None or block.place is not None:
                self._remove(block)
            return
        for here, idle in ((block.slot, self._arena_idle), (block.place, self._disk_idle)):
            if here is not None and not block.busy:
                idle.add(block)
            else:
                idle.discard(block)

    def _touch(self, block: Block) -> None:
        self._arena_idle.touch(block)
        self._disk_idle.touch(block)

    # --- layouts --------------------------------------------------------------------------------------------------

    def _partition(self, layout: KvLayout) -> Partition:
        key = layout.key()
        partition = self.partitions.get(key)
        if partition is None:
            slot_bytes = -(-layout.block_bytes // PAGE) * PAGE
            partition = self.partitions[key] = Partition(layout, key, slot_bytes)
        return partition

    def partition_with_arena(self, layout: KvLayout) -> Partition:
        """The layout's partition, its arena made when need be. Raises InvalidRequest, Overloaded."""
        check_layout(layout)
        slot_bytes = -(-layout.block_bytes // PAGE) * PAGE
        if slot_bytes > self.arena_bytes:
            raise InvalidRequest(
                f"a block of {layout.block_bytes} bytes does not fit an arena of {self.arena_bytes}", param="layout"
            )
        known = self.partitions.get(layout.key())
        if known is not None and known.arena is not None:
            return known
        if self._num_arenas() >= self.max_layouts:
            self._retire_layout()
        partition = self._partition(layout)
        for other in self.partitions.values():
            if other.arena is not None:
                other.arena.trim()
        path = self.folder / f"{partition.key.hex()[:24]}.arena"
        partition.arena = Arena(path, slot_bytes, self.arena_bytes // slot_bytes)
        return partition

    def _num_arenas(self) -> int:
        return sum(p.arena is not None for p in self.partitions.values())

    def _retire_layout(self) -> None:
        """Takes the arena of the layout that was attached longest ago and is in nobody's hands."""
        in_use = {lease.partition.key for lease in self.leases} | {q.partition.key for q in self.quarantines}
        idle = [
            p for p in self.partitions.values()
            if p.arena is not None and p.key not in in_use and not p.loading and not any(b.busy for b in p.blocks.values())
        ]
        if not idle:
            raise Overloaded(f"{self.max_layouts} KV layouts are in use", retry_after_s=self.leases.ttl_s)
        partition = min(idle, key=lambda p: p.last_attached)
        for block in list(partition.blocks.values()):
            if block.slot is not None:
                self._leave_arena(block)
        assert partition.arena is not None
        partition.arena.close()
        partition.arena = None
        for shell in [p for p in self.partitions.values() if p.arena is None and not p.blocks]:
            del self.partitions[shell.key]

    # --- operators ------------------------------------------------------------------------------------------------

    def clear(self) -> int:
        """Forgets every block that is not busy; returns how many."""
        num = 0
        survivors: list[Block] = []
        for partition in self.partitions.values():
            for block in list(partition.blocks.values()):
                if block.busy:
                    survivors.append(block)
                    continue
                num += 1
                self._drop(block)
            if partition.arena is not None:
                partition.arena.trim()
        self.events.append("cleared")
        for block in survivors:
            self.events.append(
                "stored", [block.block_id], parent_id=block.parent_id, tier=block.tier, model=block.partition.layout.model
            )
        return num

    def audit(self) -> Audit:
        """Counts every slot's owners. Linear in the slots in use; for sweeps and tests."""
        return count_owners(self.arena_bytes, self.partitions.values(), self.leases, self.quarantines)

    @property
    def used_bytes(self) -> int:
        """Bytes of slots handed out; equals `audit().used`."""
        return self._used

    @property
    def num_blocks(self) -> int:
        return sum(len(p.blocks) for p in self.partitions.values())

    def end_leases(self) -> None:
        """For the stop: nobody holds anything any more, so everything may be flushed. Nothing may be reserved after it."""
        for lease in list(self.leases):
            if lease.guard is not None:
                lease.guard.abandon()
            self._end_lease(lease, fenced=False)
        for q in self.quarantines:
            q.guard.abandon()
            self._free_quarantine(q)
        self.quarantines.clear()

    def close(self) -> None:
        """Gives up every arena; the files are gone afterwards."""
        self.end_leases()
        for partition in self.partitions.values():
            if partition.arena is not None:
                partition.arena.close()
                partition.arena = None
