"""The engine: compile and load (`plugmesh.grammar.seams.GrammarEngine`)."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from plugmesh.errors import DataLoss, LimitExceeded, UnsupportedGrammar
from plugmesh.grammar import gbnf, regex
from plugmesh.grammar.form import pack, unpack
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.grammar.syntax import Grammar, to_gbnf
from plugmesh_xgrammar import binding
from plugmesh_xgrammar.matcher import XgrammarMatcher
from plugmesh_xgrammar.native import Door, door
from plugmesh_xgrammar.plugin import FORM, LIBRARY

RAW = 0  # VocabType: tokens are the bytes that they stand for
# Formats of structural tags that are enforced exactly, with their members; "*" marks formats within. What the library would leave out in silence is not here.
# Formats that hold a schema are lowered before they get here. `max_tokens` is missing because the library's `accept` does not keep to it.
TAG_FORMATS = {
    "const_string": {"value"},
    "any_text": {"excludes", "max_chars"},
    "grammar": {"grammar"},
    "regex": {"pattern"},
    "sequence": {"elements*"},
    "or": {"elements*"},
    "optional": {"content*"},
    "plus": {"content*"},
    "star": {"content*"},
    "repeat": {"min", "max", "content*"},
    "tag": {"begin", "content*", "end"},
    "triggered_tags": {"triggers", "tags*", "at_least_one", "stop_after_first", "excludes"},
    "tags_with_separator": {"tags*", "separator", "at_least_one", "stop_after_first"},
    "dispatch": {"rules", "loop", "excludes"},
}


class Compiled:
    """A `plugmesh.grammar.seams.CompiledGrammar`."""

    def __init__(self, classes: Any, grammar: Any, known: bytes, door: Door | None) -> None:
        self._classes = classes
        self._grammar = grammar
        self._known = known
        self._door = door

    @property
    def num_bytes(self) -> int:
        return int(self._grammar.memory_size_bytes())

    def matcher(self) -> XgrammarMatcher:
        inner = self._classes.GrammarMatcher(self._grammar, None, False, -1, None)
        return XgrammarMatcher(inner, self._known, self._door)


class XgrammarEngine:
    """A `plugmesh.grammar.seams.GrammarEngine`."""

    def __init__(self, vocabulary: GrammarVocabulary, *, compile_threads: int = 2) -> None:
        self._classes = binding.load(LIBRARY)
        # A token without bytes is never allowed by the library, and neither is an id that it is not told of.
        tokens = [b"" if t is None or i in vocabulary.special_ids else t for i, t in enumerate(vocabulary.token_bytes)]
        self._tokenizer = self._classes.TokenizerInfo(tokens, RAW, vocabulary.vocab_size, list(vocabulary.eos_token_ids), False)
        self._known = bytes(bool(t) or i in vocabulary.eos_token_ids for i, t in enumerate(tokens))
        self._threads = compile_threads
        self._door = functools.cache(lambda: door(self._classes, self._known, vocabulary.num_words))
        self._header = ("xgrammar", f"{LIBRARY}-{FORM}", vocabulary.tokenizer_hash)

    def compile(self, language: str, source: str) -> bytes:
        # Of its own, so that nothing that was compiled before takes part.
        compiler = self._classes.GrammarCompiler(self._tokenizer, self._threads, False, -1)
        try:
            if language == "ebnf":
                grammar = compiler.compile_grammar_from_strings(to_gbnf(gbnf.parse(source)), "root")
            elif language == "regex":
                tree = Grammar("root", {"root": regex.parse(source)})
                grammar = compiler.compile_grammar_from_strings(to_gbnf(tree), "root")
            elif language == "structural_tag":
                grammar = compiler.compile_structural_tag(_tag(source))
            else:
                raise UnsupportedGrammar(f"xgrammar does not take grammars in {language!r}", keyword=language)
            text = str(grammar.serialize_json())
        except (RuntimeError, ValueError, TypeError) as e:
            if "bad_alloc" in str(e):
                raise LimitExceeded("the grammar needs more memory than allowed", param="grammar") from e
            raise UnsupportedGrammar(f"xgrammar cannot compile the {language}: {_first_line(e)}", keyword=language) from e
        return pack(*self._header, text.encode())

    def load(self, compiled: bytes) -> Compiled:
        text = unpack(compiled, *self._header)
        try:
            grammar = self._classes.CompiledGrammar.deserialize_json(text.decode(), self._tokenizer)
        except (RuntimeError, ValueError, TypeError) as e:
            raise DataLoss(f"a compiled grammar does not load: {_first_line(e)}") from e
        return Compiled(self._classes, grammar, self._known, self._door())


def _tag(source: str) -> str:
    """A structural tag with its grammars and regular expressions read by us; refuses what the library enforces only in part, or leaves out."""
    try:
        tag = json.loads(source)
        if not isinstance(tag, dict) or set(tag) != {"type", "format"} or tag["type"] != "structural_tag":
            raise UnsupportedGrammar('a structural tag has the members "type" and "format" and nothing else', keyword="structural_tag", path="")
        return json.dumps({"type": "structural_tag", "format": _format(tag["format"], "/format")})
    except (ValueError, RecursionError) as e:
        raise UnsupportedGrammar("the structural tag is not valid JSON, or nested too deeply", keyword="structural_tag") from e


def _format(node: Any, path: str) -> Any:
    kind = node.get("type") if isinstance(node, dict) else None
    members = TAG_FORMATS.get(kind) if isinstance(kind, str) else None
    if members is None:
        raise UnsupportedGrammar(f"a structural tag's format {kind!r} cannot be enforced exactly", keyword=str(kind), path=path)
    for name in node:
        if name != "type" and name not in members and f"{name}*" not in members:
            raise UnsupportedGrammar(f"{name!r} of a structural tag's {kind} is not known, or cannot be enforced exactly", keyword=name, path=f"{path}/{name}")
    try:
        if kind == "grammar" and isinstance(node.get("grammar"), str):
            return {"type": "grammar", "grammar": to_gbnf(gbnf.parse(node["grammar"]))}
        if kind == "regex" and isinstance(node.get("pattern"), str):
            return {"type": "grammar", "grammar": to_gbnf(Grammar("root", {"root": regex.parse(node["pattern"])}))}
    except UnsupportedGrammar as e:
        e.fields.setdefault("path", path)
        raise
    if kind == "tag":
        ends = node.get("end") if isinstance(node.get("end"), list) else [node.get("end")]
        if not all(isinstance(text, str) for text in [node.get("begin"), *ends]):
            raise UnsupportedGrammar("a tag's begin and end are texts", keyword="tag", path=path)
    if kind == "dispatch" and isinstance(node.get("rules"), list):
        rules = [[r[0], _format(r[1], f"{path}/rules/{i}/1")] if isinstance(r, list) and len(r) == 2 else r for i, r in enumerate(node["rules"])]
        return {**node, "rules": rules}
    return {name: _within(value, f"{path}/{name}") if f"{name}*" in members else value for name, value in node.items()}


def _within(value: Any, path: str) -> Any:
    if isinstance(value, list):
        return [_format(item, f"{path}/{i}") for i, item in enumerate(value)]
    return _format(value, path)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\[[\d:]+\] \S+: ", "", lines[-1])[:300] if lines else type(error).__name__  # without the time and the place in the library's source
