"""Sequences under a grammar: in the language whatever the model wants, and otherwise as if there were no grammar at all."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from structlog.testing import capture_logs

import plugmesh_kernels
from plugmesh.errors import FailedPrecondition, GrammarTimeout, InternalError, InvalidRequest
from plugmesh.testing.native_matcher import native_side
from plugmesh.types import FinishReason, SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.constrained import Constraint, Grammars, Jumper
from plugmesh_engine.testing import FakeModel, events_of, run_to_end, steps, tiny_config, tokens_of
from plugmesh_engine.testing_grammar import (
    END,
    INTEGER,
    LETTERS,
    PERSON,
    STRING,
    WORD,
    SmallMatcher,
    alt,
    compile_small,
    lit,
    one_of,
    record,
    seq,
    small_vocabulary,
    star,
    text_of,
)

VOCABULARY = small_vocabulary()
GRAMMAR = compile_small(PERSON)
FREE = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)


@pytest.fixture(autouse=True, params=["masks beside", "checked behind", "checked natively"])
def way(request, monkeypatch):
    """How engines without a setting of their own obey: masks beside the forward pass, or tokens checked behind their draw, in Python or without it."""
    monkeypatch.setattr("plugmesh_engine.engine.leaves_a_core", lambda config: request.param == "masks beside")
    if request.param == "checked natively":
        if not plugmesh_kernels.available():
            pytest.skip(plugmesh_kernels.why_not())

        def native(self):
            if self.kept is None:
                self.kept = native_side(self, VOCABULARY.num_words)
            return self.kept[0]

        monkeypatch.setattr(SmallMatcher, "native", native, raising=False)
    return request.param


def engine_of(drafts: object = None, num_kinds: int = 1 << 30, window: int = 1 << 30, **settings: object) -> Engine:
    config = EngineConfig(**{"num_blocks": 128, "max_model_len": 500, **settings})  # type: ignore[arg-type]
    return Engine(FakeModel(tiny_config(), num_kinds=num_kinds, window=window), config, drafts=drafts)


def ask(name: str, sampling: SamplingParams = GREEDY, grammar: object = GRAMMAR, prompt: Sequence[int] = (5, 6, 7), **fields: object) -> EngineRequest:
    constraint = None if grammar is None else Constraint(grammar, VOCABULARY)  # type: ignore[arg-type]
    return EngineRequest(name, tuple(prompt), sampling, grammar=constraint, **fields)  # type: ignore[arg-type]


def check_clean(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.kv_blocks_used == 0 and stats.kv_blocks_leaked == 0


class Repeats:
    """Drafts what the reference says, wrong now and then."""

    name = "repeats"

    def __init__(self, output: Sequence[int]) -> None:
        self.output = list(output)

    def propose(self, views, num_prompt_rows):
        drafts = []
        for v in views:
            at = len(v.tokens) - v.num_prompt_tokens
            draft = self.output[at : at + 5]
            if at % 2 and len(draft) > 1:
                draft[1] = 30  # a semicolon is in no person
            drafts.append(draft)
        return drafts

    def observe(self, outcome):
        pass


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_hot_output_of_random_weights_is_in_the_language(tiny, build, seed, jump):
    """Some outputs of STRING are cut by length, as it has no bound; those must be beginnings, the others whole."""
    grammar = compile_small(record(name=WORD, age=INTEGER, note=STRING))
    sampling = SamplingParams(temperature=1.5, max_tokens=80, seed=seed, num_sequences=3)
    engine = build(jump_forward=jump)
    engine.add(ask("a", sampling, grammar, prompt=(5, 6, 7 + seed)))
    out = steps(engine)
    reasons = {e.sequence: e.finish_reason for e in events_of(out) if e.finish_reason}
    for i, tokens in enumerate(tokens_of(engine, out)["a"]):
        text = text_of(VOCABULARY, tokens)
        if reasons[i] is FinishReason.STOP:
            assert grammar.matches(text), text
        else:
            assert len(tokens) == 80
            matcher = grammar.matcher()
            assert all(matcher.accept(t) for t in tokens)
    check_clean(engine)
    assert (engine.stats().num_jumped_tokens > 0) is jump


def test_probabilities_are_the_softmax_of_what_is_allowed(tiny, build):
    """Log-probabilities of a constrained row, against the model's logits from another way through the engine."""
    sampling = SamplingParams(temperature=1.5, max_tokens=12, seed=3, logprobs=True, top_logprobs=8)
    engine = build()
    engine.add(ask("a", sampling))
    told = [t for e in events_of(steps(engine)) for t in e.tokens]
    assert engine.stats().num_jumped_tokens == 0  # every token's row was wanted
    logits = np.concatenate([np.array(x) for x in engine.logits([5, 6, 7, *(t.token_id for t in told)])]).reshape(-1, VOCABULARY.vocab_size)
    matcher, mask = GRAMMAR.matcher(), np.zeros(VOCABULARY.num_words, np.uint32)
    for i, info in enumerate(told):
        matcher.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        x = logits[2 + i].astype(np.float64)[allowed]
        logprob = x - x.max() - np.log(np.exp(x - x.max()).sum())
        assert info.logprob == pytest.approx(logprob[allowed.tolist().index(info.token_id)], abs=1e-4)
        assert len(info.top) == min(8, len(allowed)) and {t for t, _ in info.top} <= set(allowed.tolist())
        assert [v for _, v in info.top] == pytest.approx(sorted(logprob, reverse=True)[:8], abs=1e-4)
        matcher.accept(info.token_id)


def test_draws_have_the_restricted_distribution():
    """Chi-square of first tokens over many seeds."""
    grammar = compile_small(one_of("abcdefgh"))
    engine = engine_of(prefix_cache=False)
    n = 600
    found = run_to_end(engine, *(ask(str(i), SamplingParams(temperature=1.5, max_tokens=1, seed=i), grammar) for i in range(200)))
    for start in range(200, n, 200):
        found |= run_to_end(engine, *(ask(str(i), SamplingParams(temperature=1.5, max_tokens=1, seed=i), grammar) for i in range(start, start + 200)))
    allowed = [t for t, b in enumerate(VOCABULARY.token_bytes) if t > END and b is not None and b in [bytes([c]) for c in b"abcdefgh"]]
    logits = engine._executor.logits(np.array([5, 6, 7], np.int32))[allowed].astype(np.float64) / 1.5
    wanted = n * np.exp(logits) / np.exp(logits).sum()
    counts = np.array([sum(found[str(i)][0][0] == t for i in range(n)) for t in allowed])
    assert counts.sum() == n
    big = wanted >= 5
    chi = ((counts[big] - wanted[big]) ** 2 / wanted[big]).sum()
    assert chi < 26, (counts, wanted)  # p < 0.0005 at 7 degrees of freedom


@pytest.mark.parametrize("sampling", [FREE, SamplingParams(temperature=0.9, max_tokens=40, seed=5, ignore_eos=True, logprobs=True)])
def test_free_rows_are_untouched_beside_different_grammars(sampling):
    """Bit for bit, log-probabilities included: the fake executor's logits do not depend on what is beside a row."""
    build = engine_of
    free = [ask(f"free{i}", sampling, None, prompt=(9, 8, 7 + i)) for i in range(3)]
    engine = build()
    for r in free:
        engine.add(r)
    alone = [e for e in events_of(steps(engine))]
    mixed = build()
    others = [ask("p", GREEDY), ask("i", dataclasses.replace(GREEDY, max_tokens=5), compile_small(INTEGER)), ask("s", GREEDY, compile_small(STRING))]
    for r in (free[0], others[0], free[1], others[1], others[2], free[2]):
        mixed.add(r)
    events = events_of(steps(mixed))
    for r in free:
        assert [(t.token_id, t.logprob) for e in events if e.request_id == r.request_id for t in e.tokens] == [
            (t.token_id, t.logprob) for e in alone if e.request_id == r.request_id for t in e.tokens
        ]
    for r in others:  # nor does a constrained one depend on what is beside it
        assert run_to_end(build(), r)[r.request_id] == [[t.token_id for e in events if e.request_id == r.request_id for t in e.tokens]]
    check_clean(mixed)


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_drafts_change_nothing(jump, temperature):
    for prompt in ((5, 6, 7), (9, 10), (40, 41, 42, 43)):
        request = ask("a", SamplingParams(temperature=temperature, max_tokens=60, seed=4), prompt=prompt)
        plain = engine_of(jump_forward=jump)
        wanted = run_to_end(plain, request)["a"]
        engine = engine_of(Repeats(wanted[0]), jump_forward=jump)
        assert run_to_end(engine, request)["a"] == wanted
        stats = engine.stats()
        assert stats.num_draft_tokens_accepted > 2 and stats.num_steps < plain.stats().num_steps
        assert engine._grammars.counters.num_draft_tokens_cut > 0
        check_clean(engine)


def test_drafts_that_write_forced_text_otherwise_change_nothing():
    """Such a draft is in the grammar, but what was computed behind it is not behind the tokens that were appended."""
    grammar = compile_small(record(firstname=WORD, occupation=WORD, residence=WORD))
    for prompt in ((5, 6, 7), (9, 10), (40, 41, 42, 43)):
        request = ask("a", dataclasses.replace(GREEDY, max_tokens=90), grammar, prompt=prompt)
        wanted = run_to_end(engine_of(), request)["a"]
        by_letters = [t for c in text_of(VOCABULARY, wanted[0]).decode() for t in VOCABULARY.encode(c)]  # type: ignore[misc]

        class Letters(Repeats):
            """Drafts single letters from where the output's text stands."""

            def propose(self, views, num_prompt_rows):
                done = [len(text_of(VOCABULARY, v.tokens[v.num_prompt_tokens :])) for v in views]
                return [self.output[n : n + 8] for n in done]

        engine = engine_of(Letters(by_letters))
        assert run_to_end(engine, request)["a"] == wanted
        assert engine.stats().num_draft_tokens > engine.stats().num_draft_tokens_accepted
        check_clean(engine)


def test_masks_of_a_draft_that_was_given_up_are_not_used_for_the_next_one():
    grammars = Grammars(VOCABULARY.vocab_size, (END,), jump=False, timeout_s=1.0)
    (cursor,) = grammars.open(Constraint(compile_small(alt(lit("ab"), lit("cd"))), VOCABULARY), ((),))
    a, b, c, d = (VOCABULARY.token_bytes.index(x) for x in (b"a", b"b", b"c", b"d"))
    for draft, behind in ((a, b), (c, d), (a, b)):
        grammars.fill([(cursor, [draft])])
        grammars.collect()
        mask = cursor.mask(1)
        assert mask is not None
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert behind in allowed and not {a, b, c, d}.difference({behind}) & set(allowed.tolist())
    grammars.close()


def test_every_token_is_the_best_of_those_allowed_or_forced():
    """A slow reference: replay the output; what was not forced must be the masked argmax behind the same tokens."""
    engine = engine_of()
    engine.add(ask("a"))
    events = [e for e in events_of(steps(engine)) if e.tokens]
    jumper, matcher, mask = Jumper(VOCABULARY), GRAMMAR.matcher(), np.zeros(VOCABULARY.num_words, np.uint32)
    tokens: list[int] = []
    num_forced = 0
    for e in events:
        for i, info in enumerate(e.tokens):
            matcher.fill(mask)
            if i == 0:
                logits = engine._executor.logits(np.array([5, 6, 7, *tokens], np.int32))
                logits[np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(logits)] == 0] = -np.inf
                assert info.token_id == logits.argmax()
            else:
                data = VOCABULARY.token_bytes[info.token_id] or b""
                assert matcher.forced().startswith(data)
                assert jumper.tokens(tokens, matcher.forced())[0][0] == info.token_id
                num_forced += 1
            assert matcher.accept(info.token_id)
            tokens.append(info.token_id)
    assert GRAMMAR.matches(text_of(VOCABULARY, tokens)) or len(tokens) == GREEDY.max_tokens
    assert num_forced == engine.stats().num_jumped_tokens > 0


def test_fixed_keys_save_steps_and_keep_the_text():
    """Where the model has no say but in the digits, the texts are equal, whatever tokens a masked run writes the keys with."""
    grammar = compile_small(record(firstname=lit("1"), occupation=lit("22"), residence=lit('"here"')))
    jumping, masking = engine_of(), engine_of(jump_forward=False)
    with_jumps, without = run_to_end(jumping, ask("a", grammar=grammar))["a"][0], run_to_end(masking, ask("a", grammar=grammar))["a"][0]
    text = b'{"firstname": 1,"occupation": 22,"residence": "here"}'
    assert text_of(VOCABULARY, with_jumps) == text_of(VOCABULARY, without) == text
    assert jumping.stats().num_steps < masking.stats().num_steps / 3
    assert with_jumps[-1] != END  # nothing is left to say: no pass for an end token
    check_clean(jumping)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("jump", [True, False])
def test_resumed_at_every_position_it_is_the_undisturbed_run(jump, temperature):
    request = ask("a", SamplingParams(temperature=temperature, max_tokens=50, seed=11), prompt=(21, 22))
    engine = engine_of(jump_forward=jump)
    wanted = run_to_end(engine, request)["a"][0]
    assert not jump or engine.stats().num_jumped_tokens > 0
    for at in range(1, len(wanted) + 1):
        again = engine_of(jump_forward=jump)
        events = []
        again.add(dataclasses.replace(request, resume=(tuple(wanted[:at]),)))
        events = events_of(steps(again))
        assert [t.token_id for e in events for t in e.tokens] == wanted[at:], at
        assert events[0].index == at and events[-1].request_done
        check_clean(again)


def test_a_jump_is_one_event_and_its_kv_is_right():
    """`tokens_of` checks the indices; the fake executor's logits depend on every token's KV, a resumed run's on fresh KV."""
    engine = engine_of()
    engine.add(ask("a", prompt=range(3, 30)))
    events = [e for e in events_of(steps(engine)) if len(e.tokens) > 1]
    assert events
    first = engine.stats()
    again = run_to_end(engine, ask("b", prompt=range(3, 30)))["b"][0]  # out of the prefix cache
    assert engine.stats().prefix_hit_tokens > first.prefix_hit_tokens
    fresh = run_to_end(engine_of(prefix_cache=False), ask("c", prompt=range(3, 30)))["c"][0]
    assert again == fresh
    # Blocks that a jump filled are found by a prompt that holds the same tokens.
    prompt = (*range(3, 30), *fresh)
    assert run_to_end(engine, ask("d", FREE, None, prompt=prompt))["d"] == run_to_end(engine_of(), ask("e", FREE, None, prompt=prompt))["e"]


@pytest.mark.parametrize("limit", range(1, 12))
def test_max_tokens_counts_forced_tokens(limit):
    whole = run_to_end(engine_of(), ask("a"))["a"][0]
    engine = engine_of()
    engine.add(ask("a", dataclasses.replace(GREEDY, max_tokens=limit)))
    events = events_of(steps(engine))
    assert [t.token_id for e in events for t in e.tokens] == whole[:limit]
    assert events[-1].finish_reason is FinishReason.LENGTH and events[-1].usage is not None and events[-1].usage.completion_tokens == limit
    total = engine_of()
    total.add(ask("b", dataclasses.replace(GREEDY, num_sequences=2), max_total_tokens=limit + 3))
    done = [e for e in events_of(steps(total)) if e.request_done]
    assert done[0].usage is not None and done[0].usage.completion_tokens == limit + 3
    check_clean(total)


def test_preempted_sequences_keep_their_place():
    requests = [ask(f"r{i}", dataclasses.replace(GREEDY, max_tokens=70), prompt=range(3, 40 + i)) for i in range(4)]
    wanted = {r.request_id: run_to_end(engine_of(), r)[r.request_id] for r in requests}
    engine = engine_of(num_blocks=14)
    assert run_to_end(engine, *requests) == wanted
    assert engine.stats().num_preemptions > 0
    check_clean(engine)


def test_cancelled_in_any_step_leaves_nothing():
    for num_steps in range(8):
        engine = engine_of()
        engine.add(ask("a", dataclasses.replace(GREEDY, num_sequences=3, temperature=1.0)))
        engine.add(ask("b"))
        for _ in range(num_steps):
            engine.step()
        engine.cancel("a", 1)
        engine.cancel("a")
        assert tokens_of(engine, steps(engine)).get("a") is None
        check_clean(engine)


def test_siblings_and_forks_have_a_matcher_each():
    engine = engine_of()
    request = ask("a", dataclasses.replace(GREEDY, temperature=1.5, num_sequences=4, seed=1), hold=True)
    texts = [text_of(VOCABULARY, t) for t in run_to_end(engine, request)["a"]]
    assert len(set(texts)) > 1
    engine.fork("a", 0, ask("f", prompt=(5,)))
    fork = run_to_end(engine)  # steps only
    assert GRAMMAR.matches(text_of(VOCABULARY, fork["f"][0])) or len(fork["f"][0]) == GREEDY.max_tokens
    engine.release("a")
    check_clean(engine)


def test_ends_without_a_pass_when_nothing_but_the_end_may_follow():
    grammar = compile_small(alt(lit("yes"), lit("no")))
    engine = engine_of(jump_forward=False)
    engine.add(ask("a", grammar=grammar))
    events = [e for e in events_of(steps(engine)) if e.tokens]
    assert events[-1].finish_reason is FinishReason.STOP and events[-1].tokens[-1].token_id != END
    assert engine.stats().num_steps == sum(len(e.tokens) for e in events)
    open_end = compile_small(star(one_of("ab")))  # the model must say when it is enough
    tokens = run_to_end(engine_of(), ask("b", dataclasses.replace(GREEDY, temperature=3.0, seed=2, max_tokens=200), grammar=open_end))["b"][0]
    assert tokens[-1] == END and open_end.matches(text_of(VOCABULARY, tokens))


def test_min_tokens_leaves_something_to_choose():
    sampling = SamplingParams(temperature=1.0, max_tokens=30, min_tokens=20, seed=8)
    tokens = run_to_end(engine_of(), ask("a", sampling, compile_small(star(one_of("ab")))))["a"][0]
    assert 20 < len(tokens) and END not in tokens[:20]  # kept where there is a choice
    only = run_to_end(engine_of(), ask("b", sampling, compile_small(lit("ab"))))["b"][0]
    assert text_of(VOCABULARY, only) == b"ab"  # and not where there is none
    tilde = VOCABULARY.token_bytes.index(b"~")
    stops = run_to_end(engine_of(), ask("c", dataclasses.replace(sampling, stop_token_ids=(tilde,)), compile_small(seq(lit("~"), star(one_of("bc"))))))
    assert stops["c"][0] == [tilde]  # all that the grammar allows is a stop token


def test_stop_tokens_end_a_constrained_output_too():
    comma = VOCABULARY.encode(",")[0] if VOCABULARY.encode else 0
    engine = engine_of(jump_forward=False)
    engine.add(ask("a", dataclasses.replace(GREEDY, stop_token_ids=(comma, *range(100, 211)), max_tokens=200)))
    events = events_of(steps(engine))
    assert events[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    check_clean(engine)


def test_bias_and_penalties_come_before_the_mask():
    a, b = (VOCABULARY.token_bytes.index(c) for c in (b"a", b"b"))
    bias = {**dict.fromkeys(range(3, 211), 0.0), a: 50.0, 30: 100.0}
    sampling = dataclasses.replace(GREEDY, logit_bias=bias, max_tokens=3)
    assert run_to_end(engine_of(), ask("x", sampling, compile_small(star(one_of("ab")))))["x"] == [[a, a, a]]
    penalised = dataclasses.replace(sampling, logit_bias={a: 50.0, b: 49.9}, presence_penalty=2.0)
    assert run_to_end(engine_of(), ask("y", penalised, compile_small(star(one_of("ab")))))["y"][0][:2] == [a, b]


def test_what_does_not_go_together_is_refused():
    engine = engine_of()
    for request, param in (
        (ask("a", dataclasses.replace(GREEDY, ignore_eos=True)), "ignore_eos"),
        (ask("a", prefill_only=True), "grammar"),
        (ask("a", score=((3, 4),)), "grammar"),
        (ask("a", taps=(0,)), "grammar"),
        (ask("a", resume=((VOCABULARY.token_bytes.index(b"}"),),)), "resume"),
    ):
        with pytest.raises(InvalidRequest) as e:
            engine.add(request)
        assert e.value.param == param
    other = Constraint(GRAMMAR, dataclasses.replace(VOCABULARY, vocab_size=200))
    with pytest.raises(FailedPrecondition):
        engine.add(dataclasses.replace(ask("a"), grammar=other))
    check_clean(engine)
    assert run_to_end(engine, ask("a"))["a"]  # the name is free


# -- matchers that misbehave -------------------------------------------------------------------------------------------------------


GATE = threading.Event()


@dataclasses.dataclass(eq=False)
class Bad(SmallMatcher):
    """Fails in one method after some tokens."""

    how: str = ""
    after: int = 0

    def _maybe(self, method: str) -> None:
        if len(self.history) > self.after:
            if self.how == f"raise in {method}":
                raise RuntimeError("broken")
            if self.how == f"hang in {method}":
                GATE.wait(30)

    def fill(self, mask):
        self._maybe("fill")
        if self.how == "nothing allowed" and len(self.history) > self.after:
            mask[:] = 0
            return True
        return super().fill(mask)

    def accept(self, token_id):
        self._maybe("accept")
        return super().accept(token_id) and not (self.how == "refuses" and len(self.history) > self.after + 1)

    def forced(self):
        self._maybe("forced")
        return super().forced()


@dataclasses.dataclass(frozen=True)
class BadGrammar:
    how: str
    after: int = 2
    num_bytes: int = 0

    def matcher(self):
        return Bad(GRAMMAR, [GRAMMAR.start], self.how, self.after)


@pytest.mark.parametrize("how", [f"{what} in {method}" for what in ("raise", "hang") for method in ("fill", "accept", "forced")] + ["nothing allowed", "refuses"])
@pytest.mark.parametrize("drafts", [False, True])
def test_a_bad_matcher_costs_its_request_only(how, drafts):
    good = [ask("g0"), ask("g1", dataclasses.replace(GREEDY, temperature=1.0, seed=3)), ask("free", FREE, None)]
    wanted = {r.request_id: run_to_end(engine_of(), r)[r.request_id] for r in good}
    engine = engine_of(Repeats(wanted["g0"][0]) if drafts else None, grammar_timeout_s=0.1)
    with capture_logs():
        for r in (good[0], ask("bad", grammar=BadGrammar(how)), *good[1:]):
            engine.add(r)
        slowest, out = 0.0, []
        while engine.has_work():
            began = time.perf_counter()
            out.append(engine.step())
            slowest = max(slowest, time.perf_counter() - began)
    errors = [e for e in events_of(out) if e.error is not None]
    assert [e.request_id for e in errors] == ["bad"] and errors[0].request_done
    assert isinstance(errors[0].error, GrammarTimeout if "hang" in how else InternalError)
    found = {r: [[t.token_id for e in events_of(out) if e.request_id == r for t in e.tokens]] for r in wanted}
    assert found == wanted
    assert slowest < 1.0 and engine.stats().num_grammar_errors == 1
    check_clean(engine)
    GATE.set()  # the given-up thread comes back, and finds nothing to do
    time.sleep(0.01)
    GATE.clear()
    assert run_to_end(engine, ask("again"))["again"] == wanted["g0"]
    engine.close()


@pytest.mark.parametrize("how", ["raise in accept", "hang in accept"])
def test_a_bad_matcher_at_the_start_is_told_to_the_caller(how):
    engine = engine_of(grammar_timeout_s=0.1)
    tokens = run_to_end(engine_of(), ask("a"))["a"][0][:4]
    with capture_logs(), pytest.raises((GrammarTimeout, InternalError)):
        engine.add(ask("bad", grammar=BadGrammar(how, after=0), resume=(tuple(tokens),)))
    GATE.set()
    check_clean(engine)
    assert not engine.has_work()
    GATE.clear()


# -- beside the forward pass -------------------------------------------------------------------------------------------------------


def test_masks_are_filled_while_the_model_computes(monkeypatch):
    """In every step mask and forward pass meet in the middle of both; one after another the first would wait in vain."""
    middle = threading.Barrier(2)
    fill, met = SmallMatcher.fill, []

    def meeting_fill(self, mask):
        met.append(middle.wait(30))
        return fill(self, mask)

    monkeypatch.setattr(SmallMatcher, "fill", meeting_fill)
    engine = engine_of(jump_forward=False, grammar_timeout_s=60, overlap_masks=True)
    run = engine._executor.run

    def meeting_run(*args):
        met.append(middle.wait(30))
        return run(*args)

    engine._executor.run = meeting_run
    # never completed, so that whether it is over needs no mask of its own
    grammar = compile_small(star(one_of(LETTERS)))
    engine.add(ask("a", dataclasses.replace(GREEDY, max_tokens=20), dataclasses.replace(grammar, end=type(grammar.end)())))
    steps(engine)
    assert len(met) == 40 and sum(met) == 20  # a meeting gives one of them 0, the other 1
    assert engine.stats().num_masks_filled == 20


def test_seq_builds_what_it_says():
    """The test grammar itself, against Python's re."""
    import re

    grammar = compile_small(seq(alt(lit("a"), lit("bc")), star(one_of("de"))))
    for text in ("a", "bc", "ade", "bced", "", "b", "ad" * 3, "abc", "ae"):
        assert grammar.matches(text.encode()) == bool(re.fullmatch("(a|bc)[de]*", text))



@pytest.mark.parametrize("jump", [False, True])
def test_masks_beside_the_forward_pass_and_ahead_of_it_are_the_same(jump):
    """Ahead, only a prompt's own step hands masks to the other thread between acceptances."""
    found, batches = {}, {}
    for beside in (False, True):
        engine = engine_of(jump_forward=jump, overlap_masks=beside)
        fill, filled = engine._grammars.fill, []

        def counting(rows, fill=fill, filled=filled, engine=engine):
            fill(rows)
            filled.append(engine._grammars._filling is not None)

        engine._grammars.fill = counting
        found[beside] = run_to_end(engine, ask("a"), ask("b", dataclasses.replace(GREEDY, temperature=1.5, seed=4)))
        batches[beside] = sum(filled)
        check_clean(engine)
        engine.close()
    assert found[True] == found[False]
    assert batches[False] < batches[True]


def test_a_mask_is_computed_where_the_free_draw_is_refused_and_nowhere_else():
    """Every token is checked once; those refused have a mask each. What asks for more than a token has a mask for each."""
    engine = engine_of(jump_forward=False, overlap_masks=False)
    num = sum(len(tokens) for (tokens,) in run_to_end(engine, ask("a"), ask("b", dataclasses.replace(GREEDY, temperature=1.5, seed=4))).values())
    stats = engine.stats()
    assert stats.num_checked + stats.num_redrawn == num
    assert 0 < stats.num_redrawn < num
    before = stats.num_masks_filled
    found = run_to_end(engine, ask("c", dataclasses.replace(GREEDY, temperature=1.0, seed=4, top_p=0.9)))
    assert engine.stats().num_checked + engine.stats().num_redrawn == num
    assert engine.stats().num_masks_filled - before >= len(found["c"][0]) - 1  # the last may be known to be an end
    engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_with_drafts_masks_beside_and_checks_behind_are_the_same(temperature):
    sampling = dataclasses.replace(GREEDY, temperature=temperature, seed=11)
    plain = run_to_end(engine_of(jump_forward=False, overlap_masks=False), ask("a", sampling))
    for beside in (False, True):
        engine = engine_of(Repeats(plain["a"][0]), overlap_masks=beside, jump_forward=False)
        assert run_to_end(engine, ask("a", sampling)) == plain
        assert engine.stats().num_draft_tokens_accepted > 0
        engine.close()


@pytest.mark.skipif(not plugmesh_kernels.available(), reason=plugmesh_kernels.why_not())
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("way", ["checked natively"], indirect=True)
def test_what_is_checked_without_python_is_what_python_would_have_done(way, jump):
    """The same tokens in the same events, as many draws and masks, greedy and hot, alone and beside others; and Python is asked only where text is forced or may end."""
    sampling = [GREEDY, *(dataclasses.replace(GREEDY, temperature=1.3, seed=s, num_sequences=2) for s in range(6))]
    grammars = [GRAMMAR, compile_small(record(name=WORD, age=INTEGER, note=STRING)), compile_small(star(one_of(LETTERS)))]

    def run(engine):
        found = run_to_end(engine, *(ask(f"{i}.{k}", s, g) for i, s in enumerate(sampling) for k, g in enumerate(grammars)))
        check_clean(engine)
        counters = dataclasses.asdict(engine._grammars.counters)
        engine.close()
        return found, {name: counters[name] for name in ("num_checked", "num_redrawn", "num_jumped_tokens", "num_errors")}

    natively = engine_of(jump_forward=jump)
    asked, looked, advance = [], [], natively._grammars.advance
    begin = natively._native_checks._begin
    natively._native_checks._begin = lambda rows, *args: (asked.extend(rows), begin(rows, *args))[1]
    natively._grammars.advance = lambda parts: (looked.extend(parts), advance(parts))[1]
    in_python = engine_of(jump_forward=jump)
    in_python._native_checks = None
    found, counters = run(natively)

    assert (found, counters) == run(in_python)
    assert len(asked) == counters["num_checked"] + counters["num_redrawn"] > 500 and counters["num_redrawn"] > 50
    assert all(part.is_accepted for part in looked) and 0 < len(looked) < len(asked)
