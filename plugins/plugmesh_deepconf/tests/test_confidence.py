"""Groups, bars, votes and answers against slow obvious ones."""

from __future__ import annotations

import math
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from plugmesh_deepconf.answers import extract
from plugmesh_deepconf.confidence import GroupConfidence, group_means, scores
from plugmesh_deepconf.vote import consensus, keep_top, percentile, stop_bar, weighted_vote

CONFIDENCES = st.lists(st.floats(0, 60), max_size=60)


@settings(deadline=None, max_examples=40)
@given(CONFIDENCES, st.integers(1, 40))
def test_the_running_group_equals_one_computed_from_all_tokens_at_every_step(values, window):
    group = GroupConfidence(window)
    for i, value in enumerate(values):
        mean = group.push(value)
        last = values[max(0, i + 1 - window) : i + 1]
        full = [sum(values[j - window + 1 : j + 1]) / window for j in range(window - 1, i + 1)]

        assert mean == pytest.approx(sum(last) / len(last), abs=1e-9)
        assert group.is_full == (i + 1 >= window)
        assert group.lowest == pytest.approx(min(full) if full else sum(values[: i + 1]) / (i + 1), abs=1e-9)


def test_rounding_does_not_add_up_over_a_long_trace():
    values = np.random.default_rng(0).uniform(0, 50, 20_000) * 10.0 ** np.random.default_rng(1).integers(-6, 7, 20_000)
    group = GroupConfidence(1000)
    for v in values:
        mean = group.push(float(v))

    assert mean == pytest.approx(math.fsum(values[-1000:]) / 1000, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(CONFIDENCES, st.integers(1, 60), st.sampled_from([1.0, 10.0, 50.0, 100.0]))
def test_scores_of_a_trace(values, window, bottom):
    got = scores(values, window, bottom)
    if not values:
        assert (got.mean, got.tail, got.bottom, got.lowest) == (0, 0, 0, 0)
        return
    groups = [float(np.mean(values[i : i + window])) for i in range(len(values) - window + 1)] or [float(np.mean(values))]

    assert group_means(values, window) == pytest.approx(groups, abs=1e-9)
    assert got.mean == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert got.tail == pytest.approx(float(np.mean(values[-window:])), abs=1e-9)
    assert got.lowest == pytest.approx(min(groups), abs=1e-9)
    assert got.bottom == pytest.approx(float(np.mean(sorted(groups)[: max(1, int(len(groups) * bottom / 100))])), abs=1e-9)
    assert got.lowest <= got.bottom + 1e-9 and got.lowest <= got.tail + 1e-9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_and_bars_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-9)
    assert stop_bar(values, percent) == pytest.approx(float(np.percentile(values, 100 - percent)), abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_keeping_all_stops_nothing_and_keeping_nearly_none_leaves_one(values):
    assert not any(v < stop_bar(values, 100) for v in values)
    assert any(v >= stop_bar(values, 1e-9) - 1e-6 for v in values)
    assert keep_top(values, 100) == list(range(len(values)))
    assert values[keep_top(values, 1e-9)[0]] == max(values)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), max_size=40), st.floats(0.1, 100))
def test_the_best_are_kept_in_order_and_never_a_worse_one_before_a_better(values, percent):
    kept = keep_top(values, percent)
    out = [v for i, v in enumerate(values) if i not in kept]

    assert kept == sorted(kept)
    assert len(kept) == (max(1, math.floor(len(values) * percent / 100 + 0.5)) if values else 0)
    assert not out or not kept or min(values[i] for i in kept) >= max(out)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.integers(0, 9).map(float)), max_size=30))
def test_a_vote_sums_weights_and_ignores_those_without_an_answer(ballots):
    votes = weighted_vote(ballots)
    expected = Counter()
    for answer, weight in ballots:
        if answer is not None:
            expected[answer] += weight

    assert votes == dict(expected) or {k: v for k, v in votes.items() if v} == {k: v for k, v in expected.items() if v}
    assert list(votes.values()) == sorted(votes.values(), reverse=True)
    if votes and sum(votes.values()):
        assert consensus(votes) == pytest.approx(max(votes.values()) / sum(votes.values()))
        firsts = [a for a, _ in ballots if a is not None and expected[a] == max(expected.values())]
        assert next(iter(votes)) == firsts[0]


def test_weights_decide_where_counts_would_not():
    assert next(iter(weighted_vote([("a", 1.0), ("a", 1.0), ("b", 5.0)]))) == "b"
    assert consensus({}) == 0.0 and consensus({"a": 0.0}) == 0.0


@pytest.mark.parametrize(("text", "kind", "answer"), [
    ("3+4=7, 7+2=9. Answer: 9", "number", "9"), ("so 12 or 13", "number", "13"), ("answer is -1,024.50 dollars", "number", "-1024.5"),
    ("Answer: 007", "number", "7"), ("Answer: 0.0", "number", "0"), ("Answer: -0", "number", "0"), ("none", "number", None), ("", "number", None),
    (r"so \boxed{\frac{1}{2}} then \boxed{ x +  {y} }", "boxed", "x + {y}"), (r"\boxed{open", "boxed", None), (r"\boxed{}", "boxed", None),
    ("I think B. Answer: (C)", "choice", "C"), ("it is D", "choice", "D"), ("nothing", "choice", None),
    ("first\n  The  END \n\n", "line", "the end"), ("\n \n", "line", None),
    (r"Answer: 3, \boxed{4}", "auto", "4"), ("Answer: 3", "auto", "3"), ("yes", "auto", "yes"), ("", "auto", None),
])  # fmt: skip
def test_answers_are_found_in_one_form(text, kind, answer):
    assert extract(text, kind) == answer


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=300), st.sampled_from(["auto", "number", "boxed", "choice", "line"]))
def test_any_text_has_an_answer_or_none(text, kind):
    found = extract(text, kind)

    assert found is None or (found and "\n" not in found)
