"""The generated suite: schemas over all keywords of JSON Schema, each with a right answer that proves it satisfiable.

A schema's keywords are read from the schema itself, so that no family can claim one that it does not use.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plugmesh.bench.structured.families import FAMILIES

Schema = dict[str, Any] | bool
NUM_PER_FAMILY = 4

_ONE = ("not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_LIST = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAP = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$comment", "$schema", "deprecated", "readOnly", "writeOnly"})


@dataclass(frozen=True, slots=True)
class Case:
    """One schema.

    Attributes:
        name: Family and number.
        keywords: Those that it uses anywhere, sorted; `type:T` and `format:F` tell values, `nesting` and `recursion` shapes.
        asks: What a model is asked to give.
        example: An instance that validates.
    """

    name: str
    family: str
    schema: dict[str, Any]
    keywords: tuple[str, ...]
    asks: str
    example: Any


def make_suite(seed: int = 0, *, per_family: int = NUM_PER_FAMILY) -> list[Case]:
    """The same cases for the same arguments, everywhere; schemas that a family happens to make twice come once."""
    found: list[Case] = []
    seen: set[str] = set()
    for family, make in FAMILIES.items():
        for number in range(per_family):
            schema, example = make(random.Random(f"{family} {number} {seed}"))
            if (text := repr(schema)) in seen:
                continue
            seen.add(text)
            asks = f"an example of {family.replace('_', ' ')}"
            found.append(Case(f"{family}-{number}", family, schema, keywords_of(schema), asks, example))
    return found


def subschemas(schema: Schema) -> Iterator[dict[str, Any]]:
    """The schema and all schemas in it, those of `$defs` included; values of `const`, `enum` and annotations are no schemas."""
    if not isinstance(schema, dict):
        return
    yield schema
    for keyword, value in schema.items():
        if keyword in _LIST or (keyword == "items" and isinstance(value, list)):
            children = value
        elif keyword in _MAP:
            children = list(value.values())
        elif keyword in _ONE:
            children = [value]
        else:
            continue
        for child in children:
            yield from subschemas(child)


def keywords_of(schema: Schema) -> tuple[str, ...]:
    """Sorted, without annotations."""
    found: set[str] = set()
    for part in subschemas(schema):
        found.update(k for k in part if k not in _ANNOTATIONS)
        kinds = part.get("type", ())
        found.update(f"type:{t}" for t in ([kinds] if isinstance(kinds, str) else kinds))
        if "format" in part:
            found.add(f"format:{part['format']}")
    if isinstance(schema, dict) and _is_recursive(schema):
        found.add("recursion")
    if _depth(schema) > 2:
        found.add("nesting")
    return tuple(sorted(found))


def resolve(root: Mapping[str, Any], ref: str) -> Any:
    """What a local `$ref` names: a JSON Pointer behind "#", or an anchor. Raises LookupError."""
    if not ref.startswith("#"):
        raise LookupError(f"{ref} is not local")
    if ref != "#" and not ref.startswith("#/"):
        return next(s for s in subschemas(dict(root)) if s.get("$anchor") == ref[1:])
    value: Any = root
    for part in ref[2:].split("/") if len(ref) > 1 else []:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def _is_recursive(root: dict[str, Any]) -> bool:
    """Whether some definition refers to itself, through others or not."""

    def reach(schema: Any, above: tuple[int, ...]) -> bool:
        if id(schema) in above:
            return True
        below = (*above, id(schema))
        for part in subschemas({k: v for k, v in schema.items() if k not in ("$defs", "definitions")} if isinstance(schema, dict) else schema):
            if "$ref" in part and reach(resolve(root, part["$ref"]), below):
                return True
        return False

    return reach(root, ())


def _depth(schema: Schema) -> int:
    """Levels of objects and arrays, references not followed."""
    if not isinstance(schema, dict):
        return 0
    below = 0
    for keyword in ("properties", "patternProperties"):
        below = max([below, *map(_depth, schema.get(keyword, {}).values())])
    for keyword in ("items", "additionalProperties", "contains"):
        value = schema.get(keyword)
        below = max(below, _depth(value) if isinstance(value, dict) else 0)
    below = max([below, *map(_depth, schema.get("prefixItems", ()))])
    aside = max([0, *(_depth(s) for k in ("allOf", "anyOf", "oneOf") for s in schema.get(k, ()))])
    kinds = schema.get("type", ())
    is_container = bool({"object", "array"} & ({kinds} if isinstance(kinds, str) else set(kinds)))
    return max(below + is_container, aside)
