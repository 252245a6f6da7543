"""The compiled attention against the slow one, and what a row sees: by its position, whatever the encoder's thread does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.testing.conformance.kv_codec import exact_attention
from plugmesh_engine.batch import Rows
from plugmesh_million import native, pq, train
from plugmesh_million.codec import MillionKv, OpenBlocks
from plugmesh_million.tests import made

CONFIG = made.CONFIG
BOOKS = made.books(CONFIG, train.Recipe("head", iterations=3))
LAYERS = CONFIG.num_layers
needs_native = pytest.mark.skipif(native.library() is None, reason="no compiler or processor for the compiled code")
Sequence3 = tuple[np.ndarray, np.ndarray, np.ndarray]


def feed(codec: MillionKv, sequence: Sequence3, start: int, end: int, blocks: Sequence[int], num_wanted: int = 0) -> np.ndarray:
    """One step of one sequence; (layers, rows, heads, D)."""
    codec.plan([Rows([0] * (end - start), start, blocks, num_wanted)])
    outs = []
    for layer in range(LAYERS):
        q, k, v = (x[start:end] * (1 + layer) for x in sequence)
        outs.append(np.full(q.shape, np.nan, np.float32))
        codec.attend(layer, q, k, v, outs[-1])
    return np.stack(outs)


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def seen(sequence: Sequence3, layer: int, end: int) -> np.ndarray:
    """What a row at end - 1 should see: K and V of all positions (2, end, kv_heads, D), as codes up to its block and rounded from there on."""
    kv = np.stack([pq.round_bfloat16(x[:end] * (1 + layer)) for x in sequence[1:]])
    closed = (end - 1) // 16 * 16
    for part in range(2):
        for g in range(CONFIG.num_kv_heads):
            book = pq.widen(BOOKS.centroids[BOOKS.index[layer, part, g]])
            kv[part, :closed, g] = pq.decode(pq.encode(kv[part, :closed, g], book), book)
    return kv


@needs_native
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 527, 1100])
def test_the_compiled_attention_is_that_of_the_decoded_rows(length: int) -> None:
    sequence, blocks = made.rows(CONFIG, length, 1), list(range(1, 2 + length // 16))
    blocks.reverse()
    codec = made.codec(BOOKS, num_blocks=80)
    whole = feed(codec, sequence, 0, length, blocks)
    codec.close()

    for layer in range(LAYERS):
        for end in {1, length // 2 + 1, length}:
            k, v = seen(sequence, layer, end)
            want = exact_attention(sequence[0][end - 1 : end] * (1 + layer), k, v)
            assert error(whole[layer, end - 1 : end], want) < 5e-3  # weights are rounded to 8 bits, table entries to 16


@needs_native
def test_the_numpy_form_gives_the_same_codes_and_nearly_the_same_output() -> None:
    sequence = made.rows(CONFIG, 90, 2)
    fast, slow = made.codec(BOOKS), made.codec(BOOKS, is_native=False)
    outs = []
    for codec in (fast, slow):
        parts = [feed(codec, sequence, a, b, [3, 1, 2, 5, 4, 6]) for a, b in ((0, 20), (20, 21), (21, 22), (22, 60), (60, 90))]
        outs.append(np.concatenate(parts, axis=1))
    codes = [np.stack([np.frombuffer(c.memory.read(b), np.uint8) for b in range(7)]) for c in (fast, slow)]

    assert slow.capsule is None
    assert (codes[0] != codes[1]).mean() < 1e-4  # a tie may fall the other way
    assert error(*outs) < 5e-3
    assert fast.layout == slow.layout
    fast.close()
    slow.close()


@needs_native
@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 24), st.sampled_from([0, 0, 0.002]), st.booleans()), min_size=1, max_size=7), st.integers(0, 99))
def test_neither_chunks_nor_the_encoders_timing_change_a_bit(steps: list[tuple[int, float, bool]], seed: int) -> None:
    """Chunks of any size, some of them drafts of which the last ones are taken back, with an encoder that is on time, late or not there."""
    total = sum(n for n, _, _ in steps)
    sequence, other = made.rows(CONFIG, total, seed), made.rows(CONFIG, total + 8, seed + 1)
    blocks = [9, 4, 7, 1, 12, 3, 5, 2, 8, 6, 11, 10]
    whole_codec = made.codec(BOOKS, asynchronous=False)
    whole = feed(whole_codec, sequence, 0, total, blocks)
    codec, at, parts = made.codec(BOOKS), 0, []
    for n, delay, is_draft in steps:
        codec.set_delay(delay)
        if is_draft:  # row `at` is right, those behind it are not
            wrong = tuple(np.concatenate((x[: at + 1], y[at + 1 :])) for x, y in zip(sequence, other, strict=True))
            parts.append(feed(codec, wrong, at, at + 5, blocks, 5)[:, :1])  # type: ignore[arg-type] # three arrays
            at += 1
            n -= 1
        if n:
            parts.append(feed(codec, sequence, at, at + n, blocks))
            at += n
    bytes_of = [[bytes(c.memory.read(b)) for b in blocks[: total // 16]] for c in (codec, whole_codec)]

    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    assert bytes_of[0] == bytes_of[1]
    codec.close()
    whole_codec.close()


@needs_native
def test_rows_of_open_blocks_are_encoded_on_the_encoders_thread() -> None:
    sequence, codec = made.rows(CONFIG, 40, 3), made.codec(BOOKS)
    feed(codec, sequence, 0, 20, [1, 2, 3])
    for at in range(20, 40):
        feed(codec, sequence, at, at + 1, [1, 2, 3])
    codec.memory.read(3)
    rows, _ = codec.counts()
    codec.close()

    assert rows == 4 + 20  # rows 0 to 15 were read as codes within their step


@needs_native
def test_a_step_that_stops_half_way_leaves_the_codes_of_the_layers_that_it_did() -> None:
    """As `probe` does: the first layer is computed in chunks that later ones read, and nothing behind it."""
    sequence = made.rows(CONFIG, 40, 4)
    codec, plain = made.codec(BOOKS), made.codec(BOOKS, asynchronous=False)
    outs = []
    for c in (codec, plain):
        for start, end in ((0, 10), (10, 25), (25, 40)):
            c.plan([Rows([0] * (end - start), start, [1, 2, 3])])
            out = np.empty_like(sequence[0][start:end])
            c.attend(0, *(x[start:end] for x in sequence), out)
        outs.append((out, bytes(c.memory.read(2)), bytes(c.memory.read(3))))
        c.close()

    assert np.array_equal(outs[0][0], outs[1][0])
    assert outs[0][1:] == outs[1][1:]


def test_a_prefix_of_closed_blocks_continues_bit_by_bit_elsewhere() -> None:
    """What the prefix cache, the kvstore and a remote prefill do."""
    sequence = made.rows(CONFIG, 50, 5)
    first, second = made.codec(BOOKS), made.codec(BOOKS)
    want = feed(first, sequence, 0, 50, [1, 2, 3, 4])[:, 32:]
    for source, target in ((1, 20), (2, 30)):
        second.memory.write(target, bytes(first.memory.read(source)), 16)
    got = feed(second, sequence, 32, 50, [20, 30, 40, 50])
    first.close()
    second.close()

    assert np.array_equal(got, want)


def test_books_that_differ_give_layouts_that_differ() -> None:
    """Codes of one codebook must never be read with another one."""
    centroids = BOOKS.centroids.copy()
    centroids[0, 0, 0, :2] = centroids[0, 0, 0, 1::-1]
    layouts = [made.codec(b).layout for b in (BOOKS, train.Codebooks(centroids, BOOKS.index))]

    assert layouts[0].key() != layouts[1].key()
    assert layouts[0].block_bytes == 16 * LAYERS * 2 * CONFIG.num_kv_heads * CONFIG.head_dim // 2


def test_open_blocks_are_let_go_of_as_sequences_move_on_and_beyond_the_limit() -> None:
    sequence, codec = made.rows(CONFIG, 200, 6), made.codec(BOOKS, limit=3)
    blocks = list(range(1, 14))
    feed(codec, sequence, 0, 100, blocks)
    for at in range(100, 200):
        feed(codec, sequence, at, at + 1, blocks)
    one = codec.open.num_bytes
    for i in range(10):
        feed(codec, sequence, 0, 5, [20 + i])
    size = CONFIG.num_layers * 2 * 16 * CONFIG.num_kv_heads * CONFIG.head_dim * 2

    assert one <= 3 * size
    assert codec.open.num_bytes <= 5 * size
    got = feed(codec, sequence, 5, 6, [20])  # its exact rows went: codes are read
    assert 0 < error(got, feed(codec, sequence, 5, 6, [29])) < 0.3
    codec.close()


def test_slots_of_an_open_block_are_valid_when_they_were_stored_last() -> None:
    held = OpenBlocks((1, 2, 16, 1, 16), 4)
    held.start_step()
    held.take(7, 3, 9)

    assert held.enter([7], 6) == 0b111000
    assert held.enter([7], 0) == 0
    held.take(7, 5, 6)
    assert held.enter([7], 12) == 0b111000  # what was behind slot 6 is void
    held.copy(7, 8)
    held.start_step()
    held.drop(7)
    assert (held.enter([7], 12), held.enter([8], 12)) == (0, 0b111000)
