"""What a run has published, and instances that come, go and disagree."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from plugmesh.errors import AlreadyExists, ConfigError, FailedPrecondition, InvalidRequest, NotFound
from plugmesh.types import InstanceInfo
from plugmesh_engine.testing import random_weights
from plugmesh_proto.v1 import decode_pb2, decode_pb2_grpc
from plugmesh_rollout.loop import backends, tasks
from plugmesh_rollout.loop.backends import MeshBackend
from plugmesh_rollout.loop.export import export_run, tokenizer, write_folder
from plugmesh_rollout.loop.fleet import Addresses, connect
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.policy import Policy
from plugmesh_rollout.loop.publish import Decoders, Published, Version
from plugmesh_rollout.loop.settings import ModelPart, RolloutPart, checked


@settings_of_hypothesis(max_examples=40)
@given(steps=st.lists(st.sampled_from("abcd"), max_size=12), kept=st.integers(0, 12))
def test_a_name_stands_for_its_newest_number_and_a_checkpoint_forgets_what_came_after_it(tmp_path_factory, steps, kept):
    path = tmp_path_factory.mktemp("p") / "published.json"
    writer, reader = Published(path), Published(path)
    for number, name in enumerate(steps):
        writer.add(Version(number, name))
        assert reader.newest() == Version(number, name)
    assert [reader.number_of(n) for n in "abcd"] == [max((i for i, x in enumerate(steps) if x == n), default=None) for n in "abcd"]
    Published(path).forget_after(kept)
    assert reader.all() == [Version(i, n) for i, n in enumerate(steps) if i <= kept]


class Decode(decode_pb2_grpc.DecodeServicer):
    """An instance that answers with one token per version of a script, and notes its swaps."""

    def __init__(self, serves: str) -> None:
        self.serves = serves
        self.swaps: list[str] = []
        self.asked: list[decode_pb2.GenerateRequest] = []
        self.script: list[str] = []  # names in place of the one that is served, by request
        self.fail: FailedPrecondition | None = None

    async def Status(self, request, context):
        return decode_pb2.DecodeStatus(weight_version=self.serves)

    async def SwapWeights(self, request, context):
        if self.fail:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(self.fail))
        self.serves = request.version
        self.swaps.append(request.version)
        return decode_pb2.SwapWeightsReply(new_version=request.version)

    async def Generate(self, request, context):
        self.asked.append(request)
        name = self.script.pop(0) if self.script else self.serves
        before = len(request.resume[0].token_ids) if request.resume else 0
        for i in range(before, request.sampling.max_tokens):
            row = decode_pb2.TokenRow(sequence=0, index=i, tokens=[{"token_id": 10 + i, "logprob": -1.0}], weight_version=name if i == before else "")
            if name == "dies" or (name.startswith("dies after ") and i == int(name.split()[-1])):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            if name.startswith("dies after "):
                row.weight_version = self.serves if i == before else ""
            row.request_done = i + 1 == request.sampling.max_tokens
            row.finish_reason = "FINISH_REASON_LENGTH" if row.request_done else 0
            yield decode_pb2.TokenFrame(rows=[row])


@pytest.fixture
async def fleet():
    """Real gRPC servers of two scripted instances, and an address where nobody is."""
    servers, services = [], []
    for serves in ("base", "base"):
        server, service = grpc.aio.server(), Decode(serves)
        decode_pb2_grpc.add_DecodeServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append((server, f"127.0.0.1:{port}"))
        services.append(service)
    addresses = Addresses({"decode": [a for _, a in servers]})
    yield addresses, services
    await addresses.close()
    for server, _ in servers:
        await server.stop(0)


def published_in(folder, *names: str) -> Published:
    published = Published(folder / "published.json")
    for number, name in enumerate(names):
        published.add(Version(number, name))
    return published


async def test_instances_are_brought_to_the_newest_weights_once_and_the_gone_one_is_left_out(fleet, tmp_path):
    addresses, services = fleet
    published = published_in(tmp_path, "v0", "v1")
    addresses._infos["decode"].append(InstanceInfo("decode", "gone", "", "127.0.0.1:1", "", 0))
    decoders = Decoders(addresses, published, "continue")
    services[1].serves = "v1"
    replies = await decoders.bring(Version(1, "v1"))

    assert (["v1"], []) == (services[0].swaps, services[1].swaps)
    assert 1 == len(replies)
    assert 2 == len(decoders.serving(1)) and not decoders.serving(2)
    published.add(Version(2, "v2"))
    await asyncio.gather(*(decoders.bring(Version(2, "v2")) for _ in range(4)))
    assert (["v1", "v2"], ["v2"]) == (services[0].swaps, services[1].swaps)
    services[0].fail = FailedPrecondition("another shape")
    published.add(Version(3, "v3"))
    with pytest.raises(FailedPrecondition, match="another shape"):
        await decoders.bring(Version(3, "v3"))


async def test_tokens_of_older_or_foreign_weights_are_thrown_away_and_the_rest_goes_on_where_it_was(fleet, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "RETRY_S", 0.005)
    addresses, services = fleet
    decoders = Decoders(addresses, published_in(tmp_path, "v0", "v1"), "continue")
    backend = MeshBackend(decoders)
    await backend.load(1, {})
    assert 1 == backend.version
    for service in services:
        service.script = ["v0", "of another run", "dies", "dies after 3"]
    [sample] = await backend.generate("g", [1, 2], 1, 5, max_tokens=6)

    assert [10, 11, 12, 13, 14, 15] == sample.token_ids.tolist()
    assert [1] * 6 == sample.versions.tolist()
    asked = services[0].asked + services[1].asked
    assert all(r.prefill_mode == decode_pb2.GenerateRequest.PREFILL_LOCAL and r.sampling.logprobs for r in asked)
    assert [10, 11, 12] in [list(r.resume[0].token_ids) for r in asked if r.resume]
    assert backend.num_moved >= 3
    await backend.close()


async def test_lengths_are_asked_for_as_they_were_drawn(fleet, tmp_path):
    addresses, _ = fleet
    backend = MeshBackend(Decoders(addresses, published_in(tmp_path, "v0"), "finish"))
    await backend.load(0, {})
    samples = await backend.generate("g", [1, 2], 3, 5, max_tokens=99, lengths=[2, 5, 3])
    await backend.close()

    assert [2, 5, 3] == [len(s.token_ids) for s in samples]


async def test_half_an_address_or_a_mesh_that_does_not_run_is_a_mistake_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="weightstore"):
        await connect(RolloutPart(backend="mesh", address="127.0.0.1:1"))
    with pytest.raises(ConfigError, match="plugmesh up"):
        await connect(RolloutPart(backend="mesh"))


TINY = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_position": 64}


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_policies_that_go_on_under_new_weights_say_which_made_each_token(executor):
    """Against a policy that had only the first weights, and one whose every sequence ends under the weights that it began with."""
    config = ModelPart(**TINY).config()
    old, new = (random_weights(config, seed) for seed in (1, 2))
    found = {}
    for swap in ("finish", "continue", "abort", "never"):
        policy = Policy(config, executor=executor, max_len=64, swap="finish" if swap == "never" else swap)
        policy.load(0, old)
        policy.add("a", [1, 5, 9], 3, 7, max_tokens=40, lengths=[40, 40, 40])
        for _ in range(11):
            assert not policy.step()
        if swap != "never":
            policy.load(1, new)
        [(_, _, found[swap])] = policy.run(60)
        assert 1 == len(policy._engines) or swap == "finish"
        policy.close()

    for swap in ("continue", "abort"):
        for sample, undisturbed in zip(found[swap], found["never"], strict=True):
            num_old = int((sample.versions == 0).sum())
            assert 10 <= num_old <= 11 and [0] * num_old + [1] * (40 - num_old) == sample.versions.tolist()
            assert undisturbed.token_ids[:num_old].tolist() == sample.token_ids[:num_old].tolist()
            assert undisturbed.token_ids.tolist() != sample.token_ids.tolist()
    assert all(np.array_equal(a.token_ids, b.token_ids) and not a.versions.any() for a, b in zip(found["finish"], found["never"], strict=True))


def test_an_idle_engine_takes_new_weights_and_says_what_a_new_one_says():
    config = ModelPart(**TINY).config()
    policy, fresh = Policy(config, max_len=64), Policy(config, max_len=64)
    engines = []
    for version in range(3):
        policy.load(version, random_weights(config, version))
        engines += policy._engines.values()
        policy.add(f"g{version}", [1, 5, 9], 4, 3, max_tokens=20)
        [(_, _, samples)] = policy.run(60)
    fresh.load(2, random_weights(config, 2))
    fresh.add("g", [1, 5, 9], 4, 3, max_tokens=20)
    [(_, _, expected)] = fresh.run(60)

    assert 3 == len(engines) and 1 == len(set(map(id, engines)))
    assert all(np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs) for a, b in zip(samples, expected, strict=True))
    policy.close()
    fresh.close()


@settings_of_hypothesis(max_examples=40)
@given(text=st.text(alphabet=[tasks.decode([i]) for i in range(3, tasks.VOCAB_SIZE)], max_size=40))
def test_the_exported_tokenizer_is_the_tasks_own(text):
    assert tasks.encode(text) == Tokenizer.from_str(json.dumps(tokenizer())).encode(text, add_special_tokens=False).ids


def test_an_exported_folder_holds_the_version_asked_for_and_nothing_is_overwritten(tmp_path):
    settings = checked({"run": {"folder": str(tmp_path / "run")}, "model": TINY, "task": {"name": "copy"}})
    assert 0 == export_run(settings, tmp_path / "a")
    run = RunFolder(settings.run.folder)
    config, tensors = run.load_weights(0)
    run.save_weights(3, config, {n: a + 1 for n, a in tensors.items()})
    assert 3 == export_run(settings, tmp_path / "b")

    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert all(np.array_equal(a[n], tensors[n]) and np.array_equal(b[n], tensors[n] + 1) for n in tensors)
    with pytest.raises(AlreadyExists):
        export_run(settings, tmp_path / "a")
    with pytest.raises(NotFound, match="0, 3"):
        export_run(settings, tmp_path / "c", 2)
    with pytest.raises(InvalidRequest):
        write_folder(tmp_path / "c", dataclasses.replace(config, vocab_size=999), tensors)
