"""The store core against a dictionary: whatever happens in whatever order, a block is right or absent."""

from __future__ import annotations

import hashlib
import pathlib
import random
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from plugmesh.errors import StaleIncarnation
from plugmesh.kv.guard import Guard, guard_path
from plugmesh.kv.pieces import checksum
from plugmesh.records import EvictionRecord
from plugmesh.types import KvLayout
from plugmesh_kvstore.disk import DiskFiles, DiskSpace
from plugmesh_kvstore.mover import _row
from plugmesh_kvstore.store import KNOWN, NO_ROOM, BlockStore

SLOT = 4096
ARENA_SLOTS = 6
DISK_SLOTS = 5
TTL = 10.0
# Two layouts of different block sizes share the arena; ids of one are never found in the other.
LAYOUTS = [KvLayout("m", "raw", "float32", 1, 1, 32, 16, SLOT), KvLayout("n", "raw", "float32", 1, 1, 64, 16, 2 * SLOT)]
RARELY = st.integers(0, 4)  # 0: now
PUSHERS = [bytes([100 + i]) * 32 for i in range(ARENA_SLOTS)]
IDS = [bytes([i]) * 32 for i in range(8)]


def content(layout, block_id):
    """What a block of that name holds, everywhere and always."""
    return hashlib.shake_128(layout.key() + block_id).digest(layout.block_bytes)


class Holder:
    """A client as the store cannot see it: it may go on writing after its lease has ended, until it dies."""

    def __init__(self, lease, guard, layout):
        self.lease, self.guard, self.layout = lease, guard, layout
        self.slots = {}    # block id to slot: what it believes to be its own to write
        self.pinned = []   # ids, with repeats
        self.views = []    # blocks it may still be reading
        self.fenced = False


class StoreMachine(RuleBasedStateMachine):
    holders = Bundle("holders")
    loads = Bundle("loads")
    spills = Bundle("spills")
    eviction = None  # an EvictionRecord

    @initialize(target=holders, with_disk=st.sampled_from([True, True, True, False]))
    def start(self, with_disk):
        self.now = 0.0
        self.dir = pathlib.Path(tempfile.mkdtemp())
        (self.dir / "arena").mkdir()
        self.files = DiskFiles(self.dir / "disk") if with_disk else None
        if self.files:
            self.files.recover()
        self.space = DiskSpace(DISK_SLOTS * SLOT, 2 * SLOT) if with_disk else None
        self.store = BlockStore(
            self.dir / "arena", ARENA_SLOTS * SLOT, disk=self.space, lease_ttl_s=TTL, clock=lambda: self.now, eviction=self.eviction
        )
        self.all = []
        self.partitions = {layout.key(): self.store.partition_with_arena(layout) for layout in LAYOUTS}
        self.seen = {layout.model: set() for layout in LAYOUTS}
        self.sequence = 0
        return multiple(*[self.open("c", "0", LAYOUTS[0]) for _ in range(3)])

    def teardown(self):
        if hasattr(self, "store"):
            for holder in self.all:
                holder.guard.close()
            self.store.close()
            if self.files:
                self.files.close()
            shutil.rmtree(self.dir)

    # --- holders

    @rule(target=holders, name=st.sampled_from("ab"), life=st.sampled_from([0, 0, 0, 0, 0, 1]), layout=st.sampled_from([*LAYOUTS[:1] * 3, LAYOUTS[1]]))
    def attach(self, name, life, layout):
        try:
            lease = self.store.attach(layout, name, str(life), local=True)
        except StaleIncarnation:
            return multiple()
        for other in self.all:
            other.fenced |= other.lease.holder == name and other.lease.incarnation != str(life)
        self.store.detach(lease.lease_id)
        return self.open(name, str(life), layout)

    def open(self, name, incarnation, layout):
        lease = self.store.attach(layout, name, incarnation, local=True)
        guard = Guard.try_hold(guard_path(str(lease.partition.arena.path), lease.lease_id))
        assert lease.guard.held()
        holder = Holder(lease, guard, layout)
        self.all.append(holder)
        return holder

    def live(self, holder):
        """The lease as an RPC would find it, or None after checking that it is refused."""
        ended = holder.fenced or holder.lease.expires_at <= self.now
        try:
            lease = self.store.leases.get(holder.lease.lease_id)
        except StaleIncarnation:
            assert ended
            return None
        assert not ended
        return lease

    @rule(holder=holders)
    def renew(self, holder):
        if self.live(holder):
            self.store.leases.renew(holder.lease.lease_id)

    @rule(holder=holders, block_ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=4, unique=True))
    def reserve(self, holder, block_ids):
        lease = self.live(holder)
        for block_id in block_ids if lease else ():
            slot = self.store.reserve(lease, block_id)
            if block_id in holder.slots:
                assert slot == holder.slots[block_id]
                continue
            known = block_id in lease.partition.blocks
            assert (slot == KNOWN) == known
            if slot >= 0:
                holder.slots[block_id] = slot
            else:
                assert known or slot == NO_ROOM

    @rule(holder=holders, good=st.sampled_from([True, True, True, False]), data=st.data())
    def write_and_commit(self, holder, good, data):
        if not holder.slots:
            return
        block_id = data.draw(st.sampled_from(sorted(holder.slots)))
        slot = holder.slots[block_id]
        data = content(holder.layout, block_id)
        self.scribble(holder, slot, data if good else data[::-1])
        if not self.live(holder):
            return
        here = block_id in holder.lease.partition.blocks
        done = self.store.commit(holder.lease, block_id, slot, checksum(data), b"", 16, len(data))
        assert done == (good or here)
        del holder.slots[block_id]

    def scribble(self, holder, slot, data):
        with holder.lease.partition.arena.view(slot, len(data)) as view:
            view[:] = data

    @rule(holder=holders)
    def a_fenced_holder_writes_what_it_had_reserved(self, holder):
        for slot in holder.slots.values():
            self.scribble(holder, slot, b"\xee" * holder.layout.block_bytes)

    @rule(holder=holders, polite=st.booleans(), rarely=RARELY)
    def die(self, holder, polite, rarely):
        """Crash, or detach first. Either way nothing of it is left after one sweep."""
        if rarely or holder not in self.all:
            return
        holder.pinned.clear()
        holder.slots.clear()
        holder.views.clear()
        holder.guard.close()
        if polite:
            self.store.detach(holder.lease.lease_id)
        self.store.sweep()
        holder.fenced = True
        self.all.remove(holder)
        assert all(q.guard is not holder.lease.guard for q in self.store.quarantines)
        assert not holder.lease.pins
        assert not holder.lease.reserved

    @rule(holder=holders, rarely=RARELY)
    def pause_beyond_the_lease(self, holder, rarely):
        """Only this holder misses its renewals; it stays alive and keeps what it has mapped."""
        if rarely or not (holder.slots or holder.views):
            return
        self.now += TTL
        for other in self.all:
            if other is not holder:
                other.lease.expires_at = self.now + TTL
        self.store.sweep()
        holder.fenced = True

    @rule()
    def sweep(self):
        self.now += 0.1
        for other in self.all:
            if not other.fenced:
                self.store.leases.renew(other.lease.lease_id)
        self.store.sweep()

    # --- reading

    @rule(target=loads, holder=holders, block_ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True))
    def match(self, holder, block_ids):
        """Pins what is in the arena; blocks of the disk begin to load."""
        lease = self.live(holder)
        if not lease:
            return multiple()
        begun = []
        known = sorted(lease.partition.blocks)  # ask for something that is there most of the time
        for block in self.store.lookup(lease.partition, [*known[block_ids[0][0] :][:2], *block_ids]):
            if block.slot is not None:
                self.store.pin(lease, block)
                holder.pinned.append(block.block_id)
                holder.views.append(block)
            elif not block.busy and block.place is not None:  # nobody holds it here: an earlier load may have pushed it out
                slot = self.store.begin_load(block)
                if slot is not None:
                    begun.append((block, slot))
        return multiple(*begun)

    @rule(load=consumes(loads))
    def finish_load(self, load):
        block, slot = load
        with block.partition.arena.view(slot, block.num_bytes) as view:
            ok = self.files.read(block.place, view, block.checksum)
        self.store.end_load(block, slot, ok=ok)

    @rule(holder=holders, everything=st.booleans(), data=st.data())
    def release(self, holder, everything, data):
        lease = self.live(holder)
        if not lease or not holder.pinned:
            return
        ids = [] if everything else [data.draw(st.sampled_from(holder.pinned))]
        assert self.store.release(lease, ids) == (len(holder.pinned) if everything else 1)
        holder.pinned = [] if everything else [*holder.pinned]
        for block_id in ids:
            holder.pinned.remove(block_id)
        holder.views = [b for b in holder.views if b.block_id in holder.pinned]

    # --- the wire, the disk, operators

    @rule(layout=st.sampled_from([*LAYOUTS[:1] * 3, LAYOUTS[1]]), block_ids=st.lists(st.sampled_from(IDS), min_size=1, max_size=5))
    def insert_some(self, layout, block_ids):
        for block_id in block_ids:
            self.insert(layout, block_id)
        self.blocks_in_the_arena_are_right_whoever_scribbles()

    def insert(self, layout, block_id):
        partition = self.partitions[layout.key()]
        known = block_id in partition.blocks
        data = content(layout, block_id)
        outcome = self.store.insert(partition, block_id, b"", 16, data, checksum(data))
        assert (outcome == "known") == known
        assert (outcome != "full") == (block_id in partition.blocks)

    @rule(target=loads, holder=holders)
    def match_what_is_on_disk(self, holder):
        if not self.live(holder):
            return multiple()
        partition = holder.lease.partition
        away = [b for b in partition.blocks.values() if b.slot is None and not b.busy][:2]
        return multiple(*[(b, slot) for b in away if (slot := self.store.begin_load(b)) is not None])

    @rule(target=spills, num=st.integers(1, 3))
    def begin_spill(self, num):
        return multiple(*self.store.begin_spill(num, 0.0))

    @rule(block=consumes(spills), ok=st.booleans(), damage=st.booleans())
    def finish_spill(self, block, ok, damage):
        self.files.apply(self.space.take_changes(), [block.partition.layout])
        if ok:
            with self.store.view(block) as view:
                [ok] = self.files.write([_row(block)], [view])
            assert ok
            if damage:
                path = self.files._segment_path(block.place.segment)
                with path.open("r+b") as f:
                    f.seek(block.place.slot * block.partition.slot_bytes + 7)
                    f.write(b"damage")
        self.store.end_spill(block, ok=ok)

    @rule(damage=st.booleans())
    def spill_everything_and_push_it_out(self, damage):
        for block in self.store.begin_spill(ARENA_SLOTS, 0.0):
            self.finish_spill(block, True, damage)
        for block_id in PUSHERS:
            self.insert(LAYOUTS[0], block_id)

    @rule(rarely=RARELY)
    def clear(self, rarely):
        if not rarely:
            self.store.clear()

    # --- what must hold

    @invariant()
    def every_slot_has_one_owner(self):
        if not hasattr(self, "store"):
            return
        audit = self.store.audit()
        assert (audit.num_leaked, audit.num_doubled) == (0, 0)
        assert audit.used == self.store.used_bytes <= audit.capacity
        if self.space:
            assert self.space.allocated_bytes <= self.space.capacity_bytes
            on_disk = [b for p in self.partitions.values() for b in p.blocks.values() if b.place]
            assert self.space.used_bytes == sum(b.partition.slot_bytes for b in on_disk)
            assert len({b.place for b in on_disk}) == len(on_disk)

    @invariant()
    def blocks_in_the_arena_are_right_whoever_scribbles(self):
        for partition in getattr(self, "partitions", {}).values():
            for block_id, block in partition.blocks.items():
                if block.slot is not None:
                    assert bytes(self.store.view(block)) == content(partition.layout, block_id)

    @invariant()
    def what_a_living_holder_reads_does_not_change(self):
        for holder in getattr(self, "all", ()):
            for block in holder.views:
                assert bytes(self.store.view(block)) == content(holder.layout, block.block_id)

    @invariant()
    def events_tell_the_set_of_blocks(self):
        if not hasattr(self, "store"):
            return
        while (change := self.store.events.peek()) is not None:
            self.store.events.published(change)
            self.sequence += 1
            assert change.sequence == self.sequence
            if change.kind == "stored":
                self.seen[change.model].update(change.block_ids)
            elif change.kind == "removed":
                self.seen[change.model].difference_update(change.block_ids)
            else:
                self.seen = {model: set() for model in self.seen}
        for partition in self.partitions.values():
            assert self.seen[partition.layout.model] == set(partition.blocks)


TestStoreMachine = pytest.mark.filterwarnings("ignore")(StoreMachine.TestCase)
TestStoreMachine.settings = settings(
    max_examples=60, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow
def test_the_model_holds_for_many_more_examples():
    run_state_machine_as_test(StoreMachine, settings=settings(TestStoreMachine.settings, max_examples=1500))


class LastInFirstOut:
    """As it should be, and unlike recency wherever it can."""

    def __init__(self, context):
        self.idle = {}

    def add(self, key, num_bytes):
        self.idle[key] = None

    def discard(self, key):
        self.idle.pop(key)  # raises where it is told of a block that it does not have

    def touch(self, key):
        pass

    def left(self, key, evicted):
        self.idle.pop(key, None)

    def victim(self):
        return next(reversed(self.idle), None)

    def coldest(self, n):
        return list(reversed(self.idle))[:n]


class FailsSometime(LastInFirstOut):
    """After some calls it names any block that it was ever told of, raises, or answers with something else."""

    def __init__(self, context):
        super().__init__(context)
        self.dice, self.ever = random.Random(context.capacity_bytes), []

    def add(self, key, num_bytes):
        super().add(key, num_bytes)
        self.ever.append(key)
        if self.dice.random() < 0.01:
            raise RuntimeError

    def victim(self):
        return self.dice.choice([super().victim()] * 20 + [*self.ever[-1:], None, 7, []])

    def coldest(self, n):
        return self.dice.choice([super().coldest(n)] * 20 + [self.ever[:n], [[]], 7])


class StoreMachineInAnotherOrder(StoreMachine):
    eviction = EvictionRecord("last", LastInFirstOut)

    @invariant()
    def the_order_is_still_asked(self):
        assert not hasattr(self, "store") or self.store.counters.orders_dropped == 0


class StoreMachineWithAnOrderThatFails(StoreMachine):
    eviction = EvictionRecord("fails", FailsSometime)


TestStoreMachineInAnotherOrder = pytest.mark.filterwarnings("ignore")(StoreMachineInAnotherOrder.TestCase)
TestStoreMachineInAnotherOrder.settings = settings(TestStoreMachine.settings, max_examples=15)
TestStoreMachineWithAnOrderThatFails = pytest.mark.filterwarnings("ignore")(StoreMachineWithAnOrderThatFails.TestCase)
TestStoreMachineWithAnOrderThatFails.settings = settings(TestStoreMachine.settings, max_examples=15)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [StoreMachineInAnotherOrder, StoreMachineWithAnOrderThatFails])
def test_the_model_holds_in_other_orders_for_many_more_examples(machine):
    run_state_machine_as_test(machine, settings=settings(TestStoreMachine.settings, max_examples=400))
