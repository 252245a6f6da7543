"""Places are found, drafts are exact, and they are made only where they pay."""

import pathlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from plugmesh import cards
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, Overloaded
from plugmesh.host import PluginHost
from plugmesh.records import DraftContext
from plugmesh.types import SamplingParams
from plugmesh_engine import DraftOutcome, Engine, EngineConfig, EngineRequest
from plugmesh_engine.testing import FakeModel, run_to_end, tiny_config
from plugmesh_ngram_draft.cost import SIZES, StepCost
from plugmesh_ngram_draft.cost import UNMEASURED as UNMEASURED_SHAPE
from plugmesh_ngram_draft.draft import NgramDraft, build_method
from plugmesh_ngram_draft.lookup import SuffixIndex, follow
from plugmesh_ngram_draft.plugin import Settings

CONFIG = tiny_config(vocab_size=61, max_position=900)


def slow_find(tokens: Sequence[int], shortest: int, longest: int) -> tuple[int, int]:
    """All places before the end, newest first."""
    best, found = -1, 0
    for place in range(len(tokens) - 1, 0, -1):
        length = 0
        while length < min(longest, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= shortest and length > found:
            best, found = place, length
    return best, found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 3), st.integers(0, 5), st.data())
def test_the_longest_and_newest_place_is_found(tokens: list[int], shortest: int, more: int, data: st.DataObject) -> None:
    """Whatever pieces the text arrives in. Beyond the places that are tried, a shorter run may be found, never a wrong one."""
    index, seen = SuffixIndex(shortest, shortest + more), 0
    while seen < len(tokens):
        seen = data.draw(st.integers(seen + 1, len(tokens)))
        index.extend(tokens[:seen])
    index.extend(tokens)
    place, length = index.find(tokens)
    wanted_place, wanted = slow_find(tokens, shortest, shortest + more)

    assert (place >= 0) == (wanted_place >= 0)
    assert 0 <= length <= wanted
    if place >= 0:
        assert tokens[place - length : place] == tokens[len(tokens) - length :] and place < len(tokens)
    if len(tokens) < 8:
        assert (place, length) == (wanted_place, wanted)


def test_a_text_that_ends_in_a_period_is_continued_with_it() -> None:
    assert follow([9, 1, 2, 3, 1], 2, 7) == [2, 3, 1, 2, 3, 1, 2]
    assert follow([9, 1, 2, 3, 1], 2, 2) == [2, 3]


@dataclass
class View:
    """A `DraftView` without an engine."""

    tokens: list[int]
    max_draft_tokens: int = 16
    memo: Any = None
    request_id: str = "r"
    index: int = 0
    num_prompt_tokens: int = 0
    output: list[int] = field(default_factory=list)


def simulate(outputs: list[list[int]], cost: Callable[[int], float], profile: list[tuple[int, float]], prompts: list[list[int]] | None = None) -> tuple[float, float]:
    """Milliseconds with the plugin and without for streams of known output, on a machine whose steps take `cost(rows)`."""
    method = NgramDraft(StepCost(profile), min_match=2, max_match=16, max_tokens=12, min_gain=0.03)
    views = [View(list(p)) for p in prompts or [[1, 2, 3]] * len(outputs)]
    for v, o in zip(views, outputs, strict=True):
        v.output = list(o)
    drafted_ms, plain_ms = 0.0, cost(len(outputs)) * len(outputs[0])
    while live := [v for v in views if v.output]:
        for v in live:
            v.max_draft_tokens = len(v.output) - 1
        drafts = method.propose(live, 0)
        accepted = []
        for v, d in zip(live, drafts, strict=True):
            right = next((i for i, t in enumerate(d) if t != v.output[i]), len(d))
            accepted.append(right)
            v.tokens += v.output[: right + 1]
            del v.output[: right + 1]
        rows = len(live) + sum(map(len, drafts))
        drafted_ms += cost(rows)
        method.observe(DraftOutcome(live, [len(d) for d in drafts], accepted, rows, 0, cost(rows)))
    return drafted_ms, plain_ms


def text(kind: str, seed: int, length: int = 300) -> list[int]:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 40_000, length).tolist()
    if kind == "words":  # pairs recur all the time, with another token behind them
        return rng.integers(0, 12, length).tolist()
    if kind == "language":  # like real text: Zipf's law
        return np.minimum(rng.zipf(1.3, length), 40_000).tolist()
    block = rng.integers(0, 40_000, 40).tolist()  # "copy"
    return (block * (length // 40 + 1))[:length]


def bandwidth(rows: int) -> float:
    """A machine whose rows are nearly free until there are 16."""
    return 3.0 + 0.05 * rows + 0.3 * max(0, rows - 16)


def arithmetic(rows: int) -> float:
    return 1.0 + 1.0 * rows


HONEST, UNMEASURED, TOO_CHEAP = "honest", "unmeasured", "too cheap"


def profile_of(cost: Callable[[int], float], kind: str) -> list[tuple[int, float]]:
    if kind == UNMEASURED:
        return list(UNMEASURED_SHAPE)
    return [(r, cost(r) if kind == HONEST else cost(1) * (1 + 0.01 * r)) for r in SIZES]


@pytest.mark.parametrize("profile", [HONEST, UNMEASURED, TOO_CHEAP])
@pytest.mark.parametrize("cost", [bandwidth, arithmetic])
@pytest.mark.parametrize("kind", ["noise", "words", "language"])
@pytest.mark.parametrize("streams", [1, 8, 32])
def test_text_that_does_not_repeat_loses_less_than_3_percent(streams: int, kind: str, cost: Callable[[int], float], profile: str) -> None:
    """Also when the profile that was measured at the start is wrong."""
    drafted, plain = simulate([text(kind, i) for i in range(streams)], cost, profile_of(cost, profile))

    assert drafted < 1.03 * plain


def test_text_that_repeats_gains_where_rows_are_cheap() -> None:
    drafted, plain = simulate([text("copy", 0)], bandwidth, profile_of(bandwidth, HONEST))
    assert drafted < plain / 3

    drafted, plain = simulate([text("copy", i) for i in range(8)], bandwidth, profile_of(bandwidth, HONEST))
    assert drafted < plain / 1.5


def test_a_copy_of_the_prompt_gains_from_its_first_tokens_on() -> None:
    passage = text("noise", 5, 60)
    drafted, plain = simulate([passage], bandwidth, profile_of(bandwidth, HONEST), [[1, *passage, 2, *passage[:2]]])

    assert drafted < plain / 2


def test_nothing_is_drafted_where_every_row_costs_as_much_as_a_step() -> None:
    def per_row(rows: int) -> float:
        return float(rows)

    drafted, plain = simulate([text("copy", i) for i in range(32)], per_row, profile_of(per_row, HONEST))

    assert drafted == pytest.approx(plain)


def test_nothing_is_drafted_beside_a_prompt() -> None:
    method = NgramDraft(StepCost([(1, 1.0), (2, 1.0)]), min_match=2, max_match=16, max_tokens=4, min_gain=0.0)
    view = View([1, 2, 3] * 30)
    for _ in range(20):
        view.tokens += [1, 2, 3]
        alone, beside = method.propose([view], 0), method.propose([view], 100)

    assert alone == [[1, 2, 3, 1]]
    assert beside == [[]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.8]), st.integers(1, 80)), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 99))
def test_output_is_the_same_with_drafts(load: list[tuple[int, float, int]], window: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    requests = [
        EngineRequest(f"r{i}", tuple(rng.integers(3, 61, n).tolist()), SamplingParams(temperature=t, seed=i, max_tokens=m, ignore_eos=True))
        for i, (n, t, m) in enumerate(load)
    ]
    free = NgramDraft(StepCost([(1, 1.0), (100, 1.1)]), min_match=1, max_match=8, max_tokens=6, min_gain=0.0)
    drafted = Engine(FakeModel(CONFIG, window=window), EngineConfig(num_blocks=24), drafts=free)

    assert run_to_end(drafted, *requests) == run_to_end(Engine(FakeModel(CONFIG, window=window), EngineConfig(num_blocks=24)), *requests)
    assert drafted.stats().kv_blocks_used == drafted.stats().kv_blocks_leaked == drafted.stats().num_draft_errors == 0


def test_output_that_repeats_takes_fewer_steps() -> None:
    """A model that sees one token only falls into a circle."""
    request = EngineRequest("r", (3, 4, 5), SamplingParams(temperature=0, max_tokens=600, ignore_eos=True))
    free = NgramDraft(StepCost([(1, 1.0), (100, 1.1)]), min_match=2, max_match=8, max_tokens=8, min_gain=0.0)
    engine = Engine(FakeModel(CONFIG, window=1), EngineConfig(num_blocks=64), drafts=free)
    run_to_end(engine, request)

    assert engine.stats().num_steps < 150
    assert engine.stats().num_draft_tokens_accepted > 400


def test_the_profile_is_measured_as_far_as_memory_reaches() -> None:
    def stopwatch(prompt: int, decodes: int, kv: int) -> float:
        if decodes > 8:
            raise Overloaded("too small")
        return 10.0 + decodes

    cost = StepCost.measure(stopwatch, 64)

    assert [cost.ms(r, drafted=False) for r in (1, 2, 5, 8, 16)] == pytest.approx([11, 12, 15, 18, 26])
    assert StepCost.measure(None, 64).ms(4, drafted=False) > StepCost.measure(None, 64).ms(1, drafted=False)


def test_one_late_step_is_not_believed() -> None:
    cost = StepCost([(1, 3.0), (100, 6.0)])
    for _ in range(20):
        cost.learn(1, drafted=False, ms=3.0)
    cost.learn(1, drafted=False, ms=500.0)

    assert cost.ms(1, drafted=False) < 3.5


def test_steps_that_take_longer_than_profiled_are_learnt_for_their_kind() -> None:
    cost, dice = StepCost([(1, 3.0), (100, 3.3)]), random.Random(0)
    for _ in range(400):
        drafted = dice.random() < 0.3
        cost.learn(9 if drafted else 1, drafted=drafted, ms=6.0 if drafted else 4.0)

    assert cost.ms(1, drafted=False) == pytest.approx(4.0, rel=0.1)
    assert cost.ms(9, drafted=True) == pytest.approx(6.0, rel=0.1)


def test_the_host_loads_it_with_its_settings() -> None:
    host = PluginHost.load(["ngram_draft"], MeshConfig(plugins={"ngram_draft": {"max_tokens": 5}}), service="decode")
    record = host.last("drafts")
    engine = Engine(FakeModel(CONFIG), EngineConfig(num_blocks=64, max_draft_tokens=3), drafts=record)

    assert record.name == "ngram"
    assert len(run_to_end(engine, EngineRequest("r", (1, 2, 3), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)))["r"][0]) == 9
    assert build_method(Settings(max_tokens=5), DraftContext(3, 8, 64, 61))._max_tokens == 3


@pytest.mark.parametrize("bad", [{"min_match": 0}, {"min_match": 5, "max_match": 4}, {"maxtokens": 4}, {"min_gain": -1}])
def test_bad_settings_stop_the_start(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.ngram_draft"):
        PluginHost.load(["ngram_draft"], MeshConfig(plugins={"ngram_draft": bad}), service="decode")


def test_the_card_names_every_setting_and_hook() -> None:
    card = cards.read("ngram_draft")
    folder = pathlib.Path(cards.__file__).parents[2] / "plugins" / "plugmesh_ngram_draft"

    assert set(card.settings) == set(Settings.model_fields)
    assert card.hooks == ("register_drafts", "register_workloads")
    assert (folder / "README.md").is_file()
