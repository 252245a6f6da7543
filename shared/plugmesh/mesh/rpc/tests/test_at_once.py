"""Messages written at once and handed over at once: in order, within credit, and with the call's end behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from plugmesh.errors import Unavailable
from plugmesh.mesh.rpc import CarrierChannel, LocalHub, PeerWatch, RpcServer
from plugmesh.mesh.rpc.flow import WINDOW_MESSAGES

NUM = 3 * WINDOW_MESSAGES


class Rig:
    """One method, `/t/Count`: sends NUM numbers, at once where that is possible, and then the end it is told."""

    def __init__(self) -> None:
        hub = LocalHub()
        self.carriers = [hub.carrier("server"), hub.carrier("client")]
        self.watches = [PeerWatch(c) for c in self.carriers]
        self.server = RpcServer(self.carriers[0], self.watches[0], instance="s", incarnation="1")
        self.server.add_registered_method_handlers("t", {"Count": grpc.unary_stream_rpc_method_handler(self.count)})
        self.call = CarrierChannel(self.carriers[1], self.watches[1], "t", target="t").unary_stream("/t/Count")
        self.num_at_once = 0
        self.num_refused = 0
        self.ended = asyncio.Event()

    async def count(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            for i in range(NUM):
                message = b"%d" % i
                if i % 3 and context.write_at_once(message):  # some go the long way, and wait for their flush when the next one comes
                    self.num_at_once += 1
                else:
                    self.num_refused += 1
                    yield message
            if request == b"fail":
                raise Unavailable("told to", retry_after_s=1)
        finally:
            self.ended.set()


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.server.listen("t", "q")
    for watch in rig.watches:
        watch.start()
    yield rig
    await rig.server.stop()
    for watch in rig.watches:
        await watch.stop()


async def test_every_message_is_handed_over_in_order_and_then_the_end(rig: Rig) -> None:
    got: list[int] = []
    await asyncio.wait_for(rig.call(b"").hand_over_to(lambda m: got.append(int(m))), 10)

    assert list(range(NUM)) == got
    assert rig.num_at_once > 0


async def test_the_servers_error_comes_after_its_messages(rig: Rig) -> None:
    got: list[int] = []
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await asyncio.wait_for(rig.call(b"fail").hand_over_to(lambda m: got.append(int(m))), 10)

    assert list(range(NUM)) == got
    assert e.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_reader_that_does_not_read_is_sent_no_more_than_its_window_at_once(rig: Rig) -> None:
    call = rig.call(b"")
    await asyncio.sleep(0.2)

    assert rig.num_at_once + rig.num_refused <= WINDOW_MESSAGES + 1
    assert not rig.ended.is_set()
    assert list(range(NUM)) == [int(m) async for m in call]


async def test_what_came_before_the_handing_over_is_handed_over_too(rig: Rig) -> None:
    call = rig.call(b"")
    first = [int(await call.read()), int(await call.read())]
    await asyncio.sleep(0.05)
    rest: list[int] = []
    await asyncio.wait_for(call.hand_over_to(lambda m: rest.append(int(m))), 10)

    assert list(range(NUM)) == first + rest


async def test_a_receiver_that_raises_ends_the_call_at_both_ends(rig: Rig) -> None:
    def broken(message: bytes) -> None:
        raise RuntimeError

    with pytest.raises(grpc.aio.AioRpcError) as e:
        await asyncio.wait_for(rig.call(b"").hand_over_to(broken), 10)
    await asyncio.wait_for(rig.ended.wait(), 5)

    assert e.value.code() is grpc.StatusCode.INTERNAL


async def test_being_cancelled_while_messages_come_cancels_the_call(rig: Rig) -> None:
    got: list[int] = []

    def take(message: bytes) -> None:
        got.append(int(message))
        if len(got) == 5:
            task.cancel()

    task = asyncio.create_task(rig.call(b"").hand_over_to(take))
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    await asyncio.wait_for(rig.ended.wait(), 5)

    assert got == list(range(len(got)))
