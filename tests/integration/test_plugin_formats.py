"""A weight format and a KV codec of a plugin through the whole mesh: packed by the weightstore, loaded by prefill and decode, KV handed over as opaque blocks."""

from __future__ import annotations

import pathlib
import random
from collections.abc import AsyncIterator

import pytest

from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, InvalidRequest
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh.types import SamplingParams
from plugmesh.wire import sampling_to_pb
from plugmesh_decode import config as decode_config
from plugmesh_decode import service as decode_service
from plugmesh_engine import EngineConfig, EnginePlugins, EngineRequest, build_engine
from plugmesh_engine.testing import run_to_end
from plugmesh_engine.testing_plugins import half_rows, int8_rows, write_plugin
from plugmesh_kvstore import config as kv_config
from plugmesh_kvstore import service as kv_service
from plugmesh_prefill import config as prefill_config
from plugmesh_prefill import service as prefill_service
from plugmesh_proto.v1 import decode_pb2 as pb
from plugmesh_proto.v1 import decode_pb2_grpc
from plugmesh_weightstore import config as weights_config
from plugmesh_weightstore import service as weights_service
from plugmesh_weightstore.testing import VOCAB, write_gguf

PLUGINS = {"rows": {"variant": "test"}}
EVERYWHERE = ("weightstore", "prefill", "decode")


class Rig:
    """Weightstore, kvstore, prefill and decode; `loaded` says which of them have the plugin, `formats` which ask for its format."""

    def __init__(self, mesh: LocalMesh, folder: pathlib.Path) -> None:
        self.mesh, self.folder = mesh, folder

    async def add(self, role: str, *, format: str = "int8-rows") -> object:
        common = {"executor": "torch", "num_threads": 1, "weight_format": format}
        makers = {
            "weightstore": (weights_service.create, weights_config.Settings(pull=False)),
            "kvstore": (kv_service.create, kv_config.Settings(arena_bytes=1 << 22, arena_dir=self.folder, disk_bytes=0)),
            "prefill": (prefill_service.create, prefill_config.Settings(max_tokens_per_step=32, num_kv_blocks=64, **common)),
            "decode": (decode_service.create, decode_config.Settings(num_kv_blocks=64, remote_prefill_timeout_s=0.5, **common)),
        }
        create, settings = makers[role]
        return (await self.mesh.host(role, create, settings=settings)).service

    async def generate(self, ids: list[int], *, remote: bool) -> tuple[list[int], pb.TokenRow, str]:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        mode = pb.GenerateRequest.PREFILL_REMOTE if remote else pb.GenerateRequest.PREFILL_LOCAL
        request = pb.GenerateRequest(request_id=f"r{len(ids)}-{remote}", token_ids=ids, sampling=sampling_to_pb(params), prefill_mode=mode)
        stub = decode_pb2_grpc.DecodeStub(self.mesh.channel("decode"))
        rows = [row async for frame in stub.Generate(request, timeout=60) for row in frame.rows]
        assert not [r for r in rows if r.HasField("error")], rows
        return [t.token_id for r in rows for t in r.tokens], rows[-1], rows[0].prefill


def config(folder: pathlib.Path, loaded: tuple[str, ...]) -> MeshConfig:
    mesh = {"data_dir": folder, "cache_dir": folder, "model": str(folder / "model.gguf")}
    return MeshConfig(mesh=mesh, services={s: {"plugins": ["rows"]} for s in loaded}, plugins=PLUGINS)


@pytest.fixture
async def start(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[object]:
    monkeypatch.syspath_prepend(str(write_plugin(tmp_path)))
    write_gguf(tmp_path / "model.gguf", "Q8_0", layers=2)
    meshes: list[LocalMesh] = []

    async def run(*loaded: str) -> Rig:
        mesh = LocalMesh(config(tmp_path, loaded))
        await mesh.__aenter__()
        meshes.append(mesh)
        rig = Rig(mesh, tmp_path)
        await rig.add("weightstore")
        await rig.add("kvstore")
        return rig

    yield run
    for mesh in meshes:
        await mesh.__aexit__(None, None, None)


def prompt(n: int) -> list[int]:
    rng = random.Random(n)
    return [rng.randrange(VOCAB) for _ in range(n)]


async def test_kv_of_the_codec_goes_from_prefill_to_decode_and_gives_the_tokens_of_one_engine(start) -> None:
    rig = await start(*EVERYWHERE)
    decode, _ = await rig.add("decode"), await rig.add("prefill")
    settings = EngineConfig(executor="torch", dtype="float32", num_blocks=64)
    alone = build_engine(decode._manifest, settings, EnginePlugins(weight_format=int8_rows("test"), kv_codec=half_rows()))
    ids = prompt(100)
    want = run_to_end(alone, EngineRequest("r", tuple(ids), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))["r"][0]
    tokens, last, mode = await rig.generate(ids, remote=True)
    imported = (await decode.generator.driver.call(lambda e: e.stats())).num_imported_tokens
    local, _, _ = await rig.generate(prompt(60), remote=False)

    assert (tokens, mode) == (want, "remote")
    assert imported >= 96
    assert alone.layout == decode._engine.layout
    assert decode._engine.layout.codec.startswith("half-rows@int8-rows-")
    assert len(local) == 8
    assert decode._manifest.format == "int8-rows"
    assert last.usage.prompt_tokens == 100


@pytest.mark.parametrize("prefill_has", ["another weight format", "no codec"])
async def test_blocks_of_another_form_are_never_exchanged(start, prefill_has: str) -> None:
    """Without the checks of the configuration: the job is refused, and decode computes the prompt itself."""
    rig = await start("weightstore", "decode", *(["prefill"] if prefill_has == "another weight format" else []))
    decode, prefill = await rig.add("decode"), await rig.add("prefill", format="")
    tokens, _, mode = await rig.generate(prompt(100), remote=True)
    again, _, _ = await rig.generate(prompt(100), remote=False)
    stats = await decode.generator.driver.call(lambda e: e.stats())

    assert prefill._engine.layout.key() != decode._engine.layout.key()
    assert (tokens, mode) == (again, "fallback")
    assert stats.num_imported_tokens == 0


async def test_a_format_that_somebody_lacks_stops_the_start_with_its_name(start) -> None:
    rig = await start("decode")
    with pytest.raises(InvalidRequest, match=r"unknown format 'int8-rows'; there are source, .*native\."):
        await rig.add("decode")
    with pytest.raises(ConfigError, match=r"services\.prefill\.weight_format: .*'int8-rows'; there are: none"):
        await rig.add("prefill")
