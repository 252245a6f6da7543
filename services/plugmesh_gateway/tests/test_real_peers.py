"""The gateway with the real tokenizer and weightstore, and with real decode instances, in one process."""

from __future__ import annotations

import asyncio
import importlib
import os

import openai
import pytest

from plugmesh import models
from plugmesh.config import MeshConfig
from plugmesh.testing.local_mesh import LocalMesh

from .conftest import ScriptedDecode, until

pytestmark = [pytest.mark.model, pytest.mark.skipif(models.find("smollm2") is None, reason="`plugmesh pull smollm2` fetches the model")]
TEXT = "Grüße aus 東京 🗼! 12345 and a stop"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


async def host(mesh: LocalMesh, role: str, **settings):
    package = f"plugmesh_{role}"
    service = importlib.import_module(f"{package}.service")
    return await mesh.host(role, service.create, settings=importlib.import_module(f"{package}.config").Settings(**settings))


@pytest.fixture
async def mesh(tmp_path):
    """A weightstore, a tokenizer and a gateway; its client as `mesh.client`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = MeshConfig.model_validate({"mesh": {"model": "smollm2", "data_dir": str(tmp_path)}})
    async with LocalMesh(config) as m:
        await host(m, "weightstore")
        m.tokenizer = await host(m, "tokenizer")
        m.gateway = await host(m, "gateway", port=0, recovery_wait_s=20)
        m.client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{m.gateway.service.http.port}/v1", api_key="none", max_retries=0, timeout=60)
        yield m
        await m.client.close()


class Scripted:
    """A service around `ScriptedDecode`, whose ids are those of the real tokenizer."""

    def __init__(self, servicer) -> None:
        self.servicer = servicer

    def bindings(self):
        from plugmesh.mesh.api import Binding
        from plugmesh_proto.v1 import decode_pb2_grpc

        return [Binding(decode_pb2_grpc.add_DecodeServicer_to_server, self.servicer, "plugmesh_proto.v1.Decode")]

    async def start(self): ...
    async def drain(self, deadline_s): ...
    async def stop(self): ...
    def describe(self):
        return {"model": "smollm2"}


async def scripted(mesh: LocalMesh) -> ScriptedDecode:
    from plugmesh_proto.v1 import tokenizer_pb2, tokenizer_pb2_grpc

    ids = (await tokenizer_pb2_grpc.TokenizerStub(mesh.channel("tokenizer")).Encode(tokenizer_pb2.EncodeRequest(text=TEXT))).token_ids
    servicer = ScriptedDecode("scripted", lambda r, i: list(ids))
    servicer.model, servicer.eos = "smollm2", 2  # <|im_end|>
    await mesh.host("decode", lambda context: Scripted(servicer))
    return servicer


async def test_text_of_any_script_streams_whole_and_stops_where_told(mesh):
    decode = await scripted(mesh)
    pieces = [c.choices[0].delta.content or "" async for c in await mesh.client.chat.completions.create(model="smollm2", messages=CHAT, stream=True)]
    stopped = await mesh.client.chat.completions.create(model="smollm2", messages=CHAT, stop=["345 an", "京x"], logprobs=True, top_logprobs=1)

    assert "".join(pieces) == TEXT and "\ufffd" not in "".join(pieces) and len(pieces) > 10
    assert stopped.choices[0].message.content == TEXT[: TEXT.index("345 an")]
    assert b"".join(bytes(t.bytes) for t in stopped.choices[0].logprobs.content).decode().startswith(TEXT[: TEXT.index("345 an")])
    assert all("<|im_end|>" != t.token for t in stopped.choices[0].logprobs.content)
    assert len(decode.submits[0].token_ids) == 37  # the template's own tokens and the question


async def test_a_real_tokenizer_that_dies_in_the_middle_is_replaced(mesh):
    decode = await scripted(mesh)
    decode.pause_after = 12
    pieces: list[str] = []

    async def read() -> str:
        async for c in await mesh.client.chat.completions.create(model="smollm2", messages=CHAT, stream=True):
            pieces.append(c.choices[0].delta.content or "")
        return "".join(pieces)

    task = asyncio.create_task(read())
    await until(lambda: decode.num_steps == 12 and bool("".join(pieces)), 20)
    await host(mesh, "tokenizer")
    await mesh.kill(mesh.tokenizer.info.instance_id)
    decode.pause_after = 10**9
    decode.poke()

    assert await asyncio.wait_for(task, 30) == TEXT


@pytest.mark.slow
async def test_greedy_and_seeded_answers_survive_the_death_of_a_real_decode_instance(mesh):
    kw = {"dtype": "float32", "use_kvstore": False, "num_kv_blocks": 64, "num_threads": 1}
    await host(mesh, "decode", **kw)
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 5, "n": 2}):
        ask = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 24, **sampling}
        undisturbed = await mesh.client.chat.completions.create(**ask)
        await host(mesh, "decode", **kw)
        texts = [""] * len(undisturbed.choices)
        killed = False
        async for c in await mesh.client.chat.completions.create(**ask, stream=True):
            texts[c.choices[0].index] += c.choices[0].delta.content or ""
            if not killed and len(texts[0]) > 20:
                killed = True
                busy = next(i for i in mesh.hosted.values() if i.info.role == "decode" and i.info.instance_id == _instance(mesh))
                await mesh.kill(busy.info.instance_id)

        assert killed and texts == [c.message.content for c in undisturbed.choices]
    causes = ("left", "suspect", "lost")
    assert sum(mesh.gateway.registry.get_sample_value("plugmesh_gateway_migrated_total", {"cause": c}) or 0 for c in causes) == 2


def _instance(mesh: LocalMesh) -> str:
    links = mesh.gateway.service.gateway.decode._sinks
    return next(link.info.instance_id for link, sinks in links.items() if sinks)
