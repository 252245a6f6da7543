"""`tools`, `tool_choice` and `parallel_tool_calls` of a chat, as OpenAI names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plugmesh.errors import InvalidRequest, LimitExceeded

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY_OBJECT: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        function: Name, description and parameters, as the model is shown them.
        schema: JSON schema of the arguments, always of an object.
        param: Where the body has the schema.
    """

    name: str
    function: Mapping[str, Any]
    schema: Mapping[str, Any]
    param: str


@dataclass(frozen=True, slots=True)
class ToolsWanted:
    """What a chat says about tools.

    Attributes:
        shown: All tools, for the prompt.
        allowed: Those that may be called.
        choice: auto: text, calls, or both. required: calls only, at least one. named: exactly one call of the one allowed tool.
        is_parallel: More than one call may be made.
    """

    shown: tuple[Tool, ...]
    allowed: tuple[Tool, ...]
    choice: Literal["auto", "required", "named"]
    is_parallel: bool


def read_tools(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> ToolsWanted | None:
    """None where nothing may be called: no tools, or `tool_choice` "none".

    Raises:
        InvalidRequest: Malformed; `param` is the place in the body.
        LimitExceeded: More than `MAX_TOOLS`.
    """
    read = _tools(tools or [])
    if not read:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice needs tools", param="tool_choice")
        return None
    is_parallel = parallel is not False
    if choice is None or choice == "auto":
        return ToolsWanted(read, read, "auto", is_parallel)
    if choice == "none":
        return None
    if choice == "required":
        return ToolsWanted(read, read, "required", is_parallel)
    if not isinstance(choice, dict):
        raise InvalidRequest("tool_choice must be none, auto, required or an object that names a function", param="tool_choice")
    kind = choice.get("type")
    if kind == "function":
        return ToolsWanted(read, (_named(read, choice, "tool_choice"),), "named", False)
    if kind == "allowed_tools":
        return _allowed(read, choice.get("allowed_tools"), is_parallel)
    raise InvalidRequest("tool_choice.type must be function or allowed_tools", param="tool_choice.type")


def _tools(raw: Sequence[Any]) -> tuple[Tool, ...]:
    if len(raw) > MAX_TOOLS:
        raise LimitExceeded(f"there are {len(raw)} tools, at most {MAX_TOOLS} are allowed", param="tools")
    out: list[Tool] = []
    for i, item in enumerate(raw):
        at = f"tools[{i}]"
        if not isinstance(item, dict) or item.get("type") != "function":
            raise InvalidRequest(f"{at}.type must be function; other tools are unsupported", param=f"{at}.type")
        function = item.get("function")
        if not isinstance(function, dict):
            raise InvalidRequest(f"{at}.function must be an object", param=f"{at}.function")
        for key in item.keys() - {"type", "function"}:
            raise InvalidRequest(f"unknown parameter: {at}.{key[:64]}", param=f"{at}.{key[:64]}")
        out.append(_tool(function, f"{at}.function"))
        if any(t.name == out[-1].name for t in out[:-1]):
            raise InvalidRequest(f"{at}.function.name: {out[-1].name!r} is there twice", param=f"{at}.function.name")
    return tuple(out)


def _tool(function: dict[str, Any], at: str) -> Tool:
    for key in function.keys() - {"name", "description", "parameters", "strict"}:
        raise InvalidRequest(f"unknown parameter: {at}.{key[:64]}", param=f"{at}.{key[:64]}")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{at}.name must be 1 to 64 letters, digits, '_' or '-'", param=f"{at}.name")
    if not isinstance(function.get("description"), str | None):
        raise InvalidRequest(f"{at}.description must be a string", param=f"{at}.description")
    if not isinstance(function.get("strict"), bool | None):  # either way the schema is enforced exactly
        raise InvalidRequest(f"{at}.strict must be true or false", param=f"{at}.strict")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise InvalidRequest(f"{at}.parameters must be a JSON schema", param=f"{at}.parameters")
    if parameters is not None and parameters.get("type", "object") != "object":
        raise InvalidRequest(f"{at}.parameters must be of type object", param=f"{at}.parameters/type")
    shown = {"name": name, **({"description": function["description"]} if function.get("description") else {}), "parameters": parameters or _ANY_OBJECT}
    return Tool(name, shown, _ANY_OBJECT if parameters is None else {**parameters, "type": "object"}, f"{at}.parameters")


def _named(tools: tuple[Tool, ...], value: Any, at: str) -> Tool:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(f"{at}.function.name must be a string", param=f"{at}.function.name")
    for tool in tools:
        if tool.name == name:
            return tool
    raise InvalidRequest(f"{at}: no tool is called {name[:64]!r}", param=f"{at}.function.name")


def _allowed(tools: tuple[Tool, ...], value: Any, is_parallel: bool) -> ToolsWanted:
    at = "tool_choice.allowed_tools"
    if not isinstance(value, dict) or value.get("mode") not in ("auto", "required") or not isinstance(value.get("tools"), list) or not value["tools"]:
        raise InvalidRequest(f"{at} must hold a mode (auto or required) and a list of tools", param=at)
    allowed = tuple(dict.fromkeys(_named(tools, item, f"{at}.tools[{i}]").name for i, item in enumerate(value["tools"])))
    return ToolsWanted(tools, tuple(t for t in tools if t.name in allowed), value["mode"], is_parallel)
