"""The reference executor: plain torch, on any device, in float32 or bfloat16."""

from __future__ import annotations

import dataclasses
import math
import mmap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from plugmesh.errors import ConfigError, DataLoss, FailedPrecondition
from plugmesh.records import Foreign, KvCodecContext, KvCodecRecord, WeightFormatRecord
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine import capsules
from plugmesh_engine.attention import TorchAttention
from plugmesh_engine.batch import Rows, StepResult, Tap
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.foreign import PluginModel
from plugmesh_engine.kv.codec import build_codec, tagged
from plugmesh_engine.kv.pool import NULL_BLOCK
from plugmesh_engine.model.llama import Llama
from plugmesh_engine.seams import AttentionBackend, KvCodec, KvMemory, ManifestLike, Model, TensorLike
from plugmesh_engine.weights import check_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = {"llama": Llama}


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A model of plain float tensors. Implements `seams.Model`.

    Attributes:
        version: Names the weights; KV of different versions never mixes.
        num_mapped_bytes, num_copied_bytes: Weights that share the file's pages, and those that had to be converted or moved.
        kv_tag: Of a plugin's weight format; part of the KV layout.
        plugin: What the format put in the place of tensors; kept for as long as the graph calls it.
    """

    graph: Llama
    config: ModelConfig
    version: str
    dtype: str
    device: str
    num_mapped_bytes: int
    num_copied_bytes: int
    kv_tag: str = ""
    plugin: PluginModel | None = None

    def build_executor(self, config: EngineConfig, kv_codec: KvCodecRecord | None = None) -> TorchExecutor:
        """Raises ConfigError when the model was loaded for another executor, dtype or device than the engine is set to."""
        return TorchExecutor(self, config, kv_codec=kv_codec)


def load(manifest: ManifestLike, dtype: str, device: str = "cpu", *, weight_format: WeightFormatRecord | None = None) -> TorchModel:
    """Maps the tensors read only and builds the graph over them.

    A tensor stored as `dtype` is mapped, so that processes on one host share its pages; a float tensor of another dtype is converted, which copies it.

    Args:
        weight_format: The plugin's format that the manifest is in; its functions then stand in the graph where they replace a weight.

    Raises:
        FailedPrecondition: A tensor is not stored as floats; the weightstore packs it when asked for a float format.
        DataLoss: A file is shorter than the manifest says, or a tensor is missing or has the wrong shape.
        ConfigError: Unknown dtype, architecture or rope scaling.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"the engine computes in float32 or bfloat16, not {dtype!r}")
    config = ModelConfig.from_json(manifest.config_json)
    if config.architecture not in FAMILIES:
        raise ConfigError(f"no model family for architecture {config.architecture!r}; known: {', '.join(sorted(FAMILIES))}")
    if weight_format is not None:
        return _load_foreign(manifest, config, dtype, device, weight_format)
    files: dict[str, mmap.mmap] = {}
    tensors: dict[str, torch.Tensor] = {}
    mapped = copied = 0
    for entry in manifest.tensors:
        raw = _map(entry, files)
        tensor = raw.to(device=device, dtype=DTYPES[dtype])
        if tensor.data_ptr() == raw.data_ptr():
            mapped += entry.num_bytes
        else:
            copied += tensor.numel() * tensor.element_size()
        tensors[entry.name] = tensor
    check_shapes(config, {name: tuple(t.shape) for name, t in tensors.items()})
    graph = FAMILIES[config.architecture](config, tensors)
    return TorchModel(graph, config, manifest.version, dtype, device, mapped, copied)


def _load_foreign(manifest: ManifestLike, config: ModelConfig, dtype: str, device: str, weight_format: WeightFormatRecord) -> TorchModel:
    from plugmesh_engine.executors import foreign_torch

    found = foreign_torch.load(manifest, weight_format, config, DTYPES[dtype], device)
    graph = FAMILIES[config.architecture](config, found.tensors, device=torch.device(device))
    graph.format = foreign_torch.ForeignFormat()
    plugin = found.plugin
    if plugin.before_layer is not None:
        graph.before_layer = capsules.before_layer(plugin.before_layer)
    if plugin.embedding is not None:
        graph.embed = _foreign_embedding(plugin.embedding, config.hidden_size, DTYPES[dtype])
    return TorchModel(graph, config, manifest.version, dtype, device, 0, found.num_bytes, plugin.kv_tag, plugin)


def _foreign_embedding(foreign: Foreign, hidden_size: int, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    fill = capsules.embedding(foreign)

    def embed(token_ids: torch.Tensor) -> torch.Tensor:
        x = np.empty((len(token_ids), hidden_size), np.float32)
        fill(token_ids.int().cpu().numpy(), x)
        return torch.from_numpy(x).to(device=token_ids.device, dtype=dtype)

    return embed


def _map(entry: TensorLike, files: dict[str, mmap.mmap]) -> torch.Tensor:
    """The tensor over the file's pages. The mapping lives as long as a tensor uses it."""
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        raise FailedPrecondition(f"tensor {entry.name} is stored as {entry.dtype}; resolve the model as float32 or bfloat16", param="format")
    shape = tuple(int(n) for n in entry.shape)
    if math.prod(shape) * dtype.itemsize != entry.num_bytes:
        raise DataLoss(f"tensor {entry.name}: {entry.num_bytes} bytes do not hold {shape} of {entry.dtype}")
    if entry.path not in files:
        with open(entry.path, "rb") as f:
            files[entry.path] = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
    data = files[entry.path]
    if entry.offset < 0 or entry.offset + entry.num_bytes > len(data):
        raise DataLoss(f"tensor {entry.name} ends at byte {entry.offset + entry.num_bytes} of a file of {len(data)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it meant to be
        return torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=entry.offset).view(shape)


class TorchKvMemory:
    """Blocks (layers, 2, 16, kv_heads, head_dim) in one tensor, so that one block is one contiguous piece. Implements `seams.KvMemory`.

    Pages of CPU memory are committed when a block is first used.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: str = "cpu") -> None:
        self._shape = (layout.num_layers, 2, BLOCK_TOKENS, layout.num_kv_heads, layout.head_dim)
        # Zeros, not what was there before: attention weighs what lies behind a sequence's end with 0, and 0 times NaN is NaN.
        self.storage = torch.zeros((num_blocks + 1, *self._shape), dtype=DTYPES[layout.dtype], device=device)
        self.storage[NULL_BLOCK].zero_()

    def zero(self, block: int) -> None:
        self.storage[block].zero_()

    def copy(self, source: int, target: int) -> None:
        self.storage[target].copy_(self.storage[source])

    def read(self, block: int) -> memoryview:
        return self.storage[block].cpu().view(torch.uint8).numpy().data.cast("B")

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int = BLOCK_TOKENS) -> None:
        rows = np.frombuffer(data, dtype=np.uint8).reshape(*self._shape[:3], -1)
        target = self.storage[block]
        if target.device.type == "cpu":
            target.view(torch.uint8).numpy().reshape(rows.shape)[:] = rows
        else:
            target.copy_(torch.from_numpy(rows.copy()).view(target.dtype).view(target.shape))
        if num_tokens < BLOCK_TOKENS:
            target[:, :, num_tokens:] = 0

    def all_finite(self, blocks: Sequence[int]) -> bool:
        return bool(torch.isfinite(self.storage[list(blocks)]).all())


class TorchExecutor:
    """Lays the rows out, runs the layers one after another, and gives logits. Implements `seams.Executor`.

    Args:
        attention: Called with the KV memory's tensor and the number of query heads; None for `TorchAttention`.
        kv_codec: Keeps the KV, and attends over it, in the place of both.
    """

    def __init__(
        self,
        model: TorchModel,
        config: EngineConfig,
        *,
        attention: Callable[[torch.Tensor, int], AttentionBackend] = TorchAttention,
        kv_codec: KvCodecRecord | None = None,
    ) -> None:
        if config.executor not in ("auto", "torch"):
            raise ConfigError(f"the model was loaded for the torch executor, the engine is set to {config.executor!r}")
        if (model.dtype, model.device) != (config.dtype, config.device):
            raise ConfigError(f"the model was loaded as {model.dtype} on {model.device}, the engine is set to {config.dtype} on {config.device}")
        if config.num_threads:
            torch.set_num_threads(config.num_threads)  # process-wide
        c = model.config
        self._plugin = model.plugin  # its functions read memory that hangs on it
        self._codec: KvCodec | None = None
        self.memory: KvMemory
        self.attention: AttentionBackend
        if kv_codec is not None:
            from plugmesh_engine.executors.foreign_torch import CodecAttention

            context = KvCodecContext(c, model.version, config.num_blocks, config.num_threads or torch.get_num_threads())
            self._codec, self.layout = build_codec(kv_codec, context, model.kv_tag)
            self.memory, self.attention = self._codec.memory, CodecAttention(self._codec)
        else:
            self.layout = tagged(_layout(model), model.kv_tag)
            kv = TorchKvMemory(self.layout, config.num_blocks, model.device)
            self.memory, self.attention = kv, attention(kv.storage, c.num_heads)
        self._graph = model.graph
        self._model = (model.dtype, model.device)
        self._device = torch.device(model.device)

    def prepare_weights(self, model: Model) -> PreparedTorch:
        """See `seams.Executor`."""
        if not isinstance(model, TorchModel) or (model.dtype, model.device) != self._model:
            raise FailedPrecondition(f"the torch executor runs models of {self._model[0]} on {self._model[1]}", param="version")
        layout = _layout(model) if self._codec is None else dataclasses.replace(self._codec.layout, model=model.version)
        return PreparedTorch(model.graph, model.plugin, tagged(layout, model.kv_tag))

    def set_weights(self, prepared: PreparedTorch) -> None:
        """See `seams.Executor`."""
        new = prepared.graph, prepared.plugin, prepared.layout
        prepared.graph, prepared.plugin, prepared.layout = self._graph, self._plugin, self.layout
        self._graph, self._plugin, self.layout = new

    def run(self, rows: Sequence[Rows], taps: Sequence[Tap] = ()) -> StepResult:
        for tap in taps:
            if not (0 <= tap.entry < len(rows) and 0 <= tap.layer <= self._graph.config.num_layers):
                raise ValueError(f"no layer {tap.layer} of entry {tap.entry} in this step")
        with torch.inference_mode():
            batch = Batch.build(rows, self._device)
            seen: dict[int, torch.Tensor] = {}
            hidden = self._graph.hidden(batch, self.attention, {t.layer for t in taps}, seen)
            tapped = tuple(seen[t.layer][batch.starts[t.entry] : batch.starts[t.entry + 1]].float().cpu().numpy().copy() for t in taps)
            if not len(batch.wanted_rows):
                return StepResult(np.empty(0, np.int32), np.empty((0, self._graph.config.vocab_size), np.float32), tapped)
            logits = self._graph.logits(hidden.index_select(0, batch.wanted_rows))
            best, top = logits.argmax(dim=1), logits.amax(dim=1)
            best = torch.where(torch.isfinite(top), best, -1).int()
            full = [r.full for r in rows for _ in range(r.num_wanted)]
            if not all(full):
                logits = logits[torch.tensor(full, device=self._device)]
            return StepResult(best.cpu().numpy(), logits.cpu().numpy(), tapped)

    def probe(self, rows: Sequence[Rows], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `seams.Executor.probe`."""
        c = self._graph.config
        if not 0 <= layer < c.num_layers:
            raise ValueError(f"the model has no layer {layer}")
        if not rows:
            return np.empty((0, c.num_heads, c.head_dim), np.float32), np.empty((0, c.num_kv_heads, c.head_dim), np.float32)
        with torch.inference_mode():
            q, k = self._graph.queries_and_keys(Batch.build(rows, self._device), self.attention, layer)
            return q.float().cpu().numpy(), k.float().cpu().numpy()

    def close(self) -> None:
        """Torch's threads are the process's; a codec may have some of its own."""
        if self._codec is not None:
            self._codec.close()


@dataclass(slots=True, eq=False)
class PreparedTorch:
    """Implements `seams.PreparedWeights`; its memory goes when nobody refers to the model any more."""

    graph: Llama
    plugin: PluginModel | None
    layout: KvLayout

    def close(self) -> None:
        """Torch's threads are the process's."""


def _layout(model: TorchModel) -> KvLayout:
    c = model.config
    return KvLayout(
        model=model.version, codec="raw", dtype=model.dtype, num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
        block_tokens=BLOCK_TOKENS, block_bytes=c.num_layers * 2 * BLOCK_TOKENS * c.num_kv_heads * c.head_dim * DTYPES[model.dtype].itemsize,
    )  # fmt: skip
