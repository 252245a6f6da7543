"""The routing policies: each gives instances a score, and the lowest wins.

Source: AIBrix, arXiv:2504.03648, section on the gateway, and the defaults of its public code.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

from plugmesh.records import RouteRequest
from plugmesh.types import InstanceInfo
from plugmesh_aibrix_routing.index import PrefixIndex
from plugmesh_aibrix_routing.load import Loads

Score = Callable[[RouteRequest, Sequence[InstanceInfo]], list[float]]


def random_choice(rng: random.Random) -> Score:
    return lambda request, instances: [rng.random() for _ in instances]


def round_robin(request: RouteRequest, instances: Sequence[InstanceInfo]) -> list[float]:
    """All are equal: the router lets equals take turns."""
    return [0.0] * len(instances)


def least_request(loads: Loads) -> Score:
    """Fewest requests that run or wait."""
    return lambda request, instances: [loads.num_requests(i) for i in instances]


def power_of_two(loads: Loads, rng: random.Random) -> Score:
    """The less busy of two that are drawn: nearly as even as asking all, and a wrong number misleads fewer requests."""

    def score(request: RouteRequest, instances: Sequence[InstanceInfo]) -> list[float]:
        drawn = set(rng.sample(range(len(instances)), min(2, len(instances))))
        return [loads.num_requests(info) if i in drawn else float("inf") for i, info in enumerate(instances)]

    return score


def least_kv_cache(loads: Loads) -> Score:
    """Smallest share of KV blocks in use; of equal ones, the one with fewer requests. The shares are as old as the leases."""

    def score(request: RouteRequest, instances: Sequence[InstanceInfo]) -> list[float]:
        shares = [i.load.get("kv_blocks_used", 0.0) / max(1.0, i.load.get("kv_blocks_total", 0.0)) for i in instances]
        return [share + 1e-6 * loads.num_requests(i) for share, i in zip(shares, instances, strict=True)]

    return score


def least_latency(loads: Loads) -> Score:
    """Shortest time that a request of this length would take, by what requests of this gateway took lately."""
    return lambda request, instances: [loads.latency_s(i, request.max_tokens) for i in instances]


def throughput(loads: Loads) -> Score:
    """Fewest pending tokens, where a token of a prompt counts twice."""
    return lambda request, instances: [loads.weighted_tokens(i) for i in instances]


def prefix_cache(loads: Loads, index: PrefixIndex, *, imbalance_requests: int, load_sigma: float, min_match_share: float = 0.0) -> Score:
    """Where most of the prompt is cached, unless that instance is too busy.

    1. When requests differ by more than `imbalance_requests` between instances, only the idlest ones are considered.
    2. Of those, the one with the longest cached prefix whose requests are at most mean + `load_sigma` deviations; of equal
       prefixes, the one with fewer requests.
    3. Without any match, the one with the fewest requests.

    A match of less than `min_match_share` of the prompt's blocks counts as none (the paper's rule has no such bound): all chats share
    the few blocks of their template, and would follow them to one instance.

    With two instances the second rule never refuses at 2 deviations (the mean plus one deviation is the larger of two
    numbers), so that the first one is what balances them.
    """

    def score(request: RouteRequest, instances: Sequence[InstanceInfo]) -> list[float]:
        requests = [loads.num_requests(i) for i in instances]
        matched = index.num_matched(request.block_ids, [i.instance_id for i in instances])
        lowest = min(requests)
        is_uneven = max(requests) - lowest > imbalance_requests
        allowed = [not is_uneven or n == lowest for n in requests]
        # The mean is over all instances: it says what is usual here.
        limit = statistics.fmean(requests) + load_sigma * statistics.pstdev(requests)
        most = max(1.0, max(requests))
        enough = min_match_share * len(request.block_ids)
        scores = []
        for info, num, may in zip(instances, requests, allowed, strict=True):
            if not may:
                scores.append(float("inf"))
                continue
            useful = matched[info.instance_id] if num <= limit + 1e-9 and matched[info.instance_id] >= enough else 0
            scores.append(-useful + num / (most + 1.0))  # below 1 apart, so that requests only decide between equal prefixes
        return scores

    return score
