"""A model in a wanted format: packed on first use, kept, and found again afterwards."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog

from plugmesh.errors import DataLoss, InvalidRequest, NotFound
from plugmesh.records import WeightFormatRecord
from plugmesh.types import ModelConfig
from plugmesh_kernels.pack import PIECE_BYTES, packed_num_bytes
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel, StoredTensor
from plugmesh_weightstore.formats import StoredSource, checked, pack_by_plugin, stored_name
from plugmesh_weightstore.pack import FORMATS, native_pieces, packed_dtype, packed_pieces

log = structlog.get_logger()

_PACK_THREADS = 2  # each holds a few pieces of two megabytes


class Resolver:
    """Packs each form once per process, however many callers want it at the same time. Thread-safe; methods block.

    Args:
        formats: Those of plugins. Raises ConfigError for a name that cannot be one.
    """

    def __init__(self, catalogue: Catalogue, blobs: BlobStore, formats: Sequence[WeightFormatRecord] = ()) -> None:
        self.catalogue, self.blobs = catalogue, blobs
        self.formats = checked(formats, ("source", *FORMATS))
        self._locks: dict[tuple[str, str], tuple[threading.Lock, int]] = {}
        self._guard = threading.Lock()

    def tensors(self, model: StoredModel, format: str) -> list[StoredTensor]:
        """All tensors of the model in "source", "float32", "bfloat16", "native" or a plugin's format, with their blobs in place.

        Raises:
            InvalidRequest: No such format; names those that there are.
            PluginError: A plugin's format could not be packed.
            NotFound: The model was removed meanwhile.
            DataLoss: A blob of the imported form is missing from the disk.
        """
        if format not in ("source", *FORMATS, *self.formats):
            known = ", ".join(("source", *FORMATS, *self.formats))
            raise InvalidRequest(f"unknown format {format[:64]!r}; there are {known}. The weightstore loads the plugin that brings another one", param="format")
        if format in self.formats:
            return self._of_plugin(model, self.formats[format])
        with self._only_one(model.version, format):
            tensors = self._present(model, format)
            if tensors is not None:
                return tensors
            if format == "source":
                raise DataLoss(f"weights of {model.version} are missing from the disk; import the model again", version=model.version)
            return self._pack(model, format)

    def _of_plugin(self, model: StoredModel, record: WeightFormatRecord) -> list[StoredTensor]:
        name = stored_name(record)
        with self._only_one(model.version, name):
            tensors = self._present(model, name)
            if tensors is not None:
                return tensors
            start = time.monotonic()
            with self.blobs.writing():
                source = self.tensors(model, "source")  # not earlier: from here on nobody sweeps its blobs
                assets = dict(model.assets)

                def read_asset(asset: str) -> bytes | None:
                    blob = assets.get(asset)
                    return None if blob is None else self.blobs.read(blob.sha256, blob.num_bytes)

                view = StoredSource(ModelConfig.from_json(model.config_json), source, self.blobs.path, read_asset)
                tensors = pack_by_plugin(record, view, self.blobs)
                self.blobs.flush(t.blob for t in tensors)
                self.catalogue.add_form(model.version, name, tensors)
            num_bytes = sum(t.blob.num_bytes for t in tensors)
            log.info("weightstore.packed", version=model.version, format=name, num_bytes=num_bytes, seconds=round(time.monotonic() - start, 3))
            return tensors

    def _present(self, model: StoredModel, format: str) -> list[StoredTensor] | None:
        tensors = self.catalogue.tensors(model.version, format)
        if tensors is None:
            if format == "source":
                raise NotFound(f"the model {model.version} was removed", param="model")
            return None
        if all(self.blobs.has(t.blob.sha256, t.blob.num_bytes) for t in tensors) and (format != "native" or _is_readable(tensors)):
            return tensors
        if format != "source":
            self.catalogue.drop_form(model.version, format)
        return None

    def _pack(self, model: StoredModel, format: str) -> list[StoredTensor]:
        start = time.monotonic()

        def pack(t: StoredTensor) -> StoredTensor:
            data = np.memmap(self.blobs.path(t.blob.sha256), np.uint8, mode="r")
            dtype = packed_dtype(data, t.dtype, t.shape, format)
            if dtype == t.dtype:
                return StoredTensor(t.name, dtype, t.shape, t.blob)
            if dtype in PIECE_BYTES:
                n, k = t.shape
                return StoredTensor(t.name, dtype, t.shape, self.blobs.put(native_pieces(data, t.dtype, (n, k), dtype)))
            return StoredTensor(t.name, dtype, t.shape, self.blobs.put(packed_pieces(data, t.dtype, dtype)))

        with self.blobs.writing():
            source = self.tensors(model, "source")  # not earlier: from here on nobody sweeps its blobs
            pool = ThreadPoolExecutor(_PACK_THREADS, thread_name_prefix="pack")
            try:
                tensors = list(pool.map(pack, source))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            self.blobs.flush(t.blob for t in tensors)
            self.catalogue.add_form(model.version, format, tensors)
        num_bytes = sum(t.blob.num_bytes for t in tensors)
        log.info("weightstore.packed", version=model.version, format=format, num_bytes=num_bytes, seconds=round(time.monotonic() - start, 3))
        return tensors

    @contextlib.contextmanager
    def _only_one(self, version: str, format: str) -> Iterator[None]:
        key = (version, format)
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)


def _is_readable(tensors: list[StoredTensor]) -> bool:
    """Whether a native form is in layouts of this version; another version may have packed it."""
    return all(t.dtype == "float32" or (t.dtype in PIECE_BYTES and t.blob.num_bytes == packed_num_bytes(t.dtype, *t.shape)) for t in tensors)
