"""Judging outputs and counting them."""

from __future__ import annotations

import pytest

from plugmesh.bench.structured.scoring import (
    CaseResult,
    Extracted,
    Judge,
    Judgement,
    extraction_shares,
    only_object,
    per_keyword,
    plain,
    refusals,
    total,
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize(
    ("schema", "text", "reason"),
    [
        ({"type": "integer"}, "3", ""),
        ({"type": "integer"}, "3.0", ""),
        ({"type": "integer"}, "3.5", "type at $"),
        ({"type": "integer"}, "true", "type at $"),
        ({"multipleOf": 0.01}, "0.07", ""),  # not with binary floats
        ({"multipleOf": 0.01}, "0.075", "multipleOf at $"),
        ({"multipleOf": 0.01, "type": "integer"}, "7.00", ""),
        ({"type": "string", "format": "date"}, '"2024-02-29"', ""),
        ({"type": "string", "format": "date"}, '"2023-02-29"', "format at $"),
        ({"type": "string", "format": "ipv4"}, '"1.2.3.256"', "format at $"),
        ({"properties": {"a": {"items": {"maximum": 1}}}}, '{"a": [0, 2]}', "maximum at $.a[1]"),
        ({}, '{"a": 1', "not JSON: Expecting ',' delimiter"),
        ({}, "NaN", "not JSON: NaN is no JSON"),
        ({}, "1 2", "not JSON: Extra data"),
        ({}, "", "not JSON: Expecting value"),
    ],
)
def test_an_output_is_valid_or_the_reason_is_named(judge: Judge, schema: dict[str, object], text: str, reason: str) -> None:
    assert judge.why_invalid(schema, text) == reason
    assert judge.judge(schema, text).verdict == ("invalid" if reason else "valid")


def test_keys_that_come_twice_are_noticed_at_any_depth(judge: Judge) -> None:
    assert judge.judge({}, '{"a": {"b": 1, "b": 2}}') == Judgement("valid", has_duplicates=True)
    assert not judge.judge({}, '{"a": {"b": 1}, "b": [{"b": 2}]}').has_duplicates


def test_formats_that_the_checker_does_not_know_are_told(judge: Judge) -> None:
    assert {"date", "ipv4", "email", "uuid"} <= judge.checked_formats


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        (' {"a": 1}\n', {"a": 1}, {"a": 1}),
        ('```json\n{"a": 1}\n```', None, {"a": 1}),
        ('Here: {"a": {"b": 1}}. Good?', None, {"a": {"b": 1}}),
        ('{"a": 1', None, None),
        ("[1]", None, None),
        ("", None, None),
    ],
)
def test_an_answer_is_an_object_as_it_is_or_leniently(text: str, strict: object, lenient: object) -> None:
    assert only_object(text) == strict
    assert only_object(text, lenient=True) == lenient


def test_counts_are_per_keyword_and_a_schema_counts_for_each_of_its_keywords() -> None:
    good, bad = Judgement("valid"), Judgement("invalid", "type at $")
    results = [
        CaseResult("a-0", ("enum", "type"), engine="x", example_accepted=True, judgements=(good, good, Judgement("cut"))),
        CaseResult("a-1", ("type",), engine="y", example_accepted=False, judgements=(good, bad, Judgement("broken"), Judgement("valid", has_duplicates=True))),
        CaseResult("b-0", ("not",), code="unsupported_grammar", keyword="not", path="/not"),
    ]
    found = per_keyword(results)

    assert ["enum", "not", "type"] == list(found)
    assert (2, 2, 0, 1) == (found["type"].num_schemas, found["type"].num_accepted, found["type"].num_refused, found["type"].num_examples_rejected)
    assert (4, 1, 1, 1, 1) == (found["type"].valid, found["type"].invalid, found["type"].cut, found["type"].broken, found["type"].num_duplicates)
    assert found["enum"].is_sound and not found["type"].is_sound
    assert (3, 2, 1) == (total(results).num_schemas, total(results).num_accepted, total(results).num_refused)
    assert {"unsupported_grammar: not": 1} == refusals(results)
    assert {"x": 1, "y": 1} == plain(results)["engines"]


def test_extraction_shares_are_of_answers_and_of_fields() -> None:
    shares = extraction_shares([Extracted(True, True, True, 3, 4, False), Extracted(False, True, False, 0, 6, True)])

    assert {"num": 2, "json": 0.5, "json_leniently": 1.0, "valid": 0.5, "cut": 0.5, "right_fields": 0.3} == shares
