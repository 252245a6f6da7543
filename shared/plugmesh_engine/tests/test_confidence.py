"""Confidence of a token: -(1/k) times the sum of the k best log-probabilities of the model's own distribution."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from plugmesh import wire
from plugmesh.errors import InvalidRequest
from plugmesh.limits import check_sampling
from plugmesh.types import SamplingParams, TokenInfo
from plugmesh_engine import sampler
from plugmesh_engine.sampler import SampleRow, needs_logits, sample

VOCAB = 211


def row(params: SamplingParams, *, seed: int = 1, counts: dict[int, int] | None = None, position: int = 0) -> SampleRow:
    return SampleRow(params, seed, 0, position, lambda: np.array([3, 5]), counts or {}, (7,))


def slow(logits: np.ndarray, k: int) -> float:
    x = sorted((float(v) for v in logits), reverse=True)
    log_sum = x[0] + math.log(sum(math.exp(v - x[0]) for v in x))
    return -sum(v - log_sum for v in x[:k]) / k


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.floats(0.1, 20), st.booleans())
def test_it_equals_the_definition_written_with_plain_loops(seed, k, scale, native):
    logits = (np.random.default_rng(seed).normal(size=(3, VOCAB)) * scale).astype(np.float32)
    expected = [slow(x, k) for x in logits]
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(sampler, "_kernels", lambda: None)
        infos = sample(logits, [row(SamplingParams(confidence_top_k=k), seed=i) for i in range(3)])

    assert [i.confidence for i in infos] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("params", [
    dict(temperature=0.6), dict(temperature=1.0), dict(temperature=0.0), dict(top_p=0.1), dict(top_k=1), dict(min_p=0.5), dict(logprobs=True, top_logprobs=3),
    dict(logit_bias={0: 50.0}), dict(repetition_penalty=3.0, presence_penalty=2.0), dict(min_tokens=5),
])  # fmt: skip
def test_nothing_that_the_request_asks_of_the_distribution_changes_it(params):
    logits = np.random.default_rng(4).normal(size=(1, VOCAB)).astype(np.float32) * 3
    logits[0, 7] = 12.0  # the end token, which min_tokens forbids
    expected = sample(logits.copy(), [row(SamplingParams(confidence_top_k=20))])[0]
    told = sample(logits.copy(), [row(SamplingParams(confidence_top_k=20, **params), counts={1: 2, 9: 1})])[0]

    assert told.confidence == expected.confidence != 0


def test_a_row_gets_the_same_alone_and_among_others_and_tokens_do_not_change():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(24, VOCAB)).astype(np.float32) * 4
    ks = [int(k) for k in rng.integers(0, 30, 24)]
    rows = [row(SamplingParams(confidence_top_k=k, logprobs=bool(i % 2)), seed=i) for i, k in enumerate(ks)]
    together = sample(logits.copy(), rows)
    alone = [sample(logits[i : i + 1].copy(), [r])[0] for i, r in enumerate(rows)]
    without = sample(logits.copy(), [row(SamplingParams(logprobs=bool(i % 2)), seed=i) for i in range(24)])

    assert together == alone
    assert [t.confidence == 0 for t in together] == [k == 0 for k in ks]
    assert [(t.token_id, t.logprob) for t in together] == [(t.token_id, t.logprob) for t in without]


def test_a_peaked_distribution_has_more_of_it_than_a_flat_one_and_a_spoiled_row_gives_no_token():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 5] = 20.0
    logits[2] = np.nan
    flat, peaked, spoiled = sample(logits, [row(SamplingParams(confidence_top_k=20)) for _ in range(3)])

    assert flat.confidence == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert peaked.confidence > flat.confidence and peaked.token_id == 5
    assert spoiled is None


def test_greedy_rows_ask_for_logits_when_it_is_wanted_and_it_travels():
    assert needs_logits(SamplingParams(temperature=0, confidence_top_k=1)) and not needs_logits(SamplingParams(temperature=0))
    params = SamplingParams(confidence_top_k=20)
    assert wire.sampling_from_pb(wire.sampling_to_pb(params)) == params
    assert wire.token_from_pb(wire.token_to_pb(TokenInfo(3, confidence=2.5))) == TokenInfo(3, confidence=2.5)
    for k in (-1, 65):
        with pytest.raises(InvalidRequest, match="confidence_top_k"):
            check_sampling(SamplingParams(confidence_top_k=k))
