"""Between the records of `plugmesh.types` and protobuf, and between errors and RPC statuses."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from plugmesh import errors, types
from plugmesh.grammar.spec import KINDS, GrammarSpec
from plugmesh_proto.v1 import common_pb2 as pb
from plugmesh_proto.v1 import grammar_pb2

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    types.FinishReason.STOP: pb.FINISH_REASON_STOP,
    types.FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    types.FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    types.FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FINISH_BACK = {v: k for k, v in _FINISH.items()}


def sampling_to_pb(p: types.SamplingParams) -> pb.SamplingParams:
    """Every field is written, so that defaults of a newer reader do not change a request."""
    out = pb.SamplingParams(
        temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p,
        repetition_penalty=p.repetition_penalty, presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty, max_tokens=p.max_tokens, min_tokens=p.min_tokens,
        stop_token_ids=p.stop_token_ids, ignore_eos=p.ignore_eos, logprobs=p.logprobs,
        top_logprobs=p.top_logprobs, num_sequences=p.num_sequences, confidence_top_k=p.confidence_top_k,
    )
    out.logit_bias.update(p.logit_bias)
    if p.seed is not None:
        out.seed = p.seed
    return out


def sampling_from_pb(m: pb.SamplingParams) -> types.SamplingParams:
    """Unset optional fields take their documented defaults. Does not check ranges; `plugmesh.limits` does."""
    return types.SamplingParams(
        temperature=m.temperature if m.HasField("temperature") else 1.0,
        top_k=m.top_k,
        top_p=m.top_p if m.HasField("top_p") else 1.0,
        min_p=m.min_p,
        repetition_penalty=m.repetition_penalty if m.HasField("repetition_penalty") else 1.0,
        presence_penalty=m.presence_penalty,
        frequency_penalty=m.frequency_penalty,
        logit_bias=dict(m.logit_bias),
        seed=m.seed if m.HasField("seed") else None,
        max_tokens=m.max_tokens or types.SamplingParams().max_tokens,
        min_tokens=m.min_tokens,
        stop_token_ids=tuple(m.stop_token_ids),
        ignore_eos=m.ignore_eos,
        logprobs=m.logprobs,
        top_logprobs=m.top_logprobs,
        num_sequences=m.num_sequences or 1,
        confidence_top_k=m.confidence_top_k,
    )


def token_to_pb(t: types.TokenInfo) -> pb.TokenInfo:
    return pb.TokenInfo(
        token_id=t.token_id, logprob=t.logprob, top=[pb.TopLogprob(token_id=i, logprob=lp) for i, lp in t.top], confidence=t.confidence)


def token_from_pb(m: pb.TokenInfo) -> types.TokenInfo:
    return types.TokenInfo(m.token_id, m.logprob, tuple((t.token_id, t.logprob) for t in m.top), m.confidence)


def finish_to_pb(reason: types.FinishReason | None) -> pb.FinishReason:
    return _FINISH[reason]


def finish_from_pb(value: int) -> types.FinishReason | None:
    return _FINISH_BACK.get(value)  # type: ignore[call-overload]


def usage_to_pb(u: types.Usage) -> pb.Usage:
    return pb.Usage(prompt_tokens=u.prompt_tokens, completion_tokens=u.completion_tokens, cached_tokens=u.cached_tokens)


def usage_from_pb(m: pb.Usage) -> types.Usage:
    return types.Usage(m.prompt_tokens, m.completion_tokens, m.cached_tokens)


def layout_to_pb(layout: types.KvLayout) -> pb.KvLayout:
    return pb.KvLayout(**{name: getattr(layout, name) for name in types.KvLayout.__dataclass_fields__})


def layout_from_pb(m: pb.KvLayout) -> types.KvLayout:
    return types.KvLayout(**{name: getattr(m, name) for name in types.KvLayout.__dataclass_fields__})


def spec_to_pb(spec: GrammarSpec) -> grammar_pb2.GrammarSpec:
    return grammar_pb2.GrammarSpec(kind=spec.kind, source=spec.source, relaxed=spec.relaxed, whitespace=spec.whitespace, engine=spec.engine)


def spec_from_pb(m: grammar_pb2.GrammarSpec) -> GrammarSpec:
    """Raises InvalidRequest for a kind or a whitespace that there is not."""
    if m.kind not in KINDS:
        raise errors.InvalidRequest(f"there is no kind of grammar {m.kind[:40]!r}; there are {', '.join(KINDS)}", param="grammar.kind")
    if m.whitespace not in ("", "flexible", "compact"):
        raise errors.InvalidRequest(f"whitespace is {m.whitespace[:40]!r}; it can be flexible or compact", param="grammar.whitespace")
    return GrammarSpec(kind=m.kind, source=m.source, relaxed=m.relaxed, whitespace=m.whitespace or "flexible", engine=m.engine)  # type: ignore[arg-type] # checked


def error_to_pb(e: errors.PlugmeshError) -> pb.ErrorInfo:
    return pb.ErrorInfo(code=e.code, message=e.message, param=e.param, retry_after_s=e.retry_after_s, fields=e.fields)


def error_from_pb(m: pb.ErrorInfo) -> errors.PlugmeshError:
    return errors.from_info(m.code, m.message, m.param, m.retry_after_s, dict(m.fields))


def rpc_status_of(e: errors.PlugmeshError) -> status_pb2.Status:
    """google.rpc.Status with the ErrorInfo among its details: what both carriers send."""
    detail = any_pb2.Any()
    detail.Pack(error_to_pb(e))
    code: int = code_pb2.Code.Value(e.grpc_status)
    return status_pb2.Status(code=code, message=e.message, details=[detail])  # type: ignore[arg-type]


async def abort(context: grpc.aio.ServicerContext, e: errors.PlugmeshError) -> None:
    """Ends an RPC with a typed error. Never returns: the context raises."""
    await context.abort_with_status(rpc_status.to_status(rpc_status_of(e)))


_BY_STATUS: dict[grpc.StatusCode, type[errors.PlugmeshError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.DATA_LOSS: errors.DataLoss,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}


def error_from_rpc(e: grpc.RpcError) -> errors.PlugmeshError:
    """The typed error behind a failed RPC, from its details when they are ours, else from its status code."""
    if isinstance(e, grpc.aio.AioRpcError | grpc.Call):  # the second is what blocking stubs raise
        for key, value in e.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
                for detail in status.details:
                    info = pb.ErrorInfo()
                    if detail.Unpack(info):
                        return error_from_pb(info)
        cls = _BY_STATUS.get(e.code(), errors.InternalError)
        return cls(e.details() or e.code().name.lower().replace("_", " "))
    return errors.InternalError("the call failed")
