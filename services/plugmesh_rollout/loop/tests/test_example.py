"""The example of a trainer outside runs as it is and learns."""

from __future__ import annotations

import importlib.util
import pathlib
import tomllib

from plugmesh.config import MeshConfig
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
    """Those of runs as runs, the others as meshes."""
    files = {file: tomllib.loads(file.read_text()) for file in sorted(EXAMPLES.glob("*.toml"))}

    assert {"smollm2.toml", "copy.toml"} <= {file.name for file, data in files.items() if "run" in data}
    for file, data in files.items():
        if "run" in data:
            assert RunSettings.read(file).run.steps > 0
        else:
            assert MeshConfig.model_validate(data).services
