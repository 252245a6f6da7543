"""Token ids to text within this gateway, where it has the model's table of tokens. See ADR 4."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from plugmesh.detokenize import StreamingText, TokenTable
from plugmesh.errors import PlugmeshError


@dataclass(slots=True)
class Text:
    """What sinks read of the protobuf DetokenizedText."""

    text: str
    num_tokens_consumed: int
    stopped: bool
    is_final: bool
    error: str = ""


class TextSink(Protocol):
    def on_text(self, text: Any) -> None: ...


class LocalSequence:
    """One open sequence."""

    __slots__ = ("is_open", "sink", "stream")

    def __init__(self, stream: StreamingText, sink: TextSink) -> None:
        self.stream = stream
        self.sink = sink
        self.is_open = True


class LocalTexts:
    """Texts come after the caller's turn, as from a tokenizer instance: never while it is in the middle of a row.

    While `is_held`, at the next `flush`: whoever hands out the rows of a frame calls it at the end and saves a turn of the loop.
    """

    def __init__(self) -> None:
        self.is_held = False
        self._pending: list[tuple[LocalSequence, Seq[int], bool]] = []
        self.num_sequences = 0

    def open(self, sink: TextSink, table: TokenTable, *, stop: Seq[str]) -> LocalSequence:
        self.num_sequences += 1
        return LocalSequence(StreamingText(table, stops=stop), sink)

    def add(self, sequence: LocalSequence, token_ids: Seq[int], is_final: bool) -> None:
        if not self._pending and not self.is_held:
            asyncio.get_running_loop().call_soon(self.flush)
        self._pending.append((sequence, token_ids, is_final))

    def close(self, sequence: LocalSequence) -> None:
        """Nothing comes any more. A sequence that ended by itself needs no close."""
        if sequence.is_open:
            sequence.is_open = False
            self.num_sequences -= 1

    def flush(self) -> None:
        """Gives out the texts of everything added so far."""
        self.is_held = False
        pending, self._pending = self._pending, []
        for sequence, token_ids, is_final in pending:
            if not sequence.is_open:
                continue
            stream = sequence.stream
            try:
                text = stream.push(token_ids, is_final=is_final)
                stopped = stream.stop_string is not None
                if stopped or is_final:
                    self.close(sequence)
                sequence.sink.on_text(Text(text, stream.num_tokens, stopped, stopped or is_final))
            except Exception as e:  # the other sequences of the frame have nothing to do with it
                self.close(sequence)
                error = f"{e.code}: {e.message}" if isinstance(e, PlugmeshError) else type(e).__name__
                sequence.sink.on_text(Text("", stream.num_tokens, False, True, error))
