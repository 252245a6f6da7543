"""What a third party tests: the suites of its records, and its own idea."""

from __future__ import annotations

from plugmesh.testing.conformance import CardConformance, PrefillPolicyConformance
from plugmesh_hello.greeting import Greeter


class TestCard(CardConformance):
    slug = "hello"


class TestConformance(PrefillPolicyConformance):
    slug = "hello"
    settings = {"name": "tests", "every": 2}


def test_it_greets_again_after_every_so_many_requests() -> None:
    greeter = Greeter()
    greeter.begin("tests", 2)

    assert [greeter.count(5) for _ in range(4)] == [False, True, False, True]
    assert greeter.num_tokens == 20
