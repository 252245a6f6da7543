"""Which block leaves next: a plugin's order decides while it behaves; one that fails is dropped and costs nothing but its order."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from plugmesh import host as hosts
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.hookspecs import hookimpl
from plugmesh.host import PluginHost
from plugmesh.kv.pieces import checksum
from plugmesh.records import EvictionContext, EvictionRecord
from plugmesh.types import KvLayout
from plugmesh_kvstore import idle as idle_module
from plugmesh_kvstore.blocks import Block, Partition
from plugmesh_kvstore.disk import DiskSpace
from plugmesh_kvstore.idle import IdleBlocks, key_of
from plugmesh_kvstore.store import BlockStore

LAYOUT = KvLayout("m", "raw", "float32", 1, 1, 32, 16, 4096)
CONTEXT = EvictionContext("arena", 8 * 4096)
METHODS = ["add", "discard", "touch", "left", "victim", "coldest"]


class FirstInFirstOut:
    """As it should be: never moved by a touch."""

    def __init__(self, context=None):
        self.context, self.calls = context, []
        self.age, self.busy = {}, set()

    def add(self, key, num_bytes):
        self.calls.append(("add", key, num_bytes))
        self.age.setdefault(key, len(self.calls))
        self.busy.discard(key)

    def discard(self, key):
        self.calls.append(("discard", key))
        self.busy.add(key)

    def touch(self, key):
        self.calls.append(("touch", key))

    def left(self, key, evicted):
        self.calls.append(("left", key, evicted))
        del self.age[key]
        self.busy.discard(key)

    def victim(self):
        return next(iter(self.coldest(1)), None)

    def coldest(self, n):
        return sorted(self.age.keys() - self.busy, key=self.age.__getitem__)[:n]


def odd(method, do, after=0):
    """FIFO whose `method` does something else from its call number `after` on."""

    def call(self, *args):
        self.num_odd = getattr(self, "num_odd", -1) + 1
        return do(self, *args) if self.num_odd >= after else getattr(FirstInFirstOut, method)(self, *args)

    return type("Odd", (FirstInFirstOut,), {method: call})


def boom(*_):
    raise ValueError("a block's name")


def leave(*_):
    raise SystemExit(3)


def hang(*_):
    while True:
        time.sleep(0.01)


def spin(*_):
    while True:
        try:
            while True:
                pass
        except Exception:
            continue


def blocks(num):
    partition = Partition(LAYOUT, LAYOUT.key(), 4096)
    return [Block(partition, bytes([i]) * 32, b"", 16, 4096, 0, slot=i) for i in range(num)]


def name(i):
    return i.to_bytes(32, "big")


class Traffic:
    """A store of eight slots that holds the right bytes, whatever its order does; `evicted` are the blocks that left, in turn."""

    def __init__(self, folder, record, disk=None):
        self.store = BlockStore(folder, CONTEXT.capacity_bytes, eviction=record, disk=disk)
        self.partition = self.store.partition_with_arena(LAYOUT)
        self.evicted = []

    def insert(self, i):
        data = bytes([i % 251]) * 4096
        outcome = self.store.insert(self.partition, name(i), b"", 16, data, checksum(data))
        while (change := self.store.events.peek()) is not None:
            self.store.events.published(change)
            if change.kind == "removed":
                self.evicted += [int.from_bytes(b, "big") for b in change.block_ids]
        return outcome

    def ask(self, *numbers):
        return len(self.store.lookup(self.partition, [name(i) for i in numbers]))

    def check(self):
        audit = self.store.audit()
        assert (audit.num_leaked, audit.num_doubled) == (0, 0)
        for block_id, block in self.partition.blocks.items():
            assert bytes(self.store.view(block)) == bytes([int.from_bytes(block_id, "big") % 251]) * 4096


@pytest.fixture
def traffic(tmp_path):
    made = []

    def make(record=None, **kwargs):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Traffic(folder, record, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


# -- an order that behaves ---------------------------------------------------------------------------------------------


def test_without_a_plugin_least_recently_used_leaves_first(traffic):
    t = traffic()
    for i in range(8):
        t.insert(i)
    t.ask(0)
    for i in range(8, 11):
        t.insert(i)

    assert t.evicted == [1, 2, 3]


def test_a_plugins_order_decides_in_place_of_recency(traffic):
    t = traffic(EvictionRecord("fifo", FirstInFirstOut))
    for i in range(8):
        t.insert(i)
    t.ask(0)
    for i in range(8, 11):
        t.insert(i)

    assert t.evicted == [0, 1, 2]
    assert t.store.counters.orders_dropped == 0


def test_it_is_told_what_happens_and_by_stable_names():
    order = FirstInFirstOut()
    idle = IdleBlocks(CONTEXT, EvictionRecord("fifo", lambda _: order))
    [a, b] = blocks(2)
    idle.touch(a)  # not in this tier: nothing to tell
    idle.discard(a)
    idle.left(a, evicted=False)
    for _ in range(2):
        idle.add(a)
    idle.touch(a)
    for _ in range(2):
        idle.discard(a)
    idle.touch(a)
    idle.add(a)
    idle.add(b)
    idle.left(a, evicted=True)
    idle.left(a, evicted=True)

    key = LAYOUT.key() + a.block_id
    assert order.calls == [
        ("add", key, 4096), ("touch", key), ("discard", key), ("touch", key), ("add", key, 4096), ("add", key_of(b), 4096), ("left", key, True)
    ]
    assert list(idle.coldest_first()) == [b]


def test_each_tier_has_an_order_of_its_own(tmp_path):
    made = []
    record = EvictionRecord("fifo", lambda context: made.append(context) or FirstInFirstOut(context))
    BlockStore(tmp_path, 4096, eviction=record, disk=DiskSpace(8192, 4096)).close()
    BlockStore(tmp_path, 4096, eviction=record).close()

    assert made == [EvictionContext("arena", 4096), EvictionContext("disk", 8192), EvictionContext("arena", 4096)]


def test_on_disk_it_decides_too_and_a_clean_block_is_preferred_in_the_arena(traffic):
    t = traffic(EvictionRecord("fifo", FirstInFirstOut), disk=DiskSpace(2 * 4096, 4096))
    for i in range(8):
        t.insert(i)
    spilled = t.store.begin_spill(2, 0.0)
    for block in spilled:
        t.store.end_spill(block, ok=True)
    t.ask(0)  # recency would keep it
    assert [b.block_id for b in spilled] == [name(0), name(1)]
    t.insert(8)
    again = t.store.begin_spill(1, 0.0)
    t.store.end_spill(again[0], ok=True)

    assert again[0].block_id == name(2)
    assert t.evicted == []  # 0 and 1 were on disk: 0 left the arena, then the disk had no room for 2 without it ...
    t.insert(9)
    assert t.evicted == [0]
    assert t.store.counters.orders_dropped == 0


def test_every_idle_block_is_offered_to_the_disk_even_if_the_order_names_none(traffic):
    """At a stop everything that only the arena has is written."""
    t = traffic(EvictionRecord("shy", odd("coldest", lambda *_: [])), disk=DiskSpace(8 * 4096, 4096))
    for i in range(6):
        t.insert(i)

    assert len(t.store.begin_spill(99, -1.0)) == 6


# -- one that does not ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(hosts, "REQUEST_LIMIT_S", 0.2)


FAULTS = [(m, boom, "raised ValueError") for m in METHODS]
FAULTS += [("victim", hang, "hangs"), ("touch", spin, "hangs"), ("add", leave, "raised SystemExit")]
FAULTS += [("victim", lambda self, answer=answer: answer, "names no idle block") for answer in (None, b"", b"x" * 64, 7, "k", [], (b"x",), object())]
FAULTS += [("victim", lambda self: min(self.busy, default=b""), "names no idle block")]
FAULTS += [("coldest", lambda self, n, answer=answer: answer, "names no idle block") for answer in ([b"x"], [[]], [None], "abc")]
FAULTS += [("coldest", lambda self, n: sorted(self.busy)[:n], "names no idle block")]
FAULTS += [("coldest", lambda self, n: 7, "raised TypeError"), ("coldest", lambda self, n: (boom() for _ in range(n)), "raised ValueError")]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("method", "do", "reason"), FAULTS)
@pytest.mark.parametrize("after", [0, 3])
def test_an_order_that_fails_is_dropped_with_one_line_and_nothing_is_lost(traffic, method, do, reason, after):
    if after and do in (hang, spin):
        pytest.skip("once is enough")
    t = traffic(EvictionRecord("odd-one", odd(method, do, after)), disk=DiskSpace(2 * 4096, 4096))
    with capture_logs() as logs:
        for i in range(40):
            assert t.insert(i) == "stored"
            t.ask(i, i + 1)
            if i % 3 == 0:
                block = t.partition.blocks[name(i)]
                t.store.hold(block)
                for spilled in t.store.begin_spill(1, 0.0):
                    t.store.end_spill(spilled, ok=i % 2 == 0)
                assert t.insert(1000 + i) == "stored"
                t.store.unhold(block)

    dropped = [e for e in logs if e["event"] == "kvstore.eviction_order_dropped" and e["tier"] == "arena"]
    assert [(e["order"], e["method"], e["reason"], e["log_level"]) for e in dropped] == [("odd-one", method, reason, "error")]
    assert 1 <= t.store.counters.orders_dropped <= 2  # that of the disk by itself
    assert "a block's name" not in str(logs)
    for block in t.partition.blocks.values():
        assert block.slot is not None or block.place is not None
    audit = t.store.audit()
    assert (audit.num_leaked, audit.num_doubled) == (0, 0)
    assert t.store.used_bytes == 8 * 4096


def test_after_a_failure_recency_goes_on_as_if_there_had_never_been_a_plugin():
    """The order fails in its n-th call; from then on the victims are those of a store that had none."""
    act = st.tuples(st.sampled_from(["add", "discard", "touch", "left", "touch", "add"]), st.integers(0, 5))
    acts = st.lists(act, max_size=6) | st.lists(act, min_size=20, max_size=60)

    @settings(max_examples=100)
    @given(acts, st.sampled_from(METHODS), st.integers(0, 5))
    def check(history, method, after):
        plain, odd_one = IdleBlocks(CONTEXT), IdleBlocks(CONTEXT, EvictionRecord("odd-one", odd(method, boom, after)))
        some = blocks(6)
        for what, i in history:
            for idle in (plain, odd_one):
                if what == "left":
                    idle.left(some[i], evicted=True)
                else:
                    getattr(idle, what)(some[i])
        for idle in (plain, odd_one):
            idle.add(some[0])
        with capture_logs():
            while odd_one._order is not None:  # whatever it has not been asked yet
                odd_one.victim()
                odd_one.coldest(3)
                odd_one.touch(some[0])
                odd_one.discard(some[0])
                odd_one.add(some[0])
                odd_one.left(some[5], evicted=True)
                odd_one.add(some[5])
        for idle in (plain, odd_one):
            idle.left(some[5], evicted=False)
            idle.discard(some[0])
            idle.add(some[0])
        gone = []
        for idle in (plain, odd_one):
            gone.append([])
            while (block := idle.victim()) is not None:
                gone[-1].append(block.slot)
                idle.left(block, evicted=True)

        assert gone[0] == gone[1]

    check()


def test_an_order_that_is_late_again_and_again_is_dropped(monkeypatch, traffic):
    monkeypatch.setattr(idle_module, "LATE_S", 0.001)
    t = traffic(EvictionRecord("slow", odd("victim", lambda self: time.sleep(0.003) or FirstInFirstOut.victim(self))))
    with capture_logs() as logs:
        for i in range(8 + idle_module.MAX_LATE + 5):
            t.insert(i)

    assert [e["reason"] for e in logs if e["event"] == "kvstore.eviction_order_dropped"] == ["is late again and again"]
    assert t.evicted[: idle_module.MAX_LATE - 1] == list(range(idle_module.MAX_LATE - 1))
    t.check()


def test_one_that_is_late_now_and_then_stays(monkeypatch, traffic):
    """A busy machine delays any code; here every 25th call."""
    monkeypatch.setattr(idle_module, "LATE_S", 0.004)

    def victim(self):
        if self.num_odd % 25 == 24:
            time.sleep(0.006)
        return FirstInFirstOut.victim(self)

    t = traffic(EvictionRecord("slow", odd("victim", victim)))
    for i in range(8 + 25 * 3 * idle_module.MAX_LATE):
        t.insert(i)

    assert t.store.counters.orders_dropped == 0


# -- through the service -------------------------------------------------------------------------------------------------


def host_with(*records):
    class Plugin:
        @hookimpl
        def register_evictions(self, context):
            return list(records)

    host = PluginHost("kvstore", MeshConfig())
    host.register("odd", Plugin())
    return host


async def test_a_service_uses_the_record_registered_last(kit, make_blocks, layout):
    store = await kit.store(plugins=host_with(EvictionRecord("first", boom), EvictionRecord("second", FirstInFirstOut)), arena_bytes=8 * 8192, disk_bytes=0)
    client = kit.client(layout)
    for seed in range(4):
        await client.put(make_blocks(layout, 4, seed))

    assert isinstance(store.core._arena_idle._order, FirstInFirstOut)
    assert store.core.counters.evicted == 8


async def test_a_failing_order_is_counted_and_clients_notice_nothing(kit, make_blocks, layout, eventually):
    store = await kit.store(plugins=host_with(EvictionRecord("odd-one", odd("victim", boom, 2))), arena_bytes=8 * 8192, disk_bytes=0)
    client = kit.client(layout)
    for seed in range(6):
        made = make_blocks(layout, 4, seed)
        await client.put(made)
        found = await client.match([b[0] for b in made])
        assert len(found) == 4
        await client.release(found)

    def count():
        return store.registry.get_sample_value("plugmesh_kv_eviction_orders_dropped_total")

    await eventually(lambda: count() == 1)


@pytest.mark.parametrize(("build", "message"), [(boom, "raised ValueError"), (lambda _: None, "gave nothing"), (lambda _: object(), "without a method 'add'")])
async def test_an_order_that_cannot_be_built_stops_the_start_with_the_plugins_name(kit, build, message):
    with pytest.raises(ConfigError, match="plugin 'odd'") as info:
        await kit.store(plugins=host_with(EvictionRecord("odd-one", build)))

    assert message in info.value.message
