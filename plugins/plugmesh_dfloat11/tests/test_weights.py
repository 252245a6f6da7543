"""In an engine: the bits of plain bfloat16, whichever way it is decoded; what is missing or damaged stops the load; memory is what it says."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh import models
from plugmesh.errors import DataLoss, FailedPrecondition, PluginError
from plugmesh.types import SamplingParams
from plugmesh_dfloat11 import container, layout, native, samples
from plugmesh_dfloat11.plugin import Settings
from plugmesh_dfloat11.weights import compressed, plain, uses_tiles
from plugmesh_engine import EngineConfig, EnginePlugins, EngineRequest, build_engine, capsules, load_model
from plugmesh_engine.batch import Rows
from plugmesh_engine.bench import load_manifest
from plugmesh_engine.testing import random_weights, run_to_end, tiny_config
from plugmesh_engine.testing_plugins import MemorySource, write_packed
from plugmesh_kernels import jit

HAS_TILES = uses_tiles(Settings())
WAYS = [pytest.param("tiles", marks=pytest.mark.skipif(not HAS_TILES, reason="no AVX512_BF16 or no compiler")), "layers"]
needs_kernels = pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")
EVEN = tiny_config(hidden_size=64, intermediate_size=192, num_heads=4, num_kv_heads=2, head_dim=16)
CONFIGS = {
    "even": EVEN,
    "odd": tiny_config(),  # widths that are padded
    "bias": dataclasses.replace(EVEN, attention_bias=True),
    "untied": dataclasses.replace(EVEN, tie_word_embeddings=False),
}


def weights_of(config, seed: int = 3) -> dict[str, np.ndarray]:
    """Values that are no bfloat16, so that rounding is part of it."""
    weights = random_weights(config, seed=seed)
    if config.attention_bias:
        rng = np.random.default_rng(1)
        for name, w in list(weights.items()):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weights[name.removesuffix("weight") + "bias"] = rng.standard_normal(w.shape[0]).astype(np.float32)
    return weights


def engine_config(num_threads: int = 2) -> EngineConfig:
    return EngineConfig(executor="native", num_blocks=32, num_threads=num_threads)


def logits(model, ids, chunks, num_threads: int = 2) -> np.ndarray:
    e = model.build_executor(engine_config(num_threads))
    at, found = 0, []
    for n in chunks:
        found.append(e.run([Rows(ids[at : at + n], at, [1, 2, 3, 4, 5], n, True)]).logits.copy())
        at += n
    e.close()
    return np.concatenate(found)


def model_of(folder: pathlib.Path, config, record, weights=None):
    source = MemorySource(config, weights_of(config) if weights is None else weights)
    return load_model(write_packed(folder, source, record), engine_config(), record)


@needs_kernels
@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("name", WAYS)
def test_logits_are_those_of_plain_bfloat16_bit_for_bit(name, shape, tmp_path):
    assert_same_bits(CONFIGS[shape], Settings(decode=name), [1, 13, 40, 1, 5], tmp_path)


@needs_kernels
def test_a_machine_without_a_compiler_computes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert_same_bits(CONFIGS["odd"], Settings(), [5, 1], tmp_path)


def assert_same_bits(config, settings: Settings, chunks: list[int], folder: pathlib.Path) -> None:
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 60).tolist()
    want = logits(model_of(folder, config, plain(settings)), ids, chunks)
    got = logits(model_of(folder, config, compressed(settings)), ids, chunks)

    assert np.isfinite(want).all() and want.std() > 0
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@needs_kernels
def test_another_model_gives_other_logits(tmp_path):
    """So equal ones mean something."""
    ids = list(range(20))
    a, b = (logits(model_of(tmp_path, EVEN, compressed(Settings()), weights_of(EVEN, seed)), ids, [20]) for seed in (3, 4))

    assert not np.array_equal(a, b)


@needs_kernels
def test_resident_bytes_are_what_each_way_keeps(tmp_path):
    config = tiny_config(hidden_size=128, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=4096)
    weights = {n: w * np.float32(0.02) for n, w in random_weights(config, 1).items()}
    loaded = {}
    for name in ("plain", "layers", *(["tiles"] if HAS_TILES else [])):
        record = plain(Settings()) if name == "plain" else compressed(Settings(decode=name))
        loaded[name] = model_of(tmp_path, config, record, weights).plugin.weights
    num_values = sum(w.size for w in weights.values() if w.ndim == 2)
    buffers = {b[2].ctypes.data: b[2].nbytes for b in loaded["layers"].buffers.values()}

    assert abs(loaded["plain"].num_bytes - 2 * num_values) < 0.01 * loaded["plain"].num_bytes
    assert len(buffers) == 8  # seven that all layers share, and the head's
    if HAS_TILES:
        tables = (config.num_layers + 2) * 2048 * 8
        assert loaded["layers"].num_bytes == loaded["tiles"].num_bytes + sum(buffers.values())
        assert (loaded["tiles"].num_bytes - tables) / loaded["plain"].num_bytes < 0.70


@pytest.mark.parametrize("damage", ["lost", "short", "other model"])
def test_a_container_that_is_lost_or_of_another_size_stops_the_load(damage, tmp_path):
    record = compressed(Settings())
    manifest = write_packed(tmp_path, MemorySource(EVEN, weights_of(EVEN)), record)
    tensors = list(manifest.tensors)
    at = next(i for i, t in enumerate(tensors) if t.name == "dfloat11.layers.1")
    if damage == "lost":
        del tensors[at]
    elif damage == "short":
        tensors[at] = dataclasses.replace(tensors[at], num_bytes=tensors[at].num_bytes - 64)
    else:
        embedding = next(t for t in tensors if t.name == "model.embed_tokens.weight")
        tensors[at] = dataclasses.replace(embedding, name="dfloat11.layers.1", dtype="dfloat11/container")
    with pytest.raises(DataLoss, match=r"dfloat11\.layers\.1"):
        load_model(dataclasses.replace(manifest, tensors=tuple(tensors)), EngineConfig(executor="torch", dtype="float32"), record)


def test_rounding_can_be_refused(tmp_path):
    record = compressed(Settings(round_to_bfloat16=False))
    with pytest.raises(FailedPrecondition, match="no bfloat16"):
        write_packed(tmp_path, MemorySource(EVEN, weights_of(EVEN)), record)
    exact = {n: (w.view(np.uint32) >> 16 << 16).view(np.float32) for n, w in weights_of(EVEN).items()}

    assert write_packed(tmp_path, MemorySource(EVEN, exact), record).format == "dfloat11"


def test_tiles_are_refused_where_the_processor_has_no_such_products(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(FailedPrecondition, match="AVX512_BF16"):
        uses_tiles(Settings(decode="tiles"))

    assert uses_tiles(Settings()) is False


def test_the_record_of_a_broken_load_names_the_format(tmp_path):
    record = dataclasses.replace(compressed(Settings()), load=lambda w: w.entry("nothing"))
    manifest = write_packed(tmp_path, MemorySource(EVEN, weights_of(EVEN)), record)
    with pytest.raises(PluginError, match="dfloat11"):
        load_model(manifest, EngineConfig(executor="torch", dtype="float32"), record)


@needs_kernels
@pytest.mark.slow
def test_an_imported_bfloat16_model_is_kept_bit_for_bit_and_generates_the_same(tmp_path):
    """From safetensors through the weightstore; refusing to round proves that nothing had to be."""
    folder = samples.write_llama(tmp_path / "llama", hidden=128, intermediate=256, num_layers=2, vocab=512)
    tokens = {}
    for format, record in (("dfloat11-plain", plain), ("dfloat11", compressed)):
        manifest = load_manifest(folder, format, tmp_path / "store", ["dfloat11"], {"dfloat11": {"round_to_bfloat16": False}})
        e = build_engine(manifest, engine_config(), EnginePlugins(weight_format=record(Settings())))
        tokens[format] = run_to_end(e, EngineRequest("r", tuple(range(20)), SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)))["r"]
        e.close()

    assert tokens["dfloat11"] == tokens["dfloat11-plain"]


@needs_kernels
@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.skipif(models.find("smollm2") is None, reason="plugmesh pull smollm2 fetches the model")
def test_64_greedy_steps_of_the_real_model_have_the_logits_of_plain_bfloat16(tmp_path):
    found = {}
    for name, record in (("plain", plain(Settings())), *((w, compressed(Settings(decode=w))) for w in ("layers", *(["tiles"] if HAS_TILES else [])))):
        manifest = load_manifest(models.find("smollm2"), record.name, tmp_path, ["dfloat11"])
        config = engine_config(num_threads=1)  # threads that wait for each other take minutes on a machine that others use
        e = load_model(manifest, config, record).build_executor(config)
        ids, rows = [1, 4093, 198, 504, 253], []
        result = e.run([Rows(ids, 0, [1, 2, 3, 4, 5], 1, True)])
        for i in range(64):
            rows.append(result.logits[-1].copy())
            ids.append(int(rows[-1].argmax()))
            result = e.run([Rows(ids[-1:], 5 + i, [1, 2, 3, 4, 5], 1, True)])
        e.close()
        found[name] = np.stack(rows)

    for name, got in found.items():
        assert np.array_equal(got.view(np.uint32), found["plain"].view(np.uint32)), name


@pytest.mark.slow
@pytest.mark.nats
@pytest.mark.timeout(300)
def test_a_copy_to_another_host_moves_the_compressed_bytes(tmp_path):
    from plugmesh_dfloat11 import transfer

    folder = samples.write_llama(tmp_path / "llama", hidden=256, intermediate=704, num_layers=2, vocab=2048)
    copied = {c.format: c for c in transfer.measure(folder, ["dfloat11-plain", "dfloat11"], rounds=1)}

    assert 0.64 < copied["dfloat11"].num_bytes / copied["dfloat11-plain"].num_bytes < 0.70


@pytest.mark.skipif(not HAS_TILES, reason="no AVX512_BF16 or no compiler")
@pytest.mark.parametrize("num_rows", [1, 12, 13, 300])
def test_a_product_in_tiles_rounds_its_input_as_the_native_kernel_does(num_rows):
    """Ties, NaN, infinities and denormals, which activations of a random model hardly meet."""
    n, k = 70, 100
    rng = np.random.default_rng(num_rows)
    values = layout.packed(rng.standard_normal((n, k), np.float32))
    x = rng.standard_normal((num_rows, k), np.float32)
    x.view(np.uint32)[:, ::2] = x.view(np.uint32)[:, ::2] & 0xFFFF0000 | 0x8000  # halfway between two bfloat16
    x[0, :4] = (1e-40, -1e-39, 1e30, 1e-45)
    if num_rows > 1:
        x[-1, 5], x[num_rows // 2, 7] = np.nan, np.inf
    kernels = plugmesh_kernels.native()
    want, got = np.zeros((2, num_rows, n), np.float32)
    kernels.linear("avx512", 2, n, k, values.view(np.uint8), kernels.LinearInput("avx512", x), want, block0=0, block1=-(-n // 16))
    one = container.parse(np.frombuffer(container.encode(values), np.uint8))
    about = native.describe(one)
    context = np.array([about.ctypes.data, 0], np.uint64)
    multiply = capsules.linear(jit.capsule(native.library().functions.df11_linear, "plugmesh.linear.v2", context.ctypes.data))
    multiply(x, got)

    assert np.isfinite(want).any() and np.isnan(want).any() == (num_rows > 1)
    assert np.array_equal(got, want, equal_nan=True)
