"""Forms of a model that plugins pack: stored like the core's, packed anew for another variant, calibrated with the model's own text."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from plugmesh import models
from plugmesh.errors import ConfigError, FailedPrecondition, InvalidRequest, PluginError
from plugmesh.records import PackedTensor
from plugmesh.types import ModelConfig
from plugmesh_engine.testing_plugins import int8_rows
from plugmesh_kernels.pack import unpack
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel
from plugmesh_weightstore.formats import StoredSource
from plugmesh_weightstore.importing import AllowedRoots, import_model
from plugmesh_weightstore.resolving import Resolver

EMBEDDING, Q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


class Store:
    def __init__(self, folder: Path) -> None:
        self.blobs, self.catalogue = BlobStore(folder / "store"), Catalogue(f"sqlite:///{folder / 'store' / 'catalogue.sqlite3'}")
        self.roots = AllowedRoots([folder, *([found.parent] if (found := models.find("smollm2")) else [])])

    def load(self, path: Path) -> StoredModel:
        return import_model(path, self.catalogue, self.blobs, self.roots)

    def source(self, model: StoredModel) -> StoredSource:
        assets = dict(model.assets)
        tensors = Resolver(self.catalogue, self.blobs).tensors(model, "source")

        def read(name: str) -> bytes | None:
            return self.blobs.read(assets[name].sha256, assets[name].num_bytes) if name in assets else None

        return StoredSource(ModelConfig.from_json(model.config_json), tensors, self.blobs.path, read)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    s = Store(tmp_path)
    yield s
    s.catalogue.close()


@pytest.mark.parametrize("dtype", ["Q4_1", "F16", "Q5_0"])
def test_the_source_gives_the_values_and_the_native_form_of_them(store: Store, make_gguf: Callable[..., Path], dtype: str) -> None:
    model = store.load(make_gguf(dtype))
    source = store.source(model)
    floats = {t.name: t for t in Resolver(store.catalogue, store.blobs).tensors(model, "float32")}

    assert set(source.names()) == set(floats)
    for name in source.names():
        want = np.fromfile(store.blobs.path(floats[name].blob.sha256), np.float32).reshape(floats[name].shape)
        values = source.tensor(name)
        native = source.native(name)
        packed = np.frombuffer(b"".join(bytes(p) for p in native.data), np.uint8)
        assert np.array_equal(values, want)
        assert np.array_equal(packed.view(np.float32) if native.dtype == "float32" else unpack(native.dtype, packed, *native.shape), want)
        values *= 2  # the caller's own
        assert np.array_equal(source.tensor(name), want)


def test_a_form_is_packed_once_and_again_for_another_variant(store: Store, make_gguf: Callable[..., Path]) -> None:
    model = store.load(make_gguf("Q4_1"))
    packed: list[str] = []

    def counting(variant: str):
        record = int8_rows(variant)

        def pack(source):
            packed.append(variant)
            return record.pack(source)

        return dataclasses.replace(record, pack=pack)

    first = Resolver(store.catalogue, store.blobs, [counting("a")]).tensors(model, "int8-rows")
    assert first == Resolver(store.catalogue, store.blobs, [counting("a")]).tensors(model, "int8-rows")
    Resolver(store.catalogue, store.blobs, [counting("b")]).tensors(model, "int8-rows")

    assert packed == ["a", "b"]
    assert {t.dtype for t in first} == {"q4_1x16", "float32", "int8-rows/codes"}
    codes = next(t for t in first if t.name == Q)
    assert codes.blob.num_bytes == codes.shape[0] * codes.shape[1]
    store.blobs.path(codes.blob.sha256).unlink()  # a lost file is made again
    assert first == Resolver(store.catalogue, store.blobs, [counting("a")]).tensors(model, "int8-rows")


def test_an_unknown_format_is_refused_with_those_that_there_are(store: Store, make_gguf: Callable[..., Path]) -> None:
    model = store.load(make_gguf("Q4_1"))
    with pytest.raises(InvalidRequest, match=r"'qserve'; there are source, float32, bfloat16, native, int8-rows"):
        Resolver(store.catalogue, store.blobs, [int8_rows()]).tensors(model, "qserve")


@pytest.mark.parametrize("name", ["native", "a b", "x" * 25, ""])
def test_a_format_cannot_take_a_name_that_is_taken_or_too_long(store: Store, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be named"):
        Resolver(store.catalogue, store.blobs, [dataclasses.replace(int8_rows(), name=name)])


BAD = {
    "comes twice": [PackedTensor("a", "int8-rows/x", (1,), [b"1"])] * 2,
    "has the dtype 'other/x'": [PackedTensor("a", "other/x", (1,), [b"1"])],
    r"has 3 bytes, float32 \(2,\) has 8": [PackedTensor("a", "float32", (2,), [b"123"])],
    "is q8_0x16 but no matrix": [PackedTensor("a", "q8_0x16", (16,), [b""])],
    "has the shape": [PackedTensor(Q, "int8-rows/x", (3,), [b""])],
    "a tensor cannot be": [PackedTensor("a", "int8-rows/x", (), [b"1"])],
    "TypeError": [PackedTensor("a", "int8-rows/x", (1,), [1])],  # type: ignore[list-item] # garbage
}


@pytest.mark.parametrize("problem", list(BAD))
def test_what_an_engine_could_not_read_is_not_stored(store: Store, make_gguf: Callable[..., Path], problem: str) -> None:
    model = store.load(make_gguf("Q4_1"))
    resolver = Resolver(store.catalogue, store.blobs, [dataclasses.replace(int8_rows(), pack=lambda source: iter(BAD[problem]))])
    with pytest.raises(PluginError, match=problem):
        resolver.tensors(model, "int8-rows")

    assert store.catalogue.tensors(model.version, "int8-rows") is None


def test_a_model_without_a_usable_tokenizer_cannot_be_calibrated(store: Store, make_gguf: Callable[..., Path]) -> None:
    source = store.source(store.load(make_gguf("Q4_1")))
    with pytest.raises(FailedPrecondition, match="too few tokens"):
        source.activations(512, 0)[Q]


def test_the_offline_command_names_formats_that_its_plugins_lack(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "plugmesh_weightstore.offline", "--model", str(make_gguf("Q4_1")), "--format", "qserve", "--store", str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr.strip().startswith("unknown format 'qserve'; there are source")) == (1, True)


@pytest.mark.model
@pytest.mark.slow
def test_activations_of_the_default_model_are_the_same_again_and_those_of_english(store: Store) -> None:
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not in the cache")
    source = store.source(store.load(path))
    found, again, other = (source.activations(96, seed) for seed in (1, 1, 2))
    rows = found[Q]

    assert rows.shape == (96, 576)
    assert np.array_equal(rows, again[Q])
    assert not np.array_equal(rows, other[Q])
    assert len(found) == 7 * 30 + 1
    assert all(np.isfinite(x).all() and x.dtype == np.float32 and not x.flags.writeable for x in found.values())
    # English that the model understands: its own head finds the next token far more often than chance.
    head = source.tensor(EMBEDDING)
    hidden = found["lm_head.weight"]
    logits = hidden @ head.T
    probable = np.exp(logits - logits.max(1, keepdims=True))
    entropy = -(p := probable / probable.sum(1, keepdims=True)) * np.log(p + 1e-30)
    assert entropy.sum(1).mean() < 0.6 * np.log(len(head))
