"""What the client takes and gives, and its translation to and from protobuf."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.types import FinishReason, TokenInfo, Usage
from plugmesh.wire import finish_from_pb, spec_to_pb, token_from_pb, usage_from_pb
from plugmesh_proto.v1 import inference_pb2

_SAMPLING = frozenset({
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed",
    "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "n",
    "confidence_top_k",
})

Prompt = str | Sequence[int]
Grammar = GrammarSpec | Mapping[str, Any] | Sequence[str]  # a mapping is a JSON schema, a list of strings the texts to choose from


@dataclass(frozen=True, slots=True)
class Event:
    """New text of one sequence; `usage` is on the last event of the request."""

    request_id: str
    sequence: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole sequence."""

    text: str
    tokens: tuple[TokenInfo, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `text` is that of the first choice."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the mesh answers with."""

    model: str
    version: str
    context_length: int
    is_default: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One continuation: its tokens with the log-probability that the model gives each of them after what is before it."""

    tokens: tuple[TokenInfo, ...]

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return sum(t.logprob for t in self.tokens)

    @property
    def is_greedy(self) -> bool:
        """Whether every token was the most likely one; needs `top_logprobs` of 1 or more."""
        return all(t.top and t.top[0][0] == t.token_id for t in self.tokens)


def request_to_pb(
    prompt: Prompt | None, messages: Sequence[Mapping[str, Any]] | None, *, model: str, stop: str | Sequence[str], priority: int,
    request_id: str, sampling: Mapping[str, Any], grammar: Grammar | None = None, tools: Sequence[Mapping[str, Any]] = (),
) -> inference_pb2.InferenceRequest:
    """Raises InvalidRequest on an unknown sampling parameter, a value of the wrong type, or not exactly one of prompt and messages."""
    if (prompt is None) == (messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    for name in sampling:
        if name not in _SAMPLING:
            raise InvalidRequest(f"unknown sampling parameter {name!r}; known are {', '.join(sorted(_SAMPLING))}", param=name)
    try:
        out = inference_pb2.InferenceRequest(
            request_id=request_id, model=model, stop=[stop] if isinstance(stop, str) and stop else list(stop), priority=priority)
        for name, value in sampling.items():
            if name == "logit_bias":
                out.sampling.logit_bias.update({int(k): v for k, v in value.items()})
            elif name == "stop_token_ids":
                out.sampling.stop_token_ids.extend(value)
            elif value is not None:
                setattr(out.sampling, "num_sequences" if name == "n" else name, value)
        if isinstance(prompt, str):
            out.text = prompt
        elif prompt is not None:
            out.tokens.token_ids.extend(prompt)
        for m in messages or ():
            extra = {k: v for k, v in m.items() if k not in ("role", "content", "name")}
            out.chat.messages.add(
                role=m["role"], content=m.get("content") or "", name=m.get("name", ""), extra_json=json.dumps(extra) if extra else "")
        if messages is not None:
            out.chat.SetInParent()
        if tools and messages is None:
            raise InvalidRequest("tools need messages", param="tools")
        if tools:
            out.chat.tools_json = json.dumps(list(tools))
        if grammar is not None:
            out.grammar.CopyFrom(spec_to_pb(grammar_of(grammar)))
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise InvalidRequest(f"the request is malformed: {type(e).__name__}: {e}") from e
    return out


def grammar_of(grammar: Grammar) -> GrammarSpec:
    """What a short form of a grammar stands for. Raises TypeError."""
    if isinstance(grammar, GrammarSpec):
        return grammar
    if isinstance(grammar, Mapping):
        return GrammarSpec("json_schema", json.dumps(grammar))
    if isinstance(grammar, str) or not all(isinstance(choice, str) for choice in grammar):
        raise TypeError("a grammar is a GrammarSpec, a JSON schema or a list of strings")
    return GrammarSpec("choice", json.dumps(list(grammar)))


def score_to_pb(
    prompt: Prompt | None, messages: Sequence[Mapping[str, Any]] | None, continuations: Sequence[Prompt], *, model: str, top_logprobs: int, priority: int,
    request_id: str,
) -> inference_pb2.InferenceScoreRequest:
    """Raises InvalidRequest as `request_to_pb` does."""
    base = request_to_pb(prompt, messages, model=model, stop=(), priority=priority, request_id=request_id, sampling={})
    out = inference_pb2.InferenceScoreRequest(request_id=request_id, model=model, priority=priority, top_logprobs=top_logprobs)
    kind = base.WhichOneof("prompt")
    if kind == "text":
        out.text = base.text
    elif kind == "chat":
        out.chat.CopyFrom(base.chat)
    else:
        out.tokens.CopyFrom(base.tokens)
    for c in continuations:
        if isinstance(c, str):
            out.continuations.add(text=c)
        else:
            out.continuations.add().tokens.token_ids.extend(c)
    return out


def scores_from_pb(m: inference_pb2.InferenceScores) -> list[Score]:
    return [Score(tuple(map(token_from_pb, s.tokens))) for s in m.scores]


def event_from_pb(m: inference_pb2.InferenceEvent) -> Event:
    return Event(
        m.request_id, m.sequence, m.text, tuple(map(token_from_pb, m.tokens)), finish_from_pb(m.finish_reason),
        usage_from_pb(m.usage) if m.HasField("usage") else None)


def completion_from_pb(m: inference_pb2.InferenceResult) -> Completion:
    choices = tuple(Choice(c.text, tuple(map(token_from_pb, c.tokens)), finish_from_pb(c.finish_reason)) for c in m.choices)
    return Completion(m.request_id, m.model, choices, usage_from_pb(m.usage))


def models_from_pb(m: inference_pb2.ListServedModelsReply) -> list[ServedModel]:
    return [ServedModel(x.model, x.version, x.context_length, x.is_default) for x in m.models]


def metadata_of(api_key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()
