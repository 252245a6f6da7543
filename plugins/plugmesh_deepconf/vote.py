"""Which traces count, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between ranks, as numpy's default. Raises ValueError without values."""
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def stop_bar(lowest: Sequence[float], keep_percent: float) -> float:
    """The group mean below which a trace is stopped, from the lowest groups of the warm-up's traces: 90 keeps about 90 % of such traces, 10 about 10 %."""
    return percentile(lowest, 100 - keep_percent)


def keep_top(scores: Sequence[float], keep_percent: float) -> list[int]:
    """Indices of the best `keep_percent` of the scores, rounded, one at least; of equal ones the earlier. In order of index."""
    num = max(1, math.floor(len(scores) * keep_percent / 100 + 0.5)) if scores else 0
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:num]
    return sorted(best)


def weighted_vote(ballots: Iterable[tuple[str | None, float]]) -> dict[str, float]:
    """Answers with the sum of their weights, the winner first; of equal ones the answer that came first. A ballot without an answer does not count."""
    sums: dict[str, float] = {}
    for answer, weight in ballots:
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def consensus(votes: dict[str, float]) -> float:
    """The winner's part of all weight, 0 to 1."""
    total = math.fsum(votes.values())
    return next(iter(votes.values())) / total if total > 0 else 0.0
