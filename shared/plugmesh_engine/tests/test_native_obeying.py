"""Grammars on the native executor: greedy rows whose logits it keeps to itself, among others, against an engine that asks matchers in Python and has all logits."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh.errors import GrammarTimeout
from plugmesh.testing.native_matcher import native_side
from plugmesh.types import FinishReason, SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.constrained import Constraint
from plugmesh_engine.testing import events_of, run_to_end, steps, tokens_of
from plugmesh_engine.testing_grammar import (
    INTEGER,
    LETTERS,
    PERSON,
    STRING,
    WORD,
    SmallMatcher,
    compile_small,
    one_of,
    record,
    small_vocabulary,
    star,
)
from plugmesh_engine.tests.test_native import KINDS, native_model

pytestmark = pytest.mark.skipif(not plugmesh_kernels.available(), reason=f"no native kernels: {plugmesh_kernels.why_not()}")

V = small_vocabulary()
GRAMMARS = [compile_small(PERSON), compile_small(record(name=WORD, age=INTEGER, note=STRING)), compile_small(star(one_of(LETTERS)))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40)
HOT = SamplingParams(temperature=1.2, max_tokens=40, seed=3)


@pytest.fixture(autouse=True)
def natively(monkeypatch):
    """Matchers have a native side."""

    def native(self):
        if self.kept is None:
            self.kept = native_side(self, V.num_words)
        return self.kept[0]

    monkeypatch.setattr(SmallMatcher, "native", native, raising=False)


def engine_of(kind: str = "f32", *, in_python: bool = False, drafts: object = None, **settings: object) -> Engine:
    model = native_model(kind, hidden_size=32, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=V.vocab_size, max_position=400)[0]
    config = EngineConfig(**{"executor": "native", "num_blocks": 256, "num_threads": 2, "overlap_masks": False, **settings})  # type: ignore[arg-type]
    engine = Engine(model, config, drafts=drafts)
    if in_python:
        engine._native_checks = None
    return engine


def rows_of(engine: Engine) -> list:
    """The rows of every run from now on."""
    seen, run = [], engine._executor.run
    engine._executor.run = lambda rows, *more: (seen.extend(rows), run(rows, *more))[1]
    return seen


def ask(name: str, sampling: SamplingParams = GREEDY, grammar: object = GRAMMARS[0], **fields: object) -> EngineRequest:
    constraint = None if grammar is None else Constraint(grammar, V)  # type: ignore[arg-type]
    prompt = np.random.default_rng(sum(name.encode())).integers(0, V.vocab_size, 5).tolist()
    return EngineRequest(name, tuple(prompt), sampling, grammar=constraint, **fields)  # type: ignore[arg-type]


def requests() -> list[EngineRequest]:
    return [
        *(ask(f"greedy {k} {i}", GREEDY, g) for k, g in enumerate(GRAMMARS) for i in range(3)),
        *(ask(f"hot {k}", HOT, g) for k, g in enumerate(GRAMMARS)),
        ask("several", dataclasses.replace(GREEDY, num_sequences=2)), ask("late", dataclasses.replace(GREEDY, min_tokens=6), GRAMMARS[2]),
        ask("told more", dataclasses.replace(GREEDY, logprobs=True, top_logprobs=2)), ask("penalised", dataclasses.replace(GREEDY, presence_penalty=1.0)),
        ask("free", dataclasses.replace(GREEDY, ignore_eos=True), None), ask("free and hot", dataclasses.replace(HOT, ignore_eos=True), None),
        ask("together", dataclasses.replace(HOT, num_sequences=3), GRAMMARS[2], max_total_tokens=31),
    ]  # fmt: skip


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_kept_logits_and_those_in_full_give_the_same_outputs(kind, jump):
    found = {}
    for in_python in (False, True):
        engine = engine_of(kind, in_python=in_python, jump_forward=jump)
        rows = rows_of(engine)
        tokens = run_to_end(engine, *requests())
        counters = engine._grammars.counters
        found[in_python] = tokens, counters.num_checked, counters.num_redrawn, counters.num_jumped_tokens, counters.num_errors
        kept = [r for r in rows if r.kept]
        assert not any(r.full and r.kept for r in rows) and engine.stats().kv_blocks_leaked == 0
        assert not kept if in_python else len(kept) > 100
        engine.close()
    assert found[False] == found[True]
    assert found[True][2] > 30, "no second draws: nothing was shown"


def test_siblings_share_what_they_may_generate_together_in_the_same_order():
    """Whether the output may end, or text is forced, is another question for each of them: those that wait for an answer are not overtaken."""
    found = {}
    for in_python in (False, True):
        engine = engine_of(in_python=in_python, jump_forward=True)
        sampling = dataclasses.replace(HOT, num_sequences=4)
        wanted = [ask(f"{k} {limit}", sampling, GRAMMARS[k], max_total_tokens=limit) for k in (0, 1) for limit in range(20, 60)]
        found[in_python] = run_to_end(engine, *wanted)
        engine.close()
    assert found[False] == found[True]


def test_a_matcher_that_hangs_ends_its_request_alone(monkeypatch):
    """Greedy ones among it are asked while the others are sampled."""
    gate = threading.Event()
    undisturbed = engine_of()
    want = run_to_end(undisturbed, *requests())
    undisturbed.close()
    engine = engine_of(grammar_timeout_s=2.0)
    all_of_them = requests()
    for request in all_of_them:
        engine.add(request)
    out = [engine.step() for _ in range(5)]
    bad, accept = engine._groups["greedy 0 1"].sequences[0].grammar.matcher, SmallMatcher.accept
    monkeypatch.setattr(SmallMatcher, "accept", lambda self, token: (self is bad and gate.wait(60), accept(self, token))[1])
    out += steps(engine)
    gate.set()
    errors = {e.request_id: e.error for e in events_of(out) if e.finish_reason is FinishReason.ERROR}
    assert list(errors) == ["greedy 0 1"] and isinstance(errors["greedy 0 1"], GrammarTimeout)
    for step in out:
        step.tokens = [e for e in step.tokens if e.request_id != "greedy 0 1"]
    del want["greedy 0 1"]
    assert tokens_of(engine, out) == want
    assert engine.stats().kv_blocks_leaked == 0
    engine.close()


def test_a_step_that_fails_and_is_done_in_parts_keeps_nothing():
    """Every sequence runs alone then, so what was kept would be of the last of them."""
    engine = engine_of()
    want = run_to_end(engine, *requests())
    run, num_runs, failed = engine._executor.run, 0, []

    def fails_now_and_then(rows, *more):
        nonlocal num_runs
        num_runs += 1
        if len(rows) > 3 and num_runs % 5 == 0:
            failed.append(len(rows))
            raise RuntimeError("broken")
        return run(rows, *more)

    engine._executor.run = fails_now_and_then
    assert run_to_end(engine, *requests()) == want
    assert len(failed) > 3
    engine.close()
