"""ECMA-262 regular expressions (with the u flag) as automata.

Look-around in general, back-references and word boundaries are refused; a look-ahead right behind a leading ^ is a plain intersection and is not.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import pairwise

from plugmesh.errors import LimitExceeded

from .automata import ANY, UNIVERSE, Dfa, explore

Ranges = tuple[tuple[int, int], ...]
_MAX_NODES = 20_000


class PatternError(ValueError):
    """A pattern that is malformed, or that no finite automaton of ours stands for; the text says why."""


def normal_ranges(ranges: Ranges | list[tuple[int, int]]) -> Ranges:
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(ranges):
        for first, last in UNIVERSE:
            a, b = max(lo, first), min(hi, last)
            if a > b:
                continue
            if out and a <= out[-1][1] + 1 and not (out[-1][1] == 0xD7FF and a == 0xE000):
                out[-1] = (out[-1][0], max(out[-1][1], b))
            else:
                out.append((a, b))
    return tuple(out)


def inverted(ranges: Ranges) -> Ranges:
    out = []
    for first, last in UNIVERSE:
        at = first
        for lo, hi in ranges:
            if hi < first or lo > last:
                continue
            if lo > at:
                out.append((at, lo - 1))
            at = max(at, hi + 1)
        if at <= last:
            out.append((at, last))
    return tuple(out)


DIGIT: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Ranges = ((9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF))
DOT = inverted(((10, 10), (13, 13), (0x2028, 0x2029)))
_CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_LONG_CATEGORIES = {
    "Letter": "L", "Uppercase_Letter": "Lu", "Lowercase_Letter": "Ll", "Titlecase_Letter": "Lt", "Modifier_Letter": "Lm", "Other_Letter": "Lo",
    "Mark": "M", "Number": "N", "Decimal_Number": "Nd", "digit": "Nd", "Letter_Number": "Nl", "Other_Number": "No", "Punctuation": "P", "punct": "P",
    "Symbol": "S", "Separator": "Z", "Space_Separator": "Zs", "Other": "C", "Control": "Cc",
}  # fmt: skip


@lru_cache(maxsize=32)
def _category(name: str) -> Ranges:
    short = _LONG_CATEGORIES.get(name, name)
    if len(short) > 2 or short[:1] not in "LMNPSZC":
        raise PatternError(f"unicode property {name!r} is not known")
    out: list[tuple[int, int]] = []
    for code in range(0x110000):
        if unicodedata.category(chr(code)).startswith(short):
            if out and out[-1][1] == code - 1:
                out[-1] = (out[-1][0], code)
            else:
                out.append((code, code))
    if not out:
        raise PatternError(f"unicode property {name!r} is not known")
    return normal_ranges(out)


# A parsed expression: ("chars", ranges), ("seq", parts), ("alt", parts), ("repeat", part, least, most), ("start",), ("end",), ("ahead", dfa)
_Node = tuple


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, what: str) -> bool:
        if self.text.startswith(what, self.at):
            self.at += len(what)
            return True
        return False

    def parse(self) -> _Node:
        node = self.alternatives(0)
        if self.at < len(self.text):
            raise PatternError(f"unexpected {self.peek()!r} at character {self.at}")
        return node

    def alternatives(self, depth: int) -> _Node:
        if depth > 50:
            raise PatternError("groups are nested too deeply")
        parts = [self.sequence(depth)]
        while self.take("|"):
            parts.append(self.sequence(depth))
        return ("alt", tuple(parts)) if len(parts) > 1 else parts[0]

    def sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while (char := self.peek()) and char not in "|)":
            parts.append(self.quantified(depth))
        return ("seq", tuple(parts))

    def quantified(self, depth: int) -> _Node:
        node = self.atom(depth)
        least: int = 1
        most: int | None = 1
        if self.take("*"):
            least, most = 0, None
        elif self.take("+"):
            least, most = 1, None
        elif self.take("?"):
            least, most = 0, 1
        elif self.peek() == "{":
            least, most = self.braces()
        else:
            return node
        self.take("?")  # laziness does not change the language
        if self.peek() in ("*", "+", "?"):
            raise PatternError(f"nothing to repeat at character {self.at}")
        if node[0] in ("start", "end", "ahead"):
            raise PatternError("an assertion is repeated")
        return ("repeat", node, least, most)

    def braces(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        body = self.text[self.at + 1 : end] if end > 0 else "?"
        left, comma, right = body.partition(",")
        if not left.isascii() or not left.isdigit() or (right and not (right.isascii() and right.isdigit())) or len(left) > 6 or len(right) > 6:
            raise PatternError(f"a brace that is no quantifier at character {self.at}")
        self.at = end + 1
        least = int(left)
        most = least if not comma else int(right) if right else None
        if most is not None and most < least:
            raise PatternError("a quantifier whose bounds are the wrong way round")
        return least, most

    def atom(self, depth: int) -> _Node:
        char = self.text[self.at]
        self.at += 1
        if char == "(":
            if self.take("?"):
                if self.take("="):
                    return self.lookahead(depth, True)
                if self.take("!"):
                    return self.lookahead(depth, False)
                if self.take("<="):
                    raise PatternError("look-behind is not regular enough for us")
                if self.take("<!"):
                    raise PatternError("look-behind is not regular enough for us")
                if self.take("<"):
                    end = self.text.find(">", self.at)
                    if end < 0 or not self.text[self.at : end].isidentifier():
                        raise PatternError("a group's name is malformed")
                    self.at = end + 1
                elif not self.take(":"):
                    raise PatternError(f"an unknown kind of group at character {self.at}")
            node = self.alternatives(depth + 1)
            if not self.take(")"):
                raise PatternError("a group is not closed")
            return node
        if char == "[":
            return ("chars", self.char_class())
        if char == ".":
            return ("chars", DOT)
        if char == "^":
            return ("start",)
        if char == "$":
            return ("end",)
        if char == "\\":
            return ("chars", self.escape(in_class=False))
        if char in "*+?{":
            raise PatternError(f"nothing to repeat at character {self.at - 1}")
        if 0xD800 <= ord(char) <= 0xDFFF:
            raise PatternError("a lone surrogate")
        return ("chars", ((ord(char), ord(char)),))

    def lookahead(self, depth: int, wanted: bool) -> _Node:
        node = self.alternatives(depth + 1)
        if not self.take(")"):
            raise PatternError("a group is not closed")
        # What follows from here on must (not) begin so: an automaton over the whole rest.
        inside = compile_node(("seq", (("start",), node)))
        return ("ahead", inside if wanted else ANY - inside)

    def escape(self, *, in_class: bool) -> Ranges:
        if self.at >= len(self.text):
            raise PatternError("a backslash at the end")
        char = self.text[self.at]
        self.at += 1
        if char in "dws":
            return _CLASSES[char]
        if char in "DWS":
            return inverted(_CLASSES[char.lower()])
        if char in "pP":
            if not self.take("{") or (end := self.text.find("}", self.at)) < 0:
                raise PatternError("a unicode property is malformed")
            name = self.text[self.at : end].removeprefix("General_Category=").removeprefix("gc=")
            self.at = end + 1
            return _category(name) if char == "p" else inverted(_category(name))
        if char == "b" and in_class:
            return ((8, 8),)
        if char in "bB":
            raise PatternError("a word boundary is not supported")
        if char == "0" and self.peek().isdigit():
            raise PatternError("an octal escape")
        if char in _CONTROLS:
            return ((_CONTROLS[char], _CONTROLS[char]),)
        if char == "c" and self.peek().isascii() and self.peek().isalpha():
            code = ord(self.peek()) % 32
            self.at += 1
            return ((code, code),)
        if char in "xu":
            code = self.hex_code(char)
            if 0xD800 <= code <= 0xDBFF and self.take("\\u"):
                low = self.hex_code("u")
                if not 0xDC00 <= low <= 0xDFFF:
                    raise PatternError("a lone surrogate")
                code = 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00
            if 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
                raise PatternError("a code point that does not exist")
            return ((code, code),)
        if char in "123456789k":
            raise PatternError("a back-reference is not regular")
        if char.isalnum():
            raise PatternError(f"an unknown escape \\{char}")
        return ((ord(char), ord(char)),)

    def hex_code(self, kind: str) -> int:
        if kind == "u" and self.take("{"):
            end = self.text.find("}", self.at)
            digits, self.at = self.text[self.at : end], end + 1
        else:
            width = 2 if kind == "x" else 4
            digits, self.at = self.text[self.at : self.at + width], self.at + width
            if len(digits) != width:
                raise PatternError("a hexadecimal escape is malformed")
        if not digits or len(digits) > 6 or not all(c in "0123456789abcdefABCDEF" for c in digits):
            raise PatternError("a hexadecimal escape is malformed")
        return int(digits, 16)

    def char_class(self) -> Ranges:
        negated = self.take("^")
        found: list[tuple[int, int]] = []
        while not self.take("]"):
            if self.at >= len(self.text):
                raise PatternError("a character class is not closed")
            first = self.class_atom()
            if self.peek() == "-" and self.at + 1 < len(self.text) and self.text[self.at + 1] != "]":
                self.at += 1
                last = self.class_atom()
                if len(first) != 1 or len(last) != 1 or first[0][0] != first[0][1] or last[0][0] != last[0][1] or last[0][0] < first[0][0]:
                    raise PatternError("a range of a character class is malformed")
                found.append((first[0][0], last[0][0]))
            else:
                found.extend(first)
        ranges = normal_ranges(found)
        return inverted(ranges) if negated else ranges

    def class_atom(self) -> Ranges:
        char = self.text[self.at]
        self.at += 1
        if char == "\\":
            if self.take("-"):
                return ((45, 45),)
            return self.escape(in_class=True)
        if 0xD800 <= ord(char) <= 0xDFFF:
            raise PatternError("a lone surrogate")
        return ((ord(char), ord(char)),)


class _Nfa:
    """Thompson's construction. Assertions are conditions on empty moves: at the start, at the end."""

    def __init__(self) -> None:
        self.empty: list[list[tuple[str, int]]] = []
        self.chars: list[list[tuple[Ranges, int]]] = []

    def state(self) -> int:
        if len(self.empty) >= _MAX_NODES:
            raise LimitExceeded(f"a pattern needs more than {_MAX_NODES} nodes")
        self.empty.append([])
        self.chars.append([])
        return len(self.empty) - 1

    def add(self, node: _Node, at: int) -> int:
        kind = node[0]
        if kind == "chars":
            end = self.state()
            self.chars[at].append((node[1], end))
            return end
        if kind == "seq":
            for part in node[1]:
                at = self.add(part, at)
            return at
        if kind == "alt":
            end = self.state()
            for part in node[1]:
                first = self.state()
                self.empty[at].append(("", first))
                self.empty[self.add(part, first)].append(("", end))
            return end
        if kind in ("start", "end"):
            end = self.state()
            self.empty[at].append((kind, end))
            return end
        if kind == "repeat":
            _, part, least, most = node
            for _ in range(least):
                at = self.add(part, at)
            if most is None:
                loop, end = self.state(), self.state()
                self.empty[at].append(("", loop))
                self.empty[self.add(part, loop)].append(("", loop))
                self.empty[loop].append(("", end))
                return end
            end = self.state()
            for _ in range(most - least):
                self.empty[at].append(("", end))
                at = self.add(part, at)
            self.empty[at].append(("", end))
            return end
        raise PatternError("a look-ahead that is not at the beginning")

    def closure(self, states: frozenset[int], conditions: frozenset[str]) -> frozenset[int]:
        seen = set(states)
        todo = list(states)
        while todo:
            for condition, target in self.empty[todo.pop()]:
                if target not in seen and (not condition or condition in conditions):
                    seen.add(target)
                    todo.append(target)
        return frozenset(seen)


def _split_lookaheads(node: _Node) -> tuple[list[Dfa], _Node]:
    """Look-aheads right behind a leading ^, as whole-string conditions, and the pattern without them."""
    found: list[Dfa] = []
    if node[0] != "seq" or not node[1] or node[1][0][0] != "start":
        return found, node
    parts = list(node[1])
    while len(parts) > 1 and parts[1][0] == "ahead":
        found.append(parts.pop(1)[1])
    return found, ("seq", tuple(parts))


def compile_node(node: _Node) -> Dfa:
    if node[0] == "alt":
        branches = [_split_lookaheads(part) for part in node[1]]
        if any(found for found, _ in branches):
            result = compile_node(node[1][0])
            for part in node[1][1:]:
                result = result | compile_node(part)
            return result
    ahead, node = _split_lookaheads(node)
    nfa = _Nfa()
    start = nfa.state()
    final = nfa.add(node, start)
    anywhere = ((0, 0x10FFFF),)
    loop = nfa.state()  # the unanchored prefix
    nfa.empty[loop].append(("", start))
    nfa.chars[loop].append((normal_ranges(anywhere), loop))
    tail = nfa.state()  # and the rest behind a match
    nfa.empty[final].append(("", tail))
    nfa.chars[tail].append((normal_ranges(anywhere), tail))
    initial = frozenset({loop})
    none: frozenset[str] = frozenset()

    # A state of the automaton: nodes before empty moves, and whether nothing has been read.
    def step(state):  # type: ignore[no-untyped-def]
        kernel, at_start = state
        nodes = nfa.closure(kernel, frozenset({"start"}) if at_start else none)
        if tail in nodes:  # whatever follows matches
            for lo, hi in UNIVERSE:
                yield lo, hi, (frozenset({tail}), False)
            return
        moves = [(lo, hi, target) for n in nodes for ranges, target in nfa.chars[n] for lo, hi in ranges]
        points = sorted({p for lo, hi, _ in moves for p in (lo, hi + 1)})
        opening: dict[int, list[int]] = {}
        closing: dict[int, list[int]] = {}
        for lo, hi, target in moves:
            opening.setdefault(lo, []).append(target)
            closing.setdefault(hi + 1, []).append(target)
        current: dict[int, int] = {}
        for lo, after in pairwise(points):
            for target in closing.get(lo, ()):
                current[target] -= 1
                if not current[target]:
                    del current[target]
            for target in opening.get(lo, ()):
                current[target] = current.get(target, 0) + 1
            if current:
                yield lo, after - 1, (frozenset(current), False)

    def accepts(state):  # type: ignore[no-untyped-def]
        kernel, at_start = state
        conditions = {"end", "start"} if at_start else {"end"}
        return final in nfa.closure(kernel, frozenset(conditions)) or tail in kernel

    result = explore((initial, True), step, accepts)
    for condition in ahead:
        result = result & condition
    return result


@lru_cache(maxsize=512)
def search(pattern: str) -> Dfa:
    """Strings in which the pattern matches somewhere. Raises PatternError or LimitExceeded."""
    return compile_node(_Parser(pattern).parse())


@lru_cache(maxsize=512)
def whole(pattern: str) -> Dfa:
    """Strings that the pattern matches from end to end."""
    return search(f"^(?:{pattern})$")
