"""The life of a service process: configuration, carriers, plugins, service, announcement, drain, end.

`python -m plugmesh_<role>` ends in `main(role)`. Exit codes: 0 after a drain, 1 when something failed, 2 for a
configuration that cannot work.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import prometheus_client
import pydantic
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from plugmesh import cards, logs
from plugmesh import config as configuration
from plugmesh.config import MeshConfig, ServiceSettings
from plugmesh.errors import ConfigError, PlugmeshError, Unavailable
from plugmesh.host import PluginHost
from plugmesh.mesh import scheduling
from plugmesh.mesh.api import Service, ServiceContext
from plugmesh.mesh.metrics_http import MetricsServer
from plugmesh.mesh.real import GRPC_OPTIONS, RealMesh
from plugmesh.mesh.rpc.interceptor import ErrorInterceptor
from plugmesh.tracing import TRACING

log = structlog.get_logger()

_PHASE_S = 10.0     # for each of the short steps of the end


def read_config() -> MeshConfig:
    """The configuration a supervisor handed over (PLUGMESH_CONFIG_JSON), else `mesh.toml` and the environment."""
    text = os.environ.get("PLUGMESH_CONFIG_JSON")
    if not text:
        return configuration.load()
    try:
        return MeshConfig.model_validate_json(text)
    except pydantic.ValidationError as e:
        problem = e.errors()[0]
        raise ConfigError(f"PLUGMESH_CONFIG_JSON: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from e


def main(role: str) -> None:
    """Runs one service until SIGTERM or SIGINT. Does not return."""
    try:
        config = read_config()
        factory = None
        try:
            uvloop = importlib.import_module("uvloop")
            factory = uvloop.new_event_loop
        except ImportError:
            pass
        with asyncio.Runner(loop_factory=factory) as runner:
            code = runner.run(_main(role, config))
    except ConfigError as e:
        print(f"plugmesh {role}: {e.message}", file=sys.stderr)
        code = 2
    except PlugmeshError as e:
        print(f"plugmesh {role}: {e.message}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 1
    sys.stdout.flush()
    sys.exit(code)


async def _main(role: str, config: MeshConfig) -> int:
    stop = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()  # asked twice: no more patience
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await Instance(role, config).run(stop, hurry, on_ready=_settle)
    return 0


def _settle() -> None:
    """What was made until now stays: the garbage collector need not walk it again, which with torch takes 50 ms and more,
    in the middle of some step."""
    gc.collect()
    gc.freeze()
    # Only this thread, which passes messages on, and those that it starts from now on: the engine's threads exist already.
    scheduling.shorten_slice()


class Instance:
    """One running service. `run` is its whole life; tests may also call `start`, `drain` and `stop` themselves."""

    def __init__(self, role: str, config: MeshConfig, *, create: Callable[[ServiceContext], Service] | None = None, settings: Any = None) -> None:
        self.role = role
        self.config = config
        self._create = create
        self.settings = settings
        self.mesh: RealMesh | None = None
        self.service: Service | None = None
        self.plugins: PluginHost | None = None
        self.grpc_server: grpc.aio.Server | None = None
        self.health: HealthServicer | None = None
        self.metrics: MetricsServer | None = None
        self.registry = prometheus_client.CollectorRegistry()
        self._service_started = False

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event | None = None, *, on_ready: Callable[[], None] = lambda: None) -> None:
        """Starts, serves until `stop` is set, drains unless `hurry` is set, stops. Raises what prevented the start.

        `on_ready` is called once after the start.
        """
        try:
            if not await _unless(stop, self.start()):
                log.info("service.start_abandoned")
                return
            on_ready()
            await stop.wait()
            if hurry is None:
                await self.drain()
            else:
                await _unless(hurry, self.drain())
        finally:
            await self.stop()

    async def start(self) -> None:
        """Everything up to and with the announcement.

        Raises:
            ConfigError: Settings, plugins, ports.
            PlugmeshError: What the service raised, or Unavailable when there is no broker.
        """
        began = time.monotonic()
        mesh_settings = self.config.mesh
        if self.settings is None:
            self.settings = self.config.service_settings(self.role, _import(f"plugmesh_{self.role}.config").Settings)
        settings: ServiceSettings = self.settings
        instance_id = settings.instance_id or f"{self.role}-{secrets.token_hex(4)}"
        logs.configure(mesh_settings.log_level, service=self.role, instance=instance_id)
        TRACING.configure(mesh_settings.otlp_endpoint, service=self.role, instance=instance_id)
        log.info("service.starting", pid=os.getpid(), config=_public(self.config, self.role))
        create = self._create or _import(f"plugmesh_{self.role}.service").create
        self.plugins = PluginHost.load(cards.loaded_slugs(self.config, self.role), self.config, service=self.role)
        mesh = self.mesh = await RealMesh.connect(self.config, self.role, instance_id=instance_id)
        self.registry.register(prometheus_client.ProcessCollector(registry=None))
        self.registry.register(_MeshCollector(mesh))  # type: ignore[arg-type]

        service = self.service = create(ServiceContext(self.role, mesh, self.config, settings, self.plugins, self.registry))
        notify = getattr(service, "on_new_incarnation", None)
        if notify is not None:
            mesh.on_new_incarnation = notify
        self._service_started = True   # from here on `stop` is owed, whatever happens
        await service.start()

        bindings = list(service.bindings())
        port = await self._start_grpc(bindings, mesh_settings.host, settings.grpc_port)
        self.metrics = MetricsServer(self.registry)
        try:
            # Metrics are for whoever may reach the mesh's own ports: loopback unless told otherwise.
            metrics_port = await self.metrics.start(mesh_settings.host, settings.metrics_port)
        except OSError as e:
            raise ConfigError(f"services.{self.role}.metrics_port: cannot listen on {mesh_settings.host}:{settings.metrics_port}: {e.strerror}") from e
        for binding in bindings:
            mesh.bind(binding)
        await mesh.serve()

        address = mesh_settings.advertise_host or mesh_settings.host
        if address in ("0.0.0.0", "::"):  # noqa: S104 - a comparison: what others use must be a name they can reach
            address = socket.gethostname()
        facts = {k: v for k, v in service.describe().items() if k in ("model", "weight_version", "roles")}
        if "roles" in facts:
            facts["roles"] = tuple(facts["roles"])
        await mesh.announce(
            grpc_address=f"{address}:{port}", metrics_address=f"{address}:{metrics_port}", plugins=dict(self.plugins.versions), **facts
        )
        log.info(
            "service.ready", grpc_port=port, metrics_port=metrics_port, instance=instance_id, incarnation=mesh.self_info.incarnation,
            plugins=list(self.plugins.slugs), start_s=round(time.monotonic() - began, 3),
        )

    async def drain(self) -> None:
        """Nothing new from now on; returns when what runs is done or `mesh.drain_s` is over."""
        assert self.mesh is not None and self.service is not None
        deadline_s = self.config.mesh.drain_s
        log.info("service.draining", deadline_s=deadline_s, num_calls=len(self.mesh.server.calls))
        began = time.monotonic()
        if self.health is not None:
            await self.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.mesh.set_draining()
        try:
            async with asyncio.timeout(deadline_s + 1.0):
                await self.service.drain(deadline_s)
        except TimeoutError:
            log.warning("service.drain_late", deadline_s=deadline_s)
        # Calls that the service counts as done may still have their last frames under way.
        await self.mesh.server.drained(min(1.0, max(0.0, deadline_s - (time.monotonic() - began))))
        log.info("service.drained", drain_s=round(time.monotonic() - began, 3), num_calls=len(self.mesh.server.calls))

    async def stop(self) -> None:
        """Releases everything, in the reverse order; goes on after a failing step. Idempotent."""
        if self.plugins is not None:
            with contextlib.suppress(Exception):
                self.plugins.observe("on_service_stopping")
        if self.mesh is not None:
            await _step("lease", self.mesh.discovery.withdraw())
        if self.grpc_server is not None:
            await _step("grpc", self.grpc_server.stop(grace=0.5))
            self.grpc_server = None
        if self.mesh is not None:
            await _step("calls", self.mesh.server.stop(0.0))
        if self.service is not None and self._service_started:
            self._service_started = False
            await _step("service", self.service.stop(), timeout_s=30.0)
        if self.metrics is not None:
            await _step("metrics", self.metrics.stop())
            self.metrics = None
        if self.mesh is not None:
            await _step("mesh", self.mesh.close())
            self.mesh = None
        await asyncio.to_thread(TRACING.close)
        log.info("service.stopped")

    async def _start_grpc(self, bindings: list[Any], host: str, port: int) -> int:
        server = grpc.aio.server(
            interceptors=(ErrorInterceptor(),), maximum_concurrent_rpcs=1024,
            # Without SO_REUSEPORT a second process on the same port fails instead of sharing it.
            options=(*GRPC_OPTIONS, ("grpc.so_reuseport", 0)),
        )
        self.health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        names = [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        for binding in bindings:
            binding.add_to_server(binding.servicer, server)
            names.append(binding.full_name)
            await self.health.set(binding.full_name, health_pb2.HealthCheckResponse.SERVING)
        reflection.enable_server_reflection(names, server)
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as e:
            raise ConfigError(f"services.{self.role}.grpc_port: cannot listen on {host}:{port}") from e
        await server.start()
        self.grpc_server = server
        return bound


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and name.startswith(e.name):
            raise ConfigError(f"no service package {name.partition('.')[0]}") from e
        raise ConfigError(f"{name} needs the package {e.name!r}, which is not installed") from e


def _public(config: MeshConfig, role: str) -> dict[str, Any]:
    """The resolved configuration for the log: the mesh's part and this service's; secrets are in files by construction."""
    return {
        "mesh": config.mesh.model_dump(mode="json"), "service": config.services.get(role, {}),
        "plugins": {slug: config.plugins.get(slug, {}) for slug in cards.loaded_slugs(config, role)},
    }


class _MeshCollector:
    """What the runtime counts anyway, read when somebody asks."""

    def __init__(self, mesh: RealMesh) -> None:
        self.mesh = mesh

    def collect(self) -> Iterator[prometheus_client.Metric]:
        mesh = self.mesh
        yield GaugeMetricFamily("plugmesh_mesh_connected", "1 while the broker is reachable", value=float(mesh.connected))
        yield GaugeMetricFamily("plugmesh_rpc_calls_running", "Calls being served over NATS", value=len(mesh.server.calls))
        yield GaugeMetricFamily("plugmesh_rpc_pipes", "Ends of running calls over NATS, served and made", value=mesh.peers.num_pipes)
        yield CounterMetricFamily("plugmesh_rpc_calls", "Calls that arrived over NATS", value=mesh.server.num_calls)
        yield CounterMetricFamily("plugmesh_rpc_calls_failed", "Calls over NATS that ended with another status than OK", value=mesh.server.num_failed)
        yield CounterMetricFamily("plugmesh_rpc_calls_refused", "Calls over NATS refused before a handler ran", value=mesh.server.num_refused)
        yield CounterMetricFamily("plugmesh_bus_dropped", "Events dropped because a subscriber was slow", value=mesh.bus.num_dropped)
        yield CounterMetricFamily("plugmesh_nats_disconnects", "Times the connection to the broker broke", value=mesh.carrier.num_disconnects)


async def _unless(event: asyncio.Event, work: Awaitable[Any]) -> bool:
    """Does the work unless the event comes first; then cancels it and returns False."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False
    finally:
        waiter.cancel()
        if not task.done():
            task.cancel()


async def _step(name: str, work: Awaitable[Any], timeout_s: float = _PHASE_S) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        log.error("service.stop_step_late", step=name, timeout_s=timeout_s)
    except Exception as e:
        level = log.warning if isinstance(e, Unavailable) else log.error
        level("service.stop_step_failed", step=name, error=type(e).__name__)
