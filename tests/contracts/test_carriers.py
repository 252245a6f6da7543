"""The carrier contract, bound to real gRPC, to NATS with a real broker, and to the in-process carrier."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from plugmesh.mesh import subjects
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.rpc import CarrierChannel, ErrorInterceptor, LocalHub, NatsCarrier, Patience, PeerWatch, RpcServer
from plugmesh.mesh.rpc.direct import TracedChannel
from plugmesh.mesh.rpc.flow import WINDOW_MESSAGES
from plugmesh.testing.carriers import CarrierContract, ProbeServicer, register

PATIENCE = Patience(ping_s=0.2, silence_s=3.0, grace_s=2.0)


class GrpcRig:
    max_message_bytes = None
    window_messages = None
    cancels_dropped_calls = False

    def __init__(self, probe: ProbeServicer, server: grpc.aio.Server, port: int) -> None:
        self.probe = probe
        self.server = server
        self.channels: list[grpc.aio.Channel] = [TracedChannel(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))]

    def channel(self) -> grpc.aio.Channel:
        return self.channels[0]

    def channel_to_nobody(self) -> grpc.aio.Channel:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        return self.channels[-1]

    async def kill_server(self) -> bool:
        return False  # it lives in this process; its death is gRPC's own business

    async def kill_client(self) -> bool:
        await self.channels[0].close()
        return True


class TestGrpcCarrier(CarrierContract):
    @pytest_asyncio.fixture
    async def rig(self) -> AsyncIterator[GrpcRig]:
        probe = ProbeServicer()
        server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
        register(server, probe)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        rig = GrpcRig(probe, server, port)
        yield rig
        for channel in rig.channels:
            await channel.close()
        await server.stop(None)


class PacketRig:
    """Both packet carriers: two connections, each with its own watch."""

    window_messages = WINDOW_MESSAGES
    cancels_dropped_calls = True

    def __init__(self, serving: Any, calling: Any, subject: str, nobody: str) -> None:
        self.probe = ProbeServicer()
        self.max_message_bytes = calling.max_message_bytes
        self.serving, self.calling = serving, calling
        self.watches = (PeerWatch(serving, PATIENCE), PeerWatch(calling, PATIENCE))
        self.server = RpcServer(serving, self.watches[0], instance="probe-1", incarnation="1")
        register(self.server, self.probe)
        self.subject, self.nobody = subject, nobody

    async def start(self) -> None:
        for watch in self.watches:
            watch.start()
        await self.server.listen(self.subject, "decode")

    def channel(self) -> grpc.aio.Channel:
        return CarrierChannel(self.calling, self.watches[1], self.subject, target="probe")

    def channel_to_nobody(self) -> grpc.aio.Channel:
        return CarrierChannel(self.calling, self.watches[1], self.nobody, target="nobody")

    async def stop(self) -> None:
        await self.server.stop()
        for watch in self.watches:
            await watch.stop()

    def check_nothing_left(self) -> None:
        """No call may leave a route or a watched pipe behind on the calling side."""
        left = [t for t in self.calling.routes if t.startswith("c")]
        assert self.watches[1].num_pipes == 0 and len(left) <= 40, left  # early cancels keep a tombstone for a while


class TestInProcessCarrier(CarrierContract):
    @pytest_asyncio.fixture
    async def rig(self) -> AsyncIterator[PacketRig]:
        hub = LocalHub()
        rig = _LocalRig(hub.carrier("server"), hub.carrier("client"), "probe", "nobody")
        await rig.start()
        yield rig
        await rig.stop()
        rig.check_nothing_left()


class _LocalRig(PacketRig):
    async def kill_server(self) -> bool:
        self.serving.kill()
        return True

    async def kill_client(self) -> bool:
        self.calling.kill()
        return True


@pytest.mark.nats
class TestNatsCarrier(CarrierContract):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def shared_broker(cls, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedBroker]:
        async with EmbeddedBroker(tmp_path_factory.mktemp("broker")) as broker:
            yield broker

    @pytest_asyncio.fixture
    async def rig(self, shared_broker: EmbeddedBroker) -> AsyncIterator[PacketRig]:
        serving = await connect(shared_broker, "decode")
        calling = await connect(shared_broker, "gateway")
        mesh = shared_broker.mesh
        rig = _NatsRig(serving, calling, subjects.rpc_any(mesh, "decode"), subjects.rpc_any(mesh, "kvstore"))
        await rig.start()
        await serving.flush()
        yield rig
        await rig.stop()
        await serving.close()
        await calling.close()
        rig.check_nothing_left()
        assert rig.killed or not [*serving.errors, *calling.errors], (serving.errors, calling.errors)


class _NatsRig(PacketRig):
    killed = False

    async def kill_server(self) -> bool:
        self.killed = True
        cut(self.serving)
        return True

    async def kill_client(self) -> bool:
        self.killed = True
        cut(self.calling)
        return True


async def connect(broker: EmbeddedBroker, role: str) -> NatsCarrier:
    address = broker.credential(role)
    return await NatsCarrier.connect(address.url, mesh=broker.mesh, role=role, user=address.user, password_file=address.password_file)


def cut(carrier: NatsCarrier) -> None:
    """The process at this end of the connection is gone, as far as the broker can tell."""
    carrier.client.options["allow_reconnect"] = False
    carrier._closed = True
    carrier.client._transport.abort()
