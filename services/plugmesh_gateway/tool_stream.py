"""Calls out of a model's text while it comes.

What the deltas add up to depends on the text alone, never on how it was cut into pieces. The grammar makes the text well-formed; where it is cut short
(max_tokens, a stop string) a call ends as far as it came, and where it is not what the format says, text stays text.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .tool_formats import ToolFormat

_BLANKS = " \t\r\n"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text beside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call, the `index`-th; its name comes at once, its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON of a call's arguments."""

    index: int
    text: str


Delta = TextDelta | CallBegin | ArgumentsDelta
_Next = Callable[[], None]


class CallParser:
    """One output. `feed` its text, then `finish`.

    Attributes:
        num_calls: Calls that began.
        is_inside: The last call has not ended.
    """

    def __init__(self, how: ToolFormat) -> None:
        self.num_calls = 0
        self.is_inside = False
        self._how = how
        self._state: Callable[[], bool] = self._in_text
        self._is_first = True             # nothing but blanks so far
        self._strips = False              # blanks between and after calls are no text
        self._rest = ""                   # not looked at yet, or held back
        self._held = ""                   # of a frame: text again if it turns out to be none
        self._options: dict[str, _Next] = {}
        self._num_matched = 0
        self._name = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._out: list[Delta] = []
        bare = _bare(how.begin + how.head)
        again: dict[str, _Next] = {_bare(how.tail + how.end): self._enter_text}
        self._opening: dict[str, _Next] = {bare[len(_bare(how.trigger)) :]: self._enter_name}
        if how.separator is not None:
            again[_bare(how.tail + how.separator + how.head)] = self._enter_name
        if how.may_be_empty:
            self._opening[_bare(how.begin + how.end)[len(_bare(how.trigger)) :]] = self._enter_text
        self._ending = again

    def feed(self, text: str) -> list[Delta]:
        """What this piece adds."""
        self._rest += text
        while self._rest and self._state():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Delta]:
        """What was held back for something that did not come. The beginning of a call that has no name yet is nothing."""
        if self._state == self._in_text and self._rest:
            rest = self._rest.lstrip(_BLANKS) if self._strips else self._rest
            if rest:
                self._out.append(TextDelta(rest))
        self._rest = ""
        out, self._out = self._out, []
        return out

    # States: each consumes of `_rest` and returns whether to go on; False waits for more.

    def _in_text(self) -> bool:
        if self._strips:
            self._rest = self._rest.lstrip(_BLANKS)
            if not self._rest:
                return False
        trigger = self._how.trigger
        if self._how.is_first_only:
            begun = self._rest.lstrip(_BLANKS)
            if not begun and self._is_first:
                return False
            if self._is_first and begun.startswith(trigger):
                return self._found(len(self._rest) - len(begun))
            self._say(self._rest)
            self._rest = ""
            return False
        at = self._rest.find(trigger)
        if at >= 0:
            return self._found(at)
        keep = len(self._rest) - next((n for n in range(min(len(trigger) - 1, len(self._rest)), 0, -1) if self._rest.endswith(trigger[:n])), 0)
        keep = len(self._rest[:keep].rstrip(_BLANKS))
        self._say(self._rest[:keep])
        self._rest = self._rest[keep:]
        return False

    def _found(self, at: int) -> bool:
        trigger = self._how.trigger
        before = self._rest[:at]
        self._say(before.rstrip(_BLANKS))
        self._is_first = False
        self._held = before[len(before.rstrip(_BLANKS)) :] + trigger
        self._rest = self._rest[at + len(trigger) :]
        self._expect(self._opening)
        return True

    def _in_frame(self) -> bool:
        """Between names and arguments: fixed text, in which blanks mean nothing."""
        for i, char in enumerate(self._rest):
            if char in _BLANKS:
                continue
            self._options = {text: enter for text, enter in self._options.items() if text[self._num_matched] == char}
            self._num_matched += 1
            if not self._options:  # no call after all
                self._say(self._held + self._rest[:i])
                self._rest = self._rest[i:]
                self._held = ""
                self.is_inside = False
                self._state = self._in_text
                return True
            done = next((enter for text, enter in self._options.items() if len(text) == self._num_matched), None)
            if done is not None:
                self._held = ""
                self._rest = self._rest[i + 1 :]
                done()
                return True
        self._held += self._rest
        self._rest = ""
        return False

    def _in_name(self) -> bool:
        name, quote, rest = self._rest.partition('"')
        self._name += name
        self._rest = rest
        if quote:
            self._out.append(CallBegin(self.num_calls, f"call_{uuid.uuid4().hex[:24]}", self._name))
            self.num_calls += 1
            self.is_inside = True
            self._expect({_bare(self._how.middle)[1:]: self._enter_arguments})
        return bool(quote)

    def _in_arguments(self) -> bool:
        if not self._depth:
            self._rest = self._rest.lstrip(_BLANKS)
            if not self._rest:
                return False
            if self._rest[0] != "{":  # no arguments after all
                self.is_inside = False
                self._state = self._in_text
                return True
        for i, char in enumerate(self._rest):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._argue(self._rest[: i + 1])
                    self._rest = self._rest[i + 1 :]
                    self._expect(self._ending)
                    return True
        self._argue(self._rest)
        self._rest = ""
        return False

    # What leads from one to the next.

    def _expect(self, options: Mapping[str, _Next]) -> None:
        self._options = dict(options)
        self._num_matched = 0
        self._state = self._in_frame

    def _enter_text(self) -> None:
        self.is_inside = False
        self._strips = True
        self._is_first = False
        self._state = self._in_text

    def _enter_name(self) -> None:
        self.is_inside = False
        self._name = ""
        self._state = self._in_name

    def _enter_arguments(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._state = self._in_arguments

    def _say(self, text: str) -> None:
        if text:
            self._is_first = self._strips = False
            self._out.append(TextDelta(text))

    def _argue(self, text: str) -> None:
        if text:
            self._out.append(ArgumentsDelta(self.num_calls - 1, text))


def _bare(text: str) -> str:
    return "".join(c for c in text if c not in _BLANKS)
