"""The router of one gateway process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from plugmesh.errors import Unavailable
from plugmesh.records import KvEvent, Route, Router, RouteRequest
from plugmesh.types import InstanceInfo
from plugmesh_aibrix_routing import policies
from plugmesh_aibrix_routing.index import PrefixIndex
from plugmesh_aibrix_routing.load import Loads

if TYPE_CHECKING:
    from plugmesh_aibrix_routing.plugin import Settings

log = structlog.get_logger()


class ScoreRouter:
    """Chooses the instance with the lowest score; equal ones take turns. See `plugmesh.records.Router`."""

    def __init__(self, score: policies.Score, loads: Loads) -> None:
        self.loads = loads
        self._score = score
        self._turn = 0

    def route(self, request: RouteRequest, decode: Sequence[InstanceInfo], prefill: Sequence[InstanceInfo]) -> Route:
        if not decode:
            raise Unavailable("no decode instance lives", retry_after_s=1)
        self.on_finished(request.request_id)  # a second routing of the same request replaces the first
        shift = self._turn % len(decode)
        self._turn += 1
        in_turn = [*decode[shift:], *decode[:shift]]
        scores = self._score(request, in_turn)
        chosen = in_turn[scores.index(min(scores))].instance_id
        self.loads.begin(request.request_id, chosen, request.num_prompt_tokens, request.max_tokens)
        self.on_chosen(request, chosen)
        return Route(chosen)

    def on_chosen(self, request: RouteRequest, instance_id: str) -> None:
        """For policies that remember where prompts went."""

    def on_progress(self, request_id: str, num_tokens: int) -> None:
        self.loads.progress(request_id, num_tokens)

    def on_finished(self, request_id: str) -> None:
        self.loads.end(request_id)


class PrefixRouter(ScoreRouter):
    """Follows the prefix caches of the instances."""

    def __init__(self, score: policies.Score, loads: Loads, index: PrefixIndex) -> None:
        super().__init__(score, loads)
        self.index = index

    def on_chosen(self, request: RouteRequest, instance_id: str) -> None:
        self.index.expect(request.request_id, instance_id, request.block_ids)

    def on_progress(self, request_id: str, num_tokens: int) -> None:
        if self.loads.progress(request_id, num_tokens):
            self.index.started(request_id)

    def on_finished(self, request_id: str) -> None:
        self.loads.end(request_id)
        self.index.ended(request_id)

    def on_kv_event(self, event: KvEvent) -> None:
        self.index.on_event(event)


def build_router(settings: Settings, clock: Callable[[], float] = time.monotonic) -> Router:
    """The router of `settings.policy`; only the one that uses events has `on_kv_event`, so that others cost no message."""
    loads, rng = Loads(clock), random.Random(settings.seed)
    log.info(
        "aibrix.router", policy=settings.policy, imbalance_requests=settings.imbalance_requests, load_sigma=settings.load_sigma,
        min_match_share=settings.min_match_share, max_blocks=settings.max_blocks, expect_s=settings.expect_s,
    )
    if settings.policy == "prefix-cache":
        index = PrefixIndex(settings.max_blocks, settings.expect_s, clock)
        score = policies.prefix_cache(
            loads, index, imbalance_requests=settings.imbalance_requests, load_sigma=settings.load_sigma, min_match_share=settings.min_match_share
        )
        return PrefixRouter(score, loads, index)
    scores: dict[str, policies.Score] = {
        "random": policies.random_choice(rng), "round-robin": policies.round_robin, "least-request": policies.least_request(loads),
        "power-of-two": policies.power_of_two(loads, rng), "least-kv-cache": policies.least_kv_cache(loads),
        "least-latency": policies.least_latency(loads), "throughput": policies.throughput(loads),
    }
    return ScoreRouter(scores[settings.policy], loads)
