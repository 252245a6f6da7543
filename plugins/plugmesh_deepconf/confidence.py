"""Confidence of a trace from the confidences of its tokens: means over groups of consecutive tokens (DeepConf, arXiv:2508.15260, section 3).

A group is the last `window` tokens. A trace shorter than the window has one group, all of its tokens; it is never judged before it ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class GroupConfidence:
    """The running group mean of one trace; a token costs constant time.

    Attributes:
        num_tokens: Tokens so far.
        total: Sum of all confidences.
        lowest: Lowest mean of a full group; of a trace without one the mean of all tokens, infinity before the first.
    """

    __slots__ = ("_ring", "_sum", "lowest", "num_tokens", "total", "window")

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"a window of {window} tokens")
        self.window = window
        self.num_tokens = 0
        self.total = 0.0
        self.lowest = math.inf
        self._ring: list[float] = []
        self._sum = 0.0

    @property
    def is_full(self) -> bool:
        return self.num_tokens >= self.window

    def push(self, confidence: float) -> float:
        """Takes one token; gives the mean of the group that ends with it."""
        at = self.num_tokens % self.window
        self.num_tokens += 1
        self.total += confidence
        if len(self._ring) < self.window:
            self._ring.append(confidence)
            self._sum += confidence
        else:
            self._sum += confidence - self._ring[at]
            self._ring[at] = confidence
        if at == self.window - 1:
            self._sum = math.fsum(self._ring)  # once per round, so that rounding errors do not add up
        mean = self._sum / len(self._ring)
        if self.num_tokens < self.window:
            self.lowest = mean
        elif self.num_tokens == self.window:
            self.lowest = mean  # the means of incomplete groups do not count
        elif mean < self.lowest:
            self.lowest = mean
        return mean


@dataclass(frozen=True, slots=True)
class Scores:
    """The measures of a whole trace that the paper compares; all are 0 for a trace without tokens."""

    mean: float
    tail: float
    bottom: float
    lowest: float


def group_means(confidences: Sequence[float], window: int) -> list[float]:
    """The mean of every full group; of a shorter trace that of all its tokens."""
    if not confidences:
        return []
    group = GroupConfidence(window)
    means = [group.push(c) for c in confidences]
    return means[window - 1 :] or means[-1:]


def scores(confidences: Sequence[float], window: int, bottom_percent: float = 10.0) -> Scores:
    """Mean over all tokens, over the last group, over the lowest `bottom_percent` of groups (one at least), and of the lowest group."""
    if not confidences:
        return Scores(0.0, 0.0, 0.0, 0.0)
    means = group_means(confidences, window)
    num_bottom = max(1, int(len(means) * bottom_percent / 100))
    return Scores(
        mean=math.fsum(confidences) / len(confidences), tail=means[-1], bottom=math.fsum(sorted(means)[:num_bottom]) / num_bottom, lowest=min(means))
