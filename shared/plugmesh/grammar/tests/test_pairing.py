"""Candidates and engines in the order in which they are tried."""

from plugmesh.grammar.pairing import LARGE_GBNF, pairings
from plugmesh.records import GrammarEngineRecord


def engine(name, *languages):
    return GrammarEngineRecord(name, "1", frozenset(languages), lambda vocabulary: None)


BOTH = (engine("x", "ebnf", "regex"), engine("l", "lark", "ebnf", "regex"))


def tried(candidates, engines, **sizes):
    return [(language, record.name) for _, language, record in pairings([(c, f"source of {c}") for c in candidates], engines, **sizes)]


def test_candidates_come_before_engines_and_lark_before_gbnf_where_an_engine_reads_both():
    assert tried(["ebnf", "lark"], BOTH) == [("ebnf", "x"), ("lark", "l"), ("ebnf", "l")]
    assert tried(["lark", "ebnf"], BOTH) == [("lark", "l"), ("ebnf", "x"), ("ebnf", "l")]
    assert tried(["ebnf", "lark"], BOTH[1:]) == [("lark", "l"), ("ebnf", "l")]
    assert tried(["ebnf"], BOTH) == [("ebnf", "x"), ("ebnf", "l")]
    assert tried(["regex"], BOTH[::-1]) == [("regex", "l"), ("regex", "x")]
    assert tried(["structural_tag"], BOTH) == []


def test_large_grammars_go_to_engines_that_read_lark_first():
    assert tried(["ebnf"], BOTH, num_gbnf=LARGE_GBNF) == [("ebnf", "x"), ("ebnf", "l")]
    assert tried(["ebnf"], BOTH, num_gbnf=LARGE_GBNF + 1) == [("ebnf", "l"), ("ebnf", "x")]
    assert tried(["ebnf", "lark"], BOTH, num_gbnf=LARGE_GBNF + 1) == [("lark", "l"), ("ebnf", "x"), ("ebnf", "l")]
