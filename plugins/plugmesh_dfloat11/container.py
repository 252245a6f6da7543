"""Bfloat16 values as bytes that lose nothing: `encode` and `decode`, of use without a model, too.

    header     magic "DF11", version, number of values, of chunks, bytes of codes; padded to 64 bytes
    lengths    256 bytes: bits of each exponent's code
    offsets    uint32 per chunk of 1,024 values and one for the end: where its codes begin
    codes      exponents, canonical Huffman
    rest       one byte per value: sign and 7 bits of mantissa
    zeros      512 bytes

Each part starts at a multiple of 64. A reader of damaged codes takes at most 11 bits for a value, so from the start of the last chunk it touches 1,408 bytes and
a few more: the rest (a byte per value) and the zeros behind the codes keep it within the container, whatever the codes say.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from plugmesh.errors import DataLoss
from plugmesh_dfloat11 import huffman, native

CHUNK = 1024  # values: a piece of 16 rows x 64 weights as the kernels keep it
_MAGIC, _VERSION = b"DF11", 1
_HEADER = struct.Struct("<4sIQQQ")
_ALIGN, _SLACK = 64, 512


@dataclass(frozen=True, slots=True)
class Container:
    """The parts of one container, as views of its bytes.

    Attributes:
        num_values: bfloat16 values.
        code: Of the exponents.
        offsets: (chunks + 1,) uint32 into `codes`.
        codes, rest: uint8. Behind `codes` come `rest` and the zeros; a native reader relies on that.
        table: For the native reader; see `huffman.look_table`.
        num_bytes: Of all, paddings included.
    """

    num_values: int
    code: huffman.Code
    offsets: np.ndarray
    codes: np.ndarray
    rest: np.ndarray
    table: np.ndarray
    num_bytes: int

    @property
    def num_chunks(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Size:
    """How small values are and how small they could be.

    Attributes:
        entropy_bits: Of the exponents, per value.
        bits: What the container takes, per value.
    """

    num_values: int
    entropy_bits: float
    bits: float

    @property
    def bound_bits(self) -> float:
        """The least for any code of single exponents: sign and mantissa are not compressed."""
        return self.entropy_bits + 8


def exponents(values: np.ndarray) -> np.ndarray:
    """(n,) uint8 of bfloat16 bit patterns (n,) uint16."""
    return (values >> 7).astype(np.uint8)


def entropy(values: np.ndarray) -> float:
    """Bits per exponent, Shannon."""
    counts = np.bincount(exponents(values), minlength=huffman.SYMBOLS)
    shares = counts[counts > 0] / max(len(values), 1)
    return float(-(shares * np.log2(shares)).sum())


def encode(values: np.ndarray) -> bytes:
    """The container of bfloat16 bit patterns, (n,) uint16; every pattern is kept, NaN's payload and the sign of zero included."""
    exponent = exponents(values)
    code = huffman.code_of(huffman.code_lengths(np.bincount(exponent, minlength=huffman.SYMBOLS)))
    codes, offsets = huffman.write(exponent, code, CHUNK)
    rest = ((values >> 8) & 0x80 | values & 0x7F).astype(np.uint8)
    header = _HEADER.pack(_MAGIC, _VERSION, len(values), len(offsets) - 1, len(codes))
    parts = (header, code.lengths.tobytes(), offsets.astype("<u4").tobytes(), codes.tobytes(), rest.tobytes())
    return b"".join(p + bytes(-len(p) % _ALIGN) for p in parts) + bytes(_SLACK)


def parse(data: np.ndarray, name: str = "") -> Container:
    """The parts of a container's bytes (uint8, flat), without copying.

    Raises:
        DataLoss: They are no container, or not all of it; names `name`. Offsets and lengths are checked, so what passes can be read without leaving `data`.
    """

    def no(why: str) -> DataLoss:
        return DataLoss(f"{name or 'container'}: {why}", tensor=name)

    if len(data) < _HEADER.size:
        raise no(f"{len(data)} bytes hold no header")
    magic, version, num_values, num_chunks, num_codes = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != _VERSION:
        raise no("not a container of this version")
    if num_chunks != -(-num_values // CHUNK):
        raise no(f"{num_chunks} chunks do not hold {num_values} values")
    parts, at = [], 0
    for size in (_HEADER.size, huffman.SYMBOLS, 4 * (num_chunks + 1), num_codes, num_values):
        if at + size > len(data):
            raise no(f"ends after {len(data)} bytes")
        parts.append(data[at : at + size])
        at += size + -size % _ALIGN
    if at + _SLACK != len(data):
        raise no(f"has {len(data)} bytes instead of {at + _SLACK}")
    offsets = parts[2].view("<u4")
    if offsets[0] != 0 or offsets[-1] != num_codes or (offsets[1:] < offsets[:-1]).any():
        raise no("the chunks are not one after another")
    try:
        code = huffman.code_of(parts[1])
    except ValueError as e:
        raise no(str(e)) from e
    return Container(num_values, code, offsets, parts[3], parts[4], huffman.look_table(code), len(data))


def decode(container: Container, first: int = 0, last: int | None = None) -> np.ndarray:
    """The bit patterns (n,) uint16 of chunks `first` to `last` (by default all).

    Raises:
        DataLoss: The codes do not end where they should. The native reader does not look: damaged codes give other values, which a checksum has to find.
    """
    last = container.num_chunks if last is None else last
    count = max(0, min(container.num_values, last * CHUNK) - first * CHUNK)
    library = native.library()
    if library is not None:
        out = np.empty(count, np.uint16)
        library.decode(container, first, last, out)
        return out
    return decode_slowly(container, first, last)


def decode_slowly(container: Container, first: int, last: int) -> np.ndarray:
    """`decode` in numpy."""
    count = max(0, min(container.num_values, last * CHUNK) - first * CHUNK)
    begin, end = int(container.offsets[first]), int(container.offsets[last])
    try:
        exponent = huffman.read(container.codes[begin:end], container.offsets[first : last + 1] - np.uint32(begin), container.code, count, CHUNK)
    except ValueError as e:
        raise DataLoss(f"container: {e}") from e
    rest = container.rest[first * CHUNK : first * CHUNK + count].astype(np.uint16)
    values: np.ndarray = (rest & 0x80) << 8 | exponent.astype(np.uint16) << 7 | rest & 0x7F
    return values


def size_of(values: np.ndarray, num_bytes: int) -> Size:
    """What a container of `num_bytes` achieves for these values."""
    return Size(len(values), entropy(values), 8 * num_bytes / max(len(values), 1))
