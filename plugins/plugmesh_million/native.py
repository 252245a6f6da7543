"""The compiled half of the plugin, where there is a compiler and a processor for it."""

from __future__ import annotations

import ctypes
import functools
import pathlib

from plugmesh_kernels import jit


@functools.cache
def library() -> ctypes.CDLL | None:
    """`csrc/`, compiled on first use; None without a compiler, or where its instructions are missing (AVX-512 with VBMI and BF16)."""
    try:
        found = jit.load(pathlib.Path(__file__).parent / "csrc")
    except jit.BuildError:  # NoCompiler, or one that refuses
        return None
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    found.million_supported.restype = ctypes.c_int
    for name, result, arguments in (
        ("million_assign", None, [pointer, i64, pointer, pointer, pointer]),
        ("million_open", pointer, [pointer, pointer, i64, pointer, pointer, i32, pointer, i32]),
        ("million_close", None, [pointer]),
        ("million_drain", None, [pointer]),
        ("million_set_delay", None, [pointer, i32]),
        ("million_counts", None, [pointer, pointer]),
        ("million_plan", None, [pointer, pointer, i32, pointer, i64, pointer, i64]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found if found.million_supported() else None
