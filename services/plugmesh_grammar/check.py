"""What a grammar may not exceed, looked at before any process sees it. Cheap and linear in its length."""

from __future__ import annotations

import json
import re
from typing import Any

from plugmesh.errors import InvalidRequest, LimitExceeded, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec
from plugmesh_grammar.config import Settings

_NOT_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[^\[\]{}"]+', re.S)
_NOT_GROUPS = re.compile(r"\\.|\[(?:[^\]\\]|\\.)*\]|[^()\\\[]+", re.S)
_NAME_LIKE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def check(spec: GrammarSpec, settings: Settings) -> None:
    """Size, depth, values and patterns of a grammar.

    Raises:
        LimitExceeded: Names the limit.
        UnsupportedGrammar: A schema, a list of choices or a structural tag is not JSON, or not JSON of the right type.
        InvalidRequest: The engine's name cannot be one.
    """
    num_bytes = len(spec.source.encode("utf-8", "surrogatepass"))
    if num_bytes > settings.max_schema_bytes:
        raise LimitExceeded(f"the grammar has {num_bytes} bytes, at most {settings.max_schema_bytes} are allowed", param="grammar.source")
    if spec.engine and not _NAME_LIKE.fullmatch(spec.engine):
        raise InvalidRequest("that is no name of a grammar engine", param="grammar.engine")
    if spec.kind == "json_object" and spec.source.strip():
        raise InvalidRequest("a json_object has no source", param="grammar.source")
    if spec.kind in ("json_schema", "choice", "structural_tag"):
        _check_json(spec, settings)
    elif spec.kind in ("regex", "ebnf"):
        if spec.kind == "regex" and len(spec.source) > settings.max_regex_chars:
            raise LimitExceeded(f"the regex has {len(spec.source)} characters, at most {settings.max_regex_chars} are allowed", param="grammar.source")
        _check_depth(_depth(_NOT_GROUPS.sub("", spec.source), "(", ")"), settings)


def _check_json(spec: GrammarSpec, settings: Settings) -> None:
    # Before it is parsed: a parser that recurses must not be given what is too deep.
    _check_depth(_depth(_NOT_BRACKETS.sub("", spec.source), "[{", "]}"), settings)
    try:
        value = json.loads(spec.source)
    except ValueError as e:
        where = f"line {e.lineno}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else "a number in it"
        raise UnsupportedGrammar(f"the {spec.kind} is not JSON ({where})", param="grammar.source", keyword="", path="") from e
    if spec.kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
            raise UnsupportedGrammar("choices are a JSON array of one or more strings", param="grammar.source", keyword="choice", path="")
        _check_values(len(value), "choices", settings)
        return
    waiting: list[Any] = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for key, child in node.items():
                if key == "enum" and isinstance(child, list):
                    _check_values(len(child), "values in one enum", settings)
                elif key == "pattern" and isinstance(child, str):
                    _check_pattern(child, settings)
                elif key == "patternProperties" and isinstance(child, dict):
                    for pattern in child:
                        _check_pattern(pattern, settings)
                waiting.append(child)
        elif isinstance(node, list):
            waiting.extend(node)


def _check_values(num: int, what: str, settings: Settings) -> None:
    if num > settings.max_enum_values:
        raise LimitExceeded(f"{num} {what}, at most {settings.max_enum_values} are allowed", param="grammar.source")


def _check_pattern(pattern: str, settings: Settings) -> None:
    if len(pattern) > settings.max_regex_chars:
        raise LimitExceeded(f"a pattern has {len(pattern)} characters, at most {settings.max_regex_chars} are allowed", param="grammar.source")


def _check_depth(depth: int, settings: Settings) -> None:
    if depth > settings.max_schema_depth:
        raise LimitExceeded(f"the grammar is nested {depth} deep, at most {settings.max_schema_depth} are allowed", param="grammar.source")


def _depth(brackets: str, opening: str, closing: str) -> int:
    depth = most = 0
    for bracket in brackets:
        if bracket in opening:
            depth += 1
            most = max(most, depth)
        elif bracket in closing:
            depth = max(0, depth - 1)
    return most
