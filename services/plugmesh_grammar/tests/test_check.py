"""What is refused before a worker is asked."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.errors import InvalidRequest, LimitExceeded, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec
from plugmesh_grammar.check import check
from plugmesh_grammar.config import Settings

SETTINGS = Settings(max_schema_bytes=4096, max_schema_depth=8, max_enum_values=16, max_regex_chars=64)


def schema(value):
    return GrammarSpec("json_schema", json.dumps(value))


@pytest.mark.parametrize("spec", [
    schema({"type": "object"}), schema(True), GrammarSpec("json_object"), GrammarSpec("choice", '["yes", "no"]'), GrammarSpec("regex", "(a(b))" * 8),
    GrammarSpec("ebnf", 'root ::= "((((((((((((("'.replace("(", "x")), schema({"properties": {"enum": {"type": "array"}}}), schema({"enum": list(range(16))}),
    schema({"description": "[" * 100}), GrammarSpec("regex", r"\(" * 30), GrammarSpec("regex", "[((((((((((]"),
])  # fmt: skip
def test_what_is_within_the_limits_passes(spec):
    check(spec, SETTINGS)


@pytest.mark.parametrize(("spec", "says"), [
    (schema({"a": "x" * 5000}), "5009 bytes"), (GrammarSpec("json_schema", "[" * 4000), "nested 4000 deep"), (GrammarSpec("choice", '{"a":' * 700), "nested 700 deep"),
    (schema({"enum": list(range(17))}), "17 values"), (schema({"anyOf": [{"items": {"enum": [0] * 20}}]}), "20 values"), (GrammarSpec("choice", json.dumps(["a"] * 17)), "17 choices"),
    (GrammarSpec("regex", "a" * 65), "65 characters"), (schema({"pattern": "a" * 65}), "65 characters"), (schema({"patternProperties": {"a" * 65: True}}), "65 characters"),
    (GrammarSpec("regex", "(" * 9 + ")" * 9), "nested 9 deep"), (GrammarSpec("ebnf", "root ::= " + "(" * 500), "nested 500 deep"),
])  # fmt: skip
def test_what_is_larger_is_refused_with_the_limit(spec, says):
    with pytest.raises(LimitExceeded, match=says):
        check(spec, SETTINGS)


@pytest.mark.parametrize("spec", [
    GrammarSpec("json_schema", "{"), GrammarSpec("json_schema", ""), GrammarSpec("choice", "[]"), GrammarSpec("choice", "[1]"), GrammarSpec("choice", '"a"'),
    GrammarSpec("json_schema", "9" * 5000), GrammarSpec("structural_tag", "nonsense"),
])  # fmt: skip
def test_what_is_no_json_or_of_the_wrong_type_is_unsupported(spec):
    with pytest.raises(UnsupportedGrammar):
        check(spec, Settings())


@pytest.mark.parametrize("spec", [GrammarSpec("json_object", "{}"), GrammarSpec("regex", "a", engine="../x")])
def test_nonsense_around_a_grammar_is_refused(spec):
    with pytest.raises(InvalidRequest):
        check(spec, SETTINGS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=20)


def depth_of(value):
    """The slow, obvious way."""
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.integers(4, 8))
def test_the_depth_is_that_of_the_parsed_value(value, limit):
    source = json.dumps({"const": value})
    if 1 + depth_of(value) > limit:
        with pytest.raises(LimitExceeded, match="deep"):
            check(GrammarSpec("json_schema", source), Settings(max_schema_depth=limit))
    else:
        check(GrammarSpec("json_schema", source), Settings(max_schema_depth=limit))
