"""Grammars as trees, for engines that write them down in a notation of their own: what GBNF (`gbnf`) and regular expressions (`regex`) are read into.

Characters are code points; what a grammar allows is their UTF-8. Surrogates have none and are in no class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Ranges = tuple[tuple[int, int], ...]  # first and last code point; sorted, apart from each other
_SURROGATES = (0xD800, 0xDFFF)
_LAST = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Text:
    """These characters; empty for nothing."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character; none at all when there are no ranges."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Seq:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """`least` to `most` times; None for any number."""

    item: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Ref:
    name: str


Node = Text | Chars | Seq | Alt | Repeat | Ref


@dataclass(frozen=True, slots=True)
class Grammar:
    root: str
    rules: Mapping[str, Node]

    def reachable(self) -> list[str]:
        """Names of the rules that the root needs, itself first."""
        found, todo = [self.root], [self.root]
        seen = {self.root}
        while todo:
            for name in refs(self.rules[todo.pop()]):
                if name not in seen:
                    seen.add(name)
                    found.append(name)
                    todo.append(name)
        return found

    @property
    def is_recursive(self) -> bool:
        """A rule that the root needs needs itself."""
        left = {name: set(refs(self.rules[name])) for name in self.reachable()}
        while True:
            done = [name for name, needs in left.items() if not needs & left.keys()]
            if not done:
                return bool(left)
            for name in done:
                del left[name]


def refs(node: Node) -> list[str]:
    """Names in the order in which they occur."""
    found: list[str] = []
    todo = [node]
    while todo:
        item = todo.pop()
        if isinstance(item, Ref):
            found.append(item.name)
        elif isinstance(item, Seq | Alt):
            todo += reversed(item.items)
        elif isinstance(item, Repeat):
            todo.append(item.item)
    return found


def ranges_of(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Any pairs, sorted and joined, without surrogates."""
    cut: list[tuple[int, int]] = []
    for first, last in pairs:
        for a, b in ((first, min(last, _SURROGATES[0] - 1)), (max(first, _SURROGATES[1] + 1), last)):
            if a <= b:
                cut.append((a, b))
    joined: list[tuple[int, int]] = []
    for a, b in sorted(cut):
        if joined and a <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
        else:
            joined.append((a, b))
    return tuple(joined)


def complement(ranges: Ranges) -> Ranges:
    """Every other character."""
    found, at = [], 0
    for a, b in ranges:
        found.append((at, a - 1))
        at = b + 1
    found.append((at, _LAST))
    return ranges_of((a, b) for a, b in found if a <= b)


def to_gbnf(grammar: Grammar) -> str:
    """The grammar as GBNF whose first rule is `root`, which no rule needs; classes are spelled out without negation."""
    order = grammar.reachable()
    names = {name: f"r{i}" for i, name in enumerate(order)}
    return f"root ::= {names[grammar.root]}\n" + "".join(f"{names[name]} ::= {_gbnf(grammar.rules[name], names)}\n" for name in order)


def _gbnf(node: Node, names: Mapping[str, str]) -> str:
    if isinstance(node, Text):
        return '"' + "".join(c if c == "-" else _gbnf_char(ord(c)) for c in node.text) + '"'
    if isinstance(node, Chars):
        return "[" + "".join(_gbnf_char(a) if a == b else f"{_gbnf_char(a)}-{_gbnf_char(b)}" for a, b in node.ranges) + "]"
    if isinstance(node, Ref):
        return names[node.name]
    if isinstance(node, Seq):
        return " ".join(_gbnf(i, names) for i in node.items) or '""'
    if isinstance(node, Alt):
        return "(" + " | ".join(_gbnf(i, names) for i in node.items) + ")"
    item = _gbnf(node.item, names)
    item = item if isinstance(node.item, Chars | Ref) else f"({item})"
    sign = {(0, 1): "?", (0, None): "*", (1, None): "+"}.get((node.least, node.most))  # xgrammar masks these faster than the same as counts
    return item + (sign or f"{{{node.least},{'' if node.most is None else node.most}}}")


def _gbnf_char(c: int) -> str:
    """Letters and digits as they are, the rest by their numbers, but a hyphen: xgrammar takes its number for the sign of a range, and its escape for nothing outside of a class."""
    if c == 0x2D:
        return "\\-"
    if c < 0x80 and chr(c).isalnum():
        return chr(c)
    return f"\\u{c:04x}" if c <= 0xFFFF else f"\\U{c:08x}"
