"""Constrained requests while instances die: the text obeys its schema and is that of the undisturbed greedy run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import urllib.error

import jsonschema
import openai
import pytest

from plugmesh import models
from plugmesh.testing.cluster import Cluster, running, wait_until

# Slow: a mesh of its own and a thousand tokens take about a minute.
pytestmark = [pytest.mark.nats, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]

PERSON = {
    "type": "object",
    "properties": {
        **{name: {"type": "string", "maxLength": 20} for name in ("firstname", "lastname", "occupation", "residence", "birthplace", "nationality")},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "languages": {"type": "array", "items": {"enum": ["English", "French", "German", "Spanish"]}, "minItems": 2, "maxItems": 3},
    },
    "additionalProperties": False,
}
PERSON["required"] = list(PERSON["properties"])
PROMPTS = [f"Invent a {who} and describe that person as a JSON object.\n" for who in ("painter", "sailor", "nurse", "king")]
LONG = "Here is what is known. " + " ".join(f"Fact {i} is that the person met {i} others." for i in range(12))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    if models.find("smollm2") is None:
        pytest.skip("the default model is not here; plugmesh pull smollm2 fetches it")
    pytest.importorskip("xgrammar")
    config = {
        "mesh": {"lease_ttl_s": 2.0, "drain_s": 20.0},
        "services": {
            "gateway": {"stall_s": 3.0},
            "grammar": {"replicas": 1},
            "decode": {"replicas": 2, "num_kv_blocks": 512, "remote_prefill_min_tokens": 64, "num_threads": 1},
            "prefill": {"num_kv_blocks": 256, "num_threads": 1, "max_tokens_per_step": 32},
        },
    }
    with running(tmp_path_factory.mktemp("mesh"), config) as cluster:
        yield cluster


class Stream:
    """One streamed greedy answer; `begun` is set once there is some of it."""

    def __init__(self) -> None:
        self.text = ""
        self.reason = ""
        self.begun = asyncio.Event()

    async def read(self, client: openai.AsyncOpenAI, prompt: str) -> Stream:
        try:
            stream = await client.completions.create(
                model="smollm2", prompt=prompt, temperature=0, max_tokens=300, stream=True, extra_body={"guided_json": PERSON}
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    self.text += choice.text or ""
                    self.reason = choice.finish_reason or self.reason
                if len(self.text) > 25:
                    self.begun.set()
        finally:
            self.begun.set()
        return self


def total(mesh: Cluster, metric: str, role: str, **labels: str) -> float:
    found = 0.0
    for instance in mesh.instances(role):
        with contextlib.suppress(urllib.error.URLError):  # killed, and listed until its lease ends
            found += mesh.metric(instance, metric, **labels)
    return found


@pytest.mark.parametrize("role", ["decode", "grammar"])
async def test_constrained_streams_survive_the_kill_of_an_instance(mesh, role):
    """With the grammar service gone nobody needs it: what runs has its matcher."""
    wait_until(lambda: len(mesh.instances("decode")) == 2 and mesh.instances("grammar"), 30, "every role is there")
    prompts = [*PROMPTS, *(f"{i}. {LONG}\n{p}" for i, p in enumerate(PROMPTS[:2]))]
    migrated = mesh.metric(mesh.instances("gateway")[0], "plugmesh_gateway_migrated_total")
    async with openai.AsyncOpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=120) as client:
        want = [await Stream().read(client, p) for p in prompts]
        streams = [Stream() for _ in prompts]
        tasks = [asyncio.create_task(s.read(client, p)) for s, p in zip(streams, prompts, strict=True)]
        await asyncio.gather(*(asyncio.wait_for(s.begun.wait(), 60) for s in streams[:2]))
        mesh.kill(role, signal.SIGKILL)
        await asyncio.wait_for(asyncio.gather(*tasks), 120)
    for alone, disturbed in zip(want, streams, strict=True):
        assert (disturbed.text, disturbed.reason) == (alone.text, "stop")
        jsonschema.validate(json.loads(disturbed.text), PERSON)
    assert total(mesh, "plugmesh_engine_jumped_tokens", "decode") > 0
    assert total(mesh, "plugmesh_engine_grammar_errors", "decode") == 0
    if role == "decode":
        assert mesh.metric(mesh.instances("gateway")[0], "plugmesh_gateway_migrated_total") > migrated
    wait_until(lambda: total(mesh, "plugmesh_kv_blocks", "decode", state="used") == 0, 10, "no block is in use")
    assert total(mesh, "plugmesh_kv_blocks_leaked", "decode") == 0
