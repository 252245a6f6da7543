"""A plugin's weights and KV codec under the torch executor: the same functions, called between tensor operations. Slow, and for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from plugmesh.records import WeightFormatRecord
from plugmesh.types import ModelConfig
from plugmesh_engine import capsules
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.foreign import (
    EMBEDDING,
    HEAD,
    Packed,
    PluginModel,
    check_format,
    content_digest,
    load_plugin,
    map_tensor,
)
from plugmesh_engine.model.linear import FloatFormat
from plugmesh_engine.seams import KvCodec, ManifestLike
from plugmesh_engine.weights import llama_shapes
from plugmesh_kernels.pack import unpack


class ForeignLinear:
    """Stands in the graph where a weight would: a plugin's linear."""

    def __init__(self, shape: tuple[int, ...], function: Any) -> None:
        self.shape = shape
        self._function = capsules.linear(function)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, N) of x (T, K), in x's dtype and on its device."""
        rows = np.ascontiguousarray(x.float().cpu().numpy())
        y = np.empty((rows.shape[0], self.shape[0]), np.float32)
        self._function(rows, y)
        return torch.from_numpy(y).to(device=x.device, dtype=x.dtype)


class BufferLinear:
    """A weight that `before_layer` fills: unpacked whenever it is used."""

    def __init__(self, packed: Packed) -> None:
        self.shape = packed.shape
        self._packed = packed

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self._packed.shape
        weight = torch.from_numpy(unpack(self._packed.dtype, self._packed.data, n, k))
        return F.linear(x, weight.to(device=x.device, dtype=x.dtype))


class ForeignFormat(FloatFormat):
    """Floats where the weight is a tensor, else what stands in its place. Implements `seams.WeightFormat`."""

    def linear(self, handle: tuple[torch.Tensor, int], packed: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return super().linear(handle, packed, bias)
        x, num_rows = handle
        y: torch.Tensor = packed(x[:num_rows])
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class ForeignTensors:
    """What the graph is built of: tensors, and callables for a plugin's linears."""

    tensors: Mapping[str, Any]
    plugin: PluginModel
    num_bytes: int


def load(manifest: ManifestLike, record: WeightFormatRecord, config: ModelConfig, dtype: torch.dtype, device: str) -> ForeignTensors:
    """Everything native becomes floats of `dtype`; raises what `native.load` raises."""
    check_format(manifest, record)
    files: dict[str, np.ndarray] = {}
    packed = {entry.name: map_tensor(entry, files, record.name) for entry in manifest.tensors}
    shapes = llama_shapes(config)
    plugin = load_plugin(record, config, packed, shapes, content_digest(manifest, packed))
    found: dict[str, Any] = {}
    num_bytes = 0
    for name, shape in {**shapes, HEAD: shapes[EMBEDDING]}.items():
        if name in plugin.linears:
            found[name] = ForeignLinear(shape, plugin.linears[name])
        elif name in plugin.buffers:
            found[name] = BufferLinear(plugin.buffers[name])
        elif name in packed and not (name == EMBEDDING and plugin.embedding is not None):
            stored = packed[name]
            values = stored.data if stored.dtype == "float32" else unpack(stored.dtype, stored.data, shape[0], shape[1])
            found[name] = torch.from_numpy(np.array(values.reshape(shape))).to(device=device, dtype=dtype)
            num_bytes += found[name].numel() * found[name].element_size()
    return ForeignTensors(found, plugin, num_bytes)


class CodecAttention:
    """Attention through a codec, in float32 on the CPU. Implements `seams.AttentionBackend`."""

    def __init__(self, codec: KvCodec) -> None:
        self._codec = codec

    def plan(self, batch: Batch) -> None:
        self._codec.plan(batch.rows)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        queries, keys, values = (np.ascontiguousarray(t.float().cpu().numpy()) for t in (q, k, v))
        out = np.empty(queries.shape, np.float32)
        self._codec.attend(layer, queries, keys, values, out)
        return torch.from_numpy(out).to(device=q.device, dtype=q.dtype)
