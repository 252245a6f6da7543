"""The smallest real KV codec and weight format, in plain numpy: what the seams are tested with, and a start for others.

`half_rows` keeps KV as rows of float16; `int8_rows` keeps matrices as int8 with a scale per row. `MemorySource` and `write_packed` stand for the weightstore.
Not imported by anything that serves.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from plugmesh.records import (
    Foreign,
    KvCodecContext,
    KvCodecRecord,
    LoadedWeights,
    PackedTensor,
    PluginWeights,
    WeightFormatRecord,
    WeightSource,
)
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine.batch import Rows
from plugmesh_engine.calibration import linear_inputs, windows_of
from plugmesh_engine.testing import FileManifest, FileTensor
from plugmesh_kernels.pack import pack


class HalfRows:
    """KV as float16 in blocks (layers, 2, 16, kv_heads, head_dim). Implements `seams.KvCodec` and is its own `seams.KvMemory`."""

    def __init__(self, context: KvCodecContext) -> None:
        c = context.config
        self._shape = (c.num_layers, 2, BLOCK_TOKENS, c.num_kv_heads, c.head_dim)
        self.blocks = np.zeros((context.num_blocks + 1, *self._shape), np.float16)
        self.layout = KvLayout(
            model=context.model_version, codec="half-rows", dtype="float16", num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            block_tokens=BLOCK_TOKENS, block_bytes=self.blocks[0].nbytes,
        )  # fmt: skip
        self.is_closed = False
        self._rows: Sequence[Rows] = ()

    @property
    def memory(self) -> HalfRows:
        return self

    # -- the attention

    def plan(self, rows: Sequence[Rows]) -> None:
        self._rows = rows

    def attend(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray) -> None:
        at = 0
        for r in self._rows:
            end = at + len(r.token_ids)
            positions = r.num_computed + np.arange(end - at)
            blocks = np.asarray(r.blocks)
            where = blocks[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS
            self.blocks[where[0], layer, 0, where[1]] = k[at:end]
            self.blocks[where[0], layer, 1, where[1]] = v[at:end]
            for row, position in zip(range(at, end), positions, strict=True):
                out[row] = self._attend_row(layer, q[row], blocks, int(position) + 1)
            at = end

    def _attend_row(self, layer: int, q: np.ndarray, blocks: np.ndarray, length: int) -> np.ndarray:
        """(heads, head_dim) of one row over the first `length` positions."""
        kv = self.blocks[blocks[: -(-length // BLOCK_TOKENS)], layer].astype(np.float32)
        keys, values = (kv[:, i].reshape(-1, *self._shape[3:])[:length] for i in (0, 1))
        grouped = q.reshape(self._shape[3], -1, self._shape[4])
        scores = np.einsum("gnd,tgd->gnt", grouped, keys) / np.sqrt(np.float32(self._shape[4]))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("gnt,tgd->gnd", weights, values).reshape(q.shape)

    def close(self) -> None:
        self.is_closed = True

    # -- the memory

    def zero(self, block: int) -> None:
        self.blocks[block] = 0

    def copy(self, source: int, target: int) -> None:
        self.blocks[target] = self.blocks[source]

    def read(self, block: int) -> memoryview:
        return memoryview(self.blocks[block].reshape(-1).view(np.uint8))

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int) -> None:
        self.blocks[block] = np.frombuffer(data, np.float16).reshape(self._shape)
        self.blocks[block][:, :, num_tokens:] = 0

    def all_finite(self, blocks: Sequence[int]) -> bool:
        return bool(np.isfinite(self.blocks[list(blocks)]).all())


def half_rows() -> KvCodecRecord:
    return KvCodecRecord("half-rows", HalfRows)


@dataclass(frozen=True, slots=True)
class Int8Weights:
    """Implements `plugmesh.records.PluginWeights`."""

    linears: dict[str, Foreign]
    num_bytes: int
    buffers: dict[str, tuple[str, tuple[int, ...], np.ndarray]] = field(default_factory=dict)
    before_layer: Foreign | None = None
    embedding: Foreign | None = None


def _pack(source: WeightSource) -> Iterator[PackedTensor]:
    for name in source.names():
        if not name.endswith("_proj.weight"):
            yield source.native(name)
            continue
        w = source.tensor(name)
        scales = np.abs(w).max(1, keepdims=True) / 127 + 1e-12
        yield PackedTensor(name, "int8-rows/codes", w.shape, [np.rint(w / scales).astype(np.int8).tobytes()])
        yield PackedTensor(f"{name}.scales", "float32", (len(w),), [scales.astype(np.float32).tobytes()])


def _load(weights: LoadedWeights) -> PluginWeights:
    linears: dict[str, Foreign] = {}
    for name in weights.names():
        dtype, shape, data = weights.entry(name)
        if dtype == "int8-rows/codes":
            linears[name] = _multiply(data.view(np.int8).reshape(shape), weights.entry(f"{name}.scales")[2].view(np.float32))
    return Int8Weights(linears, sum(weights.entry(n)[2].nbytes for n in weights.names()))


def _multiply(codes: np.ndarray, scales: np.ndarray) -> Foreign:
    def multiply(x: np.ndarray, y: np.ndarray) -> None:
        """Row by row, because BLAS adds up in another order for another number of rows."""
        for row, out in zip(x, y, strict=True):
            np.multiply(codes.astype(np.float32) @ row, scales, out=out)

    return multiply


def int8_rows(variant: str = "") -> WeightFormatRecord:
    return WeightFormatRecord("int8-rows", _pack, _load, is_lossless=False, variant=variant)


class MemorySource:
    """A model of float32 arrays. Implements `plugmesh.records.WeightSource`.

    Args:
        weights: Hugging Face names to arrays.
        text: Token ids that `activations` are computed on; by default drawn by the seed.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, np.ndarray], text: Sequence[int] | None = None) -> None:
        self.config = config
        self._weights = weights
        self._text = text

    def names(self) -> list[str]:
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def tensor(self, name: str) -> np.ndarray:
        return self._weights[name].copy()

    def native(self, name: str) -> PackedTensor:
        w = self._weights[name]
        if w.ndim == 1:
            return PackedTensor(name, "float32", w.shape, [w.tobytes()])
        return PackedTensor(name, "f32x16", w.shape, [pack("float32", w, *w.shape)])

    def activations(self, num_tokens: int, seed: int) -> Mapping[str, np.ndarray]:
        text = self._text if self._text is not None else np.random.default_rng(seed).integers(0, self.config.vocab_size, num_tokens).tolist()
        return linear_inputs(self.config, self.tensor, windows_of(text, num_tokens, seed))


def write_packed(folder: pathlib.Path, source: WeightSource, record: WeightFormatRecord | None = None) -> FileManifest:
    """What the weightstore makes of a source: a manifest of the record's format, or of "native", with all tensors in one file."""
    format = record.name if record else "native"
    path = folder / f"model.{format}"
    entries: list[FileTensor] = []
    with path.open("wb") as f:
        for t in record.pack(source) if record else (source.native(name) for name in source.names()):
            f.write(b"\0" * (-f.tell() % 64))
            start, digest = f.tell(), hashlib.sha256()
            for piece in t.data:
                view = (np.ascontiguousarray(piece).data if isinstance(piece, np.ndarray) else memoryview(piece)).cast("B")
                digest.update(view)
                f.write(view)
            entries.append(FileTensor(t.name, t.dtype, tuple(t.shape), str(path), start, f.tell() - start, digest.hexdigest()))
    config = source.config
    return FileManifest(config.name, hashlib.sha256(config.to_json().encode()).hexdigest(), config.architecture, config.to_json(), tuple(entries), format)


_PLUGIN = '''"""KV as rows of float16, matrices as int8 with a scale per row."""

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl


class Settings(StrictModel):
    variant: str = ""


@hookimpl
def register_kv_codecs(context):
    context.settings(Settings)
    from plugmesh_engine.testing_plugins import half_rows

    return [half_rows()]


@hookimpl
def register_weight_formats(context):
    settings = context.settings(Settings)
    from plugmesh_engine.testing_plugins import int8_rows

    return [int8_rows(settings.variant)]
'''
_CARD = """slug = "rows"
version = "0.1.0"
summary = "KV as rows of float16, matrices as int8 with a scale per row"
services = ["weightstore", "prefill", "decode"]
hooks = ["register_kv_codecs", "register_weight_formats"]
provides = ["weight-format:int8-rows"]
fidelity = "lossy"

[settings]
variant = "Packs anew when it changes"

[loss]
metric = "logit_kl"
bound = 0.1
setting = "random weights"
"""


def write_plugin(folder: pathlib.Path) -> pathlib.Path:
    """A package `plugmesh_rows` that brings both through the real hooks, for tests that load plugins by name; gives the folder for the path."""
    package = folder / "plugmesh_rows"
    package.mkdir()
    (package / "__init__.py").write_text('"""Rows."""\n')
    (package / "plugin.py").write_text(_PLUGIN)
    (package / "plugin.toml").write_text(_CARD)
    return folder
