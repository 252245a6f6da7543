"""The format that native kernels read: every value as in float32, in the smallest type that can hold it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import structlog

from plugmesh import models
from plugmesh_kernels.pack import PIECE_BYTES, packed_num_bytes, unpack
from plugmesh_weightstore import pack
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel, StoredTensor
from plugmesh_weightstore.importing import AllowedRoots, import_model, sweep
from plugmesh_weightstore.resolving import Resolver

PACKED = {
    "F32": "f32x16", "F16": "f32x16", "BF16": "bf16x16", "Q8_0": "q8_0x16", "Q4_0": "q4_1x16", "Q4_1": "q4_1x16", "Q5_0": "q8_0x16",
    "IQ4_NL": "q8_0x16", "Q5_1": "f32x16", "Q2_K": "f32x16", "Q4_K": "f32x16", "Q6_K": "f32x16",
}  # fmt: skip
EMBEDDING = "model.embed_tokens.weight"


class Store:
    def __init__(self, folder: Path) -> None:
        self.blobs, self.catalogue = BlobStore(folder / "store"), Catalogue(f"sqlite:///{folder / 'store' / 'catalogue.sqlite3'}")
        self.roots = AllowedRoots([folder, *([found.parent] if (found := models.find("smollm2")) else [])])
        self.resolver = Resolver(self.catalogue, self.blobs)

    def load(self, path: Path) -> StoredModel:
        return import_model(path, self.catalogue, self.blobs, self.roots)

    def array(self, t: StoredTensor) -> np.ndarray:
        data = np.fromfile(self.blobs.path(t.blob.sha256), np.uint8)
        if t.dtype in PIECE_BYTES:
            return unpack(t.dtype, data, *t.shape)
        assert t.dtype == "float32"
        return data.view(np.float32).reshape(t.shape)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    s = Store(tmp_path)
    yield s
    s.catalogue.close()


def assert_same_values(store: Store, model: StoredModel) -> dict[str, StoredTensor]:
    native = {t.name: t for t in store.resolver.tensors(model, "native")}
    plain = {t.name: t for t in store.resolver.tensors(model, "float32")}
    assert list(native) == list(plain)
    assert native
    for n in native:
        assert native[n].shape == plain[n].shape
        np.testing.assert_array_equal(store.array(native[n]), store.array(plain[n]), err_msg=n)
    return native


@pytest.mark.parametrize("dtype", PACKED)
def test_every_type_keeps_its_values_in_the_smallest_form_that_can(dtype: str, store: Store, make_gguf: Callable[..., Path]) -> None:
    native = assert_same_values(store, store.load(make_gguf(dtype)))

    for t in native.values():
        assert t.dtype == ("float32" if len(t.shape) == 1 else PACKED[dtype])
        assert t.blob.num_bytes == (4 * t.shape[0] if len(t.shape) == 1 else packed_num_bytes(t.dtype, *t.shape))


def test_matrices_longer_than_a_pass_are_joined_without_a_gap(store: Store, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_PIECE_ELEMENTS", 256 * 32)
    for dtype in ("Q5_0", "Q6_K"):
        assert_same_values(store, store.load(make_gguf(dtype)))


def test_half_precision_folders_become_float32(store: Store, make_hf: Callable[..., Path]) -> None:
    from plugmesh_weightstore.testing import hf_weights

    model = store.load(make_hf(weights={n: w.astype(np.float16) for n, w in hf_weights().items()}))

    native = assert_same_values(store, model)
    assert {t.dtype for t in native.values()} == {"float32", "f32x16"}


def test_a_form_is_kept_and_goes_with_its_model(store: Store, make_gguf: Callable[..., Path]) -> None:
    model = store.load(make_gguf("Q8_0"))
    before = store.catalogue.find("").stored_bytes
    first = store.resolver.tensors(model, "native")
    stored = store.catalogue.find("")

    with structlog.testing.capture_logs() as logs:
        assert store.resolver.tensors(model, "native") == first
    assert logs == []  # found, not made again
    assert stored.formats == ("source", "native")
    assert stored.stored_bytes - before == sum(t.blob.num_bytes for t in first if t.dtype == "q8_0x16")  # norms are those of the source
    store.catalogue.remove(model.version)
    sweep(store.catalogue, store.blobs)
    assert store.blobs.usage() == (0, 0)


def test_a_form_of_another_layout_or_with_a_lost_file_is_packed_again(store: Store, make_gguf: Callable[..., Path]) -> None:
    model = store.load(make_gguf("Q4_1"))
    good = store.resolver.tensors(model, "native")
    store.catalogue.drop_form(model.version, "native")
    store.catalogue.add_form(model.version, "native", [StoredTensor(t.name, t.dtype.replace("x16", "x8"), t.shape, t.blob) for t in good])

    assert store.resolver.tensors(model, "native") == good

    lost = store.blobs.path(good[0].blob.sha256)
    lost.unlink()
    assert store.resolver.tensors(model, "native") == good
    assert lost.stat().st_size == good[0].blob.num_bytes


def test_scales_that_four_bits_cannot_keep_take_eight(store: Store, make_gguf: Callable[..., Path]) -> None:
    path = make_gguf("Q4_0")
    model = store.load(path)
    source = store.resolver.tensors(model, "source")[0]
    data = np.fromfile(store.blobs.path(source.blob.sha256), np.uint8)
    data[:2] = np.array([9000.0], "<f2").view(np.uint8)

    assert pack.packed_dtype(data, "Q4_0", source.shape, "native") == "q8_0x16"
    n, k = source.shape
    packed = np.concatenate([np.asarray(p) for p in pack.native_pieces(data, "Q4_0", (n, k), "q8_0x16")])
    np.testing.assert_array_equal(unpack("q8_0x16", packed, n, k), pack.dequantize(data, "Q4_0").reshape(n, k))


@pytest.mark.model
def test_the_default_model_is_packed_in_the_time_of_a_breath(store: Store) -> None:
    path = models.find("smollm2")
    assert path is not None, "plugmesh pull smollm2"
    model = store.load(path)
    start = time.monotonic()
    native = {t.name: t for t in store.resolver.tensors(model, "native")}
    seconds = time.monotonic() - start
    print(f"packed in {seconds:.2f} s")

    assert {t.dtype for t in native.values() if len(t.shape) == 2} == {"q4_1x16", "q8_0x16"}
    assert native[EMBEDDING].dtype == "q8_0x16"
    assert sum(t.blob.num_bytes for t in native.values()) < 100e6  # the file has 99 MB
    assert seconds < 20  # about half a second; most of it flushes files
    for t in store.resolver.tensors(model, "source"):  # the whole form as float32 would be half a gigabyte
        if t.name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight", "model.norm.weight"):
            data = np.fromfile(store.blobs.path(t.blob.sha256), np.uint8)
            np.testing.assert_array_equal(store.array(native[t.name]), pack.dequantize(data, t.dtype).reshape(t.shape), err_msg=t.name)
