"""From a schema to the set of values that it allows: every keyword becomes a set, and sets are intersected, united and complemented."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from decimal import Decimal
from typing import Any

from plugmesh.errors import LimitExceeded, UnsupportedGrammar

from . import automata, formats, numbers, patterns
from .automata import ANY, Dfa
from .documents import Document, Node, escape, refused
from .limits import SchemaLimits
from .unevaluated import Evaluations
from .values import (
    ALL,
    FALSE,
    NOTHING,
    TRUE,
    Arrays,
    Expr,
    Objects,
    Strings,
    Values,
    both,
    canonical,
    either,
    negation,
    only,
)

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def word(name: str) -> Dfa:
    return automata.words([name])


class Normaliser:
    """Values of expressions over one document; memoised."""

    def __init__(self, document: Document, limits: SchemaLimits) -> None:
        self.document = document
        self.limits = limits
        self.evaluations = Evaluations(self)
        self._values: dict[Expr, Values] = {}
        self._open: dict[Expr, None] = {}
        self._empty: dict[Expr, bool] = {}

    # Expressions

    def root(self) -> Expr:
        return self.expr(self.document.node(""), ())

    def expr(self, node: Node, scope: tuple[tuple[str, str], ...]) -> Expr:
        """The expression of a subschema that is entered from a dynamic scope: (dynamic anchor, path) of the outermost resource that has each."""
        if isinstance(node.schema, bool):
            return TRUE if node.schema else FALSE
        mine = self.document.dynamic.get(node.resource)
        if mine:
            known = dict(scope)
            scope = tuple(sorted({**mine, **known}.items()))
        return ("node", node.path, scope)

    def child(self, node: Node, scope: tuple[tuple[str, str], ...], *path: str | int) -> Expr:
        return self.expr(self.document.node("/".join([node.path, *(escape(str(part)) for part in path)])), scope)

    def target(self, node: Node, scope: tuple[tuple[str, str], ...], keyword: str) -> Expr:
        reference = node.schema[keyword]
        if not isinstance(reference, str):
            raise refused("must be a string", keyword, node.path)
        found = self.document.resolve(reference, node, keyword)
        if keyword == "$dynamicRef":
            anchor = reference.partition("#")[2]
            if self.document.dynamic.get(found.resource, {}).get(anchor) == found.path and anchor in dict(scope):
                found = self.document.node(dict(scope)[anchor])
        return self.expr(found, scope)

    def values(self, expr: Expr) -> Values:
        known = self._values.get(expr)
        if known is not None:
            return known
        if expr in self._open:
            path = next((e[1] for e in reversed(self._open) if e[0] == "node"), "")
            raise refused("the reference leads back to itself without going into the value", "$ref", path)
        if len(self._open) > 200:
            raise LimitExceeded("schemas that refer to one another more than 200 deep")
        self._open[expr] = None
        try:
            result = self._evaluate(expr)
        finally:
            del self._open[expr]
        self._values[expr] = result
        return result

    def _evaluate(self, expr: Expr) -> Values:
        kind = expr[0]
        if kind == "true":
            return ALL
        if kind == "false":
            return NOTHING
        if kind == "const":
            return only(expr[1])
        if kind == "has":
            return replace(NOTHING, objects=(Objects(some=frozenset({(word(expr[1]), TRUE)})),))
        if kind == "not":
            return self.complement(self.values(expr[1]))
        if kind in ("and", "or"):
            parts = [self.values(part) for part in sorted(expr[1], key=repr)]
            result = parts[0]
            for part in parts[1:]:
                result = self.intersection(result, part) if kind == "and" else self.union(result, part)
            return result
        return self._node(self.document.node(expr[1]), expr[2])

    # Algebra

    def intersection(self, a: Values, b: Values) -> Values:
        arrays = self._distinct(x & y for x in a.arrays for y in b.arrays)
        objects = self._distinct(x & y for x in a.objects for y in b.objects)
        return Values(a.null and b.null, a.booleans & b.booleans, a.numbers & b.numbers, a.strings & b.strings, arrays, objects)

    def union(self, a: Values, b: Values) -> Values:
        return Values(
            a.null or b.null, a.booleans | b.booleans, a.numbers | b.numbers, a.strings | b.strings,
            self._distinct([*a.arrays, *b.arrays]), self._distinct([*a.objects, *b.objects]),
        )  # fmt: skip

    def complement(self, a: Values) -> Values:
        arrays: Iterable[Arrays | None] = [Arrays()]
        for record in a.arrays:
            arrays = self._distinct(x & y for x in arrays if x is not None for y in record.complement())
        objects: Iterable[Objects | None] = [Objects()]
        for part in a.objects:
            objects = self._distinct(x & y for x in objects if x is not None for y in part.complement())
        return Values(
            not a.null, frozenset({True, False}) - a.booleans, numbers.NUMBERS - a.numbers, a.strings.complement(),
            self._distinct(arrays), self._distinct(objects),
        )  # fmt: skip

    def _distinct(self, records: Iterable[Any]) -> tuple[Any, ...]:
        found: dict[Any, None] = {}
        for record in records:
            if record is None or record in found or (record.most is not None and record.most < record.least):
                continue
            if self._is_record_empty(record, 0):
                continue
            if not (record.every or record.some if isinstance(record, Objects) else record.every or record.counts or record.unique is not None) and not record.least and record.most is None:
                return (record,)  # everything
            found[record] = None
            if len(found) > self.limits.max_alternatives:
                raise LimitExceeded(f"the schema has more than {self.limits.max_alternatives} alternatives after normalisation")
        # A record whose conditions are a subset of another's contains it.
        kept = list(found)
        if 1 < len(kept) <= 60:
            kept = [r for r in kept if not any(o is not r and _contains(o, r) and (not _contains(r, o) or kept.index(o) < kept.index(r)) for o in kept)]
        return tuple(kept)

    # Emptiness, as far as it is easily seen: True is certain, False is not.

    def is_empty(self, expr: Expr, depth: int = 0) -> bool:
        if expr in (TRUE, FALSE):
            return expr == FALSE
        if depth > 3 or expr in self._open:
            return False
        if expr in self._empty:
            return self._empty[expr]
        try:
            value = self.values(expr)
        except (UnsupportedGrammar, LimitExceeded):
            return False  # told where it is needed
        result = (
            not value.null and not value.booleans and value.numbers.is_empty and value.strings.is_empty
            and all(self._is_record_empty(r, depth + 1) for r in value.arrays) and all(self._is_record_empty(r, depth + 1) for r in value.objects)
        )  # fmt: skip
        self._empty[expr] = result
        return result

    def _is_record_empty(self, record: Arrays | Objects, depth: int) -> bool:
        if record.most is not None and record.most < record.least:
            return True
        if depth > 3:
            return False
        if isinstance(record, Arrays):
            for index in range(min(record.least, 16)):
                if self._is_clash([part for first, behind, part in record.every if first <= index and (behind is None or index < behind)], depth):
                    return True
            return False
        needed: dict[str, list[Expr]] = {}
        for names, part in record.some:
            if len(names.arcs) <= 64 and (single := names.finite(1)) is not None:
                if not single:
                    return True
                needed.setdefault(single[0], []).append(part)
        if record.most is not None and len(needed) > record.most:
            return True
        return any(
            self._is_clash([*parts, *(part for names, part in record.every if names.accepts(name))], depth) for name, parts in needed.items()
        )

    def _is_clash(self, parts: list[Expr], depth: int) -> bool:
        whole = both(*parts)
        if whole in (TRUE, FALSE):
            return whole == FALSE
        # While schemas are being normalised, only what is ready is looked at; a recursive one is not.
        members = whole[1] if whole[0] == "and" else (whole,)
        if any(member in self._open for member in members):
            return False
        return self.is_empty(whole, depth + 1)

    # Keywords

    def _node(self, node: Node, scope: tuple[tuple[str, str], ...]) -> Values:
        schema = node.schema
        if node.ref_hides and "$ref" in schema:
            return self.values(self.target(node, scope, "$ref"))
        result = ALL
        for keyword, handle in _KEYWORDS.items():
            if keyword in schema:
                try:
                    result = self.intersection(result, handle(self, node, scope, schema[keyword]))
                except ValueError as error:
                    raise refused(str(error), keyword, node.path) from None
        return result


def _contains(a: Any, b: Any) -> bool:
    """Whether record a surely allows all that b does."""
    if a.least > b.least or (a.most is not None and (b.most is None or b.most > a.most)) or not a.every <= b.every:
        return False
    if isinstance(a, Objects):
        return a.some <= b.some
    return a.counts <= b.counts and a.unique in (None, b.unique)


def _count(value: Any, keyword: str, node: Node) -> int:
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or value != int(value) or value < 0:
        raise refused("must be a whole number, 0 or more", keyword, node.path)
    if value > 1_000_000:
        raise LimitExceeded(f"{keyword} is above 1000000")
    return int(value)


def _type(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name in _TYPES for name in names):
        raise refused("an unknown type", "type", node.path)
    found = NOTHING
    for name in names:
        if name == "null":
            found = replace(found, null=True)
        elif name == "boolean":
            found = replace(found, booleans=ALL.booleans)
        elif name == "integer":
            found = replace(found, numbers=found.numbers | numbers.INTEGERS)
        elif name == "number":
            found = replace(found, numbers=numbers.NUMBERS)
        elif name == "string":
            found = replace(found, strings=Strings())
        elif name == "array":
            found = replace(found, arrays=ALL.arrays)
        else:
            found = replace(found, objects=ALL.objects)
    return found


def _enum(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    if not isinstance(value, list):
        raise refused("must be an array", "enum", node.path)
    if len(value) > n.limits.max_enum_values:
        raise LimitExceeded(f"an enum of {len(value)} values; the limit is {n.limits.max_enum_values}")
    texts = [item for item in value if isinstance(item, str)]
    found = replace(NOTHING, strings=Strings(automata.words(texts)))
    for item in value:
        if not isinstance(item, str):
            found = n.union(found, only(canonical(item)))
    return found


def _bound(relations: str) -> Callable[..., Values]:
    def handle(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise ValueError("must be a number")
        return replace(ALL, numbers=numbers.compared(value, relations))

    return handle


def _multiple(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or value <= 0:
        raise ValueError("must be a number above 0")
    return replace(ALL, numbers=numbers.multiples(value))


def _pattern(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    return replace(ALL, strings=Strings(compiled(n, value)))


def compiled(n: Normaliser, value: Any) -> Dfa:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if len(value) > n.limits.max_regex_chars:
        raise LimitExceeded(f"a pattern of {len(value)} characters; the limit is {n.limits.max_regex_chars}")
    return patterns.search(value)


def _format(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    if not n.limits.enforce_format:
        return ALL
    found = formats.automaton(value) if isinstance(value, str) else None
    if found is None:
        raise refused(f"the format {value!r} is not known", "format", node.path)
    return replace(ALL, strings=Strings(found))


def _all_of(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    return n.values(both(*_parts(n, node, scope, value, "allOf")))


def _any_of(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    return n.values(either(*_parts(n, node, scope, value, "anyOf")))


def _parts(n: Normaliser, node: Node, scope: Any, value: Any, keyword: str) -> list[Expr]:
    if not isinstance(value, list) or not value:
        raise refused("must be an array of schemas", keyword, node.path)
    return [n.child(node, scope, keyword, i) for i in range(len(value))]


def exactly_one(n: Normaliser, parts: list[Expr]) -> list[Expr]:
    """Per alternative, what is in it and in no other; others that are surely disjoint need no mention."""
    out = []
    for i, part in enumerate(parts):
        others = [negation(other) for j, other in enumerate(parts) if j != i and not n.is_empty(both(part, other))]
        out.append(both(part, *others))
    return out


def _one_of(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    return n.values(either(*exactly_one(n, _parts(n, node, scope, value, "oneOf"))))


def _not(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    return n.values(negation(n.child(node, scope, "not")))


def _if(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    test = n.child(node, scope, "if")
    then = n.child(node, scope, "then") if "then" in node.schema else TRUE
    otherwise = n.child(node, scope, "else") if "else" in node.schema else TRUE
    if then == TRUE and otherwise == TRUE:
        return ALL
    return n.union(n.values(both(test, then)), n.values(both(negation(test), otherwise)))


def _reference(keyword: str) -> Callable[..., Values]:
    return lambda n, node, scope, value: n.values(n.target(node, scope, keyword))


def name_sets(n: Normaliser, node: Node) -> list[tuple[Dfa, tuple[str, str]]]:
    """Names that `properties` and `patternProperties` speak of, with the path of their schema."""
    out = []
    for keyword in ("properties", "patternProperties"):
        members = node.schema.get(keyword, {})
        if not isinstance(members, dict):
            raise refused("must be an object", keyword, node.path)
        for name in members:
            try:
                out.append((word(name) if keyword == "properties" else compiled(n, name), (keyword, name)))
            except ValueError as error:
                raise refused(str(error), keyword, node.path) from None
    return out


def other_names(sets: Iterable[Dfa]) -> Dfa:
    rest = ANY
    for names in sets:
        rest = rest - names
    return rest


def _members(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    schema = node.schema
    sets = name_sets(n, node)
    every = {(names, n.child(node, scope, *path)) for names, path in sets}
    if "additionalProperties" in schema:
        every.add((other_names(names for names, _ in sets), n.child(node, scope, "additionalProperties")))
    return replace(ALL, objects=(Objects(every=frozenset((names, part) for names, part in every if part != TRUE and not names.is_empty)),))


def _property_names(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    allowed = n.values(n.child(node, scope, "propertyNames")).strings
    refused_names = allowed.complement().settled()
    every = frozenset({(refused_names, FALSE)}) if not refused_names.is_empty else frozenset()
    return replace(ALL, objects=(Objects(every=every),))


def _required(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    for i, name in enumerate(_names(value, "required", node)):
        n.document.order.setdefault(name, 10**6 + i)
    return replace(ALL, objects=(Objects(some=frozenset((word(name), TRUE) for name in value)),))


def _names(value: Any, keyword: str, node: Node) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refused("must be an array of strings", keyword, node.path)
    return value


def _dependencies(keyword: str) -> Callable[..., Values]:
    def handle(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
        if not isinstance(value, dict):
            raise refused("must be an object", keyword, node.path)
        result = ALL
        for name, wanted in value.items():
            absent = ("not", ("has", name))
            if keyword == "dependentRequired" or (keyword == "dependencies" and isinstance(wanted, list)):
                then = both(*(("has", other) for other in _names(wanted, keyword, node)))
            else:
                then = n.child(node, scope, keyword, name)
            result = n.intersection(result, n.values(either(absent, both(("has", name), then))))
        return result

    return handle


def _size(kind: str, side: str, keyword: str) -> Callable[..., Values]:
    def handle(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
        count = _count(value, keyword, node)
        if kind == "strings":
            return replace(ALL, strings=Strings(ANY, count, None) if side == "least" else Strings(ANY, 0, count))
        record: Any = Arrays if kind == "arrays" else Objects
        bounded = record(least=count) if side == "least" else record(most=count)
        return replace(ALL, arrays=(bounded,)) if kind == "arrays" else replace(ALL, objects=(bounded,))

    return handle


def _items(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    every: set[tuple[int, int | None, Expr]] = set()
    prefix, rest = prefix_of(node)
    if prefix:
        every |= {(i, i + 1, n.child(node, scope, prefix, i)) for i in range(len(node.schema[prefix]))}
    if rest:
        every.add((len(node.schema[prefix]) if prefix else 0, None, n.child(node, scope, rest)))
    return replace(ALL, arrays=(Arrays(every=frozenset(item for item in every if item[2] != TRUE)),))


def prefix_of(node: Node) -> tuple[str, str]:
    """Keywords of the items at fixed places, and of the items behind them."""
    schema = node.schema
    if isinstance(schema.get("items"), list):
        return "items", "additionalItems" if "additionalItems" in schema else ""
    if "prefixItems" in schema and not isinstance(schema["prefixItems"], list):
        raise refused("must be an array of schemas", "prefixItems", node.path)
    return ("prefixItems" if "prefixItems" in schema else ""), ("items" if "items" in schema else "")


def _contains_keyword(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    least = _count(node.schema.get("minContains", 1), "minContains", node)
    most = _count(node.schema["maxContains"], "maxContains", node) if "maxContains" in node.schema else None
    if least == 0 and most is None:
        return ALL
    if most is not None and most < least:
        return replace(ALL, arrays=())
    return replace(ALL, arrays=(Arrays(counts=frozenset({(0, n.child(node, scope, "contains"), least, most)})),))


def _unique(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
    if not isinstance(value, bool):
        raise refused("must be a boolean", "uniqueItems", node.path)
    return replace(ALL, arrays=(Arrays(unique=True),)) if value else ALL


def _unevaluated(keyword: str) -> Callable[..., Values]:
    return lambda n, node, scope, value: n.evaluations.restriction(node, scope, keyword)


def _remote(keyword: str) -> Callable[..., Values]:
    def handle(n: Normaliser, node: Node, scope: Any, value: Any) -> Values:
        raise refused("is not supported", keyword, node.path)

    return handle


# In this order. Keywords that are not here say nothing about a value (or belong to one that is).
_KEYWORDS: dict[str, Callable[..., Values]] = {
    "type": _type,
    "const": lambda n, node, scope, value: only(canonical(value)),
    "enum": _enum,
    "minimum": _bound("=>"),
    "exclusiveMinimum": _bound(">"),
    "maximum": _bound("<="),
    "exclusiveMaximum": _bound("<"),
    "multipleOf": _multiple,
    "minLength": _size("strings", "least", "minLength"),
    "maxLength": _size("strings", "most", "maxLength"),
    "pattern": _pattern,
    "format": _format,
    "properties": _members,
    "patternProperties": lambda n, node, scope, value: ALL if "properties" in node.schema else _members(n, node, scope, value),
    "additionalProperties": lambda n, node, scope, value: ALL if "properties" in node.schema or "patternProperties" in node.schema else _members(n, node, scope, value),
    "propertyNames": _property_names,
    "required": _required,
    "minProperties": _size("objects", "least", "minProperties"),
    "maxProperties": _size("objects", "most", "maxProperties"),
    "prefixItems": _items,
    "items": lambda n, node, scope, value: ALL if "prefixItems" in node.schema and not isinstance(value, list) else _items(n, node, scope, value),
    "minItems": _size("arrays", "least", "minItems"),
    "maxItems": _size("arrays", "most", "maxItems"),
    "contains": _contains_keyword,
    "uniqueItems": _unique,
    "$ref": _reference("$ref"),
    "$dynamicRef": _reference("$dynamicRef"),
    "$recursiveRef": _remote("$recursiveRef"),
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "if": _if,
    "dependentRequired": _dependencies("dependentRequired"),
    "dependentSchemas": _dependencies("dependentSchemas"),
    "dependencies": _dependencies("dependencies"),
    "unevaluatedItems": _unevaluated("unevaluatedItems"),
    "unevaluatedProperties": _unevaluated("unevaluatedProperties"),
}
KEYWORDS = tuple(_KEYWORDS)
