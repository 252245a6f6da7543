"""Length-limited canonical Huffman codes of bytes: building, writing, and a reader in numpy.

No code is longer than LIMIT bits, so one look into a table of 2 ** LIMIT entries always finishes at least one symbol and no second level of tables is needed.
The price is small: a symbol that would deserve a longer code occurs less than once in 2 ** LIMIT. Bits are written from the lowest bit of a byte upwards and
codes with their first bit lowest, so a reader peeks with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LIMIT = 11  # 2048 entries of 8 bytes are half of a first-level cache, which the symbols' other bits and the output share
LOOK_SYMBOLS = 6  # most symbols that one look gives: what a table entry has room for beside its two counts
SYMBOLS = 256


@dataclass(frozen=True, slots=True)
class Code:
    """A code; `lengths` alone determine it.

    Attributes:
        lengths: (256,) uint8, bits per symbol, 0 for one that does not occur.
        words: (256,) uint16, the codes, first bit lowest.
    """

    lengths: np.ndarray
    words: np.ndarray


def code_lengths(counts: np.ndarray, limit: int = LIMIT) -> np.ndarray:
    """The lengths of an optimal code with no code above `limit` bits, (256,) uint8. A single symbol gets one bit.

    Args:
        counts: (256,) how often each symbol occurs.

    Raises:
        ValueError: More symbols than `limit` bits can tell apart.

    Source: package-merge, Larmore and Hirschberg, J. ACM 37 (1990).
    """
    symbols = [int(s) for s in np.flatnonzero(counts)]
    lengths = np.zeros(SYMBOLS, np.uint8)
    if len(symbols) > 1 << limit:
        raise ValueError(f"{len(symbols)} symbols do not fit codes of {limit} bits")
    if len(symbols) < 2:
        lengths[symbols] = 1
        return lengths
    # An item is (weight, tie breaker, symbols in it); a level pairs the cheapest items of the one below and adds the single symbols again.
    single = sorted((int(counts[s]), s, (s,)) for s in symbols)
    level: list[tuple[int, int, tuple[int, ...]]] = []
    for _ in range(limit):
        pairs = [(a[0] + b[0], SYMBOLS + i, a[2] + b[2]) for i, (a, b) in enumerate(zip(level[::2], level[1::2], strict=False))]
        level = sorted(single + pairs)
    for _, _, members in level[: 2 * len(symbols) - 2]:
        for s in members:
            lengths[s] += 1
    return lengths


def code_of(lengths: np.ndarray) -> Code:
    """The canonical code of these lengths: shorter codes first, equal ones in the order of symbols.

    Raises:
        ValueError: No complete prefix-free code has these lengths, or one is above LIMIT.
    """
    used = [int(s) for s in np.argsort(lengths, kind="stable") if lengths[s]]
    words = np.zeros(SYMBOLS, np.uint16)
    if used and int(lengths.max()) > LIMIT:
        raise ValueError(f"a code of {int(lengths.max())} bits is above {LIMIT}")
    at, previous = 0, 0
    for s in used:
        length = int(lengths[s])
        at <<= length - previous
        if at >> length:
            raise ValueError("the lengths belong to no prefix-free code")
        words[s] = int(f"{at:0{length}b}"[::-1], 2)
        at, previous = at + 1, length
    if len(used) > 1 and at != 1 << previous:
        raise ValueError("the lengths leave runs of bits that begin no code")
    return Code(lengths.astype(np.uint8), words)


def single_table(code: Code) -> tuple[np.ndarray, np.ndarray]:
    """For every run of LIMIT bits the symbol that it begins with and its length, 0 where no code begins so."""
    symbols, lengths = np.zeros(1 << LIMIT, np.uint8), np.zeros(1 << LIMIT, np.uint8)
    for s in np.flatnonzero(code.lengths):
        length = int(code.lengths[s])
        symbols[int(code.words[s]) :: 1 << length] = s
        lengths[int(code.words[s]) :: 1 << length] = length
    return symbols, lengths


def look_table(code: Code) -> np.ndarray:
    """(2048,) uint64: up to six symbols from the lowest byte upwards, then a byte of their bits together and one of their number.

    Runs that no code begins (there are some when only one symbol occurs) count as one symbol 0, so that a reader of damaged bytes ends.
    """
    symbols, lengths = single_table(code)
    runs = np.arange(1 << LIMIT)
    table, num_bits, num_symbols = np.zeros(1 << LIMIT, np.uint64), np.zeros(1 << LIMIT, np.int64), np.zeros(1 << LIMIT, np.int64)
    for i in range(LOOK_SYMBOLS):
        rest = runs >> num_bits
        fits = (lengths[rest] > 0) & (num_bits + lengths[rest] <= LIMIT) & (num_symbols == i)
        table |= np.where(fits, symbols[rest], 0).astype(np.uint64) << np.uint64(8 * i)
        num_bits += np.where(fits, lengths[rest], 0)
        num_symbols += fits
    num_bits[num_symbols == 0] = 1
    num_symbols[num_symbols == 0] = 1
    return table | num_bits.astype(np.uint64) << np.uint64(48) | num_symbols.astype(np.uint64) << np.uint64(56)


def write(symbols: np.ndarray, code: Code, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The bits of all symbols, every `chunk` of them from a byte of its own.

    Args:
        symbols: (n,) uint8.
        chunk: A multiple of 4.

    Returns:
        The bytes, and (chunks + 1,) uint32: where each chunk begins, and the end.

    Raises:
        ValueError: The bytes are too many for such offsets.
    """
    num_chunks = -(-len(symbols) // chunk)
    offsets = np.zeros(num_chunks + 1, np.int64)
    pieces: list[np.ndarray] = []
    for first in range(0, num_chunks, 1024):  # temporaries of some tens of megabytes
        part = symbols[first * chunk : (first + 1024) * chunk]
        rows = -(-len(part) // chunk)
        widths, values = np.zeros((rows * chunk,), np.uint64), np.zeros((rows * chunk,), np.uint64)
        widths[: len(part)], values[: len(part)] = code.lengths[part], code.words[part]
        # Four codes have at most 44 bits: groups of them become one number each.
        for _ in range(2):
            values = values[::2] | values[1::2] << widths[::2]
            widths = widths[::2] + widths[1::2]
        by_chunk = widths.reshape(rows, chunk // 4)
        num_bytes = (by_chunk.sum(1).astype(np.int64) + 7) // 8
        starts = np.cumsum(np.concatenate(([0], num_bytes)))
        begins = (8 * starts[:-1, None] + np.cumsum(by_chunk, 1).astype(np.int64) - by_chunk.astype(np.int64)).reshape(-1)
        words = np.zeros(int(starts[-1]) // 8 + 2, np.uint64)
        shift = (begins & 63).astype(np.uint64)
        spilled = np.where(shift > 0, values >> (np.uint64(64) - np.maximum(shift, 1).astype(np.uint64)), np.uint64(0))
        for at, bits in ((begins >> 6, values << shift), ((begins >> 6) + 1, spilled)):
            firsts = np.flatnonzero(np.diff(at, prepend=-1))
            words[at[firsts]] |= np.bitwise_or.reduceat(bits, firsts)
        pieces.append(words.view(np.uint8)[: int(starts[-1])])
        offsets[first + 1 : first + rows + 1] = offsets[first] + starts[1:]
    if offsets[-1] >> 32:
        raise ValueError(f"{int(offsets[-1])} bytes of codes are more than 32-bit offsets reach")
    return np.concatenate(pieces) if pieces else np.zeros(0, np.uint8), offsets.astype(np.uint32)


def read(data: np.ndarray, offsets: np.ndarray, code: Code, num_symbols: int, chunk: int) -> np.ndarray:
    """The symbols again, (n,) uint8: all chunks side by side, one symbol of each at a time. Where there is no compiler, and to check the native reader.

    Args:
        data: The bytes of `write`, or a part of them with offsets of its own.

    Raises:
        ValueError: A chunk does not end where the next one begins.
    """
    symbols, lengths = single_table(code)
    lengths = lengths.astype(np.int64)
    num_chunks = len(offsets) - 1
    padded = np.concatenate((data, np.zeros(8, np.uint8)))
    out = np.zeros((num_chunks, chunk), np.uint8)
    at = offsets[:-1].astype(np.int64) * 8
    sizes = np.minimum(chunk, num_symbols - chunk * np.arange(num_chunks))
    last = 8 * len(data)
    for i in range(int(sizes.max(initial=0))):
        byte = np.minimum(at, last) >> 3
        window = padded[byte].astype(np.int64) | padded[byte + 1].astype(np.int64) << 8 | padded[byte + 2].astype(np.int64) << 16
        run = window >> (at & 7) & ((1 << LIMIT) - 1)
        out[:, i] = symbols[run]
        at += np.where(i < sizes, lengths[run], 0)
    if not np.array_equal((at + 7) >> 3, offsets[1:].astype(np.int64)):
        raise ValueError("the codes do not end where they should")
    return out.reshape(-1)[:num_symbols]
