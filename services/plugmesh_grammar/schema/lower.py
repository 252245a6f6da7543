"""From what a user wrote to grammars that engines can compile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from plugmesh.errors import InvalidRequest, LimitExceeded, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec

from . import automata
from .documents import Document
from .ebnf import EbnfWriter
from .grammar import Grammar, Part, Regular
from .lark import LarkWriter
from .limits import SchemaLimits
from .lowering import Lowering
from .normal import KEYWORDS, Normaliser
from .tags import tag_gbnf

# Part of the key that compiled grammars are cached by: any change to what is made of a specification raises it.
FRONT_END_VERSION = "2"
_MAX_RELAXED = 50


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to say a grammar, exactly.

    Attributes:
        language: "ebnf" (GBNF, root rule `root`), "lark" (of llguidance), "regex" or "structural_tag" (JSON, of xgrammar).
    """

    language: str
    source: str


@dataclass(frozen=True, slots=True)
class Unenforced:
    """A keyword that a relaxed specification was freed from. `path` is the keyword's JSON Pointer."""

    keyword: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lowered:
    """Equivalent grammars in order of preference."""

    candidates: tuple[Candidate, ...]
    unenforced: tuple[Unenforced, ...] = ()


def lower(spec: GrammarSpec, *, limits: SchemaLimits | None = None) -> Lowered:
    """Everything that the candidates allow is allowed by the specification; nothing is left out in silence.

    Raises:
        UnsupportedGrammar: Malformed, unsatisfiable, or beyond us; `fields` name the keyword and its JSON Pointer.
        LimitExceeded: Larger than the limits.
    """
    limits = limits or SchemaLimits()
    if len(spec.source.encode("utf-8", "surrogatepass")) > limits.max_bytes:
        raise LimitExceeded(f"a grammar of {len(spec.source)} characters; the limit is {limits.max_bytes} bytes", param="grammar")
    flexible = spec.whitespace != "compact"
    try:
        if spec.kind == "json_object":
            return Lowered(_written(schema_grammar({"type": "object"}, limits), flexible))
        if spec.kind == "json_schema":
            return _schema(parse(spec.source, limits), limits, flexible, spec.relaxed)
        if spec.kind == "choice":
            return Lowered((Candidate("ebnf", _choice(parse(spec.source, limits), limits)),))
        if spec.kind == "structural_tag":
            return _structural_tag(parse(spec.source, limits), limits, flexible, spec.relaxed)
        if spec.kind == "regex":
            if len(spec.source) > limits.max_regex_chars:
                raise LimitExceeded(f"a regex of {len(spec.source)} characters; the limit is {limits.max_regex_chars}", param="grammar")
            return Lowered((Candidate("regex", spec.source),))
        if spec.kind == "ebnf":
            return Lowered((Candidate("ebnf", spec.source),))
    except RecursionError:
        raise LimitExceeded("the grammar is nested too deeply", param="grammar") from None
    _bad(f"unknown kind {spec.kind!r}")


def _bad(message: str, keyword: str = "", path: str = "") -> NoReturn:
    raise UnsupportedGrammar(message, param="grammar", keyword=keyword, path=path)


def parse(source: str, limits: SchemaLimits) -> Any:
    """JSON with numbers kept as they are written. Raises UnsupportedGrammar, LimitExceeded."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            _bad("an object of the schema has a name twice")
        return found

    depth = deepest = 0
    in_string = escaped = False
    for char in source:
        if in_string:
            escaped, in_string = (char == "\\" and not escaped), in_string and (char != '"' or escaped)
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    if deepest > limits.max_depth:
        raise LimitExceeded(f"JSON nested {deepest} deep; the limit is {limits.max_depth}", param="grammar")
    try:
        return json.loads(source, parse_float=Decimal, parse_int=_integer, parse_constant=lambda name: _bad(f"{name} is no JSON"), object_pairs_hook=unique)
    except ValueError as error:
        _bad(f"not JSON: {error}")


def _integer(text: str) -> int:
    if len(text) > 400:
        _bad("a number of more than 400 digits")
    return int(text)


def schema_grammar(schema: Any, limits: SchemaLimits) -> Grammar:
    """Rules for the JSON text of a schema's values. Raises UnsupportedGrammar, also when there are none, and LimitExceeded."""
    grammar = _rules(schema, limits)
    if not grammar.pruned():
        keyword = _culprit(schema, limits)
        _bad("no value satisfies the schema", keyword, f"/{keyword}" if keyword else "")
    return grammar


def _rules(schema: Any, limits: SchemaLimits) -> Grammar:
    try:
        normaliser = Normaliser(Document(schema), limits)
        return Lowering(normaliser).run(normaliser.root())
    except InvalidRequest as error:
        error.param = error.param or "grammar"
        raise
    except ValueError as error:
        _bad(str(error))


def _culprit(schema: Any, limits: SchemaLimits) -> str:
    """A keyword of the root without which there would be values."""
    if not isinstance(schema, dict):
        return ""
    broad = ("type", "const", "enum")  # without which nearly everything has values, so last
    for keyword in sorted(KEYWORDS, key=lambda name: name in broad):
        if keyword in schema:
            try:
                if _rules({k: v for k, v in schema.items() if k != keyword}, limits).pruned():
                    return keyword
            except InvalidRequest:
                continue
    return next((keyword for keyword in KEYWORDS if keyword in schema), "")


def _written(grammar: Grammar, flexible: bool) -> tuple[Candidate, ...]:
    # llguidance also takes GBNF, but whole strings and numbers as lexemes are faster.
    lark = LarkWriter(grammar, flexible=flexible).write()
    candidates = [Candidate("lark", lark)] if lark else []
    writer = EbnfWriter(grammar, flexible=flexible)
    ebnf = Candidate("ebnf", writer.write())
    return (*candidates, ebnf) if writer.counts_far else (ebnf, *candidates)


def _schema(schema: Any, limits: SchemaLimits, flexible: bool, relaxed: bool) -> Lowered:
    dropped: list[Unenforced] = []
    while True:
        try:
            return Lowered(_written(schema_grammar(schema, limits), flexible), tuple(dropped))
        except UnsupportedGrammar as error:
            keyword, path = error.fields.get("keyword", ""), error.fields.get("path", "")
            without = _without(schema, path) if relaxed and keyword and len(dropped) < _MAX_RELAXED else None
            if without is None:
                raise
            dropped.append(Unenforced(keyword, path, error.message))
            schema = without[0]


def _without(schema: Any, path: str) -> tuple[Any] | None:
    """A copy of the schema without the member at a pointer."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    copy = _copied(schema)
    at = copy
    try:
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at[part]
        del at[last]
    except (KeyError, IndexError, ValueError, TypeError):
        return None
    return (copy,)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _choice(choices: Any, limits: SchemaLimits) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) for text in choices):
        _bad("a choice is a JSON array of one or more strings")
    if len(choices) > limits.max_enum_values:
        raise LimitExceeded(f"a choice of {len(choices)} strings; the limit is {limits.max_enum_values}", param="grammar")
    try:
        part: Part = Regular(automata.words(choices), False)
    except ValueError as error:
        _bad(str(error))
    return EbnfWriter(Grammar(1, {"choice": part}, "choice"), flexible=False).write()


def _structural_tag(tag: Any, limits: SchemaLimits, flexible: bool, relaxed: bool) -> Lowered:
    """The tag with each schema in it replaced by the grammar of the schema."""
    dropped: list[Unenforced] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if value.get("type") == "json_schema" and "json_schema" in value:
            if value.get("style", "json") != "json":
                _bad(f"the style {value['style']!r} of a schema is not supported", "json_schema", path)
            for name in value.keys() - {"type", "json_schema", "style"}:  # they would be lost
                _bad(f"{name!r} of a schema in a structural tag is not supported", name, f"{path}/{name}")
            try:
                lowered = _schema(value["json_schema"], limits, flexible, relaxed)
            except UnsupportedGrammar as error:
                error.fields["path"] = f"{path}/json_schema{error.fields.get('path', '')}"
                raise
            dropped.extend(Unenforced(u.keyword, f"{path}/json_schema{u.path}", u.reason) for u in lowered.unenforced)
            return {"type": "grammar", "grammar": next(c.source for c in lowered.candidates if c.language == "ebnf")}
        return {name: walk(item, f"{path}/{name}") for name, item in value.items()}

    if not isinstance(tag, dict):
        _bad("a structural tag is a JSON object")
    without_schemas = walk(tag, "")
    source = json.dumps(without_schemas, ensure_ascii=False, default=float)
    written = tag_gbnf(without_schemas)
    return Lowered((Candidate("structural_tag", source), *([Candidate("ebnf", written)] if written else [])), tuple(dropped))
