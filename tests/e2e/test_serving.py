"""The whole mesh on the real model, driven by the official client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import openai
import psutil
import pytest

from plugmesh import models
from plugmesh.testing.cluster import Cluster, running, wait_until

pytestmark = [pytest.mark.nats, pytest.mark.model, pytest.mark.timeout(300)]

SERVICES = ("gateway", "tokenizer", "grammar", "weightstore", "prefill", "decode", "kvstore")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    if models.find("smollm2") is None:
        pytest.skip("the default model is not here; plugmesh pull smollm2 fetches it")
    config = {
        "services": {
            "decode": {"dtype": "float32", "num_kv_blocks": 512, "remote_prefill_min_tokens": 64},
            "prefill": {"dtype": "float32", "num_kv_blocks": 256},
        }
    }
    with running(tmp_path_factory.mktemp("mesh"), config) as cluster:
        yield cluster


@pytest.fixture
def client(mesh):
    with openai.OpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=120) as c:
        yield c


def chat(client: openai.OpenAI, text: str, **kwargs):
    return client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": text}], **{"temperature": 0, "max_tokens": 32, **kwargs})


def test_status_lists_every_service_with_its_instance(mesh):
    rows = mesh.status()["instances"]

    assert set(SERVICES) == {r["role"] for r in rows}
    for row in rows:
        assert row["instance_id"]
        assert row["incarnation"]
        assert psutil.pid_exists(row["pid"])
        assert "ready" == row["state"]


def test_the_model_knows_the_capital_of_france(client):
    answer = chat(client, "What is the capital of France?")

    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streaming_gives_the_same_text_and_usage_as_one_answer(client):
    whole = chat(client, "Count from one to five.")
    parts, usage, reasons = [], None, []
    for chunk in chat(client, "Count from one to five.", stream=True, stream_options={"include_usage": True}):
        if chunk.usage:
            usage = chunk.usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            if choice.finish_reason:
                reasons.append(choice.finish_reason)

    assert whole.choices[0].message.content == "".join(parts)
    assert [whole.choices[0].finish_reason] == reasons
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)


async def test_32_concurrent_streaming_chats_finish_with_correct_usage(mesh):
    async with openai.AsyncOpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=240) as client:

        async def one(i: int) -> tuple[int, str]:
            stream = await client.chat.completions.create(
                model="smollm2", messages=[{"role": "user", "content": f"Tell me a fact about the number {i}."}], temperature=0, max_tokens=12,
                stream=True, stream_options={"include_usage": True}, logprobs=True,
            )  # fmt: skip
            num_tokens, reason, usage = 0, None, None
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    if choice.logprobs and choice.logprobs.content:
                        num_tokens += len(choice.logprobs.content)
            assert usage is not None
            assert usage.completion_tokens in (num_tokens, num_tokens + 1)  # an end token counts and has no text
            return usage.completion_tokens, reason

        results = await asyncio.gather(*(one(i) for i in range(32)))

    assert all(reason in ("stop", "length") for _, reason in results)
    assert all((n == 12) if reason == "length" else (1 <= n <= 12) for n, reason in results)


def test_a_seeded_request_repeats_and_n_choices_differ(client):
    kwargs = {"temperature": 1.0, "seed": 11, "n": 3, "max_tokens": 16}
    first = [c.message.content for c in chat(client, "Write a line of a poem.", **kwargs).choices]
    second = [c.message.content for c in chat(client, "Write a line of a poem.", **kwargs).choices]

    assert first == second
    assert len(set(first)) > 1


def test_a_stop_string_ends_the_text_before_it(client):
    free = chat(client, "Count from one to five.", max_tokens=24).choices[0].message.content
    word = free.split()[3]
    stopped = chat(client, "Count from one to five.", max_tokens=24, stop=[word]).choices[0]

    assert "stop" == stopped.finish_reason
    assert free[: free.index(word)] == stopped.message.content


def test_a_long_prompt_is_prefilled_remotely_while_others_decode_and_gives_the_same_tokens(mesh, client):
    prompt = " ".join(f"word{i}" for i in range(60)) + ". Which word comes first in this list?"
    decode = mesh.instances("decode")[0]
    before = mesh.metric(decode, "plugmesh_decode_prefills_total", mode="remote")
    with chat(client, "Write a very long story about a dragon.", stream=True, max_tokens=400) as background:
        next(iter(background))
        with_others = chat(client, prompt, max_tokens=12)
    remote = mesh.metric(decode, "plugmesh_decode_prefills_total", mode="remote") - before
    alone = chat(client, prompt, max_tokens=12)  # nobody else runs, and its own cache holds it: local

    assert 1 == remote
    assert alone.choices[0].message.content == with_others.choices[0].message.content
    assert alone.usage.prompt_tokens_details.cached_tokens > 0


def test_a_schema_and_a_tool_are_obeyed(client):
    answer = chat(client, "Is water wet?", temperature=1.0, response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": {
        "type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"], "additionalProperties": False}}})
    named = {"type": "function", "function": {"name": "set_level"}}
    call = chat(client, "Set the level to three.", temperature=1.0, tool_choice=named, tools=[{"type": "function", "function": {
        "name": "set_level", "parameters": {"properties": {"level": {"type": "integer", "minimum": 1, "maximum": 5}}, "required": ["level"], "additionalProperties": False}}}])

    assert json.loads(answer.choices[0].message.content)["wet"] in (True, False)
    (made,) = call.choices[0].message.tool_calls
    assert "set_level" == made.function.name
    assert 1 <= json.loads(made.function.arguments)["level"] <= 5


def test_models_health_and_metrics_answer(mesh, client):
    ids = [m.id for m in client.models.list().data]
    raw = psutil.Process(mesh.supervisor_pid)

    assert ids
    assert raw.is_running()
    assert 200 == client.with_options()._client.get(mesh.base_url.removesuffix("/v1") + "/health").status_code
    assert "plugmesh_" in client._client.get(mesh.base_url.removesuffix("/v1") + "/metrics").text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"extra_body": {"no_such_thing": 1}}, "no_such_thing"),
        ({"max_tokens": 100_000}, None),
    ],
)
def test_a_malformed_request_is_a_400_that_names_the_parameter(client, change, param):
    with pytest.raises(openai.BadRequestError) as info:
        chat(client, "hello", **change)

    assert info.value.body["message"]
    if param:
        assert param == info.value.body["param"]


def test_the_services_together_stay_under_3_gb_resident(mesh):
    rss = {p.pid: p.memory_info().rss - p.memory_info().shared for p in mesh.descendants()}
    shared = max((p.memory_info().shared for p in mesh.descendants()), default=0)
    total = sum(rss.values()) + shared  # the mapped weights are counted once

    assert total < 3e9, f"{total / 1e9:.2f} GB"


def test_ctrl_c_leaves_no_process_no_socket_no_shared_memory_and_no_folder(tmp_path):
    cluster = Cluster(tmp_path, {"services": {"decode": {"num_kv_blocks": 64}, "prefill": {"num_kv_blocks": 64}}})
    shm_before = set(os.listdir("/dev/shm"))
    cluster.start()
    processes = cluster.descendants()
    assert len(processes) >= len(SERVICES) + 1

    assert 0 == cluster.stop()
    assert [] == [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert set() == {n for n in set(os.listdir("/dev/shm")) - shm_before if "plugmesh" in n}
    assert [] == [p for p in (tmp_path / "xdg" / "plugmesh").rglob("*")]


def test_a_killed_supervisor_leaves_no_orphans(tmp_path):
    cluster = Cluster(tmp_path, {"services": {"decode": {"num_kv_blocks": 64}, "prefill": {"num_kv_blocks": 64}}})
    cluster.start()
    processes = cluster.descendants()
    os.kill(cluster.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 15, "orphans are gone")
    cluster.stop()


def test_plugmesh_run_answers_and_leaves_nothing_running(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PLUGMESH_")}
    (tmp_path / "xdg").mkdir(mode=0o700)
    env |= {"XDG_RUNTIME_DIR": str(tmp_path / "xdg"), "PLUGMESH_MESH__DATA_DIR": json.dumps(str(tmp_path / "data"))}
    out = subprocess.run(
        [sys.executable, "-m", "plugmesh.cli", "run", "What is the capital of France?"], env=env, capture_output=True, timeout=120, cwd=tmp_path, check=False,
    )  # fmt: skip

    assert 0 == out.returncode, out.stderr.decode()[-3000:]
    assert "Paris" in out.stdout.decode()
    leftovers = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("XDG_RUNTIME_DIR") == str(tmp_path / "xdg")]
    assert [] == leftovers
