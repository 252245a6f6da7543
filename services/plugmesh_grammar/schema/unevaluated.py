"""unevaluatedProperties and unevaluatedItems without annotations: a schema is split into cases in which the evaluated names or places are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from plugmesh.errors import LimitExceeded

from .automata import ANY, EMPTY, Dfa
from .documents import Node
from .values import ALL, FALSE, TRUE, Arrays, Expr, Objects, Values, both, either, negation

if TYPE_CHECKING:
    from .normal import Normaliser

_MAX_CASES = 256


@dataclass(frozen=True, slots=True)
class Case:
    """Values of `condition` for which just these were evaluated.

    Attributes:
        names: Of members.
        places: Items before this index; None for all of them.
        matching: Items of any of these expressions.
    """

    condition: Expr = TRUE
    names: Dfa = EMPTY
    places: int | None = 0
    matching: frozenset[Expr] = frozenset()

    def __and__(self, other: Case) -> Case:
        places = None if self.places is None or other.places is None else max(self.places, other.places)
        return Case(both(self.condition, other.condition), self.names | other.names, places, self.matching | other.matching)

    @property
    def is_plain(self) -> bool:
        """Nothing was evaluated."""
        return self.names.is_empty and self.places == 0 and not self.matching


class Evaluations:
    """Cases of the subschemas of a normaliser's document."""

    def __init__(self, normaliser: Normaliser) -> None:
        self._n = normaliser

    def restriction(self, node: Node, scope: Any, keyword: str) -> Values:
        """What the keyword asks of a value: unevaluated members or items are of its schema."""
        wanted = self._n.child(node, scope, keyword)
        if wanted == TRUE:
            return ALL
        arrays: list[Arrays] = []
        objects: list[Objects] = []
        for case in self._cases(node, scope, keyword, 0):
            if case.condition == FALSE:
                continue
            within = self._n.values(case.condition)
            if keyword == "unevaluatedProperties":
                rest = ANY - case.names
                record = Objects(every=frozenset({(rest, wanted)})) if not rest.is_empty else Objects()
                objects += [part & record for part in within.objects]
            else:
                last = Arrays() if case.places is None else Arrays(every=frozenset({(case.places, None, either(wanted, *case.matching))}))
                arrays += [joined for part in within.arrays if (joined := part & last) is not None]
        if keyword == "unevaluatedProperties":
            return self._n.intersection(replace(ALL, objects=tuple(objects)), ALL)
        return self._n.intersection(replace(ALL, arrays=tuple(arrays)), ALL)

    def _of(self, expr: Expr, depth: int) -> list[Case]:
        if expr[0] != "node":
            return [Case()]
        if depth > 40:
            raise LimitExceeded("unevaluated properties or items of schemas that refer to one another more than 40 deep")
        return self._cases(self._n.document.node(expr[1]), expr[2], "", depth + 1)

    def _cases(self, node: Node, scope: Any, without: str, depth: int) -> list[Case]:
        """Cases that cover every value of the schema; the schema itself is not among their conditions."""
        from .normal import exactly_one, name_sets, prefix_of

        n, schema = self._n, node.schema
        if node.ref_hides and "$ref" in schema:
            return self._of(n.target(node, scope, "$ref"), depth)
        here = Case()
        for names, _ in name_sets(n, node):
            here = replace(here, names=here.names | names)
        if "additionalProperties" in schema or ("unevaluatedProperties" in schema and without != "unevaluatedProperties"):
            here = replace(here, names=ANY)
        prefix, rest = prefix_of(node)
        places: int | None = len(schema[prefix]) if prefix else 0
        if rest or ("unevaluatedItems" in schema and without != "unevaluatedItems"):
            places = None
        here = replace(here, places=places)
        if "contains" in schema:
            here = replace(here, matching=frozenset({n.child(node, scope, "contains")}))
        found = [here]

        def meet(options: list[Case]) -> None:
            nonlocal found
            found = list(dict.fromkeys(a & b for a, b in product(found, options)))
            found = [case for case in found if case.condition != FALSE]
            if len(found) > _MAX_CASES:
                raise LimitExceeded(f"unevaluated properties or items depend on more than {_MAX_CASES} cases")

        def when(expr: Expr) -> list[Case]:
            """If the expression holds, its cases; if not, nothing is evaluated."""
            inside = self._of(expr, depth)
            if all(case.is_plain for case in inside):
                return [Case()]
            return [Case(negation(expr)), *(replace(case, condition=both(expr, case.condition)) for case in inside)]

        for keyword in ("$ref", "$dynamicRef"):
            if keyword in schema:
                meet(self._of(n.target(node, scope, keyword), depth))
        for i in range(len(schema.get("allOf", ()))):
            meet(self._of(n.child(node, scope, "allOf", i), depth))
        for i in range(len(schema.get("anyOf", ()))):
            meet(when(n.child(node, scope, "anyOf", i)))
        if "oneOf" in schema:
            parts = [n.child(node, scope, "oneOf", i) for i in range(len(schema["oneOf"]))]
            options = []
            for part, alone in zip(parts, exactly_one(n, parts), strict=True):
                options += [replace(case, condition=both(alone, case.condition)) for case in self._of(part, depth)]
            meet(options)
        if "if" in schema:
            test = n.child(node, scope, "if")
            then = self._of(n.child(node, scope, "then"), depth) if "then" in schema else [Case()]
            otherwise = self._of(n.child(node, scope, "else"), depth) if "else" in schema else [Case()]
            yes = [a & b for a in self._of(test, depth) for b in then]
            if all(case.is_plain for case in (*yes, *otherwise)):
                pass
            else:
                meet([replace(c, condition=both(test, c.condition)) for c in yes] + [replace(c, condition=both(negation(test), c.condition)) for c in otherwise])
        for keyword in ("dependentSchemas", "dependencies"):
            for name, part in schema.get(keyword, {}).items():
                if isinstance(part, list):
                    continue
                has: Expr = ("has", name)
                inside = self._of(n.child(node, scope, keyword, name), depth)
                if not all(case.is_plain for case in inside):
                    meet([Case(negation(has)), *(replace(c, condition=both(has, c.condition)) for c in inside)])
        return found

