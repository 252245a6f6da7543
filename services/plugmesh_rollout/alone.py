"""The experience table without a mesh: for a trainer that needs nothing else, for measurements and for tests that kill it.

    python -m plugmesh_rollout.alone --folder table --port 9100

Prints its address when it serves; ends on SIGTERM or SIGINT. Listens on loopback, as there is nothing to keep strangers out.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import signal
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import prometheus_client

from plugmesh import logs
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.host import PluginHost
from plugmesh.mesh.api import ServiceContext
from plugmesh.mesh.real import GRPC_OPTIONS
from plugmesh.mesh.rpc.interceptor import ErrorInterceptor
from plugmesh_rollout.config import Settings
from plugmesh_rollout.service import RolloutService, create


class NoMesh:
    """What the service says to the mesh by itself goes nowhere."""

    async def publish(self, topic: str, data: bytes) -> None:
        pass

    def set_load(self, **load: float) -> None:
        pass


class Alone:
    """A running table; `address` is where."""

    def __init__(self, service: RolloutService, server: grpc.aio.Server, address: str, mesh: Any) -> None:
        self.service = service
        self.address = address
        self.mesh = mesh
        self._server = server

    @classmethod
    async def start(cls, folder: pathlib.Path, settings: Settings, *, port: int = 0, mesh: Any = None, host: PluginHost | None = None) -> Alone:
        """With the plugins of `host`, if any. Raises ConfigError when the port is taken, and what the service raises."""
        config = MeshConfig.model_validate({"mesh": {"data_dir": str(folder)}})
        mesh = mesh or NoMesh()
        host = host or PluginHost("rollout", config)
        service = create(ServiceContext("rollout", mesh, config, settings, host, prometheus_client.CollectorRegistry()))
        try:
            await service.start()
            server = grpc.aio.server(interceptors=(ErrorInterceptor(),), options=(*GRPC_OPTIONS, ("grpc.so_reuseport", 0)))
            for binding in service.bindings():
                binding.add_to_server(binding.servicer, server)
            try:
                bound = server.add_insecure_port(f"127.0.0.1:{port}")
            except RuntimeError as e:
                raise ConfigError(f"cannot listen on 127.0.0.1:{port}") from e
            await server.start()
        except BaseException:
            await service.stop()
            raise
        return cls(service, server, f"127.0.0.1:{bound}", mesh)

    async def stop(self) -> None:
        """Idempotent."""
        await self._server.stop(0)
        await self.service.stop()


async def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m plugmesh_rollout.alone", description="Serves an experience table without a mesh.")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="where its ledger is kept")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--durability", choices=("commit", "batch", "none"), default="commit")
    parser.add_argument("--memory-bytes", type=int, default=2 << 30)
    given = parser.parse_args(arguments)
    logs.configure("warning", service="rollout", instance="alone")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    table = await Alone.start(given.folder, Settings(durability=given.durability, memory_bytes=given.memory_bytes), port=given.port)
    try:
        print(table.address, flush=True)
        await stop.wait()
    finally:
        await table.stop()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(_main())
    except ImportError:
        asyncio.run(_main())
