"""What a service sees of the mesh: the seam between services and carriers.

Services are written against these protocols only. `plugmesh.mesh.runtime` provides the real thing over NATS and
gRPC, `plugmesh.testing.local_mesh` an in-process one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import grpc
import prometheus_client

from plugmesh.types import InstanceInfo


@dataclass(frozen=True, slots=True)
class Binding:
    """One generated service and its implementation: `Binding(add_DecodeServicer_to_server, servicer, "plugmesh_proto.v1.Decode")`."""

    add_to_server: Callable[[Any, Any], None]
    servicer: Any
    full_name: str
    grpc_only: frozenset[str] = frozenset()  # method names that move bulk bytes and are not offered over NATS


@dataclass(frozen=True, slots=True)
class Event:
    """A message from the bus."""

    subject: str
    data: bytes
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class Job(Protocol):
    """A job taken from a work queue. Exactly one of `done`, `retry`, `drop` ends it."""

    data: bytes
    num_deliveries: int

    async def in_progress(self) -> None:
        """Resets the redelivery timer; call it more often than `ack_wait_s`."""

    async def done(self) -> None: ...
    async def retry(self, delay_s: float = 0.0) -> None: ...
    async def drop(self) -> None:
        """Never deliver it again (malformed or expired)."""


class WorkQueue(Protocol):
    """A bounded, acknowledged queue (JetStream work-queue stream, discard-new)."""

    async def put(self, data: bytes, *, dedup_id: str = "") -> None:
        """Raises Overloaded when the queue is full and Unavailable when the broker is away."""

    def take(self, *, max_in_flight: int, ack_wait_s: float = 30.0) -> AsyncIterator[Job]:
        """Jobs as they come, at most `max_in_flight` not yet ended."""

    async def depth(self) -> int: ...


class Mesh(Protocol):
    """The mesh as one instance sees it."""

    name: str
    self_info: InstanceInfo

    def channel(self, role: str, instance: str | None = None) -> grpc.aio.Channel:
        """A channel over NATS to any live instance of `role`, or to one of them. Cheap; cached.

        Calls raise grpc.aio.AioRpcError; `plugmesh.wire.error_from_rpc` turns it into a PlugmeshError.
        """

    def direct_channel(self, info: InstanceInfo) -> grpc.aio.Channel:
        """A real gRPC channel to an instance's address, for bulk bytes. Cached."""

    def instances(self, role: str, *, include_suspect: bool = False) -> list[InstanceInfo]:
        """Live instances from the last table known (it survives the broker)."""

    def watch(self, callback: Callable[[str, InstanceInfo], None]) -> Callable[[], None]:
        """Calls back with ("joined" | "updated" | "suspect" | "left", info); returns an unsubscriber."""

    def set_load(self, **load: float) -> None:
        """Numbers to publish with the next lease renewal (about once a second; at once on `flush_load`)."""

    async def flush_load(self) -> None: ...

    async def publish(self, topic: str, data: bytes) -> None:
        """Fire and forget, to topic names of `plugmesh.mesh.subjects` ("kv.events"). Raises Unavailable when the broker is away."""

    def subscribe(self, topic: str, callback: Callable[[Event], Awaitable[None]], *, max_pending: int = 1024) -> Callable[[], None]:
        """Every instance gets every message. Dropped ones are counted; consumers detect holes by their own sequence numbers."""

    def queue(self, name: str) -> WorkQueue:
        """A work queue of `plugmesh.mesh.subjects.QUEUES` ("prefill")."""

    @property
    def connected(self) -> bool:
        """Whether the broker is reachable now."""


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """What the runtime hands to a service at start.

    `settings` is the service's own pydantic model, `plugins` the loaded plugin host
    (`plugmesh.host.PluginHost`), `metrics` the Prometheus registry served on the metrics port.
    """

    role: str
    mesh: Mesh
    config: Any            # plugmesh.config.MeshConfig
    settings: Any
    plugins: Any
    metrics: prometheus_client.CollectorRegistry


@runtime_checkable
class Service(Protocol):
    """Implemented once in each `plugmesh_<name>/service.py`; made by `create(context)` there.

    Life cycle: `create` (light), `start` (load models, map arenas; the instance is announced after it returns),
    serving, `drain` (SIGTERM: the lease already says "draining", so nobody sends new work; returns when running work
    is done or `deadline_s` is over), `stop` (release everything; always called).
    """

    def bindings(self) -> Sequence[Binding]:
        """Called once after `start`."""

    async def start(self) -> None: ...
    async def drain(self, deadline_s: float) -> None: ...
    async def stop(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Facts for the lease: any of model, weight_version, roles."""
