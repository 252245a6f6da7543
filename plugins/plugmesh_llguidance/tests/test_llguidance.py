"""What is special about this engine: the ways in which grammars are written for it, and its limits."""

from __future__ import annotations

import numpy as np
import pytest

from plugmesh.errors import LimitExceeded, UnsupportedGrammar
from plugmesh.testing.grammar_oracle import as_set, vocabulary
from plugmesh_llguidance.engine import LlguidanceEngine
from plugmesh_llguidance.plugin import Settings


def matcher_of(language: str, source: str, **settings: int):
    engine = LlguidanceEngine(vocabulary(), Settings(**settings))
    return engine.load(engine.compile(language, source)).matcher()


def allows(language: str, source: str, text: str) -> bool:
    matcher = matcher_of(language, source)
    return all(matcher.accept(4 + b) for b in text.encode()) and matcher.is_completed


def test_a_greedy_lexeme_does_not_eat_what_comes_after_it() -> None:
    """As Lark of one's own it would: that is what its writer asked for."""
    assert allows("ebnf", 'root ::= a "a"\na ::= "a"*', "aaa")
    assert allows("ebnf", 'root ::= "(" root ")" | a "a"\na ::= "a"*', "((aaa))")
    assert not allows("lark", "start: A B\nA: /a*/\nB: /a/", "aaa")


@pytest.mark.parametrize(("text", "is_valid"), [('{"a":1}', True), ('{"a": 1}', True), ('{"a":"1"}', False), ('{"b":1}', False)])
def test_schemas(text: str, is_valid: bool) -> None:
    assert allows("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"],"additionalProperties":false}', text) == is_valid


@pytest.mark.parametrize(("language", "source", "keyword"), [
    ("json_schema", '{"type":"object","not":{"required":["a"]}}', "json_schema"),
    ("json_schema", '{"type":"string","x-guidance":{"lenient":true}}', "x-guidance"),
    ("json_schema", '{"type":', "json_schema"),
    ("lark", '%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance"),
])  # fmt: skip
def test_what_would_be_enforced_in_part_is_refused(language: str, source: str, keyword: str) -> None:
    with pytest.raises(UnsupportedGrammar) as raised:
        matcher_of(language, source)

    assert raised.value.fields["keyword"] == keyword


def test_a_grammar_cannot_ask_for_control_tokens() -> None:
    mask = np.zeros(vocabulary().num_words, np.uint32)
    try:
        matcher = matcher_of("lark", 'start: <[1-3]> | "a"')
    except UnsupportedGrammar:
        return
    matcher.fill(mask)

    assert as_set(mask) & {1, 2, 3} == set()
    assert not matcher.accept(3)


def test_a_limit_that_is_reached_costs_the_output_an_error_and_no_wrong_mask() -> None:
    source = 'root ::= root root | "a" | "(" root ")"'
    matcher = matcher_of("ebnf", source, max_items_in_row=40)
    mask = np.zeros(vocabulary().num_words, np.uint32)
    with pytest.raises(LimitExceeded):
        for _ in range(200):
            matcher.fill(mask)
            if not matcher.accept(4 + ord("a")):
                matcher.fill(mask)
                raise AssertionError("a token that the mask allowed is refused")
