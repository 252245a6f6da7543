"""The native side of matchers (`plugmesh.grammar.seams.NativeMatcher`), seen from Python, and given to matchers that are written in Python."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from plugmesh.grammar.seams import Matcher

NAME = b"plugmesh.matcher.v1"
ACCEPT, STANDING, FILL, FORCED = range(4)  # of plugmesh_kernels/csrc/matching.h

_Function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_uint32))


def native_side(matcher: Matcher, num_words: int) -> tuple[object, object]:
    """A capsule that calls the matcher's methods, and what must live as long as the capsule."""
    from plugmesh_kernels import jit

    def answer(op: int, token: int, mask: Any) -> int:
        if op == ACCEPT:
            return matcher.accept(token)
        if op == STANDING:
            return matcher.is_completed | matcher.is_terminated << 1
        if op == FILL:
            return matcher.fill(np.ctypeslib.as_array(mask, (num_words,)))
        return bool(matcher.forced())

    def called(state: int | None, op: int, token: int, mask: Any) -> int:
        try:
            return int(answer(op, token, mask))
        except Exception:  # C has no exceptions: the engine is told that the matcher failed, and ends the request
            return -1

    function = _Function(called)
    return jit.capsule(function, NAME.decode()), function


class NativeSide:
    """Calls a capsule as the kernels do."""

    def __init__(self, capsule: object, num_words: int) -> None:
        pointer, context = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_GetContext
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        context.restype, context.argtypes = ctypes.c_void_p, [ctypes.py_object]
        self._capsule = capsule
        self._function = _Function(pointer(capsule, NAME))
        self._state = context(capsule)
        self._mask = np.empty(num_words, np.uint32)

    def call(self, op: int, token: int = 0) -> int:
        return int(self._function(self._state, op, token, self._mask.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))))

    def fill(self) -> np.ndarray | None:
        """None where every token is allowed. Raises RuntimeError."""
        self._mask[:] = 0xA5A5A5A5
        found = self.call(FILL)
        if found < 0:
            raise RuntimeError("the matcher failed")
        return self._mask.copy() if found else None
