"""The gateway's metrics; `docs/operations.md` defines them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from plugmesh.metrics import Metrics

_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


class GapHistogram:
    """A histogram for the path of every token: adding costs a tenth of prometheus_client's, whose locks one thread does not need."""

    def __init__(self, name: str, help: str, buckets: tuple[float, ...], registry: prometheus_client.CollectorRegistry) -> None:
        self._name, self._help, self._buckets = name, help, buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)  # type: ignore[arg-type] # it has `collect`, which is all that a registry asks for

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(self._buckets, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[prometheus_client.Metric]:
        total, rows = 0, []
        for bound, count in zip((*self._buckets, float("inf")), self._counts, strict=True):
            total += count
            rows.append((floatToGoString(bound), total))
        yield HistogramMetricFamily(self._name, self._help, rows, self._sum)


class GatewayMetrics:
    """Counters and histograms of one gateway.

    TTFT is from arrival to the first token frame, ITL the gaps between texts of one sequence as they leave for the client,
    TPOT (E2E - TTFT) / (tokens - 1) over a request with more than one token, E2E from arrival to the terminal state.
    """

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        made = Metrics(registry)
        self._made = made
        self.requests = made.counter("gateway_requests_total", "Requests that reached a terminal state", ("route", "outcome"))
        self.refused = made.counter("gateway_refused_total", "Requests refused before admission or shed", ("code",))
        self.tokens = made.counter("gateway_tokens_total", "Tokens of finished requests", ("kind",))
        self.ttft = made.histogram("ttft_seconds", "Arrival to first token", ("route",), _LONG)
        self.tpot = made.histogram("tpot_seconds", "Mean time per output token after the first", ("route",), _SHORT)
        self.itl = GapHistogram("plugmesh_itl_seconds", "Gaps between streamed texts of one sequence", _SHORT, registry)
        self.e2e = made.histogram("e2e_seconds", "Arrival to terminal state", ("route",), _LONG)
        self.migrated = made.counter("gateway_migrated_total", "Running requests moved to another decode instance", ("cause",))
        self.replayed = made.counter("gateway_detokenizer_replays_total", "Sequences reopened on another tokenizer instance")
        self.frames = made.counter("gateway_frames_total", "Token frames received")
        self.children = made.counter("gateway_strategy_children_total", "Generations that strategies started, by how they ended", ("strategy", "outcome"))
        self.grammars = made.counter("gateway_grammars_total", "Grammars of requests, by what the grammar service said", ("kind", "outcome"))
        self.slow_readers = made.counter("gateway_slow_readers_total", "Requests ended because their client read too slowly")

    def count_tokens(self, num_prompt: int, num_completion: int, num_cached: int) -> None:
        self.tokens.labels("prompt").inc(num_prompt)
        self.tokens.labels("completion").inc(num_completion)
        self.tokens.labels("cached").inc(num_cached)

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        self._made.gauge(name, help).set_function(read)
