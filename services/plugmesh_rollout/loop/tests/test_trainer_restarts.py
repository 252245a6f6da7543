"""A trainer that dies between its checkpoint and what it tells the table, and is started again beside workers that go on."""

from __future__ import annotations

import pytest

from plugmesh.client.rollout import RolloutClient
from plugmesh_rollout.loop import run as run_module
from plugmesh_rollout.loop import workers
from plugmesh_rollout.loop.settings import checked


class Killed(Exception):
    pass


@pytest.mark.parametrize("last_call", [pytest.param("publish_version", marks=pytest.mark.slow), "ack"])
async def test_rows_of_the_step_that_it_wrote_down_are_not_trained_again(tmp_path, monkeypatch, last_call):
    settings = checked({
        "run": {"folder": str(tmp_path), "steps": 4, "eval_every": 0, "plugins": ["asyncflow"]},
        "model": {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_position": 64},
        "task": {"name": "copy"}, "reward": {"name": "partial"}, "workflow": {"name": "asyncflow", "options": {"staleness": 1, "policy": "weight_fifo"}},
        "rollout": {"group_size": 3, "groups_per_step": 4, "groups_at_once": 3, "max_tokens": 6, "lease_s": 0.5},
    })  # fmt: skip
    trained, killed = [], []
    inner_step, inner_call, train = workers._step, getattr(RolloutClient, last_call), workers.train

    def step(trainer, batch, staleness):
        trained.extend(row.id for row in batch.rows)
        return inner_step(trainer, batch, staleness)

    async def call(client, *args, **kwargs):
        is_trainers = last_call == "publish_version" or args[0].task == "train"
        if is_trainers and len(trained) == 24 and not killed:
            killed.append(True)
            raise Killed
        return await inner_call(client, *args, **kwargs)

    async def until_killed(run, number, on_step):
        try:
            return await train(run, number, on_step)
        except Killed:
            return await train(run, number, on_step)

    monkeypatch.setattr(workers, "_step", step)
    monkeypatch.setattr(RolloutClient, last_call, call)
    monkeypatch.setattr(run_module, "train", until_killed)
    trainer = await run_module.run_in_process(settings)

    assert killed and 4 == trainer.step_number
    assert sorted(trained) == [f"{g:08d}/{i}" for g in range(16) for i in range(3)]
