"""A client for decode instances, in token ids: what plugins, strategies and tools use that go below the gateway.

    async with DecodeClient.connect("127.0.0.1:9002") as decode:          # or DecodeClient(mesh.channel("decode", instance))
        draft = await decode.generate(prompt, hold=True, max_tokens=32)
        tries = [await decode.fork(draft, [token], max_tokens=16) for token in candidates]
        best = max(await decode.score(prompt, continuations), key=lambda s: s.logprob)
        await decode.release(draft)

Forks must reach the instance that has their origin, so the channel should lead to one instance. Every failure is a `plugmesh.errors` class.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from plugmesh.client.messages import Score
from plugmesh.errors import DataLoss, InvalidRequest
from plugmesh.types import FinishReason, SamplingParams, TokenInfo, Usage
from plugmesh.wire import error_from_pb, error_from_rpc, finish_from_pb, sampling_to_pb, token_from_pb, usage_from_pb
from plugmesh_proto.v1 import decode_pb2, decode_pb2_grpc

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Generated:
    """What one request gave, by sequence.

    Attributes:
        weight_versions: Of each token, the version of the weights that made it, as the weightstore names it.
        weight_epochs: The numbers of these versions' publications; 0 for an imported one.
    """

    request_id: str
    sequences: tuple[tuple[TokenInfo, ...], ...]
    finish_reasons: tuple[FinishReason | None, ...]
    usage: Usage
    weight_versions: tuple[tuple[str, ...], ...] = ()
    weight_epochs: Mapping[str, int] = field(default_factory=dict)

    def token_ids(self, sequence: int = 0) -> list[int]:
        return [t.token_id for t in self.sequences[sequence]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step did for one sequence of a request.

    Attributes:
        index: Of the first token among the sequence's generated ones, resumed ones included.
        weight_version, weight_epoch: Of the weights that made these tokens; the epoch is their publication's number, 0 for imported ones.
        usage: Of the whole request, with its last piece.
    """

    sequence: int
    index: int
    tokens: tuple[TokenInfo, ...]
    finish_reason: FinishReason | None
    weight_version: str
    weight_epoch: int
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Resumed:
    """Tokens of a sequence that came before, from another instance perhaps: they count as generated and do not come again."""

    token_ids: Sequence[int]
    is_finished: bool = False


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Hidden states of one layer; `data` is (positions, hidden_size) float32, little endian."""

    layer: int
    positions: tuple[int, ...]
    hidden_size: int
    data: bytes

    def array(self) -> np.ndarray:
        """As (positions, hidden_size); needs numpy."""
        import numpy as np

        return np.frombuffer(self.data, "<f4").reshape(len(self.positions), self.hidden_size)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a fork starts: after `num_tokens` tokens of a sequence, prompt included; None for all that it has when the request arrives."""

    request_id: str
    sequence: int = 0
    num_tokens: int | None = None


class DecodeClient:
    """Calls over one channel; for one event loop.

    Args:
        channel: To a decode instance; stays the caller's to close.
        timeout_s: Of each call, from sending to the last row.
    """

    def __init__(self, channel: grpc.aio.Channel, *, model: str = "", timeout_s: float = 300.0) -> None:
        self._stub = decode_pb2_grpc.DecodeStub(channel)
        self._model = model
        self._timeout_s = timeout_s

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, address: str, *, model: str = "", timeout_s: float = 300.0) -> AsyncIterator[DecodeClient]:
        """Over gRPC in the clear, to "host:port"."""
        async with grpc.aio.insecure_channel(address) as channel:
            yield cls(channel, model=model, timeout_s=timeout_s)

    async def generate(
        self, token_ids: Sequence[int], *, request_id: str = "", hold: bool = False, max_total_tokens: int = 0, priority: int = 0, **sampling: Any
    ) -> Generated:
        """Goes on from a prompt.

        Args:
            hold: Keep the finished sequences to fork from, until `release` or the instance's `hold_ttl_s` after their last use.
            max_total_tokens: Of all sequences together; 0 for no such limit.
            sampling: Fields of `plugmesh.types.SamplingParams`.
        """
        request = self._request(token_ids, request_id, sampling, hold=hold, max_total_tokens=max_total_tokens, priority=priority)
        return await self._generate(request)

    async def stream(
        self, token_ids: Sequence[int], *, resume: Sequence[Resumed] = (), request_id: str = "", priority: int = 0, local_prefill: bool = False, **sampling: Any
    ) -> AsyncIterator[Piece]:
        """As `generate`, step by step. Leaving early ends the request.

        Args:
            resume: Of each sequence, or empty.
            local_prefill: The prompt is computed by the instance itself, whatever its policy.

        Raises:
            DataLoss: Tokens are missing, or the last piece.
        """
        request = self._request(token_ids, request_id, sampling, priority=priority)
        for i, r in enumerate(resume):
            request.resume.add(sequence=i, token_ids=r.token_ids, finished=r.is_finished)
        if local_prefill:
            request.prefill_mode = decode_pb2.GenerateRequest.PREFILL_LOCAL
        async with contextlib.aclosing(self._pieces(request, [len(r.token_ids) for r in resume])) as pieces:
            async for piece in pieces:
                yield piece

    async def fork(
        self, origin: Origin | Generated | str, token_ids: Sequence[int] = (), *, request_id: str = "", hold: bool = False, max_total_tokens: int = 0,
        priority: int = 0, **sampling: Any,
    ) -> Generated:
        """Goes on from another request's sequence and `token_ids` behind it, without computing again what that one has computed.

        What comes back equals what a fresh request over the same tokens gives. Raises NotFound when the origin neither runs nor is held.
        """
        request = self._request(token_ids, request_id, sampling, hold=hold, max_total_tokens=max_total_tokens, priority=priority)
        request.fork.CopyFrom(_point(origin))
        return await self._generate(request)

    async def score(
        self, token_ids: Sequence[int], continuations: Sequence[Sequence[int]], *, origin: Origin | Generated | str | None = None,
        top_logprobs: int = 0, request_id: str = "", priority: int = 0,
    ) -> list[Score]:
        """Log-probabilities of each continuation of the prompt, which is computed once.

        Args:
            origin: The prompt's beginning is that sequence; `token_ids` follow it.
        """
        request = decode_pb2.ScoreRequest(
            request_id=request_id or uuid.uuid4().hex, model=self._model, token_ids=token_ids, top_logprobs=top_logprobs, priority=priority,
            continuations=[decode_pb2.TokenList(token_ids=c) for c in continuations], fork=None if origin is None else _point(origin),
        )
        found: list[list[TokenInfo]] = [[] for _ in continuations]
        with _typed_errors():
            async for frame in self._stub.Score(request, timeout=self._timeout_s):
                for row in frame.rows:
                    if row.index != len(found[row.sequence]):
                        raise DataLoss(f"scores {len(found[row.sequence])} to {row.index} of continuation {row.sequence} are missing")
                    found[row.sequence].extend(map(token_from_pb, row.tokens))
        if any(len(f) != len(c) for f, c in zip(found, continuations, strict=True)):
            raise DataLoss("the scores ended early")
        return [Score(tuple(f)) for f in found]

    async def tap(
        self, token_ids: Sequence[int], layers: Sequence[int], positions: Sequence[int] = (), *, origin: Origin | Generated | str | None = None,
        request_id: str = "", priority: int = 0,
    ) -> dict[int, HiddenStates]:
        """Hidden states of a prompt by layer: what enters it; for the number of layers, what leaves the last one.

        Args:
            positions: Empty for all of the prompt. What lies before the first of them may come out of the cache, which is cheaper.
        """
        request = decode_pb2.TapRequest(
            request_id=request_id or uuid.uuid4().hex, model=self._model, token_ids=token_ids, layers=layers, positions=positions, priority=priority,
            fork=None if origin is None else _point(origin),
        )
        parts: dict[int, list[decode_pb2.TapFrame]] = {layer: [] for layer in layers}
        with _typed_errors():
            async for frame in self._stub.Tap(request, timeout=self._timeout_s):
                parts[frame.layer].append(frame)
        return {
            layer: HiddenStates(layer, tuple(p for f in frames for p in f.positions), frames[0].hidden_size if frames else 0, b"".join(f.values for f in frames))
            for layer, frames in parts.items()
        }

    async def release(self, request: Generated | str) -> bool:
        """Lets go of what a request with `hold` left. False when there was nothing, because its time was over perhaps."""
        with _typed_errors():
            reply = await self._stub.ReleaseHold(decode_pb2.ReleaseHoldRequest(request_id=_name(request)), timeout=self._timeout_s)
        return reply.released

    async def swap_weights(self, version: str, mode: str = "finish", *, finish_s: float = 0.0) -> decode_pb2.SwapWeightsReply:
        """Has the instance serve other weights of the same model; see `decode.proto`.

        Args:
            mode: "finish", "continue" or "abort": what becomes of requests that run.
            finish_s: What runs may take to end; 0 for the instance's own limit.

        Raises:
            NotFound, FailedPrecondition, DeadlineExceeded: No such version, other shapes, or what runs did not end; nothing changed.
        """
        if mode not in ("finish", "continue", "abort"):
            raise InvalidRequest(f"no mode {mode!r}: finish, continue or abort", param="mode")
        request = decode_pb2.SwapWeightsRequest(version=version, mode=mode.upper(), timeout_s=finish_s)
        with _typed_errors():
            return await self._stub.SwapWeights(request, timeout=self._timeout_s)

    def _request(self, token_ids: Sequence[int], request_id: str, sampling: Mapping[str, Any], **fields: Any) -> decode_pb2.GenerateRequest:
        try:
            params = SamplingParams(**sampling)
        except TypeError as e:
            raise InvalidRequest(f"unknown sampling parameter: {e}", param="sampling") from e
        return decode_pb2.GenerateRequest(
            request_id=request_id or uuid.uuid4().hex, model=self._model, token_ids=token_ids, sampling=sampling_to_pb(params), **fields
        )

    async def _generate(self, request: decode_pb2.GenerateRequest) -> Generated:
        tokens: list[list[TokenInfo]] = [[] for _ in range(request.sampling.num_sequences)]
        versions: list[list[str]] = [[] for _ in tokens]
        reasons: list[FinishReason | None] = [None] * len(tokens)
        epochs: dict[str, int] = {}
        usage: Usage | None = None
        async for piece in self._pieces(request):
            tokens[piece.sequence].extend(piece.tokens)
            versions[piece.sequence].extend([piece.weight_version] * len(piece.tokens))
            if piece.tokens:
                epochs[piece.weight_version] = piece.weight_epoch
            reasons[piece.sequence] = piece.finish_reason or reasons[piece.sequence]
            usage = piece.usage or usage
        assert usage is not None
        return Generated(request.request_id, tuple(map(tuple, tokens)), tuple(reasons), usage, tuple(map(tuple, versions)), epochs)

    async def _pieces(self, request: decode_pb2.GenerateRequest, num_resumed: Sequence[int] = ()) -> AsyncGenerator[Piece]:
        """Rows in order, up to the last one; raises the row's error, and DataLoss where rows are missing."""
        counts = list(num_resumed) or [0] * request.sampling.num_sequences
        made_by = [("", 0) for _ in counts]  # told where it changes
        is_done = False
        call = self._stub.Generate(request, timeout=self._timeout_s)
        try:
            with _typed_errors():
                async for frame in call:
                    for row in frame.rows:
                        if row.HasField("error"):
                            raise error_from_pb(row.error)
                        i = row.sequence
                        if row.tokens and row.index != counts[i]:
                            raise DataLoss(f"tokens {counts[i]} to {row.index} of sequence {i} are missing")
                        counts[i] += len(row.tokens)
                        if row.weight_version:
                            made_by[i] = row.weight_version, row.weight_epoch
                        is_done |= row.request_done
                        yield Piece(
                            i, row.index, tuple(map(token_from_pb, row.tokens)), finish_from_pb(row.finish_reason), made_by[i][0], made_by[i][1],
                            usage_from_pb(row.usage) if row.request_done else None,
                        )  # fmt: skip
        finally:
            call.cancel()  # of no effect on one that has ended
        if not is_done:
            raise DataLoss("the rows ended early")


@contextlib.contextmanager
def _typed_errors() -> Any:
    try:
        yield
    except grpc.RpcError as e:
        raise error_from_rpc(e) from None


def _name(request: Generated | str) -> str:
    return request.request_id if isinstance(request, Generated) else request


def _point(origin: Origin | Generated | str) -> decode_pb2.ForkPoint:
    if not isinstance(origin, Origin):
        origin = Origin(_name(origin))
    point = decode_pb2.ForkPoint(request_id=origin.request_id, sequence=origin.sequence)
    if origin.num_tokens is not None:
        point.num_tokens = origin.num_tokens
    return point
