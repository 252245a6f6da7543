"""How model families write calls: the prompt that tells them of tools, the text of a call, and the grammar of both.

A record per family. A model whose chat template knows tools and writes calls as a record does gets them through its template; another one gets the
record's own instructions in front, with earlier calls and results written into the messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.grammar.spec import GrammarSpec

from .request import ChatPrompt, GrammarWanted, Message
from .tools import Tool, ToolsWanted


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family's way. A block of calls is `begin call separator call ... end`, a call is `head name middle arguments tail`.

    Attributes:
        marks: Texts that a chat template holds which writes calls this way.
        models: Names of models that were trained this way and whose template says nothing of it.
        instructions: The system prompt for the tools, each of which is `{"type": "function", "function": {...}}`.
        trigger: Where this shows up in free text, calls begin.
        is_first_only: ... and only at the very beginning of the output.
        separator: Between calls of one block; None where a block holds one call.
        between: Between blocks; None where there is one block at most.
        may_be_empty: A block without a call is the family's way to say that none is wanted.
    """

    name: str
    marks: tuple[str, ...]
    models: re.Pattern[str]
    instructions: Callable[[Sequence[Mapping[str, Any]]], str]
    trigger: str
    begin: str
    head: str
    middle: str
    tail: str
    end: str
    is_first_only: bool = False
    separator: str | None = None
    between: str | None = None
    may_be_empty: bool = False

    def call(self, name: str, arguments: Any) -> str:
        """A call as the family writes it, without its block."""
        return f"{self.head}{name}{self.middle}{json.dumps(arguments, ensure_ascii=False)}{self.tail}"

    def block(self, calls: Sequence[str]) -> str:
        """The text of calls."""
        if self.separator is not None:
            return self.begin + self.separator.join(calls) + self.end
        return (self.between or "\n").join(self.begin + call + self.end for call in calls)


def _hermes(tools: Sequence[Mapping[str, Any]]) -> str:
    # The words that Qwen 2.5's own template has for it, after the Hermes models': what models of this format were trained on.
    lines = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _smollm2(tools: Sequence[Mapping[str, Any]]) -> str:
    # SmolLM2's model card gives this prompt for function calling.
    return (
        "You are an expert in composing functions. You are given a question and a set of possible functions. \n"
        "Based on the question, you will need to make one or more function/tool calls to achieve the purpose. \n"
        "If none of the functions can be used, point it out and refuse to answer. \n"
        "If the given question lacks the parameters required by the function, also point it out.\n\n"
        f"You have access to the following tools:\n<tools>{json.dumps(list(tools), ensure_ascii=False)}</tools>\n\n"
        "The output MUST strictly adhere to the following format, and NO other text MUST be included.\n"
        "The example format is as follows. Please make sure the parameter type is correct. "
        "If no function call is needed, please make the tool calls an empty list '[]'.\n"
        '<tool_call>[\n{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},\n'
        "... (more tool calls as required)\n]</tool_call>"
    )


def _llama3(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n\n".join(json.dumps(t, ensure_ascii=False, indent=4) for t in tools)
    return (
        "You have access to the following functions. To call a function, please respond with JSON for a function call.\n"
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. Do not use variables.\n\n' + lines
    )


HERMES = ToolFormat(
    "hermes", ("<tool_call>", '"arguments": '), re.compile("qwen|hermes", re.IGNORECASE), _hermes, trigger="<tool_call>",
    begin="<tool_call>\n", head='{"name": "', middle='", "arguments": ', tail="}", end="\n</tool_call>", between="\n")
SMOLLM2 = ToolFormat(
    "smollm2", ("<tool_call>[",), re.compile("smollm-?2", re.IGNORECASE), _smollm2, trigger="<tool_call>",
    begin="<tool_call>[", head='{"name": "', middle='", "arguments": ', tail="}", end="]</tool_call>", separator=", ", may_be_empty=True)
LLAMA3 = ToolFormat(
    "llama3", ('"parameters": ', "ipython"), re.compile(r"llama-?3", re.IGNORECASE), _llama3, trigger="{", is_first_only=True,
    begin="", head='{"name": "', middle='", "parameters": ', tail="}", end="")
FORMATS = {f.name: f for f in (SMOLLM2, HERMES, LLAMA3)}
_MENTIONS_TOOLS = re.compile(r"\btools\b")


def choose_format(model: str, template: str, forced: str = "") -> tuple[ToolFormat, bool]:
    """The format of a model, and whether its chat template writes the prompt for it.

    Args:
        model: Any name of it.
        template: Source of the chat template; empty when unknown.
        forced: Name of a format that somebody configured; empty to find out.
    """
    by_template = None
    if _MENTIONS_TOOLS.search(template):
        by_template = next((f for f in FORMATS.values() if all(m in template for m in f.marks)), None)
    if forced:
        return FORMATS[forced], by_template is FORMATS[forced]
    if by_template is not None:
        return by_template, True
    return next((f for f in FORMATS.values() if f.models.search(model)), HERMES), False


# The prompt.


def with_tools(prompt: ChatPrompt, tools: Sequence[Tool], how: ToolFormat, *, template_knows: bool) -> ChatPrompt:
    """The chat as the model's template gets it. Unchanged where neither tools nor calls are in it.

    Raises:
        InvalidRequest: A malformed tool call among the messages.
    """
    has_history = any(m.role in ("tool", "function") or '"tool_calls"' in m.extra_json for m in prompt.messages)
    if not tools and not has_history:
        return prompt
    shown = [{"type": "function", "function": dict(t.function)} for t in tools]
    if template_knows:
        messages = tuple(_for_template(m, i) for i, m in enumerate(prompt.messages))
        return replace(prompt, messages=messages, tools_json=json.dumps(shown, ensure_ascii=False) if shown else "")
    messages = _written_out(prompt.messages, how)
    if shown:
        rest = messages[1:] if messages[0].role == "system" else messages
        system = how.instructions(shown) + (f"\n\n{messages[0].content}" if messages[0].role == "system" and messages[0].content else "")
        messages = (Message("system", system), *rest)
    return replace(prompt, messages=messages)


def _for_template(message: Message, index: int) -> Message:
    """Templates take the arguments of earlier calls as objects, OpenAI has them as text; keys without a value they may take for one."""
    if not message.extra_json:
        return message
    extra = {key: value for key, value in json.loads(message.extra_json).items() if value is not None}
    if "tool_calls" in extra:
        calls = []
        for name, arguments, call in _calls(extra["tool_calls"], index):
            calls.append({**call, "type": "function", "function": {"name": name, "arguments": arguments}})
        extra["tool_calls"] = calls
    return replace(message, extra_json=json.dumps(extra, ensure_ascii=False) if extra else "")


def _written_out(messages: Sequence[Message], how: ToolFormat) -> tuple[Message, ...]:
    out: list[Message] = []
    is_answers = False
    for i, message in enumerate(messages):
        extra = json.loads(message.extra_json) if message.extra_json else {}
        if message.role in ("tool", "function"):
            # Of the user, like Qwen's template does it: the role every template knows. Several in a row make one message.
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            if is_answers:
                out[-1] = replace(out[-1], content=f"{out[-1].content}\n{text}")
            else:
                out.append(Message("user", text))
            is_answers = True
            continue
        is_answers = False
        if extra.get("tool_calls"):
            text = how.block([how.call(name, arguments) for name, arguments, _ in _calls(extra.pop("tool_calls"), i)])
            message = replace(message, content=f"{message.content}\n{text}" if message.content else text)
        extra = {key: value for key, value in extra.items() if value is not None}
        out.append(replace(message, extra_json=json.dumps(extra, ensure_ascii=False) if extra else ""))
    return tuple(out)


def _calls(raw: Any, index: int) -> list[tuple[str, Any, Mapping[str, Any]]]:
    """Name, arguments and the rest of each call of a message."""
    out = []
    if not isinstance(raw, list):
        raise InvalidRequest(f"messages[{index}].tool_calls must be a list", param=f"messages[{index}].tool_calls")
    for j, call in enumerate(raw):
        at = f"messages[{index}].tool_calls[{j}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{at}.name must be a string", param=f"{at}.name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                pass  # what a model wrote and the client sends back as it is
        out.append((function["name"], arguments, call))
    return out


# The grammar.


def tools_grammar(tools: ToolsWanted, how: ToolFormat, free: GrammarWanted | None) -> GrammarWanted:
    """The structural tag of what a chat with tools may say.

    Args:
        free: What text beside calls must be; None for any text.

    Raises:
        InvalidRequest: `free` cannot be told from calls, or is no JSON.
    """
    calls = _Calls(tools, how)
    if tools.choice != "auto":
        if free is not None:
            raise InvalidRequest(f"{_key(free)} has no meaning where tool_choice allows calls only", param=_key(free))
        return calls.wanted(calls.only())
    if free is not None:
        return calls.beside(free)
    return calls.wanted(calls.anywhere())


class _Calls:
    def __init__(self, tools: ToolsWanted, how: ToolFormat) -> None:
        self.how = how
        self.tools = tools
        self.is_one = not tools.is_parallel

    def wanted(self, node: Mapping[str, Any], free: GrammarWanted | None = None) -> GrammarWanted:
        """The grammar, with the places of all schemas in it."""
        params = {id(t.schema): t.param for t in self.tools.allowed}
        where: list[tuple[str, str]] = []
        stack: list[tuple[str, Any]] = [("/format", node)]
        while stack:
            path, value = stack.pop()
            if isinstance(value, dict) and value.get("type") == "json_schema":
                where.append((f"{path}/json_schema", params.get(id(value["json_schema"]), free.param if free is not None else "")))
            elif isinstance(value, dict):
                stack += [(f"{path}/{key}", item) for key, item in value.items()]
            elif isinstance(value, list):
                stack += [(f"{path}/{i}", item) for i, item in enumerate(value)]
        spec = GrammarSpec("structural_tag", json.dumps({"type": "structural_tag", "format": node}, ensure_ascii=False))
        out = GrammarWanted(spec, "tools", tuple(where))
        return out if free is None else out.changed(whitespace=free.spec.whitespace, engine=free.spec.engine)

    def only(self) -> dict[str, Any]:
        """Calls and nothing else."""
        how = self.how
        if how.separator is not None:
            return _sequence(_const(how.begin), self._separated(self._tags("", ""), how.separator, at_least_one=True), _const(how.end))
        tags = self._tags(how.begin, how.end)
        if how.between is not None:
            return self._separated(tags, how.between, at_least_one=True)
        return tags[0] if len(tags) == 1 else {"type": "or", "elements": tags}

    def anywhere(self) -> dict[str, Any]:
        """Text, and calls where it comes to them."""
        how = self.how
        if how.is_first_only:
            return {"type": "or", "elements": [self.only(), {"type": "regex", "pattern": r"([^{\s](.|\n)*)?"}]}
        if how.separator is not None:
            content = self._separated(self._tags("", ""), how.separator, at_least_one=not how.may_be_empty)
            return _triggered(how.trigger, [{"type": "tag", "begin": how.begin, "content": content, "end": how.end}], stop_after_first=True)
        return _triggered(how.trigger, self._tags(how.begin, how.end), stop_after_first=self.is_one)

    def beside(self, free: GrammarWanted) -> GrammarWanted:
        """Calls, or a text that obeys `free`."""
        if self.how.is_first_only:
            raise InvalidRequest(f"{_key(free)} beside tools is unsupported for this model, whose calls are plain JSON", param=_key(free))
        if free.spec.kind not in ("json_object", "json_schema"):
            raise InvalidRequest(f"{_key(free)} beside tools must be JSON", param=_key(free))
        schema = {"type": "object"} if free.spec.kind == "json_object" else json.loads(free.spec.source)
        return self.wanted({"type": "or", "elements": [{"type": "json_schema", "json_schema": schema}, self.only()]}, free)

    def _tags(self, before: str, after: str) -> list[dict[str, Any]]:
        how = self.how
        return [{
            "type": "tag", "begin": f"{before}{how.head}{tool.name}{how.middle}", "content": {"type": "json_schema", "json_schema": tool.schema},
            "end": how.tail + after,
        } for tool in self.tools.allowed]

    def _separated(self, tags: list[dict[str, Any]], separator: str, *, at_least_one: bool) -> dict[str, Any]:
        return {"type": "tags_with_separator", "tags": tags, "separator": separator, "at_least_one": at_least_one, "stop_after_first": self.is_one}


def _triggered(trigger: str, tags: list[dict[str, Any]], *, stop_after_first: bool) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "at_least_one": False, "stop_after_first": stop_after_first}


def _sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def _const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _key(wanted: GrammarWanted) -> str:
    return wanted.param.partition(".")[0]
