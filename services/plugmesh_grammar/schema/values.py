"""Sets of JSON values in a normal form: one constraint per JSON type, objects and arrays as unions of records.

An expression is a hashable tuple that stands for a schema: ("true",), ("false",), ("node", path, scope), ("const", canonical value), ("has", name) for
objects with such a member, ("not", e), ("and", frozenset), ("or", frozenset). Expressions inside records stay unevaluated, which is how recursive schemas end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from plugmesh.errors import LimitExceeded

from . import automata, numbers
from .automata import ANY, EMPTY, Dfa

Expr = tuple[Any, ...]
TRUE: Expr = ("true",)
FALSE: Expr = ("false",)


def both(*parts: Expr) -> Expr:
    found: set[Expr] = set()
    for part in parts:
        if part == FALSE:
            return FALSE
        if part[0] == "and":
            found |= part[1]
        elif part != TRUE:
            found.add(part)
    if any(negation(part) in found for part in found if part[0] == "not"):
        return FALSE
    return TRUE if not found else next(iter(found)) if len(found) == 1 else ("and", frozenset(found))


def either(*parts: Expr) -> Expr:
    found: set[Expr] = set()
    for part in parts:
        if part == TRUE:
            return TRUE
        if part[0] == "or":
            found |= part[1]
        elif part != FALSE:
            found.add(part)
    if any(negation(part) in found for part in found if part[0] == "not"):
        return TRUE
    return FALSE if not found else next(iter(found)) if len(found) == 1 else ("or", frozenset(found))


def negation(part: Expr) -> Expr:
    if part == TRUE:
        return FALSE
    if part == FALSE:
        return TRUE
    return part[1] if part[0] == "not" else ("not", part)


@dataclass(frozen=True, slots=True)
class Strings:
    """Strings of a set whose length in code points is within bounds; kept apart because long bounds make long automata."""

    dfa: Dfa = ANY
    least: int = 0
    most: int | None = None

    @property
    def is_free(self) -> bool:
        return self.dfa is ANY and self.least == 0 and self.most is None

    def settled(self) -> Dfa:
        """As one automaton."""
        if self.dfa.is_empty or (self.most is not None and self.most < self.least):
            return EMPTY
        shortest, longest = self.dfa.lengths()
        if shortest >= self.least and (self.most is None or (longest is not None and longest <= self.most)):
            return self.dfa
        finite = longest if longest is not None else None
        most = self.most if finite is None or (self.most is not None and self.most < finite) else None
        if max(self.least, most or 0) > automata.MAX_STATES:
            raise LimitExceeded(f"a string length above {automata.MAX_STATES} together with another constraint on the string")
        return self.dfa & automata.of_length(self.least, most)

    def __and__(self, other: Strings) -> Strings:
        most = self.most if other.most is None else other.most if self.most is None else min(self.most, other.most)
        return Strings(self.dfa & other.dfa, max(self.least, other.least), most)

    def __or__(self, other: Strings) -> Strings:
        for a, b in ((self, other), (other, self)):
            if a.is_free or b.is_empty or a == b:
                return a
        return Strings(self.settled() | other.settled())

    def complement(self) -> Strings:
        if self.dfa is ANY and self.most is None:
            return Strings(EMPTY) if self.least == 0 else Strings(ANY, 0, self.least - 1)
        if self.dfa is ANY and self.least == 0 and self.most is not None:
            return Strings(ANY, self.most + 1, None)
        return Strings(ANY - self.settled())

    @property
    def is_empty(self) -> bool:
        if self.dfa is ANY or self.dfa.is_empty:
            return self.dfa.is_empty or (self.most is not None and self.most < self.least)
        return self.settled().is_empty


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects in which every member whose name is in a set has a value of an expression, and some members exist.

    Attributes:
        every: Pairs (names, expression).
        some: Pairs (names, expression): there is a member with such a name and value.
        least: Of the number of members.
    """

    every: frozenset[tuple[Dfa, Expr]] = frozenset()
    some: frozenset[tuple[Dfa, Expr]] = frozenset()
    least: int = 0
    most: int | None = None

    def __and__(self, other: Objects) -> Objects:
        return Objects(self.every | other.every, self.some | other.some, max(self.least, other.least), _least(self.most, other.most))

    def complement(self) -> list[Objects]:
        out = [Objects(some=frozenset({(names, negation(part))})) for names, part in self.every]
        out += [Objects(every=frozenset({(names, negation(part))})) for names, part in self.some]
        if self.least > 0:
            out.append(Objects(most=self.least - 1))
        if self.most is not None:
            out.append(Objects(least=self.most + 1))
        return out


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays.

    Attributes:
        every: Triples (first index, index behind the last or None, expression): items there are of the expression.
        counts: (first index, expression, least, most or None): so many of the items from there on are of the expression.
        unique: True: no two items are equal; False: two are.
    """

    every: frozenset[tuple[int, int | None, Expr]] = frozenset()
    counts: frozenset[tuple[int, Expr, int, int | None]] = frozenset()
    least: int = 0
    most: int | None = None
    unique: bool | None = None

    def __and__(self, other: Arrays) -> Arrays | None:
        if None not in (self.unique, other.unique) and self.unique != other.unique:
            return None
        unique = self.unique if self.unique is not None else other.unique
        return Arrays(self.every | other.every, self.counts | other.counts, max(self.least, other.least), _least(self.most, other.most), unique)

    def complement(self) -> list[Arrays]:
        out: list[Arrays] = []
        for first, behind, part in self.every:
            if behind == first + 1:
                out.append(Arrays(every=frozenset({(first, behind, negation(part))}), least=first + 1))
            elif behind is None:
                out.append(Arrays(counts=frozenset({(first, negation(part), 1, None)})))
            else:
                out.extend(Arrays(every=frozenset({(i, i + 1, negation(part))}), least=i + 1) for i in range(first, behind))
        for first, part, least, most in self.counts:
            if least > 0:
                out.append(Arrays(counts=frozenset({(first, part, 0, least - 1)})))
            if most is not None:
                out.append(Arrays(counts=frozenset({(first, part, most + 1, None)})))
        if self.least > 0:
            out.append(Arrays(most=self.least - 1))
        if self.most is not None:
            out.append(Arrays(least=self.most + 1))
        if self.unique is not None:
            out.append(Arrays(unique=not self.unique))
        return out


def _least(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


@dataclass(frozen=True, slots=True)
class Values:
    """A set of JSON values."""

    null: bool = True
    booleans: frozenset[bool] = frozenset({True, False})
    numbers: Dfa = numbers.NUMBERS
    strings: Strings = Strings()
    arrays: tuple[Arrays, ...] = (Arrays(),)
    objects: tuple[Objects, ...] = (Objects(),)


ALL = Values()
NOTHING = Values(False, frozenset(), numbers.NONE, Strings(EMPTY), (), ())


def canonical(value: Any) -> Expr:
    """A hashable form in which equal JSON values are equal: 1 and 1.0 are, 1 and true are not."""
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, int | Decimal):
        number = Decimal(value)
        sign, digits, exponent = number.normalize(None).as_tuple() if number else (0, (0,), 0)
        if isinstance(value, int):  # normalize rounds to the context's precision
            text = str(abs(value)).rstrip("0")
            sign, digits, exponent = (int(value < 0), tuple(map(int, text)), len(str(abs(value))) - len(text)) if value else (0, (0,), 0)
        elif number:
            sign, digits, exponent = number.as_tuple()
            stripped = "".join(map(str, digits)).rstrip("0")
            exponent, digits = int(exponent) + len(digits) - len(stripped), tuple(map(int, stripped.lstrip("0")))
        return ("number", sign, digits, exponent)
    if isinstance(value, str):
        return ("string", value)
    if isinstance(value, list):
        return ("array", tuple(canonical(item) for item in value))
    return ("object", tuple(sorted((name, canonical(item)) for name, item in value.items())))


def number_of(value: Expr) -> Decimal:
    return Decimal((value[1], value[2], value[3]))


def only(value: Expr) -> Values:
    """Just one canonical value. Raises ValueError for a number of too many digits or a string that UTF-8 cannot carry."""
    kind = value[0]
    if kind == "null":
        return replace(NOTHING, null=True)
    if kind == "boolean":
        return replace(NOTHING, booleans=frozenset({value[1]}))
    if kind == "number":
        return replace(NOTHING, numbers=numbers.compared(number_of(value), "="))
    if kind == "string":
        return replace(NOTHING, strings=Strings(automata.words([value[1]])))
    if kind == "array":
        items = frozenset((i, i + 1, ("const", item)) for i, item in enumerate(value[1]))
        return replace(NOTHING, arrays=(Arrays(every=items, least=len(value[1]), most=len(value[1])),))
    names = [name for name, _ in value[1]]
    members = frozenset((automata.words([name]), ("const", item)) for name, item in value[1])
    rest = (ANY - automata.words(names), FALSE)
    return replace(NOTHING, objects=(Objects(every=frozenset({rest}), some=members),))
