"""Tables in this process, over real gRPC."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from plugmesh.client.rollout import RolloutClient
from plugmesh_rollout.alone import Alone
from plugmesh_rollout.config import Settings


class Bus:
    """Hears what a table says to the mesh."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, topic: str, data: bytes) -> None:
        self.published.append((topic, data))

    def set_load(self, **load: float) -> None:
        pass


class Kit:
    """Starts tables and clients; the fixture ends them."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.stack = contextlib.AsyncExitStack()

    async def table(self, *, port: int = 0, **settings: Any) -> Alone:
        table = await Alone.start(self.folder, Settings(**{"durability": "batch", "sweep_s": 0.02, **settings}), port=port, mesh=Bus())
        self.stack.push_async_callback(table.stop)
        return table

    def client(self, table: Alone, **kwargs: Any) -> RolloutClient:
        client = RolloutClient(table.address, **{"retry_s": 5.0, **kwargs})
        self.stack.push_async_callback(client.close)
        return client


@pytest.fixture
async def kit(tmp_path):
    kit = Kit(tmp_path)
    yield kit
    await kit.stack.aclose()
