"""A grammar before it is written in an engine's language: rules of literals, character classes, automata, sequences, alternatives, repetitions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from plugmesh.errors import LimitExceeded

from .automata import Dfa


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Ref:
    rule: str


@dataclass(frozen=True, slots=True)
class Seq:
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    part: Part
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Regular:
    """A set of strings, not empty: as they are, or in JSON with quotes and escapes."""

    dfa: Dfa
    in_json: bool


@dataclass(frozen=True, slots=True)
class FreeString:
    """Any JSON string of so many code points, all of JSON's escapes allowed."""

    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class FreeNumber:
    """Any JSON number."""


@dataclass(frozen=True, slots=True)
class Space:
    """Optional whitespace, as the grammar's policy says."""


Part = Union[Text, Ref, Seq, Alt, Repeat, Regular, FreeString, FreeNumber, Space]  # noqa: UP007  (the names are strings still)
NEVER = Alt(())
SPACE = Space()


def seq(*parts: Part) -> Part:
    flat: list[Part] = []
    for part in parts:
        for inner in part.parts if isinstance(part, Seq) else (part,):
            if inner == NEVER:
                return NEVER
            if flat and isinstance(inner, Text) and isinstance(flat[-1], Text):
                flat[-1] = Text(flat[-1].text + inner.text)
            else:
                flat.append(inner)
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def alt(*parts: Part) -> Part:
    flat: dict[Part, None] = {}
    for part in parts:
        for inner in part.parts if isinstance(part, Alt) else (part,):
            flat[inner] = None
    return next(iter(flat)) if len(flat) == 1 else Alt(tuple(flat))


@dataclass(slots=True)
class Grammar:
    """Rules by name; `root` is where it starts."""

    max_rules: int
    rules: dict[str, Part] = field(default_factory=dict)
    root: str = "root"

    def add(self, name: str, part: Part) -> Ref:
        if len(self.rules) >= self.max_rules:
            raise LimitExceeded(f"the grammar needs more than {self.max_rules} rules")
        self.rules[name] = part
        return Ref(name)

    def pruned(self) -> bool:
        """Drops what can never be completed or reached. False when that is the root."""
        # 1. Which rules derive a finite text, as a least fixed point.
        users: dict[str, list[str]] = {}
        for name, part in self.rules.items():
            for used in references(part):
                users.setdefault(used, []).append(name)
        finite: set[str] = set()
        todo = list(self.rules)
        while todo:
            name = todo.pop()
            if name not in finite and _ends(self.rules[name], finite):
                finite.add(name)
                todo.extend(users.get(name, ()))
        if self.root not in finite:
            return False
        # 2. Keep those, reached from the root.
        kept: dict[str, Part] = {}
        stack = [self.root]
        while stack:
            name = stack.pop()
            if name not in kept:
                kept[name] = _prune(self.rules[name], finite)
                stack.extend(reversed(list(references(kept[name]))))
        self.rules = kept
        return True


def references(part: Part) -> dict[str, None]:
    """Names of the rules that a part uses, in order."""
    found: dict[str, None] = {}
    stack = [part]
    while stack:
        here = stack.pop()
        if isinstance(here, Ref):
            found[here.rule] = None
        elif isinstance(here, Seq | Alt):
            stack.extend(reversed(here.parts))
        elif isinstance(here, Repeat):
            stack.append(here.part)
    return found


def _ends(part: Part, finite: set[str]) -> bool:
    if isinstance(part, Ref):
        return part.rule in finite
    if isinstance(part, Seq):
        return all(_ends(inner, finite) for inner in part.parts)
    if isinstance(part, Alt):
        return any(_ends(inner, finite) for inner in part.parts)
    if isinstance(part, Repeat):
        return part.least == 0 or _ends(part.part, finite)
    return True


def _prune(part: Part, finite: set[str]) -> Part:
    if isinstance(part, Seq):
        return seq(*(_prune(inner, finite) for inner in part.parts))
    if isinstance(part, Alt):
        return alt(*(_prune(inner, finite) for inner in part.parts if _ends(inner, finite)))
    if isinstance(part, Repeat):
        return Repeat(_prune(part.part, finite), part.least, part.most) if _ends(part.part, finite) else Text("")
    return part
