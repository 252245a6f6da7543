"""Weights that trainers publish: over real gRPC, against imports of the same content, and with publishers that are killed or lie."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prometheus_client
import pytest

from plugmesh.client import weights as client
from plugmesh.config import MeshConfig, MeshSettings
from plugmesh.errors import DataLoss, FailedPrecondition, InvalidRequest, NotFound, PlugmeshError
from plugmesh.host import PluginHost
from plugmesh.mesh.api import ServiceContext
from plugmesh.mesh.rpc.interceptor import ErrorInterceptor
from plugmesh.testing.local_mesh import LocalMesh
from plugmesh_proto.v1 import weightstore_pb2 as pb
from plugmesh_proto.v1 import weightstore_pb2_grpc as rpc
from plugmesh_weightstore import publications
from plugmesh_weightstore.config import Settings
from plugmesh_weightstore.service import create
from plugmesh_weightstore.testing import hf_weights

NORM = "model.norm.weight"


class Store:
    def __init__(self, service: Any, stub: rpc.WeightStoreStub, address: str) -> None:
        self.service, self.stub, self.address = service, stub, address

    async def load(self, path: Path, model: str = "base") -> str:
        done = [p async for p in self.stub.Import(pb.ImportRequest(path=str(path), model=model))]
        return str(done[-1].model.version)

    async def resolve(self, model: str, format: str = "source") -> pb.ModelManifest:
        return await self.stub.Resolve(pb.ResolveRequest(model=model, format=format), timeout=30)

    async def versions(self) -> set[str]:
        return {m.version for m in (await self.stub.ListModels(pb.ListModelsRequest())).models}

    async def publish(self, tensors: dict[str, np.ndarray], model: str = "policy", base: str = "base", **kwargs: Any) -> client.Published:
        return await client.publish(self.address, model, tensors, base_version=base, **kwargs)

    async def bytes_of(self, model: str) -> dict[str, bytes]:
        return {t.name: Path(t.path).read_bytes() for t in (await self.resolve(model)).tensors}


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def run(**settings: Any) -> Store:
            config = MeshConfig(mesh=MeshSettings(model="", data_dir=tmp_path / "data", cache_dir=tmp_path / "cache"))
            plugins = PluginHost.load([], config, service="weightstore")
            made = Settings(**{"allowed_roots": (tmp_path,), "pull": False, **settings})
            service = create(ServiceContext("weightstore", None, config, made, plugins, prometheus_client.CollectorRegistry()))  # type: ignore[arg-type]
            stack.push_async_callback(service.stop)
            await service.start()
            server = grpc.aio.server(interceptors=[ErrorInterceptor()])
            address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            for b in service.bindings():
                b.add_to_server(b.servicer, server)
            await server.start()
            stack.push_async_callback(server.stop, None)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            return Store(service, rpc.WeightStoreStub(channel), address)

        yield run


async def test_a_delta_is_the_full_publication_bit_by_bit(start: Any, make_hf: Any) -> None:
    ws = await start()
    base = await ws.load(make_hf())
    new = hf_weights(0) | {NORM: hf_weights(7)[NORM], "model.embed_tokens.weight": hf_weights(7)["model.embed_tokens.weight"]}

    delta = await ws.publish(new, metadata={"train_step": "3"})
    by_delta = await ws.bytes_of("policy")
    full = await ws.publish(new, "other", full=True)

    assert (delta.num_sent, delta.num_reused, full.num_sent, full.num_reused) == (2, len(new) - 2, len(new), 0)
    assert delta.sent_bytes == sum(new[n].nbytes for n in (NORM, "model.embed_tokens.weight")) and full.sent_bytes == sum(w.nbytes for w in new.values())
    assert delta.version == full.version != base and full.number > delta.number
    assert by_delta == await ws.bytes_of("other") == {n: w.tobytes() for n, w in new.items()}
    manifest = await ws.resolve("policy")
    assert manifest.publication == full.number and (await ws.resolve(base)).publication == 0
    assert manifest.assets == (await ws.resolve(base)).assets and manifest.config_json == (await ws.resolve(base)).config_json
    unchanged = await ws.publish(new, base="policy")
    assert (unchanged.version, unchanged.sent_bytes) == (delta.version, 0) and unchanged.number > full.number


async def test_the_same_content_imported_has_the_same_version(start: Any, make_hf: Any) -> None:
    ws = await start()
    await ws.load(make_hf())
    new = hf_weights(5)
    published = await ws.publish(new)
    imported = await ws.load(make_hf("again", weights=new), "again")
    assert published.version == imported


async def test_a_version_of_other_dtypes_is_packed_for_engines(start: Any, make_gguf: Any) -> None:
    ws = await start()
    await ws.load(make_gguf("Q4_1"))
    name = "model.layers.0.self_attn.q_proj.weight"
    before = {t.name: t for t in (await ws.resolve("base", "native")).tensors}
    published = await ws.publish({name: np.full((256, 256), 0x3F00, np.uint16), NORM: np.ones(256, np.float16)}, metadata={"train_step": "9"})
    manifest = await ws.resolve("policy", "native")
    after = {t.name: t for t in manifest.tensors}
    assert (after[name].dtype, after[NORM].dtype) == ("bf16x16", "float32")
    assert [n for n in after if after[n].sha256 != before[n].sha256] == [n for n in after if n in (name, NORM)]
    assert manifest.metadata == {"train_step": "9"} and manifest.version == published.version
    assert (np.memmap(after[NORM].path, np.float32) == 1).all()


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"no.such": np.ones(4, np.float32)}, InvalidRequest, "no tensor of this model"),
        ({NORM: np.ones(4, np.float32)}, InvalidRequest, r"shape \[4\], the model has \[256\]"),
        ({NORM: np.ones(256, np.int64)}, InvalidRequest, "cannot publish int64"),
    ],
)
async def test_what_does_not_fit_is_refused(start: Any, make_hf: Any, tensors: Any, error: type[PlugmeshError], words: str) -> None:
    ws = await start()
    before = {await ws.load(make_hf())}
    with pytest.raises(error, match=words):
        await ws.publish(tensors)
    with pytest.raises(InvalidRequest, match="is missing"):
        await ws.publish({NORM: np.ones(256, np.float32)}, full=True)
    with pytest.raises(NotFound):
        await ws.publish({NORM: np.ones(256, np.float32)}, base="nobody")
    assert await ws.versions() == before


async def test_bounds(start: Any, make_gguf: Any) -> None:
    ws = await start(max_model_bytes=1_000_000)
    await ws.load(make_gguf("Q4_1"))
    with pytest.raises(FailedPrecondition, match="at most"):
        await ws.publish(hf_weights(1), full=True)
    with pytest.raises(InvalidRequest, match="metadata"):
        await ws.publish({NORM: np.ones(256, np.float32)}, metadata={"x": "y" * 5000})


@pytest.mark.parametrize("lie", ["hash", "short", "long", "no header", "two headers", "no kind"])
async def test_a_publisher_that_lies_leaves_nothing(start: Any, make_hf: Any, lie: str) -> None:
    ws = await start()
    before = {await ws.load(make_hf())}
    values = np.ones(256, np.float32)
    declared = client._declared(NORM, values)
    header = pb.PublishPart(header=pb.PublishHeader(model="policy", base_version="base", kind=pb.PublishHeader.DELTA, tensors=[declared]))
    data = pb.PublishPart(data=values.tobytes())
    parts = {
        "hash": [header, pb.PublishPart(data=bytes(1024))], "short": [header, pb.PublishPart(data=bytes(1000))], "long": [header, data, data],
        "no header": [data], "two headers": [header, header],
        "no kind": [pb.PublishPart(header=pb.PublishHeader(model="policy", base_version="base", tensors=[declared])), data],
    }[lie]  # fmt: skip

    async def sent() -> AsyncIterator[pb.PublishPart]:
        for part in parts:
            yield part

    with pytest.raises(grpc.aio.AioRpcError) as e:
        await ws.stub.Publish(sent(), timeout=20)
    expected = DataLoss if lie in ("hash", "short", "long") else InvalidRequest
    assert isinstance(client.error_from_rpc(e.value), expected)
    assert await ws.versions() == before
    good = await ws.publish({NORM: values})
    assert good.version in await ws.versions()


async def test_a_publisher_that_falls_silent_is_given_up(start: Any, make_hf: Any) -> None:
    ws = await start(publish_idle_s=0.3)
    await ws.load(make_hf())
    declared = client._declared(NORM, np.ones(256, np.float32))

    async def sent() -> AsyncIterator[pb.PublishPart]:
        yield pb.PublishPart(header=pb.PublishHeader(model="policy", base_version="base", kind=pb.PublishHeader.DELTA, tensors=[declared]))
        await asyncio.sleep(30)

    with pytest.raises(grpc.aio.AioRpcError) as e:
        await ws.stub.Publish(sent(), timeout=20)
    assert e.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "sent nothing" in str(e.value.details())
    assert not list((ws.service.blobs.temporary).iterdir())


async def test_the_newest_stay_and_so_does_what_is_in_use(start: Any, make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = await start(max_published_versions=2)
    base = await ws.load(make_hf())
    row = np.arange(256, dtype=np.float32)
    first = await ws.publish({NORM: row})
    second = await ws.publish({NORM: row + 1}, base="policy")
    third = await ws.publish({NORM: row + 2}, base="policy")
    assert third.removed_versions == ()  # the first one was resolved less than a minute ago
    monkeypatch.setattr(publications, "IN_USE_S", -1.0)
    monkeypatch.setattr(ws.service, "_served_versions", lambda: frozenset({first.version}))
    fourth = await ws.publish({NORM: row + 3}, base="policy")
    assert fourth.removed_versions == (second.version,)  # an instance still serves the first
    assert await ws.versions() == {base, first.version, third.version, fourth.version}
    monkeypatch.setattr(ws.service, "_served_versions", frozenset)
    fifth = await ws.publish({NORM: row + 3}, base="policy")  # the same again: nothing grew older
    assert fifth.version == fourth.version and fifth.removed_versions == (first.version,)
    assert (await ws.bytes_of("policy"))[NORM] == (row + 3).tobytes()
    assert await ws.versions() == {base, third.version, fourth.version}


async def test_a_publication_is_told_on_the_bus(tmp_path: Path, make_hf: Any) -> None:
    config = MeshConfig(mesh=MeshSettings(model="", data_dir=tmp_path / "data", cache_dir=tmp_path / "cache"))
    async with LocalMesh(config) as mesh:
        await mesh.host("weightstore", create, settings=Settings(allowed_roots=(tmp_path,), pull=False))
        stub = rpc.WeightStoreStub(mesh.channel("weightstore"))
        [p async for p in stub.Import(pb.ImportRequest(path=str(make_hf()), model="base"))]
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def on_event(event: Any) -> None:
            heard.put_nowait(event.data)

        stop = mesh.subscribe("weights.published", on_event)
        published = await client.publish(mesh, "policy", {NORM: np.ones(256, np.float32)}, base_version="base", metadata={"train_step": "1"})
        event = pb.WeightsPublished.FromString(await asyncio.wait_for(heard.get(), 5))
        assert (event.model, event.version, event.publication, event.metadata) == ("policy", published.version, published.number, {"train_step": "1"})
        stop()


@pytest.mark.slow
def test_a_store_killed_in_mid_publish_is_as_before(tmp_path: Path, make_hf: Any) -> None:
    """The process is killed at several moments of a publication; whoever opens the store then finds the old catalogue, and no file too many."""
    from plugmesh_weightstore.blobs import BlobStore
    from plugmesh_weightstore.catalogue import Catalogue
    from plugmesh_weightstore.importing import AllowedRoots, import_model, sweep

    root = tmp_path / "store"
    blobs = BlobStore(root)
    catalogue = Catalogue(f"sqlite:///{root / 'catalogue.sqlite3'}")
    base = import_model(make_hf(), catalogue, blobs, AllowedRoots([tmp_path]), alias="base")
    script = textwrap.dedent(f"""
        import sys, time, hashlib
        import numpy as np
        from pathlib import Path
        from plugmesh_weightstore.blobs import BlobStore
        from plugmesh_weightstore.catalogue import Catalogue
        from plugmesh_weightstore.publishing import Declared, Order, publish
        from plugmesh_weightstore.testing import hf_weights
        root, seed = Path({str(root)!r}), int(sys.argv[1])
        new = hf_weights(seed)
        order = Order("policy", "base", True, tuple(Declared(n, "float32", w.shape, hashlib.sha256(w.tobytes()).hexdigest()) for n, w in new.items()), {{}})
        def parts():
            for i, w in enumerate(new.values()):
                data = w.tobytes()
                for at in range(0, len(data), 65536):
                    print(i, flush=True)
                    yield data[at : at + 65536]
                    time.sleep(0.002)
        publish(order, parts(), Catalogue(f"sqlite:///{{root / 'catalogue.sqlite3'}}"), BlobStore(root), max_bytes=1 << 30, keep=3)
        print("done", flush=True)
    """)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for seed, at in enumerate((1, 12, 25, 40, 10_000), start=1):
        child = subprocess.Popen([sys.executable, "-c", script, str(seed)], stdout=subprocess.PIPE, text=True, env=env)
        assert child.stdout is not None
        for lines, line in enumerate(child.stdout, start=1):
            if lines == at or line == "done\n":
                break
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        child.stdout.close()
        versions = {m.version for m in catalogue.list_models()}
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(PlugmeshError):
                sweep(catalogue, blobs)
                break
        wanted = {t.blob.sha256 for v in versions for t in catalogue.tensors(v, "source") or ()} | {b.sha256 for _, b in base.assets}
        assert {p.name for p in blobs.folder.glob("??/*")} == wanted and not list(blobs.temporary.iterdir())
        assert versions == {base.version} if at < 10_000 else len(versions) == 2
    assert catalogue.find("policy").version != base.version
    catalogue.close()
