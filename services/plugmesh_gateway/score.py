"""Scores of given continuations, for clients: admitted, routed and counted like a request, answered in one piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import structlog

from plugmesh.errors import (
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    PayloadTooLarge,
    PlugmeshError,
    Unavailable,
)
from plugmesh.limits import check_token_ids, fit_context
from plugmesh.records import AdmissionRequest, RouteRequest
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import common_pb2, decode_pb2, decode_pb2_grpc

from .handle import Gateway
from .prepare import ServedModel
from .request import Prompt, TextPrompt, TokenPrompt

log = structlog.get_logger()

MAX_CONTINUATIONS = 1024
_MAX_REQUEST_BYTES = 240 * 1024  # a message of the bus holds 256 KiB
_MAX_TRIES = 3                   # at different instances, when one is lost


@dataclass(frozen=True, slots=True)
class ScoreWanted:
    """What a client asked for. A continuation of a text prompt may be text; else it is ids."""

    request_id: str
    model: str
    prompt: Prompt
    continuations: tuple[TextPrompt | TokenPrompt, ...]
    top_logprobs: int
    priority: int
    client: str
    timeout_s: float


@dataclass(slots=True)
class Scored:
    """`tokens` are protobuf TokenInfos, by continuation."""

    model: str
    tokens: list[list[common_pb2.TokenInfo]]
    usage: common_pb2.Usage


async def score(gateway: Gateway, wanted: ScoreWanted) -> Scored:
    """Raises PlugmeshError: refused, or failed at every instance that was tried."""
    if not 1 <= len(wanted.continuations) <= MAX_CONTINUATIONS:
        raise LimitExceeded(f"between 1 and {MAX_CONTINUATIONS} continuations can be scored at once", param="continuations")
    began = time.monotonic()
    deadline = began + min(wanted.timeout_s or gateway.settings.request_timeout_s, gateway.settings.request_timeout_s)
    missing = gateway.missing_roles()
    if missing:
        raise Unavailable(f"no {' and no '.join(missing)} instance is ready", retry_after_s=2)
    ticket = None
    try:
        async with asyncio.timeout(deadline - began):
            model, instances = await gateway.models.choose(wanted.model)
            ticket = await gateway.admissions.admit(AdmissionRequest(wanted.request_id, wanted.client, wanted.priority, 1, deadline))
            facts = await gateway.tokenizers.facts(model, deadline)
            prompt = await gateway.tokenizers.encode(model, wanted.prompt, deadline)
            check_token_ids("prompt", prompt, facts.vocab_size)
            if not prompt:
                raise InvalidRequest("the prompt is empty", param="prompt")
            rest = await asyncio.gather(*(_encode(gateway, model, wanted.prompt, prompt, c, deadline) for c in wanted.continuations))
            for ids in rest:
                check_token_ids("continuations", ids, facts.vocab_size)
                if not ids:
                    raise InvalidRequest("a continuation is empty", param="continuations")
                fit_context(len(prompt), len(ids), model.context_length, param="continuations")
            await ticket.take_tokens(len(prompt) + sum(map(len, rest)), 0)
            scored = await _ask(gateway, wanted, model, instances, prompt, rest, deadline)
    except TimeoutError:
        raise DeadlineExceeded(f"the scores did not come within {deadline - began:.0f} s") from None
    finally:
        if ticket is not None:
            ticket.release(0)
    log.info(
        "score.finished", request_id=wanted.request_id, num_prompt_tokens=len(prompt), num_continuations=len(rest),
        num_scored_tokens=sum(map(len, rest)), e2e_ms=round((time.monotonic() - began) * 1000, 1))
    return scored


async def _encode(
    gateway: Gateway, model: ServedModel, prompt: Prompt, prompt_ids: tuple[int, ...], continuation: TextPrompt | TokenPrompt, deadline: float
) -> tuple[int, ...]:
    """Ids behind the prompt's own. Where the text of both together is cut differently at the seam, the continuation is encoded on its own."""
    if isinstance(continuation, TokenPrompt):
        return continuation.token_ids
    if isinstance(prompt, TextPrompt):
        whole = await gateway.tokenizers.encode(model, TextPrompt(prompt.text + continuation.text), deadline)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
    return await gateway.tokenizers.encode(model, continuation, deadline)


async def _ask(
    gateway: Gateway, wanted: ScoreWanted, model: ServedModel, instances: frozenset[str], prompt: tuple[int, ...],
    continuations: Sequence[tuple[int, ...]], deadline: float,
) -> Scored:
    """A second and third instance are tried when one is lost: scores are the same everywhere."""
    num_tokens, tried = len(prompt) + sum(map(len, continuations)), set[str]()
    router, failure = gateway.engine.router, PlugmeshError("nobody was asked")
    for attempt in range(_MAX_TRIES):
        live = [i for i in gateway.decode.peers.live() if i.instance_id in instances and i.state == "ready"]
        candidates = [i for i in live if i.instance_id not in tried] or live
        if not candidates:
            raise Unavailable("no decode instance is ready", retry_after_s=2)
        request = decode_pb2.ScoreRequest(
            request_id=f"{wanted.request_id}#{attempt}", model=model.model, token_ids=prompt, top_logprobs=wanted.top_logprobs, priority=wanted.priority,
            continuations=[decode_pb2.TokenList(token_ids=c) for c in continuations], deadline_unix_s=time.time() + deadline - time.monotonic())
        if request.ByteSize() > _MAX_REQUEST_BYTES:
            raise PayloadTooLarge(f"the request has {request.ByteSize()} bytes, at most {_MAX_REQUEST_BYTES} can be sent")
        route = router.route(RouteRequest(wanted.request_id, num_tokens, 0, wanted.priority, (), wanted.client), candidates, [])
        tried.add(route.decode_instance)
        stub = decode_pb2_grpc.DecodeStub(gateway.mesh.channel("decode", route.decode_instance))
        found: list[list[common_pb2.TokenInfo]] = [[] for _ in continuations]
        usage = common_pb2.Usage()
        try:
            async for frame in stub.Score(request, timeout=max(0.001, deadline - time.monotonic())):
                for row in frame.rows:
                    found[row.sequence].extend(row.tokens)
                    if row.request_done:
                        usage.CopyFrom(row.usage)
            if [len(f) for f in found] == [len(c) for c in continuations]:
                return Scored(model.model, found, usage)
            failure = DataLoss("decode sent fewer scores than tokens")
        except grpc.RpcError as e:
            failure = error_from_rpc(e)
            if not isinstance(failure, Unavailable | DataLoss):
                raise failure from None
        finally:
            router.finished(wanted.request_id)
        log.warning("score.attempt_failed", request_id=wanted.request_id, peer=route.decode_instance, code=failure.code)
    raise failure
