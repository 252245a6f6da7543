"""The budget holds, nothing running waits, prompts do not starve, and the tokens stay the same."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pydantic
import pytest
import torch
from hypothesis import given, settings
from structlog.testing import capture_logs

from plugmesh import cards
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.host import PluginHost
from plugmesh.records import SchedulerContext, SchedulerRecord
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import StepResult
from plugmesh_engine.executors.torch import TorchModel
from plugmesh_engine.testing import events_of, run_to_end, steps, tiny_model, tokens_of
from plugmesh_sarathi.budget import profile_budget
from plugmesh_sarathi.plugin import Settings
from plugmesh_sarathi.scheduler import SarathiScheduler, build_scheduler

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    return tiny_model(tmp_path_factory.mktemp("model"))


class Watched(SarathiScheduler):
    """Keeps every plan, and what was running when it was made."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.plans: list[list[tuple[str, int, int, bool]]] = []  # request, sequence, tokens, whether a decode
        self.chunks: list[tuple[int, int]] = []  # prompt tokens planned, prompt tokens left of those prompts
        self.decoding: list[set[tuple[str, int]]] = []

    def schedule(self, waiting, running, kv):  # type: ignore[no-untyped-def]
        plan = super().schedule(waiting, running, kv)
        self.plans.append([(s.request_id, s.index, n, s.is_decode) for s, n in plan])
        prompts = [(s, n) for s, n in plan if not s.is_decode]
        self.chunks.append((sum(n for _, n in prompts), sum(kv.pending(s) - n for s, n in prompts)))
        self.decoding.append({(s.request_id, s.index) for s in running if s.is_decode})
        return plan


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 211, length).tolist())


def engine_of(model: TorchModel, scheduler: object, **changes: object) -> Engine:
    return Engine(model, EngineConfig(**{"executor": "torch", "dtype": "float32", "num_blocks": 128, **changes}), scheduler=scheduler)  # type: ignore[arg-type]


def count_sampled(engine: Engine) -> Callable[[], list[tuple[int, int]]]:
    """(rows computed, rows sampled) of every step, taken where the model is run."""
    seen: list[tuple[int, int]] = []
    original = engine._executor.run

    def run(rows: Any) -> StepResult:
        result = original(rows)
        seen.append((sum(len(r.token_ids) for r in rows), len(result.best)))
        return result

    engine._executor.run = run  # type: ignore[method-assign]
    return lambda: seen


LOAD = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 20), st.sampled_from([1, 1, 1, 3]), st.integers(0, 4)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(LOAD, st.integers(4, 40), st.data(), st.sampled_from([128, 18]))
def test_every_step_keeps_the_budget_and_no_decode_waits(model: TorchModel, load: list[tuple[int, int, int, int]], budget: int, data: st.DataObject, num_blocks: int) -> None:
    """Also in a pool that is too small, with siblings; rows are counted where the model is run."""
    reserve = data.draw(st.integers(1, budget - 3))
    watched = Watched(budget, reserve, 64)
    engine = engine_of(model, watched, num_blocks=num_blocks)
    seen = count_sampled(engine)
    outputs = []
    for i, (length, max_tokens, n, gap) in enumerate(load):
        sampling = dataclasses.replace(GREEDY, max_tokens=max_tokens, num_sequences=n)
        engine.add(EngineRequest(f"r{i}", prompt(length, i), sampling))
        outputs += [engine.step() for _ in range(gap)]
    outputs += steps(engine)

    assert all(rows <= budget for rows, _ in seen())
    for plan, decoding in zip(watched.plans, watched.decoding, strict=True):
        assert sum(n for _, _, n, _ in plan) <= budget
        assert {(r, i) for r, i, _, is_decode in plan if is_decode} == decoding  # stall-free: all of them, every step
    assert sum(e.request_done for e in events_of(outputs)) == len(load)
    assert sum(len(e.tokens) for e in events_of(outputs)) == sum(max_tokens * n for _, max_tokens, n, _ in load)
    assert engine.stats().num_scheduler_errors == engine.stats().kv_blocks_leaked == 0


def test_only_the_last_chunk_reaches_the_sampler(model: TorchModel) -> None:
    engine = engine_of(model, SarathiScheduler(16, 4, 64))
    seen = count_sampled(engine)
    engine.add(EngineRequest("r", prompt(100), dataclasses.replace(GREEDY, max_tokens=3)))
    steps(engine)

    assert seen() == [(16, 0)] * 6 + [(4, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize("length", [31, 32, 33])
def test_prompts_around_the_budget_take_the_steps_they_need(model: TorchModel, length: int) -> None:
    engine = engine_of(model, SarathiScheduler(32, 4, 64))
    engine.add(EngineRequest("r", prompt(length), dataclasses.replace(GREEDY, max_tokens=1)))

    assert len(steps(engine)) == (1 if length <= 32 else 2)


@pytest.mark.parametrize(("budget", "reserve"), [(9, 1), (16, 8), (33, 4), (100, 8)])
def test_tokens_are_those_of_a_whole_prompt_run(model: TorchModel, budget: int, reserve: int) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.9, seed=4, max_tokens=12, ignore_eos=True)
    requests = [EngineRequest(f"r{i}", prompt(n, i), sampling if i % 2 else GREEDY) for i, n in enumerate((80, 5, 33, 120, 16, 61))]
    wanted = {r.request_id: run_to_end(engine_of(model, None, prefix_cache=False), r)[r.request_id] for r in requests}
    engine = engine_of(model, SarathiScheduler(budget, reserve, 64))
    outputs = []
    for r in requests:
        engine.add(r)
        outputs.append(engine.step())

    assert tokens_of(engine, outputs + steps(engine)) == wanted


def test_a_running_stream_gets_a_token_in_every_step_while_a_prompt_is_computed(model: TorchModel) -> None:
    """And with whole prompts it does not: the one step that computes the prompt is that long."""
    engine = engine_of(model, SarathiScheduler(16, 4, 64))
    seen = count_sampled(engine)
    engine.add(EngineRequest("stream", prompt(10), dataclasses.replace(GREEDY, max_tokens=60)))
    outputs = [engine.step() for _ in range(3)]
    engine.add(EngineRequest("long", prompt(300, 1), GREEDY))
    during = []
    while not any(e.request_id == "long" for o in outputs for e in o.tokens):
        outputs.append(engine.step())
        during.append([e.request_id for e in outputs[-1].tokens])

    assert len(during) == 20 and all("stream" in d for d in during)
    assert all(rows == 16 for rows, _ in seen()[3:-1])


def test_prompts_get_their_share_however_many_decodes_there_are(model: TorchModel) -> None:
    """12 streams under a budget of 12, 4 of it kept: 8 sequences run, the others wait; a prompt that is not done in a step has moved by 4 or more."""
    watched = Watched(12, 4, 64)
    engine = engine_of(model, watched)
    for i in range(12):
        engine.add(EngineRequest(f"s{i}", prompt(3, i), dataclasses.replace(GREEDY, max_tokens=25 + 5 * i)))
    engine.add(EngineRequest("long", prompt(200, 99), GREEDY))
    outputs = steps(engine)
    unfinished = [(n, len(decoding)) for (n, left), decoding in zip(watched.chunks, watched.decoding, strict=True) if left]

    assert max(len(d) for d in watched.decoding) == 8
    assert len(unfinished) > 10 and min(n for n, _ in unfinished) >= 4
    assert max(d for _, d in unfinished) == 7  # some of them beside as many decodes as can be
    assert sum(e.request_done for e in events_of(outputs)) == 13


def test_first_come_first_served(model: TorchModel) -> None:
    engine = engine_of(model, SarathiScheduler(16, 4, 64))
    for i, n in enumerate((60, 2, 30, 2)):
        engine.add(EngineRequest(f"r{i}", prompt(n, i), GREEDY))
    first = list(dict.fromkeys(e.request_id for e in events_of(steps(engine))))

    assert first == ["r0", "r1", "r2", "r3"]


def test_aborting_in_the_middle_of_a_chunked_prompt_frees_it(model: TorchModel) -> None:
    engine = engine_of(model, SarathiScheduler(16, 4, 64))
    engine.add(EngineRequest("r", prompt(100), GREEDY))
    engine.step()
    assert engine.stats().kv_blocks_used == 1
    engine.cancel("r")

    assert engine.stats().kv_blocks_used == engine.stats().kv_blocks_leaked == 0


def linear_ms(prefill: int, decodes: int, kv: int) -> float:
    return 5 + prefill * 0.5 + decodes * 1.0 + kv * 0.001


@given(st.integers(1, 40), st.integers(0, 60), st.floats(0.1, 300))
def test_the_profiled_budget_is_the_largest_that_meets_the_target(lowest: int, wide: int, target: float) -> None:
    decodes = lowest // 2
    budget = profile_budget(linear_ms, target, lowest=lowest, highest=lowest + 16 * wide, num_blocks=4096, num_decodes=decodes, kv_tokens=64)
    candidates = [lowest + 16 * i for i in range(wide + 1)]
    fitting = [c for c in candidates if linear_ms(c - decodes, decodes, 64) <= target]

    assert budget == (fitting[-1] if fitting else lowest)


def test_a_target_out_of_reach_is_said_aloud() -> None:
    with capture_logs() as logs:
        profile_budget(linear_ms, 1.0, lowest=16, highest=128, num_blocks=4096, num_decodes=8, kv_tokens=64)

    assert [(e["event"], e["log_level"]) for e in logs] == [("sarathi.target_out_of_reach", "warning")]


def test_profiling_fits_a_small_pool(model: TorchModel) -> None:
    """On the real stopwatch: the synthetic steps must not ask for more blocks than there are."""
    record = SchedulerRecord("sarathi", lambda c: build_scheduler(Settings(token_budget=128, tbt_target_ms=1e6), c))
    engine = engine_of(model, record, num_blocks=60)

    assert engine._scheduler.budget == 128  # type: ignore[attr-defined] # lowest 16, then in steps of 16
    assert engine.stats().kv_blocks_used == 0


def test_the_host_loads_it_with_its_settings(model: TorchModel) -> None:
    config = MeshConfig(plugins={"sarathi": {"token_budget": 24, "min_prefill_tokens": 4}})
    host = PluginHost.load(["sarathi"], config, service="decode")
    [record] = host.records("schedulers")
    scheduler = record.build(SchedulerContext(512, 10, 64))

    assert (record.name, scheduler.budget, scheduler.max_running) == ("sarathi", 24, 10)
    assert len(run_to_end(engine_of(model, record), EngineRequest("r", prompt(50), GREEDY))["r"][0]) == 12


@pytest.mark.parametrize("bad", [{"token_budget": 1}, {"token_budget": 8, "min_prefill_tokens": 8}, {"tokenbudget": 64}, {"tbt_target_ms": -1}])
def test_bad_settings_stop_the_start(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.sarathi"):
        PluginHost.load(["sarathi"], MeshConfig(plugins={"sarathi": bad}), service="decode")


def test_the_card_names_every_setting_and_hook() -> None:
    card = cards.read("sarathi")
    folder = pathlib.Path(cards.__file__).parents[2] / "plugins" / "plugmesh_sarathi"

    assert set(card.settings) == set(Settings.model_fields)
    assert card.hooks == ("register_schedulers",)
    assert (folder / "README.md").is_file()


def test_settings_are_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Settings().token_budget = 3  # type: ignore[misc]
