"""A model in a plugin's weight format, as executors read it: its tensors, checked against what the plugin says that it stands for."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from plugmesh.errors import DataLoss, FailedPrecondition, PluginError, PlugmeshError
from plugmesh.records import Foreign, PluginWeights, WeightFormatRecord
from plugmesh.types import ModelConfig
from plugmesh_engine.seams import ManifestLike, TensorLike
from plugmesh_kernels.pack import PIECE_BYTES, packed_num_bytes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor as it lies in the file: flat uint8, or float32 where that is its dtype."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class PluginModel:
    """What a plugin put in the place of the native weights.

    Attributes:
        weights: The plugin's object; kept for as long as anything may call its functions.
        linears, buffers, embedding, before_layer: Of it, checked.
        kv_tag: Names format and bytes; part of the KV layout.
    """

    weights: PluginWeights
    linears: Mapping[str, Foreign]
    embedding: Foreign | None
    before_layer: Foreign | None
    kv_tag: str
    buffers: Mapping[str, Packed] = field(default_factory=dict)

    def has_head(self) -> bool:
        return HEAD in self.linears or HEAD in self.buffers


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Implements `plugmesh.records.LoadedWeights`."""

    config: ModelConfig
    tensors: Mapping[str, Packed]

    def names(self) -> list[str]:
        return list(self.tensors)

    def entry(self, name: str) -> tuple[str, tuple[int, ...], np.ndarray]:
        t = self.tensors[name]
        data = t.data.view(np.uint8)
        data.flags.writeable = False
        return t.dtype, t.shape, data


def aligned(num_bytes: int) -> np.ndarray:
    """Zeros, uint8, that start at a multiple of 64: for the buffers of `PluginWeights`."""
    room = np.zeros(num_bytes + 63, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + num_bytes]


def map_tensor(entry: TensorLike, files: dict[str, np.ndarray], format: str = "") -> Packed:
    """One tensor over its file's pages.

    Args:
        format: Name of a plugin's format, whose own dtypes are then taken as they are.

    Raises:
        FailedPrecondition: It is in no form that the kernels or the format know.
        DataLoss: The file is shorter than the manifest says.
    """
    shape = tuple(int(n) for n in entry.shape)
    if entry.dtype in PIECE_BYTES and len(shape) == 2:
        num_bytes = packed_num_bytes(entry.dtype, *shape)
    elif entry.dtype == "float32":
        num_bytes = math.prod(shape) * 4
    elif format and entry.dtype.startswith(f"{format}/"):
        num_bytes = entry.num_bytes
    else:
        raise FailedPrecondition(f'tensor {entry.name} is stored as {entry.dtype}; resolve the model in the format "native"', param="format")
    if entry.num_bytes != num_bytes:
        raise DataLoss(f"tensor {entry.name}: {entry.num_bytes} bytes do not hold {shape} of {entry.dtype}")
    if entry.path not in files:
        with open(entry.path, "rb") as f:
            files[entry.path] = np.frombuffer(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED), np.uint8)
    whole = files[entry.path]
    if entry.offset < 0 or entry.offset + num_bytes > len(whole):
        raise DataLoss(f"tensor {entry.name} ends at byte {entry.offset + num_bytes} of a file of {len(whole)}")
    data = whole[entry.offset : entry.offset + num_bytes]
    return Packed(entry.dtype, shape, data.view(np.float32) if entry.dtype == "float32" else data)


def check_format(manifest: ManifestLike, record: WeightFormatRecord | None) -> None:
    """Raises FailedPrecondition when a manifest and the format that the engine is set to differ."""
    if record is not None and manifest.format != record.name:
        raise FailedPrecondition(f"the manifest is of format {manifest.format!r}, the engine is set to the weight format {record.name!r}", param="format")
    own = next((t.dtype for t in manifest.tensors if "/" in t.dtype), "")
    if record is None and own:
        raise FailedPrecondition(f"the manifest holds tensors of {own!r}: it is read by an engine that is set to that weight format", param="format")


def content_digest(manifest: ManifestLike, tensors: Mapping[str, Packed]) -> str:
    """Names the bytes of a form of the model; two forms of one format, differently calibrated, have different ones."""
    digest = hashlib.sha256(manifest.format.encode())
    for entry in manifest.tensors:
        content = getattr(entry, "sha256", "") or hashlib.sha256(tensors[entry.name].data.data).hexdigest()
        digest.update(f"{entry.name}\0{entry.dtype}\0{tuple(entry.shape)}\0{content}\n".encode())
    return digest.hexdigest()


def load_plugin(record: WeightFormatRecord, config: ModelConfig, tensors: Mapping[str, Packed], shapes: Mapping[str, tuple[int, ...]], digest: str) -> PluginModel:
    """Calls `record.load` and checks that every tensor of the model has a place.

    Args:
        shapes: Of the model's tensors, from its configuration.

    Raises:
        PluginError: `load` raised, or gave something that cannot be used; names the format.
        DataLoss: A tensor is missing, or has another shape than the configuration says.
    """
    try:
        weights = record.load(_Loaded(config, tensors))
        model = PluginModel(
            weights, dict(weights.linears), weights.embedding, weights.before_layer, f"{record.name}-{digest[:6]}",
            {name: Packed(dtype, tuple(shape), data) for name, (dtype, shape, data) in weights.buffers.items()},
        )  # fmt: skip
    except PlugmeshError:
        raise
    except Exception as e:
        raise PluginError(f"weight format {record.name!r} could not be loaded: {type(e).__name__}: {e}", plugin=record.name) from e
    problem = next(_problems(record.name, model, config, tensors, shapes), "")
    if problem:
        raise PluginError(f"weight format {record.name!r}: {problem}", plugin=record.name)
    return model


def _problems(format: str, model: PluginModel, config: ModelConfig, tensors: Mapping[str, Packed], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    matrices[HEAD] = matrices[EMBEDDING] if config.tie_word_embeddings else matrices[HEAD]
    for name in {**model.linears, **model.buffers}:
        if name not in matrices or name == EMBEDDING:
            yield f"{name!r} is no linear of this model"
        if name in model.linears and name in model.buffers:
            yield f"{name!r} is both a linear and a buffer"
    for name, buffer in model.buffers.items():
        if buffer.dtype not in PIECE_BYTES or buffer.shape != matrices[name]:
            yield f"the buffer {name!r} is {buffer.dtype} {buffer.shape}"
        elif buffer.data.dtype != np.uint8 or buffer.data.nbytes != packed_num_bytes(buffer.dtype, *buffer.shape) or not buffer.data.flags.c_contiguous:
            yield f"the buffer {name!r} does not hold {packed_num_bytes(buffer.dtype, *buffer.shape)} bytes in one piece"
        elif buffer.data.ctypes.data % 64:
            yield f"the buffer {name!r} does not start at a multiple of 64 (plugmesh_engine.foreign.aligned makes one)"
    for name, shape in shapes.items():
        stored = tensors.get(name)
        if name in model.linears or name in model.buffers or (name == EMBEDDING and model.embedding is not None):
            continue
        if stored is None:
            raise DataLoss(f"the manifest lacks tensor {name}")
        if stored.shape != shape:
            raise DataLoss(f"tensor {name} has shape {stored.shape}, expected {shape}")
        if stored.dtype.startswith(f"{format}/"):
            yield f"nothing stands for {name!r}, which is stored as {stored.dtype}"
        if (len(shape) == 1) != (stored.dtype == "float32"):
            yield f"{name!r} is stored as {stored.dtype}"
    if config.tie_word_embeddings and not model.has_head():
        stored = tensors.get(EMBEDDING)
        if stored is None or stored.dtype not in PIECE_BYTES:
            yield f"the head is tied to an embedding that is not native, so {HEAD!r} must be among linears or buffers"
