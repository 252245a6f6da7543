"""OpenAI bodies to `Wanted`: JSON, then names, then types, then ranges; every refusal names its parameter.

Three kinds of keys: those below, those of OpenAI that need something this gateway does not have (refused as unsupported,
unless they hold the value that asks for nothing), and unknown ones (refused). A few that change nothing are accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from plugmesh.errors import InvalidRequest, LimitExceeded
from plugmesh.limits import INT32_MAX, Limits, check_counts, check_sampling, check_stop
from plugmesh.types import SamplingParams

from .request import ChatPrompt, Message, Prompt, StrategyChoice, TextPrompt, TokenPrompt, Wanted
from .structured import read_grammar
from .tools import ToolsWanted, read_tools

MAX_JSON_DEPTH = 64
MAX_PRIORITY = 1_000_000
_MAX_USER_CHARS = 128
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

# Known, not served, and the values that ask for nothing.
_UNSUPPORTED_CHAT: dict[str, tuple[Any, ...]] = {
    "functions": (None, []), "function_call": (None, "none"), "audio": (None,), "modalities": (None, ["text"]),
    "prediction": (None,), "reasoning_effort": (None, "none"), "verbosity": (None,), "web_search_options": (None,),
    "moderation": (None,), "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True), "prompt_logprobs": (None, 0),
}
_UNSUPPORTED_COMPLETION: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""), "include_stop_str_in_output": (None, False), "skip_special_tokens": (None, True), "prompt_logprobs": (None, 0),
    "prompt_embeds": (None,), "use_beam_search": (None, False),
}
_INSTEAD = {"functions": "; send tools", "function_call": "; send tool_choice"}


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted: there is no padding to leave out


class _Common(_Body):
    """What both routes take. A null is the same as leaving the key out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    strategy: dict[str, Any] | None = None
    # At most one grammar.
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    structured_outputs: dict[str, Any] | None = None
    # They change nothing here.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class ChatMessage(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None


class ChatBody(_Common):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(_Common):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


B = TypeVar("B", bound=_Common)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object without NaN, lone surrogates or deep nesting. Raises InvalidRequest, never anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"the body is not UTF-8: byte {e.start}") from e
    except RecursionError as e:
        raise InvalidRequest(f"the body is nested more than {MAX_JSON_DEPTH} levels deep") from e
    except ValueError as e:
        where = f" at line {e.lineno}, column {e.colno}: {e.msg}" if isinstance(e, json.JSONDecodeError) else ""
        raise InvalidRequest(f"the body is not valid JSON{where}") from e
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    _check_tree(value)
    return value


def parse_chat(raw: bytes, *, request_id: str, limits: Limits, headers: Mapping[str, str], client: str = "") -> tuple[Wanted, bool, bool]:
    """The request, whether to stream, and whether to stream usage. Raises InvalidRequest, LimitExceeded.

    `client` is the name of the caller's API key; without one the body's `user` stands for it.
    """
    data = parse_json(raw)
    _check_names(data, ChatBody, _UNSUPPORTED_CHAT)
    body = _validate(ChatBody, data)
    check_counts(num_messages=len(body.messages), limits=limits)
    if not body.messages:
        raise InvalidRequest("messages must not be empty", param="messages")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send max_completion_tokens", param="max_tokens")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    prompt = ChatPrompt(
        messages=tuple(_message(m, i) for i, m in enumerate(body.messages)),
        template_kwargs_json=json.dumps(body.chat_template_kwargs) if body.chat_template_kwargs else "",
        add_generation_prompt=body.add_generation_prompt if body.add_generation_prompt is not None else not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
    )
    if prompt.add_generation_prompt and prompt.continue_final_message:
        raise InvalidRequest("add_generation_prompt and continue_final_message exclude each other", param="continue_final_message")
    sampling = _sampling(body, max_tokens=max_tokens, logprobs=bool(body.logprobs), top_logprobs=body.top_logprobs or 0, limits=limits)
    tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    if tools is not None and prompt.continue_final_message:
        raise InvalidRequest("continue_final_message together with tools is unsupported", param="continue_final_message")
    wanted = _wanted(body, "chat", request_id, (prompt,), sampling, max_tokens, limits, headers, client, tools=tools)
    return wanted, *_streaming(body)


def parse_completion(raw: bytes, *, request_id: str, limits: Limits, headers: Mapping[str, str], client: str = "") -> tuple[Wanted, bool, bool]:
    """As `parse_chat`, for /v1/completions."""
    data = parse_json(raw)
    _check_names(data, CompletionBody, _UNSUPPORTED_COMPLETION)
    body = _validate(CompletionBody, data)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of other than n is unsupported", param="best_of")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo together with logprobs is unsupported: prompts are not scored", param="echo")
    prompts = _prompts(body.prompt)
    check_counts(num_prompts=len(prompts), limits=limits)
    max_tokens = body.max_tokens if body.max_tokens is not None else SamplingParams().max_tokens
    sampling = _sampling(body, max_tokens=max_tokens, logprobs=body.logprobs is not None, top_logprobs=body.logprobs or 0, limits=limits)
    wanted = _wanted(body, "completions", request_id, prompts, sampling, max_tokens, limits, headers, client, echo=bool(body.echo))
    if len(prompts) * sampling.num_sequences > limits.max_prompts:
        raise LimitExceeded(f"n: {len(prompts)} prompts times n = {sampling.num_sequences} choices, at most {limits.max_prompts} are allowed", param="n")
    return wanted, *_streaming(body)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_tree(root: Any) -> None:
    stack: list[tuple[Any, int]] = [(root, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_JSON_DEPTH:
            raise InvalidRequest(f"the body is nested more than {MAX_JSON_DEPTH} levels deep")
        if isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as e:
                    raise InvalidRequest("the body holds a lone surrogate, which is not a character") from e
        elif isinstance(value, dict):
            for key, item in value.items():
                stack.append((key, depth))
                stack.append((item, depth + 1))
        elif isinstance(value, list):
            stack.extend((item, depth + 1) for item in value if not isinstance(item, (int, float)))


def _check_names(data: dict[str, Any], model: type[_Common], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
    for key in list(data):
        if key in model.model_fields:
            continue
        if key not in unsupported:
            raise InvalidRequest(f"unknown parameter: {_short(key)!r}", param=_short(key))
        # `type` too: False == 0 and 0 == 0.0 in Python.
        if not any(data[key] == v and type(data[key]) is type(v) for v in unsupported[key]):
            raise InvalidRequest(f"{key} is unsupported{_INSTEAD.get(key, '')}", param=key)
        del data[key]


def _validate(model: type[B], data: dict[str, Any]) -> B:
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as e:
        problem = e.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _path(problem["loc"])
        if problem["type"] == "missing":
            raise InvalidRequest(f"missing required parameter: {param!r}", param=param) from None
        if problem["type"] == "extra_forbidden":
            raise InvalidRequest(f"unknown parameter: {param!r}", param=param) from None
        raise InvalidRequest(f"{param}: {problem['msg'][:1].lower()}{problem['msg'][1:]}", param=param) from None


def _path(loc: tuple[int | str, ...]) -> str:
    # Union members show up as parts like "list[int]" or "str"; they are no keys of the client's.
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif part not in ("str", "list[str]", "list[int]", "list[list[int]]", "list[dict[str,any]]", "dict[str,any]", "bool", "[key]"):
            out += f".{_short(part)}" if out else _short(part)
    return out


def _short(key: str) -> str:
    return key if len(key) <= 64 else key[:61] + "..."


def _message(m: ChatMessage, index: int) -> Message:
    where = f"messages[{index}]"
    if m.role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(sorted(_ROLES))}", param=f"{where}.role")
    extra = m.model_extra or {}
    if m.content is None and not (m.role == "assistant" and (extra.get("tool_calls") or extra.get("function_call"))):
        raise InvalidRequest(f"{where}.content is missing", param=f"{where}.content")
    if isinstance(m.content, list):
        content = ""
        for j, part in enumerate(m.content):
            at = f"{where}.content[{j}]"
            if part.get("type") != "text":
                raise InvalidRequest(f"{at}: only parts of type 'text' are supported", param=at)
            if not isinstance(part.get("text"), str):
                raise InvalidRequest(f"{at}.text must be a string", param=f"{at}.text")
            content += part["text"]
    else:
        content = m.content or ""
    role = "system" if m.role == "developer" else m.role  # templates of open models know no "developer"
    return Message(role, content, m.name or "", json.dumps(extra) if extra else "")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (TextPrompt(prompt),)
    if not prompt:
        raise InvalidRequest("prompt must not be empty", param="prompt")
    if isinstance(prompt[0], int):
        return (_tokens(prompt),)
    return tuple(TextPrompt(p) if isinstance(p, str) else _tokens(p) for p in prompt)


def _tokens(ids: Any) -> TokenPrompt:
    if not ids:
        raise InvalidRequest("prompt: a list of token ids must not be empty", param="prompt")
    if min(ids) < 0 or max(ids) > INT32_MAX:
        raise InvalidRequest("prompt: token ids must be between 0 and 2147483647", param="prompt")
    return TokenPrompt(tuple(ids))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _sampling(body: _Common, *, max_tokens: int | None, logprobs: bool, top_logprobs: int, limits: Limits) -> SamplingParams:
    d = SamplingParams()
    params = SamplingParams(
        temperature=_or(body.temperature, d.temperature), top_k=max(_or(body.top_k, 0), 0) if body.top_k == -1 else _or(body.top_k, 0),
        top_p=_or(body.top_p, d.top_p), min_p=_or(body.min_p, d.min_p),
        repetition_penalty=_or(body.repetition_penalty, d.repetition_penalty),
        presence_penalty=_or(body.presence_penalty, d.presence_penalty),
        frequency_penalty=_or(body.frequency_penalty, d.frequency_penalty),
        logit_bias=_logit_bias(body.logit_bias or {}), seed=body.seed,
        max_tokens=_or(max_tokens, max(limits.max_tokens, 1)), min_tokens=_or(body.min_tokens, 0),
        stop_token_ids=tuple(body.stop_token_ids or ()), ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs, top_logprobs=top_logprobs, num_sequences=_or(body.n, 1),
    )
    check_sampling(params, limits)
    return params


def _logit_bias(raw: dict[str, float]) -> dict[int, float]:
    out: dict[int, float] = {}
    for key, bias in raw.items():
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise InvalidRequest(f"logit_bias: key {_short(key)!r} is not a token id", param="logit_bias")
        out[int(key)] = bias
    return out


def _wanted(
    body: _Common, route: str, request_id: str, prompts: tuple[Prompt, ...], sampling: SamplingParams, max_tokens: int | None,
    limits: Limits, headers: Mapping[str, str], client: str, *, echo: bool = False, tools: ToolsWanted | None = None,
) -> Wanted:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    check_stop(stop, limits)
    priority = body.priority or 0
    check_priority(priority)
    grammar = read_grammar(body)
    if grammar is not None or tools is not None:
        check_with_grammar(sampling)
    return Wanted(
        request_id=request_id, route=route, model=body.model or "", prompts=prompts, sampling=sampling, max_tokens=max_tokens,
        stop=stop, priority=priority, echo=echo, trace=trace_of(headers.get("traceparent", "")),
        client=client or (body.user or "")[:_MAX_USER_CHARS],
        strategy=StrategyChoice.read(body.strategy) if body.strategy is not None else None,
        grammar=grammar, tools=tools,
    )


def check_with_grammar(sampling: SamplingParams) -> None:
    """Refuses what a grammar cannot go with: it decides where the output ends. Raises InvalidRequest."""
    if sampling.ignore_eos:
        raise InvalidRequest("ignore_eos has no meaning with a grammar or tools, which decide where the output ends", param="ignore_eos")
    if sampling.min_tokens:
        raise InvalidRequest("min_tokens has no meaning with a grammar or tools, which decide where the output ends", param="min_tokens")


def check_priority(priority: int) -> None:
    """Refuses a priority out of range. Raises InvalidRequest."""
    if abs(priority) > MAX_PRIORITY:
        raise InvalidRequest(f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, not {priority}", param="priority")


def trace_of(traceparent: str) -> dict[str, str]:
    """The W3C context to pass on; a malformed one is left out, as the recommendation says."""
    return {"traceparent": traceparent} if _TRACEPARENT.fullmatch(traceparent) else {}


def _streaming(body: _Common) -> tuple[bool, bool]:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    return bool(body.stream), bool(body.stream_options and body.stream_options.include_usage)
