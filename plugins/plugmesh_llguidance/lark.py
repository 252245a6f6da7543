"""Grammars written as the library's Lark dialect such that it means exactly the same.

The library cuts the output into lexemes before it parses, and takes the longest: `a* a` as two lexemes never matches. Two forms are free of that. A grammar without
recursion becomes one single lexeme, the whole output. In one with recursion every lexeme is one character, so that none is longer than another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from plugmesh.grammar.syntax import Alt, Chars, Grammar, Node, Ref, Seq, Text

# The mask is that of all tokens that may come, not only of the one that the tokenizer would choose where the text is forced.
HEADER = '%llguidance {"no_forcing": true}\n'


def write(grammar: Grammar) -> str:
    """Lark source with the header."""
    names = grammar.reachable()
    if grammar.is_recursive:
        new = {name: f"r{i}" for i, name in enumerate(names)}
        rules = "".join(f"{new[n]}: {_render(grammar.rules[n], new, _by_character)}\n" for n in names)
        return f"{HEADER}start: r0\n{rules}"
    new = {name: f"T{i}" for i, name in enumerate(names)}
    rules = "".join(f"{new[n]}: {_render(grammar.rules[n], new, _whole)}\n" for n in names)
    return f"{HEADER}start: T0\n{rules}"


def write_node(node: Node) -> str:
    """As `write`, of a single rule."""
    return write(Grammar("root", {"root": node}))


def _render(node: Node, names: Mapping[str, str], text: Callable[[str], str]) -> str:
    if isinstance(node, Text):
        return text(node.text)
    if isinstance(node, Chars):
        return "/[" + "".join(_char(a) if a == b else f"{_char(a)}-{_char(b)}" for a, b in node.ranges) + "]/" if node.ranges else "/[^\\x{0}-\\x{10FFFF}]/"
    if isinstance(node, Ref):
        return names[node.name]
    if isinstance(node, Seq):
        return " ".join(_render(i, names, text) for i in node.items) or '""'
    if isinstance(node, Alt):
        return "(" + " | ".join(_render(i, names, text) for i in node.items) + ")"
    most = "" if node.most is None else node.most
    return f"({_render(node.item, names, text)}){{{node.least},{most}}}"


def _by_character(text: str) -> str:
    return " ".join(f"/[{_char(ord(c))}]/" for c in text) or '""'


def _whole(text: str) -> str:
    return "/" + "".join(f"[{_char(ord(c))}]" for c in text) + "/" if text else '""'


def _char(c: int) -> str:
    return chr(c) if c < 0x80 and chr(c).isalnum() else f"\\x{{{c:X}}}"
