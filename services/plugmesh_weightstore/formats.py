"""Forms of a model that plugins pack: their view of the stored model, and what is checked of what they give."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from plugmesh.errors import ConfigError, FailedPrecondition, PluginError, PlugmeshError
from plugmesh.records import PackedTensor, WeightFormatRecord
from plugmesh.types import ModelConfig
from plugmesh_kernels.pack import PIECE_BYTES, packed_num_bytes
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import StoredTensor
from plugmesh_weightstore.pack import native_pieces, packed_dtype, packed_pieces

log = structlog.get_logger()

_NAME = re.compile(r"[A-Za-z0-9_-]{1,24}")
_MAX_NAME, _MAX_DTYPE, _MAX_SHAPE = 256, 32, 128  # characters that the catalogue holds


def stored_name(record: WeightFormatRecord) -> str:
    """The format's name in the catalogue; another variant has another one, so that it is packed anew."""
    return f"{record.name}@{hashlib.sha256(record.variant.encode()).hexdigest()[:16]}" if record.variant else record.name


def checked(records: Sequence[WeightFormatRecord], reserved: Sequence[str]) -> dict[str, WeightFormatRecord]:
    """By name. Raises ConfigError for a name that the catalogue cannot hold or that the core has."""
    for record in records:
        if not _NAME.fullmatch(record.name) or record.name in reserved:
            raise ConfigError(f"a weight format cannot be named {record.name[:64]!r}: letters, digits, - and _ (at most 24), and none of {', '.join(reserved)}")
    return {record.name: record for record in records}


class StoredSource:
    """An imported model as `WeightFormatRecord.pack` reads it. Implements `plugmesh.records.WeightSource`. Used by one thread.

    Args:
        read_asset: Content of an asset by its name, None where there is none.
    """

    def __init__(self, config: ModelConfig, tensors: Sequence[StoredTensor], path: Callable[[str], Path], read_asset: Callable[[str], bytes | None]) -> None:
        self._config = config
        self._tensors = {t.name: t for t in tensors}
        self._path = path
        self._read_asset = read_asset

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def tensor(self, name: str) -> np.ndarray:
        t = self._tensors[name]
        with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
            pieces = [np.frombuffer(p, np.float32) for p in packed_pieces(self._data(t), t.dtype, "float32")]
        return np.concatenate(pieces).reshape(t.shape)

    def native(self, name: str) -> PackedTensor:
        t, data = self._tensors[name], self._data(self._tensors[name])
        dtype = packed_dtype(data, t.dtype, t.shape, "native")
        if dtype in PIECE_BYTES:
            n, k = t.shape
            return PackedTensor(name, dtype, t.shape, native_pieces(data, t.dtype, (n, k), dtype))
        return PackedTensor(name, dtype, t.shape, packed_pieces(data, t.dtype, dtype))

    def activations(self, num_tokens: int, seed: int) -> Mapping[str, np.ndarray]:
        return LazyActivations(self, self._token_ids, num_tokens, seed)

    def _data(self, t: StoredTensor) -> np.ndarray:
        return np.memmap(self._path(t.blob.sha256), np.uint8, mode="r")

    def _token_ids(self) -> list[int]:
        """English that every CPython carries, in the model's tokens."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        ids: list[int] = tokenizer_of(self._read_asset).encode(text, add_special_tokens=False).ids
        return [i for i in ids if i < self._config.vocab_size]


class LazyActivations(Mapping[str, np.ndarray]):
    """Runs the model when the first array is asked for."""

    def __init__(self, source: StoredSource, token_ids: Callable[[], list[int]], num_tokens: int, seed: int) -> None:
        self._source, self._token_ids, self._num_tokens, self._seed = source, token_ids, num_tokens, seed
        self._found: dict[str, np.ndarray] | None = None
        self._lock = threading.Lock()

    def _arrays(self) -> dict[str, np.ndarray]:
        from plugmesh_engine.calibration import linear_inputs, windows_of

        with self._lock:
            if self._found is None:
                start = time.monotonic()
                ids = self._token_ids()
                if len(ids) < min(self._num_tokens, 64):
                    raise FailedPrecondition("the model's tokenizer makes too few tokens of English to calibrate a weight format")
                self._found = linear_inputs(self._source.config, self._source.tensor, windows_of(ids, self._num_tokens, self._seed))
                log.info("weightstore.calibrated", num_tokens=self._num_tokens, seconds=round(time.monotonic() - start, 3))
            return self._found

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays())

    def __len__(self) -> int:
        return len(self._arrays())


def tokenizer_of(read_asset: Callable[[str], bytes | None]) -> Any:
    """A `tokenizers.Tokenizer` good enough for calibration: added tokens and special rules of splitting are left out for GGUF files.

    Raises:
        FailedPrecondition: No tokenizer among the assets, or none of this kind.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError as e:
        raise FailedPrecondition("calibrating a weight format needs the package tokenizers in the weightstore's environment") from e
    if (data := read_asset("tokenizer.json")) is not None:
        return Tokenizer.from_str(data.decode())
    if (data := read_asset("tokenizer.gguf.json")) is not None:
        meta = json.loads(data)
        if meta.get("tokenizer.ggml.model") == "gpt2":
            vocabulary = {t: i for i, t in enumerate(meta["tokenizer.ggml.tokens"])}
            merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
            usable = [m for m in merges if len(m) == 2 and m[0] in vocabulary and m[1] in vocabulary and m[0] + m[1] in vocabulary]
            tokenizer = Tokenizer(models.BPE(vocabulary, usable))
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
            return tokenizer
    raise FailedPrecondition("the model came without a tokenizer that a weight format can be calibrated with (byte-level BPE, or tokenizer.json)")


def pack_by_plugin(record: WeightFormatRecord, source: StoredSource, blobs: BlobStore) -> list[StoredTensor]:
    """The tensors of the form, their bytes in the store. Call below `blobs.writing()`.

    Raises:
        PluginError: `pack` raised, or gave what an engine could not read; names the format.
    """
    found: dict[str, StoredTensor] = {}
    try:
        for t in record.pack(source):
            shape = tuple(int(n) for n in t.shape)
            problem = _problem(record, source, t, shape, found)
            if problem:
                raise PluginError(f"weight format {record.name!r}: {problem}", plugin=record.name)
            blob = blobs.put((np.ascontiguousarray(p).data if isinstance(p, np.ndarray) else memoryview(p)).cast("B") for p in t.data)
            wanted = packed_num_bytes(t.dtype, *shape) if t.dtype in PIECE_BYTES else 4 * int(np.prod(shape)) if t.dtype == "float32" else blob.num_bytes
            if blob.num_bytes != wanted:
                raise PluginError(f"weight format {record.name!r}: {t.name} has {blob.num_bytes} bytes, {t.dtype} {shape} has {wanted}", plugin=record.name)
            found[t.name] = StoredTensor(t.name, t.dtype, shape, blob)
    except PlugmeshError:
        raise
    except Exception as e:
        log.warning("weightstore.pack_failed", format=record.name, error=type(e).__name__)
        raise PluginError(f"weight format {record.name!r} could not pack the model: {type(e).__name__}: {e}", plugin=record.name) from e
    return list(found.values())


def _problem(record: WeightFormatRecord, source: StoredSource, t: PackedTensor, shape: tuple[int, ...], found: Mapping[str, StoredTensor]) -> str:
    if t.name in found:
        return f"{t.name} comes twice"
    if not 0 < len(t.name) <= _MAX_NAME or len(t.dtype) > _MAX_DTYPE or not shape or min(shape) < 0 or len(",".join(map(str, shape))) > _MAX_SHAPE:
        return f"a tensor cannot be {t.name[:64]!r}, {t.dtype[:64]!r}, {shape}"
    if t.dtype not in (*PIECE_BYTES, "float32") and not t.dtype.startswith(f"{record.name}/"):
        return f"{t.name} has the dtype {t.dtype!r}; there are float32, {', '.join(PIECE_BYTES)} and {record.name}/..."
    if t.dtype in PIECE_BYTES and len(shape) != 2:
        return f"{t.name} is {t.dtype} but no matrix"
    if t.name in source.names() and shape != source.shape(t.name):
        return f"{t.name} has the shape {shape}, in the model it has {source.shape(t.name)}"
    return ""


