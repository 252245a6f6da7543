"""What the smoke test holds structured output against: its own reading of the schemas agrees with jsonschema's."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FILE = pathlib.Path(__file__).resolve().parents[2] / "compose" / "structured.py"
spec = importlib.util.spec_from_file_location("compose_structured", FILE)
assert spec is not None and spec.loader is not None
structured = importlib.util.module_from_spec(spec)
spec.loader.exec_module(structured)

GOOD = {"city": "Lyon", "inhabitants": 5, "sights": ["a", "b"]}
text = st.text(max_size=18)
value = st.one_of(st.none(), st.booleans(), st.integers(-1, 20_000_001), text, st.lists(text, max_size=3), st.lists(st.integers(), max_size=2), st.sampled_from(["Nice"]))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["city", "inhabitants", "sights", "more"]), value), st.sets(st.sampled_from(sorted(GOOD))))
def test_its_verdict_is_that_of_jsonschema(found: dict[str, Any], kept: set[str]) -> None:
    found = {**found, **{name: GOOD[name] for name in kept}}

    assert jsonschema.Draft202012Validator(structured.SCHEMA).is_valid(found) == (structured.held(json.dumps(found), structured.SCHEMA) == "")


@pytest.mark.parametrize(("content", "problem"), [
    (json.dumps(GOOD), ""), ("Lyon", "no JSON"), ("[]", "no object"), (json.dumps({**GOOD, "sights": ["x" * 13]}), "/sights/0 is out of bounds"),
    (json.dumps({**GOOD, "city": "Oslo"}), "/city is none of the enum"),
])  # fmt: skip
def test_an_answer_that_breaks_the_schema_fails_the_check(content: str, problem: str) -> None:
    reply = {"choices": [{"finish_reason": "stop", "message": {"content": content}}]}
    found = structured.strict_schema(lambda body: (200, reply))

    assert problem in found and bool(problem) == bool(found)


@pytest.mark.parametrize(("function", "is_good"), [
    ({"name": "get_forecast", "arguments": '{"city": "Oslo", "num_days": 3}'}, True), ({"name": "other", "arguments": '{"city": "Oslo", "num_days": 3}'}, False),
    ({"name": "get_forecast", "arguments": '{"city": "Oslo", "num_days": 10}'}, False), ({"name": "get_forecast", "arguments": "{"}, False),
])  # fmt: skip
def test_a_call_that_was_not_declared_fails_the_check(function: dict[str, str], is_good: bool) -> None:
    reply = {"choices": [{"finish_reason": "tool_calls", "message": {"content": None, "tool_calls": [{"function": function}]}}]}

    assert is_good == (structured.tool_call(lambda body: (200, reply)) == "")


def test_any_other_answer_to_a_schema_that_cannot_be_enforced_fails_the_check() -> None:
    error = {"code": "unsupported_grammar", "param": "response_format.json_schema.schema"}

    assert structured.refusal(lambda body: (400, {"error": error})) == ""
    for status, reply in ((200, {"choices": []}), (400, {"error": {**error, "code": "x"}}), (500, {"error": error})):
        assert structured.refusal(lambda body, status=status, reply=reply: (status, reply))
