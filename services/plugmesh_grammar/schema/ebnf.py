"""Writes a grammar as GBNF, the EBNF that `xgrammar.Grammar.from_ebnf` and llama.cpp read."""

from __future__ import annotations

from collections.abc import Sequence

from .automata import Dfa
from .grammar import Alt, FreeNumber, FreeString, Grammar, Part, Ref, Regular, Repeat, Seq, Space, Text

_HEX = "[0-9a-fA-F]"
_RAW = r'[^"\\\x00-\x1f]'
# Behind a backslash where code points are counted: lone surrogates are none, and pairs of them are one, so neither may be escaped.
_ESCAPE = r'["\\/bfnrt] | "u" ([0-9a-cA-CefEF] ' + _HEX + " | [dD] [0-7]) " + _HEX + " " + _HEX
_UNIT = rf'({_RAW} | "\\" ({_ESCAPE}))'
LONGEST_LINE = 64
"""Characters up to which a bounded string has a rule for each of them: xgrammar computes a mask in 0.02 ms then, in 20 to 40 ms where it counts repetitions."""
_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}


def literal(text: str) -> str:
    """Of one or more characters. xgrammar reads as many digits behind \\x as there are, so an escape ends its literal."""
    out = []
    for char in text:
        code = ord(char)
        if char in '"\\':
            out.append("\\" + char)
        elif code < 32 or 127 <= code < 160:
            out.append(f'\\x{code:02x}" "')
        else:
            out.append(char)
    return ('"' + "".join(out) + '"').removesuffix(' ""')


def _class_char(code: int) -> str:
    # Never as it is: see `literal`; no digit may follow an escape. The number of a hyphen xgrammar takes for the sign of a range.
    if code == 0x2D:
        return "\\-"
    return f"\\x{code:02x}" if code < 128 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _class(ranges: Sequence[tuple[int, int]]) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))
    return _brackets(ranges)


def _brackets(ranges: Sequence[tuple[int, int]]) -> str:
    return "[" + "".join(_class_char(lo) + (f"-{_class_char(hi)}" if hi > lo else "") for lo, hi in ranges) + "]"


def json_char(ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[str]]:
    """How characters are written inside of a JSON string: as they are, and as escapes.

    Of control characters without a short escape only single ones are written (from an enum, say), and those of a class that has nothing else.
    """
    raw: list[tuple[int, int]] = []
    escapes = []
    for lo, hi in ranges:
        for code, short in _ESCAPES.items():
            if lo <= code <= hi:
                escapes.append("\\" + short)
        if lo == hi < 32 and lo not in _ESCAPES:
            escapes.append(f"\\u{lo:04x}")
        for first, last in ((32, 33), (35, 91), (93, 0x10FFFF)):
            if max(lo, first) <= min(hi, last):
                raw.append((max(lo, first), min(hi, last)))
    if not raw and not escapes:
        escapes = [f"\\u{code:04x}" for lo, hi in ranges for code in range(lo, hi + 1)]
    return raw, escapes


class EbnfWriter:
    """Source of one grammar.

    Args:
        flexible: Allow whitespace: none, a space, or a new line and up to 16 spaces.
    """

    def __init__(self, grammar: Grammar, *, flexible: bool) -> None:
        self._grammar = grammar
        self._space = "ws" if flexible else ""
        self._lines: dict[str, str] = {}
        self._regular: dict[tuple[Dfa, bool], str] = {}
        self._helpers: dict[str, str] = {}
        self.counts_far = False  # a string has longer bounds than `LONGEST_LINE`

    def write(self) -> str:
        """Raises nothing: the grammar has been pruned."""
        for name, part in self._grammar.rules.items():
            self._lines[name] = self._text(part)
        lines = [f"root ::= {self._grammar.root}"]
        if self._space:
            lines.append(r'ws ::= "" | " " | "\n" " "{0,16}')
        lines += [f"{name} ::= {body}" for name, body in (self._helpers | self._lines).items()]
        return "\n".join(lines) + "\n"

    def _text(self, part: Part) -> str:
        if isinstance(part, Text):
            return literal(part.text)
        if isinstance(part, Ref):
            return part.rule
        if isinstance(part, Seq):
            texts = [f"({self._text(inner)})" if isinstance(inner, Alt) else self._text(inner) for inner in part.parts]
            return " ".join(text for text in texts if text) or '""'
        if isinstance(part, Alt):
            return " | ".join(self._text(inner) or '""' for inner in part.parts)
        if isinstance(part, Repeat):
            inner = self._text(part.part)
            times = "*" if (part.least, part.most) == (0, None) else f"{{{part.least},{'' if part.most is None else part.most}}}"
            return '""' if part.most == 0 else f"({inner}){times}"
        if isinstance(part, Space):
            return self._space
        if isinstance(part, FreeNumber):
            return self._helper("number", r'"-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+\-]? [0-9]{1,2})?')
        if isinstance(part, FreeString):
            if (part.least, part.most) == (0, None):
                return self._helper("string", r'"\"" ' + self._rest())
            if part.most == 0:
                return r'"\"\""'
            if (part.least if part.most is None else part.most) <= LONGEST_LINE:
                return self._line(part)
            self.counts_far = True
            unit = self._helper("char", _UNIT)
            return f'"\\"" {unit}{{{part.least},{"" if part.most is None else part.most}}} "\\""'
        return self._automaton(part)

    def _rest(self) -> str:
        # Characters that need no escape stand beside the rule, not in it: xgrammar then decides on tokens of them without the rest of the grammar.
        self._helper("free_escape", r'["\\/bfnrt] | "u" ' + " ".join([_HEX] * 4))
        self._helper("string_end", r'"\"" | "\\" free_escape ' + f"{_RAW}* string_end")
        return f"{_RAW}* string_end"

    def _line(self, part: FreeString) -> str:
        name, last = f"string{part.least}to{'' if part.most is None else part.most}n", part.least if part.most is None else part.most
        self._helper("escape", _ESCAPE)
        for num in range(last + 1):
            if num == last:
                body = self._rest() if part.most is None else r'"\""'
            else:
                body = f'{_RAW} {name}{num + 1} | "\\\\" escape {name}{num + 1}' + (r' | "\""' if num >= part.least else "")
            self._helper(f"{name}{num}", body)
        return r'"\"" ' + f"{name}0"

    def _helper(self, name: str, body: str) -> str:
        self._helpers[name] = body
        return name

    def _automaton(self, part: Regular) -> str:
        key = (part.dfa, part.in_json)
        if key not in self._regular:
            name = f"r{len(self._regular)}"
            self._regular[key] = name
            self._write_automaton(part.dfa, part.in_json, name)
        return self._regular[key]

    def _write_automaton(self, dfa: Dfa, in_json: bool, name: str) -> None:
        # A right-linear rule per state that more than one edge leads to; other states stand where they are used. A loop over plain characters is a
        # star, and escapes are edges of their own: xgrammar computes masks of this shape several times faster than of (class | escape)*.
        edges: list[list[tuple[str, int]]] = []
        loops: list[str] = []
        entries = [0] * len(dfa.arcs)
        entries[0] = 2
        for state, arcs in enumerate(dfa.arcs):
            grouped: dict[int, list[tuple[int, int]]] = {}
            for lo, hi, target in arcs:
                grouped.setdefault(target, []).append((lo, hi))
            here: list[tuple[str, int]] = []
            loop = ""
            for target, ranges in grouped.items():
                raw, escapes = json_char(ranges) if in_json else (ranges, [])
                if raw and target == state:
                    loop = _brackets(raw) + "*"  # not a literal, which `_joined` would lengthen
                elif raw:
                    here.append((_class(raw), target))
                if escapes:
                    here.append((_escapes(escapes), target))
            for _, target in here:
                entries[target] += 1
            edges.append(here)
            loops.append(loop)
        end = r'"\""' if in_json else '""'
        bodies: dict[int, str] = {}
        # States in post-order: one that stands in another's body is written before it.
        order: list[int] = []
        seen: set[int] = set()
        stack = [(0, False)]
        while stack:
            state, done = stack.pop()
            if done:
                order.append(state)
            elif state not in seen:
                seen.add(state)
                stack.append((state, True))
                stack.extend((target, False) for _, target in edges[state] if target not in seen)
        for state in order:
            rows = [_joined(text, bodies[target] if entries[target] < 2 else f"{name}s{target}") for text, target in edges[state]]
            if state in dfa.accepting:
                rows.append(end)
            body = " | ".join(rows)
            if len(rows) > 1 and (loops[state] or entries[state] < 2):
                body = f"({body})"
            bodies[state] = _joined(loops[state], body) if loops[state] else body
            if entries[state] >= 2:
                self._lines[f"{name}s{state}"] = bodies[state]
        self._lines[name] = r'"\"" ' + f"{name}s0" if in_json else f"{name}s0"


def _escapes(texts: Sequence[str]) -> str:
    """Edge text of JSON escapes; the short ones differ in their second character only."""
    short = [text[1] for text in texts if len(text) == 2]
    if len(short) < 2:
        return literal(texts[0]) if len(texts) == 1 else f"({' | '.join(literal(text) for text in texts)})"
    joined = r'"\\" ' + _class([(ord(char), ord(char)) for char in sorted(short)])
    rest = [literal(text) for text in texts if len(text) > 2]
    return joined if not rest else f"({' | '.join([joined, *rest])})"


def _joined(text: str, following: str) -> str:
    # Neighbouring literals become one, which makes shorter rules; not behind a hexadecimal escape, which would take the next digits with it.
    if text.endswith('"') and following.startswith('"') and following != '""' and "\\x" not in text:
        return text[:-1] + following[1:]
    return text if following == '""' else f"{text} {following}"
