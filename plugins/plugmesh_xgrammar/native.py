"""The library's matchers for callers without Python: what `plugmesh.grammar.seams.Matcher.native` gives.

Every method of the library is an object of tvm-ffi, and its C interface calls them; `csrc/matcher.cpp` does, compiled on first use.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import Any

import structlog

log = structlog.get_logger()

_POINTER = ctypes.c_void_p


class _Library(ctypes.Structure):
    _fields_ = [
        ("call", _POINTER), ("take_error", _POINTER), ("release", _POINTER),
        ("accept", _POINTER), ("fill", _POINTER), ("is_completed", _POINTER), ("is_terminated", _POINTER), ("forced", _POINTER),
        ("known", _POINTER), ("num_known", ctypes.c_int64), ("num_words", ctypes.c_int64),
    ]  # fmt: skip


class _State(ctypes.Structure):
    _fields_ = [("library", _POINTER), ("matcher", _POINTER)]


class Door:
    """To the matchers of one vocabulary.

    Args:
        classes: Of `binding.load`.
        known: Byte i is 1 where token i is text or an end.
        num_words: Of a mask.
    """

    def __init__(self, classes: Any, known: bytes, num_words: int) -> None:
        self._function = _function()
        ffi = ctypes.CDLL(_tvm_ffi())  # loaded already
        self._methods = {m.name: m.func for m in classes.GrammarMatcher.__tvm_ffi_type_info__.methods}
        self._known = ctypes.create_string_buffer(known, len(known))
        address = {name: ctypes.cast(getattr(ffi, name), _POINTER).value for name in ("TVMFFIFunctionCall", "TVMFFIErrorMoveFromRaised", "TVMFFIObjectDecRef")}
        handle = {name: self._methods[name].__chandle__() for name in _METHODS}
        self._library = _Library(*address.values(), *handle.values(), ctypes.addressof(self._known), len(known), num_words)

    def capsule(self, matcher: Any) -> tuple[object, object]:
        """Of one of the library's matchers, and what must live as long as the capsule and the matcher do."""
        from plugmesh_kernels import jit

        state = _State(ctypes.addressof(self._library), matcher.__chandle__())
        return jit.capsule(self._function, "plugmesh.matcher.v1", ctypes.addressof(state)), (self, state)


_METHODS = ("accept_token", "fill_next_token_bitmask", "is_completed", "is_terminated", "find_jump_forward_string")


def door(classes: Any, known: bytes, num_words: int) -> Door | None:
    """None without a compiler, or where the library's insides are not as expected: everything works then, in Python."""
    try:
        return Door(classes, known, num_words)
    except (ImportError, OSError, AttributeError, KeyError, TypeError) as e:
        _tell(f"{type(e).__name__}: {e}")
        return None


@functools.cache
def _tell(reason: str) -> None:
    """Once."""
    log.info("xgrammar.native_matchers_unavailable", reason=reason[:500])


@functools.cache
def _function() -> Any:
    from plugmesh_kernels import jit

    headers = pathlib.Path(_tvm_ffi()).parent.parent / "include"
    try:
        library = jit.load(pathlib.Path(__file__).parent / "csrc", flags=(f"-I{headers}",))
    except jit.BuildError as e:
        raise OSError(str(e)) from e
    return library.plugmesh_xgrammar_matcher


def _tvm_ffi() -> str:
    from tvm_ffi import libinfo

    return str(libinfo.find_libtvm_ffi())
