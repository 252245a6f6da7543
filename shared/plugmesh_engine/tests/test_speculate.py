"""Whatever is drafted, the output is that of a run without drafts, and nothing is left behind."""

import dataclasses
import random
from collections.abc import Callable, Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from plugmesh.records import DraftContext, DraftRecord
from plugmesh.types import FinishReason, SamplingParams
from plugmesh_engine import DraftOutcome, DraftView, Engine, EngineConfig, EngineRequest, StepOutput, TokenEvent
from plugmesh_engine.attention import TorchAttention
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.executors.torch import TorchExecutor, TorchModel
from plugmesh_engine.testing import FakeModel, events_of, run_to_end, steps, tiny_config, tokens_of

Build = Callable[..., Engine]
CONFIG = tiny_config(vocab_size=61, max_position=200)
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


class Oracle:
    """Drafts the known output, `right` tokens of it, and garbage behind."""

    def __init__(self, output: dict[str, list[list[int]]], right: int, garbage: Sequence[object] = ()) -> None:
        self.output, self.right, self.garbage = output, right, garbage
        self.outcomes: list[DraftOutcome] = []

    def propose(self, views: Sequence[DraftView], num_prompt_rows: int) -> list[list[object]]:
        drafts: list[list[object]] = []
        for v in views:
            done = len(v.tokens) - v.num_prompt_tokens
            drafts.append([*self.output[v.request_id][v.index][done : done + self.right], *self.garbage])
        return drafts

    def observe(self, outcome: DraftOutcome) -> None:
        self.outcomes.append(outcome)


class Adversary(Oracle):
    """Right, wrong, beyond every limit, not a token, not a list, or an exception, by its own dice."""

    def __init__(self, output: dict[str, list[list[int]]], seed: int) -> None:
        super().__init__(output, 0)
        self.dice = random.Random(seed)

    def propose(self, views: Sequence[DraftView], num_prompt_rows: int) -> object:  # type: ignore[override]
        match self.dice.randrange(12):
            case 0:
                raise RuntimeError("boom")
            case 1:
                return [[1]] * (len(views) + 1)
            case 2:
                return None
            case 3:
                return [iter([1, 2])] * len(views)
        self.right = self.dice.choice([0, 1, 2, 5, 40])
        self.garbage = [self.dice.choice([0, 2, 60, 61, -1, 10**30, "x", None, 1.5, np.int64(3)]) for _ in range(self.dice.randrange(5))]
        return super().propose(views, num_prompt_rows)

    def observe(self, outcome: DraftOutcome) -> None:
        if self.dice.random() < 0.1:
            raise ValueError("no")
        assert all(0 <= a <= d <= v.max_draft_tokens for a, d, v in zip(outcome.num_accepted, outcome.num_drafted, outcome.views, strict=True))
        assert outcome.num_rows == outcome.num_prompt_rows + len(outcome.views) + sum(outcome.num_drafted)


def fake(**changes: object) -> Engine:
    drafts = changes.pop("drafts", None)
    return Engine(FakeModel(CONFIG), EngineConfig(**{"num_blocks": 64, **changes}), drafts=drafts)  # type: ignore[arg-type]


def merged(outputs: list[StepOutput]) -> list[TokenEvent]:
    """One event per sequence: all its tokens, and its end. What must not depend on how many steps it took."""
    found: dict[tuple[str, int], TokenEvent] = {}
    for e in events_of(outputs):
        old = found.get((e.request_id, e.sequence))
        if old is not None:
            assert e.index == old.index + len(old.tokens) and old.finish_reason is None
            e = dataclasses.replace(e, index=old.index, tokens=old.tokens + e.tokens)
        found[e.request_id, e.sequence] = e
    # Which sibling ends last, and so tells of the request's end, may differ.
    return [dataclasses.replace(found[k], request_done=False, usage=None) for k in sorted(found)]


def assert_clean(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)


SAMPLING = st.builds(
    SamplingParams, temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]), top_p=st.sampled_from([1.0, 0.8]), top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.4]), frequency_penalty=st.sampled_from([0.0, 0.8]), seed=st.integers(0, 9),
    max_tokens=st.integers(1, 40), min_tokens=st.sampled_from([0, 1]), stop_token_ids=st.sampled_from([(), (5, 6, 7, 8, 9)]), ignore_eos=st.booleans(),
    logprobs=st.booleans(), top_logprobs=st.sampled_from([0, 2]), num_sequences=st.sampled_from([1, 1, 3]),
    logit_bias=st.sampled_from([{}, {7: 3.0}]),
)  # fmt: skip


def request_of(draw_id: int, length: int, sampling: SamplingParams, seed: int) -> EngineRequest:
    ids = tuple(np.random.default_rng(seed).integers(3, 61, length).tolist())
    return EngineRequest(f"r{draw_id}", ids, sampling)


@settings(max_examples=120, deadline=None)
@given(
    load=st.lists(st.tuples(st.integers(1, 50), SAMPLING, st.integers(0, 3)), min_size=1, max_size=5), seed=st.integers(0, 999),
    num_blocks=st.sampled_from([64, 20]), max_draft=st.sampled_from([1, 3, 16]), chunk=st.sampled_from([7, 64]),
)  # fmt: skip
def test_drafts_of_any_kind_change_nothing(load: list[tuple[int, SamplingParams, int]], seed: int, num_blocks: int, max_draft: int, chunk: int) -> None:
    """Also in a pool so small that sequences are preempted."""
    requests = [request_of(i, n, s, seed) for i, (n, s, seed) in enumerate(load)]
    plain = fake(max_tokens_per_step=chunk)
    for r in requests:
        plain.add(r)
    outputs = steps(plain)
    wanted = merged(outputs)
    drafted = fake(max_tokens_per_step=chunk, num_blocks=num_blocks, max_draft_tokens=max_draft, drafts=Adversary(tokens_of(plain, outputs), seed))
    for r in requests:
        drafted.add(r)
    found: list[StepOutput] = []
    while drafted.has_work():
        found.append(drafted.step())
        assert drafted.stats().kv_blocks_leaked == 0

    assert merged(found) == wanted
    assert {e.request_id: e.usage for e in events_of(found) if e.usage} == {e.request_id: e.usage for e in events_of(outputs) if e.usage}
    assert_clean(drafted)


@pytest.mark.parametrize("seed", range(4))
def test_cancelling_and_resuming_between_drafts(seed: int) -> None:
    """Requests come, are cancelled at any moment and go on elsewhere with what was delivered; the whole is the undisturbed run."""
    dice = random.Random(seed)
    requests = [request_of(i, dice.randrange(1, 40), dataclasses.replace(GREEDY, temperature=dice.choice([0, 1.0]), seed=i), i) for i in range(20)]
    output = run_to_end(fake(num_blocks=400), *requests)
    engine = fake(num_blocks=30, max_tokens_per_step=20, drafts=Adversary(output, seed))
    delivered: dict[str, list[int]] = {r.request_id: [] for r in requests}
    done: set[str] = set()

    def step() -> None:
        for e in engine.step().tokens:
            assert e.error is None and e.index == len(delivered[e.request_id])
            delivered[e.request_id] += [t.token_id for t in e.tokens]
            if e.request_done:
                done.add(e.request_id)
        assert engine.stats().kv_blocks_leaked == 0

    for r in requests:
        engine.add(r)
        for _ in range(dice.randrange(3)):
            step()
        victim = requests[dice.randrange(20)]
        if engine.cancel(victim.request_id):
            engine.add(dataclasses.replace(victim, resume=(tuple(delivered[victim.request_id]),)))
    while engine.has_work():
        step()

    assert {r: [t] for r, t in delivered.items()} == output
    assert len(done) == 20
    assert_clean(engine)


def test_right_drafts_save_steps_and_are_counted() -> None:
    r = request_of(0, 10, GREEDY, 1)
    output = run_to_end(fake(), r)
    oracle = Oracle(output, right=9)
    engine = fake(drafts=oracle)
    engine.add(r)
    events = events_of(steps(engine))

    assert [len(e.tokens) for e in events] == [1, 10, 10, 9]
    assert engine.stats().num_steps == 4
    assert (engine.stats().num_draft_tokens, engine.stats().num_draft_tokens_accepted, engine.stats().num_draft_errors) == (26, 26, 0)
    assert [o.num_accepted for o in oracle.outcomes] == [[9], [9], [8]]
    assert all(o.step_ms > 0 for o in oracle.outcomes)


def test_wrong_drafts_cost_rows_and_nothing_else() -> None:
    r = request_of(0, 10, GREEDY, 1)
    output = run_to_end(fake(), r)
    wrong = {"r0": [[(t + 1) % 61 for t in output["r0"][0]]]}
    engine = fake(drafts=Oracle(wrong, right=3))

    assert run_to_end(engine, r) == output
    assert engine.stats().num_steps == 30
    assert engine.stats().num_draft_tokens_accepted == 0 < engine.stats().num_draft_tokens


def test_no_row_is_computed_that_no_token_can_come_from() -> None:
    """Limits of the request and of the context bound a draft, and the row behind the last drafted token gives the last token."""
    for changes, length in (({}, 10), ({"max_model_len": 26}, 10)):
        sampling = dataclasses.replace(GREEDY, max_tokens=16 if changes else 30)
        r = request_of(0, length, sampling, 1)
        output = run_to_end(fake(**changes), r)
        engine = fake(drafts=Oracle(output, right=50, garbage=[1] * 50), max_draft_tokens=16, **changes)

        assert run_to_end(engine, r) == output
        assert engine._executor.num_rows == length + len(output["r0"][0]) - 1  # type: ignore[attr-defined]


def test_a_stop_token_among_the_drafted_ones_ends_the_sequence_there() -> None:
    r = request_of(0, 10, GREEDY, 1)
    [tokens] = run_to_end(fake(), r)["r0"]
    stop = tokens[7]
    stopped = dataclasses.replace(r, sampling=dataclasses.replace(GREEDY, stop_token_ids=(stop,)))
    engine = fake(drafts=Oracle({"r0": [tokens]}, right=16))
    engine.add(stopped)
    events = events_of(steps(engine))

    assert [t.token_id for e in events for t in e.tokens] == tokens[: tokens.index(stop) + 1]
    assert events[-1].finish_reason is FinishReason.STOP and events[-1].usage is not None
    assert events[-1].usage.completion_tokens == tokens.index(stop) + 1
    assert_clean(engine)


def test_accepted_tokens_are_found_by_the_next_turn_and_rejected_ones_are_not() -> None:
    r = request_of(0, 20, dataclasses.replace(GREEDY, max_tokens=40), 1)
    output = run_to_end(fake(), r)
    plain, drafted = fake(), fake(drafts=Oracle(output, right=6, garbage=[1, 2, 3, 4, 5, 6, 7]))
    for engine in (plain, drafted):
        run_to_end(engine, r)
    whole = [*r.token_ids, *output["r0"][0]]

    assert drafted.cached_prefix(whole) == plain.cached_prefix(whole) == 48
    assert sorted(drafted._pool.prefix._block_of) == sorted(plain._pool.prefix._block_of)
    follow = EngineRequest("next", tuple(whole), GREEDY)
    assert run_to_end(drafted, follow) == run_to_end(fake(), follow)


def test_drafts_take_no_block_from_the_admissions_margin() -> None:
    r = request_of(0, 16, dataclasses.replace(GREEDY, max_tokens=16), 1)
    output = run_to_end(fake(), r)
    engine = fake(num_blocks=2, drafts=Oracle(output, right=16))  # a watermark of one block

    assert run_to_end(engine, r) == output
    assert engine.stats().num_preemptions == 0


def test_a_record_builds_one_method_with_the_facts_of_the_engine() -> None:
    seen: list[DraftContext] = []

    def build_method(context: DraftContext) -> Oracle:
        seen.append(context)
        return Oracle({}, 0)

    fake(drafts=DraftRecord("mine", build_method), max_draft_tokens=5)
    fake(drafts=DraftRecord("off", build_method), max_draft_tokens=0)

    [context] = seen
    assert (context.max_draft_tokens, context.max_num_sequences, context.num_blocks, context.vocab_size) == (5, 64, 64, 61)
    assert context.measure_step_ms is not None and context.measure_step_ms(0, 3, 20) > 0


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, top_p=0.95, frequency_penalty=0.3, seed=5, max_tokens=30, ignore_eos=True)])
def test_the_torch_executor_checks_drafts_too(build: Build, sampling: SamplingParams) -> None:
    rs = [EngineRequest(f"r{i}", tuple(np.random.default_rng(i).integers(3, 211, n).tolist()), sampling) for i, n in enumerate((5, 31, 17))]
    output = run_to_end(build(), *rs)
    engine = build(drafts=Oracle(output, right=4, garbage=[7, 9]))

    assert run_to_end(engine, *rs) == output
    assert engine.stats().num_draft_tokens_accepted > 40
    assert_clean(engine)


class Poison(TorchAttention):
    """NaN for every row whose token is 3, an exception for a step with token 4."""

    def plan(self, batch: Batch) -> None:
        super().plan(batch)
        self.bad = batch.token_ids == 3
        if (batch.token_ids == 4).any():
            raise RuntimeError("boom")

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.where(self.bad[:, None, None], float("nan"), super().run(q, k, v, layer))


@pytest.mark.parametrize("poison", [3, 4])
@pytest.mark.parametrize("right", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rejected_token_that_breaks_the_model_leaves_no_trace(tiny: TorchModel, poison: int, right: int, temperature: float) -> None:
    never = SamplingParams(temperature=temperature, seed=1, max_tokens=40, ignore_eos=True, logit_bias={3: -1e4, 4: -1e4})
    rs = [EngineRequest(f"r{i}", tuple(np.random.default_rng(i).integers(5, 211, n).tolist()), never) for i, n in enumerate((14, 30))]
    config = EngineConfig(executor="torch", dtype="float32", num_blocks=64)
    output = run_to_end(Engine(tiny, config), *rs)
    drafts = Oracle(output, right, garbage=[poison, 9, 9])
    engine = Engine(tiny, config, drafts=drafts, executor=TorchExecutor(tiny, config, attention=Poison))

    assert run_to_end(engine, *rs) == output
    assert_clean(engine)
