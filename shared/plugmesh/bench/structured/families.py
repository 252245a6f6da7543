"""Families of schemas: each makes one from random numbers, with an instance that validates."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

Made = tuple[dict[str, Any], Any]
Family = Callable[[random.Random], Made]

_WORDS = ("alpha", "bravo", "cedar", "delta", "ember", "falcon", "garnet", "harbor", "indigo", "juniper", "kestrel", "lagoon", "meadow", "nectar", "onyx", "pebble")
_KEYS = ("name", "title", "age", "count", "price", "city", "color", "size", "status", "notes", "active", "score", "level", "owner", "region", "kind")
_PATTERNS = (
    (r"^[A-Z]{2}-\d{4}$", "AB-1234"), (r"^(red|green|blue)$", "red"), (r"^[a-z][a-z0-9_]{1,11}$", "user_name"), (r"^\+?\d{6,12}$", "+431234567"),
    (r"^\d{1,3}(\.\d{1,2})?$", "12.50"), (r"^#[0-9a-fA-F]{6}$", "#00ffaa"), (r"^[A-Z][a-z]+( [A-Z][a-z]+)*$", "Anna Maria"), (r"^v\d+\.\d+\.\d+$", "v1.20.3"),
    (r"^[^\s]+$", "one-word"), (r"^(?:yes|no)(?:, (?:yes|no)){0,3}$", "yes, no"), (r"^[\w-]{3,20}$", "under_score-9"), (r"^\S+@\S+\.com$", "a@b.com"),
)  # fmt: skip
_LOOSE = ((r"\d", "room 12"), (r"^abc", "abcdef"), (r"xyz$", "wxyz"), (r"[aeiou]{2}", "boat"), (r"a|b", "cab"), (r"^.{3}$", "a-b"))
_FORMATS = {
    "date": "2024-02-29", "time": "12:30:00Z", "date-time": "2024-02-29T12:30:00Z", "uuid": "12345678-1234-4234-8234-123456789abc", "ipv4": "192.168.0.1",
    "ipv6": "::1", "email": "anna@example.com", "uri": "https://example.com/a?b=c", "hostname": "host.example.com", "duration": "P3DT4H",
    "json-pointer": "/a/b", "regex": "^a+$",
}  # fmt: skip


def _keys(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(_KEYS, rng.randint(low, high))


def _scalar(rng: random.Random) -> tuple[dict[str, Any], Any]:
    """A simple schema and an instance of it."""
    kind = rng.randrange(6)
    if kind == 0:
        return {"type": "string", "maxLength": rng.choice((8, 16, 24))}, rng.choice(_WORDS)
    if kind == 1:
        return {"type": "integer", "minimum": 0, "maximum": rng.choice((9, 99, 1000))}, rng.randint(0, 9)
    if kind == 2:
        return {"type": "boolean"}, rng.random() < 0.5
    if kind == 3:
        values = rng.sample(_WORDS, 3)
        return {"enum": values}, values[1]
    if kind == 4:
        return {"type": "number"}, rng.choice((0.5, 3, -2.25))
    return {"type": "null"}, None


def _object(properties: dict[str, tuple[Any, Any]], *, required: list[str] | None = None, **more: Any) -> Made:
    """An object of (schema, instance) pairs; all are required unless said otherwise."""
    schema = {"type": "object", "properties": {k: s for k, (s, _) in properties.items()}, "required": list(properties) if required is None else required, **more}
    return schema, {k: v for k, (_, v) in properties.items()}


def _fields(rng: random.Random, low: int = 2, high: int = 4) -> dict[str, tuple[Any, Any]]:
    return {k: _scalar(rng) for k in _keys(rng, low, high)}


def flat_object(rng: random.Random) -> Made:
    return _object(_fields(rng, 2, 5))


def closed_object(rng: random.Random) -> Made:
    return _object(_fields(rng, 1, 5), additionalProperties=False)


def optional_fields(rng: random.Random) -> Made:
    fields = _fields(rng, 3, 5)
    return _object(fields, required=sorted(fields)[:1], additionalProperties=False)


def nested_object(rng: random.Random) -> Made:
    schema, example = _object(_fields(rng, 1, 3), additionalProperties=False)
    for _ in range(rng.randint(2, 4)):
        schema, example = _object({**_fields(rng, 1, 2), rng.choice(("inner", "details")): (schema, example)}, additionalProperties=False)
    return schema, example


def any_object(rng: random.Random) -> Made:
    return {"type": "object", "description": rng.choice(_WORDS)}, {"a": [1, None]}


def dictionary_of_values(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    return {"type": "object", "additionalProperties": value}, {rng.choice(_WORDS): example}


def named_and_other_keys(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    schema, known = _object(_fields(rng, 1, 3), additionalProperties=value)
    return schema, {**known, "zz-other": example}


def keys_by_pattern(rng: random.Random) -> Made:
    pattern, key = rng.choice((("^x_", "x_one"), ("^[a-z]{1,4}$", "abc"), (r"^\d+$", "12"), ("_id$", "user_id")))
    value, example = _scalar(rng)
    return {"type": "object", "patternProperties": {pattern: value}, "additionalProperties": False}, {key: example}


def keys_by_pattern_beside_named(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    schema, known = _object({"name": ({"type": "string", "maxLength": 12}, "x")}, patternProperties={"^x_": value}, additionalProperties=False)
    return schema, {**known, "x_y": example}


def property_names(rng: random.Random) -> Made:
    names, key = rng.choice(
        (({"pattern": "^[a-z]{1,8}$"}, "abc"), ({"maxLength": 3}, "abc"), ({"enum": ["left", "right", "up"]}, "up"), ({"minLength": 2, "maxLength": 6}, "key"))
    )
    value, example = _scalar(rng)
    return {"type": "object", "propertyNames": names, "additionalProperties": value}, {key: example}


def number_of_properties(rng: random.Random) -> Made:
    low = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": low + rng.randint(1, 3)}
    if low:
        schema["minProperties"] = low
    return schema, {w: 1 for w in _WORDS[: max(low, 1)]}


def number_of_optional_properties(rng: random.Random) -> Made:
    fields = _fields(rng, 3, 4)
    schema, example = _object(fields, required=[], additionalProperties=False, minProperties=rng.randint(1, 2))
    return schema, example


def required_without_properties(rng: random.Random) -> Made:
    keys = _keys(rng, 1, 2)
    return {"type": "object", "required": keys}, dict.fromkeys(keys, 1)


def dependent_required(rng: random.Random) -> Made:
    a, b, c = rng.sample(_KEYS, 3)
    schema, example = _object({k: _scalar(rng) for k in (a, b, c)}, required=[a], additionalProperties=False, dependentRequired={b: [c]})
    return schema, {a: example[a]}


def dependent_schemas(rng: random.Random) -> Made:
    a, b = rng.sample(_KEYS, 2)
    schema, example = _object({a: ({"type": "boolean"}, True), b: ({"type": "integer"}, 5)}, required=[], additionalProperties=False)
    return {**schema, "dependentSchemas": {a: {"required": [b], "properties": {b: {"minimum": rng.randint(0, 5)}}}}}, example


def unevaluated_properties(rng: random.Random) -> Made:
    a, b = rng.sample(_KEYS, 2)
    (first, one), (second, two) = _scalar(rng), _scalar(rng)
    parts = [{"properties": {a: first}, "required": [a]}, {"properties": {b: second}, "required": [b]}]
    return {"type": "object", "allOf": parts, "unevaluatedProperties": False}, {a: one, b: two}


def unevaluated_items(rng: random.Random) -> Made:
    (first, one), (second, two) = _scalar(rng), _scalar(rng)
    return {"type": "array", "allOf": [{"prefixItems": [first, second]}], "minItems": 2, "unevaluatedItems": False}, [one, two]


def array_of_values(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    return {"type": "array", "items": value}, [example, example]


def array_of_bounded_length(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    low = rng.randint(0, 4)
    bounds = rng.choice(({"minItems": low}, {"maxItems": low + 3}, {"minItems": low, "maxItems": low + rng.randint(0, 3)}))
    return {"type": "array", "items": value, **bounds}, [example] * low


def array_of_objects(rng: random.Random) -> Made:
    schema, example = _object(_fields(rng, 1, 3), additionalProperties=False)
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": rng.randint(2, 4)}, [example]


def matrix(rng: random.Random) -> Made:
    rows, columns = rng.randint(1, 3), rng.randint(1, 3)
    row = {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": columns, "maxItems": columns}
    return {"type": "array", "items": row, "minItems": rows, "maxItems": rows}, [[0] * columns] * rows


def any_array(rng: random.Random) -> Made:
    return {"type": "array", "maxItems": rng.randint(1, 4)}, [{"a": None}]


def closed_tuple(rng: random.Random) -> Made:
    parts = [_scalar(rng) for _ in range(rng.randint(1, 4))]
    return {"type": "array", "prefixItems": [s for s, _ in parts], "items": False, "minItems": len(parts)}, [v for _, v in parts]


def open_tuple(rng: random.Random) -> Made:
    parts = [_scalar(rng) for _ in range(rng.randint(1, 3))]
    rest, example = _scalar(rng)
    return {"type": "array", "prefixItems": [s for s, _ in parts], "items": rest, "maxItems": len(parts) + 2}, [*(v for _, v in parts), example]


def unique_choices(rng: random.Random) -> Made:
    values = rng.sample(_WORDS, rng.randint(2, 4))
    return {"type": "array", "items": {"enum": values}, "uniqueItems": True, "minItems": rng.randint(0, 2)}, values[:2]


def unique_small_integers(rng: random.Random) -> Made:
    return {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": rng.randint(2, 4)}, "uniqueItems": True, "minItems": 1}, [2, 1]


def unique_strings(rng: random.Random) -> Made:
    return {"type": "array", "items": {"type": "string", "maxLength": 10}, "uniqueItems": True, "maxItems": rng.randint(2, 5)}, ["a", "b"]


def contains(rng: random.Random) -> Made:
    values = rng.sample(_WORDS, 3)
    schema: dict[str, Any] = {"type": "array", "items": {"enum": values}, "contains": {"const": values[0]}, "maxItems": 5}
    if rng.random() < 0.7:
        schema["minContains"] = rng.randint(1, 2)
        schema["maxContains"] = schema["minContains"] + rng.randint(0, 1)
    return schema, [values[0]] * schema.get("minContains", 1) + [values[1]]


def enumeration_of_strings(rng: random.Random) -> Made:
    values = rng.sample(_WORDS, rng.randint(2, 8))
    return {"type": "string", "enum": values}, values[0]


def enumeration_of_anything(rng: random.Random) -> Made:
    values: list[Any] = [None, True, rng.randint(-9, 99), 2.5, rng.choice(_WORDS), [1, "two"], {"three": 3}]
    rng.shuffle(values)
    return {"enum": values[: rng.randint(3, 7)]}, values[0]


def constant(rng: random.Random) -> Made:
    value: Any = rng.choice((None, False, 42, -1.5, "fixed text", "with \"quotes\" and \\ slash", [1, 2, 3], {"a": {"b": []}}, "naïve café ☕"))
    return {"const": value}, value


def fixed_keys_and_constants(rng: random.Random) -> Made:
    return _object({k: ({"const": w}, w) for k, w in zip(_keys(rng, 2, 4), rng.sample(_WORDS, 4), strict=False)}, additionalProperties=False)


def bounded_string(rng: random.Random) -> Made:
    low = rng.randint(0, 5)
    bounds = rng.choice(({"minLength": low}, {"maxLength": low + 5}, {"minLength": low, "maxLength": low + rng.randint(0, 20)}))
    return {"type": "string", **bounds}, "ü" * low


def any_string(rng: random.Random) -> Made:
    return _object({rng.choice(_KEYS): ({"type": "string"}, "line\nbreak \u2028 ☕")})


def string_by_pattern(rng: random.Random) -> Made:
    pattern, example = rng.choice(_PATTERNS)
    return {"type": "string", "pattern": pattern}, example


def string_with_unanchored_pattern(rng: random.Random) -> Made:
    pattern, example = rng.choice(_LOOSE)
    return {"type": "string", "pattern": pattern, "maxLength": rng.randint(8, 30)}, example


def field_by_pattern(rng: random.Random) -> Made:
    chosen = rng.sample(_PATTERNS, 2)
    return _object({k: ({"type": "string", "pattern": p}, e) for k, (p, e) in zip(("code", "label"), chosen, strict=True)}, additionalProperties=False)


def pattern_and_length(rng: random.Random) -> Made:
    return {"type": "string", "pattern": "^[a-z]+$", "minLength": rng.randint(1, 3), "maxLength": rng.randint(4, 9)}, "abcd"


def two_patterns(rng: random.Random) -> Made:
    first, second, example = rng.choice((("^[a-z]", "[0-9]$", "ab1"), ("^.{4,8}$", "^[^q]*$", "hello"), ("a", "b", "ab")))
    return {"type": "string", "allOf": [{"pattern": first}, {"pattern": second}], "maxLength": 12}, example


def string_of_a_format(rng: random.Random) -> Made:
    name = rng.choice(sorted(_FORMATS))
    return {"type": "string", "format": name}, _FORMATS[name]


def fields_of_formats(rng: random.Random) -> Made:
    names = rng.sample(("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "uri", "hostname"), 2)
    return _object({f"its_{n.replace('-', '_')}": ({"type": "string", "format": n}, _FORMATS[n]) for n in names}, additionalProperties=False)


def integer_range(rng: random.Random) -> Made:
    low = rng.choice((-1000, -17, -1, 0, 1, 7, 95, 1234))
    high = low + rng.choice((0, 1, 9, 88, 1005))
    bounds = rng.choice(({"minimum": low}, {"maximum": high}, {"minimum": low, "maximum": high}))
    return {"type": "integer", **bounds}, low if "minimum" in bounds else high


def exclusive_range(rng: random.Random) -> Made:
    low = rng.choice((-100, -1, 0, 3, 99))
    return {"type": rng.choice(("integer", "number")), "exclusiveMinimum": low, "exclusiveMaximum": low + rng.choice((2, 10, 1000))}, low + 1


def number_range(rng: random.Random) -> Made:
    low = rng.choice((-2.5, -0.75, 0, 0.125, 1.5, 10))
    high = low + rng.choice((0.5, 3.25, 100))
    bounds = rng.choice(({"minimum": low}, {"maximum": high}, {"minimum": low, "maximum": high}))
    return {"type": "number", **bounds}, low if "minimum" in bounds else high


def multiples_of_an_integer(rng: random.Random) -> Made:
    step = rng.choice((2, 3, 5, 7, 10, 25))
    schema: dict[str, Any] = {"type": rng.choice(("integer", "number")), "multipleOf": step}
    if rng.random() < 0.5:
        schema |= {"minimum": 0, "maximum": step * 20}
    return schema, step * 4


def multiples_of_a_decimal(rng: random.Random) -> Made:
    return {"type": "number", "multipleOf": rng.choice((0.1, 0.01, 0.5, 0.25)), "minimum": 0}, 1.5


def any_number(rng: random.Random) -> Made:
    return _object({rng.choice(_KEYS): ({"type": "number"}, -1.5e3), "whole": ({"type": "integer"}, 10**12)}, additionalProperties=False)


def boolean_and_null(rng: random.Random) -> Made:
    return _object({"is_open": ({"type": "boolean"}, False), "nothing": ({"type": "null"}, None)}, additionalProperties=rng.random() < 0.5)


def several_types(rng: random.Random) -> Made:
    kinds = rng.sample(("string", "integer", "boolean", "null", "number"), rng.randint(2, 3))
    values = {"string": "s", "integer": 3, "boolean": True, "null": None, "number": 0.5}
    return _object({rng.choice(_KEYS): ({"type": kinds}, values[kinds[0]])}, additionalProperties=False)


def several_types_with_bounds(rng: random.Random) -> Made:
    return {"type": ["string", "integer", "null"], "minimum": rng.randint(1, 20), "maxLength": rng.randint(3, 9)}, rng.choice((None, "abc", 20))


def no_type(rng: random.Random) -> Made:
    return rng.choice((
        ({"minimum": 3}, 5), ({"maxLength": 5}, "abc"), ({"required": ["a"]}, {"a": 1}), ({"maxItems": 2}, [1]), ({"properties": {"a": {"type": "integer"}}}, {"a": 1}),
        ({"items": {"type": "integer"}}, [1]), ({"enum": [1, "a"]}, 1), ({"pattern": "^a*$"}, "aa"),
    ))  # fmt: skip


def always_true_fields(rng: random.Random) -> Made:
    return _object({rng.choice(_KEYS): (True, [{"deep": None}]), "n": ({"type": "integer"}, 1)}, additionalProperties=False)


def forbidden_field(rng: random.Random) -> Made:
    schema, example = _object({"kept": _scalar(rng)})
    schema["properties"]["dropped"] = False
    return schema, example


def any_of_scalars(rng: random.Random) -> Made:
    parts = [_scalar(rng) for _ in range(rng.randint(2, 3))]
    return {"anyOf": [s for s, _ in parts]}, parts[0][1]


def any_of_objects(rng: random.Random) -> Made:
    parts = [_object(_fields(rng, 1, 3), additionalProperties=False) for _ in range(2)]
    return {"anyOf": [s for s, _ in parts]}, parts[1][1]


def any_of_beside_properties(rng: random.Random) -> Made:
    a, b, c = rng.sample(_KEYS, 3)
    schema, example = _object({k: ({"type": "integer"}, 1) for k in (a, b, c)}, required=[a], additionalProperties=False)
    return {**schema, "anyOf": [{"required": [b]}, {"required": [c]}]}, example


def one_of_tagged_objects(rng: random.Random) -> Made:
    parts = []
    for tag in rng.sample(_WORDS, rng.randint(2, 3)):
        parts.append(_object({"kind": ({"const": tag}, tag), **{k: _scalar(rng) for k in rng.sample(_KEYS[:-1], 2)}}, additionalProperties=False))
    return {"oneOf": [s for s, _ in parts]}, parts[0][1]


def one_of_types(rng: random.Random) -> Made:
    word = rng.choice(_WORDS)
    parts = [({"type": "string", "maxLength": 9}, word[:9]), ({"type": "integer", "minimum": 0}, 4), ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, [True])]
    rng.shuffle(parts)
    return {"oneOf": [s for s, _ in parts[: rng.randint(2, 3)]]}, parts[0][1]


def one_of_overlapping(rng: random.Random) -> Made:
    a, b = rng.choice(((3, 5), (2, 7), (4, 6)))
    return {"type": "integer", "minimum": 0, "maximum": 50, "oneOf": [{"multipleOf": a}, {"multipleOf": b}]}, a


def all_of_objects(rng: random.Random) -> Made:
    a, b = rng.sample(_KEYS, 2)
    (first, one), (second, two) = _scalar(rng), _scalar(rng)
    parts = [{"type": "object", "properties": {k: s}, "required": [k]} for k, s in ((a, first), (b, second))]
    return {"allOf": parts}, {a: one, b: two}


def all_of_bounds(rng: random.Random) -> Made:
    low = rng.randint(0, 20)
    return {"type": "integer", "allOf": [{"minimum": low}, {"maximum": low + 30}, {"multipleOf": rng.choice((1, 2, 5))}]}, low + 10 - low % 10


def not_a_value(rng: random.Random) -> Made:
    word = rng.choice(_WORDS)
    return rng.choice((
        ({"type": "string", "maxLength": 8, "not": {"const": word}}, "other"), ({"enum": [1, 2, 3, "a"], "not": {"type": "string"}}, 2),
        ({"type": "integer", "minimum": 0, "maximum": 20, "not": {"multipleOf": 3}}, 4), ({"type": "string", "not": {"pattern": "^a"}, "maxLength": 6}, "bc"),
        ({"type": ["integer", "string", "null"], "not": {"type": "string"}}, 3), ({"type": "integer", "not": {"minimum": 10}}, 2),
    ))  # fmt: skip


def not_with_these_keys(rng: random.Random) -> Made:
    a, b = rng.sample(_KEYS, 2)
    schema, example = _object({a: _scalar(rng), b: _scalar(rng)}, required=[a], additionalProperties=False, **{"not": {"required": [b]}})
    return schema, {a: example[a]}


def if_then_else(rng: random.Random) -> Made:
    country, other = rng.sample(("AT", "DE", "US"), 2)
    schema, _ = _object(
        {"country": ({"enum": [country, other]}, country), "code": ({"type": "string", "maxLength": 6}, "")}, additionalProperties=False,
    )  # fmt: skip
    is_it = {"properties": {"country": {"const": country}}}
    schema |= {"if": is_it, "then": {"properties": {"code": {"pattern": "^[0-9]{4}$"}}}, "else": {"properties": {"code": {"pattern": "^[A-Z]{3}$"}}}}
    return schema, {"country": country, "code": "1010"}


def if_then_on_numbers(rng: random.Random) -> Made:
    border = rng.randint(5, 50)
    return {"type": "integer", "minimum": 0, "maximum": 100, "if": {"minimum": border}, "then": {"multipleOf": 10}}, border - 1


def references(rng: random.Random) -> Made:
    point, example = _object({"x": ({"type": "integer"}, 1), "y": ({"type": "integer"}, 2)}, additionalProperties=False)
    ref = {"$ref": "#/$defs/point"}
    keys = _keys(rng, 2, 3)
    schema, whole = _object(dict.fromkeys(keys, (ref, example)), additionalProperties=False)
    return {**schema, "$defs": {"point": point}}, whole


def references_with_siblings(rng: random.Random) -> Made:
    schema, _ = _object({"age": ({"$ref": "#/$defs/positive", "maximum": rng.randint(10, 120)}, 5)}, additionalProperties=False)
    return {**schema, "$defs": {"positive": {"type": "integer", "minimum": 1}}}, {"age": 5}


def references_by_anchor(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    key = rng.choice(_KEYS)
    schema, whole = _object({key: ({"$ref": "#thing"}, example)}, additionalProperties=False)
    return {**schema, "$defs": {"any": {**value, "$anchor": "thing"}}}, whole


def references_to_properties(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    return _object({"first": (value, example), "second": ({"$ref": "#/properties/first"}, example)}, additionalProperties=False)


def old_definitions(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    return {"type": "array", "items": {"$ref": "#/definitions/item"}, "maxItems": 3, "definitions": {"item": value}}, [example]


def linked_list(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    node, _ = _object({"value": (value, example), "next": ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, None)}, additionalProperties=False)
    return node, {"value": example, "next": {"value": example, "next": None}}


def tree(rng: random.Random) -> Made:
    label = {"type": "string", "maxLength": rng.randint(5, 12)}
    node, _ = _object({"label": (label, ""), "children": ({"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": rng.randint(1, 3)}, [])}, additionalProperties=False)
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}, {"label": "a", "children": [{"label": "b", "children": []}]}


def mutual_recursion(rng: random.Random) -> Made:
    operator = rng.sample(("+", "-", "*", "/"), 2)
    pair, _ = _object({"op": ({"enum": operator}, ""), "left": ({"$ref": "#/$defs/term"}, 1), "right": ({"$ref": "#/$defs/term"}, 2)}, additionalProperties=False)
    term = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"$ref": "#/$defs/pair"}]}
    return {"$ref": "#/$defs/pair", "$defs": {"pair": pair, "term": term}}, {"op": operator[0], "left": 1, "right": {"op": operator[1], "left": 2, "right": 3}}


def annotated(rng: random.Random) -> Made:
    value, example = _scalar(rng)
    annotations = {"title": "T", "description": "what it is", "default": example, "examples": [example], "deprecated": False, "$comment": "c"}
    return _object({rng.choice(_KEYS): ({**value, **annotations}, example)}, additionalProperties=False, title="Annotated")


def person(rng: random.Random) -> Made:
    address = _object({"city": ({"type": "string", "maxLength": 20}, "Vienna"), "zip": ({"type": "string", "pattern": r"^\d{4,5}$"}, "1010")}, additionalProperties=False)
    return _object({
        "name": ({"type": "string", "minLength": 1, "maxLength": 30}, "Anna"), "age": ({"type": "integer", "minimum": 0, "maximum": 120}, 34),
        "email": ({"type": "string", "format": "email"}, "anna@example.com"), "address": address,
        "tags": ({"type": "array", "items": {"enum": rng.sample(_WORDS, 4)}, "maxItems": 3}, []),
    }, additionalProperties=False)  # fmt: skip


def invoice(rng: random.Random) -> Made:
    line = _object({"item": ({"type": "string", "maxLength": 20}, "tea"), "quantity": ({"type": "integer", "minimum": 1, "maximum": 99}, 2),
                    "price": ({"type": "number", "minimum": 0}, 3.5)}, additionalProperties=False)  # fmt: skip
    return _object({
        "number": ({"type": "string", "pattern": "^INV-[0-9]{4}$"}, "INV-0001"), "issued": ({"type": "string", "format": "date"}, "2024-01-31"),
        "lines": ({"type": "array", "items": line[0], "minItems": 1, "maxItems": rng.randint(2, 4)}, [line[1]]),
        "currency": ({"enum": ["EUR", "USD", rng.choice(("GBP", "CHF"))]}, "USD"), "paid": ({"type": "boolean"}, True),
    }, additionalProperties=False)  # fmt: skip


def weather_report(rng: random.Random) -> Made:
    unit = rng.choice(("celsius", "fahrenheit"))
    return _object({
        "place": ({"type": "string", "maxLength": 24}, "Graz"), "unit": ({"const": unit}, unit), "temperature": ({"type": "number", "minimum": -60, "maximum": 140}, 21.5),
        "sky": ({"enum": ["clear", "cloudy", "rain", "snow"]}, "rain"), "wind": ({"type": ["number", "null"], "minimum": 0}, None),
    }, required=["place", "unit", "temperature"], additionalProperties=False)  # fmt: skip


def short_format(rng: random.Random) -> Made:
    """Formats without a bound of their own: a model at temperature 1 seldom finds the end of one."""
    name = rng.choice(("email", "hostname", "uri"))
    return _object({"at": ({"type": "string", "format": name, "maxLength": rng.randint(26, 32)}, _FORMATS[name])}, additionalProperties=False)


FAMILIES: dict[str, Family] = {name: f for name, f in list(globals().items()) if inspect.isfunction(f) and f.__module__ == __name__ and not name.startswith("_")}
"""By name, in the order of this file."""
