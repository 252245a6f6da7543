"""Where one output stands (`plugmesh.grammar.seams.Matcher`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugmesh.errors import LimitExceeded


@dataclass(frozen=True, slots=True)
class Tokens:
    """What all matchers of a tokenizer share.

    Attributes:
        known: Byte i is 1 where token i is text.
        text: The same as a mask.
        is_all_text: Every id of the logits is text or an end.
    """

    known: bytes
    text: np.ndarray
    eos: tuple[int, ...]
    is_all_text: bool

    @classmethod
    def of(cls, tokens: Sequence[bytes], eos: Sequence[int]) -> Tokens:
        known = bytes(bool(t) for t in tokens)
        bits = np.zeros(-(-len(known) // 32) * 32, np.uint8)
        bits[: len(known)] = np.frombuffer(known, np.uint8)
        return cls(known, np.packbits(bits, bitorder="little").view(np.uint32), tuple(eos), sum(known) + len(set(eos)) == len(known))


class LlguidanceMatcher:
    """The library's parser for the text; ends are kept here, because it forgets which of them it took."""

    __slots__ = ("_inner", "_is_terminated", "_num_text", "_tokens")

    def __init__(self, inner: Any, tokens: Tokens, num_text: int = 0, is_terminated: bool = False) -> None:
        self._inner = inner
        self._tokens = tokens
        self._num_text = num_text
        self._is_terminated = is_terminated

    @property
    def is_completed(self) -> bool:
        return self._is_terminated or bool(self._inner.is_accepting())

    @property
    def is_terminated(self) -> bool:
        return self._is_terminated

    def fill(self, mask: np.ndarray) -> bool:
        if self._is_terminated:
            mask[:] = 0
            return True
        if not mask.flags.c_contiguous or mask.nbytes != self._tokens.text.nbytes:
            raise ValueError(f"a mask has {self._tokens.text.size} words of 32 bits that lie side by side")
        self._inner.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._inner.is_error():
            raise LimitExceeded("the grammar is too complex at this place: a limit of llguidance was reached")
        mask &= self._tokens.text
        if self._inner.is_accepting():
            for i in self._tokens.eos:
                mask[i >> 5] |= np.uint32(1 << (i & 31))
        return not (self._tokens.is_all_text and self._is_full(mask))

    def _is_full(self, mask: np.ndarray) -> bool:
        num = len(self._tokens.known)
        return bool((mask[: num // 32] == 0xFFFFFFFF).all()) and (num % 32 == 0 or int(mask[num // 32]) == (1 << num % 32) - 1)

    def accept(self, token_id: int) -> bool:
        if self._is_terminated:
            return False
        if token_id in self._tokens.eos:
            self._is_terminated = bool(self._inner.is_accepting())
            return self._is_terminated
        if not (0 <= token_id < len(self._tokens.known) and self._tokens.known[token_id]) or self._inner.try_consume_tokens([token_id]) != 1:
            return False
        self._num_text += 1
        return True

    def rollback(self, num_tokens: int) -> None:
        num_accepted = self._num_text + self._is_terminated
        if not 0 <= num_tokens <= num_accepted:
            raise ValueError(f"{num_tokens} tokens cannot be taken back: {num_accepted} were accepted")
        num_text = num_tokens - (self._is_terminated and num_tokens > 0)
        if num_text and not self._inner.rollback(num_text):
            raise ValueError(f"{num_tokens} tokens cannot be taken back")
        self._is_terminated = self._is_terminated and num_tokens == 0
        self._num_text -= num_text

    def forced(self) -> bytes:
        if self.is_completed:
            return b""
        return bytes(self._inner.compute_ff_bytes())

    def fork(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._inner.deep_copy(), self._tokens, self._num_text, self._is_terminated)
