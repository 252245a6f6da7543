"""Losses, advantages and steps that can be interrupted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.errors import InvalidRequest
from plugmesh_engine.testing import random_weights, tiny_config
from plugmesh_rollout.loop import tasks
from plugmesh_rollout.loop.losses import DecoupledPpo, Grpo, group_advantages
from plugmesh_rollout.loop.model import token_logprobs
from plugmesh_rollout.loop.settings import TrainerPart
from plugmesh_rollout.loop.trainer import Trainer, TrainRow


def batch(logprobs, behaviour, advantage, **more):
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    return {
        "mask": mask, "behaviour": behaviour, "advantage": torch.tensor(advantage), "num_tokens": torch.tensor(float(mask.sum())),
        "num_rows": torch.tensor(float(len(mask))), **more,
    }  # fmt: skip


def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(-1, 0.5, shape)).float()


def test_grpo_is_the_formula_token_by_token():
    new, old = numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    advantages = [1.0, -0.5, 0.2]
    loss, facts = Grpo({"clip_low": 0.1, "clip_high": 0.3})(new, batch(new, old, advantages))

    total = clipped = 0.0
    for i, a in enumerate(advantages):
        for n, o in zip(new[i].tolist(), old[i].tolist(), strict=True):
            ratio = math.exp(n - o)
            total -= min(ratio * a, min(max(ratio, 0.9), 1.3) * a)
            clipped += (ratio < 0.9 and a < 0) or (ratio > 1.3 and a > 0)
    assert total / 12 == pytest.approx(float(loss), rel=1e-5)
    assert clipped == float(facts["num_clipped"])


def test_decoupled_ppo_weighs_by_the_proximal_policy_and_leaves_out_what_exceeds_the_cap():
    new, old, prox = numbers(2, 5, seed=1), numbers(2, 5, seed=2), numbers(2, 5, seed=3)
    prox[0, 0] = old[0, 0] + 3  # a weight of 20
    advantages = [0.7, -1.0]
    loss, facts = DecoupledPpo({})(new, batch(new, old, advantages, proximal=prox))

    total = 0.0
    for i, a in enumerate(advantages):
        for n, o, p in zip(new[i].tolist(), old[i].tolist(), prox[i].tolist(), strict=True):
            weight, ratio = math.exp(p - o), math.exp(n - p)
            total -= (weight <= 5) * weight * min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
    assert total / 10 == pytest.approx(float(loss), rel=1e-5)
    assert float(facts["num_capped"]) >= 1


@pytest.mark.parametrize("options", [{"clip": 1}, {"normalise": "batch"}])
def test_options_that_a_loss_has_not_are_refused(options):
    with pytest.raises(InvalidRequest):
        Grpo(options)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.booleans())
def test_advantages_of_a_group_add_up_to_nothing_and_keep_the_order_of_rewards(rewards, scale):
    found = group_advantages(rewards, scale=scale)

    assert sum(found) == pytest.approx(0, abs=1e-6 * len(found) * 10)
    assert all(a >= b - 1e-12 for a, x in zip(found, rewards, strict=True) for b, y in zip(found, rewards, strict=True) if x >= y)


def rows(seed, num=6, version=0):
    rng = np.random.default_rng(seed)
    return [
        TrainRow(
            i, rng.integers(3, 200, 4), rng.integers(3, 200, n := int(rng.integers(0 if i else 1, 6))), rng.normal(-3, 0.3, n).astype(np.float32),
            np.full(n, version), float(rng.normal()), reward=1.0,
        )
        for i in range(num)
    ]  # fmt: skip


def trainer(loss=None, **settings):
    config = tiny_config()
    return Trainer(config, random_weights(config), TrainerPart(**{"lr": 1e-2, **settings}), loss or Grpo({}))


def same(a, b):
    return all(np.array_equal(x, b.model.arrays()[n]) for n, x in a.model.arrays().items())


def test_gradients_add_up_over_parts_to_those_of_the_whole_batch():
    whole, parts = trainer(part_rows=100), trainer(part_rows=2)
    facts = [t.step(rows(1)) for t in (whole, parts)]

    assert facts[0].loss == pytest.approx(facts[1].loss, rel=1e-4)
    assert facts[0].grad_norm == pytest.approx(facts[1].grad_norm, rel=1e-3)


def test_the_order_in_which_rows_come_changes_nothing():
    one, other = trainer(), trainer()
    one.step(rows(1))
    other.step(rows(1)[::-1])

    assert same(one, other)


@pytest.mark.parametrize("loss", [Grpo, DecoupledPpo])
def test_a_trainer_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, loss):
    straight, first = trainer(loss({}), epochs=2), trainer(loss({}), epochs=2)
    for t in (straight, first):
        t.step(rows(1))
        t.step(rows(2))
    first.save(tmp_path / "c.safetensors", note="x")
    resumed = trainer(loss({}), epochs=2)
    facts = resumed.load(tmp_path / "c.safetensors")
    for t in (straight, resumed):
        t.step(rows(3))

    assert {"note": "x"} == facts
    assert 3 == resumed.step_number and same(straight, resumed)


def test_a_step_tells_how_many_versions_each_token_is_behind():
    t = trainer()
    t.step(rows(1))
    t.step(rows(2, version=1))
    mixed = rows(3)
    mixed[0] = TrainRow(0, np.array([3]), np.array([4, 5, 6]), np.zeros(3, np.float32), np.array([0, 1, 2]), 1.0)

    assert {0: 1, 1: 1, 2: 1 + sum(len(r.response_ids) for r in mixed[1:])} == t.step(mixed).lags


def test_training_makes_a_rewarded_response_likelier():
    t = trainer(lr=1e-3)
    pairs = [(np.array([5, 6]), np.array([7, 8])), (np.array([5, 6]), np.array([9, 9]))]
    before = token_logprobs(t.model, pairs)[0].detach()
    for _ in range(3):
        t.step([TrainRow(i, p, r, before[i].numpy(), np.zeros(2), 1.0 - 2 * i) for i, (p, r) in enumerate(pairs)])
    after = token_logprobs(t.model, pairs)[0].sum(1)

    assert after[0] > before[0].sum() and after[1] < before[1].sum()


@pytest.mark.parametrize("task", ["add", "copy", "reverse", "sort"])
def test_examples_are_reproducible_and_held_out_prompts_are_never_trained(task):
    examples = tasks.Examples(task, {}, seed=1)
    train = [examples.train(i) for i in range(300)]
    held = [examples.held_out(i) for i in range(50)]

    assert train == [tasks.Examples(task, {}, seed=1).train(i) for i in range(300)]
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    assert all(e.answer == tasks.decode([*tasks.encode(e.answer), tasks.EOS, 5]) for e in held)
    solve = {
        "add": lambda p: str(sum(int(x) for x in p[:-1].split("+"))), "copy": lambda p: p[2:-1], "reverse": lambda p: p[-2:1:-1],
        "sort": lambda p: "".join(sorted(p[2:-1])),
    }  # fmt: skip
    assert all(solve[task](e.prompt) == e.answer for e in held)


def test_unknown_tasks_and_characters_are_refused():
    with pytest.raises(InvalidRequest, match="no task"):
        tasks.Examples("chess", {}, 0)
    with pytest.raises(InvalidRequest, match="vocabulary"):
        tasks.encode("é")
