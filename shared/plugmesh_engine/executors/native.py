"""The native executor: a whole step in one call of `plugmesh_kernels`, on a CPU.

Imports neither torch nor anything that does. Weights are the pages of the weightstore's files in the kernels' packed layouts; KV is bfloat16 or int8,
activations between layers are float32, products of 4-bit and 8-bit weights are exact integers over int8 activations with a scale per 64 values.
A row's result does not depend on what else is in the step, bit for bit.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

import plugmesh_kernels
from plugmesh.errors import ConfigError, FailedPrecondition
from plugmesh.records import KvCodecContext, KvCodecRecord, WeightFormatRecord
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine.batch import Rows, StepResult, Tap
from plugmesh_engine.config import EngineConfig, num_cpus
from plugmesh_engine.executors import shared_weights
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
from plugmesh_engine.kv.codec import build_codec, tagged
from plugmesh_engine.model.rope import rope_tables
from plugmesh_engine.seams import KvCodec, KvMemory, ManifestLike, Model
from plugmesh_engine.weights import check_shapes, llama_shapes

log = structlog.get_logger()

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not know it

SPIN_US = 200
"""How long a worker waits awake for the next step: as long as the engine's own work between two steps of a large batch. An idle worker sleeps."""

ForeignLinear = Callable[[np.ndarray, np.ndarray], None]
"""Fills y (T, N) from x (T, K), float32; or a capsule as `plugmesh_kernels.native().Linear.foreign` describes."""

_LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NativeModel:
    """A Llama-family model over mapped weights.

    Attributes:
        held: Where the weights lie; see `executors.shared_weights.load`.
        foreign: Functions that take a linear layer's place, by tensor name; see ForeignLinear.
        plugin: What a weight format of a plugin put in the place of native weights; None for the format "native".
    """

    config: ModelConfig
    version: str
    num_mapped_bytes: int
    num_copied_bytes: int
    tensors: Mapping[str, Packed]
    held: str = "mapped"
    foreign: Mapping[str, Any] = field(default_factory=dict)
    plugin: PluginModel | None = None

    def build_executor(self, config: EngineConfig, kv_codec: KvCodecRecord | None = None) -> NativeExecutor:
        """Executors share the mapped weights; each has its own KV memory and threads."""
        return NativeExecutor(self, config, kv_codec)


def load(manifest: ManifestLike, *, large_pages: bool = True, weight_format: WeightFormatRecord | None = None) -> NativeModel:
    """Maps a manifest of format "native" or of a plugin's format, in large pages that the engines of a host share where that is possible.

    Raises:
        FailedPrecondition: A tensor is not packed for these kernels, or for the plugin's format.
        DataLoss: A file is shorter than the manifest says, or a tensor is missing or has the wrong shape.
        PluginError: The format's `load` failed, or does not stand for all that it should.
    """
    config = ModelConfig.from_json(manifest.config_json)
    check_format(manifest, weight_format)
    files: dict[str, np.ndarray] = {}
    tensors = {entry.name: map_tensor(entry, files, weight_format.name if weight_format else "") for entry in manifest.tensors}
    version, digest = manifest.version, ""
    if weight_format is None:
        check_shapes(config, {name: t.shape for name, t in tensors.items()})
    else:
        digest = content_digest(manifest, tensors)
        version = f"{version}:{digest}"
    held, raw = "mapped", {name: t.data.view(np.uint8) for name, t in tensors.items()}
    if large_pages:
        raw, held = shared_weights.load(plugmesh_kernels.native(), version, raw)
        tensors = {n: Packed(t.dtype, t.shape, raw[n].view(np.float32) if t.dtype == "float32" else raw[n]) for n, t in tensors.items()}
    plugin = None if weight_format is None else load_plugin(weight_format, config, tensors, llama_shapes(config), digest)
    num_bytes = sum(r.nbytes for r in raw.values())
    copied = num_bytes if held == "private" else 0
    extra = max(0, plugin.weights.num_bytes - num_bytes) if plugin else 0  # what the format made of the stored bytes, in this process
    log.info("weights.loaded", held=held, num_bytes=num_bytes, num_extra_bytes=extra, format=manifest.format)
    return NativeModel(config, manifest.version, num_bytes - copied, copied + extra, tensors, held, plugin=plugin)


class NativeKv:
    """Blocks in the kernels' layout (`plugmesh_kernels/csrc/kernels.h`, KV memory): one row of `storage` (blocks, bytes) uint8 each.

    Pages are committed when a block is first written; block 0 stays zero.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, all_finite: Callable[[Sequence[int]], bool]) -> None:
        self.storage = _zeroed((num_blocks + 1) * layout.block_bytes).reshape(num_blocks + 1, layout.block_bytes)
        self._layout = layout
        self._all_finite = all_finite

    def commit(self) -> bool:
        """Has the system back all blocks with memory now, whatever they hold; False where it cannot be asked to (Linux before 5.14, other systems)."""
        if not sys.platform.startswith("linux"):
            return False
        start, end = self.storage.ctypes.data, self.storage.ctypes.data + self.storage.nbytes
        start += -start % mmap.PAGESIZE
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        return int(madvise(ctypes.c_void_p(start), ctypes.c_size_t((end - start) // mmap.PAGESIZE * mmap.PAGESIZE), _MADV_POPULATE_WRITE)) == 0

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
        config: Of it `num_blocks`, `kv_dtype` (without a codec) and `num_threads` count.
        kv_codec: Keeps the KV, and attends over it, in place of the native KV, for which no memory is taken then.
    """

    def __init__(self, model: NativeModel, config: EngineConfig, kv_codec: KvCodecRecord | None = None) -> None:
        c = model.config
        kernels = plugmesh_kernels.native()
        num_threads = config.num_threads or num_cpus()
        self._model = model  # a plugin's functions live as long as its object
        self._config, self._num_threads = config, num_threads
        self._codec: KvCodec | None = None
        self._attention: Any = None
        self._storage: np.ndarray | None = None
        tag = model.plugin.kv_tag if model.plugin else ""
        if kv_codec is not None:
            self._codec, self.layout = build_codec(kv_codec, KvCodecContext(c, model.version, config.num_blocks, num_threads), tag)
            self.memory: KvMemory = self._codec.memory
            self._attention = getattr(self._codec, "capsule", None) or self._codec.attend
        else:
            self.layout = tagged(_layout(kernels, model, config), tag)
            kv = NativeKv(self.layout, config.num_blocks, lambda blocks: self._native.all_finite(list(blocks)))
            self.memory, self._storage = kv, kv.storage
            if config.commit_kv:
                log.info("kv.committed", is_committed=kv.commit(), num_bytes=kv.storage.nbytes)
        try:
            self._native = self._bind(model)
        except BaseException:
            if self._codec is not None:
                self._codec.close()
            raise

    def _bind(self, model: NativeModel) -> Any:
        """The kernels' executor over a model's weights and this one's KV; with threads of its own, which sleep until they have something to do."""
        c, config, storage = model.config, self._config, self._storage
        kernels = plugmesh_kernels.native()
        cos, sin = rope_tables(c)
        shape = {
            "hidden": c.hidden_size, "intermediate": c.intermediate_size, "num_layers": c.num_layers, "num_heads": c.num_heads,
            "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "vocab": c.vocab_size, "max_position": c.max_position, "eps": c.rms_norm_eps,
            "rope_interleaved": c.rope_style == "interleaved",
        }  # fmt: skip
        linears = _linears(kernels, model)
        layers = []
        for i in range(c.num_layers):
            p = f"model.layers.{i}."
            layer: dict[str, Any] = {short: linears[f"{p}{name}.weight"] for short, name in _LINEARS.items()}
            layer["input_norm"] = model.tensors[f"{p}input_layernorm.weight"].data
            layer["mlp_norm"] = model.tensors[f"{p}post_attention_layernorm.weight"].data
            layers.append(layer)
        native = kernels.Executor(
            shape=shape, layers=layers, embedding=linears[EMBEDDING], norm=model.tensors["model.norm.weight"].data, head=linears[HEAD], cos=cos,
            sin=sin, kv=storage, num_blocks=config.num_blocks + 1, kv_type="bfloat16" if storage is None else config.kv_dtype, isa=kernels.isa(),
            num_threads=self._num_threads, spin_us=SPIN_US, pin=False,
        )  # fmt: skip
        if self._attention is not None:
            native.set_attention(self._attention)
        if model.plugin is not None:
            native.set_before_layer(model.plugin.before_layer)
            native.set_embedding(model.plugin.embedding)
        return native

    def prepare_weights(self, model: Model) -> PreparedNative:
        """See `seams.Executor`. Beside the weights it takes threads, and no KV memory."""
        if not isinstance(model, NativeModel):
            raise FailedPrecondition(f"the native executor runs native models, not {type(model).__name__}", param="version")
        kernels = plugmesh_kernels.native()
        layout = _layout(kernels, model, self._config) if self._codec is None else dataclasses.replace(self._codec.layout, model=model.version)
        return PreparedNative(model, self._bind(model), tagged(layout, model.plugin.kv_tag if model.plugin else ""))

    def set_weights(self, prepared: PreparedNative) -> None:
        """See `seams.Executor`."""
        new = prepared.model, prepared.native, prepared.layout
        prepared.model, prepared.native, prepared.layout = self._model, self._native, self.layout
        self._model, self._native, self.layout = new

    def run(self, rows: Sequence[Rows], taps: Sequence[Tap] = ()) -> StepResult:
        """One forward pass; writes the KV of all rows. Raises ValueError for tokens, blocks, positions or taps out of range."""
        if self._codec is not None:
            self._codec.plan(rows)
        best, logits, hidden = self._native.run(rows, taps)
        return StepResult(best, logits, hidden)

    def probe(self, rows: Sequence[Rows], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """See `seams.Executor.probe`; a row's values do not depend on what else is in the step, bit for bit."""
        if self._codec is not None:
            self._codec.plan(rows)
        q, k = self._native.probe(rows, layer)
        return q, k

    def set_attention(self, function: Callable[[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None] | None) -> None:
        """Another attention: function(layer, q (T, heads, head_dim), k, v (T, kv_heads, head_dim), out to fill), float32; it keeps k and v itself."""
        self._native.set_attention(function)
        self._attention = function

    def sample(self, logits: np.ndarray, *parameters: np.ndarray) -> np.ndarray:
        """`plugmesh_kernels.native().sample_rows` on the executor's threads."""
        tokens: np.ndarray = self._native.sample(logits, *parameters)
        return tokens

    @property
    def begin_matches(self) -> Callable[..., Any] | None:
        """Lends a thread to the matchers of grammars, see `native_checks.NativeChecks`; None when there is only the engine's own."""
        return self._begin_matches if self._num_threads > 1 else None

    @property
    def keeps_logits(self) -> bool:
        """Whether `Rows.kept` may be asked for."""
        return self._num_threads > 1

    def _begin_matches(self, *args: Any) -> Any:
        return self._native.begin_matches(*args)  # of the weights of the moment

    def close(self) -> None:
        """Ends the threads."""
        try:
            self._native.close()
        finally:
            if self._codec is not None:
                self._codec.close()


@dataclass(slots=True, eq=False)
class PreparedNative:
    """Implements `seams.PreparedWeights`."""

    model: NativeModel
    native: Any
    layout: KvLayout

    def close(self) -> None:
        self.native.close()


def _layout(kernels: Any, model: NativeModel, config: EngineConfig) -> KvLayout:
    c = model.config
    if config.kv_dtype not in ("bfloat16", "int8"):
        raise ConfigError(f"the native executor keeps KV in bfloat16 or int8, not {config.kv_dtype!r}")
    return KvLayout(
        model=model.version, codec="native-int8" if config.kv_dtype == "int8" else "native-bf16", dtype=config.kv_dtype, num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, block_tokens=BLOCK_TOKENS,
        block_bytes=kernels.kv_block_bytes(c.num_layers, c.num_kv_heads, c.head_dim, config.kv_dtype),
    )  # fmt: skip


def _linears(kernels: Any, model: NativeModel) -> dict[str, Any]:
    """Every matrix by its tensor name, and the head as "lm_head.weight" also where it is tied."""
    shapes = {name: shape for name, shape in llama_shapes(model.config).items() if len(shape) == 2}
    foreign = {**model.foreign, **(model.plugin.linears if model.plugin else {})}
    buffers = model.plugin.buffers if model.plugin else {}

    def linear(name: str, n: int, k: int) -> Any:
        bias = model.tensors.get(name.removesuffix("weight") + "bias")
        values = None if bias is None else bias.data
        if name in foreign:
            return kernels.Linear.foreign(n, k, foreign[name], values)
        if name == EMBEDDING and model.plugin is not None and model.plugin.embedding is not None:
            return kernels.Linear.foreign(n, k, lambda x, y: None)  # rows come from the plugin's function, and the head has one of its own
        t = buffers.get(name) or model.tensors[name]
        return kernels.Linear.packed(t.dtype, n, k, t.data, values)

    found = {name: linear(name, *shape) for name, shape in shapes.items()}
    if model.config.tie_word_embeddings:
        found[HEAD] = linear(HEAD, *shapes[EMBEDDING]) if HEAD in foreign or HEAD in buffers else found[EMBEDDING]
    return found
