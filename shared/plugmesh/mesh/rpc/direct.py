"""A real gRPC channel whose calls carry the current trace context, as those of the other carriers do."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from plugmesh.mesh.rpc.client import call_metadata


class TracedChannel(grpc.aio.Channel):
    """Wraps a channel. Not a client interceptor: grpc.aio's intercepted calls lack `time_remaining` and more."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method, *args, **kwargs):  # type: ignore[no-untyped-def]
        return _Traced(self._channel.unary_unary(method, *args, **kwargs))

    def unary_stream(self, method, *args, **kwargs):  # type: ignore[no-untyped-def]
        return _Traced(self._channel.unary_stream(method, *args, **kwargs))

    def stream_unary(self, method, *args, **kwargs):  # type: ignore[no-untyped-def]
        return _Traced(self._channel.stream_unary(method, *args, **kwargs))

    def stream_stream(self, method, *args, **kwargs):  # type: ignore[no-untyped-def]
        return _Traced(self._channel.stream_stream(method, *args, **kwargs))

    async def __aenter__(self) -> TracedChannel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()


class _Traced:
    """A multicallable of any shape."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        return self._inner(*args, metadata=call_metadata(metadata), **kwargs)
