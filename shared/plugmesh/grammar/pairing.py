"""Which engine gets a grammar that can be written in several languages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from plugmesh.records import GrammarEngineRecord

C = TypeVar("C")

LARGE_GBNF = 32_000
"""Characters. An engine that compiles GBNF to automata with a mask for each state takes seconds for so much, and megabytes; one that reads Lark does its work as text comes."""


def pairings(candidates: Sequence[tuple[str, C]], engines: Sequence[GrammarEngineRecord], *, num_gbnf: int = 0) -> Iterator[tuple[C, str, GrammarEngineRecord]]:
    """What to try, in order: the candidates in theirs, each with the engines in theirs; those that read Lark first where the grammar is large.

    An engine that reads Lark gets GBNF only where nothing else is left: it has whole strings and numbers as lexemes there, and would go through GBNF's rules character by
    character, a hundred times slower.

    Args:
        candidates: Language and source of each; all mean the same.
        num_gbnf: Characters of the longest that is GBNF.
    """
    if num_gbnf > LARGE_GBNF:
        engines = sorted(engines, key=lambda record: "lark" not in record.languages)
        candidates = sorted(candidates, key=lambda candidate: candidate[0] != "lark")
    last: list[tuple[C, str, GrammarEngineRecord]] = []
    has_lark = any(language == "lark" for language, _ in candidates)
    for language, candidate in candidates:
        for record in _takers(engines, language):
            if language == "ebnf" and has_lark and "lark" in record.languages:
                last.append((candidate, language, record))
            else:
                yield candidate, language, record
    yield from last


def _takers(engines: Iterable[GrammarEngineRecord], language: str) -> Iterator[GrammarEngineRecord]:
    return (record for record in engines if language in record.languages)
