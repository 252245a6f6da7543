"""Containers: every bit pattern comes back, by the native reader and by numpy, whole and in parts; damage is an error or other values, never a crash."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import DataLoss
from plugmesh_dfloat11 import container, native
from plugmesh_dfloat11.layout import num_rounded, to_bfloat16

READERS = [pytest.param("native", marks=pytest.mark.skipif(native.library() is None, reason="no C++ compiler")), "numpy"]


def normal(num: int, seed: int = 0) -> np.ndarray:
    return to_bfloat16((np.random.default_rng(seed).standard_normal(num) * 0.02).astype(np.float32))


CASES = {
    "empty": np.zeros(0, np.uint16),
    "one": np.array([0x8000], np.uint16),
    "zeros of both signs": np.tile(np.array([0, 0x8000], np.uint16), 1500),
    "every pattern": np.arange(65536, dtype=np.uint16),
    "infinities and NaNs with their payload": np.array([0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7FC0] * 300, np.uint16),
    "subnormals": np.arange(1, 128, dtype=np.uint16),
    "all exponents equal": (np.random.default_rng(1).integers(0, 65536, 5000) & 0x807F | 0x3F00).astype(np.uint16),
    "normal": normal(10_007),
    "three chunks": normal(3072, 2),
    "all exponents, very unequal": ((2 ** np.random.default_rng(2).uniform(0, 8, 20_000)).astype(np.uint16) - 1) << 7,
}


def read(one: container.Container, reader: str, first: int = 0, last: int | None = None) -> np.ndarray:
    last = one.num_chunks if last is None else last
    return container.decode(one, first, last) if reader == "native" else container.decode_slowly(one, first, last)


def parsed(data: bytes | bytearray) -> container.Container:
    return container.parse(np.frombuffer(data, np.uint8), "w")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_every_bit_comes_back(case, reader):
    values = CASES[case].astype(np.uint16)
    one = parsed(container.encode(values))

    assert np.array_equal(read(one, reader), values)
    for first in range(0, one.num_chunks, 3):
        assert np.array_equal(read(one, reader, first, min(first + 2, one.num_chunks)), values[first * 1024 : (first + 2) * 1024])


@given(st.integers(0, 5000), st.integers(0, 2**32 - 1), st.integers(1, 256))
@settings(max_examples=40, deadline=None)
def test_any_values_come_back_from_both_readers(num, seed, num_exponents):
    rng = np.random.default_rng(seed)
    known = rng.choice(256, num_exponents, replace=False)
    exponent = known[np.minimum(rng.geometric(rng.uniform(0.05, 1), num) - 1, num_exponents - 1)]
    values = (exponent << 7 | rng.integers(0, 65536, num) & 0x807F).astype(np.uint16)
    one = parsed(container.encode(values))

    assert np.array_equal(container.decode(one), values)
    assert np.array_equal(container.decode_slowly(one, 0, one.num_chunks), values)


def test_size_is_within_two_percent_of_the_entropy_bound_and_not_below():
    values = normal(400_000)
    data = container.encode(values)
    measured = container.size_of(values, len(data))

    assert 2.4 < measured.entropy_bits < 2.8
    assert measured.bound_bits < measured.bits < 1.02 * measured.bound_bits
    assert 0.64 < len(data) / values.nbytes < 0.70


def test_rounding_is_to_nearest_even_and_keeps_what_is_bfloat16():
    exact = np.arange(65536, dtype=np.uint32) << 16
    tie_up, tie_down, above = 0x3F818000, 0x3F808000, 0x3F808001

    assert np.array_equal(to_bfloat16(exact.view(np.float32)), np.arange(65536, dtype=np.uint16))
    assert to_bfloat16(np.array([tie_up, tie_down, above, 0x7F800001], np.uint32).view(np.float32)).tolist() == [0x3F82, 0x3F80, 0x3F81, 0x7FC0]
    assert (num_rounded(exact.view(np.float32)), num_rounded(np.array([0.1, 0.5], np.float32))) == (0, 1)


@pytest.mark.parametrize("reader", READERS)
def test_a_flipped_bit_of_a_code_changes_values(reader):
    """So they do come from the codes."""
    values = normal(4096)
    data = bytearray(container.encode(values))
    one = parsed(data)
    at = one.codes.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
    del one
    data[at + 100] ^= 4
    try:
        got = read(parsed(data), reader)
    except DataLoss:
        return
    assert not np.array_equal(got, values)


@pytest.mark.parametrize("reader", READERS)
def test_random_codes_and_offsets_never_lead_out_of_the_container(reader):
    rng = np.random.default_rng(5)
    values = CASES["every pattern"]
    whole = np.frombuffer(container.encode(values), np.uint8)
    for _ in range(10):
        data = whole.copy()
        one = container.parse(data)
        one.codes[:] = rng.integers(0, 256, len(one.codes))
        one.offsets[1:-1] = np.sort(rng.integers(0, len(one.codes) + 1, one.num_chunks - 1))
        one.offsets[-2] = len(one.codes)  # the last chunk has no bytes of its own
        try:
            assert len(read(container.parse(data), reader)) == len(values)
        except DataLoss:
            assert reader == "numpy"


@pytest.mark.parametrize("cut", [10, 40, 300, 2000, 4000, -600, -1])
def test_a_part_of_a_container_is_data_loss(cut):
    with pytest.raises(DataLoss, match="w: "):
        parsed(container.encode(normal(3000))[:cut])


@pytest.mark.parametrize(("at", "value"), [(0, 0), (4, 9), (8, 77), (16, 9), (64 + 120, 11), (64 + 256, 1), (64 + 256 + 4, 255)])
def test_a_header_length_or_offset_that_cannot_be_is_data_loss(at, value):
    data = bytearray(container.encode(normal(3000)))
    data[at] = value
    if at == 64 + 256 + 4:
        data[at + 3] = value
    with pytest.raises(DataLoss):
        parsed(data)
