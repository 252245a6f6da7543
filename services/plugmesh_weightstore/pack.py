"""From stored tensors to plain float32 or bfloat16, or to what the native kernels read, in pieces of bounded size.

Blocks of quantised types are independent of rows, so a piece is any run of whole blocks. The `gguf` library works on
groups of 16 rows; handing it a piece as one long row lets it do the piece in one pass.

The format "native" keeps every value. A matrix becomes the smallest type of `plugmesh_kernels.pack` that can:

    stored                       packed
    Q4_1, Q4_0                   q4_1x16 (Q4_0 whose minimum is no half-precision number: q8_0x16)
    Q8_0, Q5_0, IQ4_NL           q8_0x16
    bfloat16                     bf16x16
    float32, float16, others     f32x16

So files in K-quants or float16 are served by a float32 product, at four bytes a weight; what has one dimension (norms,
biases) stays or becomes float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np

from plugmesh_kernels import pack as kernels
from plugmesh_weightstore.gguf_file import BLOCK_SIZES

FORMATS = ("float32", "bfloat16", "native")
_PIECE_ELEMENTS = 1 << 19  # two megabytes of float32: temporaries of the dequantisation stay near the cache

_PLAIN = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds float32 to the nearest bfloat16, ties to even, as uint16 bit patterns; NaN stays NaN, overflow gives infinity."""
    bits = x.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(x)
    if nan.any():  # adding would carry some NaNs over into infinity
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return rounded


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of uint16 bit patterns; exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def dequantize(data: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values of whole blocks.

    Args:
        data: uint8, the bytes of the blocks.
        dtype: "float32", "float16", "bfloat16" or a GGUF type.
    """
    if dtype == "bfloat16":
        return from_bfloat16(data.view("<u2"))
    if dtype in _PLAIN:
        return data.view(_PLAIN[dtype]).astype(np.float32, copy=False)
    return gguf.dequantize(data.reshape(1, -1), gguf.GGMLQuantizationType[dtype]).reshape(-1)


def packed_dtype(data: np.ndarray, dtype: str, shape: tuple[int, ...], format: str) -> str:
    """What a tensor becomes in a format: "float32", "bfloat16" or one of the kernels' types. Looks at the scales of Q4_0."""
    if format != "native":
        return format
    if len(shape) != 2:
        return "float32"
    if dtype in _INTEGERS:
        return "q8_0x16"
    return kernels.native_dtype(dtype, data) if dtype in kernels.STORED_TYPES else "f32x16"


def native_pieces(data: np.ndarray, dtype: str, shape: tuple[int, int], packed: str) -> Iterator[memoryview]:
    """The bytes of a matrix in a type of the kernels, piece by piece.

    Args:
        data: uint8, all bytes of the tensor.
        packed: The `packed_dtype` for it.
    """
    n, k = shape
    if dtype in kernels.STORED_TYPES:
        for piece in kernels.packed_pieces(dtype, data, n, k, packed):
            yield piece.data.cast("B")
        return
    block_elements, block_bytes = BLOCK_SIZES[dtype]
    row_bytes = k // block_elements * block_bytes
    step = max(_PIECE_ELEMENTS // k // kernels.ROWS, 1) * kernels.ROWS
    for start in range(0, n, step):
        rows = min(step, n - start)
        part = data[start * row_bytes : (start + rows) * row_bytes]
        with np.errstate(all="ignore"):  # as below
            if dtype in _INTEGERS:
                values, stored = _as_q8_0(part, dtype), "Q8_0"
            else:
                values, stored = dequantize(part, dtype), "float32"
        for piece in kernels.packed_pieces(stored, values, rows, k, packed):
            yield piece.data.cast("B")


_INTEGERS = frozenset({"Q5_0", "IQ4_NL"})  # blocks of 32 that are a half-precision scale times integers of at most 8 bits


def _as_q8_0(data: np.ndarray, dtype: str) -> np.ndarray:
    """The same values as Q8_0 blocks (uint8). With a scale of one the library gives the integers."""
    _, block_bytes = BLOCK_SIZES[dtype]
    blocks = data.reshape(-1, block_bytes).copy()
    scales = blocks[:, :2].copy()
    blocks[:, :2] = np.array([1.0], "<f2").view(np.uint8)
    integers = dequantize(blocks.reshape(-1), dtype).astype(np.int8).reshape(-1, 32)
    return np.concatenate((scales, integers.view(np.uint8)), axis=1)


def packed_pieces(data: np.ndarray, dtype: str, format: str) -> Iterator[memoryview]:
    """The bytes of a tensor in a plain format, piece by piece.

    Args:
        data: uint8, all bytes of the tensor (usually a map of its blob).
        dtype: What `data` holds.
        format: "float32" or "bfloat16".
    """
    block_elements, block_bytes = BLOCK_SIZES[dtype]
    piece_bytes = _PIECE_ELEMENTS // block_elements * block_bytes
    for start in range(0, len(data), piece_bytes):
        piece = data[start : start + piece_bytes]
        if dtype == format:
            yield np.ascontiguousarray(piece).data.cast("B")
            continue
        # Overflow is meant: half-precision scales of a damaged file may be infinite or NaN.
        with np.errstate(all="ignore"):
            values = dequantize(piece, dtype)
        packed = to_bfloat16(values) if format == "bfloat16" else np.ascontiguousarray(values)
        yield packed.data.cast("B")
