"""The page docs/grammar-keywords.md: what is enforced, and the measured agreement."""

from __future__ import annotations

from . import formats
from .limits import SchemaLimits

# Keyword, what is enforced, what is refused.
_ROWS = (
    ("`type`", "all types; an integer may be written `3` or `3.0`", ""),
    ("`const`, `enum`", "any JSON values, 1 equal to 1.0", "fractions of more than 15 digits"),
    ("`minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`", "exactly, on decimal texts without exponent", "bounds that are fractions of more than 15 digits"),
    ("`multipleOf`", "exactly as decimals, whole or fractional", "values of more than 1500 remainders (12345, 0.123456)"),
    ("`minLength`, `maxLength`", "in code points, also together with the others", "above 4000 together with `pattern` or `format`"),
    ("`pattern`, `patternProperties`", "ECMA-262 with the u flag, unanchored, any number of them together; `\\p{…}` for general categories; look-ahead behind a leading `^`", "other look-around, back-references, `\\b`"),
    ("`format`", "see below", "other formats"),
    ("`properties`, `required`, `additionalProperties`, `propertyNames`", "exactly; a free name never equals a declared one", ""),
    ("`minProperties`, `maxProperties`", "undeclared members count as one towards the least, since a name may be written twice", "`minProperties` that needs two undeclared members"),
    ("`prefixItems`, `items`, `additionalItems`, `minItems`, `maxItems`", "exactly, draft-07's spelling too", ""),
    ("`contains`, `minContains`, `maxContains`", "exactly", ""),
    ("`uniqueItems`", "over at most 8 listed scalar values, or at most one item", "other items"),
    ("`allOf`, `anyOf`, `oneOf`, `not`, `if`/`then`/`else`", "exactly, by an algebra of value sets", "more than 400 alternatives after normalisation"),
    ("`dependentRequired`, `dependentSchemas`, `dependencies`", "exactly", ""),
    ("`unevaluatedProperties`, `unevaluatedItems`", "exactly, by cases", "more than 256 cases"),
    ("`$ref`, `$defs`, `definitions`, `$id`, `$anchor`, `$dynamicRef`, `$dynamicAnchor`", "inside the schema, recursion too", "anything outside of it, meta-schemas included; `$recursiveRef`; a reference that leads to itself without going into the value"),
    ("`$schema`", "2020-12, 2019-09, draft 7 and 6", "other dialects"),
    ("annotations, `contentSchema` and unknown keywords", "say nothing about a value", ""),
)


def page(results: str) -> str:
    """The page's Markdown, around a table of results."""
    limits = SchemaLimits()
    rows = "\n".join(f"| {keyword} | {done} | {refused} |" for keyword, done, refused in _ROWS)
    names = ", ".join(f"`{name}`" for name in formats.KNOWN)
    return f"""# JSON Schema keywords in grammars

Written by `python -m plugmesh_grammar.schema.conformance --write`. Every text that a constrained request can produce is a valid instance of its schema; what
cannot be enforced exactly is refused with the keyword and its JSON Pointer. With `relaxed` such keywords are left out, and listed in the answer.

| keyword | enforced | refused |
|---|---|---|
{rows}

A schema that no value satisfies is refused as well.

Formats: {names}. Each is a subset of its RFC (host names below 63 characters, no internationalised ones, no leap seconds).

Not every valid instance can be written. Left out are: numbers with an exponent where the schema says anything about their value; fractions of more than 15
digits there, which doubles cannot tell apart; escapes in constrained strings where plain characters do; whitespace other than none, one space, or a new line and
up to 16 spaces, and any before `,` and `:`; members in another order than the schema's where more than {limits.any_order_properties} properties are declared;
and, with `contains` or negated `properties`, repeated names that would undo what was found.

Multiples are those of decimal arithmetic: 0.3 is a multiple of 0.1, though a validator that divides doubles says otherwise.

Limits: {limits.max_bytes} bytes, nesting {limits.max_depth}, {limits.max_enum_values} enum values, patterns of {limits.max_regex_chars} characters, {limits.max_rules} rules.

## Agreement with the JSON-Schema-Test-Suite
Draft 2020-12, its 1257 cases that are not optional. Per file: agreements / invalid instances accepted / valid ones rejected / refused. Invalid instances were also
tried compact, indented and with their members in reverse order. `xgrammar` reads the front end's EBNF, `llguidance` its Lark; refused are, above all, references
to other documents (`refRemote`, `dynamicRef`), `uniqueItems` over any items, and schemas that nothing satisfies (`not`, `boolean_schema`).

{results}

For comparison, the engines' own converters on compact texts: xgrammar 0.2.8 agrees on 851, accepts 292 invalid instances, rejects 57 valid ones and cannot compile
57; llguidance 1.9.1 agrees on 567, accepts none, rejects 22 and refuses 668.
"""
