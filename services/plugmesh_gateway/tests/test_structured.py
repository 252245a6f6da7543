"""Bodies to grammars: each way to ask for a form, and refusals that name the key."""

from __future__ import annotations

import json

import pytest

from plugmesh.errors import InvalidRequest
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.limits import Limits
from plugmesh_gateway.parse import parse_chat, parse_completion

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA)


def wanted(**kw):
    found, *_ = parse_chat(json.dumps({"messages": [{"role": "user", "content": "x"}], **kw}).encode(), request_id="r", limits=Limits(), headers={})
    same, *_ = parse_completion(json.dumps({"prompt": "x", **kw}).encode(), request_id="r", limits=Limits(), headers={})
    assert found.grammar == same.grammar  # both routes take the same keys
    return found.grammar


@pytest.mark.parametrize(("body", "spec", "param"), [
    ({"response_format": {"type": "json_object"}}, GrammarSpec("json_object"), "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}}, GrammarSpec("json_schema", TEXT),
     "response_format.json_schema.schema"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
     GrammarSpec("structural_tag", '{"type": "structural_tag", "format": {"type": "any_text"}}'), "response_format"),
    ({"guided_json": SCHEMA}, GrammarSpec("json_schema", TEXT), "guided_json"),
    ({"guided_json": TEXT}, GrammarSpec("json_schema", TEXT), "guided_json"),
    ({"guided_json": True}, GrammarSpec("json_schema", "true"), "guided_json"),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": "", "guided_decoding_backend": "guidance"},
     GrammarSpec("json_schema", TEXT, whitespace="compact", engine="llguidance"), "guided_json"),
    ({"guided_regex": "a+"}, GrammarSpec("regex", "a+"), "guided_regex"),
    ({"guided_choice": ["é", "b"]}, GrammarSpec("choice", '["é", "b"]'), "guided_choice"),
    ({"guided_grammar": 'root ::= "a"'}, GrammarSpec("ebnf", 'root ::= "a"'), "guided_grammar"),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, GrammarSpec("json_schema", TEXT, whitespace="compact"), "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a"}}, GrammarSpec("regex", "a"), "structured_outputs.regex"),
    ({"structured_outputs": {"choice": ["a"], "json": None}}, GrammarSpec("choice", '["a"]'), "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": "root ::= [a]"}}, GrammarSpec("ebnf", "root ::= [a]"), "structured_outputs.grammar"),
    ({"structured_outputs": {"json_object": True}}, GrammarSpec("json_object"), "structured_outputs.json_object"),
    ({"structured_outputs": {"structural_tag": '{"format": {"type": "any_text"}}'}},
     GrammarSpec("structural_tag", '{"type": "structural_tag", "format": {"type": "any_text"}}'), "structured_outputs.structural_tag"),
])
def test_every_way_to_ask_for_a_grammar_gives_its_specification(body, spec, param):
    found = wanted(**body)

    assert (found.spec, found.param) == (spec, param)


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None, "structured_outputs": None}])
def test_free_text_has_no_grammar(body):
    assert wanted(**body) is None


@pytest.mark.parametrize(("body", "param"), [
    ({"response_format": {"type": "xml"}}, "response_format.type"), ({"response_format": {}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"), ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": 1}}}, "response_format.json_schema.strict"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "scheme": {}}}}, "response_format.json_schema.scheme"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.format"),
    ({"guided_json": "{"}, "guided_json"), ({"guided_json": "3"}, "guided_json"), ({"guided_json": 3}, "guided_json"), ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"), ({"guided_choice": [1]}, "guided_choice[0]"), ({"guided_grammar": ""}, "guided_grammar"),
    ({"guided_json": {}, "guided_whitespace_pattern": "[ ]?"}, "guided_whitespace_pattern"), ({"guided_whitespace_pattern": ""}, "guided_whitespace_pattern"),
    ({"guided_json": {}, "guided_decoding_backend": "outlines"}, "guided_decoding_backend"), ({"guided_decoding_backend": "auto"}, "guided_decoding_backend"),
    ({"structured_outputs": {}}, "structured_outputs"), ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"jason": {}}}, "structured_outputs.jason"), ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "structured_outputs.disable_additional_properties"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag.format"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"), ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
     "structured_outputs"),
    ({"guided_json": {}, "ignore_eos": True}, "ignore_eos"), ({"guided_json": {}, "min_tokens": 2}, "min_tokens"),
])
def test_a_malformed_grammar_is_refused_by_its_key(body, param):
    with pytest.raises(InvalidRequest) as e:
        wanted(**body)

    assert (e.value.param, e.value.http_status) == (param, 400)


def test_a_place_in_the_grammar_becomes_a_place_in_the_body():
    schema = wanted(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}})
    old = wanted(response_format={"type": "structural_tag", "triggers": ["<f"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]})

    assert schema.locate("/properties/a/pattern") == "response_format.json_schema.schema/properties/a/pattern"
    assert schema.locate("") == "response_format.json_schema.schema"
    assert json.loads(old.spec.source)["format"]["tags"][0]["content"] == {"type": "json_schema", "json_schema": SCHEMA}
    assert old.locate("/format/tags/0/content/json_schema/properties/a") == "response_format.structures[0].schema/properties/a"
