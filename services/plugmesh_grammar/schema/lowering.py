"""From sets of JSON values to grammar rules: one rule per expression, made when it is first needed."""

from __future__ import annotations

from collections import deque

from . import numbers, patterns
from .arrays import array_part
from .automata import ANY, Dfa
from .grammar import NEVER, Alt, FreeNumber, FreeString, Grammar, Part, Ref, Regular, Text, alt
from .normal import Normaliser
from .objects import object_part
from .values import FALSE, Expr, Values

_INTEGER = patterns.whole(r"-?(?:0|[1-9][0-9]*)(?:\.0)?")


class Lowering:
    """Fills a grammar with the rules of a normaliser's expressions."""

    def __init__(self, normaliser: Normaliser) -> None:
        self.normaliser = normaliser
        self.limits = normaliser.limits
        self.grammar = Grammar(self.limits.max_rules)
        self._names: dict[Expr, str] = {}
        self._todo: deque[Expr] = deque()
        self._current: Expr = ("true",)

    def run(self, root: Expr) -> Grammar:
        """The whole grammar; not yet pruned."""
        self.grammar.root = self.rule(root).rule
        while self._todo:
            expr = self._current = self._todo.popleft()
            self.grammar.add(self._names[expr], self.value_part(self.normaliser.values(expr), self._names[expr]))
        return self.grammar

    def blame(self, keyword: str) -> str:
        """Path of the subschema whose keyword most likely made the record that is being lowered: in what is lowered, below it, or anywhere."""
        having = [path for path, node in self.normaliser.document.nodes.items() if isinstance(node.schema, dict) and node.schema.get(keyword)]
        inside: set[str] = set()
        stack: list[object] = [self._current]
        while stack:
            part = stack.pop()
            if isinstance(part, tuple) and part[:1] == ("node",):
                inside.add(part[1])
            elif isinstance(part, tuple | frozenset):
                stack.extend(part)
        below = [path for path in having if path in inside] or [path for path in having if any(path.startswith(f"{root}/") for root in inside)]
        return min(below or having or [""], key=len)

    def rule(self, expr: Expr) -> Ref:
        """The rule of an expression's values."""
        if expr not in self._names:
            self._names[expr] = f"v{len(self._names)}"
            self._todo.append(expr)
        return Ref(self._names[expr])

    def value(self, expr: Expr) -> Part:
        return NEVER if expr == FALSE else self.rule(expr)

    def value_part(self, values: Values, name: str) -> Part:
        parts: list[Part] = []
        if values.objects:
            parts += [object_part(self, record, f"{name}o{i}") for i, record in enumerate(values.objects)]
        if values.arrays:
            parts += [array_part(self, record, f"{name}a{i}") for i, record in enumerate(values.arrays)]
        strings = values.strings
        if not strings.is_empty:
            parts.append(FreeString(strings.least, strings.most) if strings.dfa is ANY else Regular(strings.settled(), True))
        if not values.numbers.is_empty:
            parts.append(number_part(values.numbers))
        if values.booleans:
            parts += [Text("true" if value else "false") for value in sorted(values.booleans, reverse=True)]
        if values.null:
            parts.append(Text("null"))
        return alt(*parts) if parts else Alt(())


def number_part(found: Dfa) -> Part:
    if found is numbers.NUMBERS:
        return FreeNumber()
    # Whole numbers are written 3 or 3.0; 3.00 says no more.
    if (found - numbers.INTEGERS).is_empty:
        found = found & _INTEGER
    return Regular(found, False)
