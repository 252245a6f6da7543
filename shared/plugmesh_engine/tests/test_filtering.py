"""Stage one of filtered prompts: what goes on beside it, what it leaves, and what becomes of a filter that is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.errors import NotFound, Overloaded
from plugmesh.records import PromptFilterRecord
from plugmesh.testing.conformance.loads import CONFIG, Arrival, check_idle, loads, play
from plugmesh.types import SamplingParams, block_chain
from plugmesh_engine import Engine, EngineConfig, EngineRequest, KvSource
from plugmesh_engine.batch import Rows
from plugmesh_engine.testing import (
    FakeModel,
    model_in_memory,
    random_weights,
    run_to_end,
    steps,
    tiny_config,
    tokens_of,
)

MODEL = tiny_config(vocab_size=61, max_position=400, num_layers=4)


class Half:
    """Every other token of prompts above a length, by what it saw: the half with the larger scores."""

    def __init__(self, above: int = 20, layer: int = 2) -> None:
        self.above, self.layer = above, layer
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def layers(self, num_prompt_tokens: int) -> int:
        return self.layer if num_prompt_tokens > self.above else 0

    def select(self, q: np.ndarray, k: np.ndarray) -> Any:
        self.seen.append((q.copy(), k.copy()))
        scores = np.einsum("qd,nd->n", q.reshape(len(q), -1)[:, : k[0].size], k.reshape(len(k), -1))
        return np.sort(np.argsort(-scores, kind="stable")[: -(-len(k) // 2)])


def record(made: Any, **fields: Any) -> PromptFilterRecord:
    return PromptFilterRecord("test", lambda _: made, **fields)


def engine(made: Any = None, **config: Any) -> Engine:
    fields = {k: config.pop(k) for k in ("num_queries", "chunk_tokens") if k in config}
    settings_ = EngineConfig(**{"num_blocks": 96, "max_tokens_per_step": 32, "max_num_sequences": 16, **config})
    return Engine(FakeModel(MODEL), settings_, prompt_filter=None if made is None else record(made, **fields))


def request(name: str = "r", num_tokens: int = 100, seed: int = 0, **fields: Any) -> EngineRequest:
    own = {f.name for f in dataclasses.fields(EngineRequest)} & fields.keys()
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "seed": 3} | {k: v for k, v in fields.items() if k not in own}
    ids = np.random.default_rng(seed).integers(3, MODEL.vocab_size, num_tokens)
    return EngineRequest(name, tuple(int(i) for i in ids), SamplingParams(**sampling), **{k: fields[k] for k in own})


def chosen_of(asked: EngineRequest) -> tuple[int, ...]:
    """The tokens that `Half` keeps of a prompt, by way of an engine of its own."""
    made = Half()
    one = engine(made)
    run_to_end(one, EngineRequest("x", asked.token_ids, SamplingParams(temperature=0, max_tokens=1)))
    q, k = made.seen[0]
    return tuple(asked.token_ids[i] for i in Half().select(q, k))


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9}, {"temperature": 0.9, "num_sequences": 3}, {"repetition_penalty": 1.5}, {"min_tokens": 4, "max_tokens": 12}]
)
def test_the_request_goes_on_as_a_prompt_of_the_chosen_tokens(sampling: dict[str, Any]) -> None:
    asked = request(**sampling)
    plain = dataclasses.replace(asked, token_ids=chosen_of(asked))

    assert run_to_end(engine(Half()), asked) == run_to_end(engine(), plain)


def test_usage_counts_the_tokens_that_came_and_the_pool_holds_those_that_were_chosen() -> None:
    one = engine(Half())
    one.add(request(num_tokens=160, max_tokens=1))
    outputs = []
    most = 0
    while one.has_work():
        outputs.append(one.step())
        most = max(most, one.stats().kv_blocks_used)
    usage = outputs[-1].tokens[-1].usage

    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (160, 1)
    assert most == 10  # of stage one
    assert (one.stats().num_filtered_prompts, one.stats().num_tokens_left_out) == (1, 80)
    one.add(request(num_tokens=160, max_tokens=8, use_prefix_cache=False))
    while not one.step().tokens:
        pass

    assert one.stats().kv_blocks_used == 5  # 80 tokens; the first that was generated has no KV yet
    steps(one)
    check_idle(one)


def test_a_second_asker_finds_the_chosen_tokens_in_the_prefix_cache() -> None:
    one = engine(Half())
    first = run_to_end(one, request("a"))["a"]
    one.add(request("b"))
    outputs = steps(one)
    usage = outputs[-1].tokens[-1].usage

    assert tokens_of(one, outputs)["b"] == first
    assert usage is not None
    assert usage.cached_tokens == 48  # the full blocks of 50, of which the last token is computed


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_a_request_that_comes_with_tokens_goes_on_where_it_was(num_sequences: int) -> None:
    """As after the loss of its instance: filtered anew, with the same result."""
    asked = request(temperature=0.8, num_sequences=num_sequences)
    whole = run_to_end(engine(Half()), asked)["r"]
    resumed = dataclasses.replace(asked, resume=tuple(tuple(t[: 2 + i]) for i, t in enumerate(whole)))
    rest = run_to_end(engine(Half(), max_tokens_per_step=16), resumed)["r"]

    assert [list(r) + t for r, t in zip(resumed.resume, rest, strict=True)] == whole


def test_decodes_get_a_token_in_every_step_of_stage_one() -> None:
    one = engine(Half())
    one.add(request("short", 10, max_tokens=60))
    one.step()
    one.add(request("long", 320))
    while len(one._filtering or ()):  # 10 chunks of 32
        assert [e.request_id for e in one.step().tokens] == ["short"]

    assert tokens_of(one, steps(one))["long"] == run_to_end(engine(Half()), request("long", 320))["long"]


def test_stage_one_is_cut_into_the_chunks_that_the_record_asks_for() -> None:
    made = Half()
    one = engine(made, chunk_tokens=7, num_queries=9)
    one.add(request(num_tokens=30))
    num_steps = 0
    while one._filtering:
        one.step()
        num_steps += 1
    whole = Half()
    run_to_end(engine(whole, max_tokens_per_step=64, num_queries=9), request(num_tokens=30))

    assert num_steps == 5
    assert made.seen[0][0].shape == (9, MODEL.num_heads, MODEL.head_dim)
    assert all((a == b).all() for a, b in zip(made.seen[0], whole.seen[0], strict=True))


@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(loads(cancels=True), st.sampled_from([96, 14, 9]), st.integers(5, 60))
def test_any_load_in_any_pool_gives_what_each_request_gives_alone(load: list[Arrival], num_blocks: int, above: int) -> None:
    def build(blocks: int) -> Engine:
        return Engine(
            FakeModel(CONFIG), EngineConfig(num_blocks=blocks, max_tokens_per_step=24, max_num_sequences=8), prompt_filter=record(Half(above, 1))
        )

    one = build(num_blocks)

    def audit() -> None:
        assert one.stats().kv_blocks_leaked == 0

    try:
        together = play(one, load, on_step=audit)
    except Overloaded:  # n = 3 in a small pool
        return
    alone = {f"r{i}": run_to_end(build(96), a.request(f"r{i}"))[f"r{i}"] for i, a in enumerate(load) if not a.cancel_after}

    assert together == alone
    check_idle(one)
    assert one.stats().kv_blocks_used == 0


def test_stage_one_gives_way_to_those_who_run_and_nobody_fails() -> None:
    one = engine(Half(above=50), num_blocks=19, chunk_tokens=8)
    one.add(request("old", 40, max_tokens=150))
    outputs = [one.step()]
    one.add(request("new", 240, seed=1))  # 15 of the 19 blocks for 30 steps, in which the other one needs two more
    sizes = []
    while one._filtering:
        outputs.append(one.step())
        sizes.append(len(list(one._filtering.blocks())))
    got = tokens_of(one, [*outputs, *steps(one)])

    assert 0 in sizes[:40], "it never gave way"
    assert got["old"] == run_to_end(engine(), request("old", 40, max_tokens=150))["old"]
    assert got["new"] == run_to_end(engine(Half(above=50)), request("new", 240, seed=1))["new"]
    check_idle(one)


def test_nobody_overtakes_a_prompt_whose_stage_one_waits_for_memory() -> None:
    one = engine(Half(above=50), num_blocks=20)
    one.add(request("runs", 100, max_tokens=1 + 16, seed=4))
    outputs = [one.step() for _ in range(9)]
    one.add(request("long", 300, seed=1))
    one.add(request("late", 20, seed=2))
    outputs += steps(one)
    order = list(dict.fromkeys(e.request_id for o in outputs for e in o.tokens))

    assert order == ["runs", "long", "late"]
    check_idle(one)


def test_held_sequences_make_way_for_stage_one() -> None:
    one = engine(Half(above=150), num_blocks=20)
    run_to_end(one, request("held", 120, hold=True, use_prefix_cache=False))
    got = run_to_end(one, request("long", 300, seed=1))
    one.release("held")

    assert got == run_to_end(engine(Half(above=150)), request("long", 300, seed=1))
    check_idle(one)


class Raises(Half):
    def select(self, q: np.ndarray, k: np.ndarray) -> Any:
        raise RuntimeError("select")


class RaisesEarly(Half):
    def layers(self, num_prompt_tokens: int) -> int:
        raise RuntimeError("layers")


class Says(Half):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def select(self, q: np.ndarray, k: np.ndarray) -> Any:
        return self.answer


@pytest.mark.parametrize(
    "made",
    [Raises(), RaisesEarly(), Half(layer=4), Half(layer=-1), Says([]), Says([3, 2]), Says([1, 1]), Says([-1, 5]), Says([5, 100]), Says([0.5]), Says(None),
     Says([[1, 2]]), Says("ab")],
)  # fmt: skip
def test_a_filter_that_is_wrong_has_the_prompt_read_whole_and_is_counted(made: Any) -> None:
    one = engine(made)

    assert run_to_end(one, request()) == run_to_end(engine(), request())
    assert one.stats().num_filter_errors == 1
    assert one.stats().num_filtered_prompts == 0
    check_idle(one)


def test_an_executor_that_fails_in_stage_one_has_the_prompt_read_whole() -> None:
    one = engine(Half())

    def probe(rows: Sequence[Any], layer: int) -> Any:
        raise RuntimeError("no probe here")

    one._executor.probe = probe  # type: ignore[method-assign]

    assert run_to_end(one, request()) == run_to_end(engine(), request())
    check_idle(one)


def test_requests_about_exactly_these_tokens_are_read_whole() -> None:
    ids = request().token_ids
    source = engine()
    run_to_end(source, request("p", prefill_only=True))
    names = block_chain(source.layout.key(), ids, tail=True)
    kv = tuple(KvSource(n, min(16, 100 - 16 * i), bytes(source.export_block("p", i))) for i, n in enumerate(names))
    whole = run_to_end(engine(), request())
    one = engine(Half())

    assert run_to_end(one, request("tapped", taps=(1,)))["tapped"] == whole["r"]
    assert run_to_end(one, request("brings", kv=kv))["brings"] == whole["r"]
    assert run_to_end(one, request("scored", score=((5, 6),))) == run_to_end(engine(), request("scored", score=((5, 6),)))
    assert run_to_end(one, request("first", prefill_only=True))["first"] == [whole["r"][0][:1]]
    assert one.stats().num_filtered_prompts == 0


def test_a_fork_goes_on_from_the_chosen_tokens_and_waits_until_they_are_known() -> None:
    one = engine(Half())
    one.add(request("origin", hold=True))
    one.step()
    with pytest.raises(NotFound):
        one.fork("origin", 0, request("early", 5))
    tokens = tokens_of(one, steps(one))["origin"][0]
    more = request("fork", 30, seed=9)
    num = one.fork("origin", 0, more)
    got = tokens_of(one, steps(one))["fork"]
    fresh = dataclasses.replace(more, token_ids=(*chosen_of(request("origin")), *tokens, *more.token_ids))

    assert num == 50 + 8
    assert got == run_to_end(engine(), fresh)["fork"]
    one.release("origin")
    check_idle(one)


def test_waiting_for_stage_one_counts_as_waiting() -> None:
    one = engine(Half(), max_waiting=2)
    one.add(request("a"))
    one.add(request("b", seed=1))
    with pytest.raises(Overloaded):
        one.add(request("c", seed=2))

    assert one.stats().num_waiting == 2
    one.cancel("a")
    one.add(request("c", seed=2))
    assert set(tokens_of(one, steps(one))) == {"b", "c"}


@pytest.mark.parametrize("chunk", [13, 64])
def test_the_filter_sees_the_models_own_queries_and_keys(chunk: int) -> None:
    """Those of one probe over the whole prompt, which test_taps.py compares with a slow forward pass."""
    config = tiny_config(num_layers=3)
    model = model_in_memory(config, random_weights(config))
    seen = Half(layer=2)
    ids = tuple(int(i) for i in np.random.default_rng(2).integers(3, config.vocab_size, 60))
    settings_ = EngineConfig(executor="torch", dtype="float32", num_blocks=16, max_tokens_per_step=chunk, num_threads=1)
    one = Engine(model, settings_, prompt_filter=record(seen, num_queries=3))
    run_to_end(one, EngineRequest("r", ids, SamplingParams(temperature=0, max_tokens=2)))
    other = Engine(model, settings_)
    q, k = other._executor.probe([Rows(ids, 0, [1, 2, 3, 4])], 2)

    assert one.stats().num_filter_errors == 0
    assert np.abs(seen.seen[0][0] - q[-3:]).max() < 1e-4
    assert np.abs(seen.seen[0][1] - k).max() < 1e-4


def test_a_filter_that_keeps_everything_changes_nothing() -> None:
    class All(Half):
        def select(self, q: np.ndarray, k: np.ndarray) -> Any:
            return np.arange(len(k))

    one = engine(All())
    asked = [request("a"), request("b", seed=1, temperature=0.9, num_sequences=2)]

    assert run_to_end(one, *asked) == run_to_end(engine(), *asked)
    assert one.stats().num_filtered_prompts == 2
