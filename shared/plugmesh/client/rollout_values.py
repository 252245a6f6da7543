"""Values of the experience table as bytes: what they are stands before them, so a table can hold them without knowing them, and nothing is unpickled.

    kind (1 byte) | array: length of dtype, dtype ("<f4"), number of dimensions, dimensions (8 bytes each), zeros up to a multiple of 16 | body

Numbers are little-endian; the body of an array is its elements in C order.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from plugmesh.errors import InvalidRequest

Value: TypeAlias = np.ndarray | bytes | str | int | float | bool

_BYTES, _STR, _INT, _FLOAT, _BOOL, _ARRAY = range(1, 7)
_SCALARS = {_INT: ("int", struct.Struct("<q")), _FLOAT: ("float", struct.Struct("<d")), _BOOL: ("bool", struct.Struct("<?"))}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Facts:
    """What an encoded value is: its `dtype` ("bytes", "str", "int", "float", "bool", or an array's like "<f4"), its number of dimensions (0 unless an
    array's), its number of elements, characters or bytes, and its value where it is a single number."""

    dtype: str
    num_dimensions: int
    size: int
    scalar: float | None = None


def encode(value: Value) -> bytes:
    """Raises InvalidRequest for what is none of the known kinds, an integer beyond 64 bits, an array of objects."""
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, float):
        return _encode_array(np.asarray(value))
    if isinstance(value, bool):
        return bytes((_BOOL, value))
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise InvalidRequest("an integer of the experience table has at most 64 bits")
        return b"\x03" + value.to_bytes(8, "little", signed=True)
    if isinstance(value, float):
        return struct.pack("<Bd", _FLOAT, value)
    if isinstance(value, str):
        return b"\x02" + value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return b"\x01" + bytes(value)
    raise InvalidRequest(f"a value of the experience table is an array, bytes, text or a number, not {type(value).__name__}")


def decode(cell: bytes) -> Value:
    """The value; arrays are read-only views of `cell`. Raises InvalidRequest for bytes that `encode` cannot have made."""
    try:
        kind = cell[0]
        if kind == _ARRAY:
            dtype, shape, start = _header(cell)
            if len(cell) - start != math.prod(shape) * dtype.itemsize:
                raise ValueError("length")
            return np.frombuffer(cell, dtype, offset=start, count=math.prod(shape)).reshape(shape)
        if kind == _BYTES:
            return bytes(cell[1:])
        if kind == _STR:
            return bytes(cell[1:]).decode()
        return _SCALARS[kind][1].unpack(cell[1:])[0]  # type: ignore[no-any-return]
    except (ValueError, TypeError, IndexError, KeyError, struct.error) as e:
        raise InvalidRequest("not an encoded value of the experience table") from e


def inspect(cell: bytes) -> Facts:
    """What an encoded value is, without making it. Raises InvalidRequest as `decode`."""
    try:
        kind = cell[0]
        if kind == _ARRAY:
            dtype, shape, start = _header(cell)
            size = math.prod(shape)
            if len(cell) - start != size * dtype.itemsize:
                raise ValueError("length")
            return Facts(dtype.str, len(shape), size)
        if kind == _BYTES:
            return Facts("bytes", 0, len(cell) - 1)
        if kind == _STR:
            return Facts("str", 0, len(bytes(cell[1:]).decode()))
        name, layout = _SCALARS[kind]
        return Facts(name, 0, 1, layout.unpack(cell[1:])[0])
    except (ValueError, TypeError, IndexError, KeyError, struct.error) as e:
        raise InvalidRequest("not an encoded value of the experience table") from e


def dtype_name(name: str) -> str:
    """A declared dtype as `Facts.dtype` writes it: "int32" gives "<i4"; "" (whatever comes first) stays. Raises InvalidRequest."""
    if name in ("", "bytes", "str", "int", "float", "bool"):
        return name
    try:
        return _checked(np.dtype(name)).newbyteorder("<").str
    except TypeError as e:
        raise InvalidRequest(f"{name[:40]!r} is no dtype of the experience table") from e


def _encode_array(array: np.ndarray) -> bytes:
    dtype = _checked(array.dtype).newbyteorder("<")
    if array.ndim > _MAX_DIMENSIONS:
        raise InvalidRequest(f"an array of the experience table has at most {_MAX_DIMENSIONS} dimensions, not {array.ndim}")
    name = dtype.str.encode()
    header = struct.pack(f"<BB{len(name)}sB{array.ndim}Q", _ARRAY, len(name), name, array.ndim, *array.shape)
    header += bytes(-len(header) % 16)
    if not array.size:
        return header
    return b"".join((header, np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data))


def _checked(dtype: np.dtype) -> np.dtype:
    if dtype.kind not in "biufc":
        raise InvalidRequest(f"arrays of the experience table hold numbers, not {dtype.name}")
    return dtype


@functools.lru_cache(256)
def _dtype(name: bytes) -> np.dtype:
    return _checked(np.dtype(name.decode("ascii")))


def _header(cell: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    end = 2 + cell[1]
    dtype = _dtype(bytes(cell[2:end]))
    num_dimensions = cell[end]
    if num_dimensions > _MAX_DIMENSIONS:
        raise ValueError("dimensions")
    shape = struct.unpack_from(f"<{num_dimensions}Q", cell, end + 1)
    stop = end + 1 + 8 * num_dimensions
    return dtype, shape, stop + (-stop % 16)
