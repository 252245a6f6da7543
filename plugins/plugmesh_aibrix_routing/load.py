"""How busy each instance is: our own requests, known to the moment, and those of other gateways, guessed from its lease.

A lease is up to a second old. Counting only what it says sends a whole burst to one instance before the next lease tells;
counting it on top of our own requests counts those twice. So only what cannot have been ours counts as others': the
reported number less the most that we had there within the last seconds.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from plugmesh.types import InstanceInfo

REPORT_S = 2.0     # a lease tells of a moment at most this long ago
HALF_LIFE_S = 10.0 # of a measured latency: an instance that is not asked any more is tried again at some time
_NEW = 0.3         # weight of a new measurement


class RecentMax:
    """The largest value within the last `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._values: deque[tuple[float, int]] = deque()  # (when it ended to be current, value), values falling
        self.current = 0

    def set(self, value: int, now: float) -> None:
        """`value` from now on."""
        while self._values and self._values[-1][1] <= self.current:
            self._values.pop()
        if self.current > value:
            self._values.append((now, self.current))
        self.current = value
        self.max(now)

    def max(self, now: float) -> int:
        while self._values and self._values[0][0] <= now - self._window_s:
            self._values.popleft()
        return max(self.current, self._values[0][1]) if self._values else self.current


@dataclass(slots=True)
class _Running:
    instance_id: str
    began: float
    prompt_tokens: int          # 0 after the first token
    tokens_left: int
    first_at: float = 0.0
    num_tokens: int = 0


@dataclass(slots=True)
class _Instance:
    requests: RecentMax = field(default_factory=lambda: RecentMax(REPORT_S))
    prompt_tokens: int = 0
    tokens_left: int = 0
    ttft_s: float = 0.0
    token_s: float = 0.0
    measured_at: float = -math.inf
    last_used: float = 0.0


class Loads:
    """Work per instance, from requests as they begin, go on and end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._instances: dict[str, _Instance] = {}

    def begin(self, request_id: str, instance_id: str, num_prompt_tokens: int, max_tokens: int) -> None:
        now = self._clock()
        if instance_id not in self._instances and len(self._instances) >= 1024:  # ids of instances that left
            idle = [n for n, i in self._instances.items() if not i.requests.current]
            for name in sorted(idle, key=lambda n: self._instances[n].last_used)[:512]:
                del self._instances[name]
        instance = self._instances.setdefault(instance_id, _Instance())
        instance.last_used = now
        self._running[request_id] = _Running(instance_id, now, num_prompt_tokens, max_tokens)
        instance.requests.set(instance.requests.current + 1, now)
        instance.prompt_tokens += num_prompt_tokens
        instance.tokens_left += max_tokens

    def progress(self, request_id: str, num_tokens: int) -> bool:
        """More tokens came. True when they are the first ones."""
        running = self._running.get(request_id)
        if running is None or not num_tokens:
            return False
        instance, now = self._instances[running.instance_id], self._clock()
        is_first = not running.num_tokens
        if is_first:
            running.first_at = now
            instance.prompt_tokens -= running.prompt_tokens
            running.prompt_tokens = 0
            instance.ttft_s = self._blend(instance.ttft_s, now - running.began, instance.measured_at)
            instance.measured_at = now
        running.num_tokens += num_tokens
        done = min(num_tokens, running.tokens_left)
        running.tokens_left -= done
        instance.tokens_left -= done
        return is_first

    def end(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is None:
            return
        instance, now = self._instances[running.instance_id], self._clock()
        instance.requests.set(instance.requests.current - 1, now)
        instance.prompt_tokens -= running.prompt_tokens
        instance.tokens_left -= running.tokens_left
        if running.num_tokens > 1:
            instance.token_s = self._blend(instance.token_s, (now - running.first_at) / (running.num_tokens - 1), instance.measured_at)
            instance.measured_at = now

    def num_requests(self, info: InstanceInfo) -> float:
        """Requests that run or wait on an instance."""
        reported = info.load.get("num_running", 0.0) + info.load.get("num_waiting", 0.0)
        instance = self._instances.get(info.instance_id)
        if instance is None:
            return reported
        return instance.requests.current + max(0.0, reported - instance.requests.max(self._clock()))

    def weighted_tokens(self, info: InstanceInfo) -> float:
        """Twice the prompt tokens that wait for their first token, plus the tokens that may still be generated."""
        instance = self._instances.get(info.instance_id)
        return 2.0 * instance.prompt_tokens + instance.tokens_left if instance is not None else 0.0

    def latency_s(self, info: InstanceInfo, num_tokens: int) -> float:
        """What a request of so many generated tokens took lately; an old measurement fades towards 0, so that it is renewed."""
        instance = self._instances.get(info.instance_id)
        if instance is None or instance.measured_at == -math.inf:
            return 0.0
        fading = 0.5 ** ((self._clock() - instance.measured_at) / HALF_LIFE_S)
        return (instance.ttft_s + instance.token_s * num_tokens) * fading * (1.0 + instance.requests.current)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @staticmethod
    def _blend(old: float, new: float, measured_at: float) -> float:
        return new if measured_at == -math.inf or not old else old + _NEW * (new - old)
