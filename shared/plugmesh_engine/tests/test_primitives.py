"""Fork, score, tap and shared budgets of the engine, against fresh runs, and what they leave behind."""

from __future__ import annotations

import functools
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh.errors import (
    AlreadyExists,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Overloaded,
    PlugmeshError,
)
from plugmesh.types import BLOCK_TOKENS, FinishReason, SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import Rows
from plugmesh_engine.outcome import MAX_SCORED_ROWS
from plugmesh_engine.testing import (
    FakeModel,
    FileManifest,
    FileTensor,
    events_of,
    random_weights,
    run_to_end,
    steps,
    tiny_config,
    tokens_of,
    write_manifest,
)

CONFIG = tiny_config(max_position=2048)
SMALL = tiny_config(num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
needs_kernels = pytest.mark.skipif(not plugmesh_kernels.available(), reason="the kernels are not compiled")


def fake_engine(**changes) -> Engine:
    return Engine(FakeModel(CONFIG), EngineConfig(**{"num_blocks": 64, "max_tokens_per_step": 40} | changes))


@functools.cache
def real_model(kind: str):
    """A random model in float32 for the torch executor, or packed for the native one."""
    folder, weights = pathlib.Path(tempfile.mkdtemp(prefix="plugmesh-primitives-")), random_weights(SMALL, seed=9)
    if kind == "torch":
        from plugmesh_engine.executors import torch as torch_executor

        return torch_executor.load(write_manifest(folder, SMALL, weights), "float32")
    from plugmesh_engine.executors import native
    from plugmesh_kernels.pack import pack

    entries, path = [], folder / "model.native"
    with path.open("wb") as f:
        for name, w in weights.items():
            raw = w.tobytes() if w.ndim == 1 else pack("float32", w, *w.shape).tobytes()
            f.write(bytes(-f.tell() % 64))
            entries.append(FileTensor(name, "float32" if w.ndim == 1 else "f32x16", w.shape, str(path), f.tell(), len(raw)))
            f.write(raw)
    return native.load(FileManifest("tiny", "primitives", "llama", SMALL.to_json(), tuple(entries), "native"), large_pages=False)


def real_engine(kind: str = "native", **changes) -> Engine:
    return Engine(real_model(kind), EngineConfig(**{"executor": kind, "dtype": "float32", "num_blocks": 64, "num_threads": 1} | changes))


def ids(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 200, n).tolist())


def greedy(n: int, **changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": n, "ignore_eos": True} | changes)


def drawn(n: int, **changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 7, "max_tokens": n, "ignore_eos": True} | changes)


def clean(engine: Engine) -> bool:
    """Nothing is used or leaked, and nobody waits."""
    stats = engine.stats()
    return (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_running, stats.num_waiting, stats.num_held) == (0, 0, 0, 0, 0)


def scores_of(engine: Engine, request: EngineRequest) -> list[list[float]]:
    engine.add(request)
    found: dict[int, list[float]] = {}
    told: dict[int, list[int]] = {}
    for e in events_of(steps(engine)):
        assert e.error is None
        assert e.index == len(found.setdefault(e.sequence, []))
        found[e.sequence] += [t.logprob for t in e.tokens]
        told.setdefault(e.sequence, []).extend(t.token_id for t in e.tokens)
    assert [tuple(told[i]) for i in sorted(told)] == list(request.score)
    return [found[i] for i in sorted(found)]


# -- score ---------------------------------------------------------------------------------------------------------------------


@needs_kernels
@settings(max_examples=25)
@given(st.integers(1, 60), st.lists(st.integers(1, 45), min_size=1, max_size=6), st.integers(1, 70), st.booleans())
def test_scores_are_those_of_separate_runs_bit_for_bit(num_prompt, lengths, max_tokens_per_step, cache):
    engine = real_engine(max_tokens_per_step=max_tokens_per_step, prefix_cache=cache)
    prompt, continuations = ids(num_prompt), tuple(ids(n, i + 1) for i, n in enumerate(lengths))
    together = scores_of(engine, EngineRequest("all", prompt, greedy(1), score=continuations))
    alone = [scores_of(real_engine(), EngineRequest("one", prompt, greedy(1), score=(c,)))[0] for c in continuations]

    assert together == alone
    assert clean(engine)


@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_kernels)])
def test_scores_are_the_log_probabilities_of_the_models_own_logits(kind):
    engine, prompt, continuation = real_engine(kind), ids(21), ids(30, 1)
    [got] = scores_of(engine, EngineRequest("s", prompt, greedy(1), score=(continuation,)))
    logits = np.concatenate(list(real_engine(kind).logits((*prompt, *continuation)))).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    want = [logp[len(prompt) - 1 + i, t] for i, t in enumerate(continuation)]

    assert np.allclose(got, want, atol=1e-4)


@needs_kernels
def test_a_generations_own_log_probabilities_are_its_scores():
    engine = real_engine()
    engine.add(EngineRequest("g", ids(40), drawn(20, logprobs=True)))
    told = [t for e in events_of(steps(engine)) for t in e.tokens]
    [scored] = scores_of(engine, EngineRequest("s", ids(40), greedy(1), score=(tuple(t.token_id for t in told),)))

    assert scored == [t.logprob for t in told]


def test_the_prompt_is_computed_once_and_the_logits_come_in_pieces():
    engine = fake_engine(max_tokens_per_step=1000, num_blocks=400, prefix_cache=False)
    wanted = []
    run = engine._executor.run
    engine._executor.run = lambda rows: wanted.append(sum(r.num_wanted for r in rows)) or run(rows)
    prompt, continuations = ids(200), tuple(ids(90, i + 1) for i in range(5))
    scores_of(engine, EngineRequest("s", prompt, greedy(1), score=continuations))

    assert max(wanted) == MAX_SCORED_ROWS and sum(wanted) == 5 * 90
    assert engine._executor.num_rows == len(prompt) - 1 + 5 * 90


def test_scores_survive_preemption_and_other_requests_do_not_notice_them():
    prompt, continuations = ids(50), tuple(ids(60, i + 1) for i in range(6))
    want = scores_of(fake_engine(), EngineRequest("s", prompt, greedy(1), score=continuations))
    alone = run_to_end(fake_engine(), EngineRequest("g", ids(100, 9), drawn(60)))["g"]
    engine = fake_engine(num_blocks=15, max_tokens_per_step=16)
    engine.add(EngineRequest("g", ids(100, 9), drawn(60)))
    engine.add(EngineRequest("s", prompt, greedy(1), score=continuations))
    events = events_of(steps(engine))
    got = [[t.logprob for e in events if e.request_id == "s" and e.sequence == i for t in e.tokens] for i in range(6)]

    assert engine.stats().num_preemptions > 0
    assert got == want
    assert [[t.token_id for e in events if e.request_id == "g" for t in e.tokens]] == alone
    assert clean(engine)


def test_usage_of_a_scoring_request_counts_all_tokens_as_read():
    engine = fake_engine()
    engine.add(EngineRequest("s", ids(20), greedy(1, top_logprobs=2), score=(ids(3), ids(5))))
    events = events_of(steps(engine))

    assert [e.usage.prompt_tokens for e in events if e.usage] == [28]
    assert [e.usage.completion_tokens for e in events if e.usage] == [0]
    assert {e.finish_reason for e in events if e.finish_reason} == {FinishReason.LENGTH}
    assert all(len(t.top) == 2 and t.top[0][1] >= t.logprob for e in events for t in e.tokens)


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"score": ((),)}, InvalidRequest, "score"),
        ({"score": ((1,), (211,))}, InvalidRequest, "score"),
        ({"score": ((1,),) * 65}, LimitExceeded, "score"),
        ({"score": ((1,) * 2048,)}, ContextLengthExceeded, "score"),
        ({"score": ((1,),), "hold": True}, InvalidRequest, "score"),
        ({"score": ((1,),), "taps": (0,)}, InvalidRequest, "score"),
        ({"taps": (3,)}, InvalidRequest, "taps"),
        ({"taps": (1, 1)}, InvalidRequest, "taps"),
        ({"taps": (1,), "sampling": greedy(1, num_sequences=2)}, InvalidRequest, "taps"),
        ({"taps": (1,), "tap_from": -1}, InvalidRequest, "tap_from"),
        ({"hold": True, "prefill_only": True}, InvalidRequest, "hold"),
        ({"max_total_tokens": -1}, InvalidRequest, "max_total_tokens"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(changes, error, param):
    engine = fake_engine()
    with pytest.raises(error) as caught:
        engine.add(EngineRequest(**{"request_id": "r", "token_ids": ids(4), "sampling": greedy(2)} | changes))

    assert caught.value.param == param
    assert clean(engine) and not engine.has_work()


# -- fork ----------------------------------------------------------------------------------------------------------------------


@needs_kernels
@settings(max_examples=25)
@given(st.integers(1, 50), st.integers(0, 25), st.integers(0, 20), st.booleans(), st.booleans(), st.data())
def test_a_forks_continuation_is_that_of_a_fresh_run_of_the_same_tokens(num_prompt, at_step, num_more, hold, cache, data):
    """Forked from a running or a held sequence, anywhere in it, with and without further tokens; the parent goes on as if nothing had happened."""
    engine = real_engine(max_tokens_per_step=16, prefix_cache=cache)
    parent = EngineRequest("p", ids(num_prompt), drawn(20), hold=hold)
    engine.add(parent)
    outputs = [engine.step() for _ in range(at_step)]
    more = ids(num_more, 3)
    child = EngineRequest("c", more, drawn(12, seed=5, logprobs=True, num_sequences=data.draw(st.integers(1, 2))))
    known = len([t for e in events_of(outputs) for t in e.tokens]) + num_prompt
    cut = data.draw(st.one_of(st.none(), st.integers(0, known)))
    if (cut == 0 and not more) or ("p" not in engine._groups and not hold):
        with pytest.raises(PlugmeshError):
            engine.fork("p", 0, child, cut)
        return
    taken = engine.fork("p", 0, child, cut)
    outputs += steps(engine)
    tokens = tokens_of(engine, outputs)
    fresh = run_to_end(real_engine(), parent)["p"]
    whole = (*parent.token_ids, *fresh[0])[:taken]
    want = run_to_end(real_engine(), EngineRequest("c", (*whole, *more), child.sampling))["c"]

    assert taken == (known if cut is None else cut)
    assert tokens["p"] == fresh
    assert tokens["c"] == want
    engine.release("p")
    assert clean(engine)


def test_a_fork_computes_only_what_is_new():
    engine = fake_engine(prefix_cache=False, max_tokens_per_step=512, num_blocks=200)
    run_to_end(engine, EngineRequest("p", ids(300), greedy(10), hold=True))
    before = engine._executor.num_rows
    engine.fork("p", 0, EngineRequest("c", ids(3, 1), greedy(1)))
    [*_, last] = events_of(steps(engine))

    assert engine._executor.num_rows - before == 1 + 3  # the parent's last token was sampled, not computed
    assert (last.usage.prompt_tokens, last.usage.cached_tokens) == (313, 309)
    assert engine.stats().num_forks == 1


def test_scores_and_hidden_states_can_begin_at_a_fork():
    engine = fake_engine(prefix_cache=False)
    [[*out]] = run_to_end(engine, EngineRequest("p", ids(40), greedy(8), hold=True))["p"]
    whole = (*ids(40), *out)
    engine.fork("p", 0, EngineRequest("s", (), greedy(1), score=(ids(9, 1), ids(4, 2))))
    got = [[t.logprob for e in events_of([o]) for t in e.tokens] for o in steps(engine)]
    engine.fork("p", 0, EngineRequest("t", ids(2, 5), greedy(1), taps=(1,), tap_from=48))
    [hidden] = [h for o in steps(engine) for h in o.hidden]
    want = scores_of(fake_engine(), EngineRequest("s", whole, greedy(1), score=(ids(9, 1), ids(4, 2))))
    fresh = fake_engine(max_tokens_per_step=500)
    fresh.add(EngineRequest("t", (*whole, *ids(2, 5)), greedy(1), taps=(1,), tap_from=48))

    assert sorted(x for step in got for x in step) == sorted(x for one in want for x in one)
    assert hidden.position == 48 and np.array_equal(hidden.values, fresh.step().hidden[0].values)
    engine.release("p")
    assert clean(engine)


def test_a_forked_child_and_its_parent_never_write_into_each_others_blocks():
    engine = real_engine("torch", prefix_cache=False)
    engine.add(EngineRequest("p", ids(21), greedy(30)))
    for _ in range(3):
        engine.step()
    engine.fork("p", 0, EngineRequest("a", (5,), greedy(30)))
    engine.fork("p", 0, EngineRequest("b", (6,), greedy(30)))
    tokens = tokens_of(engine, steps(engine))
    head = run_to_end(real_engine("torch"), EngineRequest("p", ids(21), greedy(30)))["p"][0]

    for name, token in (("a", 5), ("b", 6)):
        assert tokens[name] == run_to_end(real_engine("torch"), EngineRequest(name, (*ids(21), *head[:3], token), greedy(30)))[name]
    assert clean(engine)


def test_holds_end_with_release_with_cancel_and_with_an_error():
    engine = fake_engine()
    for name in "abc":
        run_to_end(engine, EngineRequest(name, ids(20), drawn(4, num_sequences=2), hold=True))
    assert engine.stats().num_held == 6 and engine.stats().kv_blocks_leaked == 0
    with pytest.raises(AlreadyExists):
        engine.add(EngineRequest("a", ids(20), greedy(4)))
    assert engine.release("a") and not engine.release("a")
    assert engine.cancel("b")
    assert engine.stats().num_held == 2
    with pytest.raises(NotFound):
        engine.fork("a", 0, EngineRequest("x", (1,), greedy(1)))
    with pytest.raises(NotFound):
        engine.fork("c", 2, EngineRequest("x", (1,), greedy(1)))
    with pytest.raises(InvalidRequest):
        engine.fork("c", 0, EngineRequest("x", (1,), greedy(1)), 25)
    engine.release("c")

    assert clean(engine)


def test_a_request_that_is_released_while_it_runs_is_not_held_and_a_cancelled_sequence_never_is():
    engine = fake_engine()
    engine.add(EngineRequest("r", ids(20), greedy(10), hold=True))
    engine.add(EngineRequest("c", ids(20), drawn(10, num_sequences=3), hold=True))
    engine.step()
    engine.release("r")
    engine.cancel("c", 1)
    steps(engine)

    assert engine.stats().num_held == 2
    engine.cancel("c")
    assert clean(engine)


def test_a_model_failure_lets_go_of_what_the_request_held():
    engine = fake_engine()
    engine.add(EngineRequest("r", ids(20), drawn(10, seed=8, num_sequences=2, stop_token_ids=tuple(range(0, 211, 3))), hold=True))
    outputs = []
    while engine.stats().num_held == 0 and engine.has_work():
        outputs.append(engine.step())
    assert engine.stats().num_held == 1 and engine.has_work(), "the seed no longer ends one sequence before the other"
    engine._executor.run = lambda rows: (_ for _ in ()).throw(RuntimeError("broken"))
    [event] = [e for e in events_of(steps(engine)) if e.error]

    assert isinstance(event.error, InternalError)
    assert clean(engine)


def test_holds_have_a_limit_and_those_that_run_count():
    engine = fake_engine(max_held=3)
    engine.add(EngineRequest("a", ids(20), drawn(4, num_sequences=2), hold=True))
    with pytest.raises(Overloaded):
        engine.add(EngineRequest("b", ids(20), drawn(4, num_sequences=2), hold=True))
    engine.add(EngineRequest("c", ids(20), greedy(4), hold=True))
    steps(engine)

    assert engine.stats().num_held == 3


@pytest.mark.parametrize("running", [False, True])
def test_held_memory_keeps_nobody_waiting_and_a_fork_of_what_had_to_go_is_still_right(running):
    engine = fake_engine(num_blocks=20, prefix_cache=False)
    [[*out]] = run_to_end(engine, EngineRequest("p", ids(200), greedy(8), hold=True))["p"]
    assert engine.stats().kv_blocks_used == 13
    if running:  # one that grows out of what is free
        run_to_end(engine, EngineRequest("r", ids(90, 1), greedy(60)))
    else:  # one that does not fit beside it
        run_to_end(engine, EngineRequest("r", ids(250, 1), greedy(5)))
    assert engine.stats().kv_blocks_used == 0 and engine.stats().num_held == 1
    engine.fork("p", 0, EngineRequest("c", (9,), greedy(5)))
    got = tokens_of(engine, steps(engine))["c"]

    assert got == run_to_end(fake_engine(), EngineRequest("c", (*ids(200), *out, 9), greedy(5)))["c"]
    engine.release("p")
    assert clean(engine)


def test_forks_that_wait_give_their_memory_to_those_that_run():
    engine = fake_engine(num_blocks=24, prefix_cache=False, max_num_sequences=2)
    engine.add(EngineRequest("p", ids(100), greedy(150)))
    engine.add(EngineRequest("q", ids(40, 1), greedy(40)))
    outputs = [engine.step() for _ in range(8)]
    taken = [engine.fork("p", 0, EngineRequest(f"c{i}", (i,), greedy(10))) for i in range(4)]
    assert all(g.inherited for name, g in engine._groups.items() if name.startswith("c"))
    outputs += steps(engine)
    tokens = tokens_of(engine, outputs)
    head = (*ids(100), *tokens["p"][0])[: taken[0]]

    assert len(tokens["p"][0]) == 150
    for i in range(4):
        assert tokens[f"c{i}"] == run_to_end(fake_engine(), EngineRequest("c", (*head, i), greedy(10)))["c"]
    assert clean(engine)


# -- tap -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 40), st.integers(1, 8), st.booleans())
def test_every_hidden_state_is_told_once_and_in_order_whatever_the_chunks_and_the_cache(num_prompt, tap_from, per_step, num_new, warm):
    engine = fake_engine(max_tokens_per_step=per_step)
    if warm:
        run_to_end(engine, EngineRequest("w", ids(num_prompt), greedy(1)))
    engine.add(EngineRequest("t", ids(num_prompt), greedy(num_new), taps=(2, 0), tap_from=tap_from))
    outputs = steps(engine)
    out = [t.token_id for e in events_of(outputs) for t in e.tokens]
    told = {layer: [h for o in outputs for h in o.hidden if h.layer == layer] for layer in (0, 2)}
    whole, executor = (*ids(num_prompt), *out[:-1]), FakeModel(CONFIG).build_executor(EngineConfig(num_blocks=8))
    from plugmesh_engine.batch import Tap

    want = executor.run([Rows(whole, 0, list(range(1, 8)))], [Tap(0, 0), Tap(0, 2)])
    for at, layer in enumerate((0, 2)):
        position = tap_from
        for h in told[layer]:
            assert h.position == position
            position += len(h.values)
        assert position == max(tap_from, len(whole))
        if told[layer]:
            assert np.array_equal(np.concatenate([h.values for h in told[layer]]), want.hidden[at][tap_from:])
    assert clean(engine)


def test_an_executor_without_taps_fails_the_request_and_no_other():
    engine = fake_engine()
    run = engine._executor.run

    def without_taps(rows, taps=()):
        if taps:
            raise InvalidRequest("no taps here", param="executor")
        return run(rows)

    engine._executor.run = without_taps
    engine.add(EngineRequest("g", ids(20), greedy(5)))
    engine.add(EngineRequest("t", ids(20, 1), greedy(5), taps=(1,)))
    events = events_of(steps(engine))

    assert [e.error.message for e in events if e.error] == ["no taps here"]
    assert sum(len(e.tokens) for e in events if e.request_id == "g") == 5
    assert clean(engine)


# -- budgets shared by sequences -------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 60), st.integers(1, 20), st.integers(0, 4), st.booleans())
def test_sequences_together_never_generate_one_token_more_than_their_budget(n, budget, max_tokens, drafts, tight):
    class Echo:
        def propose(self, views, num_prompt_rows):
            return [[v.tokens[-1]] * drafts for v in views]

        def observe(self, outcome):
            pass

    model = FakeModel(CONFIG, num_kinds=1)  # always the same token, so that every draft is accepted
    engine = Engine(model, EngineConfig(num_blocks=n * 3 if tight else 64), drafts=Echo())
    engine.add(EngineRequest("r", ids(20), greedy(max_tokens, num_sequences=n), max_total_tokens=budget))
    events = events_of(steps(engine))
    num = sum(len(e.tokens) for e in events)

    assert num == min(budget, n * max_tokens)
    assert sum(e.request_done for e in events) == 1 and events[-1].usage.completion_tokens == num
    assert sorted(e.sequence for e in events if e.finish_reason) == list(range(n))
    assert clean(engine)


# -- nothing is left behind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_random_forks_scores_cancels_and_releases_leave_no_block_behind(seed):
    """250 operations each, in a pool that is far too small for all of them; the reference counts are audited along the way."""
    rng = np.random.default_rng(seed)
    engine = fake_engine(num_blocks=40, max_tokens_per_step=24, max_num_sequences=8, max_waiting=20, max_held=10, prefix_cache=seed % 2 == 0)
    names, refused, done = ["none"], 0, 0
    for i in range(250):
        name, known = f"r{i}", names[int(rng.integers(max(0, len(names) - 12), len(names)))]
        params = drawn(int(rng.integers(1, 30)), num_sequences=int(rng.integers(1, 4)), seed=i)
        hold, score = bool(rng.integers(2)), tuple(ids(int(rng.integers(1, 40)), j) for j in range(int(rng.integers(1, 4))))
        try:
            match int(rng.integers(7)):
                case 0 | 1:
                    engine.add(EngineRequest(name, ids(int(rng.integers(1, 120)), i), params, hold=hold))
                    names.append(name)
                case 2 | 3:
                    more = ids(int(rng.integers(0, 9)), i)
                    engine.fork(known, int(rng.integers(3)), EngineRequest(name, more, params, hold=hold), None if rng.integers(2) else int(rng.integers(60)))
                    names.append(name)
                case 4:
                    request = EngineRequest(name, ids(2, i), greedy(1), score=score)
                    engine.fork(known, 0, request) if rng.integers(2) else engine.add(request)
                    names.append(name)
                case 5:
                    engine.cancel(known, None if rng.integers(2) else int(rng.integers(3)))
                case 6:
                    engine.release(known)
            done += 1
        except (NotFound, Overloaded, InvalidRequest):
            refused += 1
        for _ in range(int(rng.integers(4))):
            engine.step()
        if i % 10 == 0:
            assert engine.stats().kv_blocks_leaked == 0
    for o in steps(engine):
        assert not [e.error for e in o.tokens if e.error]
    assert done > refused and engine.stats().num_forks > 10 and engine.stats().num_scored_tokens > 0
    for name in names:
        engine.release(name)
    assert clean(engine)
    assert BLOCK_TOKENS * engine.stats().kv_blocks_total == 640
