"""The reader against nats-py's own parser, over every way to cut the bytes, and the client against a real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.protocol.parser import Parser

from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier
from plugmesh.mesh.rpc.nats_wire import Reader, WireTransport

DIRECT = 7

words = st.text("abcXYZ019._*$", min_size=1, max_size=12).map(str.encode)
payloads = st.binary(max_size=40) | st.sampled_from([b"\r\n", b"PING\r\n", b"MSG a 1 3\r\nabc\r\n", b"", bytes(3000)])
headers = st.sampled_from([b"NATS/1.0 503\r\n\r\n", b"NATS/1.0\r\nA: b\r\n\r\n"])


@st.composite
def operations(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["msg", "hmsg", "ping", "pong", "ok", "info", "err"]))
    if kind in ("msg", "hmsg"):
        data = draw(payloads)
        head = draw(headers) if kind == "hmsg" else b""
        parts = [draw(words), str(draw(st.sampled_from([DIRECT, 1, 42]))).encode(), *([draw(words)] if draw(st.booleans()) else [])]
        sizes = ([str(len(head)).encode()] if head else []) + [str(len(head) + len(data)).encode()]
        return kind.upper().encode() + b" " + b" ".join(parts + sizes) + b"\r\n" + head + data + b"\r\n"
    return {"ping": b"PING\r\n", "pong": b"PONG\r\n", "ok": b"+OK\r\n", "info": b'INFO {"server_id":"x"}\r\n', "err": b"-ERR 'Some Violation'\r\n"}[kind]


class Recorder:
    """What a parser found; stands for the client in nats-py's parser, and for `Handler` in ours."""

    def __init__(self, wait: Callable[[], Awaitable[None]] | None = None) -> None:
        self.found: list[Any] = []
        self._wait = wait

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.found.append(("msg", sid, bytes(subject), bytes(reply), data, bytes(headers or b"")))

    async def _process_ping(self) -> None:
        self.found.append("ping")

    async def _process_pong(self) -> None:
        self.found.append("pong")

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.found.append(("info", info))

    async def _process_err(self, text: str) -> None:
        self.found.append(("err", text))

    # As `Handler`; each may really wait.
    async def message(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        await self._pause()
        await self._process_msg(sid, subject, reply, data, headers)

    async def headers(self, raw: bytes) -> dict[str, str]:
        await self._pause()
        return {"raw": raw.decode()}

    async def ping(self) -> None:
        await self._pause()
        await self._process_ping()

    async def pong(self) -> None:
        await self._process_pong()

    async def info(self, raw: bytes) -> None:
        await self._process_info(json.loads(raw))

    async def error(self, text: str) -> None:
        await self._pause()
        await self._process_err(text)

    async def _pause(self) -> None:
        if self._wait is not None:
            await self._wait()

    def direct(self, message: Any) -> None:
        raw = (message.headers or {}).get("raw", "").encode()
        self.found.append(("msg", DIRECT, message.subject.encode(), message.reply.encode(), message.data, raw))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({c % (len(data) + 1) for c in cuts})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@given(st.lists(operations(), max_size=8), st.lists(st.integers(0, 10_000), max_size=12), st.booleans())
@settings(deadline=None, max_examples=150)
def test_the_reader_finds_what_the_parser_of_nats_py_finds_however_the_bytes_are_cut(ops: list[bytes], cuts: list[int], waits: bool) -> None:
    async def run() -> None:
        expected = Recorder()
        await Parser(expected).parse(b"".join(ops))
        actual = Recorder((lambda: asyncio.sleep(0)) if waits else None)
        failures: list[BaseException] = []
        stats = {"in_msgs": 0, "in_bytes": 0}
        reader = Reader(actual, {DIRECT: actual.direct}, failures.append, stats)  # type: ignore[arg-type]
        for piece in pieces(b"".join(ops), cuts):
            reader.feed(piece)
            if waits and len(piece) % 2:
                await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)

        assert failures == []
        assert expected.found == actual.found
        assert stats["in_msgs"] == sum(f[0] == "msg" and f[1] == DIRECT for f in actual.found)

    asyncio.run(run())


@given(st.binary(max_size=80), st.lists(st.integers(0, 80), max_size=4))
@settings(deadline=None, max_examples=200)
def test_garbage_ends_the_reading_with_one_error_or_none(data: bytes, cuts: list[int]) -> None:
    async def run() -> None:
        recorder, failures = Recorder(), []  # type: ignore[var-annotated]
        reader = Reader(recorder, {}, failures.append, {"in_msgs": 0, "in_bytes": 0})  # type: ignore[arg-type]
        for piece in pieces(data + b"\r\n", cuts):
            reader.feed(piece)

        assert len(failures) <= 1
        assert all(isinstance(e, nats.errors.Error | ValueError) for e in failures)

    asyncio.run(run())


@pytest.mark.parametrize("data", [
    b"MSG a 1 -5\r\n\r\n\r\n", b"MSG a 1 2\r\nabcd\r\n", b"MSG a 1\r\n", b"HMSG a 1 9 4\r\nabcd\r\n", b"MSG a x 1\r\na\r\n", b"NONSENSE\r\n",
    b"x" * ((1 << 20) + 1),
])
async def test_malformed_input_is_an_error_and_nothing_after_it_is_read(data: bytes) -> None:
    recorder, failures = Recorder(), []  # type: ignore[var-annotated]
    reader = Reader(recorder, {}, failures.append, {"in_msgs": 0, "in_bytes": 0})  # type: ignore[arg-type]
    reader.feed(data)
    reader.feed(b"PING\r\n")

    assert (len(failures), recorder.found) == (1, [])


async def test_a_callback_that_raises_does_not_end_the_reading() -> None:
    recorder, failures = Recorder(), []  # type: ignore[var-annotated]

    def broken(message: Any) -> None:
        recorder.found.append(message.data)
        raise RuntimeError

    reader = Reader(recorder, {DIRECT: broken}, failures.append, {"in_msgs": 0, "in_bytes": 0})  # type: ignore[arg-type]
    reader.feed(b"MSG a 7 1\r\nx\r\nMSG a 7 1\r\ny\r\n")

    assert ([b"x", b"y"], []) == (recorder.found, failures)


@pytest.mark.nats
async def test_messages_keep_their_order_at_once_or_queued_and_a_broken_connection_comes_back(tmp_path: Any) -> None:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        async def connect(role: str) -> NatsCarrier:
            address = broker.credential(role)
            return await NatsCarrier.connect(address.url, mesh=broker.mesh, role=role, user=address.user, password_file=address.password_file)

        sender, receiver = await connect("gateway"), await connect("decode")
        assert isinstance(sender.client._transport, WireTransport)
        got: list[bytes] = []
        receiver.routes["t"] = lambda m: got.append(m.data)
        subject = f"{receiver.inbox}.t"
        expected = []

        async def send(first: int) -> None:
            for i in range(first, first + 300):
                data = b"%d " % i + bytes(i % 7 * 20_000)  # more than the connection takes at once
                expected.append(data)
                assert sender.publish(subject, data)
                if i % 5 == 0:
                    await sender.client.publish(f"{receiver.inbox}.other", b"x")  # goes by nats-py's queue, which others then follow
            await sender.flush(10)
            until = asyncio.get_running_loop().time() + 10
            while len(got) < len(expected) and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(0.01)

        await send(0)
        assert expected == got

        back = asyncio.Event()
        for carrier in (sender, receiver):
            back.clear()
            carrier.on_state(lambda connected: back.set() if connected else None)
            carrier.client._transport.abort()  # type: ignore[attr-defined]
            await asyncio.wait_for(back.wait(), 10)
        await send(300)
        assert expected == got
        with pytest.raises(nats.errors.BadSubjectError):
            sender.publish("a\r\nPUB b", b"")
        await sender.close()
        await receiver.close()
