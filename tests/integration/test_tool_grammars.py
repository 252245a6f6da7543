"""The gateway's grammars of tools, through the front end and a real engine: which outputs each choice allows."""

from __future__ import annotations

import functools

import pytest

from plugmesh.testing.grammar_oracle import vocabulary
from plugmesh_gateway.tool_formats import FORMATS, HERMES, LLAMA3, SMOLLM2, ToolFormat, tools_grammar
from plugmesh_gateway.tools import read_tools
from plugmesh_grammar.schema import lower

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}, {"type": "function", "function": {"name": "now"}}]
NAMED = {"type": "function", "function": {"name": "now"}}


WAYS = [("xgrammar", "structural_tag"), ("xgrammar", "ebnf"), ("llguidance", "ebnf")]


@functools.cache
def engine(name: str):
    pytest.importorskip(name)
    if name == "xgrammar":
        from plugmesh_xgrammar.engine import XgrammarEngine

        return XgrammarEngine(vocabulary())
    from plugmesh_llguidance.engine import LlguidanceEngine
    from plugmesh_llguidance.plugin import Settings

    return LlguidanceEngine(vocabulary(), Settings())


@pytest.fixture(params=WAYS, ids=" ".join)
def way(request):
    """An engine, and the language in which it is told."""
    return request.param


def acceptor(way: tuple[str, str], how: ToolFormat, choice: object, is_parallel: bool | None = None):
    name, language = way
    wanted = tools_grammar(read_tools(TOOLS, choice, is_parallel), how, None)
    (candidate,) = [c for c in lower(wanted.spec).candidates if c.language == language]
    compiled = engine(name).load(engine(name).compile(candidate.language, candidate.source))

    def accepts(text: str) -> bool:
        matcher = compiled.matcher()
        return all(matcher.accept(4 + byte) for byte in text.encode()) and matcher.is_completed

    return accepts


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_calls_are_those_of_the_tools_and_as_many_as_were_allowed(way: tuple[str, str], how: ToolFormat) -> None:
    one, other = how.call("weather", {"city": "Oslo"}), how.call("now", {})
    several = [] if how is LLAMA3 else [how.block([one, other])]
    auto, required, named, single = acceptor(way, how, "auto"), acceptor(way, how, "required"), acceptor(way, how, NAMED), acceptor(way, how, "required", False)

    for text in (how.block([one]), how.block([other]), *several):
        assert auto(text) and required(text)
    assert auto("No tool is of use here.") and not required("No tool is of use here.")
    assert [named(how.block([other])), named(how.block([one]))] == [True, False]
    assert single(how.block([one])) and not any(single(text) for text in several)
    for wrong in (how.call("weather", {}), how.call("weather", {"city": 3}), how.call("whether", {"city": "Oslo"}), how.call("now", {"city": "Oslo"})):
        assert not auto(how.block([wrong])) and not required(how.block([wrong]))


def test_an_empty_list_is_allowed_where_a_call_is_not_required_and_the_family_writes_it(way: tuple[str, str]) -> None:
    empty = "<tool_call>[]</tool_call>"

    assert acceptor(way, SMOLLM2, "auto")(empty)
    assert not acceptor(way, SMOLLM2, "required")(empty)
    assert not acceptor(way, HERMES, "auto")(empty)
