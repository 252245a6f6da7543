"""Programmatic verifiers as records: `exact`, `partial` and `number`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.hookspecs import hookimpl
from plugmesh.records import RewardRecord


class Exact:
    """1 for the answer itself, else 0."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        if options:
            raise InvalidRequest("the reward exact has no options", param="reward")

    def score(self, prompt: str, answer: str, response: str) -> float:
        return float(response == answer)


class Partial:
    """1 for the answer; else `weight` (0.3) times the share of its characters that are right where they stand, of the longer of both."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        if set(options) - {"weight"}:
            raise InvalidRequest("the reward partial has one option, weight", param="reward")
        self._weight = float(options.get("weight", 0.3))

    def score(self, prompt: str, answer: str, response: str) -> float:
        if response == answer:
            return 1.0
        right = sum(a == b for a, b in zip(answer, response, strict=False))
        return self._weight * right / max(len(answer), len(response), 1)


class Number:
    """1 where the first number that the response names is the answer, else 0; `alone` (0) is the part of it that only a response gets which says nothing else.

    The first one, so that to name all numbers of a question gains nothing. A number is digits with a sign, points and commas: 8.5 and 8,200 are not 8.
    """

    _NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")

    def __init__(self, options: Mapping[str, Any]) -> None:
        if set(options) - {"alone"}:
            raise InvalidRequest("the reward number has one option, alone", param="reward")
        self._alone = float(options.get("alone", 0.0))

    def score(self, prompt: str, answer: str, response: str) -> float:
        found = self._NUMBER.search(response)
        if found is None or found[0] != answer:
            return 0.0
        return 1.0 if response.strip().removesuffix(".") == answer else 1.0 - self._alone


class CoreRewards:
    """The core's own, through the plugins' door."""

    @hookimpl
    def register_rewards(self) -> list[RewardRecord]:
        return [RewardRecord("exact", Exact), RewardRecord("partial", Partial), RewardRecord("number", Number)]
