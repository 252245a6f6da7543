"""Regular expressions of automata, by eliminating states one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from .automata import Dfa
from .ebnf import json_char

_SPECIAL = set("\\^$.|?*+()[]{}/-\"'#&~<>=!:, ")


def char(code: int) -> str:
    """One character of a regular expression, in a class or outside of one."""
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{{{code:x}}}"


def char_class(ranges: Sequence[tuple[int, int]]) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return char(ranges[0][0])
    return "[" + "".join(char(lo) + (f"-{char(hi)}" if hi > lo else "") for lo, hi in ranges) + "]"


def _symbol(ranges: Sequence[tuple[int, int]], in_json: bool) -> str:
    if not in_json:
        return char_class(ranges)
    raw, escapes = json_char(ranges)
    texts = ([char_class(raw)] if raw else []) + ["".join(char(ord(c)) for c in text) for text in escapes]
    return texts[0] if len(texts) == 1 else f"(?:{'|'.join(texts)})"


def regex_of(dfa: Dfa, in_json: bool, max_chars: int = 60_000) -> str | None:
    """An expression of the automaton's strings (with quotes and escapes for `in_json`); None when it would be too long."""
    quote = char(34) if in_json else ""
    start, final = -1, -2
    edges: dict[int, dict[int, str]] = {state: {} for state in range(len(dfa.arcs))}
    edges[start] = {0: quote}
    edges[final] = {}
    into: dict[int, set[int]] = {state: set() for state in edges}
    into[0].add(start)
    for state, arcs in enumerate(dfa.arcs):
        grouped: dict[int, list[tuple[int, int]]] = {}
        for lo, hi, target in arcs:
            grouped.setdefault(target, []).append((lo, hi))
        for target, ranges in grouped.items():
            edges[state][target] = _symbol(ranges, in_json)
            into[target].add(state)
        if state in dfa.accepting:
            edges[state][final] = quote
            into[final].add(state)
    alive = set(range(len(dfa.arcs)))
    size = 0
    while alive:
        state = min(alive, key=lambda s: (len(into[s] - {s}) * len(edges[s].keys() - {s}), -s))
        alive.discard(state)
        loop = edges[state].pop(state, None)
        into[state].discard(state)
        star = f"(?:{loop})*" if loop and len(loop) > 1 and not _is_unit(loop) else f"{loop}*" if loop else ""
        for source in into[state]:
            before = edges[source].pop(state)
            for target, after in edges[state].items():
                path = before + star + after
                known = edges[source].get(target)
                if known is not None:
                    path = f"(?:{path})?" if known == "" else f"(?:{known})?" if path == "" else f"(?:{known}|{path})"
                size += len(path)
                if len(path) > max_chars or size > 40 * max_chars:
                    return None
                edges[source][target] = path
                into[target].discard(state)
                into[target].add(source)
        for target in edges[state]:
            into[target].discard(state)
        del edges[state]
    return edges[start].get(final)


def _is_unit(text: str) -> bool:
    return text.startswith("[") and text.find("]") == len(text) - 1
