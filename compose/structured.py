"""Structured output of a running stack: what comes is held against the schema that was sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["city", "inhabitants", "sights"],
    "properties": {
        "city": {"enum": ["Paris", "Lyon", "Nice"]}, "inhabitants": {"type": "integer", "minimum": 1, "maximum": 20_000_000},
        "sights": {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "string", "maxLength": 12}},
    },
}  # fmt: skip
FORECAST = {
    "type": "object", "additionalProperties": False, "required": ["city", "num_days"],
    "properties": {"city": {"type": "string", "minLength": 1, "maxLength": 16}, "num_days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
CLOSED = {"type": "object", "unevaluatedProperties": {"not": {"$dynamicRef": "#nowhere"}}}
_JSON_TYPES: dict[str, type] = {"object": dict, "array": list, "string": str, "integer": int}


def violation(value: Any, schema: dict[str, Any], path: str = "") -> str:
    """What of the keywords above a value breaks, or nothing. The checks need no library, so that they run on a clean checkout."""
    if "enum" in schema:
        return "" if value in schema["enum"] else f"{path or '/'} is none of the enum"
    kind = schema["type"]
    if not isinstance(value, _JSON_TYPES[kind]) or isinstance(value, bool):
        return f"{path or '/'} is no {kind}"
    if kind == "object":
        if missing := [name for name in schema["required"] if name not in value]:
            return f"{path}/{missing[0]} is missing"
        if more := [name for name in value if name not in schema["properties"]]:
            return f"{path}/{more[0]} is not declared"
        return next((found for name, part in value.items() if (found := violation(part, schema["properties"][name], f"{path}/{name}"))), "")
    size = value if kind == "integer" else len(value)
    low, high = {"integer": ("minimum", "maximum"), "string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}[kind]
    if not schema.get(low, size) <= size <= schema.get(high, size):
        return f"{path or '/'} is out of bounds"
    return next((found for i, part in enumerate(value) if (found := violation(part, schema["items"], f"{path}/{i}"))), "") if kind == "array" else ""


Ask = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def strict_schema(ask: Ask, seeds: range = range(3)) -> str:
    """At temperature 1, so that nothing but the grammar holds the model to the schema."""
    for seed in seeds:
        status, reply = ask({
            "messages": [{"role": "user", "content": "Describe a French city in JSON."}], "temperature": 1.0, "seed": seed, "max_tokens": 256,
            "response_format": {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}},
        })  # fmt: skip
        if status != 200:
            return f"status {status}: {str(reply)[:300]}"
        if (reason := reply["choices"][0]["finish_reason"]) != "stop":
            return f"seed {seed}: it ended by {reason!r}"
        if problem := held(reply["choices"][0]["message"]["content"], SCHEMA):
            return f"seed {seed}: {problem}"
    return ""


def tool_call(ask: Ask, seeds: range = range(3)) -> str:
    """A call is required; its name and its arguments must be those that were declared."""
    tool = {"type": "function", "function": {"name": "get_forecast", "description": "The weather of a city", "parameters": FORECAST, "strict": True}}
    for seed in seeds:
        status, reply = ask({
            "messages": [{"role": "user", "content": "What will the weather be in Oslo on the next three days?"}], "temperature": 1.0, "seed": seed,
            "max_tokens": 256, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": False,
        })  # fmt: skip
        if status != 200:
            return f"status {status}: {str(reply)[:300]}"
        choice = reply["choices"][0]
        calls = choice["message"].get("tool_calls") or []
        if choice["finish_reason"] != "tool_calls" or len(calls) != 1 or calls[0]["function"]["name"] != "get_forecast":
            return f"seed {seed}: {len(calls)} calls, ended by {choice['finish_reason']!r}"
        if problem := held(calls[0]["function"]["arguments"], FORECAST):
            return f"seed {seed}: {problem}"
    return ""


def refusal(ask: Ask) -> str:
    """A schema that cannot be enforced exactly is refused by name."""
    status, reply = ask({
        "messages": [{"role": "user", "content": "Anything."}], "max_tokens": 8,
        "response_format": {"type": "json_schema", "json_schema": {"name": "closed", "strict": True, "schema": CLOSED}},
    })  # fmt: skip
    error = reply.get("error") or {}
    if status == 400 and error.get("code") == "unsupported_grammar" and str(error.get("param", "")).startswith("response_format"):
        return ""
    return f"status {status}: {str(reply)[:300]}"


def held(text: str, schema: dict[str, Any]) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return "it is no JSON"
    return violation(value, schema)
