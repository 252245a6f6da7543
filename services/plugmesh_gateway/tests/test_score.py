"""Scores through the gateway: the seam between prompt and continuation, instances that are lost, refusals."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from plugmesh import models
from plugmesh.client import AsyncClient, Client
from plugmesh.errors import ContextLengthExceeded, InvalidRequest, LimitExceeded, Unauthenticated, Unavailable
from plugmesh_gateway.keys import new_key, toml_entry
from plugmesh_proto.v1 import common_pb2, decode_pb2

from .conftest import ScriptedDecode, Translate, say, until
from .test_grpc import connect
from .test_real_peers import host, mesh

__all__ = ["connect", "mesh"]


class Scoring(ScriptedDecode):
    """Gives every token the log-probability -token / 100, in frames of two; fails while `failure` is set."""

    def __init__(self, name: str = "") -> None:
        super().__init__(name, say("x"))
        self.scored: list[decode_pb2.ScoreRequest] = []
        self.failure: Exception | None = None

    async def Score(self, request, context):
        self.scored.append(request)
        total = sum(len(c.token_ids) for c in request.continuations)
        for i, c in enumerate(request.continuations):
            for at in range(0, len(c.token_ids), 2):
                infos = [common_pb2.TokenInfo(token_id=t, logprob=-t / 100) for t in c.token_ids[at : at + 2]]
                is_last = i == len(request.continuations) - 1 and at + 2 >= len(c.token_ids)
                row = decode_pb2.TokenRow(request_id=request.request_id, sequence=i, index=at, tokens=infos, request_done=is_last)
                if is_last:
                    row.usage.prompt_tokens = len(request.token_ids) + total
                if self.failure is not None and at:
                    raise self.failure
                yield decode_pb2.TokenFrame(rows=[row])


@pytest.fixture
async def scoring(connect):
    """A gateway's address and two instances that score."""
    stack, address = await connect(peers=False)
    await stack.tokenizer()
    decodes = [Scoring("a"), Scoring("b")]
    for d in decodes:
        await stack.mesh.add("decode", d, d.name)
    return stack, address, decodes


async def test_text_and_ids_are_scored_in_order_and_nothing_stays(scoring):
    stack, address, decodes = scoring
    async with AsyncClient(address) as client:
        scores = await client.score("ab", ["cde", [7, 8], "f"])
        chat = await client.score(None, ["x"], messages=[{"role": "user", "content": "q"}])

    [request] = [r for d in decodes for r in d.scored if bytes(r.token_ids) == b"ab"]
    assert [bytes(c.token_ids) for c in request.continuations] == [b"cde", b"\x07\x08", b"f"]
    assert [[t.token_id for t in s.tokens] for s in scores] == [[99, 100, 101], [7, 8], [102]]
    assert [round(s.logprob, 4) for s in scores] == [-3.0, -0.15, -1.02]
    assert [t.token_id for t in chat[0].tokens] == [120]
    assert stack.is_idle()


async def test_the_blocking_client_scores_too(scoring):
    _, address, _ = scoring

    def use():
        with Client(address) as client:
            return client.score([1, 2, 3], [[4]])[0].logprob

    assert round(await asyncio.to_thread(use), 4) == -0.04


async def test_an_instance_that_is_lost_in_the_middle_is_left_for_another(scoring):
    stack, address, decodes = scoring
    decodes[0].failure = Unavailable("gone")
    async with AsyncClient(address) as client:
        for _ in range(4):
            scores = await client.score("ab", ["cdef", "gh"])
            assert [len(s.tokens) for s in scores] == [4, 2]
        assert decodes[0].scored and len(decodes[1].scored) == 4
        decodes[1].failure = Unavailable("gone too")
        with pytest.raises(Unavailable):
            await client.score("ab", ["cdef"])
    assert stack.is_idle()


async def test_what_cannot_be_scored_is_refused_by_its_class(scoring):
    stack, address, decodes = scoring
    async with AsyncClient(address) as client:
        for call, error, param in [
            (client.score("ab", []), LimitExceeded, "continuations"),
            (client.score("ab", ["c"] * 1025), LimitExceeded, "continuations"),
            (client.score("ab", [""]), InvalidRequest, "continuations"),
            (client.score("", ["c"]), InvalidRequest, "prompt"),
            (client.score([1], [[5000]]), InvalidRequest, "continuations"),
            (client.score("ab", ["c"], top_logprobs=21), InvalidRequest, "top_logprobs"),
            (client.score([1] * 10, [[2] * 5000]), ContextLengthExceeded, "continuations"),
        ]:
            with pytest.raises(error) as caught:
                await call
            assert caught.value.param == param
    assert not decodes[0].scored and not decodes[1].scored
    assert stack.is_idle()


async def test_keys_guard_scores(connect, tmp_path):
    key = new_key()
    (tmp_path / "keys.toml").write_text(toml_entry("me", key, ["inference"]))
    _, address = await connect(keys_file=tmp_path / "keys.toml")
    async with AsyncClient(address) as client:
        with pytest.raises(Unauthenticated):
            await client.score("ab", ["c"])


@pytest.mark.model
@pytest.mark.skipif(models.find("smollm2") is None, reason="`plugmesh pull smollm2` fetches the model")
async def test_the_default_model_prefers_what_is_true(mesh):
    """The whole way: real tokenizer, real decode instance, gRPC at the edge."""
    await host(mesh, "decode", use_kvstore=False, num_kv_blocks=64, num_threads=1)
    server = grpc.aio.server(interceptors=[Translate()])
    for b in mesh.gateway.service.bindings():
        b.add_to_server(b.servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await until(lambda: not mesh.gateway.service.gateway.missing_roles(), 20)
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        paris, berlin, banana = await client.score("The capital of France is", [" Paris", " Berlin", " a yellow banana"], top_logprobs=1)
    await server.stop(0)

    assert paris.logprob > berlin.logprob > banana.logprob
    assert paris.is_greedy and not berlin.is_greedy
