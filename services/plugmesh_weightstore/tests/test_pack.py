"""Dequantisation against references that do one number at a time, and rounding to bfloat16."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plugmesh_weightstore.gguf_file import BLOCK_SIZES
from plugmesh_weightstore.pack import dequantize, from_bfloat16, packed_pieces, to_bfloat16
from plugmesh_weightstore.testing import random_blocks


def half(b: bytes, at: int) -> float:
    return struct.unpack_from("<e", b, at)[0]


def scale_min_k4(j: int, q: bytes) -> tuple[int, int]:
    """Six-bit scale and minimum of sub-block j of 8, as ggml packs them into 12 bytes."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    return (q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)


def q4_0(b: bytes) -> list[float]:
    return [((b[2 + i % 16] >> (4 * (i // 16))) % 16 - 8) * half(b, 0) for i in range(32)]


def q4_1(b: bytes) -> list[float]:
    return [((b[4 + i % 16] >> (4 * (i // 16))) % 16) * half(b, 0) + half(b, 2) for i in range(32)]


def q5_0(b: bytes) -> list[float]:
    high = struct.unpack_from("<I", b, 2)[0]
    return [(((b[6 + i % 16] >> (4 * (i // 16))) % 16 | ((high >> i) & 1) << 4) - 16) * half(b, 0) for i in range(32)]


def q5_1(b: bytes) -> list[float]:
    high = struct.unpack_from("<I", b, 4)[0]
    return [((b[8 + i % 16] >> (4 * (i // 16))) % 16 | ((high >> i) & 1) << 4) * half(b, 0) + half(b, 2) for i in range(32)]


def q8_0(b: bytes) -> list[float]:
    return [struct.unpack_from("<b", b, 2 + i)[0] * half(b, 0) for i in range(32)]


def q4_k(b: bytes) -> list[float]:
    out = []
    for i in range(256):
        j = i // 32
        scale, low = scale_min_k4(j, b[4:16])
        quant = (b[16 + 32 * (j // 2) + i % 32] >> (4 * (j % 2))) % 16
        out.append(half(b, 0) * scale * quant - half(b, 2) * low)
    return out


def q5_k(b: bytes) -> list[float]:
    out = []
    for i in range(256):
        j = i // 32
        scale, low = scale_min_k4(j, b[4:16])
        quant = (b[48 + 32 * (j // 2) + i % 32] >> (4 * (j % 2))) % 16 | ((b[16 + i % 32] >> j) & 1) << 4
        out.append(half(b, 0) * scale * quant - half(b, 2) * low)
    return out


def q6_k(b: bytes) -> list[float]:
    out = []
    for i in range(256):
        part, within = divmod(i, 128)  # two halves of 128, each with four groups of 32
        group, lane = divmod(within, 32)
        low = (b[64 * part + lane + 32 * (group % 2)] >> (4 * (group // 2))) % 16
        high = (b[128 + 32 * part + lane] >> (2 * group)) % 4
        scale = struct.unpack_from("<b", b, 192 + 8 * part + lane // 16 + 2 * group)[0]
        out.append(half(b, 208) * scale * ((low | high << 4) - 32))
    return out


REFERENCES = {"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


@pytest.mark.parametrize("dtype", REFERENCES)
def test_quantised_types_equal_a_reference_that_does_one_number_at_a_time(dtype: str) -> None:
    data = random_blocks(np.random.default_rng(1), dtype, 6, 512)
    _, block_bytes = BLOCK_SIZES[dtype]
    raw = data.tobytes()
    expected = np.array([v for i in range(0, len(raw), block_bytes) for v in REFERENCES[dtype](raw[i : i + block_bytes])])

    found = dequantize(np.frombuffer(raw, np.uint8), dtype)

    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_float_types_are_exact(dtype: str) -> None:
    data = random_blocks(np.random.default_rng(1), dtype, 4, 64)
    name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    codes = {"F32": "<f", "F16": "<e"}
    raw = data.tobytes()
    if dtype == "BF16":
        expected = [struct.unpack("<f", b"\0\0" + raw[i : i + 2])[0] for i in range(0, len(raw), 2)]
    else:
        expected = [v for (v,) in struct.iter_unpack(codes[dtype], raw)]

    assert dequantize(np.frombuffer(raw, np.uint8), name).tolist() == expected


@pytest.mark.parametrize("dtype", [d for d in BLOCK_SIZES if d not in ("float32", "float16", "bfloat16")])
def test_pieces_as_one_long_row_equal_the_library_row_by_row(dtype: str) -> None:
    """Every type the library knows: what our shortcut hands it gives what its own tensor path gives."""
    elements, block_bytes = BLOCK_SIZES[dtype]
    rows, blocks_per_row = 20, 3
    data = np.random.default_rng(2).integers(0, 120, (rows, blocks_per_row * block_bytes), np.uint8)
    kind = gguf.GGMLQuantizationType[dtype]
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(data, kind)
        pieces = list(packed_pieces(data.reshape(-1), dtype, "float32"))
    assert expected.shape == (rows, blocks_per_row * elements)

    assert b"".join(pieces) == expected.tobytes()


def test_long_tensors_come_in_several_pieces_of_bounded_size() -> None:
    data = random_blocks(np.random.default_rng(3), "Q4_1", 4096, 288)
    pieces = list(packed_pieces(data.reshape(-1), "Q4_1", "bfloat16"))

    assert len(pieces) == 3 and max(len(p) for p in pieces) <= 1 << 20
    expected = to_bfloat16(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1).reshape(-1))
    assert b"".join(pieces) == expected.tobytes()


def nearest_bfloat16(x: float) -> float:
    """Exact: the nearest of the two neighbours by rational arithmetic, ties to the even one."""
    low_bits = struct.unpack("<I", struct.pack("<f", abs(x)))[0] >> 16
    low, high = from_bits(low_bits), from_bits(low_bits + 1)
    if math.isinf(low):
        return math.copysign(low, x)
    limit = Fraction(2) ** 128  # where the next bfloat16 would be, were it not infinity
    below, above = Fraction(low), limit if math.isinf(high) else Fraction(high)
    distance = Fraction(abs(x)) - below - (above - Fraction(abs(x)))
    take_low = distance < 0 or (distance == 0 and low_bits % 2 == 0)
    return math.copysign(low if take_low else high, x)


def from_bits(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


@settings(max_examples=500, deadline=None)
@given(st.floats(width=32, allow_nan=False))
@example(1.00390625)
@example(1.01171875)
@example(3.4e38)
@example(1e-45)
@example(-0.0)
@example(math.inf)
def test_rounding_to_bfloat16_is_to_nearest_even(x: float) -> None:
    found = float(from_bfloat16(to_bfloat16(np.array([x], np.float32)))[0])

    assert (found, math.copysign(1, found)) == (nearest_bfloat16(x), math.copysign(1, x))


def test_no_nan_becomes_infinity_or_a_number() -> None:
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)

    assert np.isnan(from_bfloat16(to_bfloat16(bits.view(np.float32)))).all()


def test_rounding_equals_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(5).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    x = x[~np.isnan(x)]

    expected = torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(x), expected)
