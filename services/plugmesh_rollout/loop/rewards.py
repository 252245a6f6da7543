"""Programmatic verifiers as records: `exact` and `partial`."""

from __future__ import annotations

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


class CoreRewards:
    """The core's own, through the plugins' door."""

    @hookimpl
    def register_rewards(self) -> list[RewardRecord]:
        return [RewardRecord("exact", Exact), RewardRecord("partial", Partial)]
