"""The generated schemas and tasks: the same everywhere, legal, satisfiable, and complete."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest

from plugmesh.bench.structured import extraction
from plugmesh.bench.structured.families import FAMILIES
from plugmesh.bench.structured.scoring import Judge
from plugmesh.bench.structured.suite import Case, keywords_of, make_suite, resolve

ASSERTED = {
    "type:string", "type:integer", "type:number", "type:boolean", "type:null", "type:array", "type:object", "nesting", "recursion", "type", "enum", "const",
    "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired",
    "dependentSchemas", "unevaluatedProperties", "unevaluatedItems", "items", "prefixItems", "contains", "minContains", "maxContains", "minItems", "maxItems",
    "uniqueItems", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "anyOf", "oneOf",
    "allOf", "not", "if", "then", "else", "$ref", "$defs", "$anchor", "definitions",
}  # fmt: skip


@pytest.fixture(scope="module")
def suite() -> list[Case]:
    return make_suite(0)


def test_it_is_the_same_in_another_process(suite: list[Case]) -> None:
    program = "import json; from plugmesh.bench.structured.suite import make_suite; print(json.dumps([(c.name, c.schema, c.example) for c in make_suite(0)]))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"})

    assert json.loads(json.dumps([(c.name, c.schema, c.example) for c in suite])) == json.loads(other.stdout)


def test_another_seed_gives_other_schemas(suite: list[Case]) -> None:
    same = {repr(c.schema) for c in suite} & {repr(c.schema) for c in make_suite(1)}

    assert len(same) < len(suite) // 2


def test_it_has_150_to_300_different_schemas_of_every_family(suite: list[Case]) -> None:
    assert 150 <= len(suite) <= 300
    assert len(suite) == len({repr(c.schema) for c in suite}) == len({c.name for c in suite})
    assert set(FAMILIES) == {c.family for c in suite}


@pytest.mark.parametrize("seed", range(8))
def test_every_schema_is_legal_and_its_example_validates(seed: int) -> None:
    judge = Judge()
    for case in make_suite(seed):
        judge.check_schema(case.schema)

        assert judge.why_invalid(case.schema, json.dumps(case.example)) == "", case.name
        assert jsonschema.Draft202012Validator(case.schema).is_valid(case.example) or "multipleOf" in case.keywords, case.name


def test_every_keyword_is_there(suite: list[Case]) -> None:
    assert ASSERTED - {k for c in suite for k in c.keywords} == set()


def test_schemas_reject_something(suite: list[Case]) -> None:
    """A schema that takes everything would be passed by any engine."""
    others = [None, True, -5.25, 10**7, "zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz", [None] * 9, {"q": None}, {"a": "x"}, {}]
    toothless = [c.name for c in suite if all(jsonschema.Draft202012Validator(c.schema).is_valid(v) for v in others)]

    assert toothless == []


def test_keywords_are_read_from_the_schema_and_not_from_values() -> None:
    schema = {"properties": {"pattern": {"const": {"minimum": 1}}, "b": {"enum": [{"maxItems": 1}]}}, "default": {"oneOf": []}}

    assert ("const", "enum", "properties") == keywords_of(schema)


def test_recursion_is_found_through_other_definitions_and_not_where_a_definition_is_used_twice() -> None:
    twice = {"$defs": {"a": {"type": "null"}}, "prefixItems": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}
    mutual = {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}

    assert "recursion" not in keywords_of(twice)
    assert "recursion" in keywords_of(mutual)
    assert "recursion" in keywords_of({"items": {"$ref": "#"}})


def test_references_are_resolved_by_pointer_and_anchor() -> None:
    root = {"$defs": {"a/b": {"$anchor": "x"}}, "prefixItems": [{"const": 1}]}

    assert resolve(root, "#/$defs/a~1b") is resolve(root, "#x") is root["$defs"]["a/b"]  # type: ignore[index]
    assert resolve(root, "#/prefixItems/0") == {"const": 1}


def test_tasks_are_the_same_again_and_their_answers_validate_and_stand_in_the_text() -> None:
    tasks = extraction.make_tasks(3)
    judge = Judge()

    assert len(tasks) == extraction.NUM_TASKS == len({t.text for t in tasks})
    assert tasks == extraction.make_tasks(3) != extraction.make_tasks(4)
    for task in tasks:
        judge.check_schema(task.schema)
        assert judge.why_invalid(task.schema, json.dumps(task.right)) == ""
        assert all(isinstance(v, bool) or str(v) in task.text for v in extraction.leaves(task.right).values()), task.name
        assert extraction.num_right(task.right, task.right) == len(extraction.leaves(task.right))
        assert judge.why_invalid(task.schema, "{}").startswith("required")


def test_fields_count_by_place_and_value() -> None:
    right = {"name": "Anna", "age": 3, "free": True, "to": {"city": "Rome"}, "who": ["A", "B"]}

    assert 6 == extraction.num_right({"name": " anna", "age": 3.0, "free": True, "to": {"city": "ROME"}, "who": ["A", "B"]}, right)
    assert 1 == extraction.num_right({"name": "Anna", "age": "3", "free": 1, "to": "Rome", "who": ["B", "A"]}, right)
    assert 0 == extraction.num_right(None, right) == extraction.num_right([], right)
