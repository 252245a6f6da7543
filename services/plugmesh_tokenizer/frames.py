"""One Detokenize stream: many sequences, one frame out for each frame in."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

from plugmesh.detokenize import StreamingText
from plugmesh.errors import InvalidRequest, LimitExceeded, PlugmeshError
from plugmesh_proto.v1 import tokenizer_pb2
from plugmesh_tokenizer.models import Models


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """See `config.Settings`."""

    max_sequences: int = 1024
    max_stop_strings: int = 16
    max_stop_chars: int = 256
    max_tokens: int = 262144


class DetokenizeStream:
    """State of one stream. A sequence that failed, stopped or ended is forgotten by itself; `close` of it is no error.

    An opened sequence is answered only if there is something to say: text that the consumer lacks after a replay, a
    stop string in the replay, or an error. `SequenceTokens` is answered always.
    """

    def __init__(self, models: Models, limits: StreamLimits) -> None:
        self._models = models
        self._limits = limits
        self._sequences: dict[int, StreamingText] = {}
        # Those that ended lately: tokens that were under way to them are answered once more, not with an error.
        self._ended: collections.OrderedDict[int, StreamingText] = collections.OrderedDict()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    async def answer(self, frame: Any) -> Any:
        """The frame that answers `frame`. Waits only if a model must be loaded first."""
        out = tokenizer_pb2.DetokenizedFrame()
        for opened in frame.open:
            try:
                await self._open(opened, out)
            except PlugmeshError as e:
                self._sequences.pop(opened.sequence_id, None)  # its id was used twice: neither can go on
                _fail(out, opened.sequence_id, e)
        budget = self._limits.max_tokens
        for entry in frame.tokens:
            token_ids = entry.token_ids
            budget -= len(token_ids)
            self._push(entry.sequence_id, token_ids, entry.is_final, out, over_budget=budget < 0)
        for sequence_id in frame.close:
            self._sequences.pop(sequence_id, None)
        return out

    def _end(self, sequence_id: int, sequence: StreamingText) -> None:
        self._sequences.pop(sequence_id, None)
        self._ended[sequence_id] = sequence
        if len(self._ended) > self._limits.max_sequences:
            self._ended.popitem(last=False)

    async def _open(self, opened: Any, out: Any) -> None:
        limits, sequence_id = self._limits, opened.sequence_id
        if sequence_id in self._sequences:
            raise InvalidRequest(f"sequence {sequence_id} is open already", param="sequence_id")
        if len(self._sequences) >= limits.max_sequences:
            raise LimitExceeded(f"{len(self._sequences)} sequences are open on this stream, no more are allowed", param="open")
        if len(opened.stop) > limits.max_stop_strings:
            raise LimitExceeded(f"stop: {len(opened.stop)} strings, at most {limits.max_stop_strings} are allowed", param="stop")
        for stop in opened.stop:
            if not stop:
                raise InvalidRequest("a stop string must not be empty", param="stop")
            if len(stop) > limits.max_stop_chars:
                raise LimitExceeded(
                    f"a stop string has {len(stop)} characters, at most {limits.max_stop_chars} are allowed", param="stop")
        if len(opened.replay_token_ids) > limits.max_tokens:
            raise LimitExceeded(
                f"{len(opened.replay_token_ids)} tokens to replay, at most {limits.max_tokens} are allowed", param="replay_token_ids")
        if opened.num_delivered_chars < 0:
            raise InvalidRequest("num_delivered_chars must not be negative", param="num_delivered_chars")
        loaded = self._models.known(opened.model) or await self._models.get(opened.model)
        sequence = StreamingText(
            loaded.vocabulary, stops=opened.stop, skip_special_tokens=opened.skip_special_tokens,
            include_stop=opened.include_stop_in_output, num_delivered_chars=opened.num_delivered_chars,
        )
        text = sequence.push(opened.replay_token_ids)
        self._ended.pop(sequence_id, None)
        if sequence.stop_string is None:
            self._sequences[sequence_id] = sequence
        else:
            self._end(sequence_id, sequence)
        if text or sequence.stop_string is not None:
            _say(out, sequence_id, text, sequence, is_final=False)

    def _push(self, sequence_id: int, token_ids: Any, is_final: bool, out: Any, *, over_budget: bool) -> None:
        sequence = self._sequences.get(sequence_id)
        try:
            if over_budget:
                raise LimitExceeded(f"a frame may carry at most {self._limits.max_tokens} tokens", param="tokens")
            if sequence is None:
                ended = self._ended.get(sequence_id)
                if ended is not None:
                    _say(out, sequence_id, "", ended, is_final=True)
                    return
                raise InvalidRequest(f"sequence {sequence_id} is not open", param="sequence_id")
            text = sequence.push(token_ids, is_final=is_final)
        except PlugmeshError as e:
            self._sequences.pop(sequence_id, None)
            _fail(out, sequence_id, e)
            return
        self.num_tokens += len(token_ids)
        if is_final or sequence.stop_string is not None:
            self._end(sequence_id, sequence)
        _say(out, sequence_id, text, sequence, is_final=is_final)


def _say(out: Any, sequence_id: int, text: str, sequence: StreamingText, *, is_final: bool) -> None:
    stop = sequence.stop_string
    if stop is None:
        out.texts.add(
            sequence_id=sequence_id, text=text, num_chars_total=sequence.num_chars, num_tokens_consumed=sequence.num_tokens,
            is_final=is_final)
    else:
        out.texts.add(
            sequence_id=sequence_id, text=text, num_chars_total=sequence.num_chars, num_tokens_consumed=sequence.num_tokens,
            stopped=True, stop_string=stop, is_final=True)


def _fail(out: Any, sequence_id: int, error: PlugmeshError) -> None:
    out.texts.add(sequence_id=sequence_id, error=f"{error.code}: {error.message}", is_final=True)
