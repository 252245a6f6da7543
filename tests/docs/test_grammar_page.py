"""docs/grammar.md: its example of a structural tag compiles and means what the page says; its table lists what the engine takes."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re

import pytest

from plugmesh.grammar.seams import CompiledGrammar
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.testing.grammar_oracle import vocabulary
from plugmesh_grammar.schema import lower

PAGE = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "grammar.md").read_text()
SECTION = PAGE.split("## Structural tags\n")[1].split("\n## ")[0]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="needs xgrammar")


def accepts(compiled: CompiledGrammar, text: str) -> bool:
    matcher = compiled.matcher()
    return all(matcher.accept(4 + byte) for byte in text.encode()) and matcher.is_completed


def test_the_example_compiles_and_its_output_is_that_of_the_page() -> None:
    from plugmesh_xgrammar.engine import XgrammarEngine

    (source,) = re.findall(r"```json\n(.*?)```", SECTION, re.S)
    (output,) = re.findall(r"`(Let me see.*?)`", SECTION)
    candidates = lower(GrammarSpec("structural_tag", source)).candidates
    assert [c.language for c in candidates] == ["structural_tag", "ebnf"]
    engine = XgrammarEngine(vocabulary())
    for candidate in candidates:
        compiled = engine.load(engine.compile(candidate.language, candidate.source))

        assert accepts(compiled, output)
        assert accepts(compiled, "no call at all")
        assert not accepts(compiled, output.replace("Oslo\"", "Oslo\", \"country\": \"Norway\""))
        assert not accepts(compiled, output.replace("2d6", "2d7"))
        assert not accepts(compiled, output.replace("call=dice", "call=coin"))


def test_the_table_lists_the_formats_and_members_that_are_taken() -> None:
    from plugmesh_xgrammar.engine import TAG_FORMATS

    table: dict[str, set[str]] = {}
    for formats, members in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \|", SECTION, re.M):
        for name in re.findall(r"`(\w+)`", formats):
            table[name] = set(re.findall(r"`(\w+)`", members))
    wanted = {name: {member.removesuffix("*") for member in members} for name, members in TAG_FORMATS.items()}

    assert table == {**wanted, "json_schema": {"json_schema"}}
    source = json.dumps({"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"type": "integer"}}})
    assert json.loads(lower(GrammarSpec("structural_tag", source)).candidates[0].source)["format"]["type"] == "grammar"
