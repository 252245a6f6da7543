"""Packed weights have exactly the values that the `gguf` library gives for the stored ones, and lie where kernels.h says."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh_kernels import pack

HEADER = (Path(pack.__file__).parent / "csrc/kernels.h").read_text()
PAIRS = sorted(pack._PACKERS)
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def stored_weight(rng: np.random.Generator, stored: str, n: int, k: int) -> np.ndarray:
    """Random bytes of a weight; every bit pattern occurs, also infinite and NaN scales and values."""
    if stored in BLOCK_BYTES:
        return rng.integers(0, 256, n * (k // 32) * BLOCK_BYTES[stored], np.uint8)
    return rng.integers(0, 256, n * k * (4 if stored == "float32" else 2), np.uint8)


def reference(stored: str, data: np.ndarray, n: int, k: int) -> np.ndarray:
    if n * k == 0:
        return np.empty((n, k), np.float32)
    with np.errstate(all="ignore"):
        if stored == "bfloat16":
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(n, k)
        if stored in ("float16", "float32"):
            return data.view("<f2" if stored == "float16" else "<f4").astype(np.float32).reshape(n, k)
        return gguf.dequantize(data.reshape(n, -1), gguf.GGMLQuantizationType[stored])


@pytest.mark.parametrize(("stored", "dtype"), PAIRS)
@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 70), groups=st.integers(0, 6), odd=st.integers(0, 31), seed=st.integers(0, 2**32))
def test_no_value_changes(stored: str, dtype: str, n: int, groups: int, odd: int, seed: int) -> None:
    k = groups * 32 if stored in BLOCK_BYTES else groups * 32 + odd
    data = stored_weight(np.random.default_rng(seed), stored, n, k)
    if (stored, dtype) == ("Q4_0", "q4_1x16"):  # scales as native_dtype wants them
        d = data.reshape(-1, 18)[:, :2].copy().view("<f2")
        data.reshape(-1, 18)[:, :2] = np.where(np.abs(d) <= 8188, d, np.float16(0.5)).astype("<f2").view(np.uint8)

    packed = pack.pack(stored, data, n, k, dtype)
    found = pack.unpack(dtype, packed, n, k)

    expected = reference(stored, data, n, k)
    assert packed.nbytes == pack.packed_num_bytes(dtype, n, k)
    assert packed.nbytes == 0 or packed.ctypes.data % 64 == 0
    if stored == "Q4_0" and dtype == "q4_1x16":
        assert np.array_equal(found, expected)  # d * 8 - 8 d is never minus zero
    else:
        same = found.view(np.uint32) == expected.view(np.uint32)
        assert (same | (np.isnan(found) & np.isnan(expected))).all()


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 200), dtype=st.sampled_from(sorted(pack.PIECE_BYTES)))
def test_padding_is_weights_of_zero(n: int, k: int, dtype: str) -> None:
    stored = {"q4_1x16": "Q4_1", "q8_0x16": "Q8_0", "bf16x16": "bfloat16", "f32x16": "float32"}[dtype]
    k = -(-k // 32) * 32 if stored in BLOCK_BYTES else k
    data = np.full(stored_weight(np.random.default_rng(0), stored, n, k).shape, 0x31, np.uint8)
    full_n, full_k = -(-n // 16) * 16, -(-k // 64) * 64

    whole = pack.unpack(dtype, pack.pack(stored, data, n, k, dtype), full_n, full_k)

    assert (whole[:n, :k] != 0).all()
    assert not whole[n:].any() and not whole[:, k:].any()


def test_a_weight_larger_than_one_pass_is_packed_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored_weight(np.random.default_rng(1), "Q4_1", 100, 96)
    whole = pack.pack("Q4_1", data, 100, 96)
    monkeypatch.setattr(pack, "_PASS_WEIGHTS", 96 * 40)

    pieces = list(pack.packed_pieces("Q4_1", data, 100, 96))

    assert [len(p) for p in pieces] == [2 * 2 * 640] * 3 + [2 * 640]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_bytes_lie_where_the_header_says() -> None:
    """One weight with a different value everywhere, its bytes looked up by the words of kernels.h, by hand."""
    n, k = 32, 128
    q = (np.arange(n)[:, None] * 7 + np.arange(k)[None, :] * 3) % 16
    d = np.arange(n * 4).reshape(n, 4).astype(np.float16)
    blocks = np.zeros((n, 4, 20), np.uint8)
    blocks[..., :2] = d[..., None].view(np.uint8)
    blocks[..., 2:4] = (-d)[..., None].view(np.uint8)
    grouped = q.reshape(n, 4, 32)
    blocks[..., 4:] = grouped[..., :16] | grouped[..., 16:] << 4
    packed = pack.pack("Q4_1", blocks, n, k)

    block, piece, group, row, v, i = 1, 1, 1, 5, 2, 3  # row 21, k = 64 + 32 + 11 and 64 + 32 + 27
    at = block * 2 * 640 + piece * 640
    byte = packed[at + 128 + group * 256 + v * 64 + 4 * row + i]
    assert (byte & 15, byte >> 4) == (q[21, 107], q[21, 123])
    assert packed[at + (group * 16 + row) * 2 :][:2].view("<f2")[0] == d[21, 3]
    assert packed[at + 64 + (group * 16 + row) * 2 :][:2].view("<f2")[0] == -d[21, 3]


def test_sizes_are_those_of_the_header() -> None:
    sizes = re.findall(r"(?:case WeightType::(\w+): |(default): )return (\d+);", HEADER)
    found = {(a or "F32").lower() + "x16": int(size) for a, _, size in sizes}
    assert found == pack.PIECE_BYTES
    for name, value in (("ROWS", pack.ROWS), ("GROUP", pack.GROUP), ("INPUT_GROUP", pack.PIECE)):
        assert re.search(rf"constexpr int {name} = {value};", HEADER)


@pytest.mark.parametrize(("scale", "dtype"), [(8188.0, "q4_1x16"), (8192.0, "q8_0x16"), (float("inf"), "q8_0x16"), (6e-8, "q4_1x16")])
def test_q4_0_takes_eight_bits_only_when_its_minimum_is_no_half_precision_number(scale: float, dtype: str) -> None:
    data = stored_weight(np.random.default_rng(2), "Q4_0", 16, 64)
    data.reshape(-1, 18)[:, :2] = np.array([0.25], "<f2").view(np.uint8)
    data.reshape(-1, 18)[5, :2] = np.array([-scale], "<f2").view(np.uint8)

    assert pack.native_dtype("Q4_0", data) == dtype
    assert np.array_equal(pack.unpack(dtype, pack.pack("Q4_0", data, 16, 64), 16, 64), reference("Q4_0", data, 16, 64), equal_nan=True)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no Q4_1 weight of shape"):
        pack.pack("Q4_1", np.zeros(20, np.uint8), 1, 64)
    with pytest.raises(ValueError, match="no Q8_0 weight of shape"):
        pack.pack("Q8_0", np.zeros(34, np.uint8), 1, 33)
    with pytest.raises(ValueError, match="float32 cannot become 'bf16x16'"):
        pack.pack("float32", np.zeros((1, 4), np.float32), 1, 4, "bf16x16")
    with pytest.raises(ValueError, match="'Q6_K' cannot be packed"):
        pack.pack("Q6_K", np.zeros(210, np.uint8), 1, 256, "f32x16")
    with pytest.raises(ValueError, match="no f32x16 weight"):
        pack.unpack("f32x16", np.zeros(64, np.uint8), 1, 1)
