"""What every carrier of RPCs must do: one set of contract tests, bound to gRPC, NATS and the in-process carrier.

    class TestMyCarrier(CarrierContract):
        @pytest_asyncio.fixture
        async def rig(self):
            ...
            yield MyRig(...)

A rig serves the servicers of this file at one end and gives channels at the other. `ProbeServicer` is registered through
hand-written generic handlers on plain bytes, `DecodeProbe` through generated code.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
import grpc.aio
import pytest

from plugmesh import errors, wire
from plugmesh.mesh import trace
from plugmesh_proto.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2

SERVICE = "plugmesh.testing.Probe"
WAIT_S = 10.0     # for things that should happen soon


class Rig(Protocol):
    """One carrier set up for a test.

    `max_message_bytes` is the carrier's cap, None where it has none of ours. `window_messages` bounds how many small
    messages a sender may be ahead of its reader, None where the bound is in bytes only.
    """

    max_message_bytes: int | None
    window_messages: int | None
    cancels_dropped_calls: bool
    probe: ProbeServicer

    def channel(self) -> grpc.aio.Channel: ...

    def channel_to_nobody(self) -> grpc.aio.Channel:
        """A channel whose target does not exist."""

    async def kill_server(self) -> bool:
        """Ends the serving side without a goodbye. False where this rig cannot."""

    async def kill_client(self) -> bool:
        """Ends the calling side without a goodbye. False where this rig cannot."""


class ProbeServicer:
    """Does as it is told, and remembers what happened to it.

    Requests of the unary-request methods are JSON objects; streams carry plain bytes.
    """

    def __init__(self) -> None:
        self.num_produced = 0
        self.num_consumed = 0
        self.num_running = 0
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.finished = asyncio.Event()
        self.go = asyncio.Event()
        self.write_error: BaseException | None = None

    async def _watched(self, work: Any) -> Any:
        self.num_running += 1
        self.started.set()
        try:
            return await work
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1
            self.finished.set()

    async def unary(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return await self._watched(self._unary(json.loads(request), context))

    async def _unary(self, do: dict[str, Any], context: grpc.aio.ServicerContext) -> bytes:
        if "initial" in do:
            await context.send_initial_metadata(tuple((k, v) for k, v in do["initial"]))
        if "trailing" in do:
            context.set_trailing_metadata((*((k, v) for k, v in do["trailing"]), ("raw-bin", b"\x00\xff")))
        if "sleep" in do:
            await asyncio.sleep(do["sleep"])
        if "wait" in do:
            await self.go.wait()
        if "raise" in do:
            raise errors.from_info(do["raise"], do.get("message", "told to"), do.get("param", ""), do.get("retry_after_s", 0.0), do.get("fields"))
        if "boom" in do:
            raise ValueError(do["boom"])
        if "abort" in do:
            await context.abort(grpc.StatusCode[do["abort"]], do.get("message", ""), (("why", "told"),))
        if "set_code" in do:
            context.set_code(grpc.StatusCode[do["set_code"]])
            context.set_details(do.get("message", ""))
            return b""
        if "tell" in do:
            told: dict[str, Any] = {
                "metadata": [[k, v if isinstance(v, str) else v.hex()] for k, v in context.invocation_metadata() or ()],
                "time_remaining": context.time_remaining(),
                "traceparent": trace.traceparent.get(),
            }
            return json.dumps(told).encode()
        return b"x" * do["size"] if "size" in do else do.get("echo", "").encode()

    async def count(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        do = json.loads(request)
        pad = b"." * do.get("pad", 0)
        self.started.set()
        self.num_running += 1
        if "initial" in do:
            await context.send_initial_metadata(tuple((k, v) for k, v in do["initial"]))
        try:
            for i in range(do["n"]):
                if do.get("fail_at") == i:
                    raise errors.Unavailable("told to fail here", retry_after_s=2.5)
                if do.get("hang_at") == i:
                    await asyncio.sleep(3600)
                yield b"%d" % i + pad
                self.num_produced += 1
        except BaseException as e:
            self.cancelled.set() if isinstance(e, asyncio.CancelledError | GeneratorExit) else None
            raise
        finally:
            self.num_running -= 1
            self.finished.set()

    async def count_writing(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        do = json.loads(request)

        async def work() -> None:
            for i in range(do["n"]):
                try:
                    await context.write(b"x" * do["size"] if "size" in do else b"%d" % i)
                except errors.PayloadTooLarge as e:
                    self.write_error = e
                    raise
                self.num_produced += 1

        await self._watched(work())

    async def total(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        async def work() -> bytes:
            sum_ = 0
            async for r in requests:
                if r == b"wait":
                    await self.go.wait()
                elif r == b"stop":
                    return b"stopped"
                else:
                    sum_ += int(r.rstrip(b"."))
                self.num_consumed += 1
            return b"%d" % sum_

        return await self._watched(work())

    async def total_reading(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        async def work() -> bytes:
            sum_ = 0
            while (r := await context.read()) is not grpc.aio.EOF:
                sum_ += int(r)
            return b"%d" % sum_

        return await self._watched(work())

    async def chat(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        self.started.set()
        try:
            async for r in requests:
                if r == b"bye":
                    return
                yield b"re:" + r
            yield b"end"
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.finished.set()

    async def chat_reading(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        async def work() -> None:
            while (r := await context.read()) is not grpc.aio.EOF:
                await context.write(b"re:" + r)
            await context.write(b"end")

        await self._watched(work())


class DecodeProbe(decode_pb2_grpc.DecodeServicer):
    """A generated servicer; `Status` stays unimplemented."""

    async def Generate(self, request, context):  # type: ignore[no-untyped-def]
        for i, token in enumerate(request.token_ids):
            row = decode_pb2.TokenRow(request_id=request.request_id, index=i, tokens=[common_pb2.TokenInfo(token_id=token)])
            yield decode_pb2.TokenFrame(step=i, rows=[row])

    async def Session(self, request_iterator, context):  # type: ignore[no-untyped-def]
        async for command in request_iterator:
            yield decode_pb2.TokenFrame(step=len(command.submit.token_ids))

    async def ReportPrefill(self, request, context):  # type: ignore[no-untyped-def]
        if not request.job_id:
            raise errors.InvalidRequest("job_id is missing", param="job_id")
        return decode_pb2.ReportPrefillReply(still_wanted=request.done)


def add_probe(servicer: ProbeServicer, server: Any) -> None:
    """What generated code would do for `ProbeServicer`."""
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(servicer.unary),
        "Count": grpc.unary_stream_rpc_method_handler(servicer.count),
        "CountWriting": grpc.unary_stream_rpc_method_handler(servicer.count_writing),
        "Total": grpc.stream_unary_rpc_method_handler(servicer.total),
        "TotalReading": grpc.stream_unary_rpc_method_handler(servicer.total_reading),
        "Chat": grpc.stream_stream_rpc_method_handler(servicer.chat),
        "ChatReading": grpc.stream_stream_rpc_method_handler(servicer.chat_reading),
    }
    # Only the generic way here; `DecodeProbe` comes through both, as generated code does it.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def register(server: Any, probe: ProbeServicer) -> None:
    """Puts both servicers on a server."""
    add_probe(probe, server)
    decode_pb2_grpc.add_DecodeServicer_to_server(DecodeProbe(), server)


class ProbeStub:
    """What generated code would make for `ProbeServicer`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.unary = channel.unary_unary(f"/{SERVICE}/Unary")
        self.count = channel.unary_stream(f"/{SERVICE}/Count")
        self.count_writing = channel.unary_stream(f"/{SERVICE}/CountWriting")
        self.total = channel.stream_unary(f"/{SERVICE}/Total")
        self.total_reading = channel.stream_unary(f"/{SERVICE}/TotalReading")
        self.chat = channel.stream_stream(f"/{SERVICE}/Chat")
        self.chat_reading = channel.stream_stream(f"/{SERVICE}/ChatReading")
        self.missing = channel.unary_unary(f"/{SERVICE}/Missing")


def ask(**do: Any) -> bytes:
    return json.dumps(do).encode()


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(WAIT_S):
        await event.wait()


async def until(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Returns when the condition holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


async def settled(number: Callable[[], int], quiet_s: float = 0.3) -> int:
    """The number once it has not changed for a while."""
    last, since = number(), time.monotonic()
    while time.monotonic() - since < quiet_s:
        await asyncio.sleep(0.02)
        if number() != last:
            last, since = number(), time.monotonic()
    return last


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error a call ends with; fails the test when there is none."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value


class CarrierContract:
    """Bind it by a subclass with an async fixture `rig`."""

    # --- the four shapes ------------------------------------------------------------------------------------------

    async def test_unary_call_returns_the_response(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).unary(ask(echo="héllo"), timeout=WAIT_S)

        assert (await call).decode() == "héllo"
        assert await call.code() is grpc.StatusCode.OK
        assert await call.details() == ""
        assert call.done() and not call.cancelled() and call.cancel() is False
        assert isinstance(call, grpc.aio.UnaryUnaryCall)

    async def test_response_can_be_awaited_twice(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).unary(ask(echo="a"), timeout=WAIT_S)

        assert (await call, await call) == (b"a", b"a")

    async def test_server_stream_arrives_complete_and_in_order(self, rig: Rig) -> None:
        got = [m async for m in ProbeStub(rig.channel()).count(ask(n=3000), timeout=WAIT_S)]

        assert got == [b"%d" % i for i in range(3000)]

    async def test_server_stream_can_be_read_message_by_message(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).count_writing(ask(n=3), timeout=WAIT_S)
        got = [await call.read() for _ in range(4)]

        assert got == [b"0", b"1", b"2", grpc.aio.EOF]
        assert await call.code() is grpc.StatusCode.OK

    async def test_empty_stream_ends_with_ok(self, rig: Rig) -> None:
        assert [m async for m in ProbeStub(rig.channel()).count(ask(n=0), timeout=WAIT_S)] == []

    async def test_client_stream_from_an_async_iterator(self, rig: Rig) -> None:
        async def requests() -> AsyncIterator[bytes]:
            for i in range(2000):
                yield b"%d" % i

        assert await ProbeStub(rig.channel()).total(requests(), timeout=WAIT_S) == b"1999000"

    async def test_client_stream_from_a_list(self, rig: Rig) -> None:
        assert await ProbeStub(rig.channel()).total_reading([b"1", b"2", b"3"], timeout=WAIT_S) == b"6"

    async def test_client_stream_by_write(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).total_reading(timeout=WAIT_S)
        for i in range(10):
            await call.write(b"%d" % i)
        await call.done_writing()

        assert await call == b"45"

    async def test_server_may_answer_before_the_client_is_done(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).total(timeout=WAIT_S)
        await call.write(b"stop")

        assert await call == b"stopped"
        with pytest.raises((asyncio.InvalidStateError, grpc.aio.AioRpcError)):
            await call.write(b"1")

    @pytest.mark.parametrize("method", ["chat", "chat_reading"])
    async def test_bidirectional_ping_pong(self, rig: Rig, method: str) -> None:
        call = getattr(ProbeStub(rig.channel()), method)(timeout=WAIT_S)
        got = []
        for i in range(20):
            await call.write(b"%d" % i)
            got.append(await call.read())
        await call.done_writing()
        got += [await call.read(), await call.read()]

        assert got == [b"re:%d" % i for i in range(20)] + [b"end", grpc.aio.EOF]

    async def test_bidirectional_from_iterator_to_iterator(self, rig: Rig) -> None:
        async def requests() -> AsyncIterator[bytes]:
            for i in range(1000):
                yield b"%d" % i

        got = [m async for m in ProbeStub(rig.channel()).chat(requests(), timeout=WAIT_S)]

        assert got == [b"re:%d" % i for i in range(1000)] + [b"end"]

    async def test_server_may_end_a_bidirectional_call(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).chat(timeout=WAIT_S)
        await call.write(b"a")
        await call.write(b"bye")

        assert [m async for m in call] == [b"re:a"]
        assert await call.code() is grpc.StatusCode.OK

    async def test_generated_stubs_and_servicers_work_unchanged(self, rig: Rig) -> None:
        stub = decode_pb2_grpc.DecodeStub(rig.channel())

        async def commands() -> AsyncIterator[decode_pb2.DecodeCommand]:
            for n in range(3):
                yield decode_pb2.DecodeCommand(submit=decode_pb2.GenerateRequest(token_ids=range(n)))

        reply = await stub.ReportPrefill(prefill_pb2.PrefillEvent(job_id="j", done=True), timeout=WAIT_S)
        frames = [f async for f in stub.Generate(decode_pb2.GenerateRequest(request_id="r", token_ids=[7, 8, 9]), timeout=WAIT_S)]
        steps = [f.step async for f in stub.Session(commands(), timeout=WAIT_S)]

        assert reply.still_wanted is True
        assert [(f.step, f.rows[0].request_id, f.rows[0].tokens[0].token_id) for f in frames] == [(0, "r", 7), (1, "r", 8), (2, "r", 9)]
        assert steps == [0, 1, 2]

    async def test_many_calls_at_once_do_not_mix(self, rig: Rig) -> None:
        stub = ProbeStub(rig.channel())

        async def one(i: int) -> bool:
            if i % 3:
                return await stub.unary(ask(echo=str(i), sleep=0.001 * (i % 7)), timeout=WAIT_S) == str(i).encode()
            return [m async for m in stub.count(ask(n=i), timeout=WAIT_S)] == [b"%d" % k for k in range(i)]

        assert all(await asyncio.gather(*(one(i) for i in range(150))))
        await until(lambda: rig.probe.num_running == 0)

    # --- errors ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("code", sorted(errors.by_code()))
    async def test_every_typed_error_arrives_as_itself(self, rig: Rig, code: str) -> None:
        fields = {"file": "a.gguf", "field": "n_dims", "plugin": "sarathi"}
        sent = errors.from_info(code, "told to", "max_tokens", 1.5, dict(fields))
        e = await failure(ProbeStub(rig.channel()).unary(
            ask(**{"raise": code, "message": "told to", "param": "max_tokens", "retry_after_s": 1.5, "fields": fields}), timeout=WAIT_S
        ))
        got = wire.error_from_rpc(e)

        assert e.code() is grpc.StatusCode[sent.grpc_status]
        assert (type(got), got.message, got.param, got.retry_after_s, got.fields) == (type(sent), "told to", sent.param, sent.retry_after_s, sent.fields)

    async def test_typed_error_in_the_middle_of_a_stream_follows_what_was_sent(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).count(ask(n=10, fail_at=5), timeout=WAIT_S)
        got = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for m in call:
                got.append(m)

        assert got == [b"0", b"1", b"2", b"3", b"4"]
        assert isinstance(wire.error_from_rpc(caught.value), errors.Unavailable)
        assert wire.error_from_rpc(caught.value).retry_after_s == 2.5

    @pytest.mark.parametrize("code", ["invalid_request", "not_found"])
    async def test_generated_servicer_raises_typed_errors(self, rig: Rig, code: str) -> None:
        e = await failure(decode_pb2_grpc.DecodeStub(rig.channel()).ReportPrefill(prefill_pb2.PrefillEvent(), timeout=WAIT_S))

        assert wire.error_from_rpc(e).code == "invalid_request" and wire.error_from_rpc(e).param == "job_id"

    async def test_text_of_an_unexpected_exception_stays_in_the_server(self, rig: Rig) -> None:
        e = await failure(ProbeStub(rig.channel()).unary(ask(boom="the prompt was: secret"), timeout=WAIT_S))

        assert e.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(e) + repr(e.trailing_metadata())

    async def test_abort_carries_code_details_and_metadata(self, rig: Rig) -> None:
        e = await failure(ProbeStub(rig.channel()).unary(ask(abort="ABORTED", message="ünlucky"), timeout=WAIT_S))

        assert (e.code(), e.details()) == (grpc.StatusCode.ABORTED, "ünlucky")
        assert ("why", "told") in tuple(e.trailing_metadata())

    async def test_code_set_on_the_context_ends_the_call_with_it(self, rig: Rig) -> None:
        e = await failure(ProbeStub(rig.channel()).unary(ask(set_code="OUT_OF_RANGE", message="m"), timeout=WAIT_S))

        assert (e.code(), e.details()) == (grpc.StatusCode.OUT_OF_RANGE, "m")

    async def test_unknown_method_is_unimplemented(self, rig: Rig) -> None:
        assert (await failure(ProbeStub(rig.channel()).missing(b"", timeout=WAIT_S))).code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_generated_method_without_implementation_is_unimplemented(self, rig: Rig) -> None:
        e = await failure(decode_pb2_grpc.DecodeStub(rig.channel()).Status(decode_pb2.DecodeStatusRequest(), timeout=WAIT_S))

        assert e.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_nobody_there_is_unavailable_at_once(self, rig: Rig) -> None:
        began = time.monotonic()
        e = await failure(ProbeStub(rig.channel_to_nobody()).unary(ask(echo=""), timeout=WAIT_S))

        assert e.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 2.0

    # --- metadata and trace ---------------------------------------------------------------------------------------

    async def test_metadata_travels_both_ways(self, rig: Rig) -> None:
        stub = ProbeStub(rig.channel())
        call = stub.unary(ask(tell=1, initial=[["first", "1"]], trailing=[["last", "2"]]), metadata=(("key", "välue".encode().hex()), ("k-bin", b"\x00\x01")), timeout=WAIT_S)
        told = json.loads(await call)

        assert ["key", "välue".encode().hex()] in told["metadata"] and ["k-bin", "0001"] in told["metadata"]
        assert ("first", "1") in tuple(await call.initial_metadata())
        trailing = tuple(await call.trailing_metadata())
        assert ("last", "2") in trailing and ("raw-bin", b"\x00\xff") in trailing

    async def test_initial_metadata_comes_before_the_first_message(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).count(ask(n=1, hang_at=0, initial=[["early", "yes"]]), timeout=WAIT_S)

        async with asyncio.timeout(WAIT_S):
            assert ("early", "yes") in tuple(await call.initial_metadata())
        assert not call.done()
        call.cancel()

    async def test_trace_context_reaches_the_servicer(self, rig: Rig) -> None:
        here = trace.new()
        told = json.loads(await ProbeStub(rig.channel()).unary(ask(tell=1), metadata=((trace.KEY, here),), timeout=WAIT_S))

        assert told["traceparent"] == here

    async def test_trace_context_of_the_caller_is_passed_on_by_itself(self, rig: Rig) -> None:
        here = trace.new()
        token = trace.traceparent.set(here)
        try:
            told = json.loads(await ProbeStub(rig.channel()).unary(ask(tell=1), timeout=WAIT_S))
        finally:
            trace.traceparent.reset(token)

        assert told["traceparent"] == here

    # --- deadlines ------------------------------------------------------------------------------------------------

    async def test_deadline_ends_the_call_on_both_sides(self, rig: Rig) -> None:
        began = time.monotonic()
        e = await failure(ProbeStub(rig.channel()).unary(ask(sleep=60), timeout=0.3))

        assert e.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.25 < time.monotonic() - began < 2.0
        await soon(rig.probe.cancelled)

    async def test_deadline_ends_a_stream(self, rig: Rig) -> None:
        e = await failure(ProbeStub(rig.channel()).count(ask(n=10, hang_at=3), timeout=0.3))

        assert e.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await soon(rig.probe.cancelled)

    async def test_server_knows_the_time_remaining(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).unary(ask(tell=1), timeout=5.0)

        assert 4.0 < call.time_remaining() <= 5.0
        assert 3.0 < json.loads(await call)["time_remaining"] <= 5.1  # gRPC rounds up

    # --- cancellation ---------------------------------------------------------------------------------------------

    async def test_cancel_reaches_a_unary_handler(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).unary(ask(sleep=60))
        await soon(rig.probe.started)
        assert call.cancel() is True

        with pytest.raises(asyncio.CancelledError):
            await call
        assert call.cancelled() and await call.code() is grpc.StatusCode.CANCELLED
        await soon(rig.probe.cancelled)

    async def test_cancel_at_once_leaves_nothing_running(self, rig: Rig) -> None:
        stub = ProbeStub(rig.channel())
        for _ in range(20):
            stub.unary(ask(sleep=60)).cancel()
        assert await stub.unary(ask(echo="x"), timeout=WAIT_S) == b"x"

        await until(lambda: rig.probe.num_running == 0)

    async def test_cancel_reaches_a_stream_handler(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).count(ask(n=10, hang_at=1))
        assert await call.read() == b"0"
        call.cancel()

        with pytest.raises(asyncio.CancelledError):
            await call.read()
        await soon(rig.probe.cancelled)

    async def test_cancelling_the_reading_task_cancels_the_call(self, rig: Rig) -> None:
        first = asyncio.Event()

        async def read_all() -> None:
            async for _ in ProbeStub(rig.channel()).count(ask(n=10, hang_at=1)):
                first.set()

        task = asyncio.create_task(read_all())
        await soon(first)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        await soon(rig.probe.cancelled)

    async def test_a_call_nobody_holds_is_cancelled(self, rig: Rig) -> None:
        if not rig.cancels_dropped_calls:
            pytest.skip("this carrier does not promise it")
        call = ProbeStub(rig.channel()).count(ask(n=10, hang_at=1))
        await call.read()
        del call
        gc.collect()

        await soon(rig.probe.cancelled)

    async def test_cancel_reaches_a_bidirectional_handler(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).chat()
        await call.write(b"a")
        assert await call.read() == b"re:a"
        call.cancel()

        await soon(rig.probe.cancelled)

    async def test_request_iterator_that_raises_ends_the_call(self, rig: Rig) -> None:
        async def requests() -> AsyncIterator[bytes]:
            yield b"1"
            raise RuntimeError("broken iterator")

        call = ProbeStub(rig.channel()).total(requests(), timeout=WAIT_S)
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await call

        await soon(rig.probe.finished)

    async def test_done_callback_is_called_once(self, rig: Rig) -> None:
        called: list[Any] = []
        call = ProbeStub(rig.channel()).unary(ask(echo="x"), timeout=WAIT_S)
        call.add_done_callback(called.append)
        await call
        await until(lambda: len(called) == 1)

        assert called[0].done()

    # --- flow control and limits ----------------------------------------------------------------------------------

    async def test_slow_reader_stops_the_server(self, rig: Rig) -> None:
        total = 5000
        call = ProbeStub(rig.channel()).count(ask(n=total, pad=4000))
        assert await call.read() == b"0" + b"." * 4000
        ahead = await settled(lambda: rig.probe.num_produced)

        assert ahead < total / 2
        if rig.window_messages is not None:
            assert ahead <= 2 * rig.window_messages
        got = 1
        while await call.read() is not grpc.aio.EOF:
            got += 1
        assert got == total

    async def test_slow_server_stops_the_writer(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).total()
        written = 0
        await call.write(b"wait")

        async def write_all() -> None:
            nonlocal written
            for _ in range(5000):
                await call.write(b"1" + b"." * 4000)
                written += 1

        writer = asyncio.create_task(write_all())
        ahead = await settled(lambda: written)
        assert 0 < ahead < 2500
        rig.probe.go.set()
        async with asyncio.timeout(30):
            await writer
        await call.done_writing()

        assert await call == b"5000"

    async def test_message_at_the_limit_passes(self, rig: Rig) -> None:
        size = rig.max_message_bytes or 256 << 10

        assert len(await ProbeStub(rig.channel()).unary(ask(size=size), timeout=WAIT_S)) == size

    async def test_large_request_is_refused_at_the_sender(self, rig: Rig) -> None:
        if rig.max_message_bytes is None:
            pytest.skip("this carrier has no cap of ours")
        stub = ProbeStub(rig.channel())
        e = await failure(stub.unary(ask(echo="x" * (rig.max_message_bytes + 1)), timeout=WAIT_S))

        assert isinstance(wire.error_from_rpc(e), errors.PayloadTooLarge)
        assert not rig.probe.started.is_set()
        assert await stub.unary(ask(echo="still fine"), timeout=WAIT_S) == b"still fine"

    async def test_large_response_is_refused_at_the_sender(self, rig: Rig) -> None:
        if rig.max_message_bytes is None:
            pytest.skip("this carrier has no cap of ours")
        stub = ProbeStub(rig.channel())
        e = await failure(stub.unary(ask(size=rig.max_message_bytes + 1), timeout=WAIT_S))
        s = await failure(stub.count_writing(ask(n=1, size=rig.max_message_bytes + 1), timeout=WAIT_S))

        assert isinstance(wire.error_from_rpc(e), errors.PayloadTooLarge)
        assert isinstance(wire.error_from_rpc(s), errors.PayloadTooLarge)
        assert isinstance(rig.probe.write_error, errors.PayloadTooLarge)

    async def test_large_message_on_a_request_stream_is_refused_at_the_sender(self, rig: Rig) -> None:
        if rig.max_message_bytes is None:
            pytest.skip("this carrier has no cap of ours")
        call = ProbeStub(rig.channel()).total(timeout=WAIT_S)
        await call.write(b"1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.write(b"1" * (rig.max_message_bytes + 1))

        assert isinstance(wire.error_from_rpc(caught.value), errors.PayloadTooLarge)
        await soon(rig.probe.finished)

    # --- death ----------------------------------------------------------------------------------------------------

    async def test_death_of_the_server_ends_a_stream_with_unavailable(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).count(ask(n=10, hang_at=1))
        await call.read()
        began = time.monotonic()
        if not await rig.kill_server():
            pytest.skip("this rig cannot kill its server")
        e = await failure(call)

        assert e.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - began < 3.0

    async def test_death_of_the_server_ends_a_unary_call_with_unavailable(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).unary(ask(sleep=60))
        await soon(rig.probe.started)
        await asyncio.sleep(0.05)
        if not await rig.kill_server():
            pytest.skip("this rig cannot kill its server")
        e = await failure(call)

        assert e.code() is grpc.StatusCode.UNAVAILABLE

    async def test_death_of_the_client_cancels_the_handler(self, rig: Rig) -> None:
        call = ProbeStub(rig.channel()).count(ask(n=10, hang_at=1))
        await call.read()
        if not await rig.kill_client():
            pytest.skip("this rig cannot kill its client")

        await soon(rig.probe.cancelled)
        call.cancel()
