"""The gateway's metrics; `docs/operations.md` defines them."""

from __future__ import annotations

from collections.abc import Callable

import prometheus_client

from plugmesh.metrics import Metrics

_LONG = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)


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
        self.itl = made.histogram("itl_seconds", "Gaps between streamed texts of one sequence", (), _SHORT)
        self.e2e = made.histogram("e2e_seconds", "Arrival to terminal state", ("route",), _LONG)
        self.migrated = made.counter("gateway_migrated_total", "Running requests moved to another decode instance", ("cause",))
        self.replayed = made.counter("gateway_detokenizer_replays_total", "Sequences reopened on another tokenizer instance")
        self.frames = made.counter("gateway_frames_total", "Token frames received")
        self.slow_readers = made.counter("gateway_slow_readers_total", "Requests ended because their client read too slowly")

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        self._made.gauge(name, help).set_function(read)
