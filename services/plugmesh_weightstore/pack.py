"""From stored tensors to plain float32 or bfloat16, in pieces of bounded size.

Blocks of quantised types are independent of rows, so a piece is any run of whole blocks. The `gguf` library works on
groups of 16 rows; handing it a piece as one long row lets it do the piece in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np

from plugmesh_weightstore.gguf_file import BLOCK_SIZES

FORMATS = {"float32": 4, "bfloat16": 2}  # name to bytes per element
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


def packed_pieces(data: np.ndarray, dtype: str, format: str) -> Iterator[memoryview]:
    """The bytes of a tensor in `format`, piece by piece.

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
