"""Text made in the gateway is the text that the tokenizer makes, and needs it no more; chunks straight to the connection."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest

from plugmesh_gateway import connection
from plugmesh_proto.v1 import tokenizer_pb2

from .conftest import EOS, VOCAB, say, until

TEXT = "Grüße aus 東京 🗼! The quick brown fox \"jumps\" \\ over\tthe lazy dog."


def byte_vocabulary(**changes) -> list[tokenizer_pb2.VocabularyPart]:
    """The table of `ByteTokenizer`, in two parts; the ids above 256 belong to no token."""
    pieces = [bytes([i]) for i in range(256)] + [b"<end>"] + [b""] * (VOCAB - 257)
    fields = {"tokenizer_hash": "h", "vocab_size": VOCAB}
    return [
        tokenizer_pb2.VocabularyPart(**fields, first_id=0, token_bytes=pieces[:100], special_ids=[EOS]),
        tokenizer_pb2.VocabularyPart(**{**fields, "first_id": 100, "token_bytes": pieces[100:], "missing_ids": range(257, VOCAB), **changes}),
    ]


async def local_stack(start, script=None, *, wait: bool = True, **settings):
    stack = await start(peers=False, **settings)
    decode = await stack.decode(script or say(TEXT))
    tokenizer = await stack.tokenizer()
    tokenizer.servicer.vocabulary = byte_vocabulary
    if wait:
        await complete(stack)  # the first request finds no table and fetches one
        await until(lambda: bool(stack.gateway.vocabularies._tables))
    return stack, decode, tokenizer


async def complete(stack, **kw):
    kw = {"max_tokens": 200, "prompt": "x", **kw}
    return (await stack.client().completions.create(model="tiny", **kw)).choices


async def streamed(stack, **kw) -> tuple[str, list[str], int]:
    pieces, reasons, num_tokens = [], [], 0
    async for chunk in await stack.client().completions.create(
        model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}, **{"max_tokens": 200, **kw}):
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        pieces += [c.text for c in chunk.choices]
        reasons += [c.finish_reason for c in chunk.choices if c.finish_reason]
    return "".join(pieces), reasons, num_tokens


@pytest.mark.parametrize("stop", [None, ["東x", "fox \""], ["🗼!"], ["never"], ["dog."]])
@pytest.mark.parametrize("max_tokens", [200, 12, 19])
async def test_the_text_is_the_tokenizers_with_any_stop_string_and_any_end(start, stop, max_tokens):
    here, _, tokenizer = await local_stack(start)
    there, _, _ = await local_stack(start, wait=False, detokenize="tokenizer")
    num_frames = tokenizer.servicer.num_frames
    kw = {"max_tokens": max_tokens, **({"stop": stop} if stop else {})}
    ours, theirs = await streamed(here, **kw), await streamed(there, **kw)
    whole = await complete(here, **kw)

    assert theirs == ours and ours[0] == whole[0].text
    assert num_frames == tokenizer.servicer.num_frames and there.gateway.engine.local_texts.num_sequences == 0
    await until(here.is_idle)
    assert here.gateway.engine.local_texts.num_sequences == 0


async def test_a_running_stream_outlives_all_tokenizers(start):
    stack, decode, tokenizer = await local_stack(start)
    decode.servicer.pause_after = 10
    task = asyncio.create_task(streamed(stack))
    await until(lambda: any(g is not None and g.num_completion_tokens == 10 for g in stack.gateway._running.values()))
    await stack.mesh.kill(tokenizer)
    decode.servicer.pause_after = 10**9
    decode.servicer.poke()

    assert TEXT == (await task)[0]


async def test_a_token_that_no_tokenizer_has_costs_one_request(start):
    stack, decode, _ = await local_stack(start)
    decode.servicer.script = lambda request, i: [65, 270, 66]
    response = await httpx.AsyncClient().post(f"{stack.url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 9})
    decode.servicer.script = say(TEXT)

    assert 500 == response.status_code and "270" not in response.text
    assert TEXT == (await complete(stack))[0].text
    await until(stack.is_idle)
    assert stack.gateway.engine.local_texts.num_sequences == 0


@pytest.mark.parametrize("changes", [{"first_id": 90}, {"tokenizer_hash": "other"}, {"vocab_size": 5, "token_bytes": []}, {"missing_ids": [5]}])
async def test_a_malformed_table_is_not_used(start, changes):
    stack, _, tokenizer = await local_stack(start, wait=False)
    tokenizer.servicer.vocabulary = lambda: byte_vocabulary(**changes)
    first = await complete(stack)
    await until(lambda: not stack.gateway.vocabularies._tasks)
    num_frames = tokenizer.servicer.num_frames

    assert TEXT == first[0].text == (await complete(stack))[0].text
    assert not stack.gateway.vocabularies._tables and num_frames < tokenizer.servicer.num_frames


async def test_chunks_between_the_first_and_the_last_go_straight_to_the_connection(start, monkeypatch):
    written = []
    original = connection.Connection.write
    monkeypatch.setattr(connection.Connection, "write", lambda self, data: (written.append(data), original(self, data))[1])
    stack, decode, _ = await local_stack(start)
    decode.servicer.token_delay_s = 0.002
    text, reasons, _ = await streamed(stack)
    with_logprobs = await streamed(stack, logprobs=1)

    assert (TEXT, ["stop"]) == (text, reasons) and with_logprobs[0] == TEXT
    texts = [json.loads(line[6:])["choices"][0]["text"] for data in written for line in data.decode().splitlines() if line]
    assert len(texts) > 40 and "".join(texts) in TEXT


async def test_a_client_that_reads_slowly_gets_everything_in_order(start):
    """The connection fills up again and again, so that chunks go both ways by turns."""
    text = "".join(f"{i:04d}," for i in range(1000))
    stack, _, _ = await local_stack(start, say(text), max_buffered_events=1 << 20)
    stack.gateway.settings = stack.gateway.settings.model_copy(update={"max_tokens": 1 << 20})
    for peer in stack.mesh.peers.values():
        peer.servicer.max_model_len = 1 << 20
    stack.gateway.models._known.clear()
    loop = asyncio.get_running_loop()
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.setblocking(False)
        await loop.sock_connect(s, ("127.0.0.1", stack.service.http.port))
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": len(text) + 9, "stream": True}).encode()
        await loop.sock_sendall(s, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        received, num_reads = b"", 0
        async with asyncio.timeout(60):
            while b"[DONE]" not in received[-200:]:
                received += await loop.sock_recv(s, 200_000)
                num_reads += 1
                if num_reads % 20 == 0:
                    await asyncio.sleep(0.05)
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in received.decode().splitlines() if line.startswith("data: {")]

    assert text == "".join(pieces)
