"""Whether a plugin changes the output as little as its card says.

    exact   the same tokens, greedy and sampled with a seed, with the plugin and without
    dist    tokens of the same distribution: chi-square over many seeds on a small model
    lossy   `[loss]` in the card names the metric and the bound, and a measured value is held against it

The checks take two ways of answering requests, so they work on engines in this process, on a mesh, or on anything else:

    fidelity.check_exact(lambda work: play(fake_engine(), work), lambda work: play(fake_engine(scheduler=mine), work), work)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from plugmesh.cards import Card

W = TypeVar("W")
ALPHA = 1e-4  # a fair plugin is refused once in 10,000 runs; seeds are fixed, so a run that passes will pass again


class NotFaithful(AssertionError):
    """The output is further from that without the plugin than the card allows."""


def check_exact(without: Callable[[W], object], with_: Callable[[W], object], work: W) -> None:
    """Both answers to the same work are equal; it should hold greedy and sampled requests. Raises NotFaithful."""
    expected, got = without(work), with_(work)
    if expected != got:
        raise NotFaithful(f"the output differs: {_first_difference(expected, got)}")


@dataclass(frozen=True, slots=True)
class ChiSquare:
    """Two samples compared. `p` is how often samples of one distribution differ at least as much."""

    statistic: float
    num_degrees: int
    p: float


def chi_square(first: Mapping[object, int], second: Mapping[object, int], *, min_expected: float = 5.0) -> ChiSquare:
    """Two-sample test of homogeneity over counts per outcome; outcomes that are too rare to judge are put together.

    Source of the tail: Wilson and Hilferty 1931, off by less than 0.001 where it matters here.
    """
    num_first, num_second = sum(first.values()), sum(second.values())
    assert num_first and num_second
    least = min(num_first, num_second) / (num_first + num_second)
    cells: list[tuple[int, int]] = []
    rare = (0, 0)
    for key in {**dict(first), **dict(second)}:
        pair = (first.get(key, 0), second.get(key, 0))
        if sum(pair) * least >= min_expected:
            cells.append(pair)
        else:
            rare = (rare[0] + pair[0], rare[1] + pair[1])
    if sum(rare) * least >= min_expected or not cells:
        cells.append(rare)
    statistic = 0.0
    for a, b in cells:
        expected_a = (a + b) * num_first / (num_first + num_second)
        expected_b = (a + b) - expected_a
        statistic += (a - expected_a) ** 2 / expected_a + (b - expected_b) ** 2 / expected_b
    degrees = max(1, len(cells) - 1)
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return ChiSquare(statistic, degrees, 0.5 * math.erfc(z / math.sqrt(2)))


def check_distribution(
    without: Callable[[Sequence[int]], Sequence[Sequence[int]]],
    with_: Callable[[Sequence[int]], Sequence[Sequence[int]]],
    *,
    num_samples: int = 2000,
    num_tokens: int = 3,
) -> list[ChiSquare]:
    """Samples of both sides are of one distribution, at each of the first `num_tokens` positions and for each pair of neighbours.

    Args:
        without, with_: Take seeds and give for each the tokens sampled after one fixed prompt, at least `num_tokens`. The sides
            get different seeds, so that equal randomness does not hide a difference in distribution nor make one up.

    Raises:
        NotFaithful: Some position is less likely than ALPHA, shared among all the tests made.
    """
    first = without(range(num_samples))
    second = with_(range(num_samples, 2 * num_samples))
    tests: list[ChiSquare] = []
    features: list[Callable[[Sequence[int]], object]] = [lambda t, i=i: t[i] for i in range(num_tokens)]  # type: ignore[misc]
    features += [lambda t, i=i: (t[i], t[i + 1]) for i in range(num_tokens - 1)]  # type: ignore[misc]
    for feature in features:
        tests.append(chi_square(Counter(map(feature, first)), Counter(map(feature, second))))
    worst = min(tests, key=lambda t: t.p)
    if worst.p < ALPHA / len(tests):
        raise NotFaithful(f"not the same distribution: chi-square {worst.statistic:.1f} with {worst.num_degrees} degrees of freedom, p = {worst.p:.2g}")
    return tests


def check_loss(card: Card, measured: Mapping[str, float], *, better: str = "lower") -> None:
    """The measured value of the card's metric is within its bound.

    Args:
        measured: Figures by name, those of `plugmesh ab` for example.
        better: Whether "lower" or "higher" values of the metric are better.

    Raises:
        NotFaithful: Over the bound, the metric was not measured, or the card promises nothing.
    """
    if card.loss is None:
        raise NotFaithful(f"the card of {card.slug!r} ({card.fidelity}) has no [loss]")
    if card.loss.metric not in measured:
        raise NotFaithful(f"{card.loss.metric!r} of {card.slug!r} was not measured; there are {', '.join(sorted(measured)) or 'no figures'}")
    value = measured[card.loss.metric]
    within = value <= card.loss.bound if better == "lower" else value >= card.loss.bound
    if not within or math.isnan(value):
        raise NotFaithful(f"{card.loss.metric} of {card.slug!r} is {value:.4g}, the card promises {card.loss.bound:.4g}")


def _first_difference(expected: object, got: object) -> str:
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key in {**expected, **got}:
            if expected.get(key) != got.get(key):
                return f"{key}: {_first_difference(expected.get(key), got.get(key))}"
    if isinstance(expected, Sequence) and isinstance(got, Sequence) and not isinstance(expected, str | bytes):
        for i, (a, b) in enumerate(zip(expected, got, strict=False)):
            if a != b:
                return f"[{i}] {_first_difference(a, b)}"
        return f"{len(expected)} items without it, {len(got)} with it"
    return f"{expected!r} without it, {got!r} with it"
