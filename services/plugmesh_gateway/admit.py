"""Who may come in now: a bounded number of sequences and tokens in flight, a bounded queue by priority, 429 beyond it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections.abc import Sequence

import structlog

from plugmesh.errors import DeadlineExceeded, Overloaded, PluginError, PlugmeshError, Unavailable
from plugmesh.hookspecs import hookimpl
from plugmesh.host import PluginHost
from plugmesh.records import AdmissionPolicy, AdmissionRecord, AdmissionRequest, AdmissionTicket

log = structlog.get_logger()


class Ticket:
    """A place among the work in flight. `release` gives it back, once; later calls do nothing."""

    __slots__ = ("_admission", "_num_tokens", "_request", "_started")

    def __init__(self, admission: Admission, request: AdmissionRequest) -> None:
        self._admission = admission
        self._request = request
        self._num_tokens = 0
        self._started = time.monotonic()

    async def take_tokens(self, num_prompt_tokens: int, num_wanted_tokens: int) -> None:
        """Waits until so many more fit into the budget. Raises as `Admission.admit`."""
        num_tokens = num_prompt_tokens + num_wanted_tokens
        await self._admission._wait(0, num_tokens, self._request.priority, self._request.deadline)
        self._num_tokens += num_tokens

    def release(self, num_generated_tokens: int) -> None:
        admission, self._admission = self._admission, None  # type: ignore[assignment]
        if admission is not None:
            admission._give_back(self._request.num_sequences, self._num_tokens, time.monotonic() - self._started)


class Admission:
    """Bounded admission for one gateway process; used from its event loop only.

    Waiters leave in order of (priority, arrival). A waiter that needs more than is free holds up those behind it: without
    that, large requests starve. A request larger than a whole budget runs when it is alone.

    Args:
        max_places: Sequences in flight.
        max_queued: Waiters; one more is refused.
        max_tokens: Prompt plus wanted tokens in flight.
    """

    def __init__(self, *, max_places: int, max_queued: int, max_tokens: int) -> None:
        self.max_places = max_places
        self.max_queued = max_queued
        self.max_tokens = max_tokens
        self.num_places = 0
        self.num_tokens = 0
        self.is_draining = False
        self._order = itertools.count()
        self._heap: list[tuple[int, int, _Waiter]] = []  # for places
        self._token_heap: list[tuple[int, int, _Waiter]] = []
        self._typical_s = 1.0  # moving average of how long a place is held

    @property
    def num_queued(self) -> int:
        return len(self._heap) + len(self._token_heap)

    async def admit(self, request: AdmissionRequest) -> Ticket:
        """Waits for a place per sequence.

        Raises:
            Overloaded: The queue is full; carries retry_after_s.
            Unavailable: The gateway drains.
            DeadlineExceeded: The deadline passed in the queue.
        """
        await self._wait(request.num_sequences, 0, request.priority, request.deadline)
        return Ticket(self, request)

    async def _wait(self, num_places: int, num_tokens: int, priority: int, deadline: float) -> None:
        if self.is_draining and num_places:
            raise Unavailable("this gateway is shutting down", retry_after_s=1)
        heap = self._heap if num_places else self._token_heap
        if not heap and self._fits(num_places, num_tokens):
            self._take(num_places, num_tokens)
            return
        if num_places and len(self._heap) >= self.max_queued:
            raise Overloaded(
                f"{self.num_places} sequences are in flight and {len(self._heap)} requests wait; try again later",
                retry_after_s=self.retry_after_s())
        waiter = _Waiter(num_places, num_tokens)
        entry = (priority, next(self._order), waiter)
        heapq.heappush(heap, entry)
        try:
            async with asyncio.timeout_at(_loop_time(deadline)):
                await waiter.ready
        except BaseException as e:
            if not waiter.ready.done() or waiter.ready.cancelled():
                if not waiter.gone:
                    heap.remove(entry)
                    heapq.heapify(heap)
                self._let_in()
            else:  # let in during the same turn of the loop as the timeout or the cancellation
                self._give_back(num_places, num_tokens, None)
            if isinstance(e, TimeoutError):
                raise DeadlineExceeded("the deadline passed while the request waited for a place") from None
            raise

    def retry_after_s(self) -> float:
        """About when the queue will have moved: 1 to 60 seconds."""
        ahead = (len(self._heap) + 1) / self.max_places
        return float(min(60, max(1, math.ceil(self._typical_s * ahead))))

    def _fits(self, num_places: int, num_tokens: int) -> bool:
        places = self.num_places + num_places <= self.max_places or (num_places > 0 and self.num_places == 0)
        tokens = self.num_tokens + num_tokens <= self.max_tokens or (num_tokens > 0 and self.num_tokens == 0)
        return (places or not num_places) and (tokens or not num_tokens)

    def _take(self, num_places: int, num_tokens: int) -> None:
        self.num_places += num_places
        self.num_tokens += num_tokens

    def _give_back(self, num_places: int, num_tokens: int, held_s: float | None) -> None:
        self.num_places -= num_places
        self.num_tokens -= num_tokens
        assert self.num_places >= 0 and self.num_tokens >= 0
        if held_s is not None:
            self._typical_s += 0.1 * (held_s - self._typical_s)
        self._let_in()

    def _let_in(self) -> None:
        for heap in (self._token_heap, self._heap):
            while heap:
                waiter = heap[0][2]
                if waiter.ready.cancelled():  # its task removes it, as soon as it runs
                    heapq.heappop(heap)
                    waiter.gone = True
                    continue
                if not self._fits(waiter.num_places, waiter.num_tokens):
                    break
                heapq.heappop(heap)
                self._take(waiter.num_places, waiter.num_tokens)
                waiter.ready.set_result(None)


class _Waiter:
    __slots__ = ("gone", "num_places", "num_tokens", "ready")

    def __init__(self, num_places: int, num_tokens: int) -> None:
        self.num_places = num_places
        self.num_tokens = num_tokens
        self.gone = False
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class CoreAdmission:
    """Registers the core's bounds through the same hook as any plugin."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    @hookimpl
    def register_admission(self) -> list[AdmissionRecord]:
        return [AdmissionRecord("places", lambda: self._admission)]


class Admitted:
    """The tickets of all policies for one request."""

    __slots__ = ("_tickets",)

    def __init__(self) -> None:
        self._tickets: list[tuple[str, AdmissionTicket]] = []

    async def take_tokens(self, num_prompt_tokens: int, num_wanted_tokens: int) -> None:
        """Asks every policy. Raises what one of them raises; a PluginError for anything that is no PlugmeshError."""
        for name, ticket in self._tickets:
            try:
                await ticket.take_tokens(num_prompt_tokens, num_wanted_tokens)
            except PlugmeshError:
                raise
            except Exception as e:
                raise _failed(name, e) from e

    def release(self, num_generated_tokens: int) -> None:
        """Gives every ticket back, once; later calls do nothing. Never raises."""
        tickets, self._tickets = self._tickets, []
        for name, ticket in reversed(tickets):
            try:
                ticket.release(num_generated_tokens)
            except Exception as e:
                _failed(name, e)


class Admissions:
    """All policies as one: those of plugins first, the core's, which may let a request wait for a place, last."""

    def __init__(self, policies: Sequence[tuple[str, AdmissionPolicy]]) -> None:
        self._policies = policies

    @classmethod
    def choose(cls, host: PluginHost, core: Admission) -> Admissions:
        """Asks the plugins once per process. Raises ConfigError."""
        host.register_builtin(CoreAdmission(core))
        records = host.records("admission")
        return cls([(record.name, record.build()) for record in reversed(records)])

    async def admit(self, request: AdmissionRequest) -> Admitted:
        """Asks every policy. A refusal, an error or a cancellation gives back what others had granted.

        Raises:
            PlugmeshError: A policy refused.
            PluginError: A policy failed; it costs this request and nothing else.
        """
        admitted = Admitted()
        try:
            for name, policy in self._policies:
                try:
                    ticket = await policy.admit(request)
                except PlugmeshError:
                    raise
                except Exception as e:
                    raise _failed(name, e) from e
                admitted._tickets.append((name, ticket))
        except BaseException:
            admitted.release(0)
            raise
        return admitted


def _failed(name: str, error: Exception) -> PluginError:
    log.warning("plugin.failed", plugin=name, error=type(error).__name__)
    return PluginError(f"plugin {name!r} failed on this request", plugin=name)


def _loop_time(deadline: float) -> float:
    return asyncio.get_running_loop().time() + (deadline - time.monotonic())
