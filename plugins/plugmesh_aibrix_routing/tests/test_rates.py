"""Rates per client against a slow account of every event."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import Overloaded
from plugmesh.records import AdmissionRequest
from plugmesh_aibrix_routing.plugin import ClientLimits
from plugmesh_aibrix_routing.rates import WINDOW_S, RateLimits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, rpm: int = 0, tpm: int = 0, max_clients: int = 100, **own: ClientLimits) -> RateLimits:
    return RateLimits(ClientLimits(requests_per_minute=rpm, tokens_per_minute=tpm), own, max_clients=max_clients, clock=clock)


def enter(policy: RateLimits, client: str = "c", num_prompt: int = 0):
    async def go():
        ticket = await policy.admit(AdmissionRequest("r", client, 0, 1, time.monotonic() + 5))
        await ticket.take_tokens(num_prompt, 10**6)
        return ticket

    return asyncio.run(go())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4), st.integers(0, 60),
    st.lists(st.tuples(st.floats(0, 40), st.sampled_from(["a", "b"]), st.integers(0, 30), st.integers(0, 30)), max_size=25),
)  # fmt: skip
def test_nobody_starts_beyond_the_limits_in_any_minute_and_nobody_is_refused_below_them(rpm, tpm, requests):
    clock = Clock()
    policy = limits(clock, rpm, tpm)
    log: list[tuple[float, str, int, int]] = []  # (when, client, requests, tokens)
    for wait, client, num_prompt, num_out in requests:
        clock.now += wait

        def used(since: float, which: int, client: str = client) -> int:
            return sum(e[which] for e in log if e[1] == client and e[0] > clock.now - since)

        ticket = refused = None
        try:
            ticket = enter(policy, client, num_prompt)
        except Overloaded as e:
            refused = e
        if ticket is None:
            # Slots of a second: what is up to a second older than a minute may still count.
            assert (rpm and used(WINDOW_S + 1, 2) >= rpm) or (tpm and used(WINDOW_S + 1, 3) >= tpm)
            assert refused is not None and 0 < refused.retry_after_s <= WINDOW_S + 1
            continue
        assert not (rpm and used(WINDOW_S, 2) >= rpm)
        assert not (tpm and used(WINDOW_S, 3) >= tpm)
        ticket.release(num_out)
        log.append((clock.now, client, 1, num_prompt + num_out))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 30)), min_size=1, max_size=10), st.integers(1, 4), st.integers(1, 60))
def test_who_comes_again_after_the_time_that_was_named_gets_in_and_not_much_earlier(requests, rpm, tpm):
    clock = Clock()
    policy = limits(clock, rpm, tpm)
    for wait, num_prompt in requests:
        clock.now += wait
        try:
            enter(policy, "c", num_prompt).release(0)
        except Overloaded as e:
            refused_at = clock.now
            clock.now = refused_at + e.retry_after_s - 0.001
            with pytest.raises(Overloaded):
                enter(policy, "c", num_prompt)
            clock.now = refused_at + e.retry_after_s
            enter(policy, "c", num_prompt).release(0)


def test_clients_do_not_share_a_budget_and_a_named_one_has_its_own():
    policy = limits(Clock(), 1, 0, big=ClientLimits(requests_per_minute=3))
    enter(policy, "a")
    enter(policy, "b")
    for _ in range(3):
        enter(policy, "big")
    for client, number in (("a", 1), ("b", 1), ("big", 3)):
        with pytest.raises(Overloaded, match=f"{number} of {number} requests"):
            enter(policy, client)


def test_a_refused_request_is_not_counted():
    clock = Clock()
    policy = limits(clock, 1)
    enter(policy)
    for _ in range(50):
        with pytest.raises(Overloaded):
            enter(policy)
    clock.now += WINDOW_S + 1

    enter(policy)


def test_memory_is_bounded_over_clients_and_over_time():
    clock = Clock()
    policy = limits(clock, 1000, max_clients=10)
    for i in range(500):
        enter(policy, f"c{i}")
        clock.now += 1.0
        enter(policy, "steady")

    assert len(policy) == 10
    assert len(policy._windows["steady"]._slots) <= WINDOW_S + 2
