"""Weights exchanged under load: every token is that of the version that it is told with, and no KV outlives the weights that made it where others could find it."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh.errors import FailedPrecondition
from plugmesh.types import BLOCK_TOKENS, SamplingParams, block_chain
from plugmesh_engine import Engine, EngineConfig, EngineRequest, KvSource
from plugmesh_engine.swap import SwapMode
from plugmesh_engine.testing import (
    FakeModel,
    FileManifest,
    FileTensor,
    model_in_memory,
    random_weights,
    run_to_end,
    steps,
    tiny_config,
    tokens_of,
)
from plugmesh_kernels.pack import native_dtype, pack

CONFIG = tiny_config(vocab_size=97, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, head_dim=8)
MODES = list(SwapMode)


def native_model(folder: pathlib.Path, seed: int, **changes: object):
    from plugmesh_engine.executors import native

    config = dataclasses.replace(CONFIG, **changes)
    path, entries, digest = folder / f"{seed}-{config.hidden_size}.native", [], hashlib.sha256()
    with path.open("wb") as f:
        for name, w in random_weights(config, seed).items():
            raw = w.tobytes() if w.ndim == 1 else pack("float32", w, *w.shape).tobytes()
            f.write(b"\0" * (-f.tell() % 64))
            entries.append(FileTensor(name, "float32" if w.ndim == 1 else native_dtype("float32", w), w.shape, str(path), f.tell(), len(raw)))
            f.write(raw)
            digest.update(raw)
    return native.load(FileManifest("tiny", digest.hexdigest(), "llama", config.to_json(), tuple(entries), "native"), large_pages=False)


@pytest.fixture(scope="module", params=["native", "torch"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Two models of the same shapes, for one executor."""
    if request.param == "torch":
        return tuple(model_in_memory(CONFIG, random_weights(CONFIG, seed), version=f"v{seed}") for seed in (1, 2))
    if not plugmesh_kernels.available():
        pytest.skip(f"no native kernels: {plugmesh_kernels.why_not()}")
    folder = tmp_path_factory.mktemp("native")
    return native_model(folder, 1), native_model(folder, 2)


def engine_on(model, **changes) -> Engine:
    name = "native" if type(model).__name__ == "NativeModel" else "torch"
    return Engine(model, EngineConfig(**{"executor": name, "dtype": "float32", "num_blocks": 400, "num_threads": 1, **changes}))


def prompt(i: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(i).integers(3, CONFIG.vocab_size, length))


def request(i: int, **changes) -> EngineRequest:
    temperature = 0.8 if i % 3 == 0 else 0.0  # the random numbers of a seed belong to positions, so sampled tokens are defined too
    sampling = SamplingParams(max_tokens=12 + i % 9, temperature=temperature, seed=i, ignore_eos=True)
    return EngineRequest(**{"request_id": f"r{i}", "token_ids": prompt(i, 5 + 3 * i % 40), "sampling": sampling, **changes})


def by_version(outputs) -> dict[str, list[tuple[str, int]]]:
    """(version, token) of every request, in order."""
    found: dict[str, list[tuple[str, int]]] = {}
    for out in outputs:
        for event in out.tokens:
            assert event.error is None
            found.setdefault(event.request_id, []).extend((out.weight_version, t.token_id) for t in event.tokens)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_every_token_is_that_of_its_version(pair, mode):
    old, new = pair
    engine = engine_on(old, max_num_sequences=16, max_tokens_per_step=48)
    requests = [request(i) for i in range(32)]
    for r in requests:
        engine.add(r)
    outputs = [engine.step() for _ in range(9)]
    swap = engine.swap(new, mode)
    assert swap.done.done() == (mode is not SwapMode.FINISH)
    outputs += steps(engine)
    report = swap.done.result(timeout=0)
    assert (report.old_version, report.new_version) == (old.version, new.version)
    assert report.num_running == (0 if mode is SwapMode.FINISH else 16)
    assert report.num_restarted == (16 if mode is SwapMode.ABORT else 0)
    tokens_of(engine, outputs)  # none lost, none doubled
    told = by_version(outputs)
    mixed = 0
    for r in requests:
        row = told[r.request_id]
        assert len(row) == r.sampling.max_tokens
        before, after = ([t for v, t in row if v == m.version] for m in (old, new))
        assert [v for v, _ in row] == [old.version] * len(before) + [new.version] * len(after)
        mixed += bool(before and after)
        if before:
            [alone] = run_to_end(engine_on(old), r)[r.request_id]
            assert alone[: len(before)] == before
        if after and (not before or mode is SwapMode.ABORT):
            again = dataclasses.replace(r, resume=(tuple(before),)) if before else r
            [alone] = run_to_end(engine_on(new), again)[r.request_id]
            assert alone == after
    assert mixed == 0 if mode is SwapMode.FINISH else mixed >= 8
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_swaps) == (0, 0, 1)
    assert report.retired is not None
    report.retired.close()
    engine.close()


@pytest.mark.parametrize("mode", MODES)
def test_prompts_find_only_what_the_weights_in_force_computed(pair, mode):
    old, new = pair
    engine = engine_on(old)
    r = request(1, token_ids=prompt(1, 50))
    first = run_to_end(engine, r)["r1"][0]
    cached = engine.cached_prefix(r.token_ids)
    assert cached == 48
    engine.swap(new, mode)
    assert engine.cached_prefix(r.token_ids) == 0 and engine.layout.model == new.version
    second = run_to_end(engine, r)["r1"][0]
    assert second == run_to_end(engine_on(new), r)["r1"][0] != first
    assert engine.cached_prefix(r.token_ids) == 48
    engine.swap(old, mode)  # what the old weights left is true again
    assert engine.cached_prefix(r.token_ids) == cached
    assert run_to_end(engine, r)["r1"][0] == first


def test_a_sequence_that_spans_versions_leaves_nothing_to_find(pair):
    old, new = pair
    engine = engine_on(old)
    r = request(2, token_ids=prompt(2, 20), sampling=SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True), hold=True)
    engine.add(r)
    for _ in range(4):
        engine.step()
    engine.swap(new, SwapMode.CONTINUE)
    engine.step()
    assert engine.fork("r2", 0, EngineRequest("fork", (), SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)))
    tokens = tokens_of(engine, steps(engine))
    whole = (*r.token_ids, *tokens["r2"][0])
    assert engine.cached_prefix(whole[:20]) == 16  # the fork's own, which computed it again
    assert engine.cached_prefix(whole) == 16
    n = engine.num_tokens_of("r2", 0)
    engine.fork("r2", 0, EngineRequest("late", (), SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)))
    late = tokens_of(engine, steps(engine))["late"][0]
    assert late == run_to_end(engine_on(new), EngineRequest("x", whole[:n], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)))["x"][0]
    engine.release("r2")
    assert (engine.stats().kv_blocks_used, engine.stats().kv_blocks_leaked) == (0, 0)


def test_held_tokens_stay_and_their_kv_goes(pair):
    old, new = pair
    engine = engine_on(old)
    run_to_end(engine, request(4, hold=True))
    assert engine.stats().kv_blocks_used > 0
    engine.swap(new)
    assert engine.stats().kv_blocks_used == 0 and engine.stats().num_held == 1
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    whole = tuple(engine._origin("r4", 0).tokens)
    engine.fork("r4", 0, EngineRequest("fork", (), sampling))
    assert tokens_of(engine, steps(engine))["fork"] == run_to_end(engine_on(new), EngineRequest("x", whole, sampling))["x"]


def test_imported_kv_of_the_old_weights_is_left_alone(pair):
    old, new = pair
    engine = engine_on(old)
    key, ids = engine.layout.key(), prompt(5, 40)
    names = block_chain(key, ids[:32])
    kv = tuple(KvSource(name, BLOCK_TOKENS, bytes(engine.layout.block_bytes)) for name in names)
    queued, late = request(5, token_ids=ids, kv=kv, kv_layout=key), request(6, token_ids=ids, kv=kv, kv_layout=key)
    engine.add(queued)
    engine.swap(new, SwapMode.FINISH)
    engine.add(late)
    outputs = steps(engine)
    assert sorted(i for o in outputs for i in o.kv_imported) == ["r5", "r6"]  # their buffers can go
    for r in (queued, late):
        plain = dataclasses.replace(r, kv=())
        assert tokens_of(engine, outputs)[r.request_id] == run_to_end(engine_on(new), plain)[r.request_id]
    assert engine.stats().num_imported_tokens == 0


def test_what_does_not_fit_is_refused_and_nothing_changes(pair, tmp_path):
    old, new = pair
    engine = engine_on(old)
    engine.add(request(7))
    outputs = [engine.step()]
    wide = dataclasses.replace(CONFIG, intermediate_size=96)
    other = model_in_memory(wide, random_weights(wide)) if type(old).__name__ == "TorchModel" else native_model(tmp_path, 1, intermediate_size=96)
    with pytest.raises(FailedPrecondition, match="intermediate_size is 96 instead of 64"):
        engine.swap(other)
    with pytest.raises(FailedPrecondition):
        engine.swap(FakeModel(CONFIG, version="other"))
    with pytest.raises(ValueError):
        engine.swap(new, "sideways")
    outputs += steps(engine)
    assert {o.weight_version for o in outputs} == {old.version} and engine.stats().num_swaps == 0
    assert tokens_of(engine, outputs)["r7"] == run_to_end(engine_on(old), request(7))["r7"]


def test_a_swap_that_waits_can_be_withdrawn(pair):
    old, new = pair
    engine = engine_on(old)
    engine.add(request(8))
    engine.step()
    engine.swap(new, "finish")
    with pytest.raises(FailedPrecondition, match="waiting"):
        engine.swap(new, "abort")
    engine.add(request(9))
    outputs = [engine.step() for _ in range(3)]
    assert not any(e.request_id == "r9" for o in outputs for e in o.tokens)
    assert engine.withdraw_swap() is not None and engine.withdraw_swap() is None
    steps(engine)
    assert engine.model is old and engine.stats().num_swaps == 0


def test_an_executor_that_cannot_says_so():
    class Fixed:
        def __init__(self, inner) -> None:
            self.run, self.layout, self.memory, self.close = inner.run, inner.layout, inner.memory, inner.close

    model = FakeModel(CONFIG)
    config = EngineConfig(executor="torch", num_blocks=8)
    engine = Engine(model, config, executor=Fixed(model.build_executor(config)))
    with pytest.raises(FailedPrecondition, match="Fixed cannot exchange its weights"):
        engine.swap(FakeModel(CONFIG, version="b", salt=1))


def test_the_version_in_force_is_no_swap():
    model = FakeModel(CONFIG, version="a")
    engine = Engine(model, EngineConfig(executor="torch", num_blocks=64))
    run_to_end(engine, request(1, token_ids=prompt(1, 40)))
    report = engine.swap(FakeModel(CONFIG, version="a"), "abort").done.result(timeout=0)
    assert (report.num_restarted, engine.stats().num_swaps) == (0, 0) and engine.cached_prefix(prompt(1, 40)) == 32


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 3), st.integers(1, 40)), st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("swap"), st.sampled_from(MODES), st.integers(0, 3)), st.tuples(st.just("cancel"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("fork"), st.integers(0, 20), st.just(0)), st.tuples(st.just("withdraw"), st.just(0), st.just(0)),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(OPS)
def test_any_order_of_requests_and_swaps(ops):
    """With an executor whose tokens depend on the weights and on the tokens before alone, every single token can be told from its version."""
    models = [FakeModel(CONFIG, version=f"v{i}", salt=i) for i in range(4)]
    config = EngineConfig(executor="torch", num_blocks=24, max_num_sequences=6, max_tokens_per_step=24)
    engine = Engine(models[0], config)
    judges = {m.version: m.build_executor(config) for m in models}
    prompts: dict[str, tuple[int, ...]] = {}
    wanted: dict[str, tuple[int, int]] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    cancelled = set()

    def step() -> None:
        out = engine.step()
        for event in out.tokens:
            assert event.error is None
            said = tokens.setdefault((event.request_id, event.sequence), [])
            for t in event.tokens:
                prefix = np.array([*prompts[event.request_id], *said], np.int32)
                assert t.token_id == int(judges[out.weight_version].logits(prefix).argmax())
                said.append(t.token_id)

    for op, a, b in ops:
        names = list(prompts)
        if op == "add" or (op == "fork" and names):
            name, n = f"r{len(prompts)}", a if op == "add" else 1
            sampling = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, num_sequences=n)
            if op == "add":
                prompts[name] = prompt(len(prompts) % 3, b)  # some share their beginnings
                engine.add(EngineRequest(name, prompts[name], sampling))
            else:
                origin = engine._origin(names[a % len(names)], 0)
                if origin is None:
                    continue
                prompts[name] = tuple(origin.tokens)
                engine.fork(names[a % len(names)], 0, EngineRequest(name, (), sampling))
            wanted[name] = (n, 9)
        elif op == "step":
            for _ in range(a):
                step()
        elif op == "swap" and engine._swap is None:
            engine.swap(models[b], a)
        elif op == "withdraw":
            engine.withdraw_swap()
        elif op == "cancel" and names:
            cancelled.add(names[a % len(names)])
            engine.cancel(names[a % len(names)])
        assert engine.stats().kv_blocks_leaked == 0
    for _ in range(3000):
        if not engine.has_work():
            break
        step()
    assert not engine.has_work()
    for name, (n, length) in wanted.items():
        if name not in cancelled:
            assert [len(tokens[name, i]) for i in range(n)] == [length] * n
    assert (engine.stats().kv_blocks_used, engine.stats().kv_blocks_leaked) == (0, 0)


def test_a_fork_that_waits_does_not_begin_over_old_kv(pair):
    old, new = pair
    engine = engine_on(old, max_num_sequences=1)
    engine.add(request(3, token_ids=prompt(3, 40)))
    for _ in range(4):
        engine.step()
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    tokens = tuple(engine._origin("r3", 0).tokens)
    engine.fork("r3", 0, EngineRequest("fork", (), sampling))
    assert engine._groups["fork"].num_inherited > 40
    engine.swap(new, SwapMode.CONTINUE)
    assert tokens_of(engine, steps(engine))["fork"] == run_to_end(engine_on(new), EngineRequest("x", tokens, sampling))["x"]
