"""The native executor: a whole step in one call of `plugmesh_kernels`, on a CPU.

Imports neither torch nor anything that does. Weights are the pages of the weightstore's files in the kernels' packed layouts; KV is bfloat16 or int8,
activations between layers are float32, products of 4-bit and 8-bit weights are exact integers over int8 activations with a scale per 64 values.
A row's result does not depend on what else is in the step, bit for bit.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

import plugmesh_kernels
from plugmesh.errors import ConfigError, DataLoss, FailedPrecondition
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine.batch import Rows, Tap
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.executors import shared_weights
from plugmesh_engine.model.rope import rope_tables
from plugmesh_engine.seams import ManifestLike, StepResult, TensorLike
from plugmesh_engine.weights import check_shapes
from plugmesh_kernels.pack import PIECE_BYTES, packed_num_bytes

log = structlog.get_logger()

SPIN_US = 200
"""How long a worker waits awake for the next step: as long as the engine's own work between two steps of a large batch. An idle worker sleeps."""

ForeignLinear = Callable[[np.ndarray, np.ndarray], None]
"""Fills y (T, N) from x (T, K), float32; or a capsule as `plugmesh_kernels.native().Linear.foreign` describes."""

_LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Packed:
    """A matrix as it lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class NativeModel:
    """A Llama-family model over mapped weights.

    Attributes:
        held: Where the weights lie; see `executors.shared_weights.load`.
        foreign: Functions that take a linear layer's place, by tensor name; see ForeignLinear.
    """

    config: ModelConfig
    version: str
    num_mapped_bytes: int
    num_copied_bytes: int
    tensors: Mapping[str, _Packed]
    held: str = "mapped"
    foreign: Mapping[str, Any] = field(default_factory=dict)

    def build_executor(self, config: EngineConfig) -> NativeExecutor:
        """Executors share the mapped weights; each has its own KV memory and threads."""
        return NativeExecutor(self, config)


def load(manifest: ManifestLike, *, large_pages: bool = True) -> NativeModel:
    """Maps a manifest of format "native", in large pages that the engines of a host share where that is possible.

    Raises:
        FailedPrecondition: A tensor is not packed for these kernels.
        DataLoss: A file is shorter than the manifest says, or a tensor is missing or has the wrong shape.
    """
    config = ModelConfig.from_json(manifest.config_json)
    files: dict[str, np.ndarray] = {}
    tensors = {entry.name: _map(entry, files) for entry in manifest.tensors}
    check_shapes(config, {name: t.shape for name, t in tensors.items()})
    held, raw = "mapped", {name: t.data.view(np.uint8) for name, t in tensors.items()}
    if large_pages:
        raw, held = shared_weights.load(plugmesh_kernels.native(), manifest.version, raw)
        tensors = {n: _Packed(t.dtype, t.shape, raw[n].view(np.float32) if t.dtype == "float32" else raw[n]) for n, t in tensors.items()}
    num_bytes = sum(r.nbytes for r in raw.values())
    copied = num_bytes if held == "private" else 0
    log.info("weights.loaded", held=held, num_bytes=num_bytes)
    return NativeModel(config, manifest.version, num_bytes - copied, copied, tensors, held)


def _map(entry: TensorLike, files: dict[str, np.ndarray]) -> _Packed:
    shape = tuple(int(n) for n in entry.shape)
    if entry.dtype in PIECE_BYTES and len(shape) == 2:
        num_bytes = packed_num_bytes(entry.dtype, *shape)
    elif entry.dtype == "float32":
        num_bytes = math.prod(shape) * 4
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
    return _Packed(entry.dtype, shape, data.view(np.float32) if entry.dtype == "float32" else data)


class NativeKv:
    """Blocks in the kernels' layout (`plugmesh_kernels/csrc/kernels.h`, KV memory): one row of `storage` (blocks, bytes) uint8 each.

    Pages are committed when a block is first written; block 0 stays zero.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, all_finite: Callable[[Sequence[int]], bool]) -> None:
        self.storage = _zeroed((num_blocks + 1) * layout.block_bytes).reshape(num_blocks + 1, layout.block_bytes)
        self._layout = layout
        self._all_finite = all_finite

    def zero(self, block: int) -> None:
        self.storage[block] = 0

    def copy(self, source: int, target: int) -> None:
        self.storage[target] = self.storage[source]

    def read(self, block: int) -> memoryview:
        return self.storage[block].data

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int) -> None:
        """Fills a block; tokens from `num_tokens` on become zero."""
        self.storage[block] = np.frombuffer(data, np.uint8)
        if num_tokens < BLOCK_TOKENS:
            self._zero_tail(self.storage[block], num_tokens)

    def all_finite(self, blocks: Sequence[int]) -> bool:
        return self._all_finite(blocks)

    def _zero_tail(self, block: np.ndarray, num_tokens: int) -> None:
        c = self._layout
        layers = block.reshape(c.num_layers, 2, c.num_kv_heads, -1)
        if c.dtype == "bfloat16":
            words = layers.view(np.uint16)
            words[:, 0].reshape(c.num_layers, c.num_kv_heads, c.head_dim // 2, BLOCK_TOKENS, 2)[..., num_tokens:, :] = 0
            v = words[:, 1].reshape(c.num_layers, c.num_kv_heads, BLOCK_TOKENS // 2, c.head_dim, 2)
            v[:, :, (num_tokens + 1) // 2 :] = 0
            if num_tokens % 2:
                v[:, :, num_tokens // 2, :, 1] = 0
            return
        layers[..., num_tokens * 4 : BLOCK_TOKENS * 4] = 0  # scales
        data = layers[..., BLOCK_TOKENS * 4 :]
        data[:, 0].reshape(c.num_layers, c.num_kv_heads, -1, BLOCK_TOKENS, 4)[..., num_tokens:, :] = 0
        data[:, 1].reshape(c.num_layers, c.num_kv_heads, BLOCK_TOKENS, -1)[:, :, num_tokens:] = 0


def _zeroed(num_bytes: int) -> np.ndarray:
    """Memory that is committed when touched, in large pages where there are any: attention streams through it."""
    try:
        memory: np.ndarray = plugmesh_kernels.native().large_pages(num_bytes)
        return memory
    except OSError:
        return np.zeros(num_bytes, np.uint8)


class NativeExecutor:
    """Runs steps of a `NativeModel`. One thread calls it; it has `num_threads - 1` workers of its own.

    Args:
        config: Of it `num_blocks`, `kv_dtype` and `num_threads` count.
    """

    def __init__(self, model: NativeModel, config: EngineConfig) -> None:
        c = model.config
        kernels = plugmesh_kernels.native()
        if config.kv_dtype not in ("bfloat16", "int8"):
            raise ConfigError(f"the native executor keeps KV in bfloat16 or int8, not {config.kv_dtype!r}")
        block_bytes = kernels.kv_block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, config.kv_dtype)
        self.layout = KvLayout(
            model=model.version, codec="native-int8" if config.kv_dtype == "int8" else "native-bf16", dtype=config.kv_dtype, num_layers=c.num_layers,
            num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, block_tokens=BLOCK_TOKENS, block_bytes=block_bytes,
        )  # fmt: skip
        self.memory = NativeKv(self.layout, config.num_blocks, lambda blocks: self._native.all_finite(list(blocks)))
        cos, sin = rope_tables(c)
        shape = {
            "hidden": c.hidden_size, "intermediate": c.intermediate_size, "num_layers": c.num_layers, "num_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "vocab": c.vocab_size, "max_position": c.max_position, "eps": c.rms_norm_eps,
            "rope_interleaved": c.rope_style == "interleaved",
        }  # fmt: skip
        linears = {name: self._linear(kernels, model, name) for name, t in model.tensors.items() if t.dtype in PIECE_BYTES}
        layers = []
        for i in range(c.num_layers):
            p = f"model.layers.{i}."
            layer: dict[str, Any] = {short: linears[f"{p}{name}.weight"] for short, name in _LINEARS.items()}
            layer["input_norm"] = model.tensors[f"{p}input_layernorm.weight"].data
            layer["mlp_norm"] = model.tensors[f"{p}post_attention_layernorm.weight"].data
            layers.append(layer)
        embedding = linears["model.embed_tokens.weight"]
        head = embedding if c.tie_word_embeddings else linears["lm_head.weight"]
        self._native = kernels.Executor(
            shape=shape, layers=layers, embedding=embedding, norm=model.tensors["model.norm.weight"].data, head=head, cos=cos, sin=sin,
            kv=self.memory.storage, kv_type=config.kv_dtype, isa=kernels.isa(), num_threads=config.num_threads or num_cpus(), spin_us=SPIN_US, pin=False,
        )  # fmt: skip

    @staticmethod
    def _linear(kernels: Any, model: NativeModel, name: str) -> Any:
        t = model.tensors[name]
        if name in model.foreign:
            return kernels.Linear.foreign(t.shape[0], t.shape[1], model.foreign[name])
        bias = model.tensors.get(name.removesuffix("weight") + "bias")
        return kernels.Linear.packed(t.dtype, t.shape[0], t.shape[1], t.data, None if bias is None else bias.data)

    def run(self, rows: Sequence[Rows], taps: Sequence[Tap] = ()) -> StepResult:
        """One forward pass; writes the KV of all rows. Raises ValueError for tokens, blocks, positions or taps out of range."""
        best, logits, hidden = self._native.run(rows, taps)
        return StepResult(best, logits, hidden)

    def probe(self, rows: Sequence[Rows], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `seams.Executor.probe`; a row's values do not depend on what else is in the step, bit for bit."""
        q, k = self._native.probe(rows, layer)
        return q, k

    def set_attention(self, function: Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None] | None) -> None:
        """Another attention: function(layer, q (T, heads, head_dim), k, v (T, kv_heads, head_dim), out to fill), float32; it keeps k and v itself."""
        self._native.set_attention(function)

    def sample(self, logits: np.ndarray, *parameters: np.ndarray) -> np.ndarray:
        """`plugmesh_kernels.native().sample_rows` on the executor's threads."""
        tokens: np.ndarray = self._native.sample(logits, *parameters)
        return tokens

    def close(self) -> None:
        """Ends the threads."""
        self._native.close()


def num_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
