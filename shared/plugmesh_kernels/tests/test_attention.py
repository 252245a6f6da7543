"""Paged attention of every instruction set against `ops_reference`, and what a row's result must not depend on: other rows, and keys beyond its reach."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh_kernels import ops_reference as reference

if not plugmesh_kernels.available():
    pytest.skip(plugmesh_kernels.why_not(), allow_module_level=True)

native = plugmesh_kernels.native()
ISAS = [isa for isa in plugmesh_kernels.ISAS if native.supports(isa)]
LAYERS, LAYER = 2, 1
DIMS = (16, 32, 64, 80, 128, 10, 24)  # the last two are no multiples of a register

each_isa = pytest.mark.parametrize("isa", ISAS)
each_type = pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
SHAPES = {
    "dim": st.sampled_from(DIMS),
    "heads": st.integers(1, 3),
    "group": st.integers(1, 8),
    "position": st.one_of(st.integers(0, 80), st.sampled_from([447, 496, 503, 511, 512, 513, 575, 1023, 1024, 1025])),
    "rows": st.integers(1, 24),
    "seed": st.integers(0, 2**32),
}


class Case:
    """One sequence in shuffled blocks of a memory that is otherwise full of NaN; q has rows of others before and after."""

    def __init__(self, int8, dim, heads, group, position, rows, seed, garbage=np.nan) -> None:
        rng = np.random.default_rng(seed)
        self.int8, self.dim, self.heads, self.position, self.rows = int8, dim, heads, position, rows
        self.keys = position + rows
        num_blocks = -(-self.keys // 16)
        self.head = int(rng.integers(heads))
        self.k = rng.standard_normal((self.keys, dim)).astype(np.float32)
        self.v = rng.standard_normal((self.keys, dim)).astype(np.float32)
        self.q = rng.standard_normal((rows + 2, group, dim)).astype(np.float32) * rng.choice([0.3, 1, 5])
        self.first_row = int(rng.integers(3))
        self.scale = dim**-0.5
        self.blocks = rng.permutation(num_blocks + 2)[:num_blocks].astype(np.int32)
        self.block_bytes = native.KvArray.block_bytes(LAYERS, heads, dim, int8)
        self.memory = np.full((num_blocks + 2) * self.block_bytes, 0xFF, np.uint8)
        self.fill(garbage)
        self.kv = native.KvArray(self.memory, LAYERS, heads, dim, int8)

    def fill(self, garbage) -> None:
        """Writes the keys there are; the rest of the last block is garbage."""
        room = np.full((2, len(self.blocks) * 16, self.dim), garbage, np.float32)
        room[0, : self.keys], room[1, : self.keys] = self.k, self.v
        part = self.block_bytes // LAYERS // 2
        for i, block in enumerate(self.blocks):
            for which in range(2):
                data = reference.kv_part(room[which, i * 16 : i * 16 + 16], which == 0, self.int8)
                at = int(block) * self.block_bytes + (2 * LAYER + which) * part + self.head * (part // self.heads)
                self.memory[at : at + len(data)] = data

    def split(self, isa, row0, row1, split):
        return native.attention_split(
            isa, self.kv, LAYER, self.head, self.blocks, self.first_row, self.rows, self.position, row0, row1, split,
            self.q, self.scale,
        )  # fmt: skip

    def run(self, isa, row0=0, row1=None):
        """(rows, group, D) of rows [row0, row1), over all their keys."""
        row1 = self.rows if row1 is None else row1
        acc = None
        for split in range(-(-(self.position + row1) // reference.SPLIT_KEYS)):
            part = self.split(isa, row0, row1, split)
            if acc is None:
                acc = part
            else:
                native.attention_merge(isa, *acc, *part)
        return native.attention_finish(isa, acc[1], acc[2]).reshape(row1 - row0, -1, self.dim)

    def mine(self):
        return self.q[self.first_row : self.first_row + self.rows]

    def expected(self, isa, split=None):
        q = self.mine()
        if isa == "avx512":  # rounds queries as it does keys
            q = reference.kv_rounded(q, self.int8)
        k, v = reference.kv_rounded(self.k, self.int8), reference.kv_rounded(self.v, self.int8)
        return reference.attention(q, k, v, self.position, self.scale, split)


def tolerance(isa, v):
    """Weights are rounded to bfloat16 (2^-8) with AVX-512; the others compute in float32."""
    return (2**-8 + 1e-5 if isa == "avx512" else 2e-5) * np.abs(v).max()


@each_isa
@each_type
@given(**SHAPES)
@settings(max_examples=25, deadline=None)
def test_is_the_softmax_over_all_keys_within_reach(isa, int8, dim, heads, group, position, rows, seed):
    case = Case(int8, dim, heads, group, position, rows, seed)

    np.testing.assert_allclose(case.run(isa), case.expected(isa), rtol=0, atol=tolerance(isa, case.v))


@each_isa
@each_type
@pytest.mark.parametrize("position", [500, 511, 512, 1020])
def test_a_split_covers_its_own_keys_only(isa, int8, position):
    case = Case(int8, 64, 2, 3, position, 9, position)
    for split in range(4):
        _, total, out = case.split(isa, 0, 9, split)
        some = case.position + np.arange(9) + 1 > split * reference.SPLIT_KEYS
        shown = np.zeros_like(out)
        shown[some] = out[some] / total[some, :, None]

        np.testing.assert_allclose(shown, case.expected(isa, split), rtol=0, atol=tolerance(isa, case.v))


@each_isa
@each_type
def test_a_row_without_a_key_in_a_split_has_an_empty_partial(isa, int8):
    case = Case(int8, 64, 1, 2, 508, 8, 1)
    top, total, out = case.split(isa, 0, 8, 1)  # rows 0 to 3 end at key 511

    assert np.isneginf(top[:4]).all() and (total[:4] == 0).all() and (out[:4] == 0).all()
    assert np.isfinite(top[4:]).all() and (total[4:] > 0).all()


@each_isa
@each_type
@given(**SHAPES, data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_row_gets_the_same_bits_alone_and_in_any_tile(isa, int8, dim, heads, group, position, rows, seed, data):
    case = Case(int8, dim, heads, group, position, rows, seed)
    together = case.run(isa)
    row0 = data.draw(st.integers(0, rows - 1))
    row1 = data.draw(st.integers(row0 + 1, rows))

    np.testing.assert_array_equal(together[row0:row1].view(np.uint32), case.run(isa, row0, row1).view(np.uint32))
    np.testing.assert_array_equal(together[row0].view(np.uint32), case.run(isa, row0, row0 + 1)[0].view(np.uint32))


@each_isa
@each_type
@given(**SHAPES)
@settings(max_examples=10, deadline=None)
def test_stale_keys_do_not_matter_whatever_they_are(isa, int8, dim, heads, group, position, rows, seed):
    outs = []
    for garbage in (np.nan, 0.0, -3e38, np.inf):
        case = Case(int8, dim, heads, group, position, rows, seed, garbage)
        outs.append(case.run(isa).view(np.uint32))

    for other in outs[1:]:
        np.testing.assert_array_equal(outs[0], other)


@each_isa
@each_type
@given(**SHAPES, bad=st.sampled_from([np.nan, np.inf]), data=st.data())
@settings(max_examples=10, deadline=None)
def test_what_is_not_finite_in_a_key_reaches_the_rows_that_see_it(
    isa, int8, dim, heads, group, position, rows, seed, bad, data
):
    """Rows before that key share its tile, its block and its token pair, and must not notice."""
    case = Case(int8, dim, heads, group, position, rows, seed)
    clean = case.run(isa)
    row = data.draw(st.integers(0, rows - 1))
    (case.k if data.draw(st.booleans()) else case.v)[position + row] = bad
    case.fill(np.nan)
    out = case.run(isa)

    np.testing.assert_array_equal(clean[:row].view(np.uint32), out[:row].view(np.uint32))
    assert not np.isfinite(out[row:]).all(axis=(1, 2)).any()


@each_isa
@each_type
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_a_query_stays_in_its_row_and_head(isa, int8, bad):
    case = Case(int8, 64, 1, 3, 600, 10, 7)
    clean = case.run(isa)
    case.q[case.first_row + 4, 1, 5] = bad
    out = case.run(isa)

    assert np.isnan(out[4, 1]).all()
    untouched = np.ones((10, 3), bool)
    untouched[4, 1] = False
    np.testing.assert_array_equal(clean[untouched].view(np.uint32), out[untouched].view(np.uint32))


@each_isa
@each_type
def test_large_scores_neither_overflow_nor_vanish(isa, int8):
    """One key wins by thousands; the running maximum moves from tile to tile."""
    case = Case(int8, 64, 1, 2, 700, 3, 3)
    case.k[::97] *= 50
    case.q *= 40
    case.fill(np.nan)

    np.testing.assert_allclose(case.run(isa), case.expected(isa), rtol=0, atol=10 * tolerance(isa, case.v))


@each_isa
@each_type
@given(dim=st.sampled_from(DIMS), heads=st.integers(1, 3), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_append_writes_the_documented_bytes_and_no_others(isa, int8, dim, heads, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 16, dim)).astype(np.float32) * rng.choice([1e-3, 1, 100])
    x[0, 3, 0] = np.nan
    x[1, 5] = 0
    head = int(rng.integers(heads))
    size = native.KvArray.block_bytes(LAYERS, heads, dim, int8)
    memory = np.full(3 * size, 0xA5, np.uint8)
    expected = memory.copy()
    kv = native.KvArray(memory, LAYERS, heads, dim, int8)
    for token in rng.permutation(16):
        native.kv_append(isa, kv, LAYER, head, 1, int(token), x[0, token], x[1, token])
    part = size // LAYERS // 2
    for which in range(2):
        data = reference.kv_part(x[which], which == 0, int8)
        if int8 and which:
            data = data[: 64 + 16 * dim]
        at = size + (2 * LAYER + which) * part + head * (part // heads)
        expected[at : at + len(data)] = data

    if not int8:  # which NaN is stored is open
        nan = np.isnan((expected.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
        assert np.isnan((memory.view(np.uint16).astype(np.uint32) << 16).view(np.float32))[nan].all()
        memory.view(np.uint16)[nan] = expected.view(np.uint16)[nan]
    np.testing.assert_array_equal(expected, memory)


@each_isa
def test_a_partial_merges_into_nothing_as_a_copy(isa):
    """What an accumulator without a maximum holds is not read: it may never have been written."""
    top, total, out = np.array([2.0], np.float32), np.array([3.0], np.float32), np.array([[1.0, 2.0]], np.float32)
    acc = [np.full(1, -np.inf, np.float32), np.full(1, np.nan, np.float32), np.full((1, 2), np.nan, np.float32)]
    native.attention_merge(isa, *acc, top, total, out)

    assert (2.0, 3.0, [1.0, 2.0]) == (acc[0][0], acc[1][0], acc[2][0].tolist())
    native.attention_merge(isa, *acc, np.full(1, -np.inf, np.float32), total, np.full((1, 2), np.nan, np.float32))

    assert (2.0, 3.0, [1.0, 2.0]) == (acc[0][0], acc[1][0], acc[2][0].tolist())
