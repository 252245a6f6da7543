"""The gRPC Inference service through `plugmesh.client`, blocking and asynchronous."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from plugmesh.client import AsyncClient, Client
from plugmesh.errors import (
    AlreadyExists,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from plugmesh.types import FinishReason
from plugmesh_gateway.keys import new_key, toml_entry
from plugmesh_proto.v1 import inference_pb2_grpc

from .conftest import Translate, say, until


@pytest.fixture
async def connect(start):
    """`await connect(**settings)` gives a stack and the address of its Inference service."""
    servers = []

    async def go(**kw):
        stack = await start(**kw)
        server = grpc.aio.server(interceptors=[Translate()])
        for b in stack.service.bindings():
            assert b.full_name == "plugmesh_proto.v1.Inference"
            b.add_to_server(b.servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return stack, f"127.0.0.1:{port}"

    assert inference_pb2_grpc
    yield go
    for server in servers:
        await server.stop(0)


async def test_events_carry_text_tokens_and_usage_on_the_last(connect):
    stack, address = await connect()
    async with AsyncClient(address) as client:
        events = [e async for e in client.generate("hi", max_tokens=50, logprobs=True, top_logprobs=2)]

    assert "".join(e.text for e in events) == "Hello, world!"
    assert bytes(t.token_id for e in events for t in e.tokens) == b"Hello, world!"
    assert events[0].tokens[0].top == ((72, -0.5), (73, -1.5))
    assert events[-1].finish_reason is FinishReason.STOP
    assert (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens) == (2, 14)
    assert all(e.usage is None for e in events[:-1])
    assert stack.is_idle()


async def test_the_blocking_client_completes_chats_and_lists_models(connect):
    _, address = await connect()

    def use():
        with Client(address) as client:
            done = client.complete(messages=[{"role": "user", "content": "x"}], stop="world", n=2)
            streamed = "".join(e.text for e in client.generate([97, 98], max_tokens=4))
            return done, streamed, client.models()

    done, streamed, models = await asyncio.to_thread(use)
    assert [c.text for c in done.choices] == ["Hello, "] * 2 and done.text == "Hello, "
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.model) == (7, 24, "tiny")
    assert streamed == "Hell"
    assert [(m.model, m.version, m.context_length, m.is_default) for m in models] == [("tiny", "v1", 4096, True)]


async def test_errors_arrive_as_their_class_at_both_clients(connect):
    stack, address = await connect(request_timeout_s=5)
    async with AsyncClient(address) as client:
        for kw, error in [({"temperature": 3.0}, InvalidRequest), ({"n": 100}, LimitExceeded), ({"model": "other"}, NotFound),
                          ({"max_tokens": 5000}, ContextLengthExceeded), ({"stop": [""]}, InvalidRequest), ({"request_id": "no spaces"}, InvalidRequest),
                          ({"frob": 1}, InvalidRequest), ({"temperature": "x"}, InvalidRequest), ({"top_p": float("nan")}, InvalidRequest)]:
            with pytest.raises(error):
                await client.complete("x", **kw)
        with pytest.raises(InvalidRequest):
            await client.complete()
        with pytest.raises(InvalidRequest):
            await client.complete([])
        with pytest.raises(InvalidRequest):
            await client.complete(messages=[])

    def blocking():
        with Client(address) as client, pytest.raises(LimitExceeded) as e:
            list(client.generate("x", n=100))
        return e.value

    assert (await asyncio.to_thread(blocking)).param == "n"
    assert stack.is_idle()


async def test_a_request_id_in_use_is_refused_and_a_deadline_ends_the_request(connect):
    stack, address = await connect(peers=False)
    async with AsyncClient(address) as client:
        with pytest.raises(Unavailable) as away:
            await client.complete("x")
        assert away.value.retry_after_s > 0
        await stack.tokenizer()
        decode = (await stack.decode(say("abc"))).servicer
        decode.pause_after = 1
        first = asyncio.create_task(client.complete("x", request_id="mine"))
        await until(lambda: bool(decode.submits))
        with pytest.raises(AlreadyExists):
            await client.complete("x", request_id="mine")
        with pytest.raises(DeadlineExceeded):
            await client.complete("x", timeout_s=0.3)
        decode.pause_after = 10**9
        decode.poke()
        assert (await first).text == "abc"
    await until(stack.is_idle)


async def test_leaving_the_iterator_cancels_everywhere(connect):
    stack, address = await connect(peers=False)
    await stack.tokenizer()
    decode = (await stack.decode(say("abc" * 100))).servicer
    decode.pause_until_cancelled(20)
    async with AsyncClient(address) as client:
        events = client.generate("x", max_tokens=200)
        async for _ in events:
            break
        await events.aclose()
        await until(stack.is_idle)

    assert len(decode.cancels) == 1
    assert stack.value("plugmesh_gateway_requests_total", route="grpc", outcome="cancelled") == 1


async def test_keys_guard_grpc_too(connect, tmp_path):
    key = new_key()
    (tmp_path / "k.toml").write_text(toml_entry("a", key))
    _, address = await connect(keys_file=tmp_path / "k.toml")
    async with AsyncClient(address) as client:
        for call in (client.complete("x"), client.models()):
            with pytest.raises(Unauthenticated):
                await call
    async with AsyncClient(address, api_key=key) as client:
        assert (await client.complete("x")).text == "Hello, world!"
        assert len(await client.models()) == 1
