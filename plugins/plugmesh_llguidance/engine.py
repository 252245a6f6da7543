"""The engine: compile and load (`plugmesh.grammar.seams.GrammarEngine`).

The library compiles in milliseconds and has no form of its own for what it compiled: the form that travels is checked Lark source.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
from typing import TYPE_CHECKING, Any

from plugmesh.errors import DataLoss, Unavailable, UnsupportedGrammar
from plugmesh.grammar import gbnf, regex
from plugmesh.grammar.form import pack, unpack
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh_llguidance import lark
from plugmesh_llguidance.matcher import LlguidanceMatcher, Tokens
from plugmesh_llguidance.plugin import FORM, LIBRARY

if TYPE_CHECKING:
    from plugmesh_llguidance.plugin import Settings

# What a schema's "x-guidance" may say; the rest would loosen it (`lenient`, `coerce_one_of`).
SCHEMA_OPTIONS = frozenset({"item_separator", "key_separator", "whitespace_flexible", "whitespace_pattern"})
STRICT = {"lenient": False, "coerce_one_of": False}
BYTES_OF_A_PARSER = 200_000  # of the lexer's tables and the parser of a grammar of a few rules, about


class Compiled:
    """A `plugmesh.grammar.seams.CompiledGrammar`: a parser at its beginning, which is copied for every output."""

    def __init__(self, prototype: Any, tokens: Tokens, num_source: int) -> None:
        self._prototype = prototype
        self._tokens = tokens
        self._num_source = num_source
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return BYTES_OF_A_PARSER + 40 * self._num_source

    def matcher(self) -> LlguidanceMatcher:
        with self._lock:
            return LlguidanceMatcher(self._prototype.deep_copy(), self._tokens)


class _Vocabulary:
    """What the library asks of a tokenizer. Tokens without bytes are never allowed, so that is what special ones get."""

    def __init__(self, tokens: list[bytes], eos: int, special: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos
        self.bos_token_id = None
        self.special_token_ids = special

    def __call__(self, text: Any) -> list[int]:
        return []  # asked only where the library would force tokens, which is switched off


class LlguidanceEngine:
    """A `plugmesh.grammar.seams.GrammarEngine`."""

    def __init__(self, vocabulary: GrammarVocabulary, settings: Settings) -> None:
        try:
            found = importlib.metadata.version("llguidance")
            import llguidance
        except (importlib.metadata.PackageNotFoundError, ImportError, OSError) as e:
            raise Unavailable("the library llguidance is not installed: pip install 'plugmesh[grammar]'") from e
        if found != LIBRARY:
            raise Unavailable(f"the library llguidance is installed in version {found}; the plugin works with {LIBRARY}")
        self._library = llguidance
        silent = vocabulary.special_ids | set(vocabulary.eos_token_ids)
        tokens = [b"" if t is None or i in silent else t for i, t in enumerate(vocabulary.token_bytes)]
        tokens += [b""] * (vocabulary.vocab_size - len(tokens))
        eos = list(vocabulary.eos_token_ids)
        if not eos:
            raise Unavailable("the model's tokenizer has no token that ends an output, which llguidance needs")
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokens, eos[0], sorted(silent)))
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=eos)
        self._limits = llguidance.LLParserLimits(**settings.model_dump(), verbose_errors=False)
        self._tokens = Tokens.of(tokens, eos)
        self._header = ("llguidance", f"{LIBRARY}-{FORM}", vocabulary.tokenizer_hash)

    def compile(self, language: str, source: str) -> bytes:
        if language == "lark":
            if "%llguidance" in source:
                raise UnsupportedGrammar("the engine's own options are not a grammar's to set", keyword="%llguidance")
            text = lark.HEADER + source
        elif language == "ebnf":
            text = lark.write(gbnf.parse(source))
        elif language == "regex":
            text = lark.write_node(regex.parse(source))
        elif language == "json_schema":
            text = f"{lark.HEADER}start: %json {_strict(source)}\n"
        else:
            raise UnsupportedGrammar(f"llguidance does not take grammars in {language!r}", keyword=language)
        is_error, messages = self._library.LLMatcher.validate_grammar_with_warnings(_grammar(text), self._tokenizer, limits=self._limits)
        if is_error or messages:  # a warning is about something that it does not enforce
            raise UnsupportedGrammar(f"llguidance cannot compile the {language}: {_first_line(messages)}", keyword=language)
        return pack(*self._header, text.encode())

    def load(self, compiled: bytes) -> Compiled:
        text = unpack(compiled, *self._header).decode()
        prototype = self._library.LLMatcher(self._tokenizer, _grammar(text), log_level=0, limits=self._limits)
        if prototype.is_error():
            raise DataLoss(f"a compiled grammar does not load: {_first_line([prototype.get_error()])}")
        return Compiled(prototype, self._tokens, len(text))


def _grammar(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _strict(source: str) -> str:
    """The schema in one line, held to its letter."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as e:
        raise UnsupportedGrammar("the schema is not valid JSON", keyword="json_schema") from e
    if not isinstance(schema, dict):
        schema = {"allOf": [schema]}
    options = schema.get("x-guidance", {})
    unknown = set(options) - SCHEMA_OPTIONS if isinstance(options, dict) else {"x-guidance"}
    if unknown:
        raise UnsupportedGrammar(f"option {min(unknown)!r} of x-guidance is not supported", keyword="x-guidance", path="/x-guidance")
    return json.dumps({**schema, "x-guidance": {**options, **STRICT}})


def _first_line(messages: list[str]) -> str:
    lines = [line.strip() for line in messages[0].splitlines() if line.strip()] if messages else []
    return lines[0][:300] if lines else "it gives no reason"
