"""Each policy against its rule, and the prefix policy in a simulation of instances that cache, fill up and answer late."""

from __future__ import annotations

import collections
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.config import MeshConfig
from plugmesh.errors import Unavailable
from plugmesh.host import PluginHost
from plugmesh.records import KvEvent, RouteRequest
from plugmesh.types import InstanceInfo, block_chain
from plugmesh_aibrix_routing.load import REPORT_S, RecentMax
from plugmesh_aibrix_routing.plugin import Settings
from plugmesh_aibrix_routing.router import PrefixRouter, build_router


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def instance(name: str, **load: float) -> InstanceInfo:
    return InstanceInfo("decode", name, f"life-{name}", "127.0.0.1:1", "host", 1, load=load)


def ask(name: str, blocks: tuple[bytes, ...] = (), prompt: int = 100, max_tokens: int = 10) -> RouteRequest:
    return RouteRequest(name, prompt, max_tokens, block_ids=blocks)


def router(policy: str = "prefix-cache", clock: Clock | None = None, **settings_: object):
    return build_router(Settings(policy=policy, **settings_), clock or Clock())


TWO = [instance("d0"), instance("d1")]
FOUR = [instance(f"d{i}") for i in range(4)]
PROMPT = tuple(block_chain(b"k" * 32, range(160)))


def busy(r, name: str, num: int, decode=TWO) -> None:
    """`num` requests on one instance."""
    for i in range(num):
        r.route(ask(f"busy-{name}-{i}"), [d for d in decode if d.instance_id == name], [])


@pytest.mark.parametrize("policy", ["least-request", "prefix-cache"])
def test_the_instance_with_the_fewest_requests_gets_what_is_cached_nowhere(policy):
    r = router(policy)
    busy(r, "d0", 3)
    busy(r, "d1", 2)

    assert [r.route(ask(f"r{i}"), TWO, []).decode_instance for i in range(3)].count("d1") == 2
    r.on_finished("busy-d0-0")
    r.on_finished("busy-d0-1")
    assert r.route(ask("last"), TWO, []).decode_instance == "d0"


def test_round_robin_takes_turns():
    r = router("round-robin")

    assert [r.route(ask(f"r{i}"), FOUR, []).decode_instance for i in range(8)] == ["d0", "d1", "d2", "d3"] * 2


def test_random_is_repeatable_by_its_seed_and_even():
    names = [[router_.route(ask(f"r{i}"), TWO, []).decode_instance for i in range(400)] for router_ in (router("random"), router("random"), router("random", seed=1))]

    assert names[0] == names[1] != names[2]
    assert 150 < names[0].count("d0") < 250


def test_power_of_two_never_takes_the_busiest_of_all_and_is_nearly_even():
    r = router("power-of-two")
    busy(r, "d3", 50, FOUR)
    names = [r.route(ask(f"r{i}"), FOUR, []).decode_instance for i in range(90)]

    assert "d3" not in names
    counts = collections.Counter(names)
    assert max(counts.values()) - min(counts.values()) <= 4


def test_least_kv_cache_takes_the_smallest_share_not_the_smallest_number():
    decode = [instance("d0", kv_blocks_used=50, kv_blocks_total=100), instance("d1", kv_blocks_used=100, kv_blocks_total=1000)]

    assert router("least-kv-cache").route(ask("r"), decode, []).decode_instance == "d1"


def test_throughput_weighs_tokens_of_prompts_twice_until_the_first_token():
    r = router("throughput")
    r.route(ask("a", prompt=100, max_tokens=10), TWO[:1], [])    # 210
    r.route(ask("b", prompt=10, max_tokens=200), TWO[1:], [])    # 220
    assert r.route(ask("c", prompt=1, max_tokens=1), TWO, []).decode_instance == "d0"  # 213
    r.on_progress("b", 1)                                        # 199

    assert r.route(ask("d", prompt=1, max_tokens=1), TWO, []).decode_instance == "d1"


def test_least_latency_prefers_the_faster_one_and_tries_the_other_again_later():
    clock = Clock()
    r = router("least-latency", clock)
    for name, seconds in (("d0", 1.0), ("d1", 0.1)):
        r.route(ask(f"first-{name}"), [instance(name)], [])
        clock.now += seconds
        r.on_progress(f"first-{name}", 1)
        clock.now += seconds
        r.on_progress(f"first-{name}", 1)
        r.on_finished(f"first-{name}")
    assert r.route(ask("r"), TWO, []).decode_instance == "d1"
    r.on_finished("r")
    for i in range(100):  # d1 is measured again and again, d0's figure fades
        chosen = r.route(ask(f"r{i}"), TWO, []).decode_instance
        if chosen == "d0":
            break
        clock.now += 1.0
        r.on_progress(f"r{i}", 1)
        r.on_finished(f"r{i}")

    assert chosen == "d0"


# The prefix policy.


def stored(r, name: str, blocks: tuple[bytes, ...]) -> None:
    r.on_kv_event(KvEvent(name, f"life-{name}", 1, "stored", blocks))


def test_the_longest_match_wins_over_fewer_requests_and_requests_decide_between_equal_ones():
    r = router()
    stored(r, "d0", PROMPT[:2])
    stored(r, "d1", PROMPT[:5])
    stored(r, "d2", PROMPT[:5])
    busy(r, "d1", 2, FOUR)
    busy(r, "d2", 1, FOUR)

    assert r.route(ask("r", PROMPT), FOUR, []).decode_instance == "d2"


def test_above_the_imbalance_only_the_idlest_are_asked_and_of_those_the_best_match():
    r = router(imbalance_requests=3)
    stored(r, "d0", PROMPT)
    stored(r, "d2", PROMPT[:1])
    busy(r, "d0", 3, FOUR)
    assert r.route(ask("r1", PROMPT), FOUR, []).decode_instance == "d0"  # 3 above the idlest is still even

    assert r.route(ask("r2", PROMPT), FOUR, []).decode_instance == "d2"  # 4 is not


def test_an_instance_far_above_the_usual_is_passed_over():
    many = [instance(f"d{i}") for i in range(8)]
    r = router(imbalance_requests=1000)
    stored(r, "d0", PROMPT)
    busy(r, "d0", 7, many)
    requests = [7] + [0] * 7
    assert requests[0] > statistics.fmean(requests) + 2 * statistics.pstdev(requests)

    assert r.route(ask("r", PROMPT), many, []).decode_instance != "d0"
    assert router(imbalance_requests=1000, load_sigma=3.0) is not r
    patient = router(imbalance_requests=1000, load_sigma=3.0)
    stored(patient, "d0", PROMPT)
    busy(patient, "d0", 7, many)
    assert patient.route(ask("r", PROMPT), many, []).decode_instance == "d0"


def test_a_small_match_may_be_told_to_count_as_none():
    for share, expected in ((0.0, "d0"), (0.5, "d1")):
        r = router(min_match_share=share)
        stored(r, "d0", PROMPT[:2])
        busy(r, "d0", 1)

        assert r.route(ask("r", PROMPT), TWO, []).decode_instance == expected


def test_a_burst_of_one_new_prompt_goes_to_one_instance_before_any_event_tells():
    r = router()
    names = {r.route(ask(f"r{i}", PROMPT), FOUR, []).decode_instance for i in range(5)}

    assert len(names) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=6), st.lists(st.integers(0, 10), min_size=6, max_size=6), st.integers(0, 6), st.floats(0, 3))
def test_the_choice_is_that_of_the_rule_written_out(loads, matches, imbalance, sigma):
    """Against the paper's steps as plain code."""
    decode = [instance(f"d{i}") for i in range(len(loads))]
    r = router(imbalance_requests=imbalance, load_sigma=sigma, expect_s=0)
    for i, num in enumerate(loads):
        busy(r, f"d{i}", num, decode)
        stored(r, f"d{i}", PROMPT[: matches[i]])
    chosen = int(r.route(ask("r", PROMPT), decode, []).decode_instance[1:])

    candidates = list(range(len(loads)))
    if max(loads) - min(loads) > imbalance:
        candidates = [i for i in candidates if loads[i] == min(loads)]
    limit = statistics.fmean(loads) + sigma * statistics.pstdev(loads)
    good = sorted((i for i in candidates if matches[i] and loads[i] <= limit + 1e-9), key=lambda i: (-matches[i], loads[i]))
    if good:
        assert (matches[chosen], loads[chosen]) == (matches[good[0]], loads[good[0]])
    else:
        assert loads[chosen] == min(loads[i] for i in candidates)


class Simulated:
    """An instance with a cache of `num_blocks` (least recently used) that takes a time per block it must compute, one request at a time."""

    def __init__(self, name: str, num_blocks: int) -> None:
        self.name, self.num_blocks = name, num_blocks
        self.cache: collections.OrderedDict[bytes, None] = collections.OrderedDict()
        self.free_at = 0.0

    def serve(self, blocks: tuple[bytes, ...], now: float) -> tuple[float, int, list[KvEvent]]:
        hits = 0
        while hits < len(blocks) and blocks[hits] in self.cache:
            hits += 1
        self.free_at = max(now, self.free_at) + 0.01 + 0.01 * (len(blocks) - hits)
        new = [b for b in blocks[hits:] if b not in self.cache]
        for b in reversed(blocks):
            self.cache[b] = None
            self.cache.move_to_end(b)
        gone = [self.cache.popitem(last=False)[0] for _ in range(max(0, len(self.cache) - self.num_blocks))]
        life = f"life-{self.name}"
        return self.free_at, hits, [KvEvent(self.name, life, 0, "removed", tuple(gone)), KvEvent(self.name, life, 0, "stored", tuple(new))]


def simulate(policy: str, prompts: list[tuple[bytes, ...]], *, gap_s: float, stale_s: float = 1.0, instances: int = 2, num_blocks: int = 100, **settings_: object):
    """(hit rate, mean wait, p99 wait, most requests on one instance against the mean); leases are `stale_s` old."""
    clock = Clock()
    r = router(policy, clock, **settings_)
    sims = {f"d{i}": Simulated(f"d{i}", num_blocks) for i in range(instances)}
    if isinstance(r, PrefixRouter):
        for name in sims:
            stored(r, name, ())
    running: list[tuple[float, str, str, list[KvEvent]]] = []
    leases: dict[str, float] = dict.fromkeys(sims, 0.0)
    leased_at, hits, waits, peaks = clock.now, 0, [], []
    for i, blocks in enumerate(prompts):
        clock.now += gap_s
        for end, request, _, events in sorted((e for e in running if e[0] <= clock.now), key=lambda e: e[0]):
            r.on_progress(request, 1)
            r.on_finished(request)
            if isinstance(r, PrefixRouter):
                for e in events:
                    r.on_kv_event(e)
            running = [x for x in running if x[1] != request]
            assert end <= clock.now
        counts = collections.Counter(x[2] for x in running)
        if clock.now - leased_at >= stale_s:
            leases, leased_at = {n: float(counts[n]) for n in sims}, clock.now
        name = r.route(ask(f"r{i}", blocks), [instance(n, num_running=leases[n]) for n in sims], []).decode_instance
        end, num, events = sims[name].serve(blocks, clock.now)
        running.append((end, f"r{i}", name, events))
        hits += num
        waits.append(end - clock.now)
        counts[name] += 1
        if sum(counts.values()) >= 2 * instances:
            peaks.append(max(counts.values()) / (sum(counts.values()) / instances))
    return hits / sum(map(len, prompts)), statistics.fmean(waits), sorted(waits)[int(len(waits) * 0.99)], statistics.fmean(peaks or [1.0])


def tenants(num: int, seed: int, *, shared: bool = True) -> list[tuple[bytes, ...]]:
    """Zipf over 20 system prompts of 8 blocks, each request with 2 of its own; or nothing shared."""
    rng = random.Random(seed)
    chosen = rng.choices(range(20), [1 / (i + 1) for i in range(20)], k=num)
    return [
        tuple(block_chain(b"k" * 32, [t if shared else 1000 + i for t in [c] * 128] + [100_000 + i] * 32)) for i, c in enumerate(chosen)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_with_shared_prefixes_more_is_found_and_waits_are_shorter_than_with_any_blind_policy(seed):
    prompts = tenants(400, seed)
    ours = simulate("prefix-cache", prompts, gap_s=0.035, imbalance_requests=4)
    for policy in ("random", "round-robin", "least-request"):
        blind = simulate(policy, prompts, gap_s=0.035)

        assert ours[0] > blind[0] + 0.1, policy
        assert ours[1] < blind[1], policy


def test_without_shared_prefixes_it_is_as_good_as_least_request():
    prompts = tenants(300, 0, shared=False)
    ours, theirs = simulate("prefix-cache", prompts, gap_s=0.07), simulate("least-request", prompts, gap_s=0.07)

    assert ours[1] <= theirs[1] * 1.05


def test_one_prompt_for_all_overloads_an_instance_unless_the_imbalance_is_looked_at():
    prompts = [(*PROMPT, bytes([i % 256, i // 256]) * 16) for i in range(300)]
    only = simulate("prefix-cache", prompts, gap_s=0.012, imbalance_requests=10**6, load_sigma=1e9)
    even = simulate("prefix-cache", prompts, gap_s=0.012, imbalance_requests=2)

    assert only[3] > 1.9            # everything on one of two
    assert even[3] <= 1.5
    assert even[2] < only[2] / 2


def test_frozen_leases_do_not_send_a_burst_to_one_instance():
    """Leases that never change say that d0 is idle; our own counts know better."""
    for policy in ("least-request", "power-of-two", "prefix-cache"):
        r = router(policy)
        frozen = [instance("d0", num_running=0.0), instance("d1", num_running=1.0)]
        names = [r.route(ask(f"r{i}"), frozen, []).decode_instance for i in range(20)]

        assert 8 <= names.count("d0") <= 12, policy


def test_requests_of_other_gateways_count_and_our_own_do_not_count_twice():
    clock = Clock()
    r = router("least-request", clock)
    busy(r, "d0", 4)
    assert r.loads.num_requests(instance("d0", num_running=4.0)) == 4     # all ours
    assert r.loads.num_requests(instance("d0", num_running=7.0)) == 7     # three of others
    for i in range(4):
        r.on_finished(f"busy-d0-{i}")
    assert r.loads.num_requests(instance("d0", num_running=4.0)) == 0     # an old report of what was ours
    clock.now += REPORT_S + 0.1

    assert r.loads.num_requests(instance("d0", num_running=4.0)) == 4     # nobody of ours is left that it could mean


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0.0, 1.5)), max_size=40))
def test_the_recent_maximum_is_that_of_the_history(steps):
    window, now, history = 2.0, 0.0, [(0.0, 0)]
    recent = RecentMax(window)
    for value, wait in steps:
        now += wait
        recent.set(value, now)
        history.append((now, value))
        # A value counts from when it was set until it was replaced.
        ends = [at for at, _ in history[1:]] + [float("inf")]
        slow = max(v for (_, v), end in zip(history, ends, strict=True) if end > now - window)

        assert recent.max(now) == slow


# The plugin in its host.


def test_the_gateway_that_loads_it_uses_it_and_only_the_prefix_policy_costs_events():
    for policy, needs in (("prefix-cache", True), ("least-request", False)):
        host = PluginHost.load(["aibrix_routing"], MeshConfig(plugins={"aibrix_routing": {"policy": policy}}), service="gateway")
        record = host.last("routers")

        assert host.select("router", ["least_pending", "aibrix"]) == "aibrix"
        assert record.needs_block_ids is needs
        assert hasattr(record.build(), "on_kv_event") is needs


def test_without_limits_there_is_no_admission_policy():
    def records(**settings_: object):
        return PluginHost.load(["aibrix_routing"], MeshConfig(plugins={"aibrix_routing": settings_}), service="gateway").records("admission")

    assert records() == []
    assert [r.name for r in records(requests_per_minute=5)] == ["aibrix-rate-limits"]
    assert [r.name for r in records(client_limits={"laptop": {"tokens_per_minute": 5}})] == ["aibrix-rate-limits"]


def test_no_instance_is_a_typed_error():
    with pytest.raises(Unavailable):
        router().route(ask("r"), [], [])
