"""What every KV codec must do: attend as closely as it says, keep in a block what belongs to it, and depend on nothing else."""

from __future__ import annotations

import dataclasses
import gc
import pathlib
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh.records import KvCodecContext, KvCodecRecord
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.types import BLOCK_TOKENS, ModelConfig, SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import Rows
from plugmesh_engine.testing import model_in_memory, random_weights, run_to_end, tiny_config
from plugmesh_engine.testing_plugins import MemorySource, write_packed

VERSION = "conformance"


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The textbook's, of the last T rows of a sequence: q (T, heads, D), k and v (L, kv_heads, D) of all L positions."""
    t, heads, d = q.shape
    length, kv_heads, _ = k.shape
    keys, values = (np.repeat(x.astype(np.float64), heads // kv_heads, axis=1) for x in (k, v))
    scores = np.einsum("thd,lhd->htl", q.astype(np.float64), keys) / np.sqrt(d)
    scores[:, np.arange(length)[None, :] > np.arange(length - t, length)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("htl,lhd->thd", weights / weights.sum(-1, keepdims=True), values).astype(np.float32)


class KvCodecConformance(RecordConformance):
    """Drives a codec with made-up K and V, and engines with it.

    Attributes:
        config: Of the model, head_dim 64 as in the default model.
        max_error: Of the attention's output against the textbook, as a share of the output's root mean square: about 0.002 for float16, 0.02 for int8.
        max_chunk_error: The same, for one and the same row in other chunks and other company. 0 asks for equal bits. A codec that keeps recent rows in
            another form than older ones may need more.
    """

    kind = "kv_codecs"
    config: ClassVar[ModelConfig] = tiny_config(hidden_size=256, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=64, max_position=1024)
    max_error: ClassVar[float] = 0.2
    max_chunk_error: ClassVar[float] = 0.0

    # -- to be overridden where a codec is trained

    def context(self, num_blocks: int = 64, num_threads: int = 1) -> KvCodecContext:
        return KvCodecContext(self.config, VERSION, num_blocks, num_threads)

    def rows(self, num_tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k, v of a sequence; keys with a few strong channels, as models have them."""
        c, rng = self.config, np.random.default_rng(seed)
        k = rng.standard_normal((num_tokens, c.num_kv_heads, c.head_dim)).astype(np.float32)
        k[..., :2] *= 4
        q, v = (rng.standard_normal((num_tokens, heads, c.head_dim)).astype(np.float32) for heads in (c.num_heads, c.num_kv_heads))
        return q, k, v

    # -- helpers

    @pytest.fixture
    def codec(self, record: KvCodecRecord) -> Any:
        made = record.build(self.context())
        yield made
        made.close()

    @staticmethod
    def feed(codec: Any, parts: Sequence[tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int, int, Sequence[int]]], num_layers: int) -> list[np.ndarray]:
        """One step: per part the sequence, its first and last position, and its blocks. Gives the last layer's output per part; layers see different values."""
        codec.plan([Rows([0] * (end - start), start, blocks) for _, start, end, blocks in parts])
        out = np.empty(0)
        for layer in range(num_layers):
            q, k, v = (np.concatenate([s[i][start:end] * (1 + layer) for s, start, end, _ in parts]) for i in range(3))
            out = np.full(q.shape, np.nan, np.float32)
            codec.attend(layer, q, k, v, out)
        ends = np.cumsum([end - start for _, start, end, _ in parts])
        return np.split(out, ends[:-1])

    def want(self, sequence: tuple[np.ndarray, np.ndarray, np.ndarray], start: int, end: int) -> np.ndarray:
        q, k, v = (x * self.config.num_layers for x in sequence)
        return exact_attention(q[start:end], k[:end], v[:end])

    @staticmethod
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))

    # -- the layout

    def test_the_layout_is_the_codecs_own_and_tells_the_exact_size(self, record: KvCodecRecord, codec: Any) -> None:
        layout = codec.layout

        assert layout.model == VERSION
        assert layout.codec not in ("raw", "native-bf16", "native-int8")
        assert 0 < len(layout.codec) <= 32
        assert layout.block_tokens == BLOCK_TOKENS
        assert len(codec.memory.read(3)) == layout.block_bytes
        again = record.build(self.context())
        assert again.layout == layout
        again.close()

    # -- the attention

    @pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 70, 530])
    def test_the_output_is_as_close_to_the_textbook_as_the_codec_says(self, codec: Any, num_tokens: int) -> None:
        sequence, blocks = self.rows(num_tokens, 1), range(1, 2 + num_tokens // BLOCK_TOKENS)
        (got,) = self.feed(codec, [(sequence, 0, num_tokens, list(blocks))], self.config.num_layers)

        assert np.isfinite(got).all()
        assert self.distance(got, self.want(sequence, 0, num_tokens)) <= self.max_error

    def test_chunks_and_company_do_not_change_a_row(self, codec: Any) -> None:
        a, b = self.rows(75, 2), self.rows(50, 3)
        (whole,) = self.feed(codec, [(a, 0, 75, [1, 2, 3, 4, 5])], self.config.num_layers)
        first, _ = self.feed(codec, [(a, 0, 7, [9, 8, 7, 6, 10]), (b, 0, 33, [11, 12, 13, 14])], self.config.num_layers)
        _, second = self.feed(codec, [(b, 33, 34, [11, 12, 13, 14]), (a, 7, 40, [9, 8, 7, 6, 10])], self.config.num_layers)
        (third,) = self.feed(codec, [(a, 40, 41, [9, 8, 7, 6, 10])], self.config.num_layers)
        _, last, _ = self.feed(codec, [(b, 34, 35, [11, 12, 13, 14]), (a, 41, 75, [9, 8, 7, 6, 10]), (b, 0, 9, [15])], self.config.num_layers)

        assert self.distance(np.concatenate((first, second, third, last)), whole) <= self.max_chunk_error

    def test_what_was_stored_last_counts(self, codec: Any) -> None:
        """Rows of rejected drafts, and of a step that failed, are stored again with other values."""
        wrong, right = self.rows(40, 4), self.rows(40, 5)
        mixed = tuple(np.concatenate((right[i][:20], wrong[i][20:30])) for i in range(3))
        self.feed(codec, [(right, 0, 20, [1, 2, 3])], self.config.num_layers)
        self.feed(codec, [(mixed, 20, 30, [1, 2, 3])], self.config.num_layers)  # type: ignore[list-item] # three arrays
        (got,) = self.feed(codec, [(right, 20, 40, [1, 2, 3])], self.config.num_layers)
        self.feed(codec, [(right, 0, 20, [4, 5, 6])], self.config.num_layers)
        (want,) = self.feed(codec, [(right, 20, 40, [4, 5, 6])], self.config.num_layers)

        assert self.distance(got, want) <= self.max_chunk_error

    def test_keys_that_are_zero_equal_or_huge_stay_finite(self, codec: Any) -> None:
        for scale, seed in ((0.0, 1), (1e-20, 2), (1e3, 3)):
            q, k, v = self.rows(33, seed)
            (got,) = self.feed(codec, [((q, k * scale, v), 0, 33, [1, 2, 3])], self.config.num_layers)
            assert np.isfinite(got).all()
        q, k, v = self.rows(33, 4)
        (got,) = self.feed(codec, [((q, k, np.ones_like(v)), 0, 33, [1, 2, 3])], self.config.num_layers)
        assert np.abs(got / self.config.num_layers - 1).max() <= max(self.max_error, 1e-3)

    def test_numbers_that_are_not_finite_stay_in_their_sequence_and_are_noticed(self, codec: Any) -> None:
        bad, good = self.rows(20, 6), self.rows(20, 7)
        bad[1][5] = np.nan
        (want,) = self.feed(codec, [(good, 0, 20, [1, 2])], self.config.num_layers)
        with np.errstate(all="ignore"):
            got_bad, got = self.feed(codec, [(bad, 0, 20, [3, 4]), (good, 0, 20, [1, 2])], self.config.num_layers)

        assert self.distance(got, want) <= self.max_chunk_error
        assert codec.memory.all_finite([1, 2])
        assert not codec.memory.all_finite([3]) or not np.isfinite(got_bad[5:]).all()

    # -- the memory

    def test_a_block_means_the_same_wherever_its_bytes_are_written(self, record: KvCodecRecord, codec: Any) -> None:
        sequence = self.rows(48, 8)
        self.feed(codec, [(sequence, 0, 40, [1, 2, 3])], self.config.num_layers)
        exported = [bytes(codec.memory.read(b)) for b in (1, 2, 3)]
        (want,) = self.feed(codec, [(sequence, 40, 48, [1, 2, 3])], self.config.num_layers)
        other = record.build(self.context())
        for block, data, num_tokens in zip((7, 5, 6), exported, (16, 16, 8), strict=True):
            other.memory.write(block, data, num_tokens)
        assert [bytes(other.memory.read(b)) for b in (7, 5, 6)] == exported
        (got,) = self.feed(other, [(sequence, 40, 48, [7, 5, 6])], self.config.num_layers)
        other.close()

        assert self.distance(got, want) <= self.max_chunk_error

    def test_rows_beyond_the_imported_ones_are_as_if_never_written(self, codec: Any) -> None:
        sequence = self.rows(16, 9)
        codec.memory.zero(1)
        codec.memory.zero(2)
        self.feed(codec, [(sequence, 0, 16, [1])], self.config.num_layers)
        self.feed(codec, [(sequence, 0, 5, [2])], self.config.num_layers)
        codec.memory.write(1, bytes(codec.memory.read(1)), 5)

        assert bytes(codec.memory.read(1)) == bytes(codec.memory.read(2))

    def test_copies_are_apart_and_zeroed_blocks_are_equal(self, codec: Any) -> None:
        sequence, other = self.rows(20, 10), self.rows(20, 11)
        self.feed(codec, [(sequence, 0, 10, [1])], self.config.num_layers)
        codec.memory.copy(1, 2)
        mixed = tuple(np.concatenate((sequence[i][:10], other[i][10:])) for i in range(3))
        self.feed(codec, [(mixed, 10, 15, [2])], self.config.num_layers)  # type: ignore[list-item] # three arrays
        (got,) = self.feed(codec, [(sequence, 10, 15, [1])], self.config.num_layers)
        codec.memory.zero(3)
        self.feed(codec, [(sequence, 0, 15, [4])], self.config.num_layers)
        codec.memory.zero(4)

        assert self.distance(got, self.want(sequence, 10, 15)) <= self.max_error
        assert bytes(codec.memory.read(3)) == bytes(codec.memory.read(4)) == bytes(codec.memory.read(0))
        assert codec.memory.all_finite([0, 1, 2, 3, 4])

    def test_the_memory_is_let_go_of(self, record: KvCodecRecord) -> None:
        codec = record.build(self.context())
        self.feed(codec, [(self.rows(20, 1), 0, 20, [1, 2])], self.config.num_layers)
        codec.close()
        seen = [weakref.ref(x) for x in (codec, codec.memory) if hasattr(type(x), "__weakref__")]
        assert seen, "a codec or its memory must be weakly referable (no __slots__ without __weakref__)"
        del codec
        gc.collect()

        assert [r for r in seen if r() is not None] == []

    # -- in engines

    def engine(self, model: Any, record: KvCodecRecord, **settings: Any) -> Engine:
        executor = "native" if type(model).__name__ == "NativeModel" else "torch"
        return Engine(model, EngineConfig(**{"executor": executor, "dtype": "float32", "num_blocks": 64, "num_threads": 1, **settings}), kv_codec=record)

    def model(self, kind: str, folder: pathlib.Path) -> Any:
        """A small model whose version is VERSION."""
        weights = random_weights(self.config, seed=5)
        if kind == "torch":
            return model_in_memory(self.config, weights, version=VERSION)
        if not plugmesh_kernels.available():
            pytest.skip("no native kernels")
        from plugmesh_engine.executors import native

        return dataclasses.replace(native.load(write_packed(folder, MemorySource(self.config, weights))), version=VERSION)

    @pytest.mark.parametrize("kind", ["native", "torch"])
    def test_requests_share_blocks_wait_for_memory_and_leave_nothing_behind(self, record: KvCodecRecord, tmp_path: pathlib.Path, kind: str) -> None:
        model = self.model(kind, tmp_path)
        long = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        rng = np.random.default_rng(3)
        requests = [EngineRequest(f"r{i}", tuple(rng.integers(0, self.config.vocab_size, n).tolist()), long) for i, n in enumerate((37, 5, 50, 16))]
        large, small = self.engine(model, record), self.engine(model, record, num_blocks=9, max_tokens_per_step=24)
        want, got = run_to_end(large, *requests), run_to_end(small, *requests)
        siblings = EngineRequest("n", requests[1].token_ids, dataclasses.replace(long, num_sequences=2))
        twice = run_to_end(large, siblings, dataclasses.replace(requests[2], request_id="again"))
        stats = [e.stats() for e in (large, small)]
        large.close()
        small.close()

        assert stats[1].num_preemptions > 0
        assert stats[0].prefix_hit_tokens > 0
        assert [(s.kv_blocks_leaked, s.kv_blocks_used) for s in stats] == [(0, 0)] * 2
        if self.max_chunk_error == 0 and kind == "native":  # torch's own sums depend on the number of rows
            assert got == want
            assert twice == {"n": want["r1"] * 2, "again": want["r2"]}
        assert all(len(tokens) == 24 for found in (want, got, twice) for sequences in found.values() for tokens in sequences)

    def test_the_capsule_computes_what_attend_does_on_any_number_of_threads(self, record: KvCodecRecord, tmp_path: pathlib.Path) -> None:
        probe = record.build(self.context())
        has_capsule = getattr(probe, "capsule", None) is not None
        probe.close()
        if not has_capsule:
            pytest.skip("this codec has no capsule here")
        native, torch = self.model("native", tmp_path), self.model("torch", tmp_path)
        ids = np.random.default_rng(4).integers(0, self.config.vocab_size, 90).tolist()

        def logits(model: Any, executor: str, num_threads: int) -> np.ndarray:
            config = EngineConfig(executor=executor, dtype="float32", num_blocks=32, num_threads=num_threads)
            e = model.build_executor(config, record)
            e.run([Rows(ids[:60], 0, [1, 2, 3, 4, 5, 6]), Rows(ids[:20], 0, [7, 8])])
            found: np.ndarray = e.run([Rows(ids[20:21], 20, [7, 8], 1, True), Rows(ids[60:], 60, [1, 2, 3, 4, 5, 6], 1, True)]).logits.copy()
            e.close()
            return found

        one, two, three = (logits(native, "native", n) for n in (1, 2, 3))
        plain = logits(torch, "torch", 1)

        assert np.array_equal(one, two)
        assert np.array_equal(one, three)
        assert self.distance(one, plain) <= max(0.02, self.max_chunk_error)
