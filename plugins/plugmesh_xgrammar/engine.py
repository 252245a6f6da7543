"""The engine: compile and load (`plugmesh.grammar.seams.GrammarEngine`)."""

from __future__ import annotations

import json
import re
from typing import Any

from plugmesh.errors import DataLoss, UnsupportedGrammar
from plugmesh.grammar import gbnf, regex
from plugmesh.grammar.form import pack, unpack
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.grammar.syntax import Grammar, to_gbnf
from plugmesh_xgrammar import binding
from plugmesh_xgrammar.matcher import XgrammarMatcher
from plugmesh_xgrammar.plugin import FORM, LIBRARY

RAW = 0  # VocabType: tokens are the bytes that they stand for
# Formats of structural tags whose meaning is their own; those that hold a schema or a dialect of another system are lowered before they get here.
TAG_FORMATS = frozenset({
    "const_string", "grammar", "regex", "any_text", "sequence", "or", "optional", "plus", "star", "repeat", "tag", "triggered_tags",
    "tags_with_separator", "dispatch",
})  # fmt: skip


class Compiled:
    """A `plugmesh.grammar.seams.CompiledGrammar`."""

    def __init__(self, classes: Any, grammar: Any, known: bytes) -> None:
        self._classes = classes
        self._grammar = grammar
        self._known = known

    @property
    def num_bytes(self) -> int:
        return int(self._grammar.memory_size_bytes())

    def matcher(self) -> XgrammarMatcher:
        inner = self._classes.GrammarMatcher(self._grammar, None, False, -1, None)
        return XgrammarMatcher(inner, self._known)


class XgrammarEngine:
    """A `plugmesh.grammar.seams.GrammarEngine`."""

    def __init__(self, vocabulary: GrammarVocabulary, *, compile_threads: int = 2) -> None:
        self._classes = binding.load(LIBRARY)
        # A token without bytes is never allowed by the library, and neither is an id that it is not told of.
        tokens = [b"" if t is None or i in vocabulary.special_ids else t for i, t in enumerate(vocabulary.token_bytes)]
        self._tokenizer = self._classes.TokenizerInfo(tokens, RAW, vocabulary.vocab_size, list(vocabulary.eos_token_ids), False)
        self._known = bytes(bool(t) or i in vocabulary.eos_token_ids for i, t in enumerate(tokens))
        self._threads = compile_threads
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
            raise UnsupportedGrammar(f"xgrammar cannot compile the {language}: {_first_line(e)}", keyword=language) from e
        return pack(*self._header, text.encode())

    def load(self, compiled: bytes) -> Compiled:
        text = unpack(compiled, *self._header)
        try:
            grammar = self._classes.CompiledGrammar.deserialize_json(text.decode(), self._tokenizer)
        except (RuntimeError, ValueError, TypeError) as e:
            raise DataLoss(f"a compiled grammar does not load: {_first_line(e)}") from e
        return Compiled(self._classes, grammar, self._known)


def _tag(source: str) -> str:
    """A structural tag with its grammars and regular expressions read by us; refuses formats that the library enforces only in part."""
    try:
        tag = json.loads(source)
        return json.dumps(_tag_node(tag))
    except (ValueError, RecursionError) as e:
        raise UnsupportedGrammar("the structural tag is not valid JSON, or nested too deeply", keyword="structural_tag") from e


def _tag_node(node: Any) -> Any:
    if isinstance(node, list):
        return [_tag_node(item) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("type")
    if isinstance(kind, str) and kind not in TAG_FORMATS and kind != "structural_tag":
        raise UnsupportedGrammar(f"a structural tag's format {kind!r} cannot be enforced exactly", keyword=kind)
    if kind == "grammar" and isinstance(node.get("grammar"), str):
        return {**node, "grammar": to_gbnf(gbnf.parse(node["grammar"]))}
    if kind == "regex" and isinstance(node.get("pattern"), str):
        if set(node) != {"type", "pattern"}:
            raise UnsupportedGrammar("a structural tag's regex has a pattern and nothing else", keyword="regex")
        return {"type": "grammar", "grammar": to_gbnf(Grammar("root", {"root": regex.parse(node["pattern"])}))}
    return {key: _tag_node(value) for key, value in node.items()}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\[[\d:]+\] \S+: ", "", lines[-1])[:300] if lines else type(error).__name__  # without the time and the place in the library's source
