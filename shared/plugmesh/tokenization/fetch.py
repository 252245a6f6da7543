"""A model's tokenizer files, from the weightstore: by path on the same host, inline, or as a blob over gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pathlib
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from plugmesh.errors import DataLoss, LimitExceeded, NotFound, PlugmeshError, Unavailable
from plugmesh.mesh.api import Mesh
from plugmesh.mesh.hostid import host_id
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import weightstore_pb2, weightstore_pb2_grpc

log = structlog.get_logger()

_WANTED = ("tokenizer.gguf.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the weightstore says of a model: its names, its files, its configuration."""

    model: str
    version: str
    config: dict[str, Any]
    manifest: Any  # the protobuf manifest, for `read_assets`


async def resolve(mesh: Mesh, model: str, *, timeout_s: float) -> ModelFiles:
    """Asks the weightstore what `model` stands for; an empty name is the deployment's default.

    Raises:
        NotFound: No such model.
        Unavailable: No weightstore answers.
    """
    stub = weightstore_pb2_grpc.WeightStoreStub(mesh.channel("weightstore"))
    request = weightstore_pb2.ResolveRequest(model=model, tokenizer_only=True)
    try:
        manifest = await stub.Resolve(request, timeout=timeout_s)
    except grpc.RpcError as e:
        raise error_from_rpc(e) from e
    try:
        config = json.loads(manifest.config_json) if manifest.config_json else {}
    except ValueError as e:
        raise DataLoss(f"the manifest of {model!r} holds no valid configuration") from e
    return ModelFiles(manifest.model, manifest.version, config if isinstance(config, dict) else {}, manifest)


async def resolve_patiently(mesh: Mesh, models: tuple[str, ...], *, call_timeout_s: float, within_s: float) -> ModelFiles:
    """`resolve` for the first of `models` that is known, again with back-off while nobody answers or none is known.

    Raises:
        PlugmeshError: The last failure, after `within_s`.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    delay_s = 0.05
    while True:
        failure: PlugmeshError | None = None
        for model in models:
            try:
                return await resolve(mesh, model, timeout_s=min(call_timeout_s, max(0.1, deadline - loop.time())))
            except NotFound as e:
                failure = e  # it may be about to be imported
            except PlugmeshError as e:
                failure = e
                break
        assert failure is not None
        if loop.time() + delay_s >= deadline:
            raise failure
        log.debug("tokenizer.waiting_for_weightstore", code=failure.code, delay_s=delay_s)
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, 2.0)


async def read_assets(mesh: Mesh, files: ModelFiles, *, max_bytes: int, timeout_s: float) -> dict[str, bytes]:
    """The tokenizer's files, each checked against its sha256.

    Raises:
        DataLoss: A file does not have the promised length or content.
        LimitExceeded: A file is longer than `max_bytes`.
        Unavailable: A file is neither here, nor in the message, nor to be had from a weightstore.
    """
    assets = {}
    for entry in files.manifest.assets:
        if entry.name in _WANTED:
            if entry.num_bytes > max_bytes:
                raise LimitExceeded(f"{entry.name} has {entry.num_bytes} bytes, at most {max_bytes} are allowed")
            assets[entry.name] = await _read_one(mesh, files.manifest.host, entry, timeout_s)
    return assets


async def _read_one(mesh: Mesh, host: str, entry: Any, timeout_s: float) -> bytes:
    if entry.path and host == host_id():
        try:
            return _checked(await asyncio.to_thread(_read_file, entry.path, entry.num_bytes), entry)
        except OSError as e:
            log.debug("tokenizer.asset_not_mapped", asset=entry.name, errno=e.errno)
    if entry.data or entry.num_bytes == 0:
        return _checked(entry.data, entry)
    failure: PlugmeshError = Unavailable("no weightstore has an address", retry_after_s=1)
    for info in mesh.instances("weightstore"):
        stub = weightstore_pb2_grpc.WeightStoreStub(mesh.direct_channel(info))
        data = bytearray()
        try:
            async for piece in stub.ReadBlob(weightstore_pb2.ReadBlobRequest(sha256=entry.sha256), timeout=timeout_s):
                if piece.offset != len(data) or len(data) + len(piece.data) > entry.num_bytes:
                    raise DataLoss(f"{entry.name} arrives with a hole or too long")
                data += piece.data
            return _checked(bytes(data), entry)
        except grpc.RpcError as e:
            failure = error_from_rpc(e)
        except DataLoss as e:
            failure = e
    raise failure


def _read_file(path: str, num_bytes: int) -> bytes:
    with pathlib.Path(path).open("rb") as file:
        return file.read(num_bytes + 1)


def _checked(data: bytes, entry: Any) -> bytes:
    if len(data) != entry.num_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataLoss(f"{entry.name} does not have the content that the catalogue promises", asset=entry.name)
    return data
