"""A mesh within one process: several services over the in-process carrier, no broker, no sockets.

    async with LocalMesh() as mesh:
        await mesh.host("decode", plugmesh_decode.service.create, settings=Settings(...))
        stub = DecodeStub(mesh.channel("decode"))

`LocalMesh` itself implements `plugmesh.mesh.api.Mesh` for the test; each hosted service gets a view of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import os
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import prometheus_client

from plugmesh import __version__, cards
from plugmesh.config import MeshConfig, ServiceSettings
from plugmesh.errors import NotFound, Overloaded, PayloadTooLarge, Unavailable
from plugmesh.host import PluginHost
from plugmesh.mesh import subjects
from plugmesh.mesh.api import Event, Job, Service, ServiceContext
from plugmesh.mesh.bus import Listener
from plugmesh.mesh.discovery import new_incarnation
from plugmesh.mesh.hostid import host_id
from plugmesh.mesh.rpc.channel import CarrierChannel
from plugmesh.mesh.rpc.frames import MAX_MESSAGE_BYTES
from plugmesh.mesh.rpc.local import LocalCarrier, LocalHub
from plugmesh.mesh.rpc.peers import Patience, PeerWatch
from plugmesh.mesh.rpc.server import RpcServer
from plugmesh.mesh.table import InstanceTable
from plugmesh.types import InstanceInfo

# Silence is judged late: tests step debuggers and load models on the event loop.
PATIENCE = Patience(ping_s=0.2, silence_s=30.0, grace_s=1.0)


@dataclass(slots=True)
class LocalInstance:
    """One hosted service: the object, the mesh as it sees it, and its two servers' carriers."""

    service: Service
    mesh: LocalView
    server: RpcServer
    direct: RpcServer
    carriers: tuple[LocalCarrier, LocalCarrier]
    watches: tuple[PeerWatch, PeerWatch]
    registry: prometheus_client.CollectorRegistry

    @property
    def info(self) -> InstanceInfo:
        return self.mesh.self_info


class LocalView:
    """`api.Mesh` as one instance of a `LocalMesh` sees it."""

    def __init__(self, shared: _Shared, info: InstanceInfo, carrier: LocalCarrier, watch: PeerWatch, direct: LocalCarrier, direct_watch: PeerWatch) -> None:
        self.name = "local"
        self.self_info = info
        self._shared = shared
        self._carrier = carrier
        self._watch = watch
        self._direct = direct
        self._direct_watch = direct_watch
        self._channels: dict[str, CarrierChannel] = {}
        self._load: dict[str, float] = {}

    def channel(self, role: str, instance: str | None = None) -> grpc.aio.Channel:
        subject = subjects.rpc_any(self.name, role) if instance is None else subjects.rpc_instance(self.name, role, instance)
        return self._cached(subject, self._carrier, self._watch, role if instance is None else f"{role} {instance}")

    def direct_channel(self, info: InstanceInfo) -> grpc.aio.Channel:
        return self._cached(f"direct.{info.grpc_address}", self._direct, self._direct_watch, info.instance_id)

    def _cached(self, subject: str, carrier: LocalCarrier, watch: PeerWatch, target: str) -> grpc.aio.Channel:
        if subject not in self._channels:
            self._channels[subject] = CarrierChannel(carrier, watch, subject, target=target, caller=lambda: f"{self.self_info.instance_id}/{self.self_info.incarnation}")
        return self._channels[subject]

    def instances(self, role: str, *, include_suspect: bool = False) -> list[InstanceInfo]:
        return self._shared.table.live(role, include_suspect=include_suspect)

    def watch(self, callback: Callable[[str, InstanceInfo], None]) -> Callable[[], None]:
        return self._shared.table.watch(callback)

    def set_load(self, **load: float) -> None:
        self._load.update({k: float(v) for k, v in load.items()})
        self.self_info = dataclasses.replace(self.self_info, load=dict(self._load))
        self._shared.renew(self.self_info)

    async def flush_load(self) -> None:
        self._shared.renew(self.self_info)

    async def publish(self, topic: str, data: bytes) -> None:
        self._need_connection()
        if len(data) > MAX_MESSAGE_BYTES:
            raise PayloadTooLarge(f"event of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes")
        for listener in list(self._shared.listeners.get(topic, ())):
            listener.offer(Event(topic, data))

    def subscribe(self, topic: str, callback: Callable[[Event], Awaitable[None]], *, max_pending: int = 1024) -> Callable[[], None]:
        listener = Listener(topic, callback, max_pending)
        listeners = self._shared.listeners.setdefault(topic, [])
        listeners.append(listener)

        def unsubscribe() -> None:
            listener.stop()
            if listener in listeners:
                listeners.remove(listener)

        return unsubscribe

    def queue(self, name: str) -> LocalWorkQueue:
        if name not in subjects.QUEUES:
            raise NotFound(f"no work queue {name!r}; known: {', '.join(sorted(subjects.QUEUES))}")
        return self._shared.queues.setdefault(name, LocalWorkQueue(subjects.QUEUES[name], self._shared))

    @property
    def connected(self) -> bool:
        return self._shared.connected

    def _need_connection(self) -> None:
        if not self._shared.connected:
            raise Unavailable("the broker is away", retry_after_s=1.0)


@dataclass(slots=True)
class _Shared:
    """What the views of one LocalMesh have in common."""

    hub: LocalHub
    table: InstanceTable
    listeners: dict[str, list[Listener]] = field(default_factory=dict)
    queues: dict[str, LocalWorkQueue] = field(default_factory=dict)
    connected: bool = True
    announced: set[str] = field(default_factory=set)

    def renew(self, info: InstanceInfo) -> None:
        if info.instance_id in self.announced and self.connected:
            self.table.put(info, "", time.monotonic())


class LocalMesh(LocalView):
    """Hosts services and is the test's own view of them. Use it as an async context manager."""

    def __init__(self, config: MeshConfig | None = None) -> None:
        hub = LocalHub()
        shared = _Shared(hub, InstanceTable(ttl_s=3600.0))
        carrier, direct = hub.carrier("test"), hub.carrier("test-direct", max_message_bytes=None)
        info = _info("test", "test-0", "")
        super().__init__(shared, info, carrier, PeerWatch(carrier, PATIENCE), direct, PeerWatch(direct, PATIENCE))
        self.hub = hub
        self.config = config or MeshConfig()
        self.hosted: dict[str, LocalInstance] = {}
        self._numbers = itertools.count()

    async def __aenter__(self) -> LocalMesh:
        self._watch.start()
        self._direct_watch.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for instance_id in reversed(list(self.hosted)):
            await self.remove(instance_id)
        for channel in self._channels.values():
            await channel.close()
        await self._watch.stop()
        await self._direct_watch.stop()
        for listeners in self._shared.listeners.values():
            for listener in listeners:
                listener.stop()

    async def host(
        self, role: str, create: Callable[[ServiceContext], Service], *, settings: Any = None, config: MeshConfig | None = None,
        plugins: PluginHost | None = None, instance_id: str = "",
    ) -> LocalInstance:
        """Creates, starts, serves and announces a service, as `plugmesh.mesh.runtime` does. Raises what the service raises."""
        config = config or self.config
        instance_id = instance_id or f"{role}-{next(self._numbers)}"
        hub = self._shared.hub
        carrier, direct = hub.carrier(instance_id), hub.carrier(f"{instance_id}-direct", max_message_bytes=None)
        watch, direct_watch = PeerWatch(carrier, PATIENCE), PeerWatch(direct, PATIENCE)
        address = f"local:{instance_id}:{next(self._numbers)}"
        view = LocalView(self._shared, _info(role, instance_id, address), carrier, watch, direct, direct_watch)
        registry = prometheus_client.CollectorRegistry()
        if plugins is None:
            plugins = PluginHost.load(cards.loaded_slugs(config, role), config, service=role)
        service = create(ServiceContext(role, view, config, settings if settings is not None else ServiceSettings(), plugins, registry))
        watch.start()
        direct_watch.start()
        try:
            await service.start()
        except BaseException:
            await watch.stop()
            await direct_watch.stop()
            await service.stop()
            raise
        server = RpcServer(carrier, watch, instance=instance_id, incarnation=view.self_info.incarnation, is_fenced=self._shared.table.is_fenced)
        bulk = RpcServer(direct, direct_watch, instance=instance_id, incarnation=view.self_info.incarnation)
        for binding in service.bindings():
            binding.add_to_server(binding.servicer, server)
            binding.add_to_server(binding.servicer, bulk)
            server.excluded |= {f"/{binding.full_name}/{m}" for m in binding.grpc_only}
        await server.listen(subjects.rpc_any(self.name, role), role)
        await server.listen(subjects.rpc_instance(self.name, role, instance_id))
        await bulk.listen(f"direct.{address}")
        facts = {k: v for k, v in service.describe().items() if k in ("model", "weight_version", "roles")}
        if "roles" in facts:
            facts["roles"] = tuple(facts["roles"])
        view.self_info = dataclasses.replace(view.self_info, plugins=dict(plugins.versions), load=dict(view._load), **facts)
        self._shared.announced.add(instance_id)
        self._shared.renew(view.self_info)
        instance = LocalInstance(service, view, server, bulk, (carrier, direct), (watch, direct_watch), registry)
        self.hosted[instance_id] = instance
        return instance

    async def drain(self, instance_id: str, deadline_s: float = 5.0) -> None:
        """The lease says draining, then the service drains; it stays hosted until `remove`."""
        instance = self.hosted[instance_id]
        instance.mesh.self_info = dataclasses.replace(instance.mesh.self_info, state="draining")
        self._shared.renew(instance.mesh.self_info)
        await instance.service.drain(deadline_s)

    async def remove(self, instance_id: str) -> None:
        """A clean end: lease back, calls ended, service stopped."""
        instance = self.hosted.pop(instance_id)
        self._shared.announced.discard(instance_id)
        self._shared.table.remove(instance.info.role, instance_id)
        await instance.server.stop()
        await instance.direct.stop()
        await instance.service.stop()
        await self._silence(instance)

    async def kill(self, instance_id: str) -> None:
        """As SIGKILL looks to the others: silence, then the lease is gone. The object is stopped afterwards, unheard."""
        instance = self.hosted.pop(instance_id)
        for carrier in instance.carriers:
            carrier.kill()
        self._shared.announced.discard(instance_id)
        for entry in list(self._shared.table.entries.values()):
            if entry.info.instance_id == instance_id:
                self._shared.table.suspect(entry)
                self._shared.table.declare_dead(entry)
        for view in [self, *(i.mesh for i in self.hosted.values())]:
            view._watch.incarnation_left(instance_id, instance.info.incarnation)
            view._direct_watch.incarnation_left(instance_id, instance.info.incarnation)
        await instance.server.stop()
        await instance.direct.stop()
        await instance.service.stop()
        await self._silence(instance)

    def set_connected(self, connected: bool) -> None:
        """Takes the broker away from everybody, or gives it back."""
        self._shared.connected = connected
        self._carrier.set_connected(connected)
        for instance in self.hosted.values():
            instance.carriers[0].set_connected(connected)

    async def _silence(self, instance: LocalInstance) -> None:
        for watch in instance.watches:
            await watch.stop()
        for carrier in instance.carriers:
            carrier.kill()


def _info(role: str, instance_id: str, address: str) -> InstanceInfo:
    return InstanceInfo(
        role=role, instance_id=instance_id, incarnation=new_incarnation(), grpc_address=address, host=host_id(), pid=os.getpid(),
        version=__version__, started_unix_s=time.time(),
    )


class LocalJob:
    """See `plugmesh.mesh.api.Job`."""

    def __init__(self, queue: LocalWorkQueue, item: _Item, slots: asyncio.Semaphore, ack_wait_s: float) -> None:
        self.data = item.data
        self.num_deliveries = item.num_deliveries
        self._queue = queue
        self._item = item
        self._slots = slots
        self._ack_wait_s = ack_wait_s
        self._ended = False
        self._timer = asyncio.get_running_loop().call_later(ack_wait_s, self._overdue)

    async def in_progress(self) -> None:
        if not self._ended:
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(self._ack_wait_s, self._overdue)

    async def done(self) -> None:
        self._end()

    async def drop(self) -> None:
        self._end()

    async def retry(self, delay_s: float = 0.0) -> None:
        if self._end():
            self._queue._num_open += 1
            self._queue._again(self._item, delay_s)

    def _overdue(self) -> None:
        if not self._ended:
            self._ended = True      # what this worker says of the job from now on is not heard
            self._slots.release()
            self._queue._again(self._item, 0.0)

    def _end(self) -> bool:
        if self._ended:
            return False
        self._ended = True
        self._timer.cancel()
        self._queue._num_open -= 1
        self._slots.release()
        return True


@dataclass(slots=True)
class _Item:
    data: bytes
    num_deliveries: int = 0


class LocalWorkQueue:
    """See `plugmesh.mesh.api.WorkQueue`; the same limits as the real one."""

    def __init__(self, spec: subjects.QueueSpec, shared: _Shared) -> None:
        self.spec = spec
        self._shared = shared
        self._waiting: deque[_Item] = deque()
        self._delayed: list[tuple[float, int, _Item]] = []
        self._num_open = 0          # waiting, delayed and taken
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._changed = asyncio.Condition()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    async def put(self, data: bytes, *, dedup_id: str = "") -> None:
        if not self._shared.connected:
            raise Unavailable("the broker is away", retry_after_s=1.0)
        if len(data) > MAX_MESSAGE_BYTES:
            raise PayloadTooLarge(f"job of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes")
        now = time.monotonic()
        while self._seen and now - next(iter(self._seen.values())) > self.spec.dedup_window_s:
            self._seen.popitem(last=False)
        if dedup_id and dedup_id in self._seen:
            return
        if self._num_open >= self.spec.max_jobs:
            raise Overloaded(f"the {self.spec.name} queue is full ({self.spec.max_jobs} jobs)", retry_after_s=1.0)
        if dedup_id:
            self._seen[dedup_id] = now
        self._num_open += 1
        self._waiting.append(_Item(data))
        self._notify()

    async def take(self, *, max_in_flight: int, ack_wait_s: float = 30.0) -> AsyncIterator[Job]:
        slots = asyncio.Semaphore(max_in_flight)
        while True:
            await slots.acquire()
            item = await self._next()
            item.num_deliveries += 1
            yield LocalJob(self, item, slots, ack_wait_s)

    async def depth(self) -> int:
        return self._num_open

    async def _next(self) -> _Item:
        async with self._changed:
            while True:
                now = time.monotonic()
                while self._delayed and self._delayed[0][0] <= now:
                    self._waiting.append(heapq.heappop(self._delayed)[2])
                if self._waiting and self._shared.connected:
                    return self._waiting.popleft()
                wait_s = min(0.5, self._delayed[0][0] - now) if self._delayed else 0.5
                try:
                    async with asyncio.timeout(max(0.001, wait_s)):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    def _again(self, item: _Item, delay_s: float) -> None:
        if item.num_deliveries >= self.spec.max_deliver:
            self._num_open -= 1
            return
        if delay_s > 0:
            heapq.heappush(self._delayed, (time.monotonic() + delay_s, next(self._numbers), item))
        else:
            self._waiting.append(item)
        self._notify()

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
