"""GBNF and regular expressions are read as they are meant; what they become for engines means the same."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import UnsupportedGrammar
from plugmesh.grammar import gbnf, regex
from plugmesh.grammar.syntax import Grammar, complement, ranges_of, to_gbnf
from plugmesh.testing import grammar_cases
from plugmesh.testing.grammar_oracle import Oracle, as_ebnf

EXPRESSIONS = [
    "a|b*c", "(ab)+?x{2,3}", r"\d{2}-\w+\s?", "[^a-c]x", r"[\d\-_.]+", "^ab$", "^a|b$", "a{x}", r"\x41\u00e9", "(?:a(?P<n>b)|(?<m>c))", "", "a||b", r"[a\]b]", r"\.\*\[",
    "[a-]", "[-a]", r"\S\D\W", "x{0}", "x{3}", "(a?){2}", "é+", r"[\w-]", "a{2}b{1,}", r"[\b\n\t\0]", ".x",
]  # fmt: skip


@pytest.mark.parametrize("source", EXPRESSIONS)
def test_expressions_mean_what_python_means(source: str) -> None:
    oracle = Oracle(Grammar("root", {"root": regex.parse(source)}))
    rng = random.Random(source)
    python = re.compile(re.sub(r"\(\?<(?=\w)", "(?P<", source), re.ASCII)
    texts = {"", *source, *(source[i:j] for i in range(len(source)) for j in range(i + 1, len(source) + 1))}
    texts |= {"".join(rng.choices("abcxé_ A1-.{}\n\\]", k=rng.randint(1, 5))) for _ in range(400)}
    for text in texts:
        if "\r" not in text and "\u2028" not in text:  # where a dot means other things elsewhere
            assert oracle.is_complete(text.encode()) == (python.fullmatch(text) is not None and not (text.endswith("\n") and source.endswith("$"))), text


@pytest.mark.parametrize("source", [
    "(?i)a", "(?=a)", "(?!a)", "(?<=a)b", r"(a)\1", r"\bx", "a**", "a*+", "a{2}{3}", "a$b", "(^a)", "[]a]", "[^]a]", "[b-a]", r"[\d-z]", r"\p{L}", r"\ud800", "a{3,2}", "a{,3}", "(", ")", "[", "\\", "*a",
    r"\x4", r"\u{110000}", r"\07", "(" * 200 + ")" * 200,
])  # fmt: skip
def test_expressions_that_mean_different_things_or_nothing_are_refused(source: str) -> None:
    with pytest.raises(UnsupportedGrammar) as raised:
        regex.parse(source)

    assert raised.value.fields["keyword"] == "regex"


@settings(max_examples=25, deadline=None)
@given(st.booleans().flatmap(lambda r: grammar_cases.grammars(is_recursive=r)), st.integers(0, 1 << 30))
def test_what_is_written_and_read_again_means_the_same(grammar: Grammar, seed: int) -> None:
    """By way of the other writer, and by our own."""
    first = Oracle(grammar)
    others = [Oracle(gbnf.parse(as_ebnf(grammar))), Oracle(gbnf.parse(to_gbnf(grammar)))]
    rng, prefix = random.Random(seed), b""
    for _ in range(5):
        nexts = [b for b in range(256) if first.is_viable(prefix + bytes([b]))]
        assert all(o.is_complete(prefix) == first.is_complete(prefix) for o in others)
        assert all([b for b in range(256) if o.is_viable(prefix + bytes([b]))] == nexts for o in others)
        if not nexts:
            break
        prefix += bytes([rng.choice(nexts)])


def test_the_notation_of_grammars() -> None:
    source = """
    # a comment ::= "no rule"
    greeting ::= "hi" | "h\\"\\x41\\u00e9\\U0001F600"   # another
      | [^a-z\\]\\-] name-of.it{2,3}
    name-of.it ::= ( "x"
        "y" )? .
    """
    oracle = Oracle(gbnf.parse(source))

    assert oracle.is_complete(b"hi")
    assert oracle.is_complete('h"Aé😀'.encode())
    assert oracle.is_complete("Axyéb".encode())
    assert oracle.is_complete(b"Abc")
    assert [t for t in (b"", b"h", b"axyzz", b"]ab", b"-ab", b"Ab") if oracle.is_complete(t)] == []


@pytest.mark.parametrize("source", ["", "a", "a ::= b", 'a ::= "x" a ::= "y"', 'a ::= "x', "a ::= [x", "a ::= (b", 'a ::= "x"{3,2}', 'a ::= "x"{', "a ::= TagDispatch(x)", r'a ::= "\q"', r'a ::= "\ud800"', "a ::= [b-a]", 'a ::= (= "x")', "a ::= )"])  # fmt: skip
def test_what_is_no_grammar_is_refused_with_a_reason(source: str) -> None:
    with pytest.raises(UnsupportedGrammar) as raised:
        gbnf.parse(source)

    assert raised.value.fields["keyword"] == "ebnf"


@given(st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF)), max_size=6), st.lists(st.integers(0, 0x10FFFF), max_size=20))
def test_classes_and_their_complements_share_nothing_and_leave_out_nothing(pairs: list[tuple[int, int]], points: list[int]) -> None:
    found = ranges_of((min(p), max(p)) for p in pairs)
    rest = complement(found)
    for c in {*points, 0, 0x10FFFF, 0xD7FF, 0xD800, 0xDFFF, 0xE000, *(p for pair in pairs for p in pair)}:
        inside, outside = any(a <= c <= b for a, b in found), any(a <= c <= b for a, b in rest)
        assert inside + outside == (not 0xD800 <= c <= 0xDFFF)
        assert inside == (any(min(p) <= c <= max(p) for p in pairs) and not 0xD800 <= c <= 0xDFFF)
