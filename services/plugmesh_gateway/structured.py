"""What an OpenAI body says about the form of its output: `response_format`, and the keys that vLLM added.

At most one of them. What the grammar service cannot enforce it refuses itself; here the form is checked, and `GrammarWanted.locate` turns the place of a
refusal within the grammar into a place within the body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.grammar.spec import GrammarSpec, Whitespace

from .request import GrammarWanted

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ENGINES = {"auto": "", "xgrammar": "xgrammar", "guidance": "llguidance", "llguidance": "llguidance"}
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def read_grammar(body: Any) -> GrammarWanted | None:
    """The grammar of a body's `response_format`, `guided_*` or `structured_outputs`; None for free text.

    Raises:
        InvalidRequest: Malformed, or more than one; `param` names the key.
    """
    found: list[GrammarWanted] = []
    whitespace = _whitespace(body.guided_whitespace_pattern)
    engine = _engine(body.guided_decoding_backend)
    if body.response_format is not None:
        found += _one(_response_format(body.response_format))
    if body.guided_json is not None:
        found.append(_json(body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        found.append(_text("regex", body.guided_regex, "guided_regex"))
    if body.guided_choice is not None:
        found.append(_choice(body.guided_choice, "guided_choice"))
    if body.guided_grammar is not None:
        found.append(_text("ebnf", body.guided_grammar, "guided_grammar"))
    if body.structured_outputs is not None:
        wanted, spaces = _structured(body.structured_outputs)
        found.append(wanted)
        if spaces is not None and whitespace not in (None, spaces):
            raise InvalidRequest("guided_whitespace_pattern and structured_outputs differ", param="guided_whitespace_pattern")
        whitespace = spaces or whitespace
    if len(found) > 1:
        first, second = (w.param.partition(".")[0] for w in found[:2])
        raise InvalidRequest(f"{first} and {second} exclude each other", param=second)
    if not found:
        for key in ("guided_whitespace_pattern", "guided_decoding_backend"):
            if getattr(body, key) is not None:
                raise InvalidRequest(f"{key} needs a grammar beside it", param=key)
        return None
    return found[0].changed(whitespace=whitespace, engine=engine)


def structural_tag(value: dict[str, Any], param: str) -> GrammarWanted:
    """A structural tag in its form of today, or in the older one of `structures` and `triggers`. Raises InvalidRequest."""
    if "structures" not in value:
        if not isinstance(value.get("format"), dict):
            raise InvalidRequest(f"{param}.format must be an object", param=f"{param}.format")
        return GrammarWanted(_spec("structural_tag", {"type": "structural_tag", "format": value["format"]}), param)
    tags = []
    where = {}
    structures, triggers = value["structures"], value.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list) or not all(isinstance(t, str) for t in triggers):
        raise InvalidRequest(f"{param} must hold lists `structures` and `triggers`", param=param)
    for i, item in enumerate(structures):
        at = f"{param}.structures[{i}]"
        if not isinstance(item, dict) or not isinstance(item.get("begin"), str) or not isinstance(item.get("end"), str):
            raise InvalidRequest(f"{at} must hold the strings `begin` and `end`", param=at)
        schema = item.get("schema")
        if not isinstance(schema, dict | bool):
            raise InvalidRequest(f"{at}.schema must be a JSON schema", param=f"{at}.schema")
        where[f"/format/tags/{i}/content/json_schema"] = f"{at}.schema"
        tags.append({"type": "tag", "begin": item["begin"], "content": {"type": "json_schema", "json_schema": schema}, "end": item["end"]})
    tag = {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags, "at_least_one": False}}
    return GrammarWanted(_spec("structural_tag", tag), param, tuple(where.items()))


def of_grpc(spec: GrammarSpec) -> GrammarWanted:
    """A gRPC request's grammar. Raises InvalidRequest."""
    if spec.relaxed:
        raise InvalidRequest("grammar.relaxed: what is generated here obeys the whole grammar", param="grammar.relaxed")
    return GrammarWanted(spec, "grammar")


def _one(wanted: GrammarWanted | None) -> list[GrammarWanted]:
    return [] if wanted is None else [wanted]


def _response_format(value: dict[str, Any]) -> GrammarWanted | None:
    kind = value.get("type")
    allowed = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if kind == "structural_tag":
        return structural_tag(value, "response_format")
    if kind not in allowed:
        raise InvalidRequest("response_format.type must be text, json_object, json_schema or structural_tag", param="response_format.type")
    _no_more(value, allowed[kind], "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarWanted(GrammarSpec("json_object"), "response_format")
    inner = value.get("json_schema")
    at = "response_format.json_schema"
    if not isinstance(inner, dict):
        raise InvalidRequest(f"{at} must be an object", param=at)
    _no_more(inner, {"name", "description", "schema", "strict"}, at)
    if not isinstance(inner.get("name"), str) or not _NAME.fullmatch(inner["name"]):
        raise InvalidRequest(f"{at}.name must be 1 to 64 letters, digits, '_' or '-'", param=f"{at}.name")
    if not isinstance(inner.get("description"), str | None):
        raise InvalidRequest(f"{at}.description must be a string", param=f"{at}.description")
    if not isinstance(inner.get("strict"), bool | None):  # either way the schema is enforced exactly
        raise InvalidRequest(f"{at}.strict must be true or false", param=f"{at}.strict")
    if not isinstance(inner.get("schema"), dict):
        raise InvalidRequest(f"{at}.schema must be a JSON schema", param=f"{at}.schema")
    return GrammarWanted(_spec("json_schema", inner["schema"]), f"{at}.schema")


def _structured(value: dict[str, Any]) -> tuple[GrammarWanted, Whitespace | None]:
    at = "structured_outputs"
    _no_more(value, {*_STRUCTURED, "disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"}, at)
    given = [key for key in _STRUCTURED if value.get(key) not in (None, False)]
    if len(given) != 1:
        raise InvalidRequest(f"{at} must hold exactly one of {', '.join(_STRUCTURED)}", param=at)
    if value.get("disable_additional_properties"):
        raise InvalidRequest(
            f"{at}.disable_additional_properties is unsupported; write additionalProperties into the schema", param=f"{at}.disable_additional_properties")
    whitespace = _whitespace(value.get("whitespace_pattern"), f"{at}.whitespace_pattern")
    if value.get("disable_any_whitespace"):
        whitespace = "compact"
    key = given[0]
    param = f"{at}.{key}"
    item = value[key]
    if key == "structural_tag" and isinstance(item, str):
        item = _loads(item, param)
    if key == "structural_tag":
        if not isinstance(item, dict):
            raise InvalidRequest(f"{param} must be an object", param=param)
        return structural_tag(item, param), whitespace
    makers: dict[str, Callable[[], GrammarWanted]] = {
        "json": lambda: _json(item, param), "regex": lambda: _text("regex", item, param), "choice": lambda: _choice(item, param),
        "grammar": lambda: _text("ebnf", item, param), "json_object": lambda: GrammarWanted(GrammarSpec("json_object"), param),
    }
    return makers[key](), whitespace


def _json(value: Any, param: str) -> GrammarWanted:
    schema = _loads(value, param) if isinstance(value, str) else value
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{param} must be a JSON schema", param=param)
    return GrammarWanted(_spec("json_schema", schema), param)


def _text(kind: Any, value: Any, param: str) -> GrammarWanted:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{param} must be a string that is not empty", param=param)
    return GrammarWanted(GrammarSpec(kind, value), param)


def _choice(value: Any, param: str) -> GrammarWanted:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise InvalidRequest(f"{param} must be a list of strings that is not empty", param=param)
    return GrammarWanted(_spec("choice", value), param)


def _spec(kind: Any, value: Any) -> GrammarSpec:
    return GrammarSpec(kind, json.dumps(value, ensure_ascii=False))


def _loads(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest(f"{param} is not valid JSON", param=param) from e


def _no_more(value: dict[str, Any], allowed: set[str], param: str) -> None:
    for key in value:
        if key not in allowed:
            raise InvalidRequest(f"unknown parameter: {param}.{key[:64]}", param=f"{param}.{key[:64]}")


def _whitespace(pattern: Any, param: str = "guided_whitespace_pattern") -> Whitespace | None:
    if pattern is None:
        return None
    if pattern == "":  # no blank anywhere
        return "compact"
    raise InvalidRequest(f"{param} must be empty, which means compact JSON; other patterns are unsupported", param=param)


def _engine(name: Any) -> str:
    if name is None:
        return ""
    if name not in _ENGINES:
        raise InvalidRequest(f"guided_decoding_backend must be one of {', '.join(_ENGINES)}", param="guided_decoding_backend")
    return _ENGINES[name]
