"""Formulas on events made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.bench.metrics import Objectives, Record, Run, Spread, distribution, paired_ratio, percentile, summary


def record(sent: float = 10.0, times: tuple[float, ...] = (10.5, 10.7, 11.5), num_out: int = 5, **changes) -> Record:
    fields = dict(sent_s=sent, times_s=times, num_prompt=100, num_out=num_out, asked_prompt=100, asked_out=num_out)
    return Record(**{**fields, **changes})


def test_times_of_one_request_follow_the_formulas():
    r = record()

    assert (0.5, 1.5) == (r.ttft_s, r.e2e_s)
    assert r.tpot_s == pytest.approx((1.5 - 0.5) / 4)  # by tokens, although three events carried the five
    assert r.gaps_s == pytest.approx([0.2, 0.8])


def test_an_answer_of_one_token_has_no_time_per_further_token():
    assert math.isnan(record(times=(10.5,), num_out=1).tpot_s)


def test_a_run_is_timed_from_the_first_request_to_the_last_token():
    run = Run((record(), record(sent=11.0, times=(11.5, 14.0), num_out=2)), wall_s=5.0, client_cpu_s=0.5, streams=2)

    figures = summary(run)
    assert 4.0 == figures["duration_s"]
    assert (7 / 4, 207 / 4, 2 / 4) == (figures["output_tok_s"], figures["total_tok_s"], figures["requests_s"])
    assert 0.1 == figures["client_cpu_share"]
    assert figures["decode_tok_s"] == pytest.approx(1 / np.median([0.25, 2.5]))
    assert figures["prefill_tok_s"] == pytest.approx(100 / 0.5)


def test_failed_requests_count_as_failed_and_nowhere_else():
    run = Run((record(), record(times=(), error="HTTP 503: busy"), record(times=())), wall_s=2.0)

    figures = summary(run)
    assert (3, 2, 5) == (figures["num_requests"], figures["num_failed"], figures["num_output_tokens"])
    assert ["HTTP 503: busy"] == figures["errors"]


def test_lengths_other_than_asked_for_are_counted():
    figures = summary(Run((record(), record(asked_out=6), record(asked_prompt=99)), 1.0))

    assert 2 == figures["num_inexact"]


def test_a_run_without_any_answer_has_figures_of_none():
    figures = summary(Run((record(times=(), error="x"),), 1.0))

    assert (None, None, None) == (figures["output_tok_s"], figures["ttft_ms"], figures["prefill_tok_s"])


def test_goodput_counts_requests_that_meet_every_objective():
    quick, slow = record(), record(times=(12.0, 13.0), num_out=2)
    run = Run((quick, slow, record(times=(), error="x")), 3.0)

    both = summary(run, Objectives(ttft_ms=600, tpot_ms=300))["goodput"]
    assert (1 / 3, 1 / 3) == (both["share"], both["requests_s"])
    assert 0.0 == summary(run, Objectives(ttft_ms=600, tpot_ms=200))["goodput"]["share"]
    assert "goodput" not in summary(run)


def test_lateness_of_an_open_loop_is_its_worst():
    figures = summary(Run((record(due_s=9.9), record(due_s=9.4)), 1.0))

    assert figures["max_late_ms"] == pytest.approx(600)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1))
def test_percentiles_agree_with_numpy(values, share):
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, share * 100)), rel=1e-9, abs=1e-6)


def test_percentiles_of_nothing():
    assert math.isnan(percentile([], 0.5))
    assert distribution([]) is None
    assert distribution([math.nan]) is None


def test_ratios_pair_the_rounds():
    spread = paired_ratio({0: 10.0, 1: 30.0, 2: 50.0, 5: 1.0}, {0: 5.0, 1: 10.0, 2: 50.0, 4: 9.0})

    assert Spread(2.0, 1.0, 3.0, 3) == spread
    assert paired_ratio({0: 1.0}, {1: 1.0}) is None
