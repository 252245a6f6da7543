"""What becomes of an answer: judged when it ended, asked about when it was cut, failed otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from plugmesh.bench.http_client import response_format
from plugmesh.bench.structured import extracting, generation
from plugmesh.bench.structured.extraction import make_tasks
from plugmesh.bench.structured.meshes import Answer, Compiled
from plugmesh.bench.structured.scoring import Judge
from plugmesh.bench.structured.suite import Case
from plugmesh.errors import Unavailable, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec

CASE = Case("a-0", "a", {"type": "array", "items": {"type": "integer"}}, ("items", "type"), "a", [1])


class Prefixes:
    """Stands for a mesh's grammar service: knows the language of `[1, 1, ...]` by plain string comparison."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def validate(self, spec: GrammarSpec, text: str) -> tuple[bool, bool]:
        self.asked.append(text)
        compact = text.replace(" ", "")
        if compact == "gone":
            raise Unavailable("no grammar service")
        return compact == "[1,1]", "[1,1]".startswith(compact)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (Answer(200, "[1, 2]", "stop", 4), "valid"),
        (Answer(200, "[1, null]", "stop", 4), "invalid"),
        (Answer(200, "[1", "stop", 4), "invalid"),
        (Answer(200, "[1,", "length", 4), "cut"),
        (Answer(200, "[1,1]", "length", 4), "cut"),  # whole, and then the tokens were used up
        (Answer(200, "[1,\ufffd", "length", 4), "cut"),  # cut within a character
        (Answer(200, "{", "length", 4), "broken"),
        (Answer(200, "gone", "length", 4), "failed"),
        (Answer(200, "[1]", "tool_calls", 4), "failed"),
        (Answer(503, error="no grammar service"), "failed"),
        (Answer(0, error="reset"), "failed"),
    ],
)
async def test_an_answer_becomes_a_judgement(answer: Answer, verdict: str) -> None:
    mesh: Any = Prefixes()
    judgement = await generation._judge(mesh, Judge(), CASE, answer)

    assert verdict == judgement.verdict and bool(judgement.reason) == (verdict in ("invalid", "broken", "failed"))
    assert len(mesh.asked) == (answer.finish_reason == "length")


async def test_an_example_counts_only_when_both_ways_of_writing_it_are_taken() -> None:
    mesh: Any = Prefixes()

    assert await generation._example(mesh, Case("a", "a", CASE.schema, (), "", [1, 1])) is True
    assert ["[1, 1]", "[1,1]"] == mesh.asked
    assert await generation._example(mesh, Case("a", "a", CASE.schema, (), "", [2])) is False


def test_a_refusal_keeps_its_keyword_and_path() -> None:
    refused = Compiled(wall_ms=1.0, error=UnsupportedGrammar("no", keyword="not", path="/items/not"))
    result = generation._result(CASE, refused, (), None, True)

    assert ("", "unsupported_grammar", "not", "/items/not", True) == (result.engine, result.code, result.keyword, result.path, result.gateway_refused)
    assert not result.is_accepted and generation._result(CASE, Compiled("x", 2.0), (), True, None).is_accepted


def test_all_sides_of_an_extraction_get_the_same_prompt_and_differ_in_what_is_enforced() -> None:
    task = make_tasks(0, 1)[0]
    asked, mode, strict = (extracting._body(task, side, 9) for side in ("asked", "mode", "strict"))

    assert asked["messages"] == mode["messages"] == strict["messages"]
    assert "response_format" not in asked and {"type": "json_object"} == mode["response_format"]
    assert response_format(task.schema) == strict["response_format"] and strict["response_format"]["json_schema"]["strict"] is True


def test_an_extraction_is_scored_as_json_by_schema_and_by_fields() -> None:
    task = make_tasks(0, 1)[0]
    right = str(task.right).replace("'", '"').replace("True", "true").replace("False", "false")
    exact = extracting.score(Judge(), task, Answer(200, right, "stop", 9))
    fenced = extracting.score(Judge(), task, Answer(200, f"```json\n{right}\n```", "stop", 9))
    nothing = extracting.score(Judge(), task, Answer(200, "I do not know", "length", 9))

    assert exact.is_json and exact.is_valid and exact.num_right == exact.num_fields == len(task.right)
    assert not fenced.is_json and fenced.is_json_leniently and not fenced.is_valid and fenced.num_right == fenced.num_fields
    assert not nothing.is_json_leniently and nothing.num_right == 0 and nothing.was_cut
