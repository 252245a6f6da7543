"""Whether a plugin changes the output as little as its card says.

    exact   the same tokens, greedy and sampled with a seed, with the plugin and without
    dist    tokens of the same distribution: chi-square over many seeds on a small model
    lossy   `[loss]` in the card names the metric and the bound, and a measured value is held against it

The checks take two ways of answering requests, so they work on engines in this process, on a mesh, or on anything else:

    fidelity.check_exact(lambda work: play(fake_engine(), work), lambda work: play(fake_engine(scheduler=mine), work), work)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from plugmesh.cards import Card
from plugmesh.quality.samples import ALPHA, ChiSquare, chi_square, compare_samples

__all__ = ["ALPHA", "ChiSquare", "NotFaithful", "check_distribution", "check_exact", "check_loss", "chi_square"]

W = TypeVar("W")


class NotFaithful(AssertionError):
    """The output is further from that without the plugin than the card allows."""


def check_exact(without: Callable[[W], object], with_: Callable[[W], object], work: W) -> None:
    """Both answers to the same work are equal; it should hold greedy and sampled requests. Raises NotFaithful."""
    expected, got = without(work), with_(work)
    if expected != got:
        raise NotFaithful(f"the output differs: {_first_difference(expected, got)}")


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
    tests, difference = compare_samples(first, second, num_tokens)
    if difference:
        raise NotFaithful(difference)
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
