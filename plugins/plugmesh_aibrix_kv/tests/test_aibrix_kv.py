"""S3-FIFO against slow references and by itself, its hit ratios in the real store, and the suites of its record."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.host import PluginHost
from plugmesh.testing.conformance import CardConformance, EvictionConformance
from plugmesh.testing.conformance.eviction import Tier, key_of
from plugmesh_aibrix_kv import bench
from plugmesh_aibrix_kv.s3fifo import S3Fifo
from plugmesh_aibrix_kv.tests import oracle
from plugmesh_aibrix_kv.workloads import WORKLOADS, zipf_and_scan


class TestCard(CardConformance):
    slug = "aibrix_kv"


class TestDefaults(EvictionConformance):
    slug = "aibrix_kv"


class TestStrict(EvictionConformance):
    """Hardly a small queue, three hits to stay, no ghosts."""

    slug = "aibrix_kv"
    settings = {"small_share": 0.01, "promote_hits": 3, "max_ghosts": 0}


class TestMostlySmall(EvictionConformance):
    slug = "aibrix_kv"
    settings = {"small_share": 0.9, "promote_hits": 2, "max_ghosts": 3}


# -- the same decisions as the references ------------------------------------------------------------------------------

ACT = st.tuples(st.sampled_from(["add", "add", "add", "touch", "touch", "discard", "left", "evict", "evict", "victim"]), st.integers(0, 11))
ACTS = st.lists(ACT, max_size=10) | st.lists(ACT, min_size=60, max_size=180)  # of one range most would be short


@settings(max_examples=200)
@given(ACTS, st.integers(0, 12), st.sampled_from([0.1, 0.3, 0.7]), st.integers(1, 3), st.sampled_from([0, 2, 100]), st.sampled_from([(1,), (3, 1, 2)]))
def test_it_decides_as_the_slow_reference_whatever_happens(acts, capacity, share, threshold, max_ghosts, sizes):
    fast, slow = S3Fifo(capacity, share, threshold, max_ghosts), oracle.SlowS3Fifo(capacity, share, threshold, max_ghosts)
    for what, number in acts:
        key = key_of(number)
        for order in (fast, slow):
            if what == "add":
                order.add(key, sizes[number % len(sizes)])
            elif what == "touch":
                order.touch(key)
            elif what == "discard":
                order.discard(key)
            elif what == "left":
                order.left(key, number % 2 == 0)
        if what in ("evict", "victim"):
            assert fast.victim() == slow.victim()
        if what == "evict" and (victim := slow.victim()) is not None:
            fast.left(victim, True)
            slow.left(victim, True)

    assert list(fast._ghosts) == [k for k, _ in slow.ghosts]
    while (victim := slow.victim()) is not None:
        assert fast.victim() == victim
        fast.left(victim, True)
        slow.left(victim, True)
    assert fast.victim() is None


@settings(max_examples=100)
@given(st.lists(st.integers(0, 20), max_size=12) | st.lists(st.integers(0, 14), min_size=60, max_size=200), st.integers(1, 10), st.sampled_from([0.1, 0.3, 0.5]), st.integers(1, 3))
def test_a_cache_with_it_hits_what_a_simulation_of_its_own_hits(numbers, capacity, share, threshold):
    tier = Tier(S3Fifo(capacity, share, threshold), capacity)
    hits = []
    for number in numbers:
        hits.append(key_of(number) in tier.blocks)
        tier.act("ask", number)

    assert hits == oracle.simulate([key_of(n) for n in numbers], capacity, share, threshold)


# -- what it is for, by hand --------------------------------------------------------------------------------------------


def filled(order: S3Fifo, *numbers: int) -> S3Fifo:
    for number in numbers:
        order.add(key_of(number), 1)
    return order


def evict(order: S3Fifo) -> int:
    victim = order.victim()
    order.left(victim, True)
    return int.from_bytes(victim[:8], "big")


def test_who_was_asked_for_in_the_small_queue_outlives_who_was_not():
    order = filled(S3Fifo(10), *range(10))
    order.touch(key_of(0))
    order.touch(key_of(3))

    assert [evict(order) for _ in range(8)] == [1, 2, 4, 5, 6, 0, 3, 7]  # at 3 small ones the small queue has its share, then it is main's turn


def test_who_comes_again_after_it_left_unasked_goes_to_the_main_queue():
    order = filled(S3Fifo(10), *range(10))
    gone = evict(order)
    filled(order, gone)

    assert gone == 0
    assert [evict(order) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert evict(order) == 0


def test_a_block_in_use_when_its_turn_comes_stands_at_the_end_afterwards():
    order = filled(S3Fifo(4, 0.5), 0, 1, 2)
    order.discard(key_of(0))
    assert evict(order) == 1
    order.add(key_of(0), 1)

    assert [evict(order), evict(order)] == [2, 0]


def test_a_block_that_was_in_use_meanwhile_keeps_its_place():
    order = filled(S3Fifo(4, 0.5), 0, 1, 2)
    order.discard(key_of(0))
    order.add(key_of(0), 1)

    assert evict(order) == 0


def test_the_writer_is_told_of_those_that_go_soon():
    order = filled(S3Fifo(8), *range(8))
    order.touch(key_of(0))
    order.discard(key_of(1))

    assert [int.from_bytes(k[:8], "big") for k in order.coldest(99)] == [2, 3, 4, 5, 6, 7, 0]
    assert order.coldest(2) == [key_of(2), key_of(3)]


# -- in the real store ---------------------------------------------------------------------------------------------------


def test_a_scan_does_not_push_out_what_is_popular_in_the_real_store():
    ratios = [bench.run(zipf_and_scan(128, 2000, 7), 128, s).hit_ratio for s in (None, {})]

    assert ratios[1] > ratios[0] + 0.02


@pytest.mark.parametrize("disk", [0, 96])
@pytest.mark.parametrize("name", WORKLOADS)
def test_no_workload_makes_the_store_drop_it(name, disk):
    found = bench.run(WORKLOADS[name](64, 300, 1), 64, {}, disk)

    assert found.orders_dropped == 0
    assert found.evicted > 0
    assert (found.demoted > 0) == (disk > 0)


def test_the_real_store_hits_what_the_simulation_hits():
    """Requests of one block, no disk: then a store is a plain cache, and lookups renew before anything is held."""
    ids = [request[0] for request in zipf_and_scan(64, 1500, 3)]
    found = bench.run(([i] for i in ids), 64, {})

    assert found.hits == sum(oracle.simulate(ids, 64))
    assert found.hits > 300


@pytest.mark.parametrize("odd", [{"small_share": 0}, {"small_share": 1}, {"promote_hits": 0}, {"promote_hits": 4}, {"max_ghosts": -1}])
def test_settings_out_of_range_stop_the_start(odd):
    with pytest.raises(ConfigError, match="aibrix_kv"):
        PluginHost.load(["aibrix_kv"], MeshConfig(plugins={"aibrix_kv": odd}), service="kvstore")


def test_the_bench_prints_every_workload_and_order(capsys, tmp_path):
    bench.main(["--blocks", "24", "--requests", "60", "--seeds", "1", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out

    assert all(name in printed for name in [*WORKLOADS, *bench.ORDERS])
    assert (tmp_path / "out.json").stat().st_size > 1000
