"""What every admission policy must do: let in or refuse with a typed error, in time, and give everything back."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.errors import DeadlineExceeded, Overloaded, PlugmeshError
from plugmesh.records import AdmissionPolicy, AdmissionRecord, AdmissionRequest
from plugmesh.testing.conformance.base import RecordConformance, num_reachable

GRACE_S = 2.0  # after a deadline


def ask(name: str, *, client: str = "someone", num_sequences: int = 1, priority: int = 0, within_s: float = 0.2) -> AdmissionRequest:
    """A request as the gateway describes it, with so long to live."""
    return AdmissionRequest(name, client, priority, num_sequences, time.monotonic() + within_s)


async def _refusal(wait: Awaitable[Any], within_s: float) -> PlugmeshError | None:
    """The typed refusal, None without one; anything else that it raises is the test's failure, and so is being late."""
    try:
        async with asyncio.timeout(within_s + GRACE_S):
            await wait
    except PlugmeshError as e:
        return e
    except TimeoutError:
        raise AssertionError("the policy held a request beyond its deadline") from None
    return None


class AdmissionConformance(RecordConformance):
    kind = "admission"
    max_examples: ClassVar[int] = 30

    async def enter(self, policy: AdmissionPolicy, request: AdmissionRequest, num_prompt: int = 10, num_wanted: int = 10) -> Any:
        """A ticket whose tokens are taken, or the refusal; a refused request holds nothing."""
        ticket: Any = None

        async def go() -> None:
            nonlocal ticket
            ticket = await policy.admit(request)
            await ticket.take_tokens(num_prompt, num_wanted)

        within_s = max(0.0, request.deadline - time.monotonic())
        refusal = await _refusal(go(), within_s)
        if refusal is not None:
            if ticket is not None:
                ticket.release(0)
            return refusal
        return ticket

    async def test_an_idle_policy_lets_a_small_request_in_at_once(self, record: AdmissionRecord) -> None:
        began = time.monotonic()
        ticket = await self.enter(record.build(), ask("r"))

        assert not isinstance(ticket, PlugmeshError), f"it refused the only request: {ticket}"
        assert time.monotonic() - began < 0.1
        ticket.release(5)

    async def test_a_refusal_is_typed_and_says_when_to_come_again(self, record: AdmissionRecord) -> None:
        policy = record.build()
        answers = [await self.enter(policy, ask(f"r{i}", within_s=0.005), 1000, 1000) for i in range(300)]
        refused = [a for a in answers if isinstance(a, PlugmeshError)]

        assert all(isinstance(a, Overloaded | DeadlineExceeded) for a in refused)
        assert all(0 < a.retry_after_s <= 3600 for a in refused if isinstance(a, Overloaded))
        for a in answers:
            if not isinstance(a, PlugmeshError):
                a.release(0)

    async def test_requests_of_any_size_that_come_and_go_are_answered_in_time(self, record: AdmissionRecord) -> None:
        cases: list[Any] = []

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            st.lists(
                st.tuples(
                    st.integers(1, 64), st.integers(-9, 9), st.sampled_from(["", "a", "b", "x" * 128]), st.integers(1, 1 << 40), st.integers(0, 1 << 40),
                    st.booleans(),
                ),
                max_size=8,
            )
        )  # fmt: skip
        def draw(case: list[Any]) -> None:
            cases.append(case)

        draw()
        for case in cases:
            policy, tickets = record.build(), []
            for i, (num_sequences, priority, client, num_prompt, num_wanted, keeps) in enumerate(case):
                request = ask(f"r{i}", client=client, num_sequences=num_sequences, priority=priority, within_s=0.002)
                ticket = await self.enter(policy, request, num_prompt, num_wanted)
                if isinstance(ticket, PlugmeshError):
                    continue
                if keeps:
                    tickets.append(ticket)
                else:
                    ticket.release(1)
            for ticket in tickets:
                ticket.release(1)

    async def test_what_is_given_back_can_be_taken_again(self, record: AdmissionRecord) -> None:
        """A small request of a client of its own gets in after any number of others, whatever became of them."""
        policy = record.build()
        for i in range(50):
            ticket = await self.enter(policy, ask(f"r{i}", client=f"c{i}", num_sequences=2, within_s=0.01), 100, 100)
            if not isinstance(ticket, PlugmeshError):
                ticket.release(0)
        last = await self.enter(policy, ask("last", client="new"))

        assert not isinstance(last, PlugmeshError), f"something was kept: {last}"
        last.release(0)

    async def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing_behind(self, record: AdmissionRecord) -> None:
        policy = record.build()
        held = [await self.enter(policy, ask(f"r{i}", client=f"c{i}", num_sequences=64, within_s=0.002), 1 << 18, 1 << 18) for i in range(8)]
        tasks = [asyncio.create_task(self.enter(policy, ask(f"w{i}", client=f"w{i}", num_sequences=64, within_s=60.0))) for i in range(4)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError | PlugmeshError) or not isinstance(result, BaseException)
            if not isinstance(result, BaseException):
                result.release(0)
        for ticket in held:
            if not isinstance(ticket, PlugmeshError):
                ticket.release(0)
        last = await self.enter(policy, ask("last", client="new"))

        assert not isinstance(last, PlugmeshError), f"something was kept: {last}"
        last.release(0)

    async def test_ended_requests_are_forgotten(self, record: AdmissionRecord) -> None:
        policy, sizes = record.build(), []
        for round_ in range(3):
            for i in range(200):
                ticket = await self.enter(policy, ask(f"r{round_}-{i}", client=f"c{i % 5}", within_s=0.005), 3, 3)
                if not isinstance(ticket, PlugmeshError):
                    ticket.release(1)
            gc.collect()
            sizes.append(num_reachable(policy))

        assert sizes[2] <= sizes[1] + 60, "it grows by what it keeps of every request"

    async def test_two_gateways_do_not_share_state(self, record: AdmissionRecord) -> None:
        first, second = record.build(), record.build()
        held = [await self.enter(first, ask(f"r{i}", num_sequences=64, within_s=0.002), 1 << 18, 1 << 18) for i in range(8)]
        other = await self.enter(second, ask("r"))

        assert first is not second
        assert not isinstance(other, PlugmeshError)
        for ticket in [other, *held]:
            if not isinstance(ticket, PlugmeshError):
                ticket.release(0)

    @pytest.mark.parametrize("num_sequences", [1, 1 << 20])
    async def test_a_passed_deadline_never_waits(self, record: AdmissionRecord, num_sequences: int) -> None:
        began = time.monotonic()
        ticket = await self.enter(record.build(), ask("r", num_sequences=num_sequences, within_s=-1.0))
        if not isinstance(ticket, PlugmeshError):
            ticket.release(0)

        assert time.monotonic() - began < GRACE_S
