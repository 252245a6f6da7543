"""The suites of the kit."""

from __future__ import annotations

from plugmesh.testing.conformance import CardConformance
from plugmesh.testing.conformance.strategy import StrategyConformance


class TestCard(CardConformance):
    slug = "deepconf"


class TestDefaults(StrategyConformance):
    slug = "deepconf"


class TestOnline(StrategyConformance):
    slug = "deepconf"
    settings = {"window": 4, "warmup": 4, "batch": 4, "keep_percent": 50.0, "traces": 16, "consensus": 1.0}


class TestOffline(StrategyConformance):
    slug = "deepconf"
    options = {"mode": "offline", "traces": 12, "window": 3, "keep_percent": 10}


class TestMajority(StrategyConformance):
    slug = "deepconf"
    options = {"mode": "majority", "traces": 5}
