"""Writes a grammar in llguidance's dialect of Lark.

llguidance cuts the output into lexemes and takes the longest. That changes nothing here: a JSON string or literal is never the beginning of another, and what
follows a number or whitespace can never be part of it.
"""

from __future__ import annotations

import json
import re

from .automata import Dfa
from .elimination import regex_of
from .grammar import Alt, FreeNumber, FreeString, Grammar, Part, Ref, Regular, Repeat, Seq, Space, Text

_HEX = "[0-9a-fA-F]"
_CHAR = r"[^\x{22}\x{5c}\x{0}-\x{1f}]"
_FREE = rf"(?:{_CHAR}|\x{{5c}}(?:[\x{{22}}\x{{5c}}\x{{2f}}bfnrt]|u{_HEX}{{4}}))*"
_UNIT = rf"(?:{_CHAR}|\x{{5c}}(?:[\x{{22}}\x{{5c}}\x{{2f}}bfnrt]|u(?:[0-9a-cA-CefEF]{_HEX}|[dD][0-7]){_HEX}{_HEX}))"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][\x{2b}\x{2d}]?[0-9]{1,2})?"
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[a-z]+|[^"a-z]')
_MAX_DEPTH = 8  # of brackets in one rule; the library's parser refuses what is much deeper


class LarkWriter:
    """Source of one grammar.

    Args:
        flexible: Allow whitespace: none, a space, or a new line and up to 16 spaces.
    """

    def __init__(self, grammar: Grammar, *, flexible: bool) -> None:
        self._grammar = grammar
        self._flexible = flexible
        self._lexemes: dict[str, str] = {}  # regular expression to name
        self._regular: dict[tuple[Dfa, bool], str | None] = {}
        self._extra: dict[str, str] = {}

    def write(self) -> str | None:
        """None where some automaton has no short regular expression."""
        lines = {name: self._text(part, 0) for name, part in self._grammar.rules.items()}
        if any(text is None for text in lines.values()):
            return None
        out = [f"start: {self._grammar.root}"]
        out += [f"{name}: {text}" for name, text in (lines | self._extra).items()]
        out += [f"{name}: /{regex}/" for regex, name in self._lexemes.items()]
        return "\n".join(out) + "\n"

    def _text(self, part: Part, depth: int) -> str | None:
        if isinstance(part, Text):
            # One lexeme per token of JSON: `"a":` as one would be longer than a free name "a", and hide it.
            return " ".join(json.dumps(token, ensure_ascii=False) for token in _TOKENS.findall(part.text)) or '""'
        if isinstance(part, Ref):
            return part.rule
        if isinstance(part, Space):
            return f"{self._lexeme(' |' + chr(92) + 'n {0,16}')}?" if self._flexible else '""'
        if isinstance(part, FreeNumber):
            return self._lexeme(_NUMBER)
        if isinstance(part, FreeString):
            most = "" if part.most is None else part.most
            return self._lexeme(rf"\x{{22}}{_FREE if (part.least, part.most) == (0, None) else f'{_UNIT}{{{part.least},{most}}}'}\x{{22}}")
        if isinstance(part, Regular):
            key = (part.dfa, part.in_json)
            if key not in self._regular:
                self._regular[key] = regex_of(part.dfa, part.in_json)
            regex = self._regular[key]
            return self._lexeme(regex) if regex else None
        if depth >= _MAX_DEPTH:
            body = self._text(part, 0)
            if body is None:
                return None
            name = f"x{len(self._extra)}"
            self._extra[name] = body
            return name
        if isinstance(part, Repeat):
            inner = self._text(part.part, depth + 1)
            return None if inner is None else f"({inner}){{{part.least},{'' if part.most is None else part.most}}}"
        assert isinstance(part, Seq | Alt)
        texts = [self._text(inner, depth + 1) for inner in part.parts]
        if None in texts:
            return None
        joined = (" | " if isinstance(part, Alt) else " ").join(text for text in texts if text is not None) or '""'
        return f"({joined})" if isinstance(part, Alt) and depth else joined

    def _lexeme(self, regex: str) -> str:
        return self._lexemes.setdefault(regex, f"L{len(self._lexemes)}")
