"""GRPO whose responses come from decode instances of a mesh, which are given every step's weights: real weightstore, real engines, in this process."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import pathlib
import time
from collections.abc import AsyncIterator

import pytest

import plugmesh_kernels
from plugmesh.client import DecodeClient
from plugmesh.client.decode import Resumed
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_decode.generate import Generator
from plugmesh_engine import Engine
from plugmesh_prefill import config as prefill_config
from plugmesh_prefill import service as prefill_service
from plugmesh_proto.v1 import weightstore_pb2, weightstore_pb2_grpc
from plugmesh_rollout.loop import workers
from plugmesh_rollout.loop.export import export_run
from plugmesh_rollout.loop.folder import RunFolder
from plugmesh_rollout.loop.policy import Policy
from plugmesh_rollout.loop.publish import Publisher, published_of
from plugmesh_rollout.loop.run import run_in_process
from plugmesh_rollout.loop.settings import Settings, checked
from plugmesh_weightstore import config as store_config
from plugmesh_weightstore import service as store_service

pytestmark = pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_position": 64}
DECODE = {"executor": "native", "num_kv_blocks": 256, "num_threads": 1, "use_kvstore": False}


def settings_of(folder: pathlib.Path, swap: str = "continue", staleness: int = 1, **parts) -> Settings:
    base = {
        "run": {"folder": str(folder / "run"), "steps": 4, "eval_every": 0, "eval_examples": 5, "plugins": ["asyncflow"]},
        "model": TINY, "task": {"name": "copy"}, "reward": {"name": "partial"},
        "workflow": {"name": "asyncflow", "options": {"staleness": staleness, "policy": "weight_fifo"}},
        "rollout": {"backend": "mesh", "swap": swap, "group_size": 3, "groups_per_step": 4, "groups_at_once": 4, "max_tokens": 40},
        "trainer": {"lr": 1e-3},
    }  # fmt: skip
    for part, values in parts.items():
        base[part] = {**base.get(part, {}), **values}
    return checked(base)


@contextlib.asynccontextmanager
async def a_mesh(folder: pathlib.Path, settings: Settings, num_decode: int = 1) -> AsyncIterator[LocalMesh]:
    async with LocalMesh(MeshConfig(mesh={"data_dir": folder / "data", "cache_dir": folder / "cache", "model": "base"})) as mesh:
        if not (folder / "model").exists():
            export_run(settings, folder / "model")
        await mesh.host("weightstore", store_service.create, settings=store_config.Settings(allowed_roots=(folder,), pull=False))
        stub = weightstore_pb2_grpc.WeightStoreStub(mesh.channel("weightstore"))
        async for _ in stub.Import(weightstore_pb2.ImportRequest(path=str(folder / "model"), model="base", make_default=True)):
            pass
        for _ in range(num_decode):
            await a_decode(mesh)
        yield mesh


async def a_decode(mesh: LocalMesh):
    return await mesh.host("decode", decode_service.create, settings=decode_config.Settings(**DECODE))


class Watched:
    """What the engines of the decode services made, by the version that was in force in that step, and what was trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, watches_swaps: bool = False) -> None:
        self.is_publishing = False
        self.made: dict[tuple[str, int], list[tuple[str, int]]] = collections.defaultdict(list)  # by request and sequence: version, token
        self.trained: dict[str, tuple[list[int], list[int]]] = {}  # by row: tokens, versions
        on_step, step = Generator._on_step, workers._step

        def listen(generator, output, blocks):
            for event in output.tokens:
                self.made[event.request_id, event.sequence] += [(output.weight_version, t.token_id) for t in event.tokens]
            on_step(generator, output, blocks)

        def train(trainer, batch, staleness):
            for row in batch.rows:
                assert row.id not in self.trained, "trained twice"
                self.trained[row.id] = row.fields["response_ids"].tolist(), row.fields["versions"].tolist()
            self.is_publishing = watches_swaps
            return step(trainer, batch, staleness)

        def slowly(engine, inner=Engine.step):
            time.sleep(0.1 if self.is_publishing else 0.005)  # so that swaps come while sequences run
            return inner(engine)

        async def publish(publisher, number, inner=Publisher._publish):
            await inner(publisher, number)
            self.is_publishing = False

        monkeypatch.setattr(Publisher, "_publish", publish)
        monkeypatch.setattr(Engine, "step", slowly)
        monkeypatch.setattr(Generator, "_on_step", listen)
        monkeypatch.setattr(workers, "_step", train)


def lines(settings: Settings, worker: str = "trainer-0") -> list[dict]:
    return [json.loads(x) for x in (settings.run.folder / "figures" / f"{worker}.jsonl").read_text().splitlines()]


def worst_lag(settings: Settings) -> int:
    return max(int(lag) for line in lines(settings) for lag in line.get("lags", {}))


@pytest.mark.parametrize("swap", ["continue", pytest.param("finish", marks=pytest.mark.slow), pytest.param("abort", marks=pytest.mark.slow)])
async def test_tokens_have_the_versions_that_the_instances_served_and_the_last_weights_are_the_trainers(tmp_path, monkeypatch, swap):
    """With two instances. Requests that run while weights come are made by several versions, unless each may end first."""
    settings, watched = settings_of(tmp_path, swap), Watched(monkeypatch, watches_swaps=swap != "finish")
    async with a_mesh(tmp_path, settings, num_decode=2) as mesh:
        trainer = await run_in_process(settings, fleet=mesh)

        published = published_of(RunFolder(settings.run.folder))
        made = collections.Counter(tuple((published.number_of(v), t) for v, t in tokens) for tokens in watched.made.values())
        trained = collections.Counter(tuple(zip(versions, tokens, strict=True)) for tokens, versions in watched.trained.values())
        assert 4 * settings.batch_rows == trained.total()
        assert trained <= made
        assert 2 <= len({v for row in trained for v, _ in row})
        assert any(len({v for v, _ in row}) > 1 for row in trained) == (swap != "finish")
        assert worst_lag(settings) <= 1

        policy = Policy(trainer.model.config, max_sequences=4, max_len=64)
        policy.load(4, trainer.model.arrays())
        prompts = [[1, 5, 8, 30], [1, 40, 41, 42, 43]]
        newest = published.newest()
        assert newest is not None and newest.number == 4
        for info in mesh.instances("decode"):
            said = [await DecodeClient(mesh.direct_channel(info)).generate(p, temperature=0.0, max_tokens=12) for p in prompts]
            assert policy.greedy(prompts, 12) == [g.token_ids() for g in said]
            assert {newest.name} == {v for g in said for v in g.weight_versions[0]}
        policy.close()


@pytest.mark.slow
async def test_an_instance_that_is_gone_costs_nothing_and_is_swapped_before_it_is_asked_again(tmp_path, monkeypatch):
    settings, watched = settings_of(tmp_path, "continue", run={"steps": 6}), Watched(monkeypatch)
    async with a_mesh(tmp_path, settings) as mesh:

        async def disturb() -> None:
            while len(watched.trained) < 2 * settings.batch_rows or not any(i.load.get("num_running") for i in mesh.instances("decode")):
                await asyncio.sleep(0.002)
            await mesh.kill(mesh.instances("decode")[0].instance_id)
            await asyncio.sleep(0.1)
            await a_decode(mesh)  # begins with the weights of the start, which are too old by now

        disturbing = asyncio.create_task(disturb())
        await asyncio.wait_for(run_in_process(settings, fleet=mesh), 60)
        await disturbing

    assert {f"{g:08d}/{i}" for g in range(24) for i in range(3)} == set(watched.trained)
    assert worst_lag(settings) <= 1
    assert lines(settings, "rollout-0")[-1]["moved"] > 0


async def test_a_resumed_stream_ends_as_the_undisturbed_one(tmp_path):
    settings = settings_of(tmp_path)
    async with a_mesh(tmp_path, settings, num_decode=2) as mesh:
        one, other = (DecodeClient(mesh.direct_channel(i)) for i in mesh.instances("decode"))
        sampling = {"temperature": 1.0, "seed": 7, "max_tokens": 30, "num_sequences": 3, "logprobs": True}
        whole = await one.generate([1, 5, 9], **sampling)
        begun = [Resumed(s[: 3 + i]) for i, s in enumerate(whole.token_ids(i) for i in range(3))]
        rest = [list(b.token_ids) for b in begun]
        async for piece in other.stream([1, 5, 9], resume=begun, **sampling):
            assert not piece.tokens or piece.index == len(rest[piece.sequence])
            rest[piece.sequence] += [t.token_id for t in piece.tokens]

    assert [whole.token_ids(i) for i in range(3)] == rest


async def test_meshes_that_cannot_serve_a_run_are_refused_at_its_start(tmp_path):
    settings = settings_of(tmp_path)
    pinned = settings_of(tmp_path, "finish", workflow={"options": {"preset": "one_step_off"}})
    with pytest.raises(ConfigError, match="pins"):
        await run_in_process(pinned, fleet=None)
    with pytest.raises(ConfigError, match="pins"):
        await run_in_process(settings_of(tmp_path, "abort", workflow={"options": {"preset": "one_step_off"}}, rollout={"backend": "engine", "swap": "abort"}))
    (tmp_path / "run" / "run.json").unlink()
    async with a_mesh(tmp_path, settings, num_decode=0) as mesh:
        with pytest.raises(ConfigError, match="no decode"):
            await run_in_process(settings, fleet=mesh)
        await a_decode(mesh)
        other = settings_of(tmp_path, model={**TINY, "num_layers": 2}, run={"folder": str(tmp_path / "other")})
        with pytest.raises(ConfigError, match="num_layers"):
            await run_in_process(other, fleet=mesh)
        await mesh.host("prefill", prefill_service.create, settings=prefill_config.Settings(executor="native", num_threads=1, num_kv_blocks=64))
        with pytest.raises(ConfigError, match=r"services\.prefill\.replicas"):
            await run_in_process(settings, fleet=mesh)
