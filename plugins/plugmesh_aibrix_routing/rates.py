"""Requests and tokens per minute of each client.

As in AIBrix's gateway a request is refused while its client has used up its minute, and tokens are charged when they are
known: those of the prompt before it runs, the generated ones when it ends. One request may therefore overshoot the limit;
the next one waits for that. Departure: the minute slides, so that two full minutes cannot be spent across its border.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plugmesh.errors import Overloaded
from plugmesh.records import AdmissionRequest
from plugmesh_aibrix_routing.plugin import ClientLimits

WINDOW_S = 60


@dataclass(slots=True)
class Window:
    """What one client used in the last minute, in slots of a second."""

    num_requests: int = 0
    num_tokens: int = 0
    _slots: deque[tuple[int, int, int]] = field(default_factory=deque)  # (second, requests, tokens)

    def add(self, now: float, num_requests: int, num_tokens: int) -> None:
        self.expire(now)
        second = int(now)
        if self._slots and self._slots[-1][0] == second:
            _, requests, tokens = self._slots.pop()
        else:
            requests = tokens = 0
        self._slots.append((second, requests + num_requests, tokens + num_tokens))
        self.num_requests += num_requests
        self.num_tokens += num_tokens

    def expire(self, now: float) -> None:
        while self._slots and self._slots[0][0] + 1 + WINDOW_S <= now:  # the slot's last moment is a minute old
            _, requests, tokens = self._slots.popleft()
            self.num_requests -= requests
            self.num_tokens -= tokens

    def wait_s(self, now: float, max_requests: int, max_tokens: int) -> float:
        """How long until both are below their limits, if nothing more is used; 0 is without limit."""
        requests, tokens, wait = self.num_requests, self.num_tokens, 0.0
        for second, num_requests, num_tokens in self._slots:
            if not (max_requests and requests >= max_requests) and not (max_tokens and tokens >= max_tokens):
                break
            requests, tokens = requests - num_requests, tokens - num_tokens
            wait = second + WINDOW_S + 1 - now
        return wait


class RateLimits:
    """An `AdmissionPolicy`. Callers without a name share one budget.

    Args:
        default: Of clients that `own` does not name.
    """

    def __init__(
        self, default: ClientLimits, own: Mapping[str, ClientLimits], *, max_clients: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._default = default
        self._own = own
        self._max_clients = max_clients
        self._clock = clock
        self._windows: OrderedDict[str, Window] = OrderedDict()  # quiet longest first

    def __len__(self) -> int:
        return len(self._windows)

    async def admit(self, request: AdmissionRequest) -> Charge:
        """Raises Overloaded, with the seconds until the client has something left."""
        limits, now, window = self._own.get(request.client, self._default), self._clock(), self.window(request.client)
        wait_s = window.wait_s(now, limits.requests_per_minute, limits.tokens_per_minute)
        if wait_s > 0:
            what = (
                f"{window.num_requests} of {limits.requests_per_minute} requests"
                if limits.requests_per_minute and window.num_requests >= limits.requests_per_minute
                else f"{window.num_tokens} of {limits.tokens_per_minute} tokens"
            )
            raise Overloaded(f"rate limit: {what} of the last minute are used", retry_after_s=wait_s)
        window.add(now, 1, 0)
        return Charge(self, request.client)

    def window(self, client: str) -> Window:
        """The client's minute as of now."""
        window = self._windows.pop(client, None) or Window()
        self._windows[client] = window
        while len(self._windows) > self._max_clients:
            self._windows.popitem(last=False)
        window.expire(self._clock())
        return window

    def charge(self, client: str, num_tokens: int) -> None:
        if num_tokens:
            self.window(client).add(self._clock(), 0, num_tokens)


class Charge:
    """An `AdmissionTicket` that writes down what its request used."""

    __slots__ = ("_client", "_limits")

    def __init__(self, limits: RateLimits, client: str) -> None:
        self._limits = limits
        self._client = client

    async def take_tokens(self, num_prompt_tokens: int, num_wanted_tokens: int) -> None:
        self._limits.charge(self._client, num_prompt_tokens)

    def release(self, num_generated_tokens: int) -> None:
        self._limits.charge(self._client, num_generated_tokens)
