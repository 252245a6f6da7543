"""A mesh of kvstores in this process: real services, real gRPC on loopback, an in-memory bus that can lose messages."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from types import SimpleNamespace

import grpc
import prometheus_client
import pytest

from plugmesh import wire
from plugmesh.errors import PlugmeshError, Unavailable
from plugmesh.kv import KvClient
from plugmesh.mesh.api import Event, ServiceContext
from plugmesh.mesh.hostid import host_id
from plugmesh.types import BLOCK_TOKENS, InstanceInfo, KvLayout, block_chain
from plugmesh_kvstore.config import Settings
from plugmesh_kvstore.service import create


class TypedErrors(grpc.aio.ServerInterceptor):
    """What the carriers do: a PlugmeshError becomes a status."""

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)

        def wrap(inner, streams):
            if streams:
                async def stream(request, context):
                    try:
                        async for reply in inner(request, context):
                            yield reply
                    except PlugmeshError as e:
                        await wire.abort(context, e)
                return stream

            async def unary(request, context):
                try:
                    return await inner(request, context)
                except PlugmeshError as e:
                    await wire.abort(context, e)
            return unary

        kinds = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
            (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        }
        name, make = kinds[handler.request_streaming, handler.response_streaming]
        return make(
            wrap(getattr(handler, name), handler.response_streaming),
            request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer,
        )


class FakeMesh:
    """`plugmesh.mesh.api.Mesh` as far as the kvstore uses it, all instances sharing one `Bus`."""

    def __init__(self, bus, role="decode", instance_id="decode-1", host=""):
        self.name = "test"
        self.bus = bus
        self.self_info = InstanceInfo(role, instance_id, secrets.token_hex(8), "", host or host_id(), 1)
        self.connected = True
        self._channels = {}

    def channel(self, role, instance=None):
        return self.direct_channel(self.bus.seen[instance])

    def direct_channel(self, info):
        if info.grpc_address not in self._channels:
            self._channels[info.grpc_address] = grpc.aio.insecure_channel(info.grpc_address)
        return self._channels[info.grpc_address]

    def instances(self, role, *, include_suspect=False):
        return [i for i in self.bus.table.values() if i.role == role]

    def watch(self, callback):
        self.bus.watchers.append(callback)
        return lambda: self.bus.watchers.remove(callback)

    def set_load(self, **load):
        if self.self_info.instance_id in self.bus.table:
            self.self_info = dataclasses.replace(self.self_info, load=load)
            self.bus.table[self.self_info.instance_id] = self.self_info

    async def publish(self, topic, data):
        if self.bus.away:
            raise Unavailable("the broker is away")
        self.bus.published.append(data)
        if self.bus.lose > 0:
            self.bus.lose -= 1
            return
        for callback in list(self.bus.subscribers):
            await callback(Event(topic, data))

    def subscribe(self, topic, callback, *, max_pending=1024):
        self.bus.subscribers.append(callback)
        return lambda: self.bus.subscribers.remove(callback)

    async def close(self):
        for channel in self._channels.values():
            await channel.close()


class Bus:
    """The state all fake meshes share. `lose` drops that many publications, `away` refuses them."""

    def __init__(self):
        self.table, self.seen, self.watchers, self.subscribers, self.published = {}, {}, [], [], []
        self.lose, self.away = 0, False

    def tell(self, kind, info):
        for callback in list(self.watchers):
            callback(kind, info)


class Kit:
    """Starts stores and clients; the fixture closes them."""

    def __init__(self, tmp_path):
        self.tmp_path, self.bus = tmp_path, Bus()
        self._stack = contextlib.AsyncExitStack()

    async def store(self, name="kv-1", host="", plugins=None, **settings):
        """A running store: .service, .address, .info; `await .stop()` is SIGTERM, `await .crash()` drops it hard."""
        defaults = {
            "arena_dir": self.tmp_path / "arena", "disk_dir": self.tmp_path / f"disk-{name}", "arena_bytes": 1 << 20,
            "disk_bytes": 4 << 20, "segment_bytes": 1 << 18, "sweep_s": 0.05, "lease_ttl_s": 1.0, "flush_on_stop_s": 2.0,
        }
        mesh = FakeMesh(self.bus, "kvstore", name, host)
        config = SimpleNamespace(mesh=SimpleNamespace(runtime_dir=self.tmp_path, data_dir=self.tmp_path))
        context = ServiceContext("kvstore", mesh, config, Settings(**defaults | settings), plugins, prometheus_client.CollectorRegistry())
        service = create(context)
        await service.start()
        server = grpc.aio.server(interceptors=[TypedErrors()])
        for binding in service.bindings():
            binding.add_to_server(binding.servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        mesh.self_info = dataclasses.replace(mesh.self_info, grpc_address=f"127.0.0.1:{port}")
        self.bus.table[name] = self.bus.seen[name] = mesh.self_info
        self.bus.tell("joined", mesh.self_info)

        stopped = False

        async def stop():
            nonlocal stopped
            if not stopped:
                stopped = True
                self.bus.table.pop(name, None)
                self.bus.tell("left", mesh.self_info)
                await server.stop(0.2)
                await service.stop()
                await mesh.close()

        self._stack.push_async_callback(stop)
        return SimpleNamespace(service=service, mesh=mesh, server=server, stop=stop, registry=context.metrics, core=service.store)

    def client(self, layout, holder="decode-1", incarnation="a", **kwargs):
        mesh = FakeMesh(self.bus, instance_id="test")
        client = KvClient(mesh, layout, holder=holder, incarnation=incarnation, **{"strict": True} | kwargs)
        self._stack.push_async_callback(mesh.close)
        self._stack.push_async_callback(client.close)
        return client

    async def close(self):
        await self._stack.aclose()


@pytest.fixture
async def kit(tmp_path):
    kit = Kit(tmp_path)
    yield kit
    await kit.close()


def layout_of(block_bytes=8192, model="m"):
    """block_bytes = 2 * layers(1) * heads(1) * head_dim * 16 tokens * 4 bytes."""
    return KvLayout(model, "raw", "float32", 1, 1, block_bytes // 128, BLOCK_TOKENS, block_bytes)


@pytest.fixture
def layout():
    return layout_of()


@pytest.fixture
def make_layout():
    return layout_of


@pytest.fixture
def make_blocks():
    """`num` blocks of a chain with random bytes, as `KvClient.put` takes them; and their ids."""

    def make(layout, num, seed=0):
        ids = block_chain(layout.key(), [seed * 1_000_003 + t for t in range(num * BLOCK_TOKENS)])
        parents = [b"", *ids]
        return [(i, p, BLOCK_TOKENS, secrets.token_bytes(layout.block_bytes)) for i, p in zip(ids, parents, strict=False)]

    return make


@pytest.fixture
def eventually():
    async def wait(condition, timeout_s=5.0):
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)

    return wait
