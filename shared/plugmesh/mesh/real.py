"""`plugmesh.mesh.api.Mesh` over NATS and gRPC: one per process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from plugmesh import __version__
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.mesh import subjects
from plugmesh.mesh.api import Binding, Event
from plugmesh.mesh.bus import NatsBus
from plugmesh.mesh.discovery import Discovery, new_incarnation
from plugmesh.mesh.hostid import host_id
from plugmesh.mesh.rpc.carrier import Undo
from plugmesh.mesh.rpc.channel import CarrierChannel
from plugmesh.mesh.rpc.direct import TracedChannel
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier
from plugmesh.mesh.rpc.peers import Patience, PeerWatch
from plugmesh.mesh.rpc.server import RpcServer
from plugmesh.mesh.workqueue import NatsWorkQueue
from plugmesh.types import InstanceInfo

log = structlog.get_logger()

# Pieces of weights and KV blocks are at most 1 MiB.
GRPC_OPTIONS = (("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20))


class RealMesh:
    """Implements `api.Mesh`. Make it with `connect`; an observer (a command line tool) needs nothing more, an instance
    goes on with `serve` and `announce`.
    """

    def __init__(self, carrier: NatsCarrier, config: MeshConfig, role: str, instance_id: str, patience: Patience | None = None) -> None:
        self.name = config.mesh.name
        self.config = config
        self.role = role
        self.carrier = carrier
        self.self_info = InstanceInfo(
            role=role, instance_id=instance_id, incarnation=new_incarnation(), grpc_address="", host=host_id(), pid=os.getpid(),
            version=__version__, started_unix_s=time.time(),
        )
        self.peers = PeerWatch(carrier, patience)
        self.discovery = Discovery(carrier, self.name, config.mesh.lease_ttl_s)
        self.bus = NatsBus(carrier, self.name)
        self.server = RpcServer(
            carrier, self.peers, instance=instance_id, incarnation=lambda: self.self_info.incarnation, is_fenced=self.discovery.table.is_fenced
        )
        self.on_new_incarnation: Callable[[str], None] | None = None
        self._channels: dict[tuple[str, str | None], CarrierChannel] = {}
        self._direct: dict[str, grpc.aio.Channel] = {}
        self._queues: dict[str, NatsWorkQueue] = {}
        self._load: dict[str, float] = {}
        self._undo: list[Undo] = []
        self._leave_queue_group: Undo | None = None
        self._closed = False
        self.discovery.on_new_incarnation = self._new_incarnation
        self.peers.on_lost = self.discovery.hint

    @classmethod
    async def connect(
        cls, config: MeshConfig, role: str = subjects.OPERATOR, *, instance_id: str = "", timeout_s: float = 10.0, patience: Patience | None = None
    ) -> RealMesh:
        """Connects to `config.mesh.nats` and reads the table of instances.

        Raises:
            ConfigError: No URL, or an unreadable password file.
            Unavailable: No broker there.
        """
        nats = config.mesh.nats
        if not nats.url:
            raise ConfigError("mesh.nats.url is not set: give the broker's URL, or let `plugmesh up` start one")
        instance_id = instance_id or f"{role}-{os.urandom(4).hex()}"
        carrier = await NatsCarrier.connect(
            nats.url, mesh=config.mesh.name, role=role, user=nats.user, password_file=_expand(nats.password_file),
            tls_ca_file=_expand(nats.tls_ca_file), name=instance_id, timeout_s=timeout_s,
        )
        self = cls(carrier, config, role, instance_id, patience)
        try:
            await self.discovery.start()
        except BaseException:
            await carrier.close()
            raise
        self.peers.start()
        self._undo.append(self.watch(self._on_instance))
        return self

    async def __aenter__(self) -> RealMesh:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # --- the life of an instance ----------------------------------------------------------------------------------

    def bind(self, binding: Binding) -> None:
        """Adds a servicer to what we serve over NATS, without its `grpc_only` methods."""
        binding.add_to_server(binding.servicer, self.server)
        self.server.excluded |= {f"/{binding.full_name}/{m}" for m in binding.grpc_only}

    async def serve(self) -> None:
        """Starts to take calls, those for any instance included."""
        self._undo.append(await self.server.listen(subjects.rpc_instance(self.name, self.role, self.self_info.instance_id)))
        self._leave_queue_group = await self.server.listen(subjects.rpc_any(self.name, self.role), self.role)
        await self._answer_srv()
        await self.carrier.flush()

    async def announce(self, **facts: Any) -> None:
        """Writes the lease: from now on others see and call this instance. `facts` are fields of InstanceInfo."""
        self.self_info = dataclasses.replace(self.self_info, **facts)
        await self.discovery.announce(self._current())

    async def set_draining(self) -> None:
        """The lease says "draining" at once, and calls for any instance go elsewhere; those for this one still come."""
        self.self_info = dataclasses.replace(self.self_info, state="draining")
        await self.discovery.update(self._current(), now=True)
        if self._leave_queue_group is not None:
            self._leave_queue_group()
            self._leave_queue_group = None

    async def close(self, grace_s: float = 0.0) -> None:
        """Takes the lease back, ends what still runs, closes the connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._leave_queue_group is not None:
            self._leave_queue_group()
        await self.server.stop(grace_s)
        await self.discovery.stop()
        self.bus.stop()
        for channel in self._channels.values():
            await channel.close()
        for direct in self._direct.values():
            await direct.close()
        for undo in self._undo:
            undo()
        await self.peers.stop()
        await self.carrier.close()

    # --- api.Mesh -------------------------------------------------------------------------------------------------

    def channel(self, role: str, instance: str | None = None) -> grpc.aio.Channel:
        key = (role, instance)
        channel = self._channels.get(key)
        if channel is None:
            subject = subjects.rpc_any(self.name, role) if instance is None else subjects.rpc_instance(self.name, role, instance)
            channel = self._channels[key] = CarrierChannel(
                self.carrier, self.peers, subject, target=role if instance is None else f"{role} {instance}", caller=self._caller
            )
        return channel

    def direct_channel(self, info: InstanceInfo) -> grpc.aio.Channel:
        channel = self._direct.get(info.grpc_address)
        if channel is None:
            channel = self._direct[info.grpc_address] = TracedChannel(
                grpc.aio.insecure_channel(info.grpc_address, options=GRPC_OPTIONS)
            )
        return channel

    def instances(self, role: str, *, include_suspect: bool = False) -> list[InstanceInfo]:
        return self.discovery.table.live(role, include_suspect=include_suspect)

    def watch(self, callback: Callable[[str, InstanceInfo], None]) -> Callable[[], None]:
        return self.discovery.table.watch(callback)

    def set_load(self, **load: float) -> None:
        self._load.update({k: float(v) for k, v in load.items()})
        self.discovery.info = self._current() if self.discovery.info is not None else None

    async def flush_load(self) -> None:
        await self.discovery.update(self._current(), now=True)

    async def publish(self, topic: str, data: bytes) -> None:
        await self.bus.publish(topic, data)

    def subscribe(self, topic: str, callback: Callable[[Event], Awaitable[None]], *, max_pending: int = 1024) -> Callable[[], None]:
        return self.bus.subscribe(topic, callback, max_pending)

    def queue(self, name: str) -> NatsWorkQueue:
        if name not in self._queues:
            self._queues[name] = NatsWorkQueue(self.carrier, self.name, name)
        return self._queues[name]

    @property
    def connected(self) -> bool:
        return self.carrier.connected

    # --- inner workings -------------------------------------------------------------------------------------------

    def _current(self) -> InstanceInfo:
        return dataclasses.replace(self.self_info, load=dict(self._load))

    def _caller(self) -> str:
        return f"{self.self_info.instance_id}/{self.self_info.incarnation}"

    def _new_incarnation(self, info: InstanceInfo) -> None:
        self.self_info = dataclasses.replace(self.self_info, incarnation=info.incarnation, started_unix_s=info.started_unix_s)
        if self.on_new_incarnation is not None:
            self.on_new_incarnation(info.incarnation)

    def _on_instance(self, event: str, info: InstanceInfo) -> None:
        if event == "left":
            self.peers.incarnation_left(info.instance_id, info.incarnation)
            channel = self._channels.pop((info.role, info.instance_id), None)
            if channel is not None and not channel.num_running:
                channel.retire()
            if not any(i.grpc_address == info.grpc_address for i in self.instances("", include_suspect=True)):
                direct = self._direct.pop(info.grpc_address, None)
                if direct is not None:
                    task = asyncio.get_running_loop().create_task(direct.close(grace=1.0))
                    _closing.add(task)
                    task.add_done_callback(_closing.discard)

    async def _answer_srv(self) -> None:
        """Answers `$SRV.PING`, `.INFO` and `.STATS` as the NATS tools expect (ADR-32 of NATS)."""
        name = subjects.srv_name(self.name, self.role)
        instance = self.self_info.instance_id

        def describe(verb: str) -> dict[str, Any]:
            base: dict[str, Any] = {
                "type": f"io.nats.micro.v1.{verb.lower()}_response", "name": name, "id": instance, "version": __version__,
                "metadata": {"incarnation": self.self_info.incarnation, "role": self.role, "state": self.self_info.state},
            }
            endpoint = {"name": "rpc", "subject": subjects.rpc_any(self.name, self.role), "queue_group": self.role}
            if verb == "INFO":
                base.update(description=f"plugmesh {self.role}", endpoints=[{**endpoint, "metadata": {}}])
            elif verb == "STATS":
                base["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.self_info.started_unix_s))
                base["endpoints"] = [{
                    **endpoint, "num_requests": self.server.num_calls, "num_errors": self.server.num_failed + self.server.num_refused,
                    "last_error": "", "processing_time": 0, "average_processing_time": 0,
                }]
            return base

        for verb in ("PING", "INFO", "STATS"):
            def answer(message: Any, verb: str = verb) -> None:
                if message.reply:
                    self.carrier.publish(message.reply, json.dumps(describe(verb)).encode())

            for tail in ("", f".{name}", f".{name}.{instance}"):
                self._undo.append(await self.carrier.subscribe(f"$SRV.{verb}{tail}", answer))


_closing: set[asyncio.Task[None]] = set()


def _expand(path: pathlib.Path | None) -> pathlib.Path | None:
    return path.expanduser() if path is not None else None
