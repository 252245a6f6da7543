"""GBNF, the grammar notation of llama.cpp and xgrammar, read into a tree.

    name ::= alternatives          a rule; `root` is where a grammar starts, else its first rule
    a b | c                        sequence, choice
    "text" [a-z] [^a-z] .          characters, with \\n \\r \\t \\" \\\\ \\[ \\] \\- \\^ \\xHH \\uHHHH \\UHHHHHHHH; a dot is any character
    (...) x? x* x+ x{2} x{2,} x{2,5}
    # comment

What else there is (macros, look-ahead) is refused.
"""

from __future__ import annotations

import re

from plugmesh.errors import UnsupportedGrammar
from plugmesh.grammar.syntax import Alt, Chars, Grammar, Node, Ref, Repeat, Seq, Text, complement, ranges_of, refs

MAX_DEPTH = 100  # of brackets
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*")
_RULE = re.compile(r"([A-Za-z_][A-Za-z0-9_.\-]*)(?:[ \t\r\n]|#[^\n]*)*::=")
_COUNT = re.compile(r"\{\s*(\d+)\s*(,?)\s*(\d*)\s*\}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "b": "\b", "a": "\a", "0": "\0", "e": "\x1b"}
_HEX = {"x": 2, "u": 4, "U": 8}


def parse(source: str) -> Grammar:
    """Raises UnsupportedGrammar with the line."""
    return _Parser(source).grammar()


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.depth = 0

    def fail(self, what: str) -> UnsupportedGrammar:
        line = self.source.count("\n", 0, self.at) + 1
        return UnsupportedGrammar(f"line {line} of the grammar: {what}", keyword="ebnf")

    def space(self) -> None:
        self.at = _SPACE.match(self.source, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too

    def grammar(self) -> Grammar:
        rules: dict[str, Node] = {}
        self.space()
        while self.at < len(self.source):
            head = _RULE.match(self.source, self.at)
            if head is None:
                raise self.fail("a rule is expected: name ::= ...")
            if head[1] in rules:
                raise self.fail(f"there are two rules {head[1]!r}")
            self.at = head.end()
            rules[head[1]] = self.choice()
        if not rules:
            raise self.fail("there is no rule")
        for name, node in rules.items():
            missing = next((r for r in refs(node) if r not in rules), None)
            if missing is not None:
                raise UnsupportedGrammar(f"rule {name!r} needs {missing!r}, which is not there", keyword="ebnf")
        return Grammar("root" if "root" in rules else next(iter(rules)), rules)

    def choice(self) -> Node:
        items = [self.sequence()]
        while self.source[self.at : self.at + 1] == "|":
            self.at += 1
            items.append(self.sequence())
        return items[0] if len(items) == 1 else Alt(tuple(items))

    def sequence(self) -> Node:
        items: list[Node] = []
        while True:
            self.space()
            item = self.item()
            if item is None:
                return items[0] if len(items) == 1 else Seq(tuple(items)) if items else Text("")
            items.append(self.repeated(item))

    def item(self) -> Node | None:
        c = self.source[self.at : self.at + 1]
        if c == "" or c in "|)":
            return None
        if c == '"':
            return self.text()
        if c == "[":
            return self.chars()
        if c == ".":
            self.at += 1
            return Chars(complement(()))
        if c == "(":
            self.at += 1
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.fail(f"brackets are nested more than {MAX_DEPTH} times")
            inner = self.choice()
            if self.source[self.at : self.at + 1] != ")":
                raise self.fail("a bracket is not closed")
            self.at += 1
            self.depth -= 1
            return inner
        name = _NAME.match(self.source, self.at)
        if name is None:
            raise self.fail(f"{c!r} is not expected here")
        if self.depth == 0 and _RULE.match(self.source, self.at):
            return None  # the next rule
        self.at = name.end()
        if self.source[self.at : self.at + 1] == "(":
            raise self.fail(f"macros such as {name[0]!r} are not part of the notation")
        return Ref(name[0])

    def repeated(self, item: Node) -> Node:
        self.space()
        c = self.source[self.at : self.at + 1]
        if c in ("?", "*", "+"):
            self.at += 1
            return Repeat(item, 1 if c == "+" else 0, 1 if c == "?" else None)
        if c == "{":
            count = _COUNT.match(self.source, self.at)
            if count is None:
                raise self.fail("a count is {2}, {2,} or {2,5}")
            self.at = count.end()
            least = int(count[1])
            most = int(count[3]) if count[3] else None if count[2] else least
            if most is not None and most < least:
                raise self.fail(f"at least {least} and at most {most} times is never")
            return Repeat(item, least, most)
        return item

    def text(self) -> Node:
        self.at += 1
        found = []
        while (c := self.source[self.at : self.at + 1]) != '"':
            if c in ("", "\n"):
                raise self.fail("a text is not closed")
            found.append(chr(self.char()))
        self.at += 1
        return Text("".join(found))

    def chars(self) -> Node:
        self.at += 1
        is_negative = self.source[self.at : self.at + 1] == "^"
        self.at += is_negative
        pairs: list[tuple[int, int]] = []
        while self.source[self.at : self.at + 1] != "]":
            first = last = self.char()
            if self.source[self.at : self.at + 1] == "-" and self.source[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                last = self.char()
                if last < first:
                    raise self.fail("a range goes backwards")
            pairs.append((first, last))
        self.at += 1
        found = ranges_of(pairs)
        return Chars(complement(found) if is_negative else found)

    def char(self) -> int:
        """One character or escape."""
        c = self.source[self.at : self.at + 1]
        if c in ("", "\n"):
            raise self.fail("a text or class is not closed")
        self.at += 1
        if c != "\\":
            return self.checked(ord(c))
        c = self.source[self.at : self.at + 1]
        self.at += 1
        if c in _HEX and c:
            digits = self.source[self.at : self.at + _HEX[c]]
            if not re.fullmatch(rf"[0-9A-Fa-f]{{{_HEX[c]}}}", digits):
                raise self.fail(f"\\{c} needs {_HEX[c]} hexadecimal digits")
            self.at += _HEX[c]
            return self.checked(int(digits, 16))
        if c in _ESCAPES and c:
            return ord(_ESCAPES[c])
        if c and not c.isalnum() and c.isprintable():
            return ord(c)
        raise self.fail(f"there is no escape \\{c}")

    def checked(self, c: int) -> int:
        if c > 0x10FFFF or 0xD800 <= c <= 0xDFFF:
            raise self.fail(f"U+{c:04X} is no character")
        return c
