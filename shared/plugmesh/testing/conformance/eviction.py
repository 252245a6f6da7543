"""What every eviction order must do: name only what may go, let everything go in the end, say the same again, keep little, and be quick."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.records import EvictionContext, EvictionOrder, EvictionRecord
from plugmesh.testing.conformance.base import RecordConformance, num_reachable

LATE_S = 0.05  # what the kvstore calls late


def key_of(number: int) -> bytes:
    """A key of the length that the kvstore's have."""
    return number.to_bytes(8, "big") * 8


Act = tuple[str, int]
ACT = st.tuples(st.sampled_from(["ask", "ask", "ask", "ask", "hold", "hold", "free", "remove", "room", "coldest"]), st.integers(0, 13))
ACTS: st.SearchStrategy[list[Act]] = st.lists(ACT, max_size=8) | st.lists(ACT, min_size=50, max_size=150)  # of one range most would be short


@dataclass(slots=True)
class _Held:
    num_bytes: int
    is_idle: bool = True


class Tier:
    """A tier as the kvstore runs one: it asks for a victim when a block would not fit, and checks every answer."""

    def __init__(self, order: EvictionOrder, capacity_bytes: int, sizes: Sequence[int] = (1,)) -> None:
        self.order, self.capacity_bytes, self.sizes = order, capacity_bytes, sizes
        self.blocks: dict[bytes, _Held] = {}
        self.evicted: list[bytes] = []

    def idle(self) -> set[bytes]:
        return {k for k, b in self.blocks.items() if b.is_idle}

    def used(self) -> int:
        return sum(b.num_bytes for b in self.blocks.values())

    def act(self, what: str, number: int) -> None:
        key = key_of(number)
        block = self.blocks.get(key)
        if what == "ask" and block is None:
            self.put(key, self.sizes[number % len(self.sizes)])
        elif what == "ask":
            self.order.touch(key)
        elif what == "hold" and block is not None and block.is_idle:
            block.is_idle = False
            self.order.discard(key)
        elif what == "free" and block is not None and not block.is_idle:
            block.is_idle = True
            self.order.add(key, block.num_bytes)
        elif what == "remove" and block is not None:
            del self.blocks[key]
            self.order.left(key, False)
        elif what == "room":
            self.evict()
        elif what == "coldest":
            self.check_coldest(number)

    def put(self, key: bytes, num_bytes: int) -> None:
        while self.used() + num_bytes > self.capacity_bytes:
            if not self.evict():
                return
        self.blocks[key] = _Held(num_bytes)
        self.order.add(key, num_bytes)

    def evict(self) -> bool:
        key, again = self.order.victim(), self.order.victim()
        idle = self.idle()
        assert (key is None) == (not idle), f"it named {key!r} of {len(idle)} idle blocks"
        if key is None:
            return False
        assert key in idle, "it named a block that is busy or not there"
        assert key == again, "asked twice, it named two blocks"
        del self.blocks[key]
        self.evicted.append(key)
        self.order.left(key, True)
        return True

    def check_coldest(self, n: int) -> None:
        named = list(self.order.coldest(n))
        assert len(named) == len(set(named)) == min(n, len(self.idle()))
        assert set(named) <= self.idle()

    def drain(self) -> None:
        while self.evict():
            pass


class EvictionConformance(RecordConformance):
    """`max_examples` of random histories per property."""

    kind = "evictions"
    max_examples: ClassVar[int] = 60

    def order(self, record: EvictionRecord, capacity_bytes: int = 8, tier: Literal["arena", "disk"] = "arena") -> EvictionOrder:
        return record.build(EvictionContext(tier, capacity_bytes))

    def histories(self, check: Any) -> None:
        """Runs `check(acts, capacity, sizes)` on random histories."""
        cases = st.tuples(ACTS, st.integers(1, 16), st.sampled_from([(1,), (1, 2), (1, 5, 3), (1 << 40, 1)]))

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(cases)
        def draw(case: tuple[list[Act], int, tuple[int, ...]]) -> None:
            check(*case)

        draw()

    def test_it_names_only_idle_blocks_and_every_block_leaves_in_the_end(self, record: EvictionRecord) -> None:
        def check(acts: list[Act], capacity: int, sizes: tuple[int, ...]) -> None:
            tier = Tier(self.order(record, capacity), capacity, sizes)
            for act in acts:
                tier.act(*act)
            tier.drain()
            assert not tier.idle()
            for key in sorted(tier.blocks):
                tier.act("free", int.from_bytes(key[:8], "big"))
            tier.drain()
            assert not tier.blocks

        self.histories(check)

    def test_the_same_history_has_the_same_victims_whatever_else_it_is_asked(self, record: EvictionRecord) -> None:
        """Asking for the coldest changes nothing, and neither does another tier of the same process."""

        def check(acts: list[Act], capacity: int, sizes: tuple[int, ...]) -> None:
            first, second = (Tier(self.order(record, capacity), capacity, sizes) for _ in range(2))
            other = Tier(self.order(record, capacity, "disk"), capacity, sizes)
            for what, number in acts:
                first.act(what, number)
                first.check_coldest(1 + number % 4)
                other.act(what, 13 - number)
                if what != "coldest":
                    second.act(what, number)
            first.drain()
            second.drain()
            assert first.evicted == second.evicted

        self.histories(check)

    def test_most_of_what_is_asked_for_all_the_time_stays(self, record: EvictionRecord) -> None:
        """The least that an order must be good for, and first in, first out is: a quarter of the tier, asked for again and again beside a stream of newcomers."""
        tier = Tier(self.order(record, 64), 64)
        for number in range(16):
            tier.act("ask", number)
        num_lost = 0
        for round_ in range(40):
            for number in range(16):
                num_lost += key_of(number) not in tier.blocks
                tier.act("ask", number)
            for number in range(4):
                tier.act("ask", 1000 + 4 * round_ + number)

        assert num_lost <= 40 * 16 // 4, "it sends away what is asked for all the time"

    def test_blocks_that_left_are_forgotten(self, record: EvictionRecord) -> None:
        """What it remembers of them is bounded by the tier, not by how many there were."""
        order = self.order(record, 64)
        tier, sizes = Tier(order, 64), []
        for round_ in range(4):
            for i in range(64 * 12):
                number = 1 + round_ * 10_000 + i
                tier.act("ask", number)
                if i % 3 == 0:
                    tier.act("ask", number)
                if i % 7 == 0:
                    tier.act("hold", number)
                    tier.act("remove" if i % 2 else "free", number)
            gc.collect()
            sizes.append(num_reachable(order))

        assert sizes[3] <= sizes[2] + 80 and sizes[3] <= sizes[1] + 160, "it grows by what it keeps of every block"

    def test_what_it_was_never_told_of_does_no_harm(self, record: EvictionRecord) -> None:
        order = self.order(record, 4)
        for key in (b"", b"\0", key_of(1), bytes(4096)):
            order.discard(key)
            order.touch(key)
            order.left(key, True)
            order.left(key, False)

        assert order.victim() is None
        assert list(order.coldest(0)) == list(order.coldest(10)) == []

    @pytest.mark.parametrize("capacity", [0, 1, 1 << 60])
    @pytest.mark.parametrize("num_bytes", [1, 4096, 1 << 50])
    def test_tiers_and_blocks_of_any_size_work(self, record: EvictionRecord, capacity: int, num_bytes: int) -> None:
        """Also a tier that holds more than its capacity says, as one does whose capacity was made smaller since it was filled."""
        order = self.order(record, capacity)
        keys = [key_of(i) for i in range(5)]
        for key in keys:
            order.add(key, num_bytes)
        for _ in range(100):
            order.touch(keys[0])
        left: list[bytes] = []
        while (victim := order.victim()) is not None:
            assert victim in keys and victim not in left
            left.append(victim)
            order.left(victim, True)

        assert sorted(left) == keys
        assert list(order.coldest(1 << 40)) == []

    def test_a_busy_block_may_leave_too_and_may_come_again(self, record: EvictionRecord) -> None:
        order = self.order(record, 4)
        for evicted in (False, True):
            order.add(key_of(1), 1)
            order.discard(key_of(1))
            order.discard(key_of(1))
            order.touch(key_of(1))
            assert order.victim() is None
            order.left(key_of(1), evicted)
        order.add(key_of(1), 1)

        assert order.victim() == key_of(1)

    @pytest.mark.parametrize("num_busy", [0, 4999])
    def test_it_does_not_hold_up_the_event_loop(self, record: EvictionRecord, num_busy: int) -> None:
        """5,000 blocks, also when all but one of them are pinned; what counts is the usual call, not the one that a busy machine delays."""
        num = 5000
        order = self.order(record, num)
        keys = [key_of(i) for i in range(2 * num)]
        for key in keys[:num]:
            order.add(key, 1)
        for key in keys[:num_busy]:
            order.touch(key)
            order.discard(key)
        times: list[float] = []
        for i in range(500):
            began = time.perf_counter()
            victim = order.victim()
            assert victim is not None
            if i % 50 == 0:
                order.coldest(64)
            order.left(victim, True)
            order.add(keys[num + i], 1)
            order.touch(keys[num + i])
            times.append(time.perf_counter() - began)

        times.sort()
        assert times[len(times) // 2] < LATE_S / 50
        assert sum(times) < 2.0
