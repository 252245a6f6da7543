"""The streams against the loop without them."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from plugmesh.errors import InvalidRequest
from plugmesh_rollout.loop import workers
from plugmesh_rollout.loop.losses import Grpo
from plugmesh_rollout.loop.rewards import Partial
from plugmesh_rollout.loop.run import run_in_process
from plugmesh_rollout.loop.settings import checked
from plugmesh_rollout.loop.synchronous import run_synchronous

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_position": 64}


def settings(folder, *, steps=4, workflow=None, **parts):
    base = {
        "run": {"folder": str(folder), "steps": steps, "eval_every": 0, "eval_examples": 10, "plugins": ["asyncflow"]},
        "model": TINY, "task": {"name": "copy"}, "reward": {"name": "partial"}, "workflow": workflow or {"name": "synchronous"},
        "rollout": {"group_size": 3, "groups_per_step": 4, "groups_at_once": 3, "max_tokens": 6},
    }  # fmt: skip
    for part, values in parts.items():
        base[part] = {**base.get(part, {}), **values}
    return checked(base)


def flow(**options):
    return {"name": "asyncflow", "options": options}


def lines(folder, worker="trainer-0"):
    return [json.loads(line) for line in (folder / "figures" / f"{worker}.jsonl").read_text().splitlines()]


def lags(folder):
    total = collections.Counter()
    for line in lines(folder):
        total.update({int(k): v for k, v in line["lags"].items()})
    return total


def same(a, b):
    return all(np.array_equal(x, b.model.arrays()[n]) for n, x in a.model.arrays().items())


@pytest.mark.parametrize(
    "workflow", [flow(staleness=0, policy="weight_fifo"), pytest.param(None, marks=pytest.mark.slow), pytest.param(flow(preset="synchronous"), marks=pytest.mark.slow)]
)
async def test_staleness_0_is_the_synchronous_loop_bit_for_bit(tmp_path, workflow):
    """Held-back groups come in any order, from two workers; loss and weights do not tell."""
    losses = []
    s = settings(tmp_path / "a", workflow=workflow, rollout={"workers": 2, "slow_s": 0.002})
    plain = run_synchronous(s, Grpo({}), Partial({}), lambda facts, _: losses.append((facts.loss, facts.reward)))
    streamed = await run_in_process(s)

    assert losses == [(line["loss"], line["reward"]) for line in lines(tmp_path / "a")]
    assert same(plain, streamed)
    assert {0} == set(lags(tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
async def test_in_order_a_run_is_the_same_every_time_at_any_staleness(tmp_path, staleness):
    runs = [
        await run_in_process(settings(tmp_path / str(i), workflow=flow(staleness=staleness, policy="in_order"), rollout={"slow_s": 0.003 * i, "workers": 1 + i}))
        for i in range(2)
    ]

    assert same(*runs)
    assert staleness == max(lags(tmp_path / "0"))


@pytest.mark.parametrize(
    ("policy", "staleness"),
    [("weight_fifo", 2), *(pytest.param(p, n, marks=pytest.mark.slow) for p in ("weight_fifo", "ready_first", "windowed") for n in (1, 2, 4))],
)
async def test_no_token_is_older_than_the_bound_and_the_bound_is_used(tmp_path, policy, staleness):
    """Delays with a heavy tail, and a trainer that is slower than generation."""
    s = settings(
        tmp_path, steps=8, workflow=flow(staleness=staleness, policy=policy), rollout={"slow_s": 0.004, "groups_at_once": 8, "workers": 2}, trainer={"pause_s": 0.03}
    )
    await run_in_process(s)

    found = lags(tmp_path)
    assert max(found) <= staleness
    assert set(found) >= {0, 1}
    if policy != "windowed":
        assert sum(x["rows"] for x in lines(tmp_path)) == 8 * s.batch_rows


async def test_every_prompt_is_trained_once_however_slow_it_was(tmp_path):
    """Delays and lengths with heavy tails: the trained rows are all rows, each once, so their lengths are distributed as the generated ones."""
    seen = {}

    def spy(trainer, batch, staleness, inner=workers._step):
        for row in batch.rows:
            assert row.id not in seen
            seen[row.id] = len(row.fields["response_ids"])
        return inner(trainer, batch, staleness)

    s = settings(
        tmp_path, steps=6, workflow=flow(staleness=2, policy="weight_fifo"), rollout={"slow_s": 0.01, "groups_at_once": 12, "tail": 1.5, "max_tokens": 32}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_step", spy)
        await run_in_process(s)

    expected = {f"{g:08d}/{i}": n for g in range(24) for i, n in enumerate(workers.drawn_lengths(s, g))}
    assert expected == seen
    assert max(seen.values()) > 10 * sorted(seen.values())[len(seen) // 2]


@pytest.mark.parametrize(("every", "staleness"), [(2, 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 0), (1, 1), (2, 0)))])
async def test_a_run_goes_on_from_where_it_was_stopped_bit_for_bit(tmp_path, every, staleness):
    """Stopped after step 3 of 6; with a checkpoint every 2 steps, step 3 is done again."""

    def parts(folder):
        return settings(folder, steps=6, workflow=flow(staleness=staleness, policy="in_order"), run={"checkpoint_every": every})

    class Stopped(Exception):
        pass

    def stop(facts):
        if facts.step == 3:
            raise Stopped

    straight = await run_in_process(parts(tmp_path / "a"))
    with pytest.raises(Stopped):
        await run_in_process(parts(tmp_path / "b"), stop)
    resumed = await run_in_process(parts(tmp_path / "b"))

    assert same(straight, resumed)
    assert max(lags(tmp_path / "b")) <= staleness


async def test_a_capacity_below_what_the_policy_needs_ends_the_run_before_it_starts(tmp_path):
    with pytest.raises(InvalidRequest, match="would stop"):
        await run_in_process(settings(tmp_path, workflow=flow(staleness=1, policy="weight_fifo", capacity_rows=23)))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_small_model_learns_and_held_out_prompts_show_it(tmp_path, staleness):
    """Copying three to five letters, after a supervised warm-up; the reward of drawn answers to prompts that were never trained."""
    s = settings(
        tmp_path, steps=90, workflow=flow(staleness=staleness, policy="in_order"),
        run={"eval_every": 90, "eval_examples": 200}, model={"hidden_size": 64, "intermediate_size": 192, "num_layers": 2},
        task={"options": {"min_length": 3, "max_length": 5}}, reward={"options": {"weight": 1.0}}, warmup={"steps": 150, "rows": 64, "lr": 3e-3},
        rollout={"group_size": 8, "groups_per_step": 32, "groups_at_once": 32, "max_tokens": 8}, trainer={"lr": 3e-4},
    )  # fmt: skip
    await run_in_process(s)

    before, after = lines(tmp_path)[0]["before"], lines(tmp_path)[-1]
    assert after["held_out_reward"] > before["held_out_reward"] + 0.08
