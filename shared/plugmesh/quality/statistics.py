"""Intervals by resampling: items of a test, blocks of a text, rounds of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % percentile bootstrap interval; of a single item low equals high equals value."""

    value: float
    low: float
    high: float


def bootstrap(items: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> Interval:
    """Resamples the first axis.

    Args:
        items: (n, ...) one row per independent item.
        statistic: (resamples, n, ...) to (resamples,); called with all resamples at once.

    Raises:
        ValueError: No items.
    """
    if len(items) == 0:
        raise ValueError("no items to take a statistic of")
    value = float(statistic(items[None])[0])
    if len(items) == 1:
        return Interval(value, value, value)
    rng = np.random.default_rng(seed)
    drawn = statistic(items[rng.integers(0, len(items), (NUM_RESAMPLES, len(items)))])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def mean(items: np.ndarray) -> Interval:
    """Of one number per item."""
    return bootstrap(np.asarray(items, np.float64), lambda drawn: drawn.mean(axis=1))


def exp_mean(items: np.ndarray) -> Interval:
    """exp of the mean: perplexity from negative log-likelihoods, their ratio from differences."""
    return bootstrap(np.asarray(items, np.float64), lambda drawn: np.exp(drawn.mean(axis=1)))


def ratio_of_rounds(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """The median of ours / theirs of the same round. Rounds in which a side has no positive value are left out; None when none is left.

    Few rounds give few distinct resamples: below six the interval is close to the whole range, and narrower than 95 % deserves.
    """
    pairs = [a / b for a, b in zip(ours, theirs, strict=True) if a > 0 and b > 0 and math.isfinite(a) and math.isfinite(b)]
    return bootstrap(np.array(pairs), lambda drawn: np.median(drawn, axis=1)) if pairs else None


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    """(n,) to means of runs of `size`, because neighbouring tokens of a text are not independent; a shorter end counts as a block of its own."""
    return np.array([values[i : i + size].mean() for i in range(0, len(values), size)])
