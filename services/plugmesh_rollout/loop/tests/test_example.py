"""The example of a trainer outside runs as it is and learns."""

from __future__ import annotations

import importlib.util
import pathlib

from plugmesh_rollout.alone import Alone
from plugmesh_rollout.config import Settings
from plugmesh_rollout.loop.settings import Settings as RunSettings

EXAMPLES = pathlib.Path(__file__).parents[4] / "docs" / "examples" / "rl"


async def test_the_plain_torch_loop_learns_over_grpc_alone(tmp_path):
    spec = importlib.util.spec_from_file_location("plain_torch", EXAMPLES / "plain_torch.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    table = await Alone.start(tmp_path, Settings(durability="batch"))
    try:
        rewards = await example.main(table.address, "t", 25)
    finally:
        await table.stop()

    assert sum(rewards[:3]) / 3 < 0.2 and sum(rewards[-3:]) / 3 > 0.5


def test_every_example_file_can_be_read():
    files = sorted(EXAMPLES.glob("*.toml"))

    assert files
    for file in files:
        assert RunSettings.read(file).run.steps > 0
