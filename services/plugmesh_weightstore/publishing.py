"""A trainer's new weights become a version: its tensors' bytes are checked and stored, then all of it becomes visible at once."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from plugmesh.errors import DataLoss, FailedPrecondition, InvalidRequest, LimitExceeded, NotFound
from plugmesh.types import ModelConfig
from plugmesh_weightstore import publications
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel, StoredTensor, check_alias
from plugmesh_weightstore.gguf_file import BLOCK_SIZES
from plugmesh_weightstore.llama_shapes import expected_shapes
from plugmesh_weightstore.publications import Publication

log = structlog.get_logger()

MAX_METADATA_BYTES = 4096
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor that is to come, and the hash that its bytes must have."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def num_bytes(self) -> int:
        elements, num_bytes = BLOCK_SIZES[self.dtype]
        return math.prod(self.shape) // elements * num_bytes


@dataclass(frozen=True, slots=True)
class Order:
    """What a publication is to be.

    Attributes:
        is_full: Every tensor comes; else those that do not are the base's.
    """

    model: str
    base_version: str
    is_full: bool
    tensors: tuple[Declared, ...]
    metadata: Mapping[str, str]
    make_default: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    model: StoredModel
    publication: Publication
    received_bytes: int
    num_reused: int
    removed: tuple[str, ...]


def publish(
    order: Order, parts: Iterator[bytes], catalogue: Catalogue, blobs: BlobStore, *, max_bytes: int, keep: int,
    in_use: Callable[[], frozenset[str]] = frozenset,
) -> Published:  # fmt: skip
    """Stores a publication; blocks. Whatever happens before the last step, nothing of it is visible.

    Args:
        parts: The bytes of `order.tensors` one after another, cut anywhere.
        keep: Versions of the alias that stay.
        in_use: Versions that live instances serve.

    Raises:
        NotFound: No such base.
        InvalidRequest: The tensors are not those of the base's configuration, or the metadata is too large.
        DataLoss: Bytes are missing, left over, or have another hash; or a blob of the base is gone.
        FailedPrecondition: Too large, or too little space on the disk.
    """
    start = time.monotonic()
    check_alias(order.model)
    if len(json.dumps(dict(order.metadata))) > MAX_METADATA_BYTES:
        raise LimitExceeded(f"the metadata may have {MAX_METADATA_BYTES} bytes", param="metadata")
    if not order.base_version:
        raise InvalidRequest("name the version that the weights belong to", param="base_version")
    base = catalogue.find(order.base_version)
    config = ModelConfig.from_json(base.config_json)
    _check_tensors(order, expected_shapes(config))
    total = sum(t.num_bytes for t in order.tensors)
    if total > max_bytes:
        raise FailedPrecondition(f"{total} bytes of tensors, at most {max_bytes} are allowed", param="tensors")
    free = shutil.disk_usage(blobs.root).free
    if total > free:
        raise FailedPrecondition(f"{total} bytes of tensors, the disk has {free}", param="tensors")
    with blobs.writing():
        before = catalogue.tensors(base.version, "source")  # not earlier: from here on nobody sweeps its blobs
        if before is None:
            raise NotFound(f"the model {base.version} was removed", param="base_version")
        reader, came = _Reader(parts), dict[str, StoredTensor]()
        for t in order.tensors:
            blob = blobs.put(reader.take(t.num_bytes))
            if blob.sha256 != t.sha256:
                raise DataLoss(f"{t.name}: the bytes that came have another hash than was declared; was it changed meanwhile?", tensor=t.name)
            came[t.name] = StoredTensor(t.name, t.dtype, t.shape, blob)
        reader.check_end()
        reused = [t for t in before if t.name not in came]
        lost = next((t.name for t in reused if not blobs.has(t.blob.sha256, t.blob.num_bytes)), "")
        if lost:
            raise DataLoss(f"{lost} of {base.version} is missing from the disk; import the model again", version=base.version)
        tensors = [came.get(t.name, t) for t in before]
        blobs.flush(t.blob for t in came.values())
        noted: list[Publication] = []
        model = catalogue.add_model(
            config, tensors, list(base.assets), source=publications.SOURCE, name=base.name, license=base.license,
            num_parameters=sum(math.prod(t.shape) for t in tensors), alias=order.model, make_default=order.make_default,
            also=lambda session, version: noted.append(publications.add(session, version, order.model, base.version, order.metadata)),
        )  # fmt: skip
    removed = catalogue.remove_expendable(order.model, keep, in_use())
    log.info(
        "weightstore.published", model=order.model, version=model.version, publication=noted[-1].number, num_tensors=len(came), num_bytes=total,
        num_reused=len(reused), num_removed=len(removed), seconds=round(time.monotonic() - start, 3),
    )  # fmt: skip
    return Published(model, noted[-1], total, len(reused), tuple(removed))


def _check_tensors(order: Order, expected: Mapping[str, Sequence[int]]) -> None:
    seen: set[str] = set()
    for t in order.tensors:
        problem = ""
        if t.name not in expected:
            problem = "no tensor of this model"
        elif t.name in seen:
            problem = "comes twice"
        elif t.shape != tuple(expected[t.name]):
            problem = f"shape {list(t.shape)}, the model has {list(expected[t.name])}"
        elif t.dtype not in BLOCK_SIZES or t.shape[-1] % BLOCK_SIZES[t.dtype][0]:
            problem = f"cannot be stored as {t.dtype[:32]!r}"
        elif not _HEX.fullmatch(t.sha256):
            problem = "has no sha256"
        if problem:
            raise InvalidRequest(f"{t.name[:256]}: {problem}", param="tensors")
        seen.add(t.name)
    missing = next((name for name in expected if name not in seen), "")
    if order.is_full and missing:
        raise InvalidRequest(f"{missing} is missing; a publication that leaves tensors to its base is a delta", param="tensors")


class _Reader:
    """Cuts parts of any length into runs of wanted lengths."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._left = memoryview(b"")

    def take(self, num_bytes: int) -> Iterator[memoryview]:
        """The next bytes. Raises DataLoss when the parts end before."""
        while num_bytes:
            if not self._left:
                try:
                    self._left = memoryview(next(self._parts))
                except StopIteration:
                    raise DataLoss(f"the stream ended {num_bytes} bytes before a tensor's end") from None
            piece, self._left = self._left[:num_bytes], self._left[num_bytes:]
            num_bytes -= len(piece)
            yield piece

    def check_end(self) -> None:
        """Raises DataLoss when anything is left over."""
        if self._left or any(self._parts):
            raise DataLoss("more bytes came than the header declared")
