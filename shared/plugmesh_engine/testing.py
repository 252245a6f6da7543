"""Small models for tests: random Llamas in an instant, and the default model out of its GGUF.

For tests of the engine, of the services that run it, and of plugins. Not imported by anything that serves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from plugmesh.types import BLOCK_TOKENS, KvLayout, ModelConfig
from plugmesh_engine.batch import Rows, StepResult, Tap
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.engine import Engine
from plugmesh_engine.requests import EngineRequest, StepOutput, TokenEvent

if TYPE_CHECKING:  # helpers that do without torch are of use where it is not
    from plugmesh_engine.executors.torch import TorchModel


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Same fields as the protobuf TensorEntry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: str
    offset: int
    num_bytes: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class FileManifest:
    """Same fields as the protobuf ModelManifest."""

    model: str
    version: str
    architecture: str
    config_json: str
    tensors: tuple[FileTensor, ...]
    format: str
    assets: tuple[object, ...] = ()
    host: str = ""


def tiny_config(**changes: object) -> ModelConfig:
    """A Llama of some thousand weights with odd sizes; any field of ModelConfig can be changed."""
    base = ModelConfig(
        architecture="llama", vocab_size=211, hidden_size=36, intermediate_size=52, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=10,
        max_position=512, rms_norm_eps=1e-5, rope_theta=10000.0, rope_style="interleaved", tie_word_embeddings=True, eos_token_ids=(2,), name="tiny",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type] # fields come by name


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights that spread the logits enough for greedy output to be stable."""
    rng = np.random.default_rng(seed)
    c, w = config, {}

    def matrix(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(c.hidden_size)).astype(np.float32)

    w["model.embed_tokens.weight"] = rng.standard_normal((c.vocab_size, c.hidden_size)).astype(np.float32)
    w["model.norm.weight"] = norm()
    if not c.tie_word_embeddings:
        w["lm_head.weight"] = matrix(c.vocab_size, c.hidden_size)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for i in range(c.num_layers):
        p = f"model.layers.{i}."
        w |= {f"{p}input_layernorm.weight": norm(), f"{p}post_attention_layernorm.weight": norm()}
        for name, out, inner in (("q", q, c.hidden_size), ("k", kv, c.hidden_size), ("v", kv, c.hidden_size), ("o", c.hidden_size, q)):
            w[f"{p}self_attn.{name}_proj.weight"] = matrix(out, inner)
            if c.attention_bias and name != "o":
                w[f"{p}self_attn.{name}_proj.bias"] = (0.3 * rng.standard_normal(out)).astype(np.float32)
        w[f"{p}mlp.gate_proj.weight"] = matrix(c.intermediate_size, c.hidden_size)
        w[f"{p}mlp.up_proj.weight"] = matrix(c.intermediate_size, c.hidden_size)
        w[f"{p}mlp.down_proj.weight"] = matrix(c.hidden_size, c.intermediate_size)
    return w


def write_manifest(folder: pathlib.Path, config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: str = "float32") -> FileManifest:
    """Stores the weights as `dtype` in one file, at multiples of 64, as the weightstore does."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.{dtype}"
    digest = hashlib.sha256(config.to_json().encode())
    entries = []
    with path.open("wb") as f:
        for name, array in weights.items():
            values = np.ascontiguousarray(array, dtype=np.float32)
            data = (to_bfloat16(values) if dtype == "bfloat16" else values).tobytes()
            f.write(b"\0" * (-f.tell() % 64))
            entries.append(FileTensor(name, dtype, array.shape, str(path), f.tell(), len(data)))
            f.write(data)
            digest.update(data)
    return FileManifest(config.name, digest.hexdigest(), config.architecture, config.to_json(), tuple(entries), dtype)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 as uint16, rounded to nearest even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tiny_model(folder: pathlib.Path, dtype: str = "float32", seed: int = 0, **changes: object) -> TorchModel:
    """A random model for the torch executor, stored and mapped like a real one."""
    from plugmesh_engine.executors import torch as torch_executor

    config = tiny_config(**changes)
    return torch_executor.load(write_manifest(folder, config, random_weights(config, seed), dtype), dtype)


def model_in_memory(config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: str = "float32", version: str = "in-memory") -> TorchModel:
    """A model for the torch executor over the arrays themselves, without a file; float32 ones are shared, not copied."""
    import torch

    from plugmesh_engine.executors.torch import TorchModel
    from plugmesh_engine.model.llama import Llama

    tensors = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in weights.items()}
    return TorchModel(Llama(config, tensors), config, version, dtype, "cpu", 0, sum(t.nbytes for t in tensors.values()))


class FakeKv:
    """KV memory that holds the token ids themselves. Implements `seams.KvMemory`."""

    def __init__(self, num_blocks: int) -> None:
        self.ids = np.full((num_blocks + 1, BLOCK_TOKENS), -1, dtype=np.int32)

    def zero(self, block: int) -> None:
        self.ids[block] = 0

    def copy(self, source: int, target: int) -> None:
        self.ids[target] = self.ids[source]

    def read(self, block: int) -> memoryview:
        return self.ids[block].data.cast("B")

    def write(self, block: int, data: bytes | bytearray | memoryview, num_tokens: int = BLOCK_TOKENS) -> None:
        self.ids[block] = np.frombuffer(data, dtype=np.int32)
        self.ids[block, num_tokens:] = 0

    def all_finite(self, blocks: Sequence[int]) -> bool:
        return True


class FakeExecutor:
    """Computes in an instant what depends on every token before a row, as far as they are found in the right blocks. Implements `seams.Executor`.

    Logits are random numbers seeded with a checksum of the row's prefix, read back from the blocks: a wrong block, offset or a token that should have
    been written over changes everything after it.

    Args:
        num_kinds: Distinct sets of logits.
        window: Tokens before a row that count; few make output that repeats itself.
        salt: Stands for the weights.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, *, num_kinds: int = 1 << 30, window: int = 1 << 30, salt: int = 0, version: str = "fake"
    ) -> None:
        self.layout = KvLayout(version, "ids", "int32", 1, 1, 1, BLOCK_TOKENS, 4 * BLOCK_TOKENS)
        self.memory = FakeKv(num_blocks)
        self.num_rows = 0
        self._vocab_size = config.vocab_size
        self._num_layers, self._hidden_size = config.num_layers, config.hidden_size
        self._heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        self._num_kinds = num_kinds
        self._window = window
        self._salt = salt

    def run(self, rows: Sequence[Rows], taps: Sequence[Tap] = ()) -> StepResult:
        best: list[int] = []
        full: list[np.ndarray] = []
        self._store(rows)
        for r in rows:
            end = r.num_computed + len(r.token_ids)
            prefix = self.memory.ids[list(r.blocks)].reshape(-1)
            for last in range(end - r.num_wanted + 1, end + 1):
                logits = self.logits(prefix[max(0, last - self._window) : last])
                best.append(int(logits.argmax()))
                if r.full:
                    full.append(logits)
        hidden = tuple(self._numbers(rows[t.entry], t.layer, self._hidden_size) for t in taps if 0 <= t.layer <= self._num_layers)
        if len(hidden) < len(taps):
            raise ValueError("a tap names a layer that the model has not")
        return StepResult(np.array(best, np.int32), np.array(full, np.float32).reshape(len(full), self._vocab_size), hidden)

    def probe(self, rows: Sequence[Rows], layer: int) -> tuple[np.ndarray, np.ndarray]:
        self._store(rows)
        heads, kv_heads, dim = self._heads
        q = [self._numbers(r, 1000 + layer, heads * dim).reshape(-1, heads, dim) for r in rows]
        k = [self._numbers(r, 2000 + layer, kv_heads * dim).reshape(-1, kv_heads, dim) for r in rows]
        return np.concatenate(q), np.concatenate(k)

    def _store(self, rows: Sequence[Rows]) -> None:
        for r in rows:
            for at, token in enumerate(r.token_ids, r.num_computed):
                self.memory.ids[r.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = token
            self.num_rows += len(r.token_ids)

    def _numbers(self, r: Rows, kind: int, width: int) -> np.ndarray:
        """(rows, width) float32 that depend on the tokens up to each row and on `kind`."""
        prefix = self.memory.ids[list(r.blocks)].reshape(-1)
        ends = range(r.num_computed + 1, r.num_computed + len(r.token_ids) + 1)
        seeds = [[kind, zlib.crc32(prefix[:end].astype(np.int32).tobytes())] for end in ends]
        return np.array([np.random.default_rng(s).standard_normal(width) for s in seeds], np.float32).reshape(len(seeds), width)

    def logits(self, prefix: np.ndarray) -> np.ndarray:
        """(vocab,) float32 after these tokens."""
        kind = zlib.crc32(prefix.astype(np.int32).tobytes(), self._salt) % self._num_kinds
        return (np.random.default_rng(kind).standard_normal(self._vocab_size) * 3).astype(np.float32)

    def prepare_weights(self, model: Any) -> FakeWeights:
        return FakeWeights(model.salt, dataclasses.replace(self.layout, model=model.version))

    def set_weights(self, prepared: FakeWeights) -> None:
        new = prepared.salt, prepared.layout
        prepared.salt, prepared.layout = self._salt, self.layout
        self._salt, self.layout = new

    def close(self) -> None:
        """Nothing to end."""


@dataclass(slots=True)
class FakeWeights:
    """Implements `seams.PreparedWeights`."""

    salt: int
    layout: KvLayout

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Builds `FakeExecutor`. Implements `seams.Model`."""

    config: ModelConfig
    num_kinds: int = 1 << 30
    window: int = 1 << 30
    version: str = "fake"
    salt: int = 0
    num_mapped_bytes: int = 0
    num_copied_bytes: int = 0

    def build_executor(self, config: EngineConfig, kv_codec: object = None) -> FakeExecutor:
        return FakeExecutor(self.config, config.num_blocks, num_kinds=self.num_kinds, window=self.window, salt=self.salt, version=self.version)


_GGUF_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def read_gguf(path: pathlib.Path | str, **changes: object) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Configuration and dequantised float32 weights of a Llama GGUF, with Q and K in the file's own order."""
    import gguf

    reader = gguf.GGUFReader(str(path))

    def get(key: str) -> object:
        return reader.fields[key].contents()

    weights: dict[str, np.ndarray] = {}
    for t in reader.tensors:
        parts = t.name.split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{_GGUF_NAMES[parts[2]]}.{parts[3]}"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]] + ".weight"
        values = gguf.dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)])
        weights[name] = np.require(values, requirements="W")  # float32 ones would be views of the read-only file
    vocab_size, hidden_size = weights["model.embed_tokens.weight"].shape
    config = ModelConfig(
        architecture="llama", vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=int(str(get("llama.feed_forward_length"))),
        num_layers=int(str(get("llama.block_count"))), num_heads=int(str(get("llama.attention.head_count"))),
        num_kv_heads=int(str(get("llama.attention.head_count_kv"))), head_dim=int(str(get("llama.rope.dimension_count"))),
        max_position=int(str(get("llama.context_length"))), rms_norm_eps=float(str(get("llama.attention.layer_norm_rms_epsilon"))),
        rope_theta=float(str(get("llama.rope.freq_base"))), rope_style="interleaved", tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=int(str(get("tokenizer.ggml.bos_token_id"))), eos_token_ids=(int(str(get("tokenizer.ggml.eos_token_id"))),), name="smollm2",
    )  # fmt: skip
    return dataclasses.replace(config, **changes), weights  # type: ignore[arg-type] # fields come by name


def gguf_tokenizer(path: pathlib.Path | str) -> Any:
    """A `tokenizers.Tokenizer` of a GGUF with SmolLM2's rules: digits one by one, then byte-level BPE."""
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(str(path)).fields
    vocabulary = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def english() -> str:
    """Some 700,000 characters of English that every CPython carries: its documentation of keywords and topics."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def run_to_end(engine: Engine, *requests: EngineRequest, max_steps: int = 10_000) -> dict[str, list[list[int]]]:
    """Adds the requests and steps until nothing is left; request id to the new tokens of each sequence. Raises the first error event."""
    for r in requests:
        engine.add(r)
    return tokens_of(engine, steps(engine, max_steps))


def steps(engine: Engine, max_steps: int = 10_000) -> list[StepOutput]:
    """Steps until nothing is left."""
    outputs = []
    while engine.has_work():
        outputs.append(engine.step())
        assert len(outputs) < max_steps, "the engine does not come to an end"
    return outputs


def tokens_of(engine: Engine, outputs: list[StepOutput]) -> dict[str, list[list[int]]]:
    """New tokens per request and sequence, in order; checks that none is lost or doubled. Raises the first error event."""
    found: dict[str, dict[int, list[int]]] = {}
    first: dict[tuple[str, int], int] = {}
    for event in events_of(outputs):
        if event.error is not None:
            raise event.error
        tokens = found.setdefault(event.request_id, {}).setdefault(event.sequence, [])
        start = first.setdefault((event.request_id, event.sequence), event.index)
        assert event.index == start + len(tokens), "a token was lost or doubled"
        tokens.extend(t.token_id for t in event.tokens)
    return {r: [tokens for _, tokens in sorted(s.items())] for r, s in found.items()}


def events_of(outputs: list[StepOutput]) -> list[TokenEvent]:
    return [e for o in outputs for e in o.tokens]
