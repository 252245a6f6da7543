"""Telling the template's control tokens from those a caller wrote.

A template mixes its own text with the caller's, and the result is one string. To keep track, untrusted strings are
*marked* before rendering: a character that occurs nowhere else is put inside whatever could become (part of) a
control token. In the rendered text, a control token is then found only where the template wrote it; afterwards the
marks are taken out again. Unlike placeholders, this leaves a template free to look at contents (trim, split, `in`).

Marks could change what a template does, so there are two strengths. `strong` breaks every place where a control token
could begin, end, or be continued; `whole` only complete control tokens and loose ends. The caller renders without
marks, too, and takes the strongest marking that gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from plugmesh.errors import InvalidRequest, LimitExceeded
from plugmesh.tokenization.encode import clean_text

# Unicode noncharacters: never in text on purpose, and not white space, so `trim` leaves them.
_MARKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


def map_strings(
    value: Any, change: Callable[[str], str], change_key: Callable[[str], str], *, max_depth: int, depth: int = 0
) -> Any:
    """JSON-like data with every string and every key of an object changed.

    Raises:
        LimitExceeded: Nested deeper than `max_depth`.
    """
    if depth > max_depth:
        raise LimitExceeded(f"JSON is nested deeper than {max_depth}")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(v, change, change_key, max_depth=max_depth, depth=depth + 1) for v in value]
    if isinstance(value, dict):
        return {change_key(k): map_strings(v, change, change_key, max_depth=max_depth, depth=depth + 1) for k, v in value.items()}
    return value


def strings_of(value: Any) -> Iterator[str]:
    """Every string in JSON-like data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for v in value:
            yield from strings_of(v)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield k
            yield from strings_of(v)


def unused_mark(texts: Iterable[str]) -> str:
    """A noncharacter that occurs in none of the texts. Raises InvalidRequest when all 32 are taken."""
    free = dict.fromkeys(_MARKS)
    for text in texts:
        if text.isascii():
            continue
        for mark in list(free):
            if mark in text:
                del free[mark]
    if not free:
        raise InvalidRequest("the messages use all noncharacters U+FDD0 to U+FDEF", param="messages")
    return next(iter(free))


class Marker:
    """Puts marks into untrusted strings so that no control token can come of them.

    Args:
        specials: Texts of the control tokens.
        mark: From `unused_mark`.
    """

    def __init__(self, specials: Iterable[str], mark: str) -> None:
        self.mark = mark
        self._specials = sorted(specials, key=len, reverse=True)
        self._longest = len(self._specials[0]) if self._specials else 0
        self._heads = frozenset(s[:n] for s in self._specials for n in range(1, len(s) + 1))
        self._tails = frozenset(s[-n:] for s in self._specials for n in range(1, len(s) + 1))
        firsts = "".join(re.escape(c) for c in sorted({s[0] for s in self._specials}))
        lasts = "".join(re.escape(c) for c in sorted({s[-1] for s in self._specials}))
        self._first = re.compile(f"([{firsts}])") if firsts else None
        self._last = re.compile(f"([{lasts}])") if lasts else None
        self._whole = re.compile("|".join(map(re.escape, self._specials))) if self._specials else None

    def complete(self, text: str) -> str:
        """Marks complete control tokens only: for keys of objects, by which a template finds its data."""
        if self._whole is None:
            return text
        # Search again from the second character, so that overlapping ones are broken, too.
        out, start = [], 0
        while match := self._whole.search(text, start):
            out += [text[start : match.start() + 1], self.mark]
            start = match.start() + 1
        return "".join(out) + text[start:]

    def whole(self, text: str) -> str:
        """Marks complete control tokens, and ends that text around them could complete."""
        return self._ends(self.complete(text))

    def strong(self, text: str) -> str:
        """Marks after every character that begins a control token and before every one that ends one."""
        if self._first is None or self._last is None:
            return text
        lead, core, trail = _trimmed(text)
        if not core:
            return text
        if len(core) <= self._longest and any(core in special for special in self._specials):
            core = self.mark + core + self.mark  # the template may supply the rest: '<|' + name + '|>'
        core = self._first.sub(rf"\1{self.mark}", core)
        return lead + self._ends(self._last.sub(rf"{self.mark}\1", core)) + trail

    def _ends(self, text: str) -> str:
        """A tail that begins a control token and a head that ends one, white space aside, get a mark at the border."""
        lead, core, trail = _trimmed(text)
        if not core:
            return text
        if any(core[-n:] in self._heads for n in range(1, min(len(core), self._longest) + 1)):
            core += self.mark
        if any(core[:n] in self._tails for n in range(1, min(len(core), self._longest) + 1)):
            core = self.mark + core
        return lead + core + trail

    def restore(self, text: str) -> str:
        """Without the marks."""
        return text.replace(self.mark, "")


def _trimmed(text: str) -> tuple[str, str, str]:
    """White space before, the rest, white space after."""
    core = text.strip()
    start = len(text) - len(text.lstrip())
    return text[:start], core, text[start + len(core) :]


def clean_value(value: Any, *, max_depth: int) -> Any:
    """JSON-like data without lone surrogates, which JSON escapes can smuggle in."""
    return map_strings(value, clean_text, clean_text, max_depth=max_depth)
