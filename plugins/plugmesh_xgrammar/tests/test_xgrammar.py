"""What is special about this engine: its binding does what the official package does, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from plugmesh.errors import Unavailable, UnsupportedGrammar
from plugmesh.testing.grammar_oracle import as_set, vocabulary
from plugmesh_xgrammar import binding
from plugmesh_xgrammar.engine import XgrammarEngine

OFFICIAL = """
import sys, zlib, json
sys.path[:0] = {path!r}
import torch, xgrammar
from plugmesh.testing.grammar_oracle import vocabulary
v = vocabulary()
tokens = [b"" if t is None or i in v.special_ids else t for i, t in enumerate(v.token_bytes)]
info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=v.vocab_size, stop_token_ids=list(v.eos_token_ids))
compiled = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False).compile_grammar({source!r})
matcher, found = xgrammar.GrammarMatcher(compiled), []
for byte in {text!r}:
    mask = xgrammar.allocate_token_bitmask(1, v.vocab_size)
    matcher.fill_next_token_bitmask(mask)
    found.append(mask[0].tolist())
    assert matcher.accept_token(4 + byte)
print(json.dumps(dict(form=zlib.crc32(compiled.serialize_json().encode()), masks=found, jump=matcher.find_jump_forward_string())))
"""


@pytest.mark.slow
def test_masks_and_forms_are_those_of_the_official_package() -> None:
    import zlib

    from plugmesh.grammar import gbnf
    from plugmesh.grammar.form import unpack
    from plugmesh.grammar.syntax import to_gbnf

    source, text = 'root ::= "{\\"a\\": " [0-9]+ ("," " "? [a-z\\u00e9]*)? "}end"', b'{"a": 12,x}'
    v = vocabulary()
    engine = XgrammarEngine(v)
    form = engine.compile("ebnf", source)
    code = OFFICIAL.format(path=[p for p in sys.path if p], source=to_gbnf(gbnf.parse(source)), text=text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = json.loads(done.stdout)

    matcher, mask = engine.load(form).matcher(), np.zeros(v.num_words, np.uint32)
    beyond = np.uint32((1 << v.vocab_size % 32) - 1)  # of the last word the package fills the bits that no token has, too
    for byte, row in zip(text, wanted["masks"], strict=True):
        matcher.fill(mask)
        theirs = np.array(row, np.int32).view(np.uint32)
        theirs[-1] &= beyond
        assert np.array_equal(mask, theirs)
        assert matcher.accept(4 + byte)
    assert matcher.forced() == wanted["jump"].encode() == b"end"
    assert zlib.crc32(unpack(form, *engine._header)) == wanted["form"]


def test_another_version_of_the_library_is_refused() -> None:
    with pytest.raises(Unavailable, match=r"works with 0\.0\.1"):
        binding.load("0.0.1")


def test_forced_bytes_may_end_inside_a_character() -> None:
    engine = XgrammarEngine(vocabulary())
    matcher = engine.load(engine.compile("ebnf", 'root ::= "x" ("\\u00e9" | "\\u00ea")')).matcher()

    assert matcher.forced() == b"x\xc3"


def tokens_of(matcher, text: str) -> bool:
    return all(matcher.accept(4 + b) for b in text.encode())


def test_structural_tags_let_text_go_free_and_hold_what_is_inside_of_a_tag() -> None:
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "triggered_tags", "triggers": ["<call"],
            "tags": [{"type": "tag", "begin": "<call>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</call>"},
                     {"type": "tag", "begin": "<call2>", "content": {"type": "grammar", "grammar": 'root ::= "(" root ")" | "-"'}, "end": "</call2>"}],
        },
    }  # fmt: skip
    engine = XgrammarEngine(vocabulary())
    compiled = engine.load(engine.compile("structural_tag", json.dumps(tag)))

    assert tokens_of(compiled.matcher(), "any text <call>12</call> more <call2>((-))</call2>.")
    assert not tokens_of(compiled.matcher(), "any <call>1<")
    assert not tokens_of(compiled.matcher(), "<call2>((-)<")
    v, mask = vocabulary(), np.zeros(vocabulary().num_words, np.uint32)
    matcher = compiled.matcher()
    assert tokens_of(matcher, "<call2>(((-")
    matcher.fill(mask)
    assert {v.token_bytes[t] for t in as_set(mask)} == {b")", b"))", b")))"}


AB: dict[str, object] = {"type": "const_string", "value": "ab"}
TAG: dict[str, object] = {"type": "tag", "begin": "<f>", "content": AB, "end": "</f>"}
CALLS = {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG]}
LISTED = {"type": "tags_with_separator", "tags": [TAG], "separator": ","}


@pytest.mark.parametrize(("format", "inside", "outside"), [
    (AB, ["ab"], ["", "a", "aba"]),
    ({"type": "any_text"}, ["", "x\n"], []),
    ({"type": "any_text", "excludes": ["<<"]}, ["a<b"], ["a<<"]),
    ({"type": "any_text", "max_chars": 2}, ["", "ab"], ["aba"]),
    ({"type": "grammar", "grammar": 'root ::= "a" root | "b"'}, ["b", "aab"], ["a"]),
    ({"type": "regex", "pattern": "a+"}, ["aa"], ["", "b"]),
    ({"type": "sequence", "elements": [AB, AB]}, ["abab"], ["ab"]),
    ({"type": "or", "elements": [AB, {"type": "const_string", "value": "c"}]}, ["ab", "c"], ["abc"]),
    ({"type": "optional", "content": AB}, ["", "ab"], ["abab"]),
    ({"type": "plus", "content": AB}, ["ab", "abab"], [""]),
    ({"type": "star", "content": AB}, ["", "abab"], ["aba"]),
    ({"type": "repeat", "min": 1, "max": 2, "content": AB}, ["ab", "abab"], ["", "ababab"]),
    ({"type": "repeat", "min": 1, "max": -1, "content": AB}, ["ababab"], [""]),
    ({**TAG, "end": ["</f>", "."]}, ["<f>ab</f>", "<f>ab."], ["ab."]),
    ({**TAG, "content": {"type": "any_text"}}, ["<f>a</b</f>"], ["<f>a", "<f>a</f>b"]),
    (CALLS, ["", "x<b", "<f>ab</f>x<f>ab</f>"], ["<f>", "<fa"]),
    ({**CALLS, "at_least_one": True}, ["<f>ab</f>x"], ["", "x<f>ab</f>"]),
    ({**CALLS, "stop_after_first": True, "excludes": ["zz"]}, ["", "z<f>ab</f>"], ["zz", "<f>ab</f>x"]),
    (LISTED, ["", "<f>ab</f>,<f>ab</f>"], ["<f>ab</f>,", "x"]),
    ({**LISTED, "at_least_one": True, "stop_after_first": True}, ["<f>ab</f>"], ["", "<f>ab</f>,<f>ab</f>"]),
    ({"type": "dispatch", "rules": [["!", AB]]}, ["", "x!ab!ab"], ["!a", "!x"]),
    ({"type": "dispatch", "rules": [["!", AB]], "loop": False, "excludes": ["q"]}, ["x", "x!ab"], ["q", "!abx"]),
])  # fmt: skip
def test_every_format_of_the_table_means_what_the_page_says(format: dict[str, object], inside: list[str], outside: list[str]) -> None:
    """And each mask is what `accept` says of every token: docs/grammar.md, "Structural tags"."""
    engine, v = XgrammarEngine(vocabulary()), vocabulary()
    compiled = engine.load(engine.compile("structural_tag", json.dumps({"type": "structural_tag", "format": format})))
    for text in [*inside, *outside]:
        matcher, is_in = compiled.matcher(), True
        for byte in text.encode():
            mask = np.zeros(v.num_words, np.uint32)
            allowed = set(range(v.vocab_size))
            if matcher.fill(mask):
                allowed = as_set(mask)
            for token in (*range(0, v.vocab_size, 7), 4 + byte):
                is_allowed = matcher.accept(token)
                assert is_allowed == (token in allowed)
                matcher.rollback(int(is_allowed))
            if not (is_in := matcher.accept(4 + byte)):
                break
        assert (is_in and matcher.is_completed) == (text in inside), text


@pytest.mark.parametrize(("format", "keyword", "path"), [
    ({"type": "json_schema", "json_schema": {"type": "object", "minProperties": 2}}, "json_schema", "/format"),
    ({**TAG, "content": {"type": "qwen_xml_parameter", "json_schema": {}}}, "qwen_xml_parameter", "/format/content"),
    ({"type": "sequence", "elements": [AB, {"type": "token", "token": 7}]}, "token", "/format/elements/1"),
    ({**TAG, "begin": {"type": "token", "token": 7}}, "tag", "/format"),
    ({"type": "any_text", "max_tokens": 2}, "max_tokens", "/format/max_tokens"),
    ({"type": "any_text", "min_chars": 2}, "min_chars", "/format/min_chars"),
    ({"type": "regex", "pattern": "a", "excludes": ["a"]}, "excludes", "/format/excludes"),
    ({"type": "dispatch", "rules": [["!", {"type": "any_tokens"}]]}, "any_tokens", "/format/rules/0/1"),
    ({"value": "ab"}, "None", "/format"),
])  # fmt: skip
def test_formats_and_members_that_are_not_enforced_are_refused_with_their_place(format: dict[str, object], keyword: str, path: str) -> None:
    with pytest.raises(UnsupportedGrammar) as raised:
        XgrammarEngine(vocabulary()).compile("structural_tag", json.dumps({"type": "structural_tag", "format": format}))

    assert (keyword, path) == (raised.value.fields["keyword"], raised.value.fields["path"])


def test_loading_the_library_imports_neither_torch_nor_its_own_package() -> None:
    code = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "from plugmesh_xgrammar.engine import XgrammarEngine\nfrom plugmesh.testing.grammar_oracle import vocabulary\n"
        "XgrammarEngine(vocabulary())\nassert not {'torch', 'transformers', 'xgrammar'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
