"""The code: optimal under its limit, canonical, and the same symbols come back, bit by bit and by tables."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh_dfloat11 import huffman

counts_of = st.dictionaries(st.integers(0, 255), st.integers(1, 10**9), max_size=256)


def array(counts: dict[int, int]) -> np.ndarray:
    found = np.zeros(256, np.int64)
    for symbol, count in counts.items():
        found[symbol] = count
    return found


def huffman_cost(counts: dict[int, int]) -> int:
    """Bits of all symbols under the textbook's code, which has no limit."""
    heap, cost = list(counts.values()), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        cost += joined
        heapq.heappush(heap, joined)
    return cost


def read_bits(data: np.ndarray, code: huffman.Code, num: int) -> list[int]:
    """Bit by bit, from a dictionary of codes."""
    known = {f"{int(code.words[s]):0{code.lengths[s]}b}"[::-1]: int(s) for s in np.flatnonzero(code.lengths)}
    found, run = [], ""
    for bit in np.unpackbits(data, bitorder="little"):
        run += str(bit)
        if run in known:
            found.append(known[run])
            run = ""
        if len(found) == num:
            break
    return found


@given(counts_of)
@settings(max_examples=60, deadline=None)
def test_lengths_make_a_complete_prefix_code_that_is_optimal_where_the_limit_does_not_bind(counts):
    lengths = huffman.code_lengths(array(counts))
    used = lengths[lengths > 0].astype(int)

    assert set(np.flatnonzero(lengths)) == set(counts)
    assert len(used) == 0 or used.max() <= huffman.LIMIT
    if len(counts) > 1:
        assert sum(2.0**-n for n in used) == 1
        cost = sum(int(lengths[s]) * n for s, n in counts.items())
        unlimited = huffman.code_lengths(array(counts), limit=64)
        best = huffman_cost(counts)
        assert cost >= best == sum(int(unlimited[s]) * n for s, n in counts.items())
        if unlimited.max() <= huffman.LIMIT:
            assert cost == best


def test_counts_of_fibonacci_run_into_the_limit_and_stay_decodable():
    counts = np.zeros(256, np.int64)
    counts[:40] = [1, 1] + [0] * 38
    for i in range(2, 40):
        counts[i] = counts[i - 1] + counts[i - 2]
    assert huffman.code_lengths(counts, limit=64).max() == 39
    code = huffman.code_of(huffman.code_lengths(counts))
    symbols = np.arange(40, dtype=np.uint8).repeat(3)
    data, offsets = huffman.write(symbols, code, 16)

    assert code.lengths.max() == huffman.LIMIT
    assert huffman.read(data, offsets, code, len(symbols), 16).tolist() == symbols.tolist()


def test_lengths_that_belong_to_no_code_are_refused():
    lengths = np.zeros(256, np.uint8)
    lengths[:3] = 1
    with pytest.raises(ValueError, match="no prefix-free code"):
        huffman.code_of(lengths)
    lengths[:3] = 2
    with pytest.raises(ValueError, match="begin no code"):
        huffman.code_of(lengths)
    lengths[:3] = 12
    with pytest.raises(ValueError, match="above 11"):
        huffman.code_of(lengths)


@given(st.lists(st.integers(0, 255), max_size=300), st.sampled_from([4, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_bit_by_bit_and_by_tables(symbols, chunk):
    given_ = np.array(symbols, np.uint8)
    code = huffman.code_of(huffman.code_lengths(np.bincount(given_, minlength=256)))
    data, offsets = huffman.write(given_, code, chunk)

    assert huffman.read(data, offsets, code, len(symbols), chunk).tolist() == symbols
    for i in range(len(offsets) - 1):
        part = symbols[i * chunk : (i + 1) * chunk]
        assert read_bits(data[offsets[i] : offsets[i + 1]], code, len(part)) == part
    assert len(data) * 8 - sum(int(code.lengths[s]) for s in symbols) < 8 * max(1, len(offsets) - 1)


@given(counts_of.filter(len))
@settings(max_examples=30, deadline=None)
def test_an_entry_of_the_table_is_what_single_steps_give(counts):
    code = huffman.code_of(huffman.code_lengths(array(counts)))
    symbols, lengths = huffman.single_table(code)
    table = huffman.look_table(code)
    for run in range(0, 2048, 37):
        found, bits = [], 0
        while len(found) < 6 and lengths[run >> bits] and bits + lengths[run >> bits] <= 11:
            found.append(int(symbols[run >> bits]))
            bits += int(lengths[run >> bits])
        entry = int(table[run])
        if found:
            assert ([entry >> 8 * i & 0xFF for i in range(len(found))], entry >> 48 & 0xFF, entry >> 56) == (found, bits, len(found))
        else:
            assert (entry >> 48 & 0xFF, entry >> 56) == (1, 1)
