"""Gives a trainer's weights to the mesh: needs grpcio and numpy.

    published = await publish(mesh, "policy", {"model.norm.weight": norm, ...}, base_version="smollm2-135m-instruct", metadata={"train_step": "40"})

Only tensors whose bytes differ from the base's are sent, unless told otherwise, so that a version costs what has changed. Names and shapes are the
base's, and so is the order of the rows of Q and K (`rope_style` of its configuration: "interleaved" where it came from a GGUF file).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from plugmesh.errors import InvalidRequest, Unavailable
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import weightstore_pb2 as pb
from plugmesh_proto.v1 import weightstore_pb2_grpc

if TYPE_CHECKING:
    import numpy as np

    from plugmesh.mesh.api import Mesh

PIECE_BYTES = 1 << 20
_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "uint16": "bfloat16"}  # numpy has no bfloat16 of its own
_OPTIONS = (("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20))


@dataclass(frozen=True, slots=True)
class Published:
    """A version that is visible now.

    Attributes:
        number: Of the publication; grows with every one of the catalogue. A token's `weight_epoch` is that of the version that made it.
        num_sent, sent_bytes: Tensors that went over the wire; `num_reused` were the base's.
        removed_versions: Older publications of the model that are gone.
    """

    model: str
    version: str
    number: int
    num_sent: int
    sent_bytes: int
    num_reused: int
    removed_versions: tuple[str, ...]


async def publish(
    target: Mesh | str, model: str, tensors: Mapping[str, np.ndarray], *, base_version: str, full: bool = False,
    metadata: Mapping[str, str] | None = None, make_default: bool = False, timeout_s: float = 600.0,
) -> Published:  # fmt: skip
    """Makes new weights a version that `model` means from now on.

    The arrays are read twice, once for their hashes, and must not change until this returns; what changed meanwhile is refused.

    Args:
        target: The mesh, or a weightstore's "host:port".
        tensors: By Hugging Face name: float32, float16, or bfloat16 (its bit patterns as uint16, or ml_dtypes' own). Those that are left out stay as they are in the base.
        base_version: Version or alias of the same architecture and shapes; gives configuration and tokenizer too.
        full: Send every tensor; then all of them must be given.
        metadata: Small, and told to whoever resolves or follows the model.

    Raises:
        NotFound, InvalidRequest, DataLoss, FailedPrecondition, Overloaded, Unavailable: See `weightstore.proto`; nothing was published then.
    """
    async with _channel(target) as channel:
        stub = weightstore_pb2_grpc.WeightStoreStub(channel)
        with typed_errors():
            base = {} if full else await _base(stub, base_version, timeout_s)
            hashed = await asyncio.to_thread(lambda: [(name, _declared(name, array)) for name, array in tensors.items()])
            sent = [(d, tensors[name]) for name, d in hashed if base.get(name) != (d.dtype, tuple(d.shape), d.sha256)]
            header = pb.PublishHeader(
                model=model, base_version=base_version, kind=pb.PublishHeader.FULL if full else pb.PublishHeader.DELTA, tensors=[d for d, _ in sent],
                metadata=metadata or {}, make_default=make_default,
            )  # fmt: skip
            reply = await stub.Publish(_parts(header, [array for _, array in sent]), timeout=timeout_s)
    return Published(reply.model, reply.version, reply.publication, len(sent), reply.received_bytes, reply.num_reused_tensors, tuple(reply.removed_versions))


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """What a call raises, as `plugmesh.errors`."""
    try:
        yield
    except grpc.RpcError as e:
        raise error_from_rpc(e) from None


async def _base(stub: weightstore_pb2_grpc.WeightStoreStub, version: str, timeout_s: float) -> dict[str, tuple[str, tuple[int, ...], str]]:
    manifest = await stub.Resolve(pb.ResolveRequest(model=version, format="source"), timeout=timeout_s)
    return {t.name: (t.dtype, tuple(t.shape), t.sha256) for t in manifest.tensors}


def _declared(name: str, array: np.ndarray) -> pb.PublishedTensor:
    if array.dtype.name not in _DTYPES:
        raise InvalidRequest(f"{name}: cannot publish {array.dtype.name}, only float32, float16 and bfloat16 (as uint16)", param="tensors")
    digest = hashlib.sha256()
    for piece in _pieces(array):
        digest.update(piece)
    return pb.PublishedTensor(name=name, dtype=_DTYPES[array.dtype.name], shape=array.shape, sha256=digest.hexdigest())


def _pieces(array: np.ndarray) -> Iterable[memoryview]:
    import numpy as np

    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


async def _parts(header: pb.PublishHeader, arrays: Iterable[np.ndarray]) -> AsyncIterator[pb.PublishPart]:
    yield pb.PublishPart(header=header)
    for array in arrays:
        for piece in _pieces(array):
            yield pb.PublishPart(data=bytes(piece))


@contextlib.asynccontextmanager
async def _channel(target: Mesh | str) -> AsyncIterator[grpc.aio.Channel]:
    if isinstance(target, str):
        async with grpc.aio.insecure_channel(target, options=_OPTIONS) as channel:
            yield channel
        return
    found = target.instances("weightstore")
    if not found:
        raise Unavailable("no weightstore is in the mesh", retry_after_s=1.0)
    yield target.direct_channel(found[0])  # cached; the mesh's to close
