"""The gRPC `Inference` service: the same path as HTTP, with protobuf on both sides."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import structlog

from plugmesh.errors import InternalError, InvalidRequest, PlugmeshError
from plugmesh.limits import check_counts, check_sampling, check_stop
from plugmesh.wire import finish_to_pb, sampling_from_pb, spec_from_pb
from plugmesh_proto.v1 import common_pb2, inference_pb2, inference_pb2_grpc

from .generation import Generation
from .handle import Gateway
from .keys import KeyRing
from .parse import check_priority, check_with_grammar, trace_of
from .request import ChatPrompt, Message, Prompt, TextPrompt, TokenPrompt, Wanted, check_request_id, new_request_id
from .score import ScoreWanted, score
from .strategies import choice_of_json
from .structured import of_grpc
from .tools import ToolsWanted, read_tools

log = structlog.get_logger()


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Raises PlugmeshErrors; the carrier turns them into statuses."""

    def __init__(self, gateway: Gateway, keys: KeyRing) -> None:
        self.gateway = gateway
        self.keys = keys

    async def Generate(self, request: inference_pb2.InferenceRequest, context: Any) -> AsyncIterator[inference_pb2.InferenceEvent]:
        generation: Generation | None = None
        try:
            generation = (await self.gateway.submit(self._wanted(request, context))).generation
            async for batch in generation.batches():
                for i, e in enumerate(batch):
                    event = inference_pb2.InferenceEvent(
                        request_id=generation.request_id, sequence=e.index, text=e.text, tokens=e.tokens, finish_reason=finish_to_pb(e.finish_reason))
                    if i == len(batch) - 1 and generation.is_ended and generation.error is None and not generation.num_buffered:
                        event.usage.CopyFrom(_usage(generation))
                        event.strategy_json = _detail(generation)
                    yield event
        except PlugmeshError as e:
            raise _public(e) from None
        finally:
            if generation is not None:
                generation.cancel()

    async def Complete(self, request: inference_pb2.InferenceRequest, context: Any) -> inference_pb2.InferenceResult:
        generation: Generation | None = None
        try:
            wanted = self._wanted(request, context)
            accepted = await self.gateway.submit(wanted)
            generation = accepted.generation
            choices = [inference_pb2.InferenceChoice(sequence=i) for i in range(wanted.sampling.num_sequences)]
            texts: list[list[str]] = [[] for _ in choices]
            async for batch in generation.batches():
                for e in batch:
                    texts[e.index].append(e.text)
                    choices[e.index].tokens.extend(e.tokens)
                    if e.finish_reason is not None:
                        choices[e.index].finish_reason = finish_to_pb(e.finish_reason)
            for choice, parts in zip(choices, texts, strict=True):
                choice.text = "".join(parts)
            return inference_pb2.InferenceResult(
                request_id=wanted.request_id, model=accepted.model.model, choices=choices, usage=_usage(generation),
                strategy_json=_detail(generation))
        except PlugmeshError as e:
            raise _public(e) from None
        finally:
            if generation is not None:
                generation.cancel()

    async def Score(self, request: inference_pb2.InferenceScoreRequest, context: Any) -> inference_pb2.InferenceScores:
        try:
            wanted = self._score_wanted(request, context)
            scored = await score(self.gateway, wanted)
        except PlugmeshError as e:
            raise _public(e) from None
        return inference_pb2.InferenceScores(
            request_id=wanted.request_id, model=scored.model, usage=scored.usage,
            scores=[inference_pb2.ContinuationScore(tokens=tokens, logprob=sum(t.logprob for t in tokens)) for tokens in scored.tokens])

    def _score_wanted(self, request: inference_pb2.InferenceScoreRequest, context: Any) -> ScoreWanted:
        """Raises Unauthenticated, PermissionDenied, InvalidRequest."""
        client = self.keys.check(_metadata(context, "authorization"), "inference")
        check_priority(request.priority)
        if not 0 <= request.top_logprobs <= 20:
            raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
        continuations: list[TextPrompt | TokenPrompt] = []
        for c in request.continuations:
            continuations.append(TextPrompt(c.text) if c.WhichOneof("what") == "text" else TokenPrompt(tuple(c.tokens.token_ids)))
        left = context.time_remaining() if hasattr(context, "time_remaining") else None
        return ScoreWanted(
            request_id=check_request_id(request.request_id) if request.request_id else new_request_id(), model=request.model,
            prompt=self._prompt(request), continuations=tuple(continuations), top_logprobs=request.top_logprobs, priority=request.priority,
            client=client, timeout_s=max(left, 0.001) if left is not None else 0.0)

    def _prompt(self, request: inference_pb2.InferenceRequest | inference_pb2.InferenceScoreRequest) -> Prompt:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return TextPrompt(request.text)
        if kind == "tokens":
            return TokenPrompt(tuple(request.tokens.token_ids))
        if kind != "chat":
            raise InvalidRequest("one of text, chat, tokens must be set", param="prompt")
        check_counts(num_messages=len(request.chat.messages), limits=self.gateway.limits)
        if not request.chat.messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        return ChatPrompt(tuple(Message(m.role, m.content, m.name, m.extra_json) for m in request.chat.messages), request.chat.template_kwargs_json)

    async def ListModels(self, request: inference_pb2.ListServedModelsRequest, context: Any) -> inference_pb2.ListServedModelsReply:
        self.keys.check(_metadata(context, "authorization"), "models")
        return inference_pb2.ListServedModelsReply(models=[
            inference_pb2.ServedModel(model=m.model, version=m.version, context_length=m.context_length, is_default=m.is_default)
            for m in await self.gateway.models.served()])

    def _wanted(self, request: inference_pb2.InferenceRequest, context: Any) -> Wanted:
        """Raises Unauthenticated, PermissionDenied, InvalidRequest, LimitExceeded."""
        client = self.keys.check(_metadata(context, "authorization"), "inference")
        limits = self.gateway.limits
        request_id = check_request_id(request.request_id) if request.request_id else new_request_id()
        sampling = sampling_from_pb(request.sampling)
        check_sampling(sampling, limits)
        check_stop(request.stop, limits)
        check_priority(request.priority)
        prompt = self._prompt(request)
        max_tokens: int | None = sampling.max_tokens
        if isinstance(prompt, ChatPrompt) and not request.sampling.max_tokens:
            max_tokens = None  # as over HTTP: what the context leaves
        left = context.time_remaining() if hasattr(context, "time_remaining") else None
        grammar = of_grpc(spec_from_pb(request.grammar)) if request.HasField("grammar") else None
        tools = _tools(request.chat.tools_json)
        if grammar is not None or tools is not None:
            check_with_grammar(sampling)
        return Wanted(
            request_id=request_id, route="grpc", model=request.model, prompts=(prompt,), sampling=sampling, max_tokens=max_tokens,
            stop=tuple(request.stop), priority=request.priority, timeout_s=max(left, 0.001) if left is not None else 0.0,
            trace=trace_of(_metadata(context, "traceparent")), client=client, strategy=choice_of_json(request.strategy_json),
            grammar=grammar, tools=tools)


def _tools(text: str) -> ToolsWanted | None:
    """Tools of a gRPC chat: shown to the model, and its calls obey them. They come as part of the text, as the model writes them."""
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("tools_json is not valid JSON", param="tools_json") from e
    if not isinstance(value, list):
        raise InvalidRequest("tools_json must be a JSON array", param="tools_json")
    return read_tools(value, None, None)


def _metadata(context: Any, name: str) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == name and isinstance(value, str):
            return value
    return ""


def _detail(generation: Generation) -> str:
    return json.dumps(generation.detail) if generation.detail else ""


def _usage(generation: Generation) -> Any:
    return common_pb2.Usage(
        prompt_tokens=generation.num_prompt_tokens, completion_tokens=generation.num_completion_tokens, cached_tokens=generation.num_cached_tokens)


def _public(error: PlugmeshError) -> PlugmeshError:
    return InternalError("the server failed on this request") if isinstance(error, InternalError) else error
