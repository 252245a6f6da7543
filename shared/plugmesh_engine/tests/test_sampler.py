"""The batched sampler against a slow one that handles one row with plain loops."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from plugmesh.types import SamplingParams
from plugmesh_engine import sampler
from plugmesh_engine.sampler import SampleRow, sample, uniforms

VOCAB = 29


def row(params: SamplingParams, *, seed: int = 1, sequence: int = 0, position: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (),
        end_ids: tuple[int, ...] = ()) -> SampleRow:  # fmt: skip
    counts = {t: output.count(t) for t in output}
    return SampleRow(params, seed, sequence, position, lambda: np.unique(np.array(prompt, dtype=np.int64)), counts, end_ids)


def slow_distribution(logits: np.ndarray, r: SampleRow) -> tuple[np.ndarray, np.ndarray, bool]:
    """(log-probabilities before temperature, probabilities to draw from, whether some border is too close to call), one rule after another."""
    p, x = r.params, [float(v) for v in logits]
    for t, b in p.logit_bias.items():
        x[t] += b
    for t in set(r.prompt_ids().tolist()) | set(r.counts):
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t, n in r.counts.items():
        x[t] -= p.presence_penalty + n * p.frequency_penalty
    if r.position < p.min_tokens:
        for t in r.end_ids:
            x[t] = -math.inf
    top = max(x)
    logz = top + math.log(sum(math.exp(v - top) for v in x))
    logprobs = np.array([v - logz for v in x])
    if p.temperature == 0:
        return logprobs, np.eye(len(x))[int(np.argmax(np.array(x, dtype=np.float32)))], False
    y = [v / p.temperature for v in x]
    order = sorted(range(len(y)), key=lambda t: -y[t])
    keep = set(order)
    close = False
    if 0 < p.top_k < len(y):
        kth = y[order[p.top_k - 1]]
        keep = {t for t in keep if y[t] >= kth}
        close |= any(0 < abs(v - kth) < 1e-5 for v in y)
    if p.top_p < 1:
        mass = {t: math.exp(y[t] - max(y)) for t in keep}
        total, reached = sum(mass.values()), 0.0
        for t in order:
            reached += mass.get(t, 0.0)
            close |= abs(reached / total - p.top_p) < 1e-5
            if reached / total >= p.top_p:
                keep = {u for u in keep if y[u] >= y[t]}
                close |= any(0 < abs(v - y[t]) < 1e-5 for v in y)
                break
    if p.min_p > 0:
        close |= any(abs(math.exp(v - max(y)) - p.min_p) < 1e-5 for v in y)
        keep = {t for t in keep if math.exp(y[t] - max(y)) >= p.min_p}
    probs = np.array([math.exp(y[t] - max(y)) if t in keep else 0.0 for t in range(len(y))])
    return logprobs, probs / probs.sum(), close


def slow_draw(probs: np.ndarray, u: float) -> int:
    cdf = np.cumsum(probs)
    assume(np.abs(cdf - u).min() > 1e-6)
    return int(np.searchsorted(cdf, u, side="right"))


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]), top_k=st.sampled_from([0, -1, 1, 3, VOCAB]), top_p=st.sampled_from([1.0, 0.97, 0.6, 0.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]), repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]), presence_penalty=st.sampled_from([0.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, -0.4]), logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 2.5]), max_size=3),
    min_tokens=st.sampled_from([0, 2]), logprobs=st.booleans(), top_logprobs=st.integers(0, 4),
)  # fmt: skip
ROWS = st.builds(row, PARAMS, seed=st.integers(-(2**63), 2**64), sequence=st.integers(0, 9), position=st.integers(0, 4), prompt=TOKENS, output=TOKENS,
                 end_ids=st.sampled_from([(), (2,), (2, 5)]))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_a_batch_gives_what_the_slow_sampler_gives_row_by_row(rows: list[SampleRow], seed: int) -> None:
    logits = (np.random.default_rng(seed).standard_normal((len(rows), VOCAB)) * 3).astype(np.float32)
    infos = sample(logits.copy(), rows)
    for i, r in enumerate(rows):
        logprobs, probs, close = slow_distribution(logits[i], r)
        assume(not close)
        u = float(uniforms([r.seed], [r.sequence], [r.position])[0])
        info = infos[i]
        assert info is not None
        assert info.token_id == (int(probs.argmax()) if r.params.temperature == 0 else slow_draw(probs, u))
        if r.params.logprobs:
            best = sorted(logprobs, reverse=True)[: r.params.top_logprobs]
            assert info.logprob == pytest.approx(logprobs[info.token_id], abs=1e-4)
            assert [lp for _, lp in info.top] == pytest.approx(best, abs=1e-4)
            assert all(lp == pytest.approx(logprobs[t], abs=1e-4) for t, lp in info.top)
        else:
            assert info.logprob == 0 and info.top == ()


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.8), SamplingParams(top_k=4, min_p=0.02), SamplingParams(temperature=1.5, frequency_penalty=0.5)],
)
def test_drawn_tokens_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-squared over 20,000 positions; the bound is passed by chance less than once in a million."""
    n = 20_000
    logits = (np.random.default_rng(3).standard_normal(VOCAB) * 2).astype(np.float32)
    rows = [row(params, seed=11, position=i, output=(1, 1, 4)) for i in range(n)]
    drawn = [info.token_id for info in sample(np.tile(logits, (n, 1)), rows) if info]
    _, probs, _ = slow_distribution(logits, rows[0])
    seen = np.bincount(drawn, minlength=VOCAB)

    assert not seen[probs == 0].any()
    kept = probs > 0
    chi2 = ((seen[kept] - n * probs[kept]) ** 2 / (n * probs[kept])).sum()
    dof = kept.sum() - 1
    assert chi2 < dof + 5 * math.sqrt(2 * dof) + 12


def test_uniforms_are_even_and_differ_in_every_coordinate() -> None:
    u = uniforms([7] * 4096, [0] * 4096, list(range(4096)))

    assert abs(u.mean() - 0.5) < 0.02 and 0 <= u.min() and u.max() < 1
    assert np.abs(np.histogram(u, 16, (0, 1))[0] - 256).max() < 90
    assert len({float(uniforms([a], [b], [c])[0]) for a in range(5) for b in range(5) for c in range(5)}) == 125
    assert uniforms([-1], [0], [0]) == uniforms([2**64 - 1], [0], [0])  # the same 64 bits


def test_a_flat_distribution_falls_back_to_the_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32)
    rows = [row(SamplingParams(temperature=1.0, top_p=p), position=i) for i, p in enumerate((0.3, 0.9, 0.999))]
    wanted = sample(logits.copy(), rows)
    monkeypatch.setattr(sampler, "_CANDIDATES", 3)

    assert sample(logits.copy(), rows) == wanted


def test_tied_tokens_at_the_border_are_all_let_in() -> None:
    logits = np.tile(np.array([[1.0, 1.0, 1.0, 0.0]], np.float32), (200, 1))
    rows = [row(SamplingParams(top_k=2), position=i) for i in range(200)]

    assert {info.token_id for info in sample(logits, rows) if info} == {0, 1, 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_finite_maximum_spoils_only_itself(bad: float) -> None:
    logits = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32)
    rows = [row(SamplingParams(temperature=t, top_p=0.9), position=i) for i, t in enumerate((0.0, 1.0, 1.0))]
    wanted = sample(logits.copy(), rows)
    logits[1, 4] = bad

    assert sample(logits, rows) == [wanted[0], None, wanted[2]]


@given(st.lists(st.tuples(st.integers(-(2**70), 2**70), st.integers(0, 9), st.integers(0, 10**6)), min_size=1, max_size=16))
def test_few_and_many_numbers_are_drawn_alike(keys: list[tuple[int, int, int]]) -> None:
    """Few by plain integers, many by arrays."""
    many = keys + [(0, 0, 0)] * 17

    assert uniforms(*zip(*keys, strict=True)).tolist() == uniforms(*zip(*many, strict=True)).tolist()[: len(keys)]


@pytest.mark.skipif(sampler._kernels() is None, reason="the kernels are not compiled")
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([3, 29, 4099]), st.data())
def test_kernels_choose_as_numpy_does(seed: int, num_rows: int, vocab: int, data: st.DataObject) -> None:
    """But where a border is within the last bits of a sum: one row in some thousands, so at most one of these."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((num_rows, vocab)) * data.draw(st.sampled_from([0.1, 3, 30]))).astype(np.float32)
    if data.draw(st.booleans()):
        logits[0, 1] = data.draw(st.sampled_from([np.nan, np.inf]))

    def column(values: list[float], dtype: type) -> np.ndarray:
        return np.array([data.draw(st.sampled_from(values)) for _ in range(num_rows)], dtype)

    parameters = (
        column([0.0, 0.3, 1.0, 1.7], np.float32), column([0, 1, 7, vocab, vocab + 5], np.int32), column([1.0, 0.9, 0.5, 0.0], np.float32),
        column([0.0, 0.05, 0.5], np.float32), rng.random(num_rows),
    )  # fmt: skip
    native, slow = sampler._kernels().sample_rows(logits, *parameters), sampler.sample_rows(logits, *parameters)
    assert (native != slow).sum() <= 1

    tokens = np.maximum(slow, 0)
    good = np.flatnonzero(slow >= 0)
    for a, b in zip(sampler._kernels().logprobs_rows(logits[good], tokens[good], 3), sampler.logprobs_rows(logits[good], tokens[good], 3), strict=True):
        assert np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_greedy_row_whose_best_token_is_allowed_needs_no_logits(share):
    rng = np.random.default_rng(int(100 * share))
    logits = rng.normal(size=(24, 96)).astype(np.float32)
    logits[3] = np.nan
    params = [
        SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0, logprobs=True, top_logprobs=2),
        SamplingParams(temperature=0, logit_bias={5: 9.0}), SamplingParams(temperature=0, presence_penalty=1.0), SamplingParams(temperature=0, min_tokens=50),
    ]  # fmt: skip
    rows = []
    for i in range(len(logits)):
        allowed = rng.random(96) < share
        allowed[rng.integers(96)] = True
        mask = None if i % 5 == 4 else np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
        rows.append(SampleRow(params[i % len(params)], 7, i, 0, lambda: np.array([1]), {2: 1}, (0,), mask))
    best = [int(x.argmax()) if np.isfinite(x).all() else -1 for x in logits]

    wanted = sample(logits.copy(), rows)
    given = sample(logits.copy(), rows, None, best)

    assert given == wanted
    assert wanted[3] is None
    untouched = logits.copy()
    greedy = [i for i in range(len(rows)) if i % len(params) == 0 and rows[i].mask is not None and wanted[i] is not None and best[i] == wanted[i].token_id]
    assert len(greedy) > (0 if share > 0.3 else -1)
    assert [i.token_id for i in sample(untouched[greedy] * 0, [rows[i] for i in greedy], None, [best[i] for i in greedy])] == [best[i] for i in greedy]


@pytest.mark.parametrize(("temperature", "num_allowed"), [(1.0, 3), (1.0, 20), (0.5, 8)])
def test_two_draws_have_the_distribution_of_one_from_what_is_allowed(temperature, num_allowed):
    """A free draw, and another one where the grammar refuses it: a chi-square test over 6,000 positions against the masked softmax."""
    rng = np.random.default_rng(num_allowed)
    logits = (2 * rng.standard_normal(VOCAB)).astype(np.float32)
    allowed = np.zeros(32, bool)
    allowed[rng.permutation(VOCAB)[:num_allowed]] = True
    allowed[logits.argmax()] = False
    mask = np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32)
    params = SamplingParams(temperature=temperature)
    num = 6000
    rows = [SampleRow(params, 3, 0, i, lambda: np.array([1]), {}, (), mask) for i in range(num)]
    infos = sample(np.tile(logits, (num, 1)), rows)
    counts = np.bincount([i.token_id for i in infos if i is not None], minlength=VOCAB)
    p = np.where(allowed[:VOCAB], np.exp(logits.astype(np.float64) / temperature), 0.0)
    expected = num * p / p.sum()
    assert counts.sum() == num and not counts[~allowed[:VOCAB]].any()
    assert 0.05 < 1 - p.sum() / np.exp(logits.astype(np.float64) / temperature).sum() < 0.999  # some draws are refused
    likely = expected >= 5
    found = ((counts - expected)[likely] ** 2 / expected[likely]).sum() + (counts - expected)[~likely].sum() ** 2 / max(expected[~likely].sum(), 1.0)
    freedom = likely.sum()
    assert found < freedom + 5 * math.sqrt(2 * freedom), (found, freedom)
