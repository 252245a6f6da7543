"""Structural tags as grammars: the language of the engine that knows structural tags by itself, on engines that know none."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.grammar.spec import GrammarSpec
from plugmesh.testing.grammar_oracle import vocabulary
from plugmesh_grammar.schema import lower
from plugmesh_grammar.schema.tags import tag_gbnf

AB: dict[str, Any] = {"type": "const_string", "value": "ab"}
TAG: dict[str, Any] = {"type": "tag", "begin": "<f>", "content": AB, "end": "</f>"}
OTHER: dict[str, Any] = {"type": "tag", "begin": "<fg>", "content": {"type": "regex", "pattern": "a*b"}, "end": ["</f>", "."]}
DEEP: dict[str, Any] = {"type": "tag", "begin": "[", "content": {"type": "grammar", "grammar": 'root ::= "(" inner* ")"\ninner ::= root | "a"'}, "end": "]"}
FREE: dict[str, Any] = {**TAG, "content": {"type": "any_text"}}
CALLS: dict[str, Any] = {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG, OTHER]}
LISTED: dict[str, Any] = {"type": "tags_with_separator", "tags": [TAG, OTHER], "separator": "ab"}
FORMATS: list[dict[str, Any]] = [
    AB, TAG, OTHER, DEEP, FREE, CALLS, LISTED,
    {"type": "any_text"}, {"type": "any_text", "excludes": ["<<", "aba"]}, {"type": "any_text", "max_chars": 2},
    {"type": "sequence", "elements": [AB, OTHER, {"type": "any_text"}]}, {"type": "sequence", "elements": [AB, CALLS]},
    {"type": "or", "elements": [AB, TAG, {"type": "const_string", "value": "a"}]},
    {"type": "optional", "content": AB}, {"type": "plus", "content": AB}, {"type": "star", "content": TAG},
    {"type": "repeat", "min": 1, "max": 2, "content": AB}, {"type": "repeat", "min": 2, "max": -1, "content": AB},
    {**FREE, "end": ["</f>", ".."]},
    {**CALLS, "at_least_one": True}, {**CALLS, "stop_after_first": True}, {**CALLS, "at_least_one": True, "stop_after_first": True},
    {**CALLS, "excludes": ["b<", "()"]}, {"type": "triggered_tags", "triggers": ["[", "<f"], "tags": [DEEP, FREE]},
    {**LISTED, "at_least_one": True}, {**LISTED, "stop_after_first": True}, {**LISTED, "at_least_one": True, "stop_after_first": True},
]  # fmt: skip
PIECES = ["<", "f", "fg", ">", "<f>", "<fg>", "</f>", "</", ".", "ab", "a", "b", "[", "]", "(", ")", "[(a)]", "<f>ab</f>", "é", "\n"]


def source_of(format: dict[str, Any]) -> str:
    return json.dumps({"type": "structural_tag", "format": format})


@functools.cache
def compiled(engine: str, source: str) -> Any:
    """The tag itself for "tags", its grammar for the engines' names."""
    v = vocabulary()
    if engine == "llguidance":
        module = pytest.importorskip("plugmesh_llguidance.engine", reason="the plugin is not here")
        pytest.importorskip("llguidance")
        made = module.LlguidanceEngine(v, pytest.importorskip("plugmesh_llguidance.plugin").Settings())
    else:
        module = pytest.importorskip("plugmesh_xgrammar.engine", reason="the plugin is not here")
        pytest.importorskip("tvm_ffi")
        made = module.XgrammarEngine(v)
    language = "structural_tag" if engine == "tags" else "ebnf"
    candidate = next(c for c in lower(GrammarSpec("structural_tag", source)).candidates if c.language == language)
    return made.load(made.compile(language, candidate.source))


def read(engine: str, source: str, text: str) -> tuple[int, bool]:
    """Bytes that are accepted, and whether the output may end behind them."""
    matcher = compiled(engine, source).matcher()
    num = 0
    for byte in text.encode():
        if not matcher.accept(4 + byte):
            break
        num += 1
    return num, matcher.is_completed


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance"])
@pytest.mark.parametrize("format", FORMATS, ids=[str(i) for i in range(len(FORMATS))])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=9))
def test_the_grammar_means_what_the_tag_means(engine: str, format: dict[str, Any], pieces: list[str]) -> None:
    source, text = source_of(format), "".join(pieces)
    assert read(engine, source, text) == read("tags", source, text)


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance"])
def test_long_free_text_costs_no_more_than_short(engine: str) -> None:
    """Engines limit what they keep for a byte of the output; a rule that returns through all that was read would meet that limit."""
    text = "Let me see. < " * 600 + "<f>ab</f>" + " more" * 200
    assert read(engine, source_of(CALLS), text) == (len(text), True)


@pytest.mark.parametrize("format", [
    {"type": "dispatch", "rules": [["!", AB]]},
    {"type": "any_text", "max_chars": 2, "excludes": ["a"]},
    {"type": "sequence", "elements": [{"type": "any_text"}, AB]},  # where the text ends is the engine's affair
    {**TAG, "content": CALLS},
    {**TAG, "content": {"type": "any_text", "excludes": ["<<"]}},  # may lie across the border of text and end
    {**CALLS, "triggers": ["<f", "<"]},
    {**CALLS, "triggers": ["<g"]},
    {**CALLS, "more": 1},
    {"type": "any_text", "excludes": ["ab", "xabx"]},
    {"type": "token", "token": 7},
    {"type": "const_string", "value": 7},
    {"type": "repeat", "min": 3, "max": 2, "content": AB},
    None,
])  # fmt: skip
def test_what_has_no_such_grammar_is_left_to_engines_that_know_tags(format: Any) -> None:
    assert tag_gbnf({"type": "structural_tag", "format": format}) is None
    assert [c.language for c in lower(GrammarSpec("structural_tag", source_of(format))).candidates] == ["structural_tag"]
