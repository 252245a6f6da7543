"""`grpc.aio.Channel` over a carrier: what generated stubs are given instead of a real channel."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from plugmesh.mesh.rpc import client
from plugmesh.mesh.rpc.carrier import Carrier
from plugmesh.mesh.rpc.peers import PeerWatch

_tokens = itertools.count()


class CarrierChannel(grpc.aio.Channel):
    """Calls to one subject: any instance of a role, or one of them. Cheap; holds no connection of its own.

    Args:
        target: For error messages: the role or instance meant.
        caller: "<instance id>/<incarnation>" of this process, or a function that returns it; servers fence by it.
    """

    def __init__(self, carrier: Carrier, watch: PeerWatch, subject: str, *, target: str, caller: str | Callable[[], str] = "") -> None:
        self._carrier = carrier
        self._watch = watch
        self._subject = subject
        self._target = target
        self._caller = caller
        self._pipes: set[client.ClientPipe] = set()
        self._closed = False

    def _pipe(self) -> client.ClientPipe:
        if self._closed:
            raise grpc.aio.UsageError("Channel is closed.")
        loop = asyncio.get_running_loop()
        pipe = client.ClientPipe(self._carrier, self._watch, f"c{next(_tokens)}", loop, self._subject, self._target)
        self._pipes.add(pipe)
        pipe.done_callbacks.append(lambda: self._pipes.discard(pipe))
        return pipe

    def _open(self, pipe: client.ClientPipe, method: str, metadata: Any, timeout: float | None, request: bytes | None) -> None:
        caller = self._caller if isinstance(self._caller, str) else self._caller()
        pipe.open(method, caller, client.call_metadata(metadata), timeout, request)

    def unary_unary(self, method, request_serializer=None, response_deserializer=None, _registered_method=None):  # type: ignore[no-untyped-def]
        return _UnaryUnary(self, method, request_serializer, response_deserializer)

    def unary_stream(self, method, request_serializer=None, response_deserializer=None, _registered_method=None):  # type: ignore[no-untyped-def]
        return _UnaryStream(self, method, request_serializer, response_deserializer)

    def stream_unary(self, method, request_serializer=None, response_deserializer=None, _registered_method=None):  # type: ignore[no-untyped-def]
        return _StreamUnary(self, method, request_serializer, response_deserializer)

    def stream_stream(self, method, request_serializer=None, response_deserializer=None, _registered_method=None):  # type: ignore[no-untyped-def]
        return _StreamStream(self, method, request_serializer, response_deserializer)

    @property
    def num_running(self) -> int:
        return len(self._pipes)

    def retire(self) -> None:
        """Refuses new calls from now on: what it reached is gone for good."""
        self._closed = True

    async def __aenter__(self) -> CarrierChannel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Refuses new calls, waits up to `grace` seconds for running ones, cancels the rest. The carrier stays."""
        self._closed = True
        running = list(self._pipes)
        if running and grace:
            await asyncio.wait([asyncio.ensure_future(p.wait_done()) for p in running], timeout=grace)
        for pipe in running:
            pipe.cancel("the channel was closed")

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        if self._closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return grpc.ChannelConnectivity.READY if self._carrier.connected else grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        changed = asyncio.Event()
        undo = self._carrier.on_state(lambda _: changed.set())
        try:
            while self.get_state() is last_observed_state:
                changed.clear()
                await changed.wait()
        finally:
            undo()

    async def channel_ready(self) -> None:
        """Returns when the carrier is connected; says nothing of whether somebody serves."""
        while (state := self.get_state()) is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.SHUTDOWN:
                raise grpc.aio.UsageError("Channel is closed.")
            await self.wait_for_state_change(state)


def _same(value: Any) -> Any:
    return value


class _MultiCallable:
    def __init__(self, channel: CarrierChannel, method: str | bytes, serialize: Callable[[Any], bytes] | None, deserialize: Callable[[bytes], Any] | None) -> None:
        self._channel = channel
        self._method = method.decode() if isinstance(method, bytes) else method
        self._serialize = serialize or _same
        self._deserialize = deserialize or _same

    def _unary_request(self, kind: Any, request: Any, timeout: float | None, metadata: Any) -> Any:
        raw = self._serialize(request)
        pipe = self._channel._pipe()
        self._channel._open(pipe, self._method, metadata, timeout, raw)
        return kind(pipe, self._serialize, self._deserialize)

    def _stream_request(self, kind: Any, requests: Any, timeout: float | None, metadata: Any) -> Any:
        pipe = self._channel._pipe()
        self._channel._open(pipe, self._method, metadata, timeout, None)
        call = kind(pipe, self._serialize, self._deserialize)
        call._start_sender(requests)
        return call


class _UnaryUnary(_MultiCallable, grpc.aio.UnaryUnaryMultiCallable):
    def __call__(self, request, *, timeout=None, metadata=None, credentials=None, wait_for_ready=None, compression=None):  # type: ignore[no-untyped-def]
        return self._unary_request(client.UnaryUnaryCall, request, timeout, metadata)


class _UnaryStream(_MultiCallable, grpc.aio.UnaryStreamMultiCallable):
    def __call__(self, request, *, timeout=None, metadata=None, credentials=None, wait_for_ready=None, compression=None):  # type: ignore[no-untyped-def]
        return self._unary_request(client.UnaryStreamCall, request, timeout, metadata)


class _StreamUnary(_MultiCallable, grpc.aio.StreamUnaryMultiCallable):
    def __call__(self, request_iterator=None, timeout=None, metadata=None, credentials=None, wait_for_ready=None, compression=None):  # type: ignore[no-untyped-def]
        return self._stream_request(client.StreamUnaryCall, request_iterator, timeout, metadata)


class _StreamStream(_MultiCallable, grpc.aio.StreamStreamMultiCallable):
    def __call__(self, request_iterator=None, timeout=None, metadata=None, credentials=None, wait_for_ready=None, compression=None):  # type: ignore[no-untyped-def]
        return self._stream_request(client.StreamStreamCall, request_iterator, timeout, metadata)
