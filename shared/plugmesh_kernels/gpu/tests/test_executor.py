"""The GPU executor gives what the torch executor and the textbook give, and a decode row does not see its company."""

import functools
import hashlib
import pathlib
import tempfile

import gguf
import numpy as np
import pytest
import torch

from plugmesh.errors import ConfigError
from plugmesh.types import ModelConfig, SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import Rows
from plugmesh_engine.executors import cuda
from plugmesh_engine.executors import torch as torch_executor
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import FileManifest, FileTensor, random_weights, run_to_end, tiny_config, write_manifest
from plugmesh_kernels import pack as native

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of numpy, below the interpreter, where padding divides by zero

VARIANTS = {
    "tied": {"num_heads": 4, "num_kv_heads": 2},
    "biased": {"num_heads": 2, "num_kv_heads": 1, "attention_bias": True, "tie_word_embeddings": False, "rope_style": "half"},
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_layers": 1, "vocab_size": 150}


def config_for(device: str, **changes: object) -> EngineConfig:
    return EngineConfig(**{"executor": "cuda", "device": device, "dtype": "float32", "num_blocks": 60, "max_num_sequences": 4} | changes)  # type: ignore[arg-type]


@functools.cache
def float_manifest(variant: str) -> tuple[FileManifest, ReferenceLlama]:
    config = tiny_config(**VARIANTS[variant])
    weights = random_weights(config, seed=1)
    return write_manifest(pathlib.Path(tempfile.mkdtemp(prefix="plugmesh-gpu-")), config, weights), ReferenceLlama(config, weights)


@functools.cache
def native_manifest(float_v: bool = False) -> tuple[FileManifest, ReferenceLlama]:
    """Format "native", Q4_1 but for the tied head in Q8_0 and perhaps V in bfloat16, and the textbook over the same values."""
    config: ModelConfig = tiny_config(**WIDE)
    weights, meaning, entries = random_weights(config, seed=2), {}, []
    path = pathlib.Path(tempfile.mkdtemp(prefix="plugmesh-gpu-")) / "model.native"
    with path.open("wb") as f:
        for name, w in weights.items():
            if w.ndim == 1:
                kind, stored, meaning[name] = "float32", w.view(np.uint8), w
            elif float_v and "v_proj" in name:
                bits = (w.view(np.uint32) >> 16).astype(np.uint16)
                kind, stored, meaning[name] = "bf16x16", native.pack("bfloat16", bits, *w.shape), (bits.astype(np.uint32) << 16).view(np.float32)
            else:
                source = gguf.GGMLQuantizationType.Q8_0 if "embed" in name else gguf.GGMLQuantizationType.Q4_1
                data = gguf.quantize(w, source)
                raw = data.view(np.uint8).reshape(-1)
                kind, stored = native.native_dtype(source.name, raw), native.pack(source.name, raw, *w.shape)
                meaning[name] = gguf.dequantize(data, source).reshape(w.shape).astype(np.float32)
            f.write(b"\0" * (-f.tell() % 64))
            entries.append(FileTensor(name, kind, w.shape, str(path), f.tell(), stored.nbytes))
            f.write(stored.tobytes())
    version = hashlib.sha256(path.read_bytes()).hexdigest()
    return FileManifest("tiny", version, "llama", config.to_json(), tuple(entries), "native"), ReferenceLlama(config, meaning)


def executor(manifest: FileManifest, device: str, **changes: object) -> cuda.CudaExecutor:
    config = config_for(device, **changes)
    return cuda.load(manifest, config).build_executor(config)


def greedy(manifest: FileManifest, config: EngineConfig) -> dict[str, list[list[int]]]:
    model = torch_executor.load(manifest, "float32") if config.executor == "torch" else cuda.load(manifest, config)
    engine = Engine(model, config)
    shared = [int(t) for t in np.random.default_rng(5).integers(3, 200, 20)]
    prompts = [[*shared, 7, 8, 9], [*shared[:18], 4], [11, 12]]
    return run_to_end(engine, *(EngineRequest(f"r{i}", tuple(p), SamplingParams(temperature=0, max_tokens=4)) for i, p in enumerate(prompts)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_generates_the_tokens_of_the_torch_executor(device: str, variant: str) -> None:
    manifest, _ = float_manifest(variant)
    chunked = {"max_tokens_per_step": 18, "num_blocks": 30}

    assert greedy(manifest, config_for(device, **chunked)) == greedy(manifest, config_for("cpu", executor="torch", **chunked))


def prefill_then(x: cuda.CudaExecutor, ids: list[int], blocks: list[int], cuts: list[int], full: bool = True) -> np.ndarray:
    """Logits of the last row of each part that `cuts` makes of the tokens."""
    out, start = [], 0
    for end in cuts:
        out.append(x.run([Rows(ids[start:end], start, blocks, 1, full)]).logits)
        start = end
    return np.concatenate(out)


def test_packed_weights_give_the_logits_of_their_exact_values(device: str) -> None:
    manifest, reference = native_manifest(float_v=True)
    ids = [int(t) for t in np.random.default_rng(0).integers(0, 150, 50)]
    logits = prefill_then(executor(manifest, device), ids, [3, 1, 7, 2], [40, 41, 45, 50])
    wanted = reference.logits(ids)[[39, 40, 44, 49]]

    assert np.allclose(logits, wanted, atol=2e-3 * np.abs(wanted).max()), np.abs(logits - wanted).max()


def test_a_decode_row_is_the_same_to_the_bit_alone_drafted_and_in_company(device: str) -> None:
    """Also beside a prompt's chunk, where no step is padded."""
    manifest, _ = native_manifest()
    a, b = ([int(t) for t in np.random.default_rng(s).integers(0, 150, 30)] for s in (1, 2))
    x = executor(manifest, device)
    x.run([Rows(a[:26], 0, [1, 2]), Rows(b[:20], 0, [3, 4])])
    alone = np.concatenate([x.run([Rows([a[i]], i, [1, 2], 1, True)]).logits for i in range(26, 30)])
    other = x.run([Rows([b[20]], 20, [3, 4], 1, True)]).logits  # in the place of the table where the other sequence was
    again = x.run([Rows([a[29]], 29, [1, 2], 1, True)]).logits
    drafted = x.run([Rows(b[20:21], 20, [3, 4], 1, True), Rows(a[26:30], 26, [1, 2], 4, True)])
    mixed = x.run([Rows(a[26:30], 26, [1, 2], 4, True), Rows(b[:20], 0, [5, 6], 1, False)])

    assert np.array_equal(again[0], alone[3]) and np.array_equal(drafted.logits[0], other[0])
    assert np.array_equal(drafted.logits[1:], alone) and np.array_equal(mixed.logits, alone)
    assert drafted.best[1:].tolist() == alone.argmax(1).tolist() == mixed.best[:4].tolist()


def test_padding_leaves_the_null_block_and_other_blocks_alone(device: str) -> None:
    manifest, _ = float_manifest("tied")
    x = executor(manifest, device)
    x.memory.storage[1:] = 5
    x.run([Rows([4, 5, 6], 0, [9], 0)])
    x.run([Rows([t], 3, [9], 1) for t in (7,)] * 3)  # padded to four rows
    touched = (x.memory.storage != 5).flatten(1).any(1).nonzero().flatten().tolist()

    assert touched == [0, 9]
    assert not bool(x.memory.storage[0].any())
    assert bool((x.memory.storage[9, :, :, 4:] == 5).all())


def test_rows_without_finite_logits_are_told_from_the_others(device: str) -> None:
    manifest, _ = float_manifest("tied")
    x = executor(manifest, device)
    x.run([Rows(list(range(20)), 0, [1, 2], 0), Rows(list(range(20)), 0, [3, 4], 0)])
    x.memory.storage[1, 0, 0, 5] = float("nan")
    result = x.run([Rows([7], 20, [1, 2], 1), Rows([7], 20, [3, 4], 1)])

    assert result.best[0] == -1 and result.best[1] >= 0 and result.logits.shape == (0, 211)
    assert not x.memory.all_finite([1]) and x.memory.all_finite([3])


def test_a_device_that_is_not_there_is_a_configuration_error() -> None:
    manifest, _ = float_manifest("tied")
    with pytest.raises(ConfigError, match="cuda:99" if torch.cuda.is_available() else "CUDA device"):
        cuda.load(manifest, config_for("cuda:99" if torch.cuda.is_available() else "cuda"))


def test_sizes_that_steps_are_padded_to() -> None:
    assert cuda.graph_sizes(1) == (1,)
    assert cuda.graph_sizes(5) == (1, 2, 4, 8)
    assert cuda.graph_sizes(40) == (1, 2, 4, 8, 16, 24, 32, 48)
    assert cuda.graph_sizes(10_000)[-1] == cuda.MAX_GRAPH_ROWS
