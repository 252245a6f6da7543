"""Grammars written as the library's Lark dialect such that it means exactly the same.

The library cuts the output into lexemes before it parses, and takes the longest: `a* a` as two lexemes never matches. Two forms are free of that. A grammar without
recursion becomes one single lexeme, the whole output. In one with recursion every lexeme is one character, so that none is longer than another.
"""

from __future__ import annotations

from plugmesh.grammar.syntax import Alt, Chars, Grammar, Node, Ref, Seq, Text

# The mask is that of all tokens that may come, not only of the one that the tokenizer would choose where the text is forced.
HEADER = '%llguidance {"no_forcing": true}\n'


MAX_DEPTH = 8  # of brackets in one rule; the library's parser refuses what is much deeper


def write(grammar: Grammar) -> str:
    """Lark source with the header."""
    return _Writer(grammar).source()


def write_node(node: Node) -> str:
    """As `write`, of a single rule."""
    return write(Grammar("root", {"root": node}))


class _Writer:
    def __init__(self, grammar: Grammar) -> None:
        self.is_recursive = grammar.is_recursive
        self.order = grammar.reachable()
        self.grammar = grammar
        self.names = {name: self.name_of(i) for i, name in enumerate(self.order)}
        self.lines: list[str] = []

    def name_of(self, number: int) -> str:
        """Small letters make a rule, capitals a lexeme."""
        return f"r{number}" if self.is_recursive else f"T{number}"

    def source(self) -> str:
        for name in self.order:
            body = self.render(self.grammar.rules[name], 0)
            self.lines.append(f"{self.names[name]}: {body}\n")
        return f"{HEADER}start: {self.names[self.grammar.root]}\n{''.join(self.lines)}"

    def render(self, node: Node, depth: int) -> str:
        if isinstance(node, Text):
            return _by_character(node.text) if self.is_recursive else _whole(node.text)
        if isinstance(node, Chars):
            return f"/{_class(node)}/"
        if isinstance(node, Ref):
            return self.names[node.name]
        if depth >= MAX_DEPTH:
            body = self.render(node, 0)
            name = self.name_of(len(self.order) + len(self.lines))
            self.lines.append(f"{name}: {body}\n")
            return name
        if isinstance(node, Seq):
            return " ".join(self.render(i, depth + 1) for i in node.items) or '""'
        if isinstance(node, Alt):
            return "(" + " | ".join(self.render(i, depth + 1) for i in node.items) + ")"
        if node.most == 0:  # the library refuses such a count
            return '""'
        most = "" if node.most is None else node.most
        return f"({self.render(node.item, depth + 1)}){{{node.least},{most}}}"


def _by_character(text: str) -> str:
    return "(" + " ".join(f"/[{_char(ord(c))}]/" for c in text) + ")" if text else '""'


def _whole(text: str) -> str:
    return "/" + "".join(f"[{_char(ord(c))}]" for c in text) + "/" if text else '""'


def _class(node: Chars) -> str:
    ranges = "".join(_char(a) if a == b else f"{_char(a)}-{_char(b)}" for a, b in node.ranges)
    return f"[{ranges}]" if ranges else "[^\\x{0}-\\x{10FFFF}]"  # the last is no character at all


def _char(c: int) -> str:
    return chr(c) if c < 0x80 and chr(c).isalnum() else f"\\x{{{c:X}}}"
