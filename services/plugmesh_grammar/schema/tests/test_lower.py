"""What is refused, limited, relaxed; every kind of specification; the properties of objects that the suite does not ask for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from plugmesh.errors import LimitExceeded, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec
from plugmesh_grammar.schema import SchemaLimits, conformance, lower

ENGINES = [name for name in conformance.ENGINES]


def acceptor(schema: Any, engine: str = "xgrammar", **spec: Any) -> conformance.Accepts:
    pytest.importorskip(engine)
    lowered = lower(GrammarSpec("json_schema", json.dumps(schema), **spec))
    return conformance.matcher_of(engine)(next(c.source for c in lowered.candidates if c.language == conformance.ENGINES[engine]))


@pytest.mark.parametrize(
    ("schema", "keyword", "path"),
    [
        ({"properties": {"a": {"items": {"uniqueItems": True}}, "b": {"uniqueItems": True, "maxItems": 1}}}, "uniqueItems", "/properties/a/items/uniqueItems"),
        ({"properties": {"a/b": {"pattern": "(?<=x)y"}}}, "pattern", "/properties/a~1b/pattern"),
        ({"$ref": "https://example.com/other"}, "$ref", "/$ref"),
        ({"items": {"format": "made-up"}}, "format", "/items/format"),
        ({"multipleOf": 123457}, "multipleOf", "/multipleOf"),
        ({"type": "nonsense"}, "type", "/type"),
        ({"type": "string", "maxLength": 1, "minLength": 2}, "minLength", "/minLength"),
        ({"$ref": "#"}, "$ref", "/$ref"),
        ({"type": "integer", "if": {"$ref": "#/$defs/a"}, "then": {"maximum": 1}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "$ref", "/$defs/a/$ref"),
        ({"allOf": [{"const": 1}, {"const": 2}]}, "allOf", "/allOf"),
        ({"$schema": "https://example.com/meta"}, "$schema", "/$schema"),
        ({"minLength": -1}, "minLength", "/minLength"),
        ({"properties": {"a": 3}}, "a", "/properties/a"),
        (3, "", ""),
    ],
)
def test_a_refusal_names_keyword_and_path(schema: Any, keyword: str, path: str) -> None:
    with pytest.raises(UnsupportedGrammar) as caught:
        lower(GrammarSpec("json_schema", json.dumps(schema)))
    assert keyword == caught.value.fields["keyword"]
    assert path == caught.value.fields["path"]


@pytest.mark.parametrize(
    "source",
    [
        '{"const": "' + "x" * 300_000 + '"}',
        '{"items":' * 100 + "{}" + "}" * 100,
        json.dumps({"enum": list(range(3000))}),
        json.dumps({"pattern": "a" * 3000}),
        json.dumps({"pattern": "(a|b)*a(a|b){20}"}),
        json.dumps({"minLength": 10_000_000}),
        json.dumps({"oneOf": [{"required": [f"a{i}", f"b{i}"]} for i in range(12)]}),
        json.dumps({"prefixItems": [{}] * 3000, "minItems": 1, "items": False}),
    ],
)
def test_a_hostile_schema_costs_a_limit(source: str) -> None:
    with pytest.raises(LimitExceeded):
        lower(GrammarSpec("json_schema", source))


def test_relaxed_leaves_out_and_tells() -> None:
    schema = {"type": "array", "items": {"type": "string", "pattern": "(?<=a)b"}, "uniqueItems": True, "minItems": 1}
    schema = {"properties": {"a": schema}}
    lowered = lower(GrammarSpec("json_schema", json.dumps(schema), relaxed=True))
    assert {("uniqueItems", "/properties/a/uniqueItems"), ("pattern", "/properties/a/items/pattern")} == {(u.keyword, u.path) for u in lowered.unenforced}
    with pytest.raises(UnsupportedGrammar):
        lower(GrammarSpec("json_schema", json.dumps(schema)))


def test_what_is_malformed_is_not_relaxed_away() -> None:
    for source in ("{", "{} x", '{"a":1,"a":2}', '{"minimum": NaN}', "[]"):
        with pytest.raises(UnsupportedGrammar):
            lower(GrammarSpec("json_schema", source, relaxed=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_compact_allows_no_whitespace(engine: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}
    compact, flexible = acceptor(schema, engine, whitespace="compact"), acceptor(schema, engine)
    assert compact(b'{"a":[1,2]}') and flexible(b'{"a":[1,2]}')
    assert not compact(b'{"a": [1,2]}') and flexible(b'{"a": [1, 2]}')
    assert flexible(b'{\n  "a": [\n    1,\n    2\n  ]\n}')
    assert not flexible(b'{  "a": [1]}') and not flexible(b' {"a":[1]}')


@pytest.mark.parametrize("engine", ENGINES)
def test_a_free_name_is_no_other_spelling_of_a_declared_one(engine: str) -> None:
    accepts = acceptor({"type": "object", "properties": {"ab": {"type": "integer"}}}, engine)
    assert accepts(b'{"ab": 1, "abc": "x", "a": "x", "": "x"}')
    assert not accepts(b'{"ab": "x"}')
    assert not accepts(b'{"a\\u0062": "x"}')
    assert not accepts(b'{"ab": 1, "ab": 2}')


@pytest.mark.parametrize("engine", ENGINES)
def test_many_properties_come_in_the_schemas_order(engine: str) -> None:
    names = [f"p{i}" for i in range(9)]
    accepts = acceptor({"type": "object", "properties": {n: {"type": "integer"} for n in names}, "required": ["p3"], "additionalProperties": False}, engine)
    assert accepts(b'{"p3": 1}') and accepts(b'{"p0": 1, "p3": 1, "p8": 2}')
    assert not accepts(b'{"p0": 1}') and not accepts(b'{"p3": 1, "p0": 1}') and not accepts(b"{}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_witness_is_not_taken_back_by_a_second_member_of_its_name(engine: str) -> None:
    accepts = acceptor({"type": "object", "not": {"additionalProperties": {"type": "string"}}}, engine)
    assert accepts(b'{"a": "x", "b": 1}') and accepts(b'{"b": 1, "b": 2}')
    assert not accepts(b'{"b": 1, "b": "x"}') and not accepts(b'{"b": "x"}')


@pytest.mark.parametrize("engine", ENGINES)
def test_recursion(engine: str) -> None:
    tree = {"$defs": {"t": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/t"}}, "required": ["v"], "additionalProperties": False}}, "$ref": "#/$defs/t"}
    accepts = acceptor(tree, engine)
    assert accepts(b'{"v": 1, "next": {"v": 2, "next": {"v": 3}}}')
    assert not accepts(b'{"v": 1, "next": {"next": {"v": 3}}}')


@pytest.mark.parametrize("engine", ENGINES)
def test_escapes(engine: str) -> None:
    accepts = acceptor({"type": "string", "minLength": 2, "maxLength": 2}, engine)
    assert accepts('"é\\n"'.encode()) and accepts(b'"\\u00e9a"') and accepts("\"💩a\"".encode())
    assert not accepts(b'"\\ud83d\\udca9"')  # two escapes, one code point
    assert not accepts(b'"a\nb"') and not accepts(b'"abc"')
    accepts = acceptor({"enum": ['a"b', "c\\d", "\u0001", "tab\t"]}, engine)
    for text in ('a"b', "c\\d", "\u0001", "tab\t"):
        assert accepts(json.dumps(text).encode())
    assert not accepts(b'"a"') and not accepts(b'"tab"')


@pytest.mark.parametrize("engine", ENGINES)
def test_other_kinds(engine: str) -> None:
    pytest.importorskip(engine)
    language = conformance.ENGINES[engine]
    lowered = lower(GrammarSpec("json_object"))
    accepts = conformance.matcher_of(engine)(next(c.source for c in lowered.candidates if c.language == language))
    assert accepts(b'{"a": [1, {"b": null}]}') and not accepts(b"[]") and not accepts(b"1")
    choice = lower(GrammarSpec("choice", '["yes", "no", "x\\n\\u0001b\\"", "yes sir"]')).candidates[0]
    assert "ebnf" == choice.language
    if engine == "xgrammar":
        accepts = conformance.matcher_of(engine)(choice.source)
        assert [True] * 4 == [accepts(t) for t in (b"yes", b"no", b'x\n\x01b"', b"yes sir")]
        assert not accepts(b"ye") and not accepts(b"") and not accepts(b"yes s")


def test_an_escape_in_a_class_takes_no_letter_of_the_next_range() -> None:
    # xgrammar reads \x60b as one code point, which once let `bar` be a free name.
    accepts = acceptor({"properties": {"foo": {}, "bar": False}})
    assert not accepts(b'{"bar": 1}') and accepts(b'{"ba": 1}')


def test_a_hyphen_in_a_class_is_no_range() -> None:
    accepts = acceptor({"type": "string", "pattern": "^[+\\-09]$"})
    assert [True] * 4 == [accepts(f'"{c}"'.encode()) for c in "+-09"]
    assert not any(accepts(f'"{c}"'.encode()) for c in ",./12345678")


def test_structural_tags_get_the_grammars_of_their_schemas() -> None:
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": {"type": "integer", "minimum": 3}}, "end": "</f>"}}
    lowered = lower(GrammarSpec("structural_tag", json.dumps(tag)))
    content = json.loads(lowered.candidates[0].source)["format"]["content"]
    assert "structural_tag" == lowered.candidates[0].language
    assert "grammar" == content["type"] and "root ::=" in content["grammar"]
    tag["format"]["content"]["json_schema"]["multipleOf"] = 123457  # type: ignore[index]
    with pytest.raises(UnsupportedGrammar) as caught:
        lower(GrammarSpec("structural_tag", json.dumps(tag)))
    assert "/format/content/json_schema/multipleOf" == caught.value.fields["path"]


@pytest.mark.parametrize(("name", "value"), [("any_order", True), ("excludes", ["x"]), ("max_whitespace_cnt", 1), ("style", "qwen_xml")])
def test_what_a_structural_tag_says_beside_a_schema_is_not_lost_in_silence(name: str, value: object) -> None:
    node = {"type": "json_schema", "json_schema": {"type": "integer"}, name: value}
    with pytest.raises(UnsupportedGrammar, match=name):
        lower(GrammarSpec("structural_tag", json.dumps({"type": "structural_tag", "format": node})))


def test_format_can_be_an_annotation() -> None:
    lower(GrammarSpec("json_schema", '{"format": "made-up"}'), limits=SchemaLimits(enforce_format=False))
    assert not acceptor({"format": "ipv4", "type": "string"})(b'"1.2.3"')


def test_the_same_schema_gives_the_same_text() -> None:
    schema = json.dumps({"oneOf": [{"required": ["b"]}, {"required": ["a"]}], "patternProperties": {"^x": {"type": "string"}, "y$": {"minimum": 2}}})
    assert lower(GrammarSpec("json_schema", schema)) == lower(GrammarSpec("json_schema", schema))


@pytest.mark.parametrize("engine", list(conformance.ENGINES))
@pytest.mark.parametrize(("least", "most"), [(0, 3), (2, 2), (3, None), (1, 64), (0, 65), (65, None), (70, 80)])
def test_bounded_strings_count_characters(engine, least, most):
    lowered = lower(GrammarSpec("json_schema", json.dumps({"type": "string", "minLength": least, **({} if most is None else {"maxLength": most})})))
    accepts = conformance.matcher_of(engine)(next(c.source for c in lowered.candidates if c.language == conformance.ENGINES[engine]))
    for piece in ("a", "\u00e9", "\U0001f600", '"', "\\", "\n"):
        for num in {0, 1, least - 1, least, least + 1, 3, (most or 90) - 1, most or 90, (most or 90) + 1} - {-1}:
            wanted = least <= num <= (most if most is not None else num)
            assert accepts(json.dumps(piece * num, ensure_ascii=False).encode()) == wanted, (piece, num)
    # What xgrammar would count it is given only where nobody else is.
    assert [c.language for c in lowered.candidates] == (["lark", "ebnf"] if max(least, most or 0) > 64 else ["ebnf", "lark"])
