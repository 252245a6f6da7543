"""The gateway as a service of the mesh."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import structlog

from plugmesh.mesh.api import Binding, Service, ServiceContext
from plugmesh_proto.v1 import inference_pb2_grpc

from .config import Settings
from .grpc_service import InferenceServicer
from .handle import Gateway
from .http import HttpServer, build_app
from .keys import KeyRing
from .measure import GatewayMetrics

log = structlog.get_logger()


def create(context: ServiceContext) -> Service:
    """Raises ConfigError on a bad keys file or router choice."""
    return GatewayService(context)


class GatewayService:
    """HTTP on `[services.gateway] port`, gRPC `Inference` through `bindings`."""

    def __init__(self, context: ServiceContext) -> None:
        settings: Settings = context.settings
        self.context = context
        self.keys = KeyRing.load(settings.keys_file)
        self.gateway = Gateway(
            context.mesh, settings, context.plugins, GatewayMetrics(context.metrics), default_model=context.config.mesh.model)
        app = build_app(self.gateway, self.keys, context.metrics, _version())
        self.http = HttpServer(app, context.config.mesh.host, settings.port)

    def bindings(self) -> Sequence[Binding]:
        return [Binding(
            inference_pb2_grpc.add_InferenceServicer_to_server, InferenceServicer(self.gateway, self.keys), "plugmesh_proto.v1.Inference")]

    async def start(self) -> None:
        self.gateway.start()
        await self.http.start()
        self.context.mesh.set_load(http_port=self.http.port)
        if self.keys.is_open and self.http.host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("gateway.open", host=self.http.host, port=self.http.port, hint="services.gateway.keys_file is not set")
        log.info("gateway.listening", host=self.http.host, port=self.http.port)

    async def drain(self, deadline_s: float) -> None:
        self.gateway.admission.is_draining = True
        await self.http.drain(deadline_s)
        await self.gateway.drain(deadline_s)

    async def stop(self) -> None:
        await self.gateway.stop()
        await self.http.stop()

    def describe(self) -> dict[str, Any]:
        return {}


def _version() -> str:
    try:
        return importlib.metadata.version("plugmesh")
    except importlib.metadata.PackageNotFoundError:
        return "0"
