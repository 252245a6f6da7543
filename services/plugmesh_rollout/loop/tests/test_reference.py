"""The distance from where a run began."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from plugmesh.errors import ConfigError, InvalidRequest
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import random_weights, tiny_config
from plugmesh_rollout.loop.losses import Grpo
from plugmesh_rollout.loop.model import token_logprobs
from plugmesh_rollout.loop.reference import Reference, is_wanted
from plugmesh_rollout.loop.rewards import Partial
from plugmesh_rollout.loop.run import run_in_process
from plugmesh_rollout.loop.settings import TrainerPart, checked
from plugmesh_rollout.loop.synchronous import run_synchronous
from plugmesh_rollout.loop.trainer import Trainer, TrainRow

PROMPT = [5, 6, 7]
RESPONSES = [[8, 9, 3], [], [4], [8, 8, 8, 8, 2]]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_the_reference_is_asked_token_by_token(share_prompts):
    """Against the slow float32 model, run over prompt and response from the beginning."""
    config = tiny_config()
    weights = random_weights(config, seed=4)
    found = Reference(config, weights, share_prompts=share_prompts).logprobs(PROMPT, RESPONSES)

    slow = ReferenceLlama(config, weights)
    for response, values in zip(RESPONSES, found, strict=True):
        logits = slow.logits([*PROMPT, *response]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [logprobs[len(PROMPT) - 1 + i, t] for i, t in enumerate(response)]
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, atol=2e-4)


def rows(trainer, reference, advantage=0.0):
    behaviour = token_logprobs(trainer.model, [(PROMPT, r) for r in RESPONSES])[0].detach().numpy()
    return [
        TrainRow(i, np.array(PROMPT), np.array(r, np.int32), behaviour[i, : len(r)], np.zeros(len(r)), advantage, 0.0, x)
        for i, (r, x) in enumerate(zip(RESPONSES, reference.logprobs(PROMPT, RESPONSES), strict=True))
    ]


def test_a_policy_is_at_no_distance_from_itself():
    config = tiny_config()
    weights = random_weights(config)
    trainer = Trainer(config, weights, TrainerPart(lr=1e-3), Grpo({"kl": 0.5}))
    facts = trainer.step(rows(trainer, Reference(config, weights)))

    assert facts.means["kl"] == pytest.approx(0, abs=1e-9)
    assert facts.loss == pytest.approx(0, abs=1e-9)


def test_without_rewards_every_step_leads_back_to_the_reference():
    """From weights that have moved away from it."""
    config = tiny_config()
    weights = random_weights(config)
    rng = np.random.default_rng(0)
    moved = {name: w + 0.1 * np.abs(w).mean() * rng.standard_normal(w.shape).astype(np.float32) for name, w in weights.items()}
    reference = Reference(config, weights)
    trainer = Trainer(config, moved, TrainerPart(lr=1e-4, lr_warmup=0), Grpo({"kl": 1.0}))
    distances = [trainer.step(rows(trainer, reference)).means["kl"] for _ in range(6)]

    assert distances[0] > 0.01
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.8 * distances[0]


def test_only_a_loss_that_weighs_the_distance_asks_for_the_reference():
    assert is_wanted(Grpo({"kl": 0.1}))
    assert not is_wanted(Grpo({}))
    with pytest.raises(InvalidRequest):
        Grpo({"kl": -0.1})


def settings(folder, kl, *, staleness=0, **run):
    return checked({
        "run": {"folder": str(folder), "steps": 3, "eval_every": 0, "eval_examples": 5, "plugins": ["asyncflow"], **run},
        "model": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_position": 64},
        "task": {"name": "copy"}, "reward": {"name": "partial"}, "loss": {"name": "grpo", "options": {"kl": kl}},
        "workflow": {"name": "asyncflow", "options": {"staleness": staleness, "policy": "in_order"}},
        "rollout": {"group_size": 3, "groups_per_step": 4, "groups_at_once": 3, "max_tokens": 6}, "trainer": {"share_prompts": True},
    })  # fmt: skip


async def test_a_run_that_asks_for_the_reference_is_the_synchronous_one_bit_for_bit(tmp_path):
    """And its first step is at no distance, because version 0 is what it is compared with."""
    s = settings(tmp_path, 0.2)
    losses = []
    run_synchronous(s, Grpo({"kl": 0.2}), Partial({}), lambda facts, _: losses.append((facts.loss, facts.means["kl"])))
    await run_in_process(s)
    lines = [json.loads(line) for line in (tmp_path / "figures" / "trainer-0.jsonl").read_text().splitlines()]

    assert losses == [(line["loss"], line["means"]["kl"]) for line in lines]
    assert losses[0][1] == pytest.approx(0, abs=1e-9) and losses[-1][1] > 1e-7


async def test_nobody_computes_a_reference_that_no_loss_asks_for(tmp_path):
    await run_in_process(settings(tmp_path, 0.0, steps=1))

    assert not list((tmp_path / "figures").glob("reference-*"))


async def test_an_unknown_loss_is_named_as_one(tmp_path):
    unknown = settings(tmp_path, 0.0).model_copy(update={"loss": settings(tmp_path, 0.0).loss.model_copy(update={"name": "sft"})})
    with pytest.raises(ConfigError, match="no loss 'sft'"):
        await run_in_process(unknown)


def test_prompts_of_a_group_may_be_computed_once():
    """Values and gradients are those of rows by themselves, with several prompts and responses of all lengths."""
    config = tiny_config()
    weights = random_weights(config)
    pairs = [(PROMPT, r) for r in RESPONSES] + [([9, 4], [1, 2]), ([3], [5, 6, 7]), ([9, 4], [7])]
    found = []
    for share in (False, True):
        trainer = Trainer(config, weights, TrainerPart(), Grpo({}))
        logprobs, mask = token_logprobs(trainer.model, pairs, share_prompts=share)
        (logprobs * torch.arange(1, logprobs.numel() + 1).view(logprobs.shape)).sum().backward()
        found.append((logprobs.detach().numpy(), mask.numpy(), {n: p.grad.numpy() for n, p in trainer.model.named_parameters()}))

    (alone, mask, gradients), (together, other_mask, others) = found
    assert np.array_equal(mask, other_mask) and [len(r) for _, r in pairs] == mask.sum(1).tolist()
    np.testing.assert_allclose(together, alone, atol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, atol=2e-3 * np.abs(gradient).max() + 1e-6, err_msg=name)
