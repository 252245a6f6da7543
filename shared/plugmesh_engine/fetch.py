"""Gets a model from the weightstore: its manifest, and its bytes when they lie on another host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pathlib
import time

import grpc
import structlog

from plugmesh.errors import DataLoss, Unavailable
from plugmesh.mesh.api import Mesh
from plugmesh.mesh.hostid import host_id
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import weightstore_pb2 as pb
from plugmesh_proto.v1 import weightstore_pb2_grpc as rpc

log = structlog.get_logger()

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0


async def fetch_manifest(mesh: Mesh, model: str, format: str, *, cache_dir: pathlib.Path, timeout_s: float = 300.0) -> pb.ModelManifest:
    """The manifest of `model` in `format`, with every path readable on this host.

    Waits for a weightstore to appear and for the packing of the format. Blobs of another host are copied once into
    `cache_dir` under their hash.

    Raises:
        NotFound: The catalogue has no such model.
        Unavailable: No weightstore answered within `timeout_s`.
        DataLoss: A copied blob does not have the hash that the manifest names.
    """
    deadline = time.monotonic() + timeout_s
    pause = FIRST_RETRY_S
    while True:
        try:
            stub = rpc.WeightStoreStub(mesh.channel("weightstore"))
            manifest = await stub.Resolve(pb.ResolveRequest(model=model, format=format), timeout=max(1.0, deadline - time.monotonic()))
            break
        except grpc.aio.AioRpcError as e:
            error = error_from_rpc(e)
            if not isinstance(error, Unavailable) or time.monotonic() > deadline:
                raise error from e
            await asyncio.sleep(pause)
            pause = min(LAST_RETRY_S, pause * 2)
    if manifest.host == host_id() and all(os.access(t.path, os.R_OK) for t in manifest.tensors):
        return manifest
    await _copy_blobs(mesh, manifest, cache_dir)
    return manifest


async def _copy_blobs(mesh: Mesh, manifest: pb.ModelManifest, cache_dir: pathlib.Path) -> None:
    sources = [i for i in mesh.instances("weightstore") if i.host == manifest.host] or mesh.instances("weightstore")
    if not sources:
        raise Unavailable("no weightstore to copy the weights from", retry_after_s=2)
    stub = rpc.WeightStoreStub(mesh.direct_channel(sources[0]))
    folder = cache_dir / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    started, num_bytes = time.monotonic(), 0
    for tensor in manifest.tensors:
        path = folder / tensor.sha256
        if not path.exists():
            await _copy_blob(stub, tensor, path)
            num_bytes += tensor.num_bytes
        tensor.path, tensor.offset = str(path), 0
    log.info("weights.copied", num_bytes=num_bytes, copy_ms=round(1000 * (time.monotonic() - started)))


async def _copy_blob(stub: rpc.WeightStoreStub, tensor: pb.TensorEntry, path: pathlib.Path) -> None:
    digest = hashlib.sha256()
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        with part.open("wb") as f:
            async for piece in stub.ReadBlob(pb.ReadBlobRequest(sha256=tensor.sha256), timeout=600):
                digest.update(piece.data)
                f.write(piece.data)
        if digest.hexdigest() != tensor.sha256:
            raise DataLoss(f"tensor {tensor.name}: copied bytes have another hash than the manifest says", tensor=tensor.name)
        part.chmod(0o444)
        part.replace(path)
    except grpc.aio.AioRpcError as e:
        raise error_from_rpc(e) from e
    finally:
        part.unlink(missing_ok=True)


