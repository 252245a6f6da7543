"""Token ids to text as they come: whole characters only, stop strings found across token borders.

What a sequence has emitted after k tokens depends on those k tokens alone, never on how they were cut into frames.
So another instance can take over: it replays the tokens and leaves out the characters the consumer already has.
Characters are Unicode code points. Used by the tokenizer service, and by the gateway with a table it got from there.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from plugmesh.errors import InvalidRequest


class TokenTable(Protocol):
    """What detokenization needs of a tokenizer. `token_bytes[i]` are the exact bytes of token i, None for an id that no token has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def token_bytes(self) -> Sequence[bytes | None]: ...
    @property
    def special_ids(self) -> frozenset[int]: ...


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a stop string stands in a text."""

    start: int
    end: int
    text: str


def find_stop(text: str, stops: Sequence[str]) -> StopMatch | None:
    """The stop string that is complete first; of several that end at one place, the longest.

    "First complete" rather than "first begun", so that the answer does not depend on text still to come.
    """
    best: StopMatch | None = None
    for stop in stops:
        start = text.find(stop)
        if start >= 0:
            match = StopMatch(start, start + len(stop), stop)
            if best is None or (match.end, match.start) < (best.end, best.start):
                best = match
    return best


class StreamingText:
    """One sequence. Not thread-safe; holds at most the longest stop string and 3 bytes back.

    Args:
        stops: Not empty strings. Text before the one found first is emitted, and nothing after it.
        num_delivered_chars: Characters that the consumer already has; they are not emitted again.
    """

    __slots__ = (
        "_first",
        "_held",
        "_include_stop",
        "_longest",
        "_rest",
        "_skipped_ids",
        "_stops",
        "_token_bytes",
        "_vocab_size",
        "num_chars",
        "num_to_skip",
        "num_tokens",
        "stop_string",
    )

    def __init__(
        self, vocabulary: TokenTable, *, stops: Sequence[str] = (), skip_special_tokens: bool = True,
        include_stop: bool = False, num_delivered_chars: int = 0,
    ) -> None:
        self._vocab_size = vocabulary.vocab_size
        self._token_bytes = vocabulary.token_bytes
        self._skipped_ids = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._rest = b""                        # the beginning of a character
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._first = frozenset(stop[0] for stop in self._stops)
        self._include_stop = include_stop
        self._held = ""
        self.num_tokens = 0
        self.num_chars = num_delivered_chars    # delivered, by whomever
        self.num_to_skip = num_delivered_chars  # of the text still to come
        self.stop_string: str | None = None

    def push(self, token_ids: Sequence[int], *, is_final: bool = False) -> str:
        """Text that can be given out after these tokens.

        Args:
            is_final: Nothing follows; gives out what was held back.

        Raises:
            InvalidRequest: An id that no token has; the sequence is unchanged.
        """
        if self.stop_string is not None:
            return ""
        skipped, table, size = self._skipped_ids, self._token_bytes, self._vocab_size
        pieces: list[bytes] = []
        for token_id in token_ids:
            piece = table[token_id] if 0 <= token_id < size else None
            if piece is None:
                raise InvalidRequest(f"token id {token_id} is not in the vocabulary of {size}", param="token_ids")
            pieces.append(b"" if token_id in skipped else piece)
        if not self._stops:
            self.num_tokens += len(pieces)
            text = self._decode(pieces[0] if len(pieces) == 1 else b"".join(pieces), is_final)
            if self.num_to_skip:
                return self._give(text)
            self.num_chars += len(text)
            return text

        before = self._rest
        text = self._held + self._decode(b"".join(pieces), is_final)
        match = find_stop(text, self._stops)
        if match is not None:
            self.num_tokens += self._count_until(match.end, before, pieces)
            self.stop_string = match.text
            self._held = ""
            return self._give(text[: match.end if self._include_stop else match.start])
        self.num_tokens += len(pieces)
        cut = len(text) if is_final else self._safe_end(text)
        self._held = text[cut:]
        return self._give(text[:cut])

    def _decode(self, data: bytes, is_final: bool) -> str:
        """What `codecs.getincrementaldecoder("utf-8")("replace")` does, without its layers."""
        data = self._rest + data
        text, num_used = codecs.utf_8_decode(data, "replace", is_final)
        self._rest = data[num_used:]
        return text

    def _safe_end(self, text: str) -> int:
        """Where the longest tail begins that may be the beginning of a stop string; the end if there is none."""
        first, stops = self._first, self._stops
        for i in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[i] in first:
                tail = text[i:]
                for stop in stops:
                    if stop.startswith(tail):
                        return i
        return len(text)

    def _count_until(self, num_chars: int, rest: bytes, pieces: Sequence[bytes]) -> int:
        """How many of these tokens it took to complete the stop string, after the bytes in `rest`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.setstate((rest, 0))
        have = len(self._held)
        for count, piece in enumerate(pieces, start=1):
            have += len(decoder.decode(piece))
            if have >= num_chars:
                return count
        return len(pieces)

    def _give(self, text: str) -> str:
        if self.num_to_skip:
            skip = min(self.num_to_skip, len(text))
            self.num_to_skip -= skip
            text = text[skip:]
        self.num_chars += len(text)
        return text
