"""A plugin's KV codec in the place of an executor's own KV: through chunks, forks, preemption, imports, and errors of its own."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh.errors import ConfigError, PluginError
from plugmesh.records import KvCodecContext, KvCodecRecord
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import Rows
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.requests import KvSource
from plugmesh_engine.testing import model_in_memory, random_weights, run_to_end, steps, tiny_config
from plugmesh_engine.testing_plugins import HalfRows, MemorySource, half_rows, write_packed

CONFIG = tiny_config(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
EXECUTORS = [
    pytest.param("native", marks=pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")),
    "torch",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(CONFIG, seed=5)


@pytest.fixture(scope="module", params=EXECUTORS)
def model(request, weights, tmp_path_factory):
    return native_model(tmp_path_factory.mktemp("native"), weights) if request.param == "native" else model_in_memory(CONFIG, weights)


def native_model(folder: pathlib.Path, weights: dict[str, np.ndarray]):
    from plugmesh_engine.executors import native

    return native.load(write_packed(folder, MemorySource(CONFIG, weights)))


def engine(model, codec=None, **settings) -> Engine:
    executor = "native" if type(model).__name__ == "NativeModel" else "torch"
    config = EngineConfig(**{"executor": executor, "dtype": "float32", "num_blocks": 64, "num_threads": 1, **settings})
    return Engine(model, config, kv_codec=codec or half_rows())


def prompt(n: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, CONFIG.vocab_size, n).tolist())


def test_a_step_in_chunks_beside_others_equals_the_textbook(model, weights):
    reference = ReferenceLlama(CONFIG, weights)
    e = model.build_executor(EngineConfig(executor="auto", dtype="float32", num_blocks=16, num_threads=1), half_rows())
    a, b = prompt(41, 1), prompt(20, 2)
    e.run([Rows(a[:17], 0, [1, 2, 3]), Rows(b[:1], 0, [4, 5])])
    e.run([Rows(b[1:19], 1, [4, 5]), Rows(a[17:40], 17, [1, 2, 3])])
    result = e.run([Rows(a[40:], 40, [1, 2, 3], 1, True), Rows(b[19:], 19, [4, 5], 1, True)])

    for got, tokens in zip(result.logits, (a, b), strict=True):
        want = reference.next_logits(tokens)
        assert np.abs(got - want).max() < 0.01 * want.std()
    e.close()


def test_requests_come_out_as_without_the_codec_and_leave_nothing_behind(model, weights):
    """Chunked prompts, siblings that share and then copy a half-filled block, a pool so small that some are preempted, and the prefix cache."""
    reference = ReferenceLlama(CONFIG, weights)
    e = engine(model, num_blocks=10, max_tokens_per_step=24)
    long = dataclasses.replace(GREEDY, max_tokens=30)
    prompts = {f"r{i}": prompt(n, i) for i, n in enumerate((37, 5, 50, 16, 33))}
    requests = [EngineRequest(name, ids, long) for name, ids in prompts.items()]
    tokens = run_to_end(e, *requests)

    for name, ids in prompts.items():
        assert tokens[name] == [reference.greedy(ids, 30)]
    again = run_to_end(e, EngineRequest("again", prompts["r2"], long), EngineRequest("two", prompts["r1"], dataclasses.replace(long, num_sequences=2)))
    assert again == {"again": tokens["r2"], "two": tokens["r1"] * 2}
    stats = e.stats()
    assert (stats.num_preemptions > 0, stats.prefix_hit_tokens > 0, stats.kv_blocks_leaked, stats.kv_blocks_used) == (True, True, 0, 0)
    codec = e._executor.memory
    e.close()
    assert codec.is_closed


def test_blocks_travel_between_engines_as_bytes_of_the_layout(model):
    ids = prompt(40, 7)
    first = engine(model)
    first.add(EngineRequest("p", ids, GREEDY, prefill_only=True))
    ready = [b for o in steps(first) for b in o.blocks_ready]
    exported = [KvSource(b.block_id, b.num_tokens, bytes(first.export_block("p", b.block_index))) for b in ready]
    want = run_to_end(first, EngineRequest("whole", ids, GREEDY))["whole"]
    second = engine(model)
    second.add(EngineRequest("d", ids, GREEDY, kv=tuple(exported)))
    out = steps(second)

    assert {len(s.data) for s in exported} == {second.layout.block_bytes}
    assert [t.token_id for o in out for e in o.tokens for t in e.tokens] == want[0]
    assert second.stats().num_imported_tokens >= 32
    first.close()
    second.close()


def test_the_layout_is_the_codecs_and_never_that_of_the_executors_own_kv(model):
    own, with_codec = engine_without_codec(model), engine(model)

    assert with_codec.layout.codec == "half-rows"
    assert with_codec.layout.key() != own.layout.key()
    own.close()
    with_codec.close()


def engine_without_codec(model) -> Engine:
    executor = "native" if type(model).__name__ == "NativeModel" else "torch"
    return Engine(model, EngineConfig(executor=executor, dtype="float32", num_blocks=8, num_threads=1))


class Failing(HalfRows):
    """Fails on steps with a sequence at position 20."""

    def plan(self, rows):
        if any(r.num_computed <= 20 < r.num_computed + len(r.token_ids) for r in rows):
            raise RuntimeError("no codes")
        super().plan(rows)


class FailingLater(HalfRows):
    def attend(self, layer, q, k, v, out):
        if layer == 1 and any(r.num_computed <= 20 < r.num_computed + len(r.token_ids) for r in self._rows):
            raise RuntimeError("no codes")
        super().attend(layer, q, k, v, out)


@pytest.mark.parametrize("codec", [Failing, FailingLater])
def test_an_error_in_the_codec_ends_the_sequence_that_it_is_about_and_no_other(model, codec):
    e = engine(model, KvCodecRecord("failing", codec))
    good, bad = EngineRequest("good", prompt(4, 1), GREEDY), EngineRequest("bad", prompt(18, 2), GREEDY)
    e.add(good)
    e.add(bad)
    events = [event for o in steps(e) for event in o.tokens]
    e.close()

    assert sum(len(x.tokens) for x in events if x.request_id == "good") == 12
    assert [x.request_id for x in events if x.error is not None] == ["bad"]


def test_a_codec_that_cannot_be_built_or_lies_about_its_blocks_stops_the_start(model):
    def broken(context: KvCodecContext):
        raise ValueError("no codebook")

    class Lying(HalfRows):
        def __init__(self, context):
            super().__init__(context)
            self.layout = dataclasses.replace(self.layout, block_bytes=self.layout.block_bytes + 1)

    with pytest.raises(PluginError, match="'million' could not be built: ValueError: no codebook"):
        engine(model, KvCodecRecord("million", broken))
    with pytest.raises(PluginError, match="block_bytes is not the size"):
        engine(model, KvCodecRecord("lying", Lying))


def test_the_cuda_executor_has_no_place_for_a_codec(monkeypatch):
    pytest.importorskip("triton")
    from plugmesh_engine.executors.cuda import CudaModel

    model = object.__new__(CudaModel)
    with pytest.raises(ConfigError, match="half-rows"):
        model.build_executor(EngineConfig(executor="cuda"), half_rows())


def test_a_native_codec_runs_on_all_threads(weights, tmp_path: pathlib.Path):
    """A capsule that keeps float32 rows, with a barrier between storing and attending, gives the bits of one thread on three."""
    from plugmesh_kernels import jit

    if not plugmesh_kernels.available():
        pytest.skip("no native kernels")
    model = native_model(tmp_path, weights)
    reference = ReferenceLlama(CONFIG, weights)
    try:
        library = jit.load(pathlib.Path(__file__).parent / "csrc")
    except jit.NoCompiler:
        pytest.skip("no C++ compiler")

    class Native(HalfRows):
        """One sequence in blocks 1, 2, ..., so that its position is its row."""

        def __init__(self, context):
            super().__init__(context)
            c = context.config
            self.rows = np.zeros((c.num_layers, 2, 512, c.num_kv_heads, c.head_dim), np.float32)
            self.facts = np.array([c.num_heads, c.num_kv_heads, c.head_dim, 512, 0], np.int64)
            self.context = np.array([self.rows.ctypes.data, self.facts.ctypes.data], np.uint64)
            self.capsule = jit.capsule(library.attention, "plugmesh.attention.v2", self.context.ctypes.data)

        def plan(self, rows):
            (only,) = rows
            self.facts[4] = only.num_computed

        def attend(self, *arguments):
            raise AssertionError("the capsule takes its place")

    ids = prompt(60, 3)
    logits = []
    for num_threads in (1, 3):
        e = model.build_executor(EngineConfig(executor="native", num_blocks=16, num_threads=num_threads), KvCodecRecord("native-rows", Native))
        e.run([Rows(ids[:50], 0, [1, 2, 3, 4])])
        logits.append(e.run([Rows(ids[50:], 50, [1, 2, 3, 4], 1, True)]).logits[0].copy())
        e.close()

    want = reference.next_logits(ids)
    assert np.array_equal(*logits)
    assert np.abs(logits[0] - want).max() < 0.01 * want.std()
