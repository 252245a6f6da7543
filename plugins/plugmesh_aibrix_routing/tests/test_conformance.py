"""The suites that every plugin of its kind passes."""

from __future__ import annotations

from typing import ClassVar

import pytest

from plugmesh.testing.conformance import AdmissionConformance, CardConformance, RouterConformance


class TestCard(CardConformance):
    slug = "aibrix_routing"


class TestPrefixCache(RouterConformance):
    slug = "aibrix_routing"


class TestSmallIndex(RouterConformance):
    slug = "aibrix_routing"
    settings: ClassVar = {"max_blocks": 3, "imbalance_requests": 0, "load_sigma": 0.0}


class TestPoliciesThatKeepNoPrefixes(RouterConformance):
    slug = "aibrix_routing"
    max_examples = 5

    @pytest.fixture(autouse=True, params=["power-of-two", "least-kv-cache", "least-latency"])
    def policy(self, request):
        type(self).settings = {"policy": request.param}


class TestRateLimits(AdmissionConformance):
    slug = "aibrix_routing"
    settings: ClassVar = {"requests_per_minute": 20, "tokens_per_minute": 5000}
