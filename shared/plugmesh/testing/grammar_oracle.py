"""A slow, plain judge of grammars: which bytes can begin an output, and which tokens may therefore come next.

An Earley recogniser over characters on grammars given as trees (`plugmesh.grammar.syntax`, of which only the data types are used), asked about every single
token. It shares nothing with any engine: the trees are written down for engines by the functions here, in GBNF, as a regular expression and as Lark.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.grammar.syntax import Alt, Chars, Grammar, Node, Ref, Repeat, Seq, Text

Item = tuple[int, int, int]  # production, place of the dot, column in which it began
Pairs = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Productions:
    """A grammar as productions: symbols are numbers of rules, or classes of characters."""

    heads: list[int] = field(default_factory=list)
    bodies: list[tuple[int | Pairs, ...]] = field(default_factory=list)
    num_rules: int = 0

    def rule(self) -> int:
        self.num_rules += 1
        return self.num_rules - 1

    def add(self, head: int, *body: int | Pairs) -> None:
        self.heads.append(head)
        self.bodies.append(body)


class Oracle:
    """Judges one grammar. Rules that can never end are left out, so what begins a rule can also end."""

    def __init__(self, grammar: Grammar) -> None:
        self._p = _Productions()
        self._names = {name: self._p.rule() for name in grammar.rules}
        for name, node in grammar.rules.items():
            self._expand(self._names[name], node)
        self._root = self._names[grammar.root]
        self._keep_productive()
        self._by_head: dict[int, list[int]] = {}
        for i, head in enumerate(self._p.heads):
            self._by_head.setdefault(head, []).append(i)
        self._nullable = self._find_nullable()
        self._columns: dict[str, tuple[list[Item], dict[int, list[Item]]] | None] = {}

    # -- what may be asked ----------------------------------------------------------------------------------------------

    def is_viable(self, prefix: bytes) -> bool:
        """Some output begins with these bytes."""
        text, rest = _characters(prefix)
        column = self._column(text) if text is not None else None
        if column is None:
            return False
        if not rest:
            return True
        low, high = _reach(rest)
        return any(a <= high and low <= b for pairs in self._expected(column) for a, b in pairs)

    def is_complete(self, prefix: bytes) -> bool:
        """These bytes are an output."""
        text, rest = _characters(prefix)
        column = self._column(text) if text is not None and not rest else None
        return column is not None and any(begin == 0 and self._p.heads[p] == self._root and dot == len(self._p.bodies[p]) for p, dot, begin in column[0])

    def allowed(self, prefix: bytes, vocabulary: GrammarVocabulary) -> set[int]:
        """Every token tried by itself; end tokens where the output is complete."""
        found = {i for i, token in enumerate(vocabulary.token_bytes) if token and i not in vocabulary.special_ids and self.is_viable(prefix + token)}
        found -= set(vocabulary.eos_token_ids)
        return found | set(vocabulary.eos_token_ids) if self.is_complete(prefix) else found

    def forced(self, prefix: bytes, limit: int = 64) -> bytes:
        """Bytes that must follow; at most `limit`."""
        found = b""
        while len(found) < limit and not self.is_complete(prefix + found):
            nexts = [b for b in range(256) if self.is_viable(prefix + found + bytes([b]))]
            if len(nexts) != 1:
                break
            found += bytes(nexts)
        return found

    # -- how it finds out -------------------------------------------------------------------------------------------------

    def _expand(self, head: int, node: Node) -> None:
        p = self._p
        if isinstance(node, Alt):
            for item in node.items:
                self._expand(head, item)
        elif isinstance(node, Text):
            p.add(head, *[((ord(c), ord(c)),) for c in node.text])
        elif isinstance(node, Chars):
            if node.ranges:
                p.add(head, node.ranges)
        elif isinstance(node, Ref):
            p.add(head, self._names[node.name])
        elif isinstance(node, Seq):
            p.add(head, *[self._rule_of(i) for i in node.items])
        else:
            inner = self._rule_of(node.item)
            least = [inner] * node.least
            if node.most is None:
                more = p.rule()
                p.add(more)
                p.add(more, more, inner)
                p.add(head, *least, more)
            else:
                for n in range(node.least, node.most + 1):
                    p.add(head, *[inner] * n)

    def _rule_of(self, node: Node) -> int:
        if isinstance(node, Ref):
            return self._names[node.name]
        number = self._p.rule()
        self._expand(number, node)
        return number

    def _keep_productive(self) -> None:
        p, good = self._p, set[int]()
        size = -1
        while size != len(good):
            size = len(good)
            good |= {h for h, body in zip(p.heads, p.bodies, strict=True) if all(s in good for s in body if isinstance(s, int))}
        kept = [(h, b) for h, b in zip(p.heads, p.bodies, strict=True) if all(s in good for s in b if isinstance(s, int))]
        p.heads, p.bodies = [h for h, _ in kept], [b for _, b in kept]

    def _find_nullable(self) -> set[int]:
        found: set[int] = set()
        size = -1
        while size != len(found):
            size = len(found)
            found |= {h for h, body in zip(self._p.heads, self._p.bodies, strict=True) if all(isinstance(s, int) and s in found for s in body)}
        return found

    def _column(self, text: str) -> tuple[list[Item], dict[int, list[Item]]] | None:
        """Items after a text, and those of them that wait for a rule; None when nothing begins so."""
        if text in self._columns:
            return self._columns[text]
        known = len(text)
        while known and text[:known] not in self._columns:
            known -= 1
        for n in range(known if text[:known] in self._columns else 0, len(text) + 1):
            if text[:n] not in self._columns:
                self._columns[text[:n]] = self._read(text[:n])
        return self._columns[text]

    def _read(self, text: str) -> tuple[list[Item], dict[int, list[Item]]] | None:
        """The column of a text whose shorter beginnings have theirs."""
        if not text:
            return self._closed([(i, 0, 0) for i in self._by_head.get(self._root, [])], "")
        before, c, start = self._columns[text[:-1]], ord(text[-1]), []
        for p, dot, begin in before[0] if before is not None else []:
            body = self._p.bodies[p]
            symbol = body[dot] if dot < len(body) else None
            if isinstance(symbol, tuple) and any(a <= c <= b for a, b in symbol):
                start.append((p, dot + 1, begin))
        return self._closed(start, text) if start else None

    def _closed(self, start: list[Item], text: str) -> tuple[list[Item], dict[int, list[Item]]] | None:
        here = len(text)
        items: list[Item] = []
        seen: set[Item] = set()
        waiting: dict[int, list[Item]] = {}

        def add(item: Item) -> None:
            if item not in seen:
                seen.add(item)
                items.append(item)

        for item in start:
            add(item)
        at = 0
        while at < len(items):
            p, dot, begin = items[at]
            at += 1
            body = self._p.bodies[p]
            if dot == len(body):
                head = self._p.heads[p]
                if begin == here:
                    earlier = waiting.get(head, [])
                else:
                    column = self._columns[text[:begin]]
                    assert column is not None
                    earlier = column[1].get(head, [])
                for q, place, origin in list(earlier):
                    add((q, place + 1, origin))
                continue
            symbol = body[dot]
            if isinstance(symbol, int):
                waiting.setdefault(symbol, []).append((p, dot, begin))
                for q in self._by_head.get(symbol, []):
                    add((q, 0, here))
                if symbol in self._nullable:
                    add((p, dot + 1, begin))
        return (items, waiting) if items else None

    def _expected(self, column: tuple[list[Item], dict[int, list[Item]]]) -> set[Pairs]:
        found: set[Pairs] = set()
        for p, dot, _ in column[0]:
            body = self._p.bodies[p]
            symbol = body[dot] if dot < len(body) else None
            if isinstance(symbol, tuple):
                found.add(symbol)
        return found


@functools.lru_cache(maxsize=200_000)
def _characters(data: bytes) -> tuple[str | None, bytes]:
    """Whole characters and what may begin one more; no text when it is no UTF-8 however it goes on."""
    for cut in range(min(3, len(data)) + 1):
        rest = data[len(data) - cut :]
        try:
            text = data[: len(data) - cut].decode()
        except UnicodeDecodeError:
            continue
        return (text, rest) if not rest or _reach(rest)[0] <= _reach(rest)[1] else (None, b"")
    return None, b""


def _reach(rest: bytes) -> tuple[int, int]:
    """First and last character whose UTF-8 begins with these one to three bytes and is longer; an empty range if there is none."""
    return _long_characters().get(rest, (1, 0))


@functools.lru_cache(maxsize=1)
def _long_characters() -> dict[bytes, tuple[int, int]]:
    """Of every 64th character and the one before it, the ends of what shares all bytes but the last and so of what shares fewer: beginnings to first and last."""
    found: dict[bytes, tuple[int, int]] = {}
    for c in sorted({c + d for c in range(0x80, 0x110000, 64) for d in (0, 63)}):
        if not 0xD800 <= c <= 0xDFFF:
            encoded = chr(c).encode()
            for n in range(1, len(encoded)):
                found[encoded[:n]] = (found.get(encoded[:n], (c, c))[0], c)
    return found


def as_set(mask: np.ndarray) -> set[int]:
    """Tokens of a mask."""
    return set(np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist())


def differing(mask: np.ndarray, allowed: set[int]) -> list[int]:
    """Bits that are not as they should be."""
    return sorted(as_set(mask) ^ allowed)


# -- a vocabulary that has everything -----------------------------------------------------------------------------------


def vocabulary(*, name: str = "oracle-vocabulary") -> GrammarVocabulary:
    """About 600 tokens as byte-level BPE makes them: every byte, pieces of words, numbers and JSON, whole and split characters, runs; two ends, control
    tokens with text of their own, holes, one empty token, and logits that are wider than the tokens by a number that no word of the mask divides."""
    words = ["the", "a", "an", "of", "to", "and", "is", "in", "it", "that", "name", "value", "true", "false", "null", "type", "string", "object", "item", "list", "city", "age", "first", "last", "number", "one", "two"]
    parts = [w.encode() for w in words] + [b" " + w.encode() for w in words] + [w.capitalize().encode() for w in words]
    parts += [bytes([a, b]) for a in b"abxyz01-(" for b in b"abxyz01)("]
    parts += [b'{"', b'"}', b'":', b'": ', b'":"', b'","', b'", "', b'"],', b'"},', b"[]", b"{}", b"[[", b"]]", b"},{", b"\n  ", b"\n    ", b"  ", b"\r\n", b'\\"', b"\\u", b"\\n"]
    parts += [b"((", b"(((", b"))", b")))", b"()", b")(", b"+1", b"1+", b"*2", b"--", b"...", b"://", b"</", b"/>", b"aaa", b"aaaa", b"a" * 8, b"aab", b"bba", b"abc", b"abcab", b"bc", b"cab"]
    parts += [b"12", b"123", b"000", b"2024", b"3.14", b"-1", b"1e", b"e+", b"0.", b".5", b"99"]
    parts += [c.encode() for c in "éèüßñ中文字€→😀🎉"] + ["né".encode(), b"caf", "中文".encode(), "é\"".encode()]
    parts += [b"\xe2\x82", b"\x82\xac", b"\xac", b"\xf0\x9f", b"\xf0\x9f\x98", b"\x9f\x98\x80", b"\x98\x80", b"\xe4\xb8", b"\xb8\xad", b"\xa9", b"a\xc3", b"\xa9\xc3", b"\xa9b", b"\xad\xe6"]
    parts += [w[:n].encode() for w in ("function", "return", "constant", "undefined", "parameter", "assistant") for n in range(2, len(w) + 1)]
    rng = np.random.default_rng(7)
    letters = np.frombuffer(b'abcdefghij"{}[]:, 0123456789.-', np.uint8)
    parts += [rng.choice(letters, int(rng.integers(2, 5))).tobytes() for _ in range(110)]
    tokens: list[bytes | None] = [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>", b"abc", *[bytes([i]) for i in range(256)]]  # 3 is a control token
    tokens += list(dict.fromkeys(p for p in parts if len(p) > 1))
    tokens[300:300] = [None, b""]
    tokens.append(None)
    width = len(tokens) + 45
    return GrammarVocabulary(tokens, width + (width % 32 == 0), frozenset({0, 1, 2, 3}), (0, 2), name, encode=lambda text: [4 + b for b in text.encode()])


# -- trees in the notations of engines -----------------------------------------------------------------------------------


def write(grammar: Grammar, languages: Sequence[str] | frozenset[str]) -> tuple[str, str] | None:
    """The grammar in the first of ebnf, regex and lark that is among `languages` and can say it: (language, source)."""
    if "ebnf" in languages:
        return "ebnf", as_ebnf(grammar)
    if "regex" in languages and not grammar.is_recursive:
        return "regex", as_regex(grammar)
    return ("lark", as_lark(grammar)) if "lark" in languages else None


def as_ebnf(grammar: Grammar) -> str:
    """The root rule comes last, so that its name must be looked for."""
    lines = [f"{name} ::= {_ebnf(node)}" for name, node in grammar.rules.items() if name != grammar.root]
    return "\n".join([*lines, f"root ::= {_ebnf(grammar.rules[grammar.root])}" if grammar.root == "root" else f"root ::= {grammar.root}\n{grammar.root} ::= {_ebnf(grammar.rules[grammar.root])}"]) + "\n"


def _ebnf(node: Node) -> str:
    if isinstance(node, Text):
        return '"' + "".join("\\" + c if c in '"\\' else c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\U{ord(c):08X}" for c in node.text) + '"'
    if isinstance(node, Chars):
        return "[" + "".join(_class_char(a, "ebnf") + ("" if a == b else "-" + _class_char(b, "ebnf")) for a, b in node.ranges) + "]"
    if isinstance(node, Ref):
        return node.name
    if isinstance(node, Seq):
        return "(" + " ".join(map(_ebnf, node.items)) + ")" if node.items else '""'
    if isinstance(node, Alt):
        return "(" + " | ".join(map(_ebnf, node.items)) + ")"
    return f"({_ebnf(node.item)})" + _times(node)


def as_regex(grammar: Grammar) -> str:
    return _regex(grammar.rules[grammar.root], grammar)


def _regex(node: Node, grammar: Grammar) -> str:
    if isinstance(node, Text):
        return "".join("\\" + c if c.isascii() and c.isprintable() and not c.isalnum() and c != " " else c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\u{ord(c):04x}" for c in node.text)
    if isinstance(node, Chars):
        return "[" + "".join(_class_char(a, "regex") + ("" if a == b else "-" + _class_char(b, "regex")) for a, b in node.ranges) + "]"
    if isinstance(node, Ref):
        return "(?:" + _regex(grammar.rules[node.name], grammar) + ")"
    if isinstance(node, Seq):
        return "".join("(?:" + _regex(i, grammar) + ")" for i in node.items)
    if isinstance(node, Alt):
        return "(?:" + "|".join(_regex(i, grammar) for i in node.items) + ")"
    return "(" + _regex(node.item, grammar) + ")" + _times(node)


def as_lark(grammar: Grammar) -> str:
    """Every terminal is one character: no lexer that takes the longest can go wrong."""
    names = {name: f"n{i}" for i, name in enumerate(grammar.rules)}
    return f"start: {names[grammar.root]}\n" + "".join(f"{names[n]}: {_lark(node, names)}\n" for n, node in grammar.rules.items())


def _lark(node: Node, names: dict[str, str]) -> str:
    if isinstance(node, Text):
        return "(" + " ".join(f"/[{_class_char(ord(c), 'lark')}]/" for c in node.text) + ")" if node.text else '""'
    if isinstance(node, Chars):
        return "/[" + "".join(_class_char(a, "lark") + ("" if a == b else "-" + _class_char(b, "lark")) for a, b in node.ranges) + "]/"
    if isinstance(node, Ref):
        return names[node.name]
    if isinstance(node, Seq):
        return "(" + " ".join(_lark(i, names) for i in node.items) + ")" if node.items else '""'
    if isinstance(node, Alt):
        return "(" + " | ".join(_lark(i, names) for i in node.items) + ")"
    return f"({_lark(node.item, names)})" + _times(node)


def _class_char(c: int, language: str) -> str:
    if chr(c).isascii() and chr(c).isalnum():
        return chr(c)
    if language == "ebnf":
        return f"\\x{c:02x}" if c < 128 else f"\\u{c:04x}" if c <= 0xFFFF else f"\\U{c:08x}"
    return f"\\x{{{c:x}}}" if language == "lark" else f"\\x{c:02x}" if c < 128 else f"\\u{{{c:x}}}"


def _times(node: Repeat) -> str:
    short = {(0, 1): "?", (0, None): "*", (1, None): "+"}.get((node.least, node.most))
    return short or f"{{{node.least}{'' if node.most == node.least else ',' if node.most is None else f',{node.most}'}}}"
