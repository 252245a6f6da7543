"""The service over real gRPC: every RPC, its limits, and how it gets its default model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prometheus_client
import pytest
from structlog.testing import capture_logs

from plugmesh import models, wire
from plugmesh.config import MeshConfig, MeshSettings
from plugmesh.errors import (
    ConfigError,
    CorruptModelFile,
    InvalidRequest,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unavailable,
)
from plugmesh.host import PluginHost
from plugmesh.mesh.api import ServiceContext
from plugmesh.mesh.hostid import host_id
from plugmesh.mesh.rpc.interceptor import ErrorInterceptor
from plugmesh.types import ModelConfig
from plugmesh_proto.v1 import weightstore_pb2 as pb
from plugmesh_proto.v1 import weightstore_pb2_grpc as rpc
from plugmesh_weightstore import service as service_module
from plugmesh_weightstore.config import Settings
from plugmesh_weightstore.pack import from_bfloat16
from plugmesh_weightstore.service import WeightStoreService, create
from plugmesh_weightstore.testing import hf_weights, write_gguf

Start = Callable[..., Any]


class Running:
    def __init__(self, service: WeightStoreService, stub: rpc.WeightStoreStub, registry: prometheus_client.CollectorRegistry) -> None:
        self.service, self.stub, self.registry = service, stub, registry

    async def resolve(self, model: str = "", format: str = "", **kwargs: Any) -> pb.ModelManifest:
        with typed():
            return await self.stub.Resolve(pb.ResolveRequest(model=model, format=format, **kwargs), timeout=60)

    async def load(self, path: Path | str, model: str = "", **kwargs: Any) -> list[pb.ImportProgress]:
        with typed():
            return [p async for p in self.stub.Import(pb.ImportRequest(path=str(path), model=model, **kwargs), timeout=60)]

    async def read(self, sha256: str, offset: int = 0, length: int = 0) -> list[pb.BlobPiece]:
        with typed():
            return [p async for p in self.stub.ReadBlob(pb.ReadBlobRequest(sha256=sha256, offset=offset, length=length), timeout=60)]

    async def remove(self, model: str) -> int:
        with typed():
            return (await self.stub.Remove(pb.RemoveModelRequest(model=model), timeout=60)).freed_bytes

    async def names(self) -> list[str]:
        return [m.model for m in (await self.stub.ListModels(pb.ListModelsRequest(), timeout=60)).models]


@contextlib.contextmanager
def typed():
    """Errors of the wire as the client library sees them."""
    try:
        yield
    except grpc.aio.AioRpcError as e:
        raise wire.error_from_rpc(e) from e


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(model="", **settings)` runs a weightstore below the test's folder, which is an allowed root."""
    async with contextlib.AsyncExitStack() as stack:

        async def run(model: str = "", **settings: Any) -> Running:
            mesh = MeshSettings(model=model, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
            registry = prometheus_client.CollectorRegistry()
            settings = {"allowed_roots": (tmp_path,), "pull": False} | settings
            config = MeshConfig(mesh=mesh)
            plugins = PluginHost.load([], config, service="weightstore")
            service = create(ServiceContext("weightstore", None, config, Settings(**settings), plugins, registry))  # type: ignore[arg-type]
            stack.push_async_callback(service.stop)
            await service.start()
            server = grpc.aio.server(interceptors=[ErrorInterceptor()])
            port = server.add_insecure_port("127.0.0.1:0")
            for b in service.bindings():
                b.add_to_server(b.servicer, server)
            await server.start()
            stack.push_async_callback(server.stop, None)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            return Running(service, rpc.WeightStoreStub(channel), registry)

        yield run


def mapped(t: pb.TensorEntry) -> np.ndarray:
    """What a reader on the same host does with an entry of a manifest."""
    raw = np.memmap(t.path, np.uint8, mode="r", offset=t.offset, shape=(t.num_bytes,))
    return (from_bfloat16(raw.view(np.uint16)) if t.dtype == "bfloat16" else raw.view(t.dtype)).reshape(tuple(t.shape))


async def test_a_manifest_leads_a_reader_on_this_host_to_the_tensors(start: Start, make_hf: Callable[..., Path]) -> None:
    ws = await start()
    progress = await ws.load(make_hf(), model="tiny")
    assert progress[-1].phase == "done" and progress[-1].model.model == "tiny"
    assert progress[-1].model.num_parameters == sum(w.size for w in hf_weights().values())

    manifest = await ws.resolve("tiny", "float32")

    assert (manifest.host, manifest.format, manifest.architecture, manifest.model) == (host_id(), "float32", "llama", "tiny")
    assert manifest.version == progress[-1].model.version
    assert ModelConfig.from_json(manifest.config_json).rope_style == "half"
    found = {t.name: mapped(t) for t in manifest.tensors}
    assert found.keys() == hf_weights().keys()
    assert all(np.array_equal(found[n], w) for n, w in hf_weights().items())
    assert all(t.offset % 64 == 0 and not os.stat(t.path).st_mode & 0o222 for t in manifest.tensors)
    assets = {a.name: a for a in manifest.assets}
    assert json.loads(assets["tokenizer.json"].data)["version"] == "1.0"
    assert assets["chat_template.jinja"].data == b"{{ x }}"


async def test_tokenizer_only_packs_nothing_and_large_assets_go_by_reference(start: Start, make_gguf: Callable[..., Path]) -> None:
    ws = await start(inline_asset_bytes=100)
    await ws.load(make_gguf())

    manifest = await ws.resolve(format="bfloat16", tokenizer_only=True)

    assert len(manifest.tensors) == 0
    assert (await ws.stub.ListModels(pb.ListModelsRequest())).models[0].formats == ["source"]
    assets = {a.name: a for a in manifest.assets}
    large = assets["tokenizer.gguf.json"]
    assert not large.data and assets["chat_template.jinja"].data == b"{{ messages }}"
    content = Path(large.path).read_bytes()
    assert len(content) == large.num_bytes and json.loads(content)["tokenizer.ggml.model"] == "gpt2"
    assert b"".join(p.data for p in await ws.read(large.sha256)) == content


async def test_ranges_of_a_blob_come_in_pieces_and_bad_ranges_are_refused(start: Start, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PIECE_BYTES", 1000)
    ws = await start()
    await ws.load(make_gguf("F32"))
    entry = max((await ws.resolve()).tensors, key=lambda t: t.num_bytes)
    content, size = Path(entry.path).read_bytes(), entry.num_bytes

    for offset, length in ((0, 0), (1, 0), (999, 2), (1000, 1000), (size - 1, 1), (size, 0), (0, size)):
        pieces = await ws.read(entry.sha256, offset, length)
        assert b"".join(p.data for p in pieces) == content[offset : offset + length if length else size]
        assert [p.offset for p in pieces] == list(range(offset, offset + (length or size - offset), 1000))
    for offset, length, param in ((-1, 0, "offset"), (size + 1, 0, "offset"), (1 << 62, 0, "offset"), (0, -1, "length"), (0, size + 1, "length"), (5, size - 4, "length")):
        with pytest.raises(InvalidRequest) as e:
            await ws.read(entry.sha256, offset, length)
        assert e.value.param == param
    for name in ("", "0" * 64, "../../etc/passwd", "x" * 1000):
        with pytest.raises(NotFound):
            await ws.read(name)


async def test_a_reader_who_leaves_frees_its_slot(start: Start, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PIECE_BYTES", 100)
    ws = await start(max_readers=1)
    await ws.load(make_gguf("F32"))
    entry = max((await ws.resolve()).tensors, key=lambda t: t.num_bytes)
    call = ws.stub.ReadBlob(pb.ReadBlobRequest(sha256=entry.sha256))
    await call.read()

    with pytest.raises(Overloaded) as e:
        await ws.read(entry.sha256)
    assert e.value.retry_after_s > 0
    call.cancel()
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(Overloaded):
                assert len(await ws.read(entry.sha256, 0, 100)) == 1
                break
            await asyncio.sleep(0.01)


async def test_bad_imports_are_typed_and_change_nothing(start: Start, make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    ws = await start(allowed_roots=(tmp_path / "models",))
    (tmp_path / "models").mkdir()
    good = make_gguf()
    bad = tmp_path / "models" / "bad.gguf"
    bad.write_bytes(good.read_bytes()[:-10])
    shutil.copy(good, tmp_path / "models" / "good.gguf")

    with pytest.raises(CorruptModelFile) as e:
        await ws.load(bad)
    assert (e.value.file, e.value.field) == ("bad.gguf", "tensors[10].offset")
    for path, error in ((good, PermissionDenied), ("/etc/passwd", PermissionDenied), (tmp_path / "models/none", NotFound), ("", InvalidRequest)):
        with pytest.raises(error):
            await ws.load(path)
    with pytest.raises(InvalidRequest):
        await ws.load(tmp_path / "models" / "good.gguf", model="not a name")

    assert await ws.names() == []
    with pytest.raises(NotFound):
        await ws.resolve()


async def test_more_imports_than_allowed_are_refused(start: Start, make_gguf: Callable[..., Path]) -> None:
    ws = await start(max_imports=1)
    path = make_gguf("F32", layers=4)
    results = await asyncio.gather(*(ws.load(path) for _ in range(4)), return_exceptions=True)

    refused = [r for r in results if isinstance(r, Overloaded)]
    assert 1 <= len(refused) <= 3 and all(isinstance(r, list | Overloaded) for r in results)
    assert len(await ws.names()) == 1


async def test_an_import_whose_client_leaves_is_given_up_and_swept(start: Start, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_PROGRESS_S", 0.001)
    ws = await start()
    store, loop = ws.service.blobs, asyncio.get_running_loop()
    reached, left = asyncio.Event(), threading.Event()
    real = type(store).put

    def put(self: Any, pieces: Any) -> Any:  # holds the import in the middle until the client is gone
        loop.call_soon_threadsafe(reached.set)
        left.wait(30)
        return real(self, pieces)

    monkeypatch.setattr(type(store), "put", put)
    call = ws.stub.Import(pb.ImportRequest(path=str(make_gguf("F32"))))
    reading = asyncio.create_task(call.read())
    async with asyncio.timeout(30):
        await reached.wait()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await reading
        # The servicer hears of it, then the thread may go on.
        while not all(stop.is_set() for stop in ws.service._imports.values()):
            await asyncio.sleep(0.005)
        left.set()
        while ws.service._imports or store.usage() != (0, 0) or list(store.temporary.iterdir()):
            await asyncio.sleep(0.005)

    assert await ws.names() == []


async def test_removing_frees_bytes_and_readers_keep_theirs(start: Start, make_gguf: Callable[..., Path]) -> None:
    ws = await start()
    await ws.load(make_gguf("Q8_0", seed=0), model="one")
    await ws.load(make_gguf("Q8_0", seed=1), model="two")
    manifest = await ws.resolve("one", "bfloat16")
    kept = mapped(manifest.tensors[0])
    before = kept.copy()

    freed = await ws.remove("one")

    assert freed >= sum(t.num_bytes for t in manifest.tensors)
    assert np.array_equal(kept, before)
    assert not os.path.exists(manifest.tensors[0].path)
    assert await ws.names() == ["two"]
    assert len((await ws.resolve("two", "bfloat16")).tensors) == 11
    with pytest.raises(NotFound):
        await ws.remove("one")
    with pytest.raises(InvalidRequest):
        await ws.remove("")


async def test_a_configured_path_becomes_the_default_and_is_read_once(start: Start, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_gguf()
    first = await start(model=str(path), allowed_roots=())
    manifest = await first.resolve()
    assert manifest.model == "tiny-model"
    assert (await first.resolve(str(path))).version == manifest.version  # the name in the configuration works as a name
    assert first.service.describe() == {"roles": ("weightstore",), "model": "tiny-model", "weight_version": manifest.version}
    await first.service.stop()

    with capture_logs() as logs:
        second = await start(model=str(path))

    assert not [e for e in logs if e["event"] == "weightstore.imported"]
    assert (await second.resolve()).version == manifest.version


async def test_an_import_can_become_the_default(start: Start, make_gguf: Callable[..., Path]) -> None:
    ws = await start()
    await ws.load(make_gguf("Q8_0", seed=0), model="one")
    await ws.load(make_gguf("Q8_0", seed=1), model="two")
    assert (await ws.resolve()).model == "one"

    await ws.load(make_gguf("Q8_0", seed=2), model="three", make_default=True)

    assert (await ws.resolve()).model == "three"
    assert ws.service.describe()["model"] == "three"


async def test_without_its_model_the_service_starts_and_says_what_is_missing(start: Start) -> None:
    ws = await start(model="smollm2")

    with pytest.raises(Unavailable, match="smollm2"):
        await ws.resolve()
    with pytest.raises(Unavailable, match="smollm2"):
        await ws.resolve("smollm2")
    assert await ws.names() == []


async def test_a_damaged_configured_model_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    ws = await start(model=str(tmp_path / "broken.gguf"))

    for _ in range(2):
        with pytest.raises(CorruptModelFile) as e:
            await ws.resolve()
        assert e.value.file == "broken.gguf"


async def test_a_model_that_appears_later_is_picked_up(start: Start, make_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(service_module, "_LAST_RETRY_S", 0.01)
    found: list[Path] = []
    real = service_module.ensure_default

    def ensure(*args: Any, **kwargs: Any) -> Any:
        if not found:
            raise Unavailable("not yet", retry_after_s=1.0)
        return real(str(found[0]), *args[1:], **kwargs)

    monkeypatch.setattr(service_module, "ensure_default", ensure)
    ws = await start(model="later")
    with pytest.raises(Unavailable, match="not yet"):
        await ws.resolve()

    found.append(make_gguf())
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Unavailable):
                assert (await ws.resolve()).model == "tiny-model"
                break
            await asyncio.sleep(0.01)


async def test_every_call_is_counted_and_closed_by_one_event(start: Start, make_gguf: Callable[..., Path]) -> None:
    ws = await start()
    await ws.load(make_gguf(), model="tiny")
    with capture_logs() as logs:
        await ws.resolve("tiny", "float32")
        with pytest.raises(NotFound):
            await ws.resolve("nope")

    calls = [e for e in logs if e["event"] == "weightstore.call"]
    assert [(e["method"], e["code"]) for e in calls] == [("Resolve", "ok"), ("Resolve", "not_found")]
    assert calls[0]["num_tensors"] == 11
    value = ws.registry.get_sample_value
    assert value("plugmesh_weightstore_calls_total", {"method": "Resolve", "code": "ok"}) == 1
    assert value("plugmesh_weightstore_call_seconds_count", {"method": "Resolve"}) == 2
    assert value("plugmesh_weightstore_running", {"kind": "call"}) == 0
    async with asyncio.timeout(20):
        while not value("plugmesh_weightstore_blob_bytes"):
            await asyncio.sleep(0.01)


async def test_a_password_in_the_url_is_refused_without_showing_it(start: Start) -> None:
    with pytest.raises(ConfigError) as e:
        await start(database_url="postgresql://u:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in e.value.message


async def test_a_database_that_does_not_answer_is_waited_for_and_then_named(start: Start, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="database"):
        await start(database_url=f"postgresql://u@/x?host={tmp_path}", database_timeout_s=0.3)


@pytest.mark.postgres
async def test_the_service_runs_on_postgresql(start: Start, make_gguf: Callable[..., Path], postgres_url: str) -> None:
    ws = await start(database_url=postgres_url)
    await ws.load(make_gguf(), model="tiny")

    assert len((await ws.resolve("tiny", "bfloat16")).tensors) == 11
    results = await asyncio.gather(*(ws.resolve("tiny", "float32") for _ in range(20)))
    assert len({r.SerializeToString(deterministic=True) for r in results}) == 1
    assert await ws.remove("tiny") > 0


async def test_a_manifest_of_the_whole_model_fits_into_a_message(start: Start, tmp_path: Path) -> None:
    """30 layers, as the default model has them, with the longest names."""
    ws = await start()
    await ws.load(write_gguf(tmp_path / "deep.gguf", "Q8_0", layers=30), model="deep")

    manifest = await ws.resolve("deep", "bfloat16")

    assert len(manifest.tensors) == 272
    assert manifest.ByteSize() < 128 << 10


@pytest.mark.model
async def test_the_default_model_is_imported_at_start(start: Start, tmp_path: Path) -> None:
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not in the cache; plugmesh pull smollm2")
    (tmp_path / "cache" / "models").mkdir(parents=True)
    shutil.copy(path, tmp_path / "cache" / "models")
    ws = await start(model="smollm2")

    manifest = await ws.resolve()

    assert (manifest.model, len(manifest.tensors)) == ("smollm2", 272)
    assert manifest.ByteSize() < 128 << 10
    assert {a.name: bool(a.data) for a in manifest.assets} == {"chat_template.jinja": True, "generation_config.json": True, "tokenizer.gguf.json": False}
    by_title = await ws.resolve("smollm2-135m-8k-lc100k-mix1-ep2", tokenizer_only=True)
    assert by_title.version == manifest.version
