"""`begin_matches`: matchers on a worker of the executor's pool, between forward passes, and what is left of the pool behind one that hangs."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh.testing.native_matcher import native_side
from plugmesh_engine.sampler import _uniform, draw_allowed, uniforms
from plugmesh_engine.testing_grammar import LETTERS, PERSON, WORD, compile_small, one_of, small_vocabulary, star
from plugmesh_engine.tests import test_native

pytestmark = pytest.mark.skipif(not plugmesh_kernels.available(), reason=f"no native kernels: {plugmesh_kernels.why_not()}")

V = small_vocabulary()
VOCAB = V.vocab_size


class Row:
    """A matcher, its native side, and one that goes the same way in Python."""

    def __init__(self, grammar, seed: int, temperature: float) -> None:
        self.matcher, self.reference = grammar.matcher(), grammar.matcher()
        self.seed, self.temperature = seed, temperature
        self.capsule, self.kept = native_side(self.matcher, V.num_words)
        self.native = plugmesh_kernels.native().MatchRow(self.capsule, (self.matcher, self.kept), V.num_words, seed, 3, temperature, True)

    def expected(self, token: int, position: int, logits: np.ndarray) -> tuple[int, int]:
        k, flags = plugmesh_kernels.native(), 0
        if not self.reference.accept(token):
            mask = np.zeros(V.num_words, np.uint32)
            self.reference.fill(mask)
            token = draw_allowed(logits, mask, self.temperature, _uniform(self.seed, 3, position))
            flags = k.MATCH_REDRAWN
            assert self.reference.accept(token)
        flags |= k.MATCH_COMPLETED * self.reference.is_completed | k.MATCH_TERMINATED * self.reference.is_terminated
        if not (self.reference.is_completed or self.reference.is_terminated) and self.reference.forced():
            flags |= k.MATCH_IS_FORCED
        return token, flags


def executor(num_threads: int):
    return test_native.executor(test_native.native_model("f32")[0], num_threads=num_threads)


def checked(e, rows, tokens, positions, logits, logit_rows, timeout_s):
    """Accepted tokens and flags of all rows, or of those before one whose matcher hangs."""
    run = e.begin_matches(rows, tokens, positions, logits, logit_rows, timeout_s)
    found = [f for f in map(run.result, range(len(rows))) if f is not None]
    assert run.given_up_at == (-1 if len(found) == len(rows) else len(found))
    return [token for token, _ in found], [flags for _, flags in found]


def sampled(e, logits: np.ndarray) -> list[int]:
    """The pool's threads together."""
    n = len(logits)
    return e.sample(logits, np.zeros(n, np.float32), np.zeros(n, np.int32), np.ones(n, np.float32), np.zeros(n, np.float32), np.zeros(n)).tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_its_random_numbers_are_those_of_the_sampler(seed, sequence, position):
    assert plugmesh_kernels.native().match_uniform(seed, sequence, position) == uniforms([seed], [sequence], [position])[0]


@pytest.mark.parametrize("num_threads", [2, 3])
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["check", "begin", "run", "nothing"]), min_size=1, max_size=30), st.integers(0, 1000))
def test_checks_and_runs_in_any_order_on_one_pool(num_threads, acts, seed):
    """`begin`: the results are looked at when the pool has done other things, or is gone."""
    begun = []
    rng, e = np.random.default_rng(seed), executor(num_threads)
    grammars = [compile_small(PERSON), compile_small(WORD), compile_small(star(one_of(LETTERS)))]
    rows = [Row(g, seed, t) for g in grammars for t in (0.0, 1.2)]
    for position, act in enumerate(acts):
        logits = rng.normal(0, 3, (len(rows), VOCAB)).astype(np.float32)
        if act == "run":
            assert sampled(e, logits) == logits.argmax(1).tolist()
        elif act == "nothing":
            assert checked(e, [], [], [], logits, [], 5.0) == ([], [])
        else:
            alive = [r for r in rows if not r.reference.is_terminated]
            tokens = rng.integers(0, VOCAB, len(alive)).tolist()
            at = rng.permutation(len(rows))[: len(alive)].tolist()
            want = [r.expected(t, position, logits[i]) for r, t, i in zip(alive, tokens, at, strict=True)]
            what = [r.native for r in alive], tokens, [position] * len(alive), logits, at, 5.0
            if act == "begin":
                begun.append((e.begin_matches(*what), want))
            else:
                assert list(zip(*checked(e, *what), strict=True)) == want
    e.close()
    for run, want in begun:
        assert [run.result(i) for i in range(len(want))] == want


@pytest.mark.parametrize("kind", ["two threads", "three threads", "its own"])
def test_a_matcher_that_hangs_loses_its_thread_and_nothing_else(kind):
    e = plugmesh_kernels.native().MatchThread() if kind == "its own" else executor({"two threads": 2, "three threads": 3}[kind])
    grammar = compile_small(star(one_of(LETTERS)))
    gate, entered = threading.Event(), threading.Event()

    class Hangs(type(grammar.matcher())):
        def accept(self, token_id):
            entered.set()
            gate.wait(60)
            return super().accept(token_id)

    logits = np.zeros((3, VOCAB), np.float32)
    letter = next(t for t in range(VOCAB) if grammar.matcher().accept(t) and t not in V.special_ids)
    for _ in range(3):
        rows = [Row(grammar, 1, 0.0) for _ in range(3)]
        bad = Hangs(rows[1].matcher.grammar, list(rows[1].matcher.history))
        rows[1].capsule, rows[1].kept = native_side(bad, V.num_words)
        rows[1].native = plugmesh_kernels.native().MatchRow(rows[1].capsule, (bad, rows[1].kept), V.num_words, 1, 0, 0.0, False)
        natives = [r.native for r in rows]

        tokens, flags = checked(e, natives, [letter] * 3, [0] * 3, logits, [0, 1, 2], 0.2)
        assert (len(tokens), len(flags)) == (1, 1) and tokens == [letter]
        assert entered.is_set() and not rows[2].matcher.history[1:]
        tokens, _ = checked(e, natives[2:], [letter], [0], logits, [2], 5.0)
        assert tokens == [letter]
        if kind != "its own":
            assert sampled(e, np.eye(3, VOCAB, dtype=np.float32)) == [0, 1, 2]
    gate.set()  # those that were given up on come back, and may not touch the pool or go on to the third matcher
    deadline = time.monotonic() + 10
    while len(bad.history) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(bad.history) == 2
    time.sleep(0.05)
    assert len(rows[2].matcher.history) == 2
    if kind != "its own":
        assert sampled(e, np.eye(3, VOCAB, dtype=np.float32)) == [0, 1, 2]
        e.close()


def test_a_matcher_that_fails_or_allows_nothing_is_told_apart():
    k, grammar = plugmesh_kernels.native(), compile_small(WORD)
    thread = k.MatchThread()

    class Odd(type(grammar.matcher())):
        how = ""

        def accept(self, token_id):
            if self.how == "raise":
                raise RuntimeError("broken")
            return self.how == "accept" and super().accept(token_id)

        def fill(self, mask):
            mask[:] = 0
            return self.how != "free"

    found = {}
    for how in ("raise", "free", "nothing", "accept"):
        matcher = Odd(grammar, [grammar.start])
        matcher.how = how
        capsule, kept = native_side(matcher, V.num_words)
        row = k.MatchRow(capsule, (matcher, kept), V.num_words, 1, 0, 0.0, False)
        letter = next(t for t in range(VOCAB) if grammar.matcher().accept(t))
        found[how] = checked(thread, [row], [letter], [0], np.zeros((1, VOCAB), np.float32), [0], 5.0)[1][0]
    assert {h: f & (k.MATCH_FAILED | k.MATCH_NOTHING) for h, f in found.items()} == {
        "raise": k.MATCH_FAILED, "free": k.MATCH_FAILED, "nothing": k.MATCH_NOTHING, "accept": 0}


@pytest.mark.parametrize("change", ["token count", "row of the logits", "dtype", "a capsule of another name"])
def test_what_does_not_fit_is_refused(change):
    k, row = plugmesh_kernels.native(), Row(compile_small(WORD), 1, 0.0)
    logits = np.zeros((1, VOCAB), np.float32)
    with pytest.raises(ValueError):
        if change == "a capsule of another name":
            from plugmesh_kernels import jit

            k.MatchRow(jit.capsule(row.kept, "plugmesh.layer.v1"), None, V.num_words, 1, 0, 0.0, False)
        k.MatchThread().begin_matches(
            [row.native], [1, 2] if change == "token count" else [1], [0], logits.astype(np.float64) if change == "dtype" else logits,
            [1] if change == "row of the logits" else [0], 1.0,
        )  # fmt: skip
