"""Whether two sets of sampled tokens are of one distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ALPHA = 1e-4  # a fair plugin is refused once in 10,000 runs; seeds are fixed, so a run that passes will pass again


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


def compare_samples(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], num_tokens: int) -> tuple[list[ChiSquare], str]:
    """Compares each of the first `num_tokens` positions, and each pair of neighbours.

    Args:
        first, second: Tokens after one prompt, each sample drawn with a seed of its own that no other sample of either side has.

    Returns: All tests, and what the least likely of them says when it is less likely than ALPHA, shared among them.
    """
    features: list[Callable[[Sequence[int]], object]] = [lambda t, i=i: tuple(t[i : i + 1]) for i in range(num_tokens)]  # type: ignore[misc]
    features += [lambda t, i=i: tuple(t[i : i + 2]) for i in range(num_tokens - 1)]  # type: ignore[misc]
    tests = [chi_square(Counter(map(feature, first)), Counter(map(feature, second))) for feature in features]
    worst = min(tests, key=lambda t: t.p)
    if worst.p >= ALPHA / len(tests):
        return tests, ""
    return tests, f"not the same distribution: chi-square {worst.statistic:.1f} with {worst.num_degrees} degrees of freedom, p = {worst.p:.2g}"
