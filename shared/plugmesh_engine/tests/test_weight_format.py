"""A plugin's weight format: packed, loaded, multiplied by, under both executors; what it leaves out or gets wrong is said at the start."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError, DataLoss, FailedPrecondition, PluginError
from plugmesh.hookspecs import hookimpl
from plugmesh.host import PluginHost
from plugmesh.records import PackedTensor, WeightFormatRecord
from plugmesh.types import SamplingParams
from plugmesh_engine import EngineConfig, EnginePlugins, EngineRequest, build_engine, load_model
from plugmesh_engine.batch import Rows
from plugmesh_engine.calibration import linear_inputs
from plugmesh_engine.foreign import aligned
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import random_weights, run_to_end, tiny_config
from plugmesh_engine.testing_plugins import Int8Weights, MemorySource, half_rows, int8_rows, write_packed
from plugmesh_kernels import jit
from plugmesh_kernels.pack import pack, packed_num_bytes

CONFIG = tiny_config(hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16)
SHAPES = {
    "even": CONFIG,
    "odd": tiny_config(),
    "bias": dataclasses.replace(CONFIG, attention_bias=True),
    "untied": dataclasses.replace(CONFIG, tie_word_embeddings=False),
}
EXECUTORS = [
    pytest.param("native", marks=pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")),
    "torch",
]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights_of(config) -> dict[str, np.ndarray]:
    weights = random_weights(config, seed=7)
    if config.attention_bias:
        rng = np.random.default_rng(1)
        for name, w in list(weights.items()):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weights[name.removesuffix("weight") + "bias"] = rng.standard_normal(w.shape[0]).astype(np.float32)
    return weights


def settings(executor: str, **more) -> EngineConfig:
    return EngineConfig(**{"executor": executor, "dtype": "float32", "num_blocks": 32, "num_threads": 2, **more})


def prompt(config, n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, config.vocab_size, n).tolist()


def last_logits(model, config: EngineConfig, ids, chunks, codec=None) -> np.ndarray:
    e = model.build_executor(config, codec)
    at, blocks = 0, [1, 2, 3, 4, 5]
    for n in chunks:
        result = e.run([Rows(ids[at : at + n], at, blocks, 1, True)])
        at += n
    e.close()
    return result.logits[-1].copy()


def meaning(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What int8 rows stand for."""
    found = {}
    for name, w in weights.items():
        found[name] = w
        if name.endswith("_proj.weight"):
            scales = (np.abs(w).max(1, keepdims=True) / 127 + 1e-12).astype(np.float32)
            found[name] = np.rint(w / (np.abs(w).max(1, keepdims=True) / 127 + 1e-12)).astype(np.float32) * scales
    return found


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("executor", EXECUTORS)
def test_logits_are_those_of_the_textbook_with_the_formats_values(executor, shape, tmp_path):
    config, weights = SHAPES[shape], weights_of(SHAPES[shape])
    record = int8_rows()
    model = load_model(write_packed(tmp_path, MemorySource(config, weights), record), settings(executor), record)
    ids = prompt(config, 40)
    # float16 KV, as the executor's own in bfloat16 is coarser than the difference that is looked for
    got = last_logits(model, settings(executor), ids, [17, 22, 1], half_rows())
    want, source = (ReferenceLlama(config, w).next_logits(ids) for w in (meaning(weights), weights))

    assert np.abs(got - want).max() < 0.01 * want.std() < np.abs(source - want).max()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_an_engine_of_format_and_codec_generates_and_its_kv_is_nobody_elses(executor, tmp_path):
    weights = weights_of(CONFIG)
    manifests = {
        name: write_packed(folder(tmp_path, name), MemorySource(CONFIG, w), int8_rows())
        for name, w in {"a": weights, "b": random_weights(CONFIG, 8)}.items()
    }
    engines = {
        name: build_engine(m, settings(executor), EnginePlugins(weight_format=int8_rows(), kv_codec=half_rows()))
        for name, m in manifests.items()
    }
    ids = prompt(CONFIG, 20)
    got = run_to_end(
        engines["a"], EngineRequest("r", tuple(ids), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    )

    assert got["r"] == [ReferenceLlama(CONFIG, meaning(weights)).greedy(ids, 8)]
    codecs = [e.layout.codec for e in engines.values()]
    assert all(c.startswith("half-rows@int8-rows-") and len(c) <= 64 for c in codecs)
    assert codecs[0] != codecs[1]  # other bytes of one format
    for e in engines.values():
        e.close()


def folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    (parent / name).mkdir()
    return parent / name


# -- capsules, buffers, an embedding of its own: everything foreign at once


@pytest.fixture(scope="module")
def library():
    try:
        return jit.load(pathlib.Path(__file__).parent / "csrc")
    except jit.NoCompiler:
        pytest.skip("no C++ compiler")


def all_foreign(config, weights, library, *, with_capsules: bool) -> WeightFormatRecord:
    """Attention's linears, embedding and head as functions; those of the feed-forward through three buffers that all layers share."""
    parts = {
        "gate": (config.intermediate_size, config.hidden_size),
        "up": (config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }

    def pack_all(source):
        for name in source.names():
            if len(source.shape(name)) == 1:
                yield source.native(name)
            else:
                yield PackedTensor(name, "all-foreign/f32", source.shape(name), [source.tensor(name)])

    def load(loaded):
        kept: list[object] = []  # what contexts point at

        def values(name):
            _, shape, data = loaded.entry(name)
            return data.view(np.float32).reshape(shape)

        def linear(name):
            w = values(name)
            if with_capsules:
                kept.append(w)
                return jit.capsule(library.linear, "plugmesh.linear.v2", w.ctypes.data)

            def multiply(x, y):
                np.matmul(x, w.T, out=y)

            return multiply

        layers = range(config.num_layers)
        linears = {
            f"model.layers.{i}.self_attn.{p}_proj.weight": linear(f"model.layers.{i}.self_attn.{p}_proj.weight")
            for i in layers
            for p in "qkvo"
        }
        linears[HEAD] = linear(EMBEDDING)
        sizes = {part: packed_num_bytes("f32x16", *shape) for part, shape in parts.items()}
        memory = aligned(sum(sizes.values()))
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        buffers = {
            f"model.layers.{i}.mlp.{part}_proj.weight": ("f32x16", shape, memory[starts[part] : starts[part] + sizes[part]])
            for i in layers for part, shape in parts.items()
        }  # fmt: skip
        every = np.stack([
            *(np.concatenate([pack("float32", values(f"model.layers.{i}.mlp.{p}_proj.weight"), *parts[p]) for p in parts]) for i in layers), memory,
        ]).view(np.float32)  # fmt: skip
        table = values(EMBEDDING)

        def before(layer):
            memory.view(np.float32)[:] = every[layer]

        def embed(tokens, x):
            x[:] = table[tokens]

        if with_capsules:
            contexts = (
                np.array([memory.ctypes.data, every.ctypes.data, every.shape[1]], np.uint64),
                np.array([table.ctypes.data, table.shape[1]], np.uint64),
            )
            kept.extend((memory, every, table, contexts))
            before = jit.capsule(library.before_layer, "plugmesh.layer.v1", contexts[0].ctypes.data)
            embed = jit.capsule(library.embedding, "plugmesh.embedding.v1", contexts[1].ctypes.data)

        @dataclasses.dataclass
        class Weights:
            linears: dict
            buffers: dict
            before_layer: object
            embedding: object
            num_bytes: int
            kept: list

        return Weights(linears, buffers, before, embed, sum(loaded.entry(n)[2].nbytes for n in loaded.names()), kept)

    return WeightFormatRecord("all-foreign", pack_all, load, is_lossless=True)


@pytest.mark.parametrize("with_capsules", [True, False])
@pytest.mark.parametrize("shape", ["even", "odd"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_functions_and_buffers_may_stand_for_every_matrix(executor, shape, with_capsules, library, tmp_path):
    config, weights = SHAPES[shape], weights_of(SHAPES[shape])
    record = all_foreign(config, weights, library, with_capsules=with_capsules)
    model = load_model(write_packed(tmp_path, MemorySource(config, weights), record), settings(executor), record)
    ids = prompt(config, 40)
    whole, parts = (
        last_logits(model, settings(executor), ids, chunks, half_rows()) for chunks in ([40], [15, 2, 22, 1])
    )
    want = ReferenceLlama(config, weights).next_logits(ids)

    assert np.abs(whole - want).max() < 0.01 * want.std()
    assert np.abs(parts - want).max() < 0.01 * want.std()


@pytest.mark.parametrize("with_capsules", [True, False])
@pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")
def test_logits_of_a_head_from_outside_can_be_kept(with_capsules, library, tmp_path):
    weights = weights_of(CONFIG)
    record = all_foreign(CONFIG, weights, library, with_capsules=with_capsules)
    model = load_model(write_packed(tmp_path, MemorySource(CONFIG, weights), record), settings("native"), record)
    e = model.build_executor(settings("native"))
    ids, rng = prompt(CONFIG, 6), np.random.default_rng(2)
    logits = e.run([Rows([t], 0, [1 + i], 1, True) for i, t in enumerate(ids)]).logits.copy()
    e.run([Rows([t], 0, [1 + i], 1, i == 1, i % 2 == 0) for i, t in enumerate(ids)])

    for row in (0, 2, 4):
        for num_allowed in (0, 1, 20, CONFIG.vocab_size // 2, CONFIG.vocab_size):
            allowed = np.zeros(CONFIG.vocab_size, bool)
            allowed[rng.permutation(CONFIG.vocab_size)[:num_allowed]] = True
            words = np.packbits(np.concatenate([allowed, np.zeros(-CONFIG.vocab_size % 32, bool)]), bitorder="little").view(np.uint32)
            want = int(np.where(allowed, logits[row], -np.inf).argmax()) if num_allowed else -1
            assert e._native.best_allowed(row, words) == want
    e.close()


@pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")
def test_any_number_of_threads_gives_the_same_bits(library, tmp_path):
    weights = weights_of(CONFIG)
    record = all_foreign(CONFIG, weights, library, with_capsules=True)
    model = load_model(write_packed(tmp_path, MemorySource(CONFIG, weights), record), settings("native"), record)
    ids = prompt(CONFIG, 40)
    one, three = (last_logits(model, settings("native", num_threads=n), ids, [37, 2, 1]) for n in (1, 3))

    assert np.array_equal(one, three)


@pytest.mark.skipif(not plugmesh_kernels.available(), reason="no native kernels")
def test_an_error_in_a_formats_function_fails_the_step_and_not_the_executor(tmp_path):
    weights, is_broken = weights_of(CONFIG), [True]

    def load(loaded):
        good = int8_rows().load(loaded)
        name = "model.layers.1.mlp.down_proj.weight"

        def sometimes(x, y):
            if is_broken[0]:
                raise RuntimeError("no codes")
            good.linears[name](x, y)

        return Int8Weights({**good.linears, name: sometimes}, 0)

    record = dataclasses.replace(int8_rows(), load=load)
    model = load_model(write_packed(tmp_path, MemorySource(CONFIG, weights), record), settings("native"), record)
    e = model.build_executor(settings("native"))
    ids = prompt(CONFIG, 5)
    with pytest.raises(RuntimeError, match="no codes"):
        e.run([Rows(ids, 0, [1], 1, True)])
    is_broken[0] = False

    assert np.isfinite(e.run([Rows(ids, 0, [1], 1, True)]).logits).all()
    e.close()


# -- what is refused


def broken(**changes):
    def load(loaded):
        return dataclasses.replace(int8_rows().load(loaded), **{k: v(loaded) for k, v in changes.items()})

    return dataclasses.replace(int8_rows(), load=load)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (broken(linears=lambda w: {}), "nothing stands for 'model.layers.0.self_attn.q_proj.weight'"),
        (
            broken(buffers=lambda w: {Q: ("f32x16", (64, 64), aligned(packed_num_bytes("f32x16", 64, 64)))}),
            "both a linear and a buffer",
        ),
        (broken(buffers=lambda w: {"x": ("f32x16", (64, 64), aligned(1))}), "'x' is no linear"),
        (broken(buffers=lambda w: {HEAD: ("f32x16", (211, 64), aligned(64))}), "does not hold"),
        (
            broken(
                buffers=lambda w: {HEAD: ("f32x16", (211, 64), aligned(packed_num_bytes("f32x16", 211, 64) + 4)[4:])}
            ),
            "multiple of 64",
        ),
        (dataclasses.replace(int8_rows(), load=lambda w: w.entry("codebook")), "KeyError"),
    ],
)
def test_what_cannot_work_is_said_when_the_model_is_loaded(record, problem, tmp_path):
    manifest = write_packed(tmp_path, MemorySource(CONFIG, weights_of(CONFIG)), record)
    with pytest.raises(PluginError, match=problem):
        load_model(manifest, settings("torch"), record)


def test_a_manifest_of_another_format_or_without_a_tensor_is_refused(tmp_path):
    source = MemorySource(CONFIG, weights_of(CONFIG))
    native, packed = write_packed(tmp_path, source), write_packed(tmp_path, source, int8_rows())
    short = dataclasses.replace(packed, tensors=tuple(t for t in packed.tensors if t.name != "model.norm.weight"))

    with pytest.raises(FailedPrecondition, match=r"'native'.*'int8-rows'"):
        load_model(native, settings("torch"), int8_rows())
    with pytest.raises(FailedPrecondition, match="int8-rows/codes"):
        load_model(packed, settings("torch"))
    with pytest.raises(DataLoss, match=r"lacks tensor model\.norm\.weight"):
        load_model(short, settings("torch"), int8_rows())
    with pytest.raises(ConfigError, match="cuda"):
        load_model(packed, settings("cuda"), int8_rows())


def test_plugins_of_an_engine_come_from_the_host_by_name_or_last():
    class Plugin:
        @hookimpl
        def register_weight_formats(self):
            return [int8_rows(), dataclasses.replace(int8_rows(), name="other")]

        @hookimpl
        def register_kv_codecs(self):
            return [half_rows(), dataclasses.replace(half_rows(), name="last")]

    host = PluginHost("decode", MeshConfig())
    host.register("two", Plugin())

    found = EnginePlugins.from_host(host, "int8-rows")
    assert (found.weight_format.name, found.kv_codec.name, found.scheduler, found.drafts) == (
        "int8-rows",
        "last",
        None,
        None,
    )
    assert EnginePlugins.from_host(host).weight_format is None
    with pytest.raises(ConfigError, match=r"services.decode.weight_format: .*'qserve'; there are: int8-rows, other"):
        EnginePlugins.from_host(host, "qserve")


@pytest.mark.parametrize("shape", list(SHAPES))
def test_calibration_gives_the_inputs_that_the_textbook_multiplies(shape):
    """Multiplying them again by the last layer's matrices leads to the reference's logits."""
    config, weights = SHAPES[shape], weights_of(SHAPES[shape])
    ids = prompt(config, 30)
    found = linear_inputs(config, weights.__getitem__, ids)
    head = weights.get(HEAD, weights[EMBEDDING])

    assert np.allclose(found[HEAD] @ head.T, ReferenceLlama(config, weights).logits(ids), atol=2e-3)
    assert set(found) == {n for n in weights if n.endswith("_proj.weight")} | {HEAD}
    assert found[Q] is found[Q.replace("q_proj", "v_proj")]
