"""The official suite: nothing invalid is accepted, in any spelling, and far more agrees than with the engines' own converters."""

from __future__ import annotations

import os

import pytest

from plugmesh_grammar.schema import conformance

needed = bool(os.environ.get("CI") or os.environ.get("PLUGMESH_REQUIRE_SUITE"))
present = conformance.suite_folder().is_dir()
pytestmark = pytest.mark.skipif(not present and not needed, reason="scripts/fetch_json_schema_suite fetches the suite")

FAST = {"properties", "oneOf", "not", "required", "patternProperties", "minimum", "prefixItems", "dependentRequired", "const", "anchor", "if-then-else", "contains", "uniqueItems"}


@pytest.mark.parametrize("engine", list(conformance.ENGINES))
def test_a_part_of_the_suite(engine: str) -> None:
    pytest.importorskip(engine)
    found, wrong = conformance.measure(engine, files=FAST)
    assert [] == wrong
    sums = conformance.total(found)
    assert sums["over-accept"] == 0 and sums["over-reject"] <= 1
    assert sums["agree"] >= {"xgrammar": 290, "llguidance": 275}[engine]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "least"), [("xgrammar", 1120), ("llguidance", 1090)])
def test_the_whole_suite(engine: str, least: int) -> None:
    pytest.importorskip(engine)
    found, wrong = conformance.measure(engine)
    sums = conformance.total(found)
    assert conformance.NUM_CASES == sum(sums.values())
    assert [] == wrong
    assert sums["over-accept"] == 0
    assert sums["agree"] >= least
