"""What the engine refuses, how requests end, and that whatever happens leaves no block behind."""

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from plugmesh.errors import (
    AlreadyExists,
    ConfigError,
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Overloaded,
    PlugmeshError,
)
from plugmesh.types import FinishReason, SamplingParams, TokenInfo, Usage
from plugmesh_engine import Engine, EngineConfig, EngineRequest, KvSource, TokenEvent
from plugmesh_engine.attention import TorchAttention
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.executors.torch import TorchExecutor, TorchModel
from plugmesh_engine.testing import events_of, run_to_end, steps, tokens_of

Build = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 211, length).tolist())


def assert_clean(engine: Engine) -> None:
    """Nothing is held, nothing leaked, nothing left to do."""
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    assert not engine.has_work()
    assert len(engine._pool._free) + stats.kv_blocks_cached == stats.kv_blocks_total


def with_sampling(**changes: object) -> EngineRequest:
    return EngineRequest("r", prompt(5), dataclasses.replace(GREEDY, **changes))  # type: ignore[arg-type]


SOURCE = KvSource(b"\0" * 32, 4, b"")


@pytest.mark.parametrize(
    ("request_", "error", "param"),
    [
        (EngineRequest("r", (), GREEDY), InvalidRequest, "token_ids"),
        (EngineRequest("r", (1, 211), GREEDY), InvalidRequest, "token_ids"),
        (EngineRequest("r", (1, -1), GREEDY), InvalidRequest, "token_ids"),
        (with_sampling(temperature=-0.1), InvalidRequest, "temperature"),
        (with_sampling(temperature=float("nan")), InvalidRequest, "temperature"),
        (with_sampling(top_k=-2), InvalidRequest, "top_k"),
        (with_sampling(top_p=1.1), InvalidRequest, "top_p"),
        (with_sampling(min_p=-1.0), InvalidRequest, "min_p"),
        (with_sampling(repetition_penalty=0.0), InvalidRequest, "repetition_penalty"),
        (with_sampling(presence_penalty=float("inf")), InvalidRequest, "presence_penalty"),
        (with_sampling(frequency_penalty=float("nan")), InvalidRequest, "frequency_penalty"),
        (with_sampling(max_tokens=0), InvalidRequest, "max_tokens"),
        (with_sampling(min_tokens=9), InvalidRequest, "min_tokens"),
        (with_sampling(top_logprobs=101), InvalidRequest, "top_logprobs"),
        (with_sampling(num_sequences=0), InvalidRequest, "num_sequences"),
        (with_sampling(num_sequences=65), LimitExceeded, "num_sequences"),
        (with_sampling(stop_token_ids=(211,)), InvalidRequest, "stop_token_ids"),
        (with_sampling(logit_bias={500: 1.0}), InvalidRequest, "logit_bias"),
        (with_sampling(logit_bias={5: float("inf")}), InvalidRequest, "logit_bias"),
        (with_sampling(max_tokens=508), ContextLengthExceeded, "max_tokens"),
        (EngineRequest("r", prompt(16 * 20), GREEDY), ContextLengthExceeded, "token_ids"),
        (EngineRequest("r", prompt(5), GREEDY, resume=((1,), (2,))), InvalidRequest, "resume"),
        (EngineRequest("r", prompt(5), GREEDY, resume=((999,),)), InvalidRequest, "resume"),
        (EngineRequest("r", prompt(5), GREEDY, resume=((1,) * 9,)), InvalidRequest, "resume"),
        (EngineRequest("r", prompt(5), GREEDY, resume=((1,),), prefill_only=True), InvalidRequest, "resume"),
        (EngineRequest("r", prompt(5), GREEDY, resume_finished=(True,)), InvalidRequest, "resume_finished"),
        (EngineRequest("r", prompt(5), GREEDY, kv=(SOURCE,)), InvalidRequest, "kv"),
        (EngineRequest("r", prompt(25), GREEDY, kv=(SOURCE, SOURCE)), InvalidRequest, "kv"),
        (EngineRequest("r", prompt(3), GREEDY, kv=(SOURCE,)), InvalidRequest, "kv"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_bad_request_is_refused_and_changes_nothing(build: Build, request_: EngineRequest, error: type[PlugmeshError], param: str) -> None:
    engine = build(num_blocks=20)
    with pytest.raises(error) as caught:
        engine.add(request_)

    assert type(caught.value) is error and caught.value.param == param
    assert_clean(engine)


def test_kv_of_another_layout_or_size_is_refused(build: Build) -> None:
    engine = build()
    engine.add(EngineRequest("r", prompt(16), GREEDY, prefill_only=True))
    [ready] = [b for o in steps(engine) for b in o.blocks_ready]
    for data in (b"", bytes(engine.export_block("r", 0))[:-1]):
        with pytest.raises(InvalidRequest, match="bytes"):
            engine.add(EngineRequest("x", prompt(16), GREEDY, kv=(KvSource(ready.block_id, 16, data),)))


def test_the_queue_is_bounded(build: Build) -> None:
    engine = build(max_waiting=3)
    for i in range(3):
        engine.add(EngineRequest(f"r{i}", prompt(4), GREEDY))
    with pytest.raises(Overloaded) as caught:
        engine.add(EngineRequest("r3", prompt(4), GREEDY))

    assert caught.value.retry_after_s > 0
    engine.step()
    engine.add(EngineRequest("r3", prompt(4), GREEDY))


def test_an_id_is_unique_while_it_lives(build: Build) -> None:
    engine = build()
    engine.add(EngineRequest("r", prompt(4), GREEDY, prefill_only=True))
    with pytest.raises(AlreadyExists):
        engine.add(EngineRequest("r", prompt(4), GREEDY))
    steps(engine)
    with pytest.raises(AlreadyExists):  # retained
        engine.add(EngineRequest("r", prompt(4), GREEDY))
    engine.release("r")
    run_to_end(engine, EngineRequest("r", prompt(4), GREEDY))
    run_to_end(engine, EngineRequest("r", prompt(4), GREEDY))

    assert_clean(engine)


def test_model_and_configuration_must_agree(tiny: TorchModel) -> None:
    with pytest.raises(ConfigError, match="float32"):
        Engine(tiny, EngineConfig(dtype="bfloat16"))


@pytest.mark.parametrize("n", [1, 3])
def test_one_token_is_enough(build: Build, n: int) -> None:
    engine = build()
    engine.add(EngineRequest("r", prompt(20), SamplingParams(temperature=0, max_tokens=1, num_sequences=n)))
    events = events_of([engine.step()])

    assert [e.finish_reason for e in events] == [FinishReason.LENGTH] * n
    assert [e.request_done for e in events] == [False] * (n - 1) + [True]
    assert events[-1].usage == Usage(20, n, 0)
    assert_clean(engine)


def first_tokens(build: Build, **changes: object) -> list[TokenEvent]:
    engine = build()
    engine.add(with_sampling(**changes))
    return events_of(steps(engine))


def test_stop_tokens_end_a_sequence_unless_min_tokens_forbids(build: Build) -> None:
    free = [e.tokens[0].token_id for e in first_tokens(build)]
    stop = free[3]
    where = free.index(stop)
    stopped = first_tokens(build, stop_token_ids=(stop,))
    later = first_tokens(build, stop_token_ids=(stop,), min_tokens=where + 1)

    assert [e.tokens[0].token_id for e in stopped] == free[: where + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP and stopped[-1].request_done
    assert [e.tokens[0].token_id for e in later][:where] == free[:where]
    assert later[where].tokens[0].token_id != stop


def test_the_models_end_token_counts_unless_ignored(build: Build) -> None:
    bias = {2: 1000.0}

    assert [e.finish_reason for e in first_tokens(build, ignore_eos=False, logit_bias=bias)] == [FinishReason.STOP]
    assert len(first_tokens(build, ignore_eos=True, logit_bias=bias)) == 8


def test_a_resumed_request_that_was_complete_ends_at_once(build: Build) -> None:
    engine = build()
    full, part = (5,) * 8, (5, 6)
    pair = dataclasses.replace(GREEDY, num_sequences=2)
    engine.add(EngineRequest("all", prompt(5), pair, resume=(part, part), resume_finished=(True, True)))
    engine.add(EngineRequest("length", prompt(5), pair, resume=(full, part), resume_finished=(False, True)))
    engine.add(EngineRequest("stop", prompt(5), dataclasses.replace(GREEDY, stop_token_ids=(6,)), resume=(part,)))
    engine.add(EngineRequest("half", prompt(5), pair, resume=(part, part), resume_finished=(True, False)))
    assert engine.has_work()
    events = events_of(steps(engine))
    ends = [(e.request_id, e.sequence, e.finish_reason, e.request_done) for e in events if e.finish_reason]

    assert ends == [
        ("all", 1, FinishReason.STOP, True),
        ("length", 0, FinishReason.LENGTH, False),
        ("length", 1, FinishReason.STOP, True),
        ("stop", 0, FinishReason.STOP, True),
        ("half", 1, FinishReason.LENGTH, True),
    ]
    assert [e.usage for e in events if e.request_id == "half" and e.usage] == [Usage(5, 10, 0)]
    assert_clean(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_cancelling_frees_at_once_also_in_the_middle_of_a_prompt(build: Build, num_steps: int, n: int) -> None:
    engine = build(max_tokens_per_step=8)
    engine.add(EngineRequest("r", prompt(30), dataclasses.replace(GREEDY, num_sequences=n)))
    for _ in range(num_steps):
        engine.step()

    assert engine.cancel("r") and not engine.cancel("r")
    assert_clean(engine)


@pytest.mark.parametrize("num_steps", [0, 2, 5])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_cancelling_one_sibling_leaves_the_others_as_they_were(build: Build, num_steps: int, victim: int) -> None:
    r = EngineRequest("r", prompt(30), SamplingParams(seed=3, max_tokens=8, ignore_eos=True, num_sequences=3))
    whole = run_to_end(build(), r)["r"]
    engine = build(max_tokens_per_step=8)
    engine.add(r)
    outputs = [engine.step() for _ in range(num_steps)]
    assert engine.cancel("r", victim) and not engine.cancel("r", victim)
    outputs += steps(engine)
    found = {e.sequence: [] for e in events_of(outputs)}
    for e in events_of(outputs):
        found[e.sequence] += [t.token_id for t in e.tokens]

    assert [found[i] for i in range(3) if i != victim] == [s for i, s in enumerate(whole) if i != victim]
    assert sum(e.request_done for e in events_of(outputs)) == 1
    assert_clean(engine)


@pytest.mark.parametrize("seed", range(3))
def test_200_requests_cancelled_at_random_moments_leave_nothing(build: Build, seed: int) -> None:
    """Small pool, small chunks, shared prefixes, siblings, retained prompts: cancellations hit every state."""
    rng = random.Random(seed)
    engine = build(num_blocks=24, max_tokens_per_step=12, max_num_sequences=12)
    alive: set[str] = set()
    done: dict[str, int] = {}
    outputs = []
    for i in range(200):
        p = prompt(rng.randrange(1, 70), seed=rng.randrange(4))
        sampling = SamplingParams(seed=i, max_tokens=rng.randrange(1, 30), num_sequences=rng.choice([1, 1, 1, 3]))
        engine.add(EngineRequest(f"r{i}", p, sampling, priority=rng.randrange(2), prefill_only=rng.random() < 0.2))
        alive.add(f"r{i}")
        for _ in range(rng.randrange(4)):
            outputs.append(engine.step())
            assert engine.stats().kv_blocks_leaked == 0
            for e in outputs[-1].tokens:
                if e.request_done:
                    done[e.request_id] = done.get(e.request_id, 0) + 1
                    if rng.random() < 0.5:
                        engine.release(e.request_id)
        while len(alive) > 20 or rng.random() < 0.3:
            victim = rng.choice(sorted(alive))
            if rng.random() < 0.3:
                engine.cancel(victim, rng.randrange(3))
            else:
                engine.cancel(victim)
                alive.discard(victim)
    for r in alive:
        engine.cancel(r)
    for i in range(200):
        engine.release(f"r{i}")

    assert_clean(engine)
    assert set(done.values()) == {1} and len(done) > 20
    assert engine.stats().num_preemptions > 0


class Poison(TorchAttention):
    """Makes NaN of every row of a sequence that has the marked token; raises on another one."""

    def plan(self, batch: Batch) -> None:
        super().plan(batch)
        self.bad = batch.token_ids == 3
        if (batch.token_ids == 4).any():
            raise RuntimeError("boom")

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        return torch.where(self.bad[:, None, None], float("nan"), super().run(q, k, v, layer))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("marked", [3, 4])
@pytest.mark.parametrize("chunk", [512, 7])
def test_a_sequence_that_breaks_costs_its_request_only(tiny: TorchModel, build: Build, n: int, marked: int, chunk: int) -> None:
    good = [EngineRequest(f"g{i}", tuple(t for t in prompt(20, seed=i) if t > 4), GREEDY) for i in range(3)]
    never = {3: -1e4, 4: -1e4}
    good = [dataclasses.replace(r, sampling=dataclasses.replace(GREEDY, logit_bias=never)) for r in good]
    wanted = run_to_end(build(), *good)
    config = EngineConfig(dtype="float32", num_blocks=64, max_tokens_per_step=chunk)
    engine = Engine(tiny, config, executor=TorchExecutor(tiny, config, attention=Poison))
    bad = EngineRequest("bad", (*(t for t in prompt(39, seed=9) if t > 4), marked), dataclasses.replace(GREEDY, num_sequences=n))
    for r in (good[0], bad, *good[1:]):
        engine.add(r)
    outputs = steps(engine)
    ends = [e for e in events_of(outputs) if e.request_id == "bad"]

    assert [(e.finish_reason, e.request_done, type(e.error)) for e in ends] == [(FinishReason.ERROR, True, InternalError)]
    assert "boom" not in str(ends[0].error)
    assert ends[0].usage == Usage(len(bad.token_ids), 0, 0)
    outputs = [dataclasses.replace(o, tokens=[e for e in o.tokens if e.request_id != "bad"]) for o in outputs]
    assert tokens_of(engine, outputs) == wanted
    assert engine.cached_prefix(bad.token_ids) == 0  # what it computed is not trusted
    assert_clean(engine)


@pytest.mark.parametrize("where", [0, 20, 39])
def test_bad_kv_is_never_announced(tiny: TorchModel, where: int) -> None:
    """Chunks of 16, NaN from one token on: blocks before it are announced, the others are not, and nothing stays."""
    config = EngineConfig(dtype="float32", num_blocks=64, max_tokens_per_step=16)
    engine = Engine(tiny, config, executor=TorchExecutor(tiny, config, attention=Poison))
    ids = [5 + t % 200 for t in range(40)]
    ids[where] = 3
    engine.add(EngineRequest("bad", tuple(ids), GREEDY, prefill_only=True))
    engine.add(EngineRequest("good", tuple(range(5, 45)), GREEDY, prefill_only=True))
    outputs = steps(engine)
    ready = {r: [b.block_index for o in outputs for b in o.blocks_ready if b.request_id == r] for r in ("bad", "good")}
    ends = {e.request_id: type(e.error) for e in events_of(outputs) if e.request_done}

    assert ready == {"bad": list(range(where // 16)), "good": [0, 1, 2]}
    assert ends == {"bad": InternalError, "good": type(None)}
    assert engine.release("good") and not engine.release("bad")
    assert_clean(engine)


def test_every_announced_block_can_be_exported_after_its_step(build: Build) -> None:
    """Also in a pool so small that prompts are preempted half-way."""
    engine = build(num_blocks=8, max_tokens_per_step=20)
    for i in range(6):
        engine.add(EngineRequest(f"r{i}", prompt(50, i), GREEDY, prefill_only=True))
        engine.add(EngineRequest(f"d{i}", prompt(9, i + 10), dataclasses.replace(GREEDY, max_tokens=30)))
    seen: dict[str, list[int]] = {}
    while engine.has_work():
        out = engine.step()
        for b in out.blocks_ready:
            assert len(engine.export_block(b.request_id, b.block_index)) == engine.layout.block_bytes
            seen.setdefault(b.request_id, []).append(b.block_index)
        for e in out.tokens:
            if e.request_done and e.request_id.startswith("r"):
                engine.release(e.request_id)

    assert seen == {f"r{i}": [0, 1, 2, 3] for i in range(6)}
    assert engine.stats().num_preemptions > 0
    assert_clean(engine)


def test_a_sequence_that_outgrows_the_pool_ends_with_an_error(build: Build) -> None:
    engine = build(num_blocks=3)
    engine.add(EngineRequest("r", prompt(20), dataclasses.replace(GREEDY, max_tokens=100)))
    events = events_of(steps(engine))

    assert sum(len(e.tokens) for e in events) == 48 - 20 + 1
    assert isinstance(events[-1].error, Overloaded) and events[-1].request_done
    assert_clean(engine)


def test_retained_prompts_make_others_wait_not_fail(build: Build) -> None:
    engine = build(num_blocks=4)
    engine.add(EngineRequest("kept", prompt(40), GREEDY, prefill_only=True))
    steps(engine)
    engine.add(EngineRequest("r", prompt(30, seed=1), GREEDY))
    for _ in range(3):
        assert engine.step().tokens == []
    assert engine.has_work()
    engine.release("kept")

    assert len(tokens_of(engine, steps(engine))["r"][0]) == 8
    assert_clean(engine)


def test_exporting_what_is_not_there_is_not_found(build: Build) -> None:
    engine = build()
    engine.add(EngineRequest("r", prompt(20), GREEDY, prefill_only=True))
    with pytest.raises(NotFound):
        engine.export_block("r", 0)
    steps(engine)
    assert len(engine.export_block("r", 1)) == engine.layout.block_bytes
    for bad in (("r", 2), ("r", -1), ("other", 0)):
        with pytest.raises(NotFound):
            engine.export_block(*bad)


def test_import_buffers_are_released_also_when_the_request_ends_before(build: Build) -> None:
    engine = build()
    p = prompt(16)
    engine.add(EngineRequest("a", p, GREEDY, prefill_only=True))
    [ready] = [b for o in steps(engine) for b in o.blocks_ready]
    source = KvSource(ready.block_id, 16, bytes(engine.export_block("a", 0)))
    engine.add(EngineRequest("b", p, GREEDY, kv=(source,)))
    engine.cancel("b")

    assert engine.has_work()
    assert engine.step().kv_imported == ["b"]
    assert not engine.has_work()


def test_prefill_only_samples_one_token_per_sequence(build: Build) -> None:
    r = EngineRequest("r", prompt(20), SamplingParams(seed=1, max_tokens=9, num_sequences=3, ignore_eos=True))
    whole = run_to_end(build(), r)["r"]
    engine = build()
    engine.add(dataclasses.replace(r, prefill_only=True))
    events = events_of(steps(engine))

    assert [[t.token_id for t in e.tokens] for e in events] == [s[:1] for s in whole]
    assert [e.finish_reason for e in events] == [None] * 3
    assert [e.request_done for e in events] == [False, False, True]
    assert engine.stats().kv_blocks_used == 2
    assert engine.cancel("r")  # a retained prompt is released
    assert_clean(engine)


def test_gauges_follow_the_work(build: Build) -> None:
    engine = build(max_tokens_per_step=8, max_num_sequences=1)
    engine.add(EngineRequest("a", prompt(20), GREEDY))
    engine.add(EngineRequest("b", prompt(10, seed=1), GREEDY))
    assert engine.stats().num_pending_tokens == 20 + 8 + 10 + 8
    engine.step()
    stats = engine.stats()

    assert (stats.num_running, stats.num_waiting, stats.num_pending_tokens, stats.kv_blocks_used) == (1, 1, 12 + 8 + 10 + 8, 1)
    steps(engine)
    assert engine.stats().num_tokens_generated == 16
    assert engine.stats().num_pending_tokens == 0


def test_measuring_a_step_leaves_the_engine_as_it_was(build: Build) -> None:
    engine = build()

    assert engine.measure_step_ms(20, 3, 17) > 0
    assert engine.measure_step_ms(0, 0, 0) == 0
    assert_clean(engine)
    with pytest.raises(Overloaded):
        engine.measure_step_ms(64 * 16 + 1, 0, 0)
    assert_clean(engine)


def test_token_infos_are_plain_without_logprobs(build: Build) -> None:
    [event] = first_tokens(build, max_tokens=1)

    assert event.tokens == (TokenInfo(event.tokens[0].token_id),)
