"""Events to OpenAI's JSON, streamed or whole, and errors to OpenAI's error object.

The fixed parts of a chunk are rendered once per request; per event only the text is encoded.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from json.encoder import (
    encode_basestring_ascii as _quoted,  # what json.dumps does with a str, without asking what it is
)
from typing import Any

from plugmesh.errors import InternalError, PlugmeshError
from plugmesh.types import FinishReason

from .generation import Event, Generation
from .tool_formats import ToolFormat
from .tool_stream import ArgumentsDelta, CallBegin, CallParser, Delta, TextDelta

DONE = b"data: [DONE]\n\n"
_LOWEST = -9999.0  # JSON has no -Infinity; OpenAI writes this

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "invalid_request_error",
    405: "invalid_request_error", 408: "invalid_request_error", 409: "invalid_request_error", 413: "invalid_request_error",
    415: "invalid_request_error", 429: "rate_limit_error",
}


def error_object(error: PlugmeshError, status: int | None = None) -> dict[str, Any]:
    """OpenAI's error object. An error that is ours loses its text: it may name what is nobody's business."""
    status = status or error.http_status
    message = error.message
    if status == 500 and isinstance(error, InternalError):
        message = "the server failed on this request"
    return {"error": {
        "message": message, "type": _TYPES.get(status, "server_error"), "param": error.param or None,
        "code": error.fields.get("openai_code", error.code),
    }}


def error_headers(error: PlugmeshError) -> dict[str, str]:
    """Retry-After, WWW-Authenticate and Connection where they belong."""
    headers = {}
    if error.http_status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.http_status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def error_event(error: PlugmeshError) -> bytes:
    """An error after the status line has gone out."""
    return b"data: " + json.dumps(error_object(error)).encode() + b"\n\n"


def usage_object(generation: Generation) -> dict[str, Any]:
    num_prompt, num_out = generation.num_prompt_tokens, generation.num_completion_tokens
    return {
        "prompt_tokens": num_prompt, "completion_tokens": num_out, "total_tokens": num_prompt + num_out,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def _reason(reason: FinishReason) -> str:
    return reason.value


class Shape:
    """What chat and completions share: one instance per answer.

    `pieces` holds the bytes of every token in the events when log-probabilities are wanted, else it is empty.
    """

    kind = ""
    id_prefix = ""

    def __init__(self, *, request_id: str, model: str, num_choices: int, include_usage: bool = False, logprobs: bool = False,
                 top_logprobs: int = 0, echoes: Sequence[str] = (), num_sequences: int = 1, tool_format: ToolFormat | None = None,
                 is_named_call: bool = False) -> None:
        self.id = f"{self.id_prefix}-{request_id}"
        self.created = int(time.time())
        self.model = model
        self.num_choices = num_choices
        self.include_usage = include_usage
        self.logprobs = logprobs
        self.top_logprobs = top_logprobs
        self._echo = [echoes[i // num_sequences] if echoes else "" for i in range(num_choices)]
        self._calls = [CallParser(tool_format) for _ in range(num_choices)] if tool_format is not None else []
        self._is_named_call = is_named_call
        self._started = [False] * num_choices
        self._offset = [0] * num_choices
        head = json.dumps({"id": self.id, "object": self._chunk_object(), "created": self.created, "model": model})
        self._head = f'data: {head[:-1]}, "choices": [{{"index": '
        self._tail = '}], "usage": null}\n\n' if include_usage else "}]}\n\n"

    def chunks(self, events: Sequence[Event], pieces: Mapping[int, bytes]) -> bytes:
        """The SSE bytes of these events; may be empty."""
        out: list[str] = []
        for e in events:
            self._chunk(e, pieces, out)
        return "".join(out).encode()

    def usage_chunk(self, generation: Generation) -> bytes:
        body = {"id": self.id, "object": self._chunk_object(), "created": self.created, "model": self.model, "choices": [], "usage": usage_object(generation)}
        if generation.detail:
            body["strategy"] = generation.detail
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def whole(self, events: Sequence[Event], pieces: Mapping[int, bytes], generation: Generation) -> bytes:
        """The body of an answer that is not streamed."""
        texts: list[list[str]] = [[echo] for echo in self._echo]
        tokens: list[list[Any]] = [[] for _ in texts]
        reasons: list[str | None] = [None for _ in texts]
        for e in events:
            texts[e.index].append(e.text)
            tokens[e.index].extend(e.tokens)
            if e.finish_reason is not None:
                reasons[e.index] = _reason(e.finish_reason)
        choices = [self._choice(i, "".join(t), tokens[i], reasons[i], pieces) for i, t in enumerate(texts)]
        body = {
            "id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices, "usage": usage_object(generation),
        }
        if generation.detail:
            body["strategy"] = generation.detail
        return json.dumps(body).encode()

    def _chunk_object(self) -> str:
        raise NotImplementedError

    def _chunk(self, event: Event, pieces: Mapping[int, bytes], out: list[str]) -> None:
        raise NotImplementedError

    def _choice(self, index: int, text: str, tokens: Sequence[Any], reason: str | None, pieces: Mapping[int, bytes]) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    """/v1/chat/completions."""

    kind = "chat.completion"
    id_prefix = "chatcmpl"

    def _chunk_object(self) -> str:
        return "chat.completion.chunk"

    def _chunk(self, event: Event, pieces: Mapping[int, bytes], out: list[str]) -> None:
        index = event.index
        if not self._started[index]:
            self._started[index] = True
            content = "null" if self._calls else '""'
            out.append(f'{self._head}{index}, "delta": {{"role": "assistant", "content": {content}}}, "logprobs": null, "finish_reason": null{self._tail}')
        logprobs = "null"
        if self.logprobs and event.tokens:
            logprobs = json.dumps(self._logprobs(event.tokens, pieces))
        if self._calls:
            self._chunk_of_calls(event, logprobs, out)
            return
        if event.text or logprobs != "null":
            out.append(f'{self._head}{index}, "delta": {{"content": {_quoted(event.text)}}}, "logprobs": {logprobs}, "finish_reason": null{self._tail}')
        if event.finish_reason is not None:
            out.append(f'{self._head}{index}, "delta": {{}}, "logprobs": null, "finish_reason": "{_reason(event.finish_reason)}"{self._tail}')

    def _chunk_of_calls(self, event: Event, logprobs: str, out: list[str]) -> None:
        """As `_chunk`, where calls may be in the text. Log-probabilities of all of an event's tokens go with its first chunk."""
        parser = self._calls[event.index]
        deltas = parser.feed(event.text)
        if event.finish_reason is not None:
            deltas += parser.finish()
        bodies = [_delta(d) for d in deltas] or (["{}"] if logprobs != "null" else [])
        for body in bodies:
            out.append(f'{self._head}{event.index}, "delta": {body}, "logprobs": {logprobs}, "finish_reason": null{self._tail}')
            logprobs = "null"
        if event.finish_reason is not None:
            reason = self._reason_of_calls(parser, _reason(event.finish_reason))
            out.append(f'{self._head}{event.index}, "delta": {{}}, "logprobs": null, "finish_reason": "{reason}"{self._tail}')

    def _reason_of_calls(self, parser: CallParser, reason: str) -> str:
        # Of a function that the client named, OpenAI says "stop".
        is_calls = reason == FinishReason.STOP.value and parser.num_calls and not parser.is_inside and not self._is_named_call
        return "tool_calls" if is_calls else reason

    def _choice(self, index: int, text: str, tokens: Sequence[Any], reason: str | None, pieces: Mapping[int, bytes]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            parser = self._calls[index]
            message |= _message_of(parser.feed(text) + parser.finish())
            reason = None if reason is None else self._reason_of_calls(parser, reason)
        return {
            "index": index, "message": message,
            "logprobs": self._logprobs(tokens, pieces) if self.logprobs else None, "finish_reason": reason,
        }

    def _logprobs(self, tokens: Sequence[Any], pieces: Mapping[int, bytes]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            raw = pieces[token_id]
            return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, _LOWEST), "bytes": list(raw)}

        return {"content": [
            {**entry(t.token_id, t.logprob), "top_logprobs": [entry(a.token_id, a.logprob) for a in t.top[: self.top_logprobs]]} for t in tokens
        ], "refusal": None}


def _delta(delta: Delta) -> str:
    """A chunk's delta. A call's id and name come once; OpenAI's clients put the arguments together by `index`."""
    if isinstance(delta, TextDelta):
        return f'{{"content": {_quoted(delta.text)}}}'
    if isinstance(delta, CallBegin):
        return (f'{{"tool_calls": [{{"index": {delta.index}, "id": "{delta.id}", "type": "function", '
                f'"function": {{"name": {_quoted(delta.name)}, "arguments": ""}}}}]}}')
    return f'{{"tool_calls": [{{"index": {delta.index}, "function": {{"arguments": {_quoted(delta.text)}}}}}]}}'


def _message_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """What all deltas of an output make: content, null where there are calls only, and the calls."""
    text = "".join(d.text for d in deltas if isinstance(d, TextDelta))
    begins = [d for d in deltas if isinstance(d, CallBegin)]
    arguments = ["" for _ in begins]
    for d in deltas:
        if isinstance(d, ArgumentsDelta):
            arguments[d.index] += d.text
    if not begins:
        return {"content": text}
    return {"content": text or None, "tool_calls": [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": a}} for b, a in zip(begins, arguments, strict=True)]}


class CompletionShape(Shape):
    """/v1/completions."""

    kind = "text_completion"
    id_prefix = "cmpl"

    def _chunk_object(self) -> str:
        return "text_completion"

    def _chunk(self, event: Event, pieces: Mapping[int, bytes], out: list[str]) -> None:
        index, text = event.index, event.text
        if not self._started[index]:
            self._started[index] = True
            text = self._echo[index] + text
        logprobs = "null"
        if self.logprobs and event.tokens:
            logprobs = json.dumps(self._logprobs(index, event.tokens, pieces))
        if not text and logprobs == "null" and event.finish_reason is None:
            return
        reason = "null" if event.finish_reason is None else f'"{_reason(event.finish_reason)}"'
        out.append(f'{self._head}{index}, "text": {_quoted(text)}, "logprobs": {logprobs}, "finish_reason": {reason}{self._tail}')

    def _choice(self, index: int, text: str, tokens: Sequence[Any], reason: str | None, pieces: Mapping[int, bytes]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens, pieces) if self.logprobs else None, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[Any], pieces: Mapping[int, bytes]) -> dict[str, Any]:
        names, values, tops, offsets = [], [], [], []
        for t in tokens:
            name = _name(pieces[t.token_id])
            names.append(name)
            values.append(max(t.logprob, _LOWEST))
            offsets.append(self._offset[index])
            self._offset[index] += len(pieces[t.token_id].decode("utf-8", "ignore"))
            # The chosen token is among them even when it is not one of the best.
            tops.append({_name(pieces[a.token_id]): max(a.logprob, _LOWEST) for a in t.top[: self.top_logprobs]} | {name: max(t.logprob, _LOWEST)})
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops if self.top_logprobs else None, "text_offset": offsets}


def _name(raw: bytes) -> str:
    """A token as text; where it is no whole characters, OpenAI's "bytes:\\x.." notation."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


def token_ids_of(events: Sequence[Event]) -> set[int]:
    """All ids whose bytes the log-probabilities of these events need."""
    ids: set[int] = set()
    for e in events:
        for t in e.tokens:
            ids.add(t.token_id)
            ids.update(a.token_id for a in t.top)
    return ids
