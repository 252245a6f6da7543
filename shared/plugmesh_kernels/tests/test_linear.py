"""Linear kernels of every instruction set against `reference`, and their two promises: batch invariance, and that a NaN stays in its row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh_kernels import pack, reference

if not plugmesh_kernels.available():
    pytest.skip(plugmesh_kernels.why_not(), allow_module_level=True)

native = plugmesh_kernels.native()
ISAS = [isa for isa in plugmesh_kernels.ISAS if native.supports(isa)]
STORED = ("Q4_1", "Q8_0", "bfloat16", "float32")  # in the order of WeightType
TYPES = range(len(STORED))

each_isa = pytest.mark.parametrize("isa", ISAS)
each_type = pytest.mark.parametrize("type_", TYPES, ids=STORED)
SHAPES = {"n": st.integers(1, 70), "k": st.integers(1, 300), "seed": st.integers(0, 2**32)}


class Weight:
    """A random packed weight that starts at an odd multiple of two bytes, and its values."""

    def __init__(self, rng: np.random.Generator, type_: int, n: int, k: int) -> None:
        self.type, self.n, self.k = type_, n, k
        stored = STORED[type_]
        padded_k = -(-k // 32) * 32
        if type_ == 0:
            blocks = np.zeros((n, padded_k // 32, 20), np.uint8)
            blocks[..., 4:] = rng.integers(0, 256, blocks[..., 4:].shape)
            blocks[..., 0:4] = rng.normal(0, 0.1, (n, padded_k // 32, 2)).astype("<f2").view(np.uint8)
            blocks[rng.random(blocks.shape[:2]) < 0.1] = 0
        elif type_ == 1:
            blocks = np.zeros((n, padded_k // 32, 34), np.uint8)
            blocks[..., 2:] = rng.integers(0, 256, blocks[..., 2:].shape)
            blocks[..., 0:2] = rng.normal(0, 0.01, (n, padded_k // 32, 1)).astype("<f2").view(np.uint8)
            blocks[rng.random(blocks.shape[:2]) < 0.1] = 0
        else:
            blocks = rng.normal(0, 1, (n, k)).astype(np.float32)
            blocks[rng.random(n) < 0.1] = 0
            if type_ == 2:
                blocks = (blocks.view(np.uint32) >> 16).astype(np.uint16)
        packed = pack.pack(stored, blocks, n, padded_k if type_ < 2 else k)
        room = np.empty(packed.nbytes + 2, np.uint8)
        room[2:] = packed
        self.data = room[2:]
        # A k within a group of 32: kernels know it by zero activations only, so weights beyond may be anything.
        self.decoded = reference.decode(type_, self.data, n, k)
        self.blocks = -(-n // 16)

    def times(self, isa, x, y=None, *, bias=None, block0=0, block1=None, add=False):
        if y is None:
            y = np.full((len(x), self.n), 7.5, np.float32)
        encoded = native.LinearInput(isa, x)
        block1 = self.blocks if block1 is None else block1
        native.linear(
            isa, self.type, self.n, self.k, self.data, encoded, y, bias=bias, block0=block0, block1=block1, add=add
        )
        return y


def rows(rng: np.random.Generator, t: int, k: int) -> np.ndarray:
    """Activations of very different sizes, with some zeros and an outlier here and there."""
    x = rng.normal(0, 1, (t, k)) * np.exp(rng.normal(0, 2, (t, 1)))
    x[rng.random((t, k)) < 0.02] *= 1000
    x[:, rng.random(k) < 0.1] = 0
    return x.astype(np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: np.ndarray) -> None:
    """Within the tolerance of each result; NaN exactly where NaN is expected."""
    wrong = ~((np.abs(found - expected) <= tolerance) | (np.isnan(found) & np.isnan(expected)) | (found == expected))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}: {found[wrong][0]} for {expected[wrong][0]}"
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(
        np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
    )


@each_isa
@each_type
@settings(max_examples=25, deadline=None)
@given(t=st.integers(0, 40), add=st.booleans(), biased=st.booleans(), **SHAPES)
def test_results_are_those_of_double_precision(
    isa: str, type_: int, t: int, add: bool, biased: bool, n: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, x = Weight(rng, type_, n, k), rows(rng, t, k)
    bias = rng.normal(0, 1, n).astype(np.float32) if biased else None
    before = rng.normal(0, 1, (t, n)).astype(np.float32)

    found = weight.times(isa, x, before.copy(), bias=bias, add=add)

    expected, tolerance = reference.linear(type_, weight.decoded, x, bias)
    if add:
        expected, tolerance = expected + before, tolerance + 2.0**-23 * (np.abs(expected) + np.abs(before))
    assert_close(found, expected, tolerance)


@each_isa
@each_type
@settings(max_examples=15, deadline=None)
@given(t=st.integers(1, 150), cut=st.integers(0, 5), **SHAPES)
def test_a_row_alone_and_any_split_give_the_same_bits(
    isa: str, type_: int, t: int, cut: int, n: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, x = Weight(rng, type_, n, k), rows(rng, t, k)
    bias = rng.normal(0, 1, n).astype(np.float32)
    whole = weight.times(isa, x, bias=bias)

    alone = np.concatenate([weight.times(isa, x[i : i + 1], bias=bias) for i in range(t)])
    some = weight.times(isa, x[t // 2 :], bias=bias)
    cut = min(cut, weight.blocks)
    parts = weight.times(isa, x, bias=bias, block1=cut)

    assert same_bits(alone, whole)
    assert same_bits(some, whole[t // 2 :])
    assert (parts[:, 16 * cut :] == 7.5).all()  # nothing beyond the blocks asked for
    weight.times(isa, x, parts, bias=bias, block0=cut)
    assert same_bits(parts, whole)


@each_isa
@each_type
@settings(max_examples=15, deadline=None)
@given(t=st.integers(2, 20), value=st.sampled_from([np.nan, np.inf, -np.inf]), **SHAPES)
def test_a_nan_or_infinity_stays_in_its_row(
    isa: str, type_: int, t: int, value: float, n: int, k: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight, x = Weight(rng, type_, n, k), rows(rng, t, k)
    clean = weight.times(isa, x)
    bad = int(rng.integers(t))
    x[bad, rng.integers(k)] = value

    found = weight.times(isa, x)

    others = np.arange(t) != bad
    assert same_bits(found[others], clean[others])
    nonzero = np.abs(weight.decoded.values).min(axis=1) > 0
    assert not np.isfinite(found[bad, nonzero]).any()
    if type_ < 2:
        assert np.isnan(found[bad]).all()


@each_isa
@each_type
def test_rows_of_y_may_be_further_apart_and_nothing_else_is_written(isa: str, type_: int) -> None:
    rng = np.random.default_rng(3)
    weight, x = Weight(rng, type_, 37, 70), rows(rng, 9, 70)
    y = np.full((11, 64), 7.5, np.float32)

    weight.times(isa, x, y)

    assert same_bits(y[:9, :37], weight.times(isa, x))
    assert (y[:9, 37:] == 7.5).all() and (y[9:] == 7.5).all()


@each_isa
@each_type
@pytest.mark.parametrize(("t", "n", "k"), [(70, 20, 16384), (5, 20, 16384), (1, 5000, 64), (67, 1100, 576), (5, 20, 0)])
def test_sizes_beyond_one_tile_or_chunk_and_no_columns(isa: str, type_: int, t: int, n: int, k: int) -> None:
    rng = np.random.default_rng(4)
    weight, x = Weight(rng, type_, n, k), rows(rng, t, k)

    assert_close(weight.times(isa, x), *reference.linear(type_, weight.decoded, x))


@pytest.mark.skipif("avx512" not in ISAS, reason="needs both instruction sets")
@pytest.mark.parametrize("type_", [0, 1, 3])
@settings(max_examples=15, deadline=None)
@given(t=st.integers(1, 70), **SHAPES)
def test_avx2_and_avx512_agree_in_every_bit(type_: int, t: int, n: int, k: int, seed: int) -> None:
    """Except for BF16, whose instruction rounds in its own way: a sequence may move between machines."""
    rng = np.random.default_rng(seed)
    weight, x = Weight(rng, type_, n, k), rows(rng, t, k)
    assert same_bits(weight.times("avx2", x), weight.times("avx512", x))


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-30, 9.9e-31, 1e-38, 1e-45, 3.4e38, np.nan, np.inf]),
    st.integers(-254, 254).map(lambda i: i / 2),  # exactly between two integers when the largest is 127
)


@each_isa
@settings(max_examples=60, deadline=None)
@given(row=st.lists(FLOATS, min_size=1, max_size=200), largest=st.sampled_from([0.0, 127.0, 3e38]))
def test_quantised_rows_are_the_references_bit_for_bit(isa: str, row: list[float], largest: float) -> None:
    x = np.array([[*row, largest]], np.float32)
    expected = reference.quantize(x)

    found = native.LinearInput(isa, x)

    assert np.array_equal(found.q, expected.q)
    assert np.array_equal(found.scale, expected.scale, equal_nan=True)
    assert np.array_equal(found.sum, expected.sum)
    assert np.array_equal(found.init, expected.init)


@each_isa
@settings(max_examples=60, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=150))
def test_bfloat16_is_rounded_to_nearest_even(isa: str, bits: list[int]) -> None:
    x = np.array([[*bits, 0x3F808000, 0x3F818000, 0x7F800001, 0x7F7FFFFF]], np.uint32).view(np.float32)

    assert np.array_equal(native.LinearInput(isa, x).bf16, reference.to_bf16(x))


@each_isa
@each_type
@settings(max_examples=15, deadline=None)
@given(**SHAPES)
def test_a_row_of_a_weight_is_rounded_once(isa: str, type_: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = Weight(rng, type_, n, k)
    row = int(rng.integers(n))

    found = native.dequantize_row(isa, type_, n, k, weight.data, row)

    assert np.array_equal(found, weight.decoded.values[row].astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_weights_with_special_scales_are_read_as_half_precision_says(isa: str) -> None:
    """Denormal, largest, infinite and NaN scales: all 65,536 bit patterns, one a row."""
    patterns = np.arange(65536, dtype="<u2")
    blocks = np.zeros((65536, 34), np.uint8)
    blocks[:, :2] = patterns[:, None].view(np.uint8)
    blocks[:, 2] = 1
    packed = pack.pack("Q8_0", blocks, 65536, 32)
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 127  # scale 1
    encoded, y = native.LinearInput(isa, x), np.empty((1, 65536), np.float32)

    native.linear(isa, 1, 65536, 32, packed, encoded, y, block0=0, block1=4096)

    with np.errstate(invalid="ignore"):
        expected = patterns.view("<f2").astype(np.float32) * 127
    assert np.array_equal(y[0], expected, equal_nan=True)
