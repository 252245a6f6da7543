"""Calls out of text: any cut of the text gives the same, and what is no call stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh_gateway.tool_formats import FORMATS, HERMES, LLAMA3, SMOLLM2
from plugmesh_gateway.tool_stream import ArgumentsDelta, CallBegin, CallParser, TextDelta

_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.sampled_from('a"\\{}[]<>/é ,:\n') | st.characters(codec="utf-8"), max_size=6)
    | st.sampled_from(["</tool_call>", '"}]</tool_call>', "<tool_call>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)
_arguments = st.dictionaries(st.text(max_size=4), _values, max_size=3)
_calls = st.lists(st.tuples(st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True), _arguments), max_size=3)
_texts = st.text(st.sampled_from("ab <tol_c>\n{"), max_size=12)


def parse(how, pieces):
    """Text, calls with their arguments, and whether the last one is open."""
    parser = CallParser(how)
    deltas = [d for piece in pieces for d in parser.feed(piece)] + parser.finish()
    text = "".join(d.text for d in deltas if isinstance(d, TextDelta))
    calls = [[d.name, ""] for d in deltas if isinstance(d, CallBegin)]
    order = [d.index for d in deltas if isinstance(d, CallBegin)]
    for d in deltas:
        if isinstance(d, ArgumentsDelta):
            calls[d.index][1] += d.text
    assert order == list(range(len(calls))) and parser.num_calls == len(calls)
    assert all(d.text for d in deltas if not isinstance(d, CallBegin))  # nothing empty is sent
    return text, calls, parser.is_inside


def cut(data, text):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
@given(st.data())
def test_written_calls_are_read_back_whatever_the_pieces(how, data):
    calls = data.draw(_calls)
    calls = calls[:1] if how is LLAMA3 else calls
    before = data.draw(_texts.filter(lambda t: "<tool_call>" not in t)) if how is not LLAMA3 or not calls else ""
    if how is LLAMA3 and before.lstrip().startswith("{"):
        before = "x" + before
    if not calls and how is not LLAMA3 and data.draw(st.booleans()):
        written = before
    else:
        written = before + (how.block([how.call(n, a) for n, a in calls]) if calls else "")
    text, found, is_inside = parse(how, cut(data, written))

    assert [(n, json.loads(a)) for n, a in found] == calls
    assert text == (before.rstrip(" \t\r\n") if calls else before)
    assert not is_inside


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
@given(st.data())
def test_any_text_reads_the_same_in_any_pieces(how, data):
    parts = ["<tool_call>", "</tool_call>", "\n", " ", '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', "{}", '{"a": "}"}', "}", "[", "]", ", ", "x", "<", '"']
    written = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=14)))

    assert parse(how, cut(data, written)) == parse(how, [written]) == parse(how, list(written))


@pytest.mark.parametrize(("how", "written", "expected"), [
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "b', ("", [["f", '{"a": "b']], True)),            # cut in the arguments
    (HERMES, '<tool_call>\n{"name": "f', ("", [], False)),                                                     # and before the name is known
    (HERMES, "so <tool_", ("so <tool_", [], False)),
    (HERMES, 'a\n<tool_call>\n{"name":"f","arguments":{}}\n</tool_call>\n b ', ("ab ", [["f", "{}"]], False)),
    (HERMES, "<tool_call>hello</tool_call>", ("<tool_call>hello</tool_call>", [], False)),
    (SMOLLM2, "<tool_call>[]</tool_call>", ("", [], False)),
    (SMOLLM2, '<tool_call>[\n{"name": "f", "arguments": {}},\n{"name": "g", "arguments": {"x": [1]}}\n]</tool_call>', ("", [["f", "{}"], ["g", '{"x": [1]}']], False)),
    (LLAMA3, 'not {"name": "f", "parameters": {}}', ('not {"name": "f", "parameters": {}}', [], False)),
    (LLAMA3, '{"b": 1}', ('{"b": 1}', [], False)),
])
def test_what_comes_of(how, written, expected):
    assert parse(how, list(written)) == expected


def test_arguments_leave_as_they_come():
    parser = CallParser(HERMES)
    parser.feed('<tool_call>\n{"name": "f", "arguments": ')

    assert [d.text for piece in ('{"ci', 'ty": "Pa', 'ris"}') for d in parser.feed(piece)] == ['{"ci', 'ty": "Pa', 'ris"}']
    assert parser.is_inside
    assert parser.feed("}\n</tool_call>") == [] and not parser.is_inside
