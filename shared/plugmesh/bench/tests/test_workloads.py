"""Workloads repeat by seed, differ between seeds, and share what they say they share."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.bench.http_client import DIALECTS
from plugmesh.bench.workloads import (
    NOT_YET,
    WORKLOADS,
    Shape,
    arrivals,
    long_context,
    make,
    multi_turn,
    prefix_tree,
    random_prompts,
    with_pauses,
)
from plugmesh.errors import FailedPrecondition, InvalidRequest

shapes = st.builds(
    Shape, num_conversations=st.integers(1, 12), num_in=st.integers(20, 60), num_out=st.integers(1, 9), num_turns=st.integers(1, 3),
    prefix_tokens=st.integers(1, 19), depth=st.integers(1, 4), branching=st.integers(1, 3),
)  # fmt: skip


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(WORKLOADS)), shapes, st.integers(0, 99))
def test_the_same_seed_gives_the_same_workload_of_the_asked_size(name, shape, seed):
    made = make(name, shape, seed)

    assert made == make(name, shape, seed)
    assert shape.num_conversations == len(made)
    assert all(call.max_tokens == shape.num_out for c in made for call in c)
    assert all(t in shape.token_ids for c in made for call in c for t in call.prompt)
    if name != "multi-turn":
        assert {shape.num_in} == {len(call.prompt) for c in made for call in c}


def test_prompts_of_different_seeds_share_nothing():
    shape = Shape(num_conversations=8)
    prompts = [c[0].prompt for seed in range(4) for c in random_prompts(shape, seed)]

    assert max(common(a, b) for a, b in itertools.combinations(prompts, 2)) < 3


def test_one_path_of_a_tree_is_one_prefix_for_all():
    shape = Shape(num_conversations=6, num_in=100, prefix_tokens=70, depth=1, branching=1)
    prompts = [c[0].prompt for c in prefix_tree(shape, 0)]

    assert {70} == {common(a, b) for a, b in itertools.combinations(prompts, 2)}


def test_paths_of_a_tree_part_at_its_levels():
    shape = Shape(num_conversations=40, num_in=100, prefix_tokens=90, depth=3, branching=2)
    prompts = [c[0].prompt for c in prefix_tree(shape, 0)]

    assert {0, 30, 60, 90} == {common(a, b) for a, b in itertools.combinations(prompts, 2)}


def test_a_turn_begins_with_all_that_was_before():
    (calls,) = multi_turn(Shape(num_conversations=1, num_in=20, num_out=5, num_turns=3), 0)

    assert [20, 45, 70] == [len(c.prompt) for c in calls]
    assert all(common(a.prompt, b.prompt) == len(a.prompt) for a, b in itertools.pairwise(calls))


def test_long_contexts_of_all_rounds_share_all_but_their_ends():
    a, b = (long_context(Shape(num_conversations=1, num_in=500), seed)[0][0].prompt for seed in (1, 2))

    assert 484 == common(a, b)


def test_lengths_vary_within_the_spread():
    lengths = [len(c[0].prompt) for c in random_prompts(Shape(num_conversations=200, num_in=100, spread=0.2), 0)]

    assert min(lengths) >= 80 and max(lengths) <= 120 and len(set(lengths)) > 20


def test_answers_of_a_schema_cannot_end_before_their_tokens_are_used_up_and_ends_are_not_ignored():
    ((call,),) = make("json-schema", Shape(num_conversations=1, num_out=1000), 0)
    body = json.loads(DIALECTS["plugmesh"].body("m", call, use_cache=True))

    assert call.schema["minItems"] * 2 >= 1000 == body["max_tokens"]
    assert call.schema == body["response_format"]["json_schema"]["schema"] and "ignore_eos" not in body
    assert with_pauses([(call,)], 1.0, 0)[0][0].schema is call.schema
    ((free,),) = make("random", Shape(num_conversations=1), 0)
    assert json.loads(DIALECTS["plugmesh"].body("m", free, use_cache=True)).keys() >= {"ignore_eos"}


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_arrivals_have_the_asked_rate_and_variation(cv):
    times = list(itertools.islice(arrivals(50.0, 3, cv), 8000))
    gaps = [b - a for a, b in itertools.pairwise(times)]

    assert 0.0 == times[0]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.08)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_planned_workloads_say_what_they_wait_for(name):
    with pytest.raises(FailedPrecondition, match="not available yet: it needs"):
        make(name, Shape(), 0)


@pytest.mark.parametrize(("name", "shape"), [("nonsense", Shape()), ("random", Shape(num_in=0)), ("random", Shape(spread=1.0)), ("prefix-tree", Shape(num_in=64))])
def test_impossible_workloads_are_refused(name, shape):
    with pytest.raises(InvalidRequest):
        make(name, shape, 0)
