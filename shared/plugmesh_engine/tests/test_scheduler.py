"""Order, budgets and slots of the engine's own scheduler, and what a plugin's scheduler may break."""

import dataclasses
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from plugmesh.records import SchedulerContext, SchedulerRecord
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineRequest
from plugmesh_engine.scheduler import FcfsScheduler
from plugmesh_engine.testing import events_of, run_to_end, steps

Build = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 211, length).tolist())


def first_step_of(outputs: list) -> dict[str, int]:  # type: ignore[type-arg]
    found: dict[str, int] = {}
    for o in outputs:
        for e in o.tokens:
            found.setdefault(e.request_id, o.step)
    return found


class Watched(FcfsScheduler):
    """Records what was planned."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.plans: list[list[tuple[str, int, bool, int]]] = []

    def schedule(self, waiting, running, kv):  # type: ignore[no-untyped-def]
        plan = super().schedule(waiting, running, kv)
        self.plans.append([(s.request_id, n, s.is_decode, s.num_slots) for s, n in plan])
        return plan


def test_first_come_first_served(build: Build) -> None:
    engine = build(max_tokens_per_step=16)
    for i, n in enumerate((50, 3, 20, 1)):
        engine.add(EngineRequest(f"r{i}", prompt(n, i), GREEDY))
    started = first_step_of(steps(engine))

    assert sorted(started, key=lambda r: (started[r], r)) == ["r0", "r1", "r2", "r3"]
    assert started["r0"] == 4


def test_priority_goes_before_arrival(build: Build) -> None:
    engine = build(max_num_sequences=1)
    for i, priority in enumerate((0, 1, -1, 0)):
        engine.add(EngineRequest(f"r{i}", prompt(4), GREEDY, priority=priority))
    started = first_step_of(steps(engine))

    assert sorted(started, key=started.__getitem__) == ["r2", "r0", "r3", "r1"]


def test_nobody_overtakes_a_prompt_that_does_not_fit(build: Build) -> None:
    engine = build(num_blocks=8)
    engine.add(EngineRequest("a", prompt(60), dataclasses.replace(GREEDY, max_tokens=20)))
    engine.step()
    engine.add(EngineRequest("big", prompt(80, 1), GREEDY))
    engine.add(EngineRequest("small", prompt(2, 2), GREEDY))
    started = first_step_of(steps(engine))

    assert started["big"] <= started["small"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 8), st.sampled_from([1, 1, 2]), st.integers(0, 3)), min_size=1, max_size=8), st.integers(1, 40), st.integers(2, 5))
def test_no_step_exceeds_its_budget_or_slots_and_all_finish(build: Build, load: list[tuple[int, int, int, int]], budget: int, slots: int) -> None:
    watched = Watched(budget, slots)
    engine = build(num_blocks=12, max_num_sequences=slots, scheduler=watched)
    outputs = []
    for i, (length, max_tokens, n, gap) in enumerate(load):
        engine.add(EngineRequest(f"r{i}", prompt(length, i), dataclasses.replace(GREEDY, max_tokens=max_tokens, num_sequences=n)))
        for _ in range(gap):
            outputs.append(engine.step())
            assert engine.stats().num_running <= slots
    outputs += steps(engine)

    for plan in watched.plans:
        assert sum(n for _, n, is_decode, _ in plan if not is_decode) <= budget
        assert sum(s for _, _, _, s in plan) <= slots
    assert sum(e.request_done for e in events_of(outputs)) == len(load)
    assert engine.stats().num_scheduler_errors == 0


@pytest.mark.parametrize("length", [20, 48, 60, 70])
@pytest.mark.parametrize("held", [False, True])
def test_what_a_prompt_is_said_to_take_is_what_it_takes(build: Build, length: int, held: bool) -> None:
    """The first three blocks are cached, idle or held by another sequence."""
    engine = build(max_tokens_per_step=512)
    engine.add(EngineRequest("first", prompt(60), dataclasses.replace(GREEDY, max_tokens=40)))
    engine.step()
    if not held:
        engine.cancel("first")
    engine.add(EngineRequest("r", (*prompt(60)[:50], *prompt(70, 5))[:length], GREEDY))
    [waiting] = engine._waiting
    before, said, pending = engine._pool.num_free, engine._view.blocks_for(waiting, engine._view.pending(waiting)), engine._view.pending(waiting)
    engine.step()

    assert pending == length - min((length - 1) // 16, 3) * 16
    assert before - engine._pool.num_free == said


def test_two_long_requests_do_not_livelock(build: Build) -> None:
    """Each needs most of the pool; the older one finishes first, the newer one starts over."""
    engine = build(num_blocks=9, max_tokens_per_step=16, prefix_cache=False)
    sampling = dataclasses.replace(GREEDY, max_tokens=60)
    for r in ("old", "new"):
        engine.add(EngineRequest(r, prompt(60, len(r)), sampling))
    ends = [e.request_id for e in events_of(steps(engine, max_steps=400)) if e.request_done]

    assert ends == ["old", "new"]


class Broken:
    """Raises, or plans nonsense, for ever."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def schedule(self, waiting, running, kv):  # type: ignore[no-untyped-def]
        ready = [*running, *waiting]
        match self.fault:
            case "raises":
                raise ZeroDivisionError
            case "twice":
                return [(ready[0], 1), (ready[0], 1)] if ready else []
            case "stranger":
                return [(object(), 1)]
            case "too many":
                return [(s, kv.pending(s) + 1) for s in ready]
            case "none":
                return [(s, 0) for s in ready]
        return None


@pytest.mark.parametrize("fault", ["raises", "twice", "stranger", "too many", "none", "not a list"])
def test_a_broken_scheduler_is_replaced_for_the_step_and_counted(build: Build, fault: str) -> None:
    rs = [EngineRequest(f"r{i}", prompt(20, i), GREEDY) for i in range(3)]
    engine = build(scheduler=Broken(fault))

    assert run_to_end(engine, *rs) == run_to_end(build(), *rs)
    assert engine.stats().num_scheduler_errors == engine.stats().num_steps > 0


def test_a_record_is_built_with_the_engines_limits_and_a_stopwatch(build: Build) -> None:
    seen: list[SchedulerContext] = []

    def make(context: SchedulerContext) -> FcfsScheduler:
        seen.append(context)
        assert context.measure_step_ms is not None and context.measure_step_ms(16, 2, 20) > 0
        return FcfsScheduler(4, context.max_num_sequences)

    engine = build(scheduler=SchedulerRecord("mine", make), num_blocks=30)
    run_to_end(engine, EngineRequest("r", prompt(20), GREEDY))

    assert [(c.max_tokens_per_step, c.max_num_sequences, c.num_blocks) for c in seen] == [(512, 64, 30)]
    assert engine.stats().num_steps == 5 + 5
