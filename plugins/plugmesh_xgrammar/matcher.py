"""Where one output stands (`plugmesh.grammar.seams.Matcher`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from plugmesh_xgrammar.native import Door


class XgrammarMatcher:
    """The library's matcher.

    Args:
        known: Byte i is 1 where token i is text or an end; of others the library would write a warning for each attempt.
        door: For callers without Python, where there can be any.
    """

    __slots__ = ("_door", "_inner", "_known", "_native")

    def __init__(self, inner: Any, known: bytes, door: Door | None = None) -> None:
        self._inner = inner
        self._known = known
        self._door = door
        self._native: tuple[object, object] | None = None

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
        return bool(self._inner.accept_token(token_id, False))

    def rollback(self, num_tokens: int) -> None:
        if num_tokens < 0:
            raise ValueError(f"{num_tokens} tokens cannot be taken back")
        if num_tokens:
            try:
                self._inner.rollback(num_tokens)
            except RuntimeError as e:
                raise ValueError(f"{num_tokens} tokens cannot be taken back: fewer were accepted") from e

    def forced(self) -> bytes:
        if self._inner.is_terminated():
            return b""
        try:
            return str(self._inner.find_jump_forward_string()).encode()
        except UnicodeDecodeError as e:  # it ends, or begins, inside a character, and the binding makes text of it
            return bytes(e.object)

    def fork(self) -> XgrammarMatcher:
        return XgrammarMatcher(self._inner.fork(), self._known, self._door)

    def native(self) -> object | None:
        if self._native is None and self._door is not None:
            self._native = self._door.capsule(self._inner)
        return self._native[0] if self._native is not None else None
