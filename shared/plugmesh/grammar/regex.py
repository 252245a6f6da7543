"""Regular expressions of a whole output, read into a tree: what Python's `re` and ECMA-262 agree on.

Literals and escapes, classes, groups (numbered, named, plain), alternatives, `? * + {m,n}` (lazy forms mean the same here). `\\d \\w \\s` are those of ASCII; a dot is
any character but a line's end. `^` and `$` may stand where they say nothing: around a whole alternative of the outermost level. Look-around, back-references, word
boundaries, flags, possessive forms and Unicode properties are refused.
"""

from __future__ import annotations

import re

from plugmesh.errors import UnsupportedGrammar
from plugmesh.grammar.syntax import Alt, Chars, Node, Ranges, Repeat, Seq, Text, complement, ranges_of

MAX_DEPTH = 100
_LINE_ENDS = ranges_of([(10, 10), (13, 13), (0x2028, 0x2029)])
_CLASSES: dict[str, Ranges] = {
    "d": ranges_of([(48, 57)]),
    "w": ranges_of([(48, 57), (65, 90), (95, 95), (97, 122)]),
    "s": ranges_of([(9, 13), (32, 32)]),
}
_CLASSES.update({k.upper(): complement(v) for k, v in list(_CLASSES.items())})
_ESCAPES = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?:|\?P?<[A-Za-z_][A-Za-z0-9_]*>)?")


def parse(source: str) -> Node:
    """Raises UnsupportedGrammar with the position."""
    return _Parser(source).whole()


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.depth = 0

    def fail(self, what: str) -> UnsupportedGrammar:
        return UnsupportedGrammar(f"character {self.at + 1} of the regular expression: {what}", keyword="regex")

    @property
    def next(self) -> str:
        return self.source[self.at : self.at + 1]

    def whole(self) -> Node:
        node = self.choice()
        if self.next:
            raise self.fail("a bracket is closed that was not opened")
        return node

    def choice(self) -> Node:
        items = [self.sequence()]
        while self.next == "|":
            self.at += 1
            items.append(self.sequence())
        return items[0] if len(items) == 1 else Alt(tuple(items))

    def sequence(self) -> Node:
        items: list[Node] = []
        if self.depth == 0 and self.next == "^":
            self.at += 1
        while (c := self.next) not in ("", "|", ")"):
            if c == "$" and self.depth == 0 and self.source[self.at + 1 : self.at + 2] in ("", "|"):
                self.at += 1
                break
            items.append(self.repeated(self.item()))
        return items[0] if len(items) == 1 else Seq(tuple(items)) if items else Text("")

    def item(self) -> Node:
        c = self.next
        if c == "(":
            return self.group()
        if c == "[":
            return self.chars()
        self.at += 1
        if c == ".":
            return Chars(complement(_LINE_ENDS))
        if c == "\\":
            found = self.escape(in_class=False)
            return Chars(found) if isinstance(found, tuple) else Text(chr(found))
        if c in ("^", "$"):
            raise self.fail(f"{c} inside of an expression is not supported")
        if c in ("*", "+", "?"):
            raise self.fail(f"there is nothing that {c} could repeat")
        if c == "{" and _COUNT.match(self.source, self.at - 1):
            raise self.fail("there is nothing that a count could repeat")
        if c == "{" and re.compile(r",\d*\}").match(self.source, self.at):
            raise self.fail("{,n} means different things elsewhere: write {0,n}")
        return Text(chr(self.checked(ord(c))))

    def group(self) -> Node:
        head = _GROUP.match(self.source, self.at)
        assert head is not None
        if head[0] == "(" and self.source[self.at + 1 : self.at + 2] == "?":
            raise self.fail("look-around, flags and other groups with (? are not supported")
        self.at = head.end()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.fail(f"brackets are nested more than {MAX_DEPTH} times")
        node = self.choice()
        if self.next != ")":
            raise self.fail("a bracket is not closed")
        self.at += 1
        self.depth -= 1
        return node

    def repeated(self, item: Node) -> Node:
        c = self.next
        count = _COUNT.match(self.source, self.at)
        if c and c in "?*+":
            self.at += 1
            found = Repeat(item, 1 if c == "+" else 0, 1 if c == "?" else None)
        elif count is not None:
            self.at = count.end()
            least = int(count[1])
            most = int(count[3]) if count[3] else None if count[2] else least
            if most is not None and most < least:
                raise self.fail(f"at least {least} and at most {most} times is never")
            found = Repeat(item, least, most)
        else:
            return item
        if self.next == "?":
            self.at += 1
        if (self.next and self.next in "*+?") or _COUNT.match(self.source, self.at):
            raise self.fail("a repetition of a repetition, or a possessive one, is not supported without brackets")
        return found

    def chars(self) -> Node:
        self.at += 1
        is_negative = self.next == "^"
        self.at += is_negative
        if self.next == "]":
            raise self.fail("an empty class, or ] as the first of one, means different things elsewhere: write \\]")
        pairs: list[tuple[int, int]] = []
        while self.next != "]":
            first = self.class_item()
            if self.next == "-" and self.source[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                last = self.class_item()
                if isinstance(first, tuple) or isinstance(last, tuple) or last < first:
                    raise self.fail("a range goes from a character to a later one")
                pairs.append((first, last))
            else:
                pairs += first if isinstance(first, tuple) else [(first, first)]
        self.at += 1
        found = ranges_of(pairs)
        return Chars(complement(found) if is_negative else found)

    def class_item(self) -> int | Ranges:
        c = self.next
        if not c:
            raise self.fail("a class is not closed")
        self.at += 1
        return self.escape(in_class=True) if c == "\\" else self.checked(ord(c))

    def escape(self, *, in_class: bool) -> int | Ranges:
        """What follows a backslash."""
        c = self.next
        self.at += 1
        if c in _CLASSES and c:
            return _CLASSES[c]
        if c == "b" and in_class:
            return 8
        if c == "0" and self.next.isdigit():
            raise self.fail("octal numbers are not supported")
        if c in _ESCAPES and c:
            return _ESCAPES[c]
        if c in ("x", "u"):
            braced = re.compile(r"\{([0-9A-Fa-f]{1,6})\}").match(self.source, self.at) if c == "u" else None
            digits = braced[1] if braced else self.source[self.at : self.at + (2 if c == "x" else 4)]
            if not braced and not re.fullmatch(r"[0-9A-Fa-f]{2}" if c == "x" else r"[0-9A-Fa-f]{4}", digits):
                raise self.fail(f"\\{c} needs {2 if c == 'x' else 4} hexadecimal digits")
            self.at = braced.end() if braced else self.at + len(digits)
            value = int(digits, 16)
            pair = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})").match(self.source, self.at) if 0xD800 <= value < 0xDC00 else None
            if pair is not None:  # ECMA writes other planes so
                self.at = pair.end()
                value = 0x10000 + ((value - 0xD800) << 10) + int(pair[1], 16) - 0xDC00
            return self.checked(value)
        if c and not c.isalnum():
            return self.checked(ord(c))
        raise self.fail(f"\\{c} is not supported" if c else "it ends with a backslash")

    def checked(self, c: int) -> int:
        if c > 0x10FFFF or 0xD800 <= c <= 0xDFFF:
            raise self.fail(f"U+{c:04X} is no character")
        return c
