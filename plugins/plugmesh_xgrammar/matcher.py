"""Where one output stands (`plugmesh.grammar.seams.Matcher`)."""

from __future__ import annotations

from typing import Any

import numpy as np


class XgrammarMatcher:
    """The library's matcher, with a count of what it accepted, for a clear error when more is to be taken back.

    Args:
        known: Byte i is 1 where token i is text or an end; of others the library would write a warning for each attempt.
    """

    __slots__ = ("_inner", "_known", "_num_accepted")

    def __init__(self, inner: Any, known: bytes, num_accepted: int = 0) -> None:
        self._inner = inner
        self._known = known
        self._num_accepted = num_accepted

    @property
    def is_completed(self) -> bool:
        return bool(self._inner.is_completed()) or self.is_terminated

    @property
    def is_terminated(self) -> bool:
        return bool(self._inner.is_terminated())

    def fill(self, mask: np.ndarray) -> bool:
        if self._inner.is_terminated():
            mask[:] = 0
            return True
        is_needed = bool(self._inner.fill_next_token_bitmask(mask.view(np.int32), 0, False))
        rest = len(self._known) % 32
        if rest:  # what is beyond the logits the library leaves as it comes
            mask[-1] &= np.uint32((1 << rest) - 1)
        return is_needed

    def accept(self, token_id: int) -> bool:
        if not (0 <= token_id < len(self._known) and self._known[token_id]) or self._inner.is_terminated():
            return False
        if not self._inner.accept_token(token_id, False):
            return False
        self._num_accepted += 1
        return True

    def rollback(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= self._num_accepted:
            raise ValueError(f"{num_tokens} tokens cannot be taken back: {self._num_accepted} were accepted")
        if num_tokens:
            self._inner.rollback(num_tokens)
            self._num_accepted -= num_tokens

    def forced(self) -> bytes:
        if self._inner.is_terminated():
            return b""
        try:
            return str(self._inner.find_jump_forward_string()).encode()
        except UnicodeDecodeError as e:  # it ends, or begins, inside a character, and the binding makes text of it
            return bytes(e.object)

    def fork(self) -> XgrammarMatcher:
        return XgrammarMatcher(self._inner.fork(), self._known, self._num_accepted)
