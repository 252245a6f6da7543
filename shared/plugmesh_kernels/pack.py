"""From stored weights to the layouts that the kernels read, without changing one value.

`csrc/kernels.h` defines the layouts: row blocks of 16 rows side by side, K in pieces of 64, both zero padded. The types:

    name      holds                                                        bits per weight
    q4_1x16   w = d * q + m, q in 0..15, f16 d and m per 32 along K              5
    q8_0x16   w = d * q, q in -128..127, f16 d per 32 along K                    8.5
    bf16x16   bfloat16                                                          16
    f32x16    float32                                                           32

What a stored type becomes (`native_dtype`) is the smallest of these that holds all its values exactly; nothing is rounded
here. Blocks of 4 and 8 bits need no arithmetic at all: their bytes are only put into another order. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ROWS, GROUP, PIECE = 16, 32, 64  # kernels.h: ROWS, GROUP, INPUT_GROUP
PIECE_BYTES = {"q4_1x16": 640, "q8_0x16": 1088, "bf16x16": 2048, "f32x16": 4096}
"""Name of a packed type to the bytes of 16 rows x 64 weights."""

_PASS_WEIGHTS = 1 << 19  # weights per pass: temporaries of a few megabytes stay near the cache

_Q4_0 = np.dtype([("d", "<f2"), ("q", "u1", 16)])
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "<u4", 4)])
_Q8_0 = np.dtype([("d", "<f2"), ("q", "<u4", 8)])
_STORED = {
    "Q4_0": (_Q4_0, GROUP), "Q4_1": (_Q4_1, GROUP), "Q8_0": (_Q8_0, GROUP),
    "bfloat16": (np.dtype("<u2"), 1), "float16": (np.dtype("<f2"), 1), "float32": (np.dtype("<f4"), 1),
}  # fmt: skip
STORED_TYPES = frozenset(_STORED)
"""Names of the types that `pack` reads: GGUF's, and "bfloat16" (as uint16 bit patterns), "float16", "float32"."""


def packed_num_bytes(dtype: str, n: int, k: int) -> int:
    """Bytes of an (n, k) weight as `dtype`, padding included. Raises KeyError for an unknown type."""
    return -(-n // ROWS) * -(-k // PIECE) * PIECE_BYTES[dtype]


def native_dtype(stored: str, data: np.ndarray) -> str:
    """The packed type for a weight whose bytes are `data`.

    Q4_0 means d * (q - 8), which is d * q + m with m = -8 d where that is a finite half-precision number. Where it isn't,
    the weight needs 8 bits. float16 becomes float32: bfloat16 would lose three bits of it.
    """
    if stored == "Q4_0":
        d = _elements(stored, data)["d"]
        with np.errstate(over="ignore", invalid="ignore"):
            return "q4_1x16" if np.isfinite(d * np.float16(-8)).all() else "q8_0x16"
    return {"Q4_1": "q4_1x16", "Q8_0": "q8_0x16", "bfloat16": "bf16x16", "float16": "f32x16", "float32": "f32x16"}[stored]


def pack(stored: str, data: np.ndarray, n: int, k: int, dtype: str | None = None) -> np.ndarray:
    """All bytes of `packed_pieces` in one array that starts at a multiple of 64; for small weights and tests."""
    dtype = dtype or native_dtype(stored, data)
    num_bytes = packed_num_bytes(dtype, n, k)
    room = np.empty(num_bytes + 63, np.uint8)
    start = -room.ctypes.data % 64
    out, at = room[start : start + num_bytes], 0
    for piece in packed_pieces(stored, data, n, k, dtype):
        out[at : at + len(piece)] = piece
        at += len(piece)
    assert at == num_bytes
    return out


def packed_pieces(stored: str, data: np.ndarray, n: int, k: int, dtype: str | None = None) -> Iterator[np.ndarray]:
    """The packed bytes of a weight, whole row blocks at a time, with temporaries of a few megabytes (or 16 rows).

    Args:
        stored: What `data` holds; one of STORED_TYPES.
        data: The stored bytes as they are (uint8), or (n, k) floats of that type. Read-only maps are fine.
        n, k: Shape of the weight. k of GGUF types is a multiple of 32.
        dtype: The packed type; by default `native_dtype`. Others than that are possible where they hold the same values:
            "q8_0x16" for Q4_0, "f32x16" for all floats.

    Yields:
        uint8, flat.

    Raises:
        ValueError: The bytes don't fit the shape, or `stored` cannot become `dtype` unchanged.
    """
    if stored not in _STORED:
        raise ValueError(f"{stored!r} cannot be packed; known are {', '.join(sorted(_STORED))}")
    element, per = _STORED[stored]
    if n < 0 or k < 0 or k % per or data.nbytes != n * (k // per) * element.itemsize:
        raise ValueError(f"{data.nbytes} bytes are no {stored} weight of shape ({n}, {k})")
    dtype = dtype or native_dtype(stored, data)
    packer = _PACKERS.get((stored, dtype))
    if packer is None:
        raise ValueError(f"{stored} cannot become {dtype!r} without loss")
    rows = _elements(stored, data).reshape(n, k // per)
    step = max(_PASS_WEIGHTS // max(k, 1) // ROWS, 1) * ROWS
    for start in range(0, n, step):
        part = rows[start : start + step]
        if len(part) % ROWS or k % PIECE:
            # Zero rows and columns; as blocks of zeros they are weights of zero as well.
            padded = np.zeros((-(-len(part) // ROWS) * ROWS, -(-k // PIECE) * PIECE // per), element)
            padded[: len(part), : part.shape[1]] = part
            part = padded
        # (row blocks, 16, elements along K): from here on only the last two axes trade places.
        packed = packer(part.reshape(len(part) // ROWS, ROWS, part.shape[1]))
        yield packed.reshape(-1)


def unpack(dtype: str, data: np.ndarray, n: int, k: int) -> np.ndarray:
    """The float32 values (n, k) of packed bytes: the slow reference, straight from the offsets that kernels.h gives.

    4 and 8 bits: d * q is exact in float32, so adding m is the only rounding, with or without a fused operation.
    """
    data = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if len(data) != packed_num_bytes(dtype, n, k):
        raise ValueError(f"{len(data)} bytes are no {dtype} weight of shape ({n}, {k})")
    out = np.empty((n, k), np.float32)
    piece_bytes = PIECE_BYTES[dtype]
    block_bytes = -(-k // PIECE) * piece_bytes
    row, column = np.arange(ROWS)[:, None], np.arange(k)[None, :]
    piece, rest = (column // PIECE) * piece_bytes, column % PIECE
    group, inside = rest // GROUP, rest % GROUP
    for first in range(0, n, ROWS):
        block = data[first // ROWS * block_bytes :][:block_bytes]

        def number(at: np.ndarray, kind: str, block: np.ndarray = block) -> np.ndarray:
            size = np.dtype(kind).itemsize
            return np.ascontiguousarray(block[at[..., None] + np.arange(size)]).view(kind)[..., 0]

        with np.errstate(all="ignore"):  # scales of a damaged file may be infinite or NaN
            if dtype == "q4_1x16":
                at = piece + 128 + 256 * group + 64 * (inside % 16 // 4) + 4 * row + inside % 4
                q = (block[at] >> (4 * (inside // 16)).astype(np.uint8)) & 15
                d = number(piece + 32 * group + 2 * row, "<f2").astype(np.float32)
                m = number(piece + 64 + 32 * group + 2 * row, "<f2").astype(np.float32)
                values = d * q.astype(np.float32) + m
            elif dtype == "q8_0x16":
                at = piece + 64 + 512 * group + 64 * (inside // 4) + 4 * row + inside % 4
                d = number(piece + 32 * group + 2 * row, "<f2").astype(np.float32)
                values = d * (block[at].astype(np.float32) - 128)
            elif dtype == "bf16x16":
                bits = number(piece + 64 * (rest // 2) + 4 * row + 2 * (rest % 2), "<u2")
                values = (bits.astype(np.uint32) << 16).view(np.float32)
            else:
                values = number(piece + 64 * rest + 4 * row, "<f4")
        out[first : first + ROWS] = values[: n - first]
    return out


def _elements(stored: str, data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).view(_STORED[stored][0])


# ---- one function per pair of types: (row blocks, 16, elements along K) to bytes --------------------------------------------------


def _scales(d: np.ndarray) -> np.ndarray:
    """(b, 16, groups) half precision to (b, pieces, 2 * 16 * 2) bytes: group, row."""
    b, _, groups = d.shape
    return np.ascontiguousarray(d.transpose(0, 2, 1)).view(np.uint8).reshape(b, groups // 2, 64)


def _quads(q: np.ndarray) -> np.ndarray:
    """(b, 16, groups, vectors) four-byte words to (b, pieces, bytes): group, vector, row."""
    b, _, groups, vectors = q.shape
    return np.ascontiguousarray(q.transpose(0, 2, 3, 1)).view(np.uint8).reshape(b, groups // 2, 2 * vectors * 64)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    # GGUF keeps q[j] and q[16 + j] in one byte as well, so words of four bytes move as they are.
    return np.concatenate((_scales(blocks["d"]), _scales(blocks["m"]), _quads(blocks["q"])), axis=2)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    d = blocks["d"]
    words = np.ascontiguousarray(blocks["q"]).view("<u4")
    return np.concatenate((_scales(d), _scales(d * np.float16(-8)), _quads(words)), axis=2)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return np.concatenate((_scales(blocks["d"]), _quads(blocks["q"] ^ np.uint32(0x80808080))), axis=2)


def _q4_0_as_q8_0(blocks: np.ndarray) -> np.ndarray:
    q = blocks["q"]
    signed = np.concatenate((q & 15, q >> 4), axis=3) + np.uint8(128 - 8)
    return np.concatenate((_scales(blocks["d"]), _quads(signed.view("<u4"))), axis=2)


def _turned(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint8)


def _bf16(bits: np.ndarray) -> np.ndarray:
    return _turned(np.ascontiguousarray(bits).view("<u4"))


def _f32(values: np.ndarray) -> np.ndarray:
    return _turned(values)


def _f16_as_f32(values: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return _turned(values.astype("<f4"))


def _bf16_as_f32(bits: np.ndarray) -> np.ndarray:
    return _turned(bits.astype("<u4") << 16)


_PACKERS = {
    ("Q4_1", "q4_1x16"): _q4_1,
    ("Q4_0", "q4_1x16"): _q4_0,
    ("Q4_0", "q8_0x16"): _q4_0_as_q8_0,
    ("Q8_0", "q8_0x16"): _q8_0,
    ("bfloat16", "bf16x16"): _bf16,
    ("bfloat16", "f32x16"): _bf16_as_f32,
    ("float16", "f32x16"): _f16_as_f32,
    ("float32", "f32x16"): _f32,
}
