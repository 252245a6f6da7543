"""The load generator against a real server, whose bytes come in any pieces."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.bench.http_client import DIALECTS, Client, events_of, has_output
from plugmesh.bench.load import closed_loop, open_loop
from plugmesh.bench.metrics import summary
from plugmesh.bench.serve import ServePlan, run_serve
from plugmesh.bench.workloads import Call, Shape, multi_turn, random_prompts
from plugmesh.errors import InvalidRequest, Unavailable

from .tiny_server import TinyServer, serving

CALL = Call((1, 2, 3, 4), 5)


def client_of(server: TinyServer, **options) -> Client:
    return Client(server.url, "tiny", DIALECTS["plugmesh"], **options)


async def one(server: TinyServer, **options):
    async with serving(server):
        client = client_of(server, **options)
        try:
            return await client.send(CALL, client.encode(CALL))
        finally:
            client.close()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1 << 30))
def test_an_answer_is_read_alike_however_its_bytes_are_cut(most, seed):
    def cut(data: bytes) -> list[bytes]:
        rng, pieces = random.Random(seed), []
        while data:
            size = rng.randint(1, most)
            pieces.append(data[:size])
            data = data[size:]
        return pieces

    record = asyncio.run(one(TinyServer(mangle=cut)))
    assert ("", 5, 4, 5, 3) == (record.error, len(record.times_s), record.num_prompt, record.num_out, record.num_cached)


@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")), max_size=6), st.booleans(), st.integers(1, 9))
def test_events_come_out_whole_with_either_line_end(payloads, crlf, size):
    end = b"\r\n" if crlf else b"\n"
    stream = b"".join(b"data: " + p + end + end for p in payloads)
    buffer, found = bytearray(), []
    for i in range(0, len(stream), size):
        buffer += stream[i : i + size]
        found += events_of(buffer)

    assert [p.lstrip(b" ") for p in payloads] == found


@pytest.mark.parametrize(
    ("event", "counts"),
    [
        (b'{"choices":[{"text":"a","finish_reason":null}]}', True),
        (b'{"choices": [{"text": "", "finish_reason": null}]}', True),  # bytes of a character that is not complete yet
        (b'{"choices":[{"text":"","finish_reason":"length"}]}', False),
        (b'{"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}', False),
        (b'{"choices":[{"delta":{"content":"a"}}]}', True),
        (b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}', False),
        (b"[DONE]", False),
    ],
)
def test_only_events_with_output_count(event, counts):
    assert counts == has_output(event)


async def test_errors_become_records():
    record = await one(TinyServer(fail_status=503))
    assert "HTTP 503: no" == record.error

    async with serving(TinyServer()) as server:
        url = server.url
    record = await Client(url, "tiny", DIALECTS["openai"]).send(CALL, b"{}")
    assert "does not answer" in record.error


async def test_a_stream_that_hangs_is_given_up():
    record = await one(TinyServer(first_s=5), timeout_s=0.1)

    assert "no end within 0.1 s" == record.error


async def test_a_connection_that_died_while_idle_is_replaced_without_a_failure():
    async with serving(TinyServer(close_after=1)) as server:
        client = client_of(server)
        records = [await client.send(CALL, client.encode(CALL)) for _ in range(3)]
        client.close()

    assert ["", "", ""] == [r.error for r in records]
    assert 3 == server.num_connections


async def test_a_closed_loop_keeps_exactly_its_streams_busy_and_its_connections():
    async with serving(TinyServer(first_s=0.01, gap_s=0.001)) as server:
        client = client_of(server)
        run = await closed_loop(client, random_prompts(Shape(num_conversations=12, num_in=7, num_out=3), 0), 4)
        client.close()

    figures = summary(run)
    assert (12, 0, 0, 36) == (figures["num_requests"], figures["num_failed"], figures["num_inexact"], figures["num_output_tokens"])
    assert (4, 4) == (server.most_in_flight, server.num_connections)
    assert figures["ttft_ms"]["p50"] >= 10
    assert run.client_cpu_s > 0
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)


async def test_turns_of_a_conversation_follow_one_another():
    conversations = multi_turn(Shape(num_conversations=2, num_in=5, num_out=2, num_turns=3), 0)
    async with serving(TinyServer(gap_s=0.002)) as server:
        client = client_of(server)
        run = await closed_loop(client, conversations, 1)
        client.close()

    assert [len(c.prompt) for conversation in conversations for c in conversation] == [r.num_prompt for r in run.records]
    assert 1 == server.most_in_flight


async def test_an_open_loop_does_not_wait_for_answers():
    async with serving(TinyServer(first_s=0.15)) as server:
        client = client_of(server)
        run = await open_loop(client, random_prompts(Shape(num_conversations=6, num_in=3, num_out=2), 0), iter(i * 0.02 for i in range(99)))
        client.close()

    assert 6 == server.most_in_flight
    assert [] == [r.error for r in run.records if r.error]
    assert all(-0.001 <= r.sent_s - r.due_s < 0.1 for r in run.records)


async def test_wrong_lengths_show():
    async with serving(TinyServer(wrong_by=1)) as server:
        report = await run_serve(ServePlan(server.url, shape=Shape(num_conversations=3), streams=2))

    assert 3 == report["figures"]["num_inexact"]


async def test_serve_reports_every_request():
    async with serving(TinyServer(gap_s=0.001)) as server:
        report = await run_serve(ServePlan(server.url + "/v1", shape=Shape(num_conversations=5, num_in=6, num_out=4), rate=200.0))

    assert ("tiny", 5, []) == (report["plan"]["model"], len(report["requests"]), report["warnings"])
    assert {4} == {r["num_out"] for r in report["requests"]}


async def test_serve_refuses_what_it_cannot_do():
    with pytest.raises(InvalidRequest, match="dialect"):
        await run_serve(ServePlan("http://127.0.0.1:1", dialect="klingon"))
    with pytest.raises(Unavailable):
        await run_serve(ServePlan("http://127.0.0.1:1"))
    with pytest.raises(InvalidRequest, match="address"):
        Client("ftp://x", "m", DIALECTS["openai"])
