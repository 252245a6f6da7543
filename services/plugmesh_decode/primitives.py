"""Score and tap: calls that read a prompt instead of going on with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import numpy as np

from plugmesh.errors import InvalidRequest, LimitExceeded
from plugmesh.wire import error_from_pb
from plugmesh_decode.config import Settings
from plugmesh_decode.generate import Extra, Generator
from plugmesh_decode.session import Session
from plugmesh_engine.requests import HiddenRows
from plugmesh_proto.v1 import decode_pb2 as pb

MAX_TOP_LOGPROBS = 20
_FRAME_BYTES = 128 * 1024  # half of what a message of the bus carries


async def score(generator: Generator, settings: Settings, request: pb.ScoreRequest) -> AsyncIterator[pb.TokenFrame]:
    """Frames as of Generate; the row with `request_done` holds the usage of all. Continuations beyond half of the engine's sequences wait for the first ones.

    Raises:
        PlugmeshError: What ended the request.
    """
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}", param="top_logprobs")
    if not request.continuations:
        raise InvalidRequest("there is nothing to score", param="continuations")
    continuations = [tuple(c.token_ids) for c in request.continuations]
    size = max(1, settings.max_num_sequences // 2)
    fork = await _fixed(generator, request.fork) if request.HasField("fork") else None
    num_read = num_cached = 0
    for start in range(0, len(continuations), size):
        part = pb.GenerateRequest(
            request_id=f"{request.request_id}/{start}" if start else request.request_id, model=request.model, token_ids=request.token_ids,
            priority=request.priority, deadline_unix_s=request.deadline_unix_s, prefill_mode=pb.GenerateRequest.PREFILL_LOCAL,
            no_prefix_cache=request.no_prefix_cache, fork=fork,
        )
        # Whatever a row tells is a given token; the sampler is not asked.
        part.sampling.max_tokens, part.sampling.logprobs, part.sampling.top_logprobs = 1, True, request.top_logprobs
        session = Session(settings.max_session_rows, comes_back=False)
        generator.begin(part, session, Extra(score=tuple(continuations[start : start + size])))
        try:
            async for frame in session.frames():
                for row in frame.rows:
                    if row.HasField("error"):
                        raise error_from_pb(row.error)
                    row.request_id = request.request_id
                    row.sequence += start
                is_done = row.request_done
                if is_done:
                    num_read += sum(map(len, continuations[start : start + size])) if start else row.usage.prompt_tokens
                    num_cached = num_cached if start else row.usage.cached_tokens
                    row.usage.prompt_tokens, row.usage.cached_tokens = num_read, num_cached
                    if start + size < len(continuations):
                        row.request_done = False
                        row.ClearField("usage")
                yield frame
                if is_done:
                    break
        finally:
            generator.drop_session(session)


async def tap(generator: Generator, settings: Settings, request: pb.TapRequest, hidden_size: int) -> AsyncIterator[pb.TapFrame]:
    """Hidden states in the order of positions, layer beside layer. Raises PlugmeshError: what ended the request."""
    if not request.layers:
        raise InvalidRequest("no layer is tapped", param="layers")
    fork = await _fixed(generator, request.fork) if request.HasField("fork") else None
    num_prompt = len(request.token_ids) + (fork.num_tokens if fork else 0)
    positions = sorted(set(request.positions)) or list(range(num_prompt))
    if positions and not 0 <= positions[0] <= positions[-1] < num_prompt:
        raise InvalidRequest(f"positions must lie in the prompt of {num_prompt} tokens", param="positions")
    num_bytes = len(positions) * len(request.layers) * hidden_size * 4
    if num_bytes > settings.max_tap_bytes:
        raise LimitExceeded(f"{num_bytes} bytes of hidden states wanted, at most {settings.max_tap_bytes} in one call", param="positions")
    session = _TapSession(settings.max_session_rows, positions)
    part = pb.GenerateRequest(
        request_id=request.request_id, model=request.model, token_ids=request.token_ids, priority=request.priority,
        deadline_unix_s=request.deadline_unix_s, prefill_mode=pb.GenerateRequest.PREFILL_LOCAL, fork=fork,
    )
    part.sampling.max_tokens = 1
    part.sampling.temperature = 0.0
    generator.begin(part, session, Extra(taps=tuple(request.layers), tap_from=positions[0] if positions else 0, on_hidden=session.put_hidden))
    try:
        async for frame in session.frames():
            for rows in session.take_hidden():
                for out in _frames_of(rows, session.positions, hidden_size):
                    yield out
            for row in frame.rows:
                if row.HasField("error"):
                    raise error_from_pb(row.error)
            if frame.rows and frame.rows[-1].request_done:
                return
    finally:
        generator.drop_session(session)


class _TapSession(Session):
    """Holds hidden states beside rows; an empty frame says that there are new ones. What waits is bounded by `max_tap_bytes`."""

    def __init__(self, max_rows: int, positions: Sequence[int]) -> None:
        super().__init__(max_rows, comes_back=False)
        self.positions = np.asarray(positions, np.int64)
        self._hidden: list[HiddenRows] = []

    def put_hidden(self, rows: HiddenRows) -> None:
        at = np.searchsorted(self.positions, [rows.position, rows.position + len(rows.values)])
        if at[0] < at[1]:  # somebody wants one of them
            self._hidden.append(rows)
            self.wake()

    def take_hidden(self) -> list[HiddenRows]:
        taken, self._hidden = self._hidden, []
        return taken


def _frames_of(rows: HiddenRows, positions: np.ndarray, hidden_size: int) -> list[pb.TapFrame]:
    """The wanted rows, in messages that the bus carries."""
    first, last = np.searchsorted(positions, [rows.position, rows.position + len(rows.values)])
    wanted, step = positions[first:last], max(1, _FRAME_BYTES // (4 * hidden_size))
    frames = []
    for start in range(0, len(wanted), step):
        some = wanted[start : start + step]
        values = np.ascontiguousarray(rows.values[some - rows.position], "<f4")
        frames.append(pb.TapFrame(layer=rows.layer, positions=some.tolist(), values=values.tobytes(), hidden_size=hidden_size))
    return frames


async def _fixed(generator: Generator, point: pb.ForkPoint) -> pb.ForkPoint:
    """The point with its number of tokens, so that several calls mean the same one. Raises NotFound."""
    if point.HasField("num_tokens"):
        return point
    num_tokens = await generator.driver.call(lambda engine: engine.num_tokens_of(point.request_id, point.sequence))
    return pb.ForkPoint(request_id=point.request_id, sequence=point.sequence, num_tokens=num_tokens)
