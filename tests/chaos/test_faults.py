"""Faults injected into a running mesh: promises P1, P2, P3, P5, P7, P8 and P9 of the design.

One mesh with two decode instances serves all tests of this file, and must be whole again after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable

import openai
import pytest

from plugmesh import models
from plugmesh.errors import PlugmeshError
from plugmesh.testing.cluster import Cluster, running, wait_until

pytestmark = [pytest.mark.nats, pytest.mark.model, pytest.mark.timeout(240)]

BASELINE_S = 5.0
LONG = "Write a long story about a lighthouse keeper and the sea. " + " ".join(f"Mention item {i}." for i in range(40))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    if models.find("smollm2") is None:
        pytest.skip("the default model is not here; plugmesh pull smollm2 fetches it")
    config = {
        "mesh": {"lease_ttl_s": 2.0, "drain_s": 20.0},
        "services": {
            "gateway": {"stall_s": 3.0, "max_in_flight": 48, "max_queued": 64},
            "tokenizer": {"replicas": 2},
            "decode": {"replicas": 2, "dtype": "float32", "num_kv_blocks": 512, "remote_prefill_min_tokens": 64, "num_threads": 1},
            "prefill": {"dtype": "float32", "num_kv_blocks": 256, "num_threads": 1, "max_tokens_per_step": 32},
        },
    }
    with running(tmp_path_factory.mktemp("mesh"), config) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def whole_again(mesh):
    """After each test every role is back and no block is in use or leaked."""
    yield
    wait_until(lambda: is_whole(mesh), 60, lambda: f"the mesh is not whole: {mesh.status()['instances']}")
    wait_for_baseline(mesh, 30)


def is_whole(mesh: Cluster) -> bool:
    try:
        states = [(i["role"], i["state"]) for i in mesh.instances()]
    except PlugmeshError:
        return False
    want = {"gateway": 1, "tokenizer": 2, "grammar": 1, "weightstore": 1, "prefill": 1, "decode": 2, "kvstore": 1}
    # Nobody else, either: a killed instance that is still in the table would have requests routed to it and migrated in the next test.
    return len(states) == sum(want.values()) and all(sum(r == role and s == "ready" for r, s in states) == n for role, n in want.items())


def used_blocks(mesh: Cluster) -> dict[str, float]:
    found = {}
    table = [i for i in mesh.instances() if i["state"] in ("ready", "draining")]
    for i in table:
        if i["role"] in ("decode", "prefill"):
            found[f"{i['instance_id']} used"] = mesh.metric(i, "plugmesh_kv_blocks", state="used")
            found[f"{i['instance_id']} leaked"] = mesh.metric(i, "plugmesh_kv_blocks_leaked")
    for i in (i for i in table if i["role"] == "kvstore"):
        found[f"{i['instance_id']} leaked"] = mesh.metric(i, "plugmesh_kv_blocks_leaked")
        for state in ("pinned", "reserved"):
            found[f"{i['instance_id']} {state}"] = mesh.metric(i, "plugmesh_kv_arena_bytes", state=state)
    return found


def wait_for_baseline(mesh: Cluster, timeout_s: float = BASELINE_S) -> float:
    return wait_until(lambda: not any(used_blocks(mesh).values()), timeout_s, lambda: f"KV in use: {used_blocks(mesh)}")


def client_of(mesh: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=120)


class Stream:
    """One streamed greedy completion, read in the background."""

    def __init__(self) -> None:
        self.text = ""
        self.reason: str | None = None
        self.error: Exception | None = None
        self.first = asyncio.Event()
        self.num_ends = 0

    async def read(self, client: openai.AsyncOpenAI, prompt: str, num_tokens: int) -> Stream:
        try:
            stream = await client.completions.create(
                model="smollm2", prompt=prompt, temperature=0, max_tokens=num_tokens, stream=True, extra_body={"ignore_eos": True}
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    self.text += choice.text or ""
                    if choice.finish_reason:
                        self.reason = choice.finish_reason
                        self.num_ends += 1
                if self.text:
                    self.first.set()
        except openai.APIError as e:
            self.error = e
        finally:
            self.first.set()
        return self


_undisturbed: dict[tuple[str, int], str] = {}


async def undisturbed(client: openai.AsyncOpenAI, prompt: str, num_tokens: int) -> str:
    """The greedy text of a prompt, computed once while nothing is wrong and the request is alone."""
    if (prompt, num_tokens) not in _undisturbed:
        stream = await Stream().read(client, prompt, num_tokens)
        assert stream.reason == "length", stream.error
        _undisturbed[prompt, num_tokens] = stream.text
    return _undisturbed[prompt, num_tokens]


async def disturb(mesh: Cluster, fault: Callable[[], object] | Callable[[], Awaitable[object]], prompts: list[str], num_tokens: int = 48) -> None:
    """Runs greedy streams undisturbed, then again with the fault in their middle; texts and ends must be equal."""
    async with client_of(mesh) as client:
        want = [await undisturbed(client, p, num_tokens) for p in prompts]
        streams = [Stream() for _ in prompts]
        tasks = [asyncio.create_task(s.read(client, p, num_tokens)) for s, p in zip(streams, prompts, strict=True)]
        await asyncio.gather(*(asyncio.wait_for(s.first.wait(), 60) for s in streams))
        result = fault()
        if asyncio.iscoroutine(result):
            await result
        await asyncio.wait_for(asyncio.gather(*tasks), 120)

    for stream, text in zip(streams, want, strict=True):
        assert stream.error is None, repr(stream.error)
        assert (text, "length", 1) == (stream.text, stream.reason, stream.num_ends)


PROMPTS = [f"The {i} things that matter most in life are" for i in ("two", "three", "four", "five", "six", "seven")]


async def pause(pid: int, seconds: float) -> None:
    """Stops a process for a while: it keeps its sockets and answers nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def num_migrated(mesh: Cluster) -> float:
    return mesh.metric(mesh.instances("gateway")[0], "plugmesh_gateway_migrated_total")


SLOW = pytest.mark.slow  # each takes about ten seconds; .ci/run runs them apart from the suite


@pytest.mark.parametrize("role", ["decode", "tokenizer", pytest.param("kvstore", marks=SLOW), pytest.param("weightstore", marks=SLOW)])
async def test_streams_survive_the_kill_of_an_instance(mesh, role):
    before = num_migrated(mesh)
    await disturb(mesh, lambda: mesh.kill(role), PROMPTS)

    assert (num_migrated(mesh) > before) == (role == "decode")  # so the fault did hit running streams


@pytest.mark.parametrize("role", ["decode", pytest.param("tokenizer", marks=SLOW), pytest.param("kvstore", marks=SLOW)])
async def test_streams_survive_a_stopped_instance_and_its_awakening(mesh, role):
    """Longer than a lease: others take over, and what the sleeper still writes when it wakes changes nothing."""
    await disturb(mesh, lambda: pause(int(mesh.instances(role)[0]["pid"]), 7.0), PROMPTS)


async def test_streams_survive_a_stopped_broker(mesh):
    await disturb(mesh, lambda: pause(mesh.broker().pid, 4.0), PROMPTS)


async def test_a_drained_decode_instance_fails_no_request_while_another_lives(mesh):
    await disturb(mesh, lambda: mesh.kill("decode", signal.SIGTERM), PROMPTS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_prompt_falls_back_to_local_computation_when_its_prefill_instance_fails(mesh, number):
    async with client_of(mesh) as client:
        prompt = f"{number}: {LONG}"
        background = [asyncio.create_task(Stream().read(client, p, 96)) for p in PROMPTS[:2]]
        stream = Stream()
        task = asyncio.create_task(stream.read(client, prompt, 16))
        await asyncio.sleep(0.05)  # into the middle of the prompt's chunks
        pid = mesh.kill("prefill", number)
        try:
            await asyncio.wait_for(asyncio.gather(task, *background), 120)
        finally:
            if number == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
        want = await Stream().read(client, prompt, 16)

    assert stream.error is None
    assert (want.text, "length", 1) == (stream.text, stream.reason, stream.num_ends)


async def test_the_kill_of_the_gateway_frees_what_its_requests_held_within_5_s(mesh):
    async with client_of(mesh) as client:
        streams = [Stream() for _ in PROMPTS]
        tasks = [asyncio.create_task(s.read(client, p, 400)) for s, p in zip(streams, PROMPTS, strict=True)]
        await asyncio.gather(*(asyncio.wait_for(s.first.wait(), 60) for s in streams))
        wait_until(lambda: any(used_blocks(mesh).values()), 5, "the gauges show blocks in use")
        mesh.kill("gateway")
        killed = time.monotonic()
        for task in tasks:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(task, 30)
    wait_for_baseline(mesh, max(0.5, BASELINE_S - (time.monotonic() - killed)))


async def test_cancelling_200_requests_at_random_moments_leaves_no_block_behind(mesh):
    rng = random.Random(5)
    async with client_of(mesh) as client:

        async def one(i: int) -> None:
            await asyncio.sleep(rng.random() * 6)
            stream = Stream()
            task = asyncio.create_task(stream.read(client, f"{i} " + (LONG if i % 5 == 0 else PROMPTS[i % 6]), 200))
            await asyncio.sleep(rng.random() * 1.5)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        await asyncio.gather(*(one(i) for i in range(200)))
    wait_for_baseline(mesh)


async def test_a_dead_broker_ends_every_request_once_and_full_service_returns_within_10_s_of_its_return(mesh):
    async with client_of(mesh) as client:
        streams = [Stream() for _ in PROMPTS]
        tasks = [asyncio.create_task(s.read(client, p, 64)) for s, p in zip(streams, PROMPTS, strict=True)]
        await asyncio.gather(*(asyncio.wait_for(s.first.wait(), 60) for s in streams))
        pids = {i["instance_id"]: i["pid"] for i in mesh.instances()}
        old = mesh.broker()
        old.kill()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        for stream in streams:
            assert (stream.num_ends == 1) != (stream.error is not None)
        wait_until(lambda: (now := mesh.broker()) is not None and now.pid != old.pid, 30, "the broker is back")
        returned = time.monotonic()
        while True:
            probe = await Stream().read(client, "One and one is", 2)
            if probe.reason == "length":
                break
            assert time.monotonic() - returned < 10, f"no service: {probe.error}"
            await asyncio.sleep(0.2)
        assert time.monotonic() - returned < 12
        wait_until(lambda: is_whole(mesh), 30, "every role is listed again")

    assert pids == {i["instance_id"]: i["pid"] for i in mesh.instances()}  # nothing had to be restarted


async def test_a_bounded_queue_sheds_with_429_or_503_and_retry_after(mesh):
    async with client_of(mesh) as client:
        results = await asyncio.gather(
            *(client.completions.create(model="smollm2", prompt="x", max_tokens=8, temperature=0) for _ in range(200)), return_exceptions=True
        )
    refused = [r for r in results if isinstance(r, openai.APIStatusError)]
    other = [r for r in results if isinstance(r, BaseException) and not isinstance(r, openai.APIStatusError)]

    assert [] == other
    assert refused
    assert {429, 503} >= {r.status_code for r in refused}
    assert all(float(r.response.headers["retry-after"]) > 0 for r in refused)
    assert any(not isinstance(r, BaseException) for r in results)
