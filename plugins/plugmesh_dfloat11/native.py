"""The reader in C++: compiled on first use; None where there is no compiler."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from plugmesh_kernels import jit

if TYPE_CHECKING:
    from plugmesh_dfloat11.container import Container

log = structlog.get_logger()

FIELDS = 5  # 64-bit words of `struct Container` in csrc/decode.h


class Library:
    """The functions of `csrc/`.

    Attributes:
        functions: For capsules.
        has_tiles: Whether `df11_linear` can multiply as the native executor's own kernel does on this processor.
    """

    def __init__(self, functions: ctypes.CDLL) -> None:
        self.functions: Any = functions
        self.has_tiles = bool(functions.df11_has_tiles())
        functions.df11_decode.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        functions.df11_decode.restype = None

    def decode(self, container: Container, first: int, last: int, out: np.ndarray) -> None:
        """Fills `out` (uint16, contiguous, as long as the chunks are)."""
        count = max(0, min(container.num_values, last * 1024) - first * 1024)
        assert out.dtype == np.uint16 and out.flags.c_contiguous and len(out) >= count
        described = describe(container)
        self.functions.df11_decode(described.ctypes.data, first, last, out.ctypes.data)


def describe(container: Container) -> np.ndarray:
    """`struct Container`: addresses, so the container must outlive it."""
    c = container
    return np.array([c.offsets.ctypes.data, c.codes.ctypes.data, c.rest.ctypes.data, c.table.ctypes.data, c.num_values], np.uint64)


@functools.cache
def library() -> Library | None:
    try:
        return Library(jit.load(pathlib.Path(__file__).parent / "csrc"))
    except jit.NoCompiler:
        log.warning("dfloat11.no_compiler", reader="numpy")
        return None
