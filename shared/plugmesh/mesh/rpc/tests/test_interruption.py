"""Lost packets are errors while the connection stands; an interruption of the connection loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh import errors, wire
from plugmesh.mesh.rpc import CarrierChannel, LocalHub, Patience, PeerWatch, RpcServer, frames
from plugmesh.testing.carriers import ProbeServicer, ProbeStub, ask, failure, register, soon, until

PATIENCE = Patience(ping_s=0.05, silence_s=1.0, grace_s=1.0)


class Pair:
    """A client and a server on one hub, with the means to disturb them."""

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self.hub = LocalHub()
        self.serving, self.calling = self.hub.carrier("server"), self.hub.carrier("client")
        self.watches = [PeerWatch(self.serving, patience), PeerWatch(self.calling, patience)]
        self.server = RpcServer(self.serving, self.watches[0], instance="s1", incarnation="1")
        self.probe = ProbeServicer()
        register(self.server, self.probe)
        self.stub = ProbeStub(CarrierChannel(self.calling, self.watches[1], "probe", target="probe"))

    async def __aenter__(self) -> Pair:
        for watch in self.watches:
            watch.start()
        await self.server.listen("probe", "q")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.stop()
        for watch in self.watches:
            await watch.stop()

    def set_connected(self, connected: bool) -> None:
        self.serving.set_connected(connected)
        self.calling.set_connected(connected)

    def lose(self, wanted: int) -> None:
        """The nth data packet from server to client is lost."""
        seen = 0

        def drop(subject: str, data: bytes) -> bool:
            nonlocal seen
            if not subject.startswith(self.calling.inbox) or not data or not frames.decode(data).flags & frames.DATA:
                return False
            seen += 1
            return seen == wanted

        self.hub.drop = drop


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    async with Pair() as p:
        yield p


async def test_a_lost_packet_is_data_loss(pair: Pair) -> None:
    pair.lose(2)
    e = await failure(pair.stub.count(ask(n=5000, pad=100), timeout=5))

    assert e.code() is grpc.StatusCode.DATA_LOSS
    assert isinstance(wire.error_from_rpc(e), errors.DataLoss)
    await soon(pair.probe.finished)


async def test_a_repeated_packet_is_data_loss(pair: Pair) -> None:
    call = pair.stub.count(ask(n=3, hang_at=2), timeout=5)
    await call.read()
    replayed = frames.encode(frames.Packet(frames.DATA, sequence=0, messages=[b"0"]))
    pair.hub.publish(f"{pair.calling.inbox}.{call._pipe.token}", replayed, "")

    assert (await failure(call)).code() is grpc.StatusCode.DATA_LOSS
    await soon(pair.probe.finished)


async def test_a_malformed_packet_ends_the_call_with_data_loss(pair: Pair) -> None:
    call = pair.stub.count(ask(n=3, hang_at=2), timeout=5)
    await call.read()
    pair.hub.publish(f"{pair.calling.inbox}.{call._pipe.token}", b"\x01garbage", "")

    assert (await failure(call)).code() is grpc.StatusCode.DATA_LOSS


async def test_a_sender_that_ignores_credit_is_cut_off(pair: Pair) -> None:
    call = pair.stub.count(ask(n=3, hang_at=2), timeout=5)
    assert await call.read() == b"0"
    await until(lambda: call._pipe._expected == 2 or call._pipe.has_inbound())
    flood = frames.encode(frames.Packet(frames.DATA, sequence=call._pipe._expected, messages=[b"x"] * 1000))
    pair.hub.publish(f"{pair.calling.inbox}.{call._pipe.token}", flood, "")

    assert (await failure(call)).code() is grpc.StatusCode.DATA_LOSS


async def test_a_stream_goes_on_after_an_interruption(pair: Pair) -> None:
    call = pair.stub.count(ask(n=3000, pad=100), timeout=10)
    got = [await call.read() for _ in range(10)]
    pair.set_connected(False)
    await asyncio.sleep(0.05)
    pair.set_connected(True)
    got += [m async for m in call]

    assert [int(m.rstrip(b".")) for m in got] == list(range(3000))


async def test_an_interruption_that_hits_one_side_only_loses_nothing(pair: Pair) -> None:
    call = pair.stub.chat(timeout=10)
    for carrier in (pair.calling, pair.serving):
        await call.write(b"before")
        assert await call.read() == b"re:before"
        carrier.set_connected(False)
        await call.write(b"during")
        await asyncio.sleep(0.02)
        carrier.set_connected(True)
        assert await asyncio.wait_for(call.read(), 5) == b"re:during"
    await call.done_writing()

    assert await call.read() == b"end"


async def test_a_unary_answer_given_during_the_interruption_arrives(pair: Pair) -> None:
    call = pair.stub.unary(ask(wait=1, echo="late"), timeout=10)
    await soon(pair.probe.started)
    pair.set_connected(False)
    pair.probe.go.set()
    await soon(pair.probe.finished)
    pair.set_connected(True)

    assert await call == b"late"


async def test_an_interruption_beyond_the_deadline_ends_in_deadline_exceeded(pair: Pair) -> None:
    call = pair.stub.unary(ask(wait=1), timeout=0.3)
    await soon(pair.probe.started)
    pair.set_connected(False)

    assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await soon(pair.probe.cancelled)  # the server has the deadline, too


async def test_calls_made_while_the_broker_is_away_fail_at_once(pair: Pair) -> None:
    pair.set_connected(False)
    e = await failure(pair.stub.unary(ask(echo=""), timeout=5))

    assert e.code() is grpc.StatusCode.UNAVAILABLE
    assert wire.error_from_rpc(e).retry_after_s > 0


async def test_a_server_that_forgot_the_call_says_so(pair: Pair) -> None:
    call = pair.stub.count(ask(n=3, hang_at=1))
    await call.read()
    pair.set_connected(False)
    for token in [t for t in pair.serving.routes if t.startswith("s")]:
        del pair.serving.routes[token]
    pair.set_connected(True)

    assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stopped_server_is_noticed_by_its_silence(pair: Pair) -> None:
    call = pair.stub.count(ask(n=3, hang_at=1))
    await call.read()
    pair.hub.drop = lambda subject, data: subject.startswith(pair.serving.inbox)

    assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_that_nobody_takes_ends(pair: Pair) -> None:
    pair.hub.drop = lambda subject, data: subject.startswith(pair.calling.inbox)
    e = await failure(pair.stub.unary(ask(echo="x")))

    assert e.code() is grpc.StatusCode.UNAVAILABLE


async def test_too_many_calls_are_refused_with_retry(pair: Pair) -> None:
    pair.server.max_concurrent = 2
    held = [pair.stub.unary(ask(sleep=60)) for _ in range(2)]
    await until(lambda: pair.probe.num_running == 2)
    e = await failure(pair.stub.unary(ask(echo="x"), timeout=5))

    assert isinstance(wire.error_from_rpc(e), errors.Overloaded) and wire.error_from_rpc(e).retry_after_s > 0
    for call in held:
        call.cancel()
    await until(lambda: not pair.server.calls)
    assert await pair.stub.unary(ask(echo="x"), timeout=5) == b"x"


async def test_a_fenced_caller_is_refused(pair: Pair) -> None:
    pair.server.is_fenced = lambda caller: caller.endswith("/old")
    stub = ProbeStub(CarrierChannel(pair.calling, pair.watches[1], "probe", target="probe", caller="d1/old"))
    e = await failure(stub.unary(ask(echo="x"), timeout=5))

    assert isinstance(wire.error_from_rpc(e), errors.StaleIncarnation)
    assert not pair.probe.started.is_set()


async def test_nothing_is_kept_after_the_calls(pair: Pair) -> None:
    for _ in range(20):
        await pair.stub.unary(ask(echo="x"), timeout=5)
        [m async for m in pair.stub.count(ask(n=10), timeout=5)]

    assert not pair.server.calls and not pair.watches[0].num_pipes and not pair.watches[1].num_pipes
    assert not [t for t in pair.calling.routes if t.startswith("c")]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["both", "client", "server"]), st.integers(0, 60)), max_size=4),
    st.integers(1, 400), st.integers(0, 3000),
)
def test_whatever_the_interruptions_the_stream_is_complete(breaks: list[tuple[str, int]], n: int, pad: int) -> None:
    """P2 at the level of packets: none lost, none twice, none out of order."""

    async def run() -> list[int]:
        async with Pair() as pair:
            async def requests() -> AsyncIterator[bytes]:
                for i in range(n):
                    yield b"%d" % i + b"." * pad

            call = pair.stub.chat(requests(), timeout=20)
            got: list[bytes] = []
            reading = asyncio.ensure_future(_collect(call, got))
            await until(lambda: bool(call._pipe.peer))  # a call that nobody took yet is not kept
            for who, turns in breaks:
                for _ in range(turns):
                    await asyncio.sleep(0)
                for carrier in {"both": (pair.serving, pair.calling), "client": (pair.calling,), "server": (pair.serving,)}[who]:
                    carrier.set_connected(False)
                await asyncio.sleep(0)
                for carrier in (pair.serving, pair.calling):
                    carrier.set_connected(True)
            await asyncio.wait_for(reading, 20)
            return [int(m[3:].rstrip(b".")) for m in got[:-1]]

    assert asyncio.run(run()) == list(range(n))


async def _collect(call: grpc.aio.StreamStreamCall, got: list[bytes]) -> None:
    async for m in call:
        got.append(m)
