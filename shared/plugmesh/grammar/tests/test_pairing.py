"""Candidates and engines in the order in which they are tried."""

from plugmesh.grammar.pairing import pairings
from plugmesh.records import GrammarEngineRecord


def engine(name, *languages):
    return GrammarEngineRecord(name, "1", frozenset(languages), lambda vocabulary: None)


BOTH = (engine("x", "ebnf", "regex"), engine("l", "lark", "ebnf", "regex"))


def tried(candidates, engines):
    return [(language, record.name) for _, language, record in pairings([(c, f"source of {c}") for c in candidates], engines)]


def test_candidates_come_before_engines_and_lark_before_gbnf_where_an_engine_reads_both():
    assert tried(["ebnf", "lark"], BOTH) == [("ebnf", "x"), ("lark", "l"), ("ebnf", "l")]
    assert tried(["lark", "ebnf"], BOTH) == [("lark", "l"), ("ebnf", "x"), ("ebnf", "l")]
    assert tried(["ebnf", "lark"], BOTH[1:]) == [("lark", "l"), ("ebnf", "l")]
    assert tried(["ebnf"], BOTH) == [("ebnf", "x"), ("ebnf", "l")]
    assert tried(["regex"], BOTH[::-1]) == [("regex", "l"), ("regex", "x")]
    assert tried(["structural_tag"], BOTH) == []
