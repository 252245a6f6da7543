"""Calls a plugin's Foreign from Python, whether it is a callable or a capsule: for executors without native threads, and for tests.

A capsule is called as if there were one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from plugmesh.records import Foreign

_pointer, _int = ctypes.c_void_p, ctypes.c_int
_LINEAR_V1 = ctypes.CFUNCTYPE(None, _pointer, _pointer, _int, _int, _pointer, _int)
_LINEAR_V2 = ctypes.CFUNCTYPE(None, _pointer, _pointer, _int, _int, _pointer, _int, _int, _int)
_LAYER = ctypes.CFUNCTYPE(None, _pointer, _int, _int, _int)
_EMBEDDING = ctypes.CFUNCTYPE(None, _pointer, _pointer, _int, _pointer, _int, _int)
_ATTENTION = ctypes.CFUNCTYPE(
    None, _pointer, _int, _pointer, _pointer, _pointer, _int, _pointer, _int, _int, ctypes.CFUNCTYPE(None, _pointer), _pointer
)  # fmt: skip
_NO_BARRIER = ctypes.CFUNCTYPE(None, _pointer)(lambda _: None)


def linear(foreign: Foreign) -> Callable[[np.ndarray, np.ndarray], None]:
    """f(x (T, K), y (T, N) to fill), both float32 and C order."""
    if (found := _find(foreign, "plugmesh.linear.v1", _LINEAR_V1)) is not None:
        call, context = found
        return lambda x, y: call(context, x.ctypes.data, x.shape[0], x.shape[1], y.ctypes.data, y.shape[1])
    if (found := _find(foreign, "plugmesh.linear.v2", _LINEAR_V2)) is not None:
        call, context = found
        return lambda x, y: call(context, x.ctypes.data, x.shape[0], x.shape[1], y.ctypes.data, y.shape[1], 0, 1)
    return _function(foreign, "linear")


def before_layer(foreign: Foreign) -> Callable[[int], None]:
    """f(layer)."""
    if (found := _find(foreign, "plugmesh.layer.v1", _LAYER)) is not None:
        call, context = found
        return lambda layer: call(context, layer, 0, 1)
    return _function(foreign, "before_layer")


def embedding(foreign: Foreign) -> Callable[[np.ndarray, np.ndarray], None]:
    """f(tokens (T,) int32, x (T, hidden) float32 to fill)."""
    if (found := _find(foreign, "plugmesh.embedding.v1", _EMBEDDING)) is not None:
        call, context = found
        return lambda tokens, x: call(context, tokens.ctypes.data, len(tokens), x.ctypes.data, 0, 1)
    return _function(foreign, "embedding")


def attention(foreign: Foreign) -> Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]:
    """f(layer, q, k, v, out), as `seams.KvCodec.attend`."""
    if (found := _find(foreign, "plugmesh.attention.v2", _ATTENTION)) is not None:
        call, context = found
        return lambda layer, q, k, v, out: call(
            context, layer, q.ctypes.data, k.ctypes.data, v.ctypes.data, q.shape[0], out.ctypes.data, 0, 1, _NO_BARRIER, None
        )
    return _function(foreign, "attention")


def _find(foreign: Foreign, name: str, kind: Any) -> tuple[Callable[..., None], int | None] | None:
    api = ctypes.pythonapi
    is_valid, get, get_context = api.PyCapsule_IsValid, api.PyCapsule_GetPointer, api.PyCapsule_GetContext
    for function, result in ((is_valid, ctypes.c_int), (get, ctypes.c_void_p)):
        function.argtypes, function.restype = [ctypes.py_object, ctypes.c_char_p], result
    get_context.argtypes, get_context.restype = [ctypes.py_object], ctypes.c_void_p
    if not is_valid(foreign, name.encode()):
        return None
    return kind(get(foreign, name.encode())), get_context(foreign)


def _function(foreign: Foreign, what: str) -> Callable[..., None]:
    if not callable(foreign):
        raise TypeError(f"{what}: neither a function nor a capsule of its kind")
    function: Callable[..., None] = foreign
    return function
