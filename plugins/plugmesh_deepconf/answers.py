"""The answer that a trace comes to, in a form that can be compared."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

AnswerKind = Literal["auto", "number", "boxed", "choice", "line"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_CHOICE = re.compile(r"\b([A-J])\b")


def extract(text: str, kind: AnswerKind = "auto") -> str | None:
    """The answer in `text`, or None when there is none.

    "number": the first number behind the last "answer", else the last number; without thousands separators and trailing zeros. "boxed": what the last
    \\boxed{} holds. "choice": a capital letter A to J, found as numbers are. "line": the last line, in lower case and with single spaces.
    "auto": the first of boxed, number and line that is there.
    """
    return _KINDS[kind](text)


def _behind_answer(text: str) -> str:
    at = text.lower().rfind("answer")
    return text[at + len("answer") :] if at >= 0 else ""


def _number(text: str) -> str | None:
    found = _NUMBER.search(_behind_answer(text))
    value = found.group() if found else next(reversed(_NUMBER.findall(text)), None)
    if value is None:
        return None
    value = value.replace(",", "")
    if "." in value:
        value = value.rstrip("0").rstrip(".")
    sign, digits = ("-", value[1:]) if value.startswith("-") else ("", value)
    digits = digits.lstrip("0") or "0"
    digits = "0" + digits if digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return " ".join(text[begin:i].split()) or None
    return None


def _choice(text: str) -> str | None:
    found = _CHOICE.search(_behind_answer(text))
    return found.group(1) if found else next(reversed(_CHOICE.findall(text)), None)


def _line(text: str) -> str | None:
    lines = [" ".join(line.split()).lower() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), None)


_KINDS: dict[str, Callable[[str], str | None]] = {
    "number": _number, "boxed": _boxed, "choice": _choice, "line": _line,
    "auto": lambda text: _boxed(text) or _number(text) or _line(text),
}  # fmt: skip
assert set(_KINDS) == set(get_args(AnswerKind))
