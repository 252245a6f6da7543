"""Automata against Python's own regular expressions, sets and decimals."""

from __future__ import annotations

import re
from datetime import date
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import LimitExceeded
from plugmesh_grammar.schema import automata, formats, numbers, patterns
from plugmesh_grammar.schema.automata import ANY, EMPTY
from plugmesh_grammar.schema.elimination import regex_of

PATTERNS = ["^a*$", "a+b", "^[A-C]{2,4}-\\d+$", "f.*o", "^(foo|bar)", "x|^y$", "[^a]", "^$", "^(?!foo)[a-z]+$", "^(?=.*a)(?=.*b)", "(a|b){0,3}c?$", "^a$|b", "(?:ab)+?$", "\\w\\s\\w"]
texts = st.text("abfoxyC-1 \n", max_size=7)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATTERNS), texts)
def test_a_pattern_matches_what_python_finds(pattern: str, text: str) -> None:
    expected = re.search(pattern.replace("$", "\\Z"), text, re.ASCII) is not None
    assert expected == patterns.search(pattern).accepts(text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PATTERNS), st.sampled_from(PATTERNS), texts)
def test_the_algebra_is_that_of_sets(left: str, right: str, text: str) -> None:
    a, b = patterns.search(left), patterns.search(right)
    assert (a & b).accepts(text) == (a.accepts(text) and b.accepts(text))
    assert (a | b).accepts(text) == (a.accepts(text) or b.accepts(text))
    assert (a - b).accepts(text) == (a.accepts(text) and not b.accepts(text))
    assert (ANY - (ANY - a)) is a  # equal sets are one object


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PATTERNS), texts)
def test_elimination_keeps_the_language(pattern: str, text: str) -> None:
    regex = regex_of(patterns.search(pattern), False)
    assert regex is not None
    regex = re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", regex)
    assert (re.fullmatch(regex, text) is not None) == patterns.search(pattern).accepts(text)


@given(st.lists(st.text("ab\U0001f4a9", max_size=4), max_size=6))
def test_words_are_a_finite_set(chosen: list[str]) -> None:
    dfa = automata.words(chosen)
    assert sorted(set(chosen)) == dfa.finite(10)
    assert (dfa is EMPTY) == (not chosen)
    assert dfa is (dfa | dfa)


@pytest.mark.parametrize("pattern", ["(", "[a", "a{2,1}", "\\1", "(?<=a)b", "\\bx", "*a", "a**", "\\u{110000}", "\\p{Nonsense}", "x(?=y)"])
def test_what_is_no_regular_expression_of_ours_is_refused(pattern: str) -> None:
    with pytest.raises(patterns.PatternError):
        patterns.search(pattern)


def test_an_exponential_pattern_costs_a_limit() -> None:
    with pytest.raises(LimitExceeded):
        patterns.search("(a|b)*a(a|b){14}c")


decimals = st.decimals(min_value=-300, max_value=300, places=3, allow_nan=False)
bounds = st.one_of(st.integers(-30, 30).map(Decimal), decimals, st.sampled_from([Decimal("0"), Decimal("0.05"), Decimal("1e2"), Decimal("100.5")]))


@settings(max_examples=300, deadline=None)
@given(bounds, st.one_of(decimals.map(lambda d: format(d, "f")), st.integers(-10**20, 10**20).map(str), st.sampled_from(["-0", "-0.0", "0.050", "100.500"])))
def test_bounds_are_those_of_decimals(bound: Decimal, text: str) -> None:
    value = Decimal(text)
    for relation, holds in (("<", value < bound), ("=", value == bound), (">", value > bound), ("=>", value >= bound)):
        assert holds == numbers.compared(bound, relation).accepts(text)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["1", "2", "7", "0.01", "1.5", "0.0001", "100", "0.25"]), decimals)
def test_multiples_are_those_of_decimals(step: str, value: Decimal) -> None:
    assert (value % Decimal(step) == 0) == numbers.multiples(Decimal(step)).accepts(format(value, "f"))


@pytest.mark.parametrize("text", ["", "-", "01", "1.", ".5", "1e3", "--1", "+1", "1.0.0"])
def test_no_text_is_a_number_that_json_would_not_have(text: str) -> None:
    assert not numbers.NUMBERS.accepts(text)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9999), st.integers(0, 13), st.integers(0, 32))
def test_dates_are_those_of_the_calendar(year: int, month: int, day: int) -> None:
    try:
        exists = bool(date(year, month, day))
    except ValueError:
        exists = False
    dfa = formats.automaton("date")
    assert dfa is not None
    assert exists == dfa.accepts(f"{year:04}-{month:02}-{day:02}")


VALID = {
    "time": ["23:59:59Z", "00:00:00.5+01:00"], "date-time": ["2024-02-29T12:00:00Z"], "duration": ["P1D", "PT1H30M", "P2W", "P1Y2M3DT4H5M6S"],
    "uuid": ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"], "ipv4": ["127.0.0.1", "255.255.255.255"], "ipv6": ["::", "::1", "1:2:3:4:5:6:7:8", "fe80::1"],
    "email": ["a.b@example.com"], "hostname": ["example.com", "a-b.c1"], "uri": ["https://example.com/a?b=c#d", "mailto:a@b.c", "urn:x:1"],
    "uri-reference": ["/a/b", "a?b", "#c"], "json-pointer": ["", "/a/~0b"], "relative-json-pointer": ["0", "1/a", "2#"],
}  # fmt: skip
INVALID = {
    "time": ["24:00:00Z", "12:00:00"], "date-time": ["2023-02-29T12:00:00Z", "2024-01-01"], "duration": ["P", "PT", "P1D2Y", "1D"], "uuid": ["2eb8aa08"],
    "ipv4": ["256.0.0.1", "01.2.3.4", "1.2.3"], "ipv6": ["1::2::3", "12345::", "1:2:3:4:5:6:7:8:9"], "email": ["a", "@b", "a@"],
    "hostname": ["-a", "a-", "a..b", "x.1"], "uri": ["/a", "a b:c", "http://"], "uri-reference": ["\\a"], "json-pointer": ["a", "/~2"], "relative-json-pointer": ["/a", "01"],
}  # fmt: skip


@pytest.mark.parametrize("name", list(VALID))
def test_formats(name: str) -> None:
    dfa = formats.automaton(name)
    assert dfa is not None
    for text in VALID[name]:
        assert dfa.accepts(text), text
    for text in INVALID[name]:
        assert not dfa.accepts(text), text


@pytest.mark.parametrize("name", formats.KNOWN)
def test_texts_of_a_format_pass_the_checker_of_jsonschema(name: str) -> None:
    checker = pytest.importorskip("jsonschema").Draft202012Validator.FORMAT_CHECKER
    if name not in checker.checkers:
        pytest.skip("this installation checks no such format")
    dfa = formats.automaton(name)
    assert dfa is not None
    for text in walks(dfa, 150):
        assert checker.conforms(text, name), text


def walks(dfa: automata.Dfa, count: int) -> list[str]:
    """Texts of a set by random walks, ends included early and late."""
    import random

    rng = random.Random(7)
    out: list[str] = []
    while len(out) < count:
        state, text = 0, ""
        while len(text) < 120:
            if state in dfa.accepting and (not dfa.arcs[state] or rng.random() < 0.2):
                out.append(text)
                break
            lo, hi, target = rng.choice(dfa.arcs[state])
            text += chr(rng.randint(lo, min(hi, max(lo, 0x7E))))
            state = target
        else:
            count -= 1
    return out
