"""The strategy on replayed traces: who is stopped, who votes, what it costs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from plugmesh.errors import InvalidRequest, LimitExceeded
from plugmesh.testing.strategies import ReplayApi, Script, strategy_request
from plugmesh.types import FinishReason, TokenInfo
from plugmesh_deepconf.bench import Outcome, auroc, compare, discrimination, policies, random_stop, run_strategy
from plugmesh_deepconf.plugin import Settings
from plugmesh_deepconf.strategy import DeepConf, merged
from plugmesh_deepconf.tasks import Problem, problems

WINDOW = 4


def trace(confidences, answer, end=FinishReason.STOP):
    texts = [*(["x "] * (len(confidences) - 1)), f" Answer: {answer}"]
    return Script([TokenInfo(i, confidence=float(c)) for i, c in enumerate(confidences)], texts, end)


async def play(scripts, *, budget_tokens=1 << 20, late_steps=0, settings=None, logprobs=False, **options):
    request = strategy_request({"window": WINDOW, **options}, max_tokens=50, logprobs=logprobs)
    api = ReplayApi(request, lambda child, _: scripts[child], budget_tokens=budget_tokens, late_steps=late_steps)
    events = [e async for e in DeepConf(settings or Settings()).run(request, api)]
    assert len(events) == 1
    return events[0], api


def drawn(seed, num, length=20):
    """Traces as those of a model that is less certain where it errs; the right answer is 1."""
    rng = random.Random(seed)
    scripts = []
    for _ in range(num):
        is_right = rng.random() < 0.6
        values = [rng.gauss(16, 2) for _ in range(length)]
        if not is_right:
            at = rng.randrange(4, length - 4)
            values[at : at + 4] = [rng.gauss(8, 2) for _ in range(4)]
        scripts.append(trace(values, 1 if is_right else rng.randrange(2, 5)))
    return scripts


async def test_online_stops_below_the_bar_of_the_warm_up_and_nobody_else():
    """Against a plain recomputation from all confidences."""
    scripts = drawn(1, 24)
    event, api = await play(scripts, mode="online", traces=24, warmup=8, batch=16, keep_percent=50, consensus=1)
    lowest = [min(np.mean([t.confidence for t in s.tokens[i : i + WINDOW]]) for i in range(len(s.tokens) - WINDOW + 1)) for s in scripts]
    bar = float(np.percentile(lowest[:8], 50))
    rows = event.detail["traces"]

    assert event.detail["bar"] == pytest.approx(bar)
    assert [r["end"] == "stopped" for r in rows[8:]] == [v < bar for v in lowest[8:]] and any(v < bar for v in lowest[8:])
    assert [r["is_kept"] for r in rows[:8]] == [v >= bar for v in lowest[:8]] and all(r["end"] == "stop" for r in rows[:8])
    for row, script in zip(rows[8:], scripts[8:], strict=True):
        values = [t.confidence for t in script.tokens]
        first = next((i + 1 for i in range(WINDOW - 1, len(values)) if np.mean(values[i - WINDOW + 1 : i + 1]) < bar), len(values))
        assert row["num_tokens"] == first
        assert (row["answer"] is None) == (row["end"] == "stopped")
    expected: dict[str, float] = {}
    for script, low in zip(scripts, lowest, strict=True):
        if low >= bar:
            answer = script.texts[-1].split()[-1]
            expected[answer] = expected.get(answer, 0.0) + low
    assert event.detail["votes"] == pytest.approx(expected, abs=1e-5)
    assert api.cancelled == {r["child"] for r in rows if r["end"] == "stopped"}
    assert api.ledger.num_tokens == sum(r["num_tokens"] + (r["end"] == "stop") for r in rows)


async def test_a_trace_that_is_stopped_never_votes_even_with_the_only_answer_of_its_kind():
    good, bad = trace([15.0] * 10, 1), trace([15.0] * 5 + [1.0] * 5, 2)
    event, _ = await play([good] * 4 + [bad] * 12, mode="online", traces=16, warmup=4, batch=12, consensus=1)

    assert list(event.detail["votes"]) == ["1"] and event.detail["answer"] == "1"
    assert [r["end"] for r in event.detail["traces"]] == ["stop"] * 4 + ["stopped"] * 12
    assert event.text == "x " * 9 + " Answer: 1" and event.finish_reason is FinishReason.STOP


async def test_traces_that_are_all_alike_are_all_kept():
    same = trace([12.0, 3.0, 9.0, 11.0, 7.0, 10.0], 5)
    event, api = await play([same] * 16, mode="online", traces=16, warmup=4, batch=12, keep_percent=10, consensus=1)

    assert all(r["is_kept"] and r["end"] == "stop" for r in event.detail["traces"])
    assert api.cancelled == set()


@pytest.mark.parametrize(("keep", "stopped"), [(100, 0), (1e-6, None)])
async def test_keeping_all_stops_nothing_beyond_the_warm_ups_worst_and_keeping_none_leaves_a_warm_up_trace(keep, stopped):
    event, _ = await play(drawn(3, 20), mode="online", traces=20, warmup=8, batch=12, keep_percent=keep, consensus=1)
    rows = event.detail["traces"]

    assert sum(r["is_kept"] for r in rows[:8]) >= 1
    assert (sum(r["is_kept"] for r in rows[:8]) == 8) == (stopped == 0)
    assert event.detail["answer"] is not None


async def test_when_all_agree_it_ends_right_after_the_warm_up_and_else_with_the_batch_that_agrees():
    agree = trace([10.0] * 8, 3)
    event, api = await play([agree] * 32, mode="online", traces=32, warmup=8, batch=8)
    assert len(event.detail["traces"]) == 8 == api.ledger.num_calls

    other = trace([10.0] * 8, 4)
    mixed = [agree] * 4 + [other] * 4 + [agree] * 24
    event, _ = await play(mixed, mode="online", traces=32, warmup=8, batch=8, consensus=0.8)
    assert len(event.detail["traces"]) == 24  # 4 of 8, 12 of 16, 20 of 24


async def test_a_trace_shorter_than_the_window_is_never_stopped():
    short = trace([0.5] * (WINDOW - 1), 2)
    event, _ = await play([trace([15.0] * 8, 1)] * 4 + [short] * 4, mode="online", traces=8, warmup=4, batch=4, consensus=1)

    assert [r["end"] for r in event.detail["traces"]] == ["stop"] * 8
    assert event.detail["traces"][-1]["score"] == 0.5


@pytest.mark.parametrize(("weight", "keep", "winner"), [("none", 100, "2"), ("mean", 100, "1"), ("lowest", 100, "1"), ("lowest", 25, "1"), ("tail", 25, "3")])
async def test_offline_filters_and_weighs(weight, keep, winner):
    scripts = [trace([20.0] * 8, 1), trace([3.0] * 8, 2), trace([4.0] * 8, 2), trace([1.0] * 4 + [30.0] * 4, 3)]
    event, _ = await play(scripts, mode="offline", traces=4, weight=weight, keep_percent=keep)

    assert event.detail["answer"] == winner
    assert sum(r["is_kept"] for r in event.detail["traces"]) == (4 if keep == 100 else 1)


async def test_majority_is_plain_self_consistency():
    event, api = await play([trace([50.0] * 8, 1)] + [trace([1.0] * 8, 2)] * 2, mode="majority", traces=3)

    assert event.detail["votes"] == {"2": 2.0, "1": 1.0}
    assert api.samplings[0].temperature == 1.0 and api.samplings[0].confidence_top_k == 20


async def test_a_greedy_request_gets_traces_that_differ_and_a_sampled_one_its_own_temperature():
    request = strategy_request({"traces": 2, "mode": "majority"}, temperature=0.0)
    api = ReplayApi(request, lambda child, _: trace([1.0] * 3, 1))
    async for _ in DeepConf(Settings()).run(request, api):
        pass

    assert (api.samplings[0].temperature, api.samplings[0].top_p) == (0.6, 0.95)


async def test_the_budget_is_what_the_traces_share():
    scripts = [trace([10.0] * 8, i) for i in range(80)]  # no two agree; 9 tokens each, 50 must be free for each
    event, api = await play(scripts, budget_tokens=500, mode="online", traces=80, warmup=8, batch=4, late_steps=2)
    assert 440 < api.ledger.num_tokens <= 500 and len(event.detail["traces"]) == api.ledger.num_calls < 80
    with pytest.raises(LimitExceeded, match="no trace of 50 tokens"):
        await play(scripts, budget_tokens=49)


async def test_log_probabilities_of_the_answer_come_when_they_are_asked_for():
    scripts = [trace([10.0] * 4, 1)]
    with_, _ = await play(scripts, traces=1, logprobs=True)
    without, _ = await play(scripts, traces=1)

    assert [t.token_id for t in with_.tokens] == [0, 1, 2, 3] and without.tokens == ()


def test_options_of_a_request_change_settings_and_are_checked():
    assert merged(Settings(window=8), {"traces": 3}) == Settings(window=8, traces=3)
    for options, name in (({"window": 0}, "window"), ({"keep_percent": "x"}, "keep_percent"), ({"nope": 1}, "nope"), ({"mode": "magic"}, "mode")):
        with pytest.raises(InvalidRequest) as e:
            merged(Settings(), options)
        assert e.value.param == f"strategy.{name}"


# -- the measurement ---------------------------------------------------------------------------------------------------------------


def test_problems_are_different_have_the_right_answers_and_never_are_examples():
    for task in ("sum", "largest"):
        made = problems(task, 60, 3)
        assert len({p.prompt for p in made}) == 60 and made == problems(task, 60, 3)
        for p in made:
            question = p.prompt.rsplit("Question: ", 1)[1]
            numbers = [int("".join(c for c in part if c.isdigit())) for part in question.split("?")[0].replace("+", ",").split(",")]
            assert p.answer == str(sum(numbers) if task == "sum" else max(numbers))
            assert question.split("\n")[0] not in p.prompt.rsplit("Question: ", 1)[0]
            assert p.prompt.count("Answer: ") == p.prompt.count("Question: ") - 1


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[labels] for b in values[~labels]]

    assert auroc(values, labels) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(values, np.ones(60, bool)))


async def test_on_traces_whose_errors_show_it_beats_chance_stops_and_saves_tokens():
    """The controls that a strategy without any use of confidence would fail; made-up traces with a known answer."""
    right, control, saved = [], [], []
    options = policies(24, WINDOW)["online 12+12, keep 50 %"]
    for seed in range(30):
        scripts = drawn(seed, 24)
        detail, tokens = await run_strategy(options, scripts)
        full, all_tokens = await run_strategy({"mode": "offline", "keep_percent": 100, "traces": 24, "window": WINDOW}, scripts)
        answers = [(t["answer"], 1.0) for t in full["traces"]]
        rng = np.random.default_rng(seed)
        wrong = sum(t["answer"] not in (None, "1") for t in detail["traces"][12:] if t["is_kept"])
        chance, chance_tokens = random_stop(detail, scripts, answers, options["warmup"], rng)
        right.append((detail["answer"] == "1", wrong))
        control.append((chance == "1", abs(chance_tokens - tokens) / tokens))
        saved.append(tokens / all_tokens)

    assert np.mean([r for r, _ in right]) >= np.mean([c for c, _ in control]) and np.mean([r for r, _ in right]) > 0.95
    assert np.mean([w for _, w in right]) < 2  # of about 5 wrong ones in the second half
    assert np.mean(saved) < 0.95 and np.mean([d for _, d in control]) < 0.05
    recorded = [(Problem("t", "", "1"), drawn(s, 1)[0], drawn(s, 24)) for s in range(30)]
    rows = {r["measure"]: r for r in discrimination(recorded, WINDOW)}
    assert rows["lowest"]["auroc"] > rows["mean"]["auroc"] > 0.5 and abs(rows["lowest"]["shuffled_labels"] - 0.5) < 0.06


def test_the_comparison_at_equal_tokens_reads_off_the_curve_and_its_interval_holds_the_value():
    rng = np.random.default_rng(1)
    curve = [Outcome(f"self-consistency {n}", (rng.random(400) < a).astype(float), np.full(400, 10.0 * n)) for n, a in ((1, 0.3), (2, 0.5), (4, 0.7))]
    between = Outcome("x", (rng.random(400) < 0.65).astype(float), np.full(400, 30.0))
    rows = {r["policy"]: r for r in compare([*curve, between], num_draws=200)}
    middle = (curve[1].is_right.mean() + curve[2].is_right.mean()) / 2

    assert rows["x"]["delta_at_equal_tokens"] == pytest.approx(between.is_right.mean() - middle)
    low, high = rows["x"]["delta_at_equal_tokens_95"]
    assert low < rows["x"]["delta_at_equal_tokens"] < high and high - low < 0.2
    assert rows["self-consistency 2"]["delta_at_equal_tokens"] == 0.0
