"""A table of a process of its own, and one in this process, over real gRPC."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import grpc
import prometheus_client
import pytest

from plugmesh.client.rollout import RolloutClient
from plugmesh.config import MeshConfig
from plugmesh.host import PluginHost
from plugmesh.mesh.api import ServiceContext
from plugmesh.mesh.real import GRPC_OPTIONS
from plugmesh.mesh.rpc.interceptor import ErrorInterceptor
from plugmesh_rollout.config import Settings
from plugmesh_rollout.service import create


class QuietMesh:
    """As much of the mesh as the service uses by itself."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, topic: str, data: bytes) -> None:
        self.published.append((topic, data))

    def set_load(self, **load: float) -> None:
        pass


class Kit:
    """Tables and clients; the fixture ends them."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.stack = contextlib.AsyncExitStack()

    async def table(self, *, port: int = 0, **settings: Any) -> Any:
        """A running service: .service, .address, .mesh, .registry, `await .stop()`."""
        config = MeshConfig.model_validate({"mesh": {"data_dir": str(self.folder)}})
        mesh, registry = QuietMesh(), prometheus_client.CollectorRegistry()
        model = Settings(**{"durability": "batch", "sweep_s": 0.02, **settings})
        service = create(ServiceContext("rollout", mesh, config, model, PluginHost("rollout", config), registry))  # type: ignore[arg-type]
        await service.start()
        server = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=GRPC_OPTIONS)
        for binding in service.bindings():
            binding.add_to_server(binding.servicer, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        stopped = False

        async def stop() -> None:
            nonlocal stopped
            if not stopped:
                stopped = True
                await server.stop(0)
                await service.stop()

        self.stack.push_async_callback(stop)
        return SimpleNamespace(service=service, address=f"127.0.0.1:{bound}", port=bound, mesh=mesh, registry=registry, stop=stop)

    def client(self, table: Any, **kwargs: Any) -> RolloutClient:
        client = RolloutClient(table if isinstance(table, str) else table.address, **{"retry_s": 5.0, **kwargs})
        self.stack.push_async_callback(client.close)
        return client


@pytest.fixture
async def kit(tmp_path):
    kit = Kit(tmp_path)
    yield kit
    await kit.stack.aclose()
