"""The GPU executor: the kernels of `plugmesh_kernels.gpu`, and a step of decodes as one captured CUDA graph.

Weights keep the 4 and 8 bits of the format "native", or are floats of the engine's dtype. Steps with prompts run kernel by kernel, steps of single rows
(decodes and short drafts) are padded to one of a few sizes and replayed as a graph, because launching some 250 kernels takes longer than running them.

On a CPU the same code runs in Triton's interpreter without graphs, for tests: set TRITON_INTERPRET=1 before triton is imported, and the device to "cpu".

A decode row's attention and its products with packed weights do not depend on the rest of the step, bit for bit, as long as it has at most SMALL_ROWS rows;
beyond that torch multiplies, as it does with float weights, and its sums may be ordered otherwise. So drafts are exact up to that rounding here.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import structlog
import torch

from plugmesh.errors import ConfigError, FailedPrecondition
from plugmesh.records import KvCodecRecord
from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine.batch import Rows, StepResult, Tap
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.executors.torch import DTYPES, TorchKvMemory
from plugmesh_engine.executors.torch import _map as map_floats
from plugmesh_engine.foreign import map_tensor as map_packed
from plugmesh_engine.model.rope import rope_tables
from plugmesh_engine.seams import ManifestLike, TensorLike
from plugmesh_engine.weights import check_shapes
from plugmesh_kernels.gpu import available
from plugmesh_kernels.gpu.argmax import argmax
from plugmesh_kernels.gpu.decode import MAX_SPLITS, DecodeScratch, decode_attention, num_splits
from plugmesh_kernels.gpu.model import GpuLayer, GpuLlama, Joined, Weight
from plugmesh_kernels.gpu.pack import floats_from_native, from_native
from plugmesh_kernels.gpu.prefill import Chunks, prefill_attention

log = structlog.get_logger()

MAX_GRAPH_ROWS = 256
GRAPH_SPLITS = (4, 16, MAX_SPLITS)  # rows of up to 512, 2,048 and more tokens; programs without a split cost little, but not nothing


@dataclass(frozen=True, slots=True)
class CudaModel:
    """A Llama-family model on a GPU. Implements `seams.Model`."""

    graph: GpuLlama
    config: ModelConfig
    version: str
    dtype: str
    device: str
    num_mapped_bytes: int
    num_copied_bytes: int

    def build_executor(self, config: EngineConfig, kv_codec: KvCodecRecord | None = None) -> CudaExecutor:
        """Raises ConfigError when the model was loaded for another dtype or device than the engine is set to, or there is a codec."""
        if kv_codec is not None:
            raise ConfigError(f"the cuda executor keeps its own KV; the codec {kv_codec.name!r} works under native and torch")
        return CudaExecutor(self, config)


def load(manifest: ManifestLike, config: EngineConfig) -> CudaModel:
    """Copies the weights of a manifest of format "native" or of floats to `config.device`.

    Raises:
        FailedPrecondition: A tensor is stored in neither.
        DataLoss: A file is shorter than the manifest says, or a tensor is missing or has the wrong shape.
        ConfigError: No such device here, or an unknown dtype, architecture or rope scaling.
    """
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"the engine computes in float32 or bfloat16, not {config.dtype!r}")
    if not available(config.device):
        raise ConfigError(f"the cuda executor needs triton and a CUDA device, and there is none as {config.device!r} (TRITON_INTERPRET=1 is for tests)")
    c = ModelConfig.from_json(manifest.config_json)
    if c.architecture != "llama":
        raise ConfigError(f"the cuda executor knows llama, not {c.architecture!r}")
    dtype = DTYPES[config.dtype]
    check_shapes(c, {t.name: tuple(int(n) for n in t.shape) for t in manifest.tensors})
    files = _Files({t.name: t for t in manifest.tensors}, {}, {})
    graph = _build(c, dtype, config.device, files)
    return CudaModel(graph, c, manifest.version, config.dtype, config.device, 0, graph.nbytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """The tensors of a manifest, read one by one."""

    entries: Mapping[str, TensorLike]
    packed: dict[str, np.ndarray]
    floats: dict[str, mmap.mmap]

    def matrix(self, name: str, dtype: torch.dtype, device: str) -> Weight:
        """4 and 8 bits stay, floats become `dtype`."""
        entry = self.entries[name]
        if entry.dtype in DTYPES:
            return map_floats(entry, self.floats).to(device=device, dtype=dtype)
        data = map_packed(entry, self.packed).data
        n, k = (int(i) for i in entry.shape)
        if entry.dtype in ("q4_1x16", "q8_0x16"):
            return from_native(entry.dtype, data, n, k).to(device)
        return floats_from_native(entry.dtype, data, n, k).to(device=device, dtype=dtype)

    def vector(self, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        return map_floats(self.entries[name], self.floats).to(device=device, dtype=dtype)


def _build(c: ModelConfig, dtype: torch.dtype, device: str, files: _Files) -> GpuLlama:
    """Layer by layer, so that no more than one layer's tensors are on the device twice."""

    def matrix(name: str) -> Weight:
        return files.matrix(f"{name}.weight", dtype, device)

    def norm(name: str) -> torch.Tensor:
        return files.vector(f"{name}.weight", torch.float32, device)

    def joined(prefix: str, *parts: str) -> Joined:
        biases = [files.vector(f"{prefix}{p}.bias", dtype, device) for p in parts if f"{prefix}{p}.bias" in files.entries]
        return Joined.build([matrix(prefix + p) for p in parts], biases)

    layers = []
    for i in range(c.num_layers):
        p = f"model.layers.{i}."
        layers.append(
            GpuLayer(
                input_norm=norm(f"{p}input_layernorm"), qkv=joined(p, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                o=joined(p, "self_attn.o_proj"), mlp_norm=norm(f"{p}post_attention_layernorm"),
                gate_up=joined(p, "mlp.gate_proj", "mlp.up_proj"), down=joined(p, "mlp.down_proj"),
            )
        )  # fmt: skip
    embedding = matrix("model.embed_tokens")
    head = embedding if c.tie_word_embeddings else matrix("lm_head")
    cos, sin = (torch.from_numpy(t).to(device) for t in rope_tables(c))
    return GpuLlama(c, dtype, embedding, tuple(layers), norm("model.norm"), Joined((head,), None), cos, sin)


@dataclass(slots=True)
class _Single:
    """Rows that attend on their own, as arrays of the step's size P; entries from the number in use on are padding: block -1, length 0.

    On the device: packed (4, P) int32 (token ids, positions, blocks, lengths), table (P, width) int32, and the results best (P,) int32, logits
    (P, vocab) in the model's dtype.
    """

    staged: torch.Tensor
    staged_table: torch.Tensor
    packed: torch.Tensor
    table: torch.Tensor
    rows: torch.Tensor
    best: torch.Tensor
    logits: torch.Tensor
    seen: list[list[int]] = field(default_factory=list)

    @classmethod
    def build(cls, size: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> _Single:
        pinned = device.type == "cuda"
        return cls(
            staged=torch.empty(4, size, dtype=torch.int32, pin_memory=pinned),
            staged_table=torch.zeros(size, width, dtype=torch.int32, pin_memory=pinned),
            packed=torch.zeros(4, size, dtype=torch.int32, device=device),
            table=torch.zeros(size, width, dtype=torch.int32, device=device),
            rows=torch.arange(size, dtype=torch.int32, device=device),
            best=torch.empty(size, dtype=torch.int32, device=device),
            logits=torch.empty(size, vocab, dtype=dtype, device=device),
            seen=[[] for _ in range(size)],
        )

    def fill(self, rows: Sequence[Rows]) -> None:
        """Puts the rows in; a row's part of the table travels only when its blocks have changed."""
        staged = self.staged.numpy()
        staged[0], staged[1], staged[2], staged[3] = 0, 0, -1, 0
        i, changed = 0, []
        for r in rows:
            same = list(r.blocks)
            for j, token in enumerate(r.token_ids):
                position = r.num_computed + j
                staged[:, i] = (token, position, same[position // BLOCK_TOKENS], position + 1)
                if self.seen[i] != same:
                    self.seen[i] = same
                    self.staged_table.numpy()[i, : len(same)] = same[: self.table.shape[1]]
                    changed.append(i)
                i += 1
        self.packed.copy_(self.staged, non_blocking=True)
        if changed:  # from the first to the last: one copy, without a gather before it
            first, last = changed[0], changed[-1] + 1
            self.table[first:last].copy_(self.staged_table[first:last], non_blocking=True)

    def clear(self) -> None:
        """Padding everywhere, for warm-up and capture."""
        self.fill(())


class CudaExecutor:
    """Runs steps of a `CudaModel`. Implements `seams.Executor`.

    Args:
        config: Of it `num_blocks`, `max_num_sequences`, `max_model_len` and `max_draft_tokens` count.
        graphs: Whether to capture; None: on a GPU.
    """

    def __init__(self, model: CudaModel, config: EngineConfig, *, graphs: bool | None = None) -> None:
        if (model.dtype, model.device) != (config.dtype, config.device):
            raise ConfigError(f"the model was loaded as {model.dtype} on {model.device}, the engine is set to {config.dtype} on {config.device}")
        c = model.config
        self.layout = KvLayout(
            model=model.version, codec="raw", dtype=model.dtype, num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            block_tokens=BLOCK_TOKENS, block_bytes=c.num_layers * 2 * BLOCK_TOKENS * c.num_kv_heads * c.head_dim * DTYPES[model.dtype].itemsize,
        )  # fmt: skip
        self.memory = TorchKvMemory(self.layout, config.num_blocks, model.device)
        self._model, self._pool, self._device = model.graph, self.memory.storage, torch.device(model.device)
        self._use_graphs = self._device.type == "cuda" if graphs is None else graphs
        self._single_rows = 1 + config.max_draft_tokens  # more rows than that are a chunk of a prompt
        self._sizes = graph_sizes(config.max_num_sequences * (1 + min(config.max_draft_tokens, 3)))
        context = min(config.max_model_len or c.max_position, c.max_position)
        self._width = min(-(-context // BLOCK_TOKENS) + 1, config.num_blocks)
        self._singles: dict[int, _Single] = {}
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self._use_graphs else None
        self._scratch = DecodeScratch(self._sizes[-1], c.num_heads, c.head_dim, self._device)

    def run(self, rows: Sequence[Rows], taps: Sequence[Tap] = ()) -> StepResult:
        """One forward pass; writes the KV of all rows. Blocks until the results are on the host. Raises FailedPrecondition for taps: it has none."""
        if taps:
            raise FailedPrecondition("the cuda executor gives no hidden states; set the executor to torch or native", param="executor")
        with torch.inference_mode(), torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            total = sum(len(r.token_ids) for r in rows)
            if total <= self._sizes[-1] and all(0 < len(r.token_ids) <= self._single_rows and r.num_computed for r in rows):
                return self._run_single(rows, total)
            return self._run_mixed(rows)

    def probe(self, rows: Sequence[Rows], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Raises FailedPrecondition: graphs hold whole steps."""
        raise FailedPrecondition("the cuda executor gives no queries and keys; set the executor to torch or native", param="executor")

    def close(self) -> None:
        """Frees the graphs and their memory; there are no threads."""
        self._graphs.clear()
        self._singles.clear()

    # -- rows that attend on their own --------------------------------------------------------------------------------

    def _run_single(self, rows: Sequence[Rows], total: int) -> StepResult:
        size = next(s for s in self._sizes if s >= total)
        single = self._singles.get(size)
        if single is None:
            c = self._model.config
            single = self._singles[size] = _Single.build(size, self._width, c.vocab_size, self._model.dtype, self._device)
        needed = num_splits(max(r.num_computed + len(r.token_ids) for r in rows))
        splits = next(s for s in GRAPH_SPLITS if s >= needed)
        graph = self._graphs.get((size, splits)) or self._capture(single, size, splits)
        single.fill(rows)
        if graph is None:
            self._compute_single(single, needed)
        else:
            graph.replay()
        ends = np.cumsum([len(r.token_ids) for r in rows])
        wanted = [i for r, end in zip(rows, ends.tolist(), strict=True) for i in range(end - r.num_wanted, end)]
        full = [i for r, end in zip(rows, ends.tolist(), strict=True) if r.full for i in range(end - r.num_wanted, end)]
        return StepResult(single.best.cpu().numpy()[wanted], self._to_host(single.logits, full))

    def _compute_single(self, s: _Single, splits: int) -> None:
        """Reads and writes nothing but the buffers of `s`, the pool and the scratch, all of which stay where they are."""
        ids, positions, blocks, lengths = s.packed.unbind()

        def attend(q: torch.Tensor, layer: int) -> torch.Tensor:
            out = torch.empty_like(q)
            decode_attention(q, self._pool, layer, s.rows, s.table, lengths, splits, self._scratch, out)
            return out

        s.logits.copy_(self._model.logits(*self._model.hidden(ids, positions, blocks, self._pool, attend)))
        argmax(s.logits, s.best)

    def _capture(self, s: _Single, size: int, splits: int) -> torch.cuda.CUDAGraph | None:
        """Captures the step for padded rows; None where that is off or has failed before. Takes a tenth of a second, the first one longer: kernels compile."""
        if not self._use_graphs:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            s.clear()  # the warm-up must not write into anybody's blocks
            torch.cuda.synchronize()  # the host's side is filled again below
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate and kernels are compiled on their first call, which a capture forbids
                for _ in range(2):
                    self._compute_single(s, splits)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
                self._compute_single(s, splits)
        except Exception as e:
            self._use_graphs = False
            log.warning("cuda.capture_failed", num_rows=size, error=type(e).__name__, note="steps run kernel by kernel")
            return None
        self._graphs[size, splits] = graph
        log.debug("cuda.captured", num_rows=size, num_splits=splits)
        return graph

    # -- steps with chunks of prompts ---------------------------------------------------------------------------------

    def _run_mixed(self, rows: Sequence[Rows]) -> StepResult:
        """All chunks attend in one launch; single rows among them as they would in a step of their own."""
        c = self._model.config
        counts = np.array([len(r.token_ids) for r in rows], dtype=np.int32)
        starts = np.cumsum(counts, dtype=np.int32) - counts
        computed = np.array([r.num_computed for r in rows], dtype=np.int32)
        table = np.zeros((len(rows), max((len(r.blocks) for r in rows), default=0) or 1), dtype=np.int32)
        for i, r in enumerate(rows):
            table[i, : len(r.blocks)] = r.blocks
        positions = np.concatenate([np.arange(r.num_computed, r.num_computed + n, dtype=np.int32) for r, n in zip(rows, counts, strict=True)])
        owner = np.repeat(np.arange(len(rows)), counts)
        alone = (counts <= self._single_rows) & (computed > 0)
        single = np.flatnonzero(alone[owner])
        chunk = np.flatnonzero(~alone & (counts > 0))
        chunks = Chunks.build(starts[chunk], counts[chunk], computed[chunk], table[chunk], self._device)
        single_table, lengths, at = self._put(table[owner[single]]), self._put(positions[single] + 1), self._put(single)
        splits = num_splits(int(positions[single].max()) + 1) if len(single) else 1

        def attend(q: torch.Tensor, layer: int) -> torch.Tensor:
            out = torch.empty_like(q)
            for i in range(0, len(single), self._scratch.max_entries):
                part = slice(i, i + self._scratch.max_entries)
                decode_attention(q, self._pool, layer, at[part], single_table[part], lengths[part], splits, self._scratch, out)
            prefill_attention(q, self._pool, layer, chunks, out)
            return out

        ids = self._put(np.array([t for r in rows for t in r.token_ids], dtype=np.int32))
        blocks = self._put(table[owner, positions // BLOCK_TOKENS])
        x, add = self._model.hidden(ids, self._put(positions), blocks, self._pool, attend)
        ends = (starts + counts).tolist()
        wanted = [i for r, end in zip(rows, ends, strict=True) for i in range(end - r.num_wanted, end)]
        if not wanted:
            return StepResult(np.empty(0, np.int32), np.empty((0, c.vocab_size), np.float32))
        chosen = torch.tensor(wanted, device=self._device)
        logits = self._model.logits(x.index_select(0, chosen), add.index_select(0, chosen))
        full = [i for i, f in enumerate(f for r in rows for f in [r.full] * r.num_wanted) if f]
        return StepResult(argmax(logits).cpu().numpy(), self._to_host(logits, full))

    def _put(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(self._device)

    def _to_host(self, logits: torch.Tensor, rows: Sequence[int]) -> np.ndarray:
        """(F, vocab) float32 of the caller's own."""
        if not rows:
            return np.empty((0, logits.shape[1]), np.float32)
        chosen = logits.index_select(0, torch.tensor(rows, device=logits.device))
        host: np.ndarray = chosen.float().cpu().numpy()
        return host


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that steps are padded to: powers of two, above 16 the middles between them too."""
    top = min(max(1, max_rows), MAX_GRAPH_ROWS)
    sizes = sorted({1 << i for i in range(10)} | {3 << i for i in range(3, 8)})
    return (*(s for s in sizes if s < top), next(s for s in sizes if s >= top))
