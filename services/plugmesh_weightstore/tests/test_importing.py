"""Files become models: at once or not at all, with the bytes that were in the file."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from plugmesh import models
from plugmesh.errors import (
    Cancelled,
    CorruptModelFile,
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    PermissionDenied,
)
from plugmesh_weightstore import importing
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel, StoredTensor
from plugmesh_weightstore.importing import AllowedRoots, import_model, sweep
from plugmesh_weightstore.pack import from_bfloat16, to_bfloat16
from plugmesh_weightstore.resolving import Resolver
from plugmesh_weightstore.testing import hf_weights


class Store:
    """A catalogue with its blobs, below one folder that is also the only root."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.blobs, self.catalogue = folder, BlobStore(folder / "store"), Catalogue(url)
        self.roots = AllowedRoots([folder])
        self.resolver = Resolver(self.catalogue, self.blobs)

    def load(self, path: Path, **kwargs) -> StoredModel:
        return import_model(path, self.catalogue, self.blobs, self.roots, **kwargs)

    def array(self, t: StoredTensor) -> np.ndarray:
        """The tensor as a reader sees it: its blob, mapped."""
        raw = np.memmap(self.blobs.path(t.blob.sha256), np.uint8, mode="r")
        assert len(raw) == t.blob.num_bytes
        if t.dtype == "bfloat16":
            return from_bfloat16(raw.view(np.uint16)).reshape(t.shape)
        return raw.view(t.dtype).reshape(t.shape) if t.dtype in ("float32", "float16") else np.asarray(raw)

    def arrays(self, model: StoredModel, format: str) -> dict[str, np.ndarray]:
        return {t.name: self.array(t) for t in self.resolver.tensors(model, format)}

    def assert_empty(self) -> None:
        assert self.catalogue.list_models() == []
        sweep(self.catalogue, self.blobs)
        assert self.blobs.usage() == (0, 0) and list(self.blobs.temporary.iterdir()) == []


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    s = Store(tmp_path, f"sqlite:///{tmp_path / 'store' / 'catalogue.sqlite3'}")
    yield s
    s.catalogue.close()


@pytest.fixture
def any_store(tmp_path: Path, database_url: str) -> Iterator[Store]:
    s = Store(tmp_path, database_url)
    yield s
    s.catalogue.close()


def library_arrays(path: Path) -> dict[str, np.ndarray]:
    """What the library's own reader and slow path make of a file, by its own tensor names."""
    with np.errstate(all="ignore"):
        return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist()))) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_a_gguf_comes_back_as_the_library_reads_it(dtype: str, store: Store, make_gguf: Callable[..., Path]) -> None:
    path = make_gguf(dtype)
    expected = library_arrays(path)
    hf_names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }

    model = store.load(path)

    assert model.num_parameters == sum(a.size for a in expected.values())
    in_float32, in_bfloat16 = store.arrays(model, "float32"), store.arrays(model, "bfloat16")
    assert len(in_float32) == len(in_bfloat16) == len(expected) == 11
    for theirs, ours in hf_names.items():
        assert np.array_equal(in_float32[ours], expected[theirs])
        assert np.array_equal(in_bfloat16[ours], from_bfloat16(to_bfloat16(expected[theirs])))
    raw = {t.name: t for t in store.resolver.tensors(model, "source")}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert raw["model.embed_tokens.weight"].dtype == names.get(dtype, dtype)
    file_bytes = {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}
    assert store.blobs.path(raw["model.embed_tokens.weight"].blob.sha256).read_bytes() == file_bytes["token_embd.weight"]


def test_a_hugging_face_folder_comes_back_as_it_was(any_store: Store, make_hf: Callable[..., Path]) -> None:
    model = any_store.load(make_hf(shards=3), alias="tiny")

    for format in ("source", "float32"):
        found = any_store.arrays(model, format)
        assert found.keys() == hf_weights().keys()
        for name, expected in hf_weights().items():
            assert np.array_equal(found[name], expected)
    # Nothing is stored twice where source and format agree.
    assert {t.blob for t in any_store.resolver.tensors(model, "source")} == {t.blob for t in any_store.resolver.tensors(model, "float32")}
    assert any_store.catalogue.find("tiny").formats == ("source", "float32")


def test_half_precision_folders_convert_exactly(store: Store, make_hf: Callable[..., Path]) -> None:
    weights = {n: w.astype(np.float16) for n, w in hf_weights().items()}

    found = store.arrays(store.load(make_hf(weights=weights)), "float32")

    for name, expected in weights.items():
        assert np.array_equal(found[name], expected.astype(np.float32))


def test_one_file_of_a_sharded_format_and_a_folder_with_one_gguf_are_enough(store: Store, make_gguf: Callable[..., Path], make_hf: Callable[..., Path]) -> None:
    folder = make_hf()
    assert store.load(folder).version == store.load(folder / "model.safetensors").version
    gguf_path = make_gguf("Q8_0")
    (store.folder / "only").mkdir()
    gguf_path.rename(store.folder / "only" / "m.gguf")

    assert store.load(store.folder / "only").source == "gguf"
    (store.folder / "nothing").mkdir()
    with pytest.raises(InvalidRequest):
        store.load(store.folder / "nothing")


def test_importing_again_changes_nothing(any_store: Store, make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    first = any_store.load(path, alias="a")
    usage = any_store.blobs.usage()
    (any_store.folder / "copy.gguf").write_bytes(path.read_bytes())

    assert any_store.load(any_store.folder / "copy.gguf", alias="b").version == first.version
    assert any_store.blobs.usage() == usage


def test_progress_covers_every_byte_and_ends(store: Store, make_gguf: Callable[..., Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    store.load(make_gguf(), progress=lambda *a: seen.append(a))

    phases = [p for i, (p, _, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != p]
    assert phases == ["verify", "store", "commit", "done"]
    stored = [done for phase, done, _ in seen if phase == "store"]
    assert stored == sorted(stored) and stored[-1] == seen[-1][2] > 0


def test_cancelling_leaves_nothing(store: Store, make_gguf: Callable[..., Path]) -> None:
    stop = threading.Event()

    def cancel(phase: str, done: int, total: int) -> None:
        if phase == "store" and done > total / 3:
            stop.set()

    with pytest.raises(Cancelled):
        store.load(make_gguf("F32", layers=3), progress=cancel, cancelled=stop)

    store.assert_empty()


def test_paths_outside_the_roots_are_refused_whatever_their_form(store: Store, make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = make_gguf()
    (inside / "link.gguf").symlink_to(outside)
    (inside / "dir").symlink_to(tmp_path)
    (inside / "loop").symlink_to(inside / "loop")
    roots = AllowedRoots([inside])
    for path in (outside, inside / ".." / outside.name, inside / "link.gguf", inside / "dir" / outside.name, Path("/etc/passwd"), Path("/nowhere/x"), Path("relative")):
        with pytest.raises(PermissionDenied):
            import_model(path, store.catalogue, store.blobs, roots)
    with pytest.raises(NotFound):
        import_model(inside / "none.gguf", store.catalogue, store.blobs, roots)
    for path in (Path("a\0b"), inside / "loop"):
        with pytest.raises((InvalidRequest, NotFound, PermissionDenied)):
            import_model(path, store.catalogue, store.blobs, roots)

    store.assert_empty()


def test_bad_names_and_sizes_are_refused_before_anything_is_stored(store: Store, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_gguf()
    with pytest.raises(InvalidRequest):
        store.load(path, alias="no spaces, please")
    with pytest.raises(FailedPrecondition, match="at most 1000"):
        store.load(path, max_bytes=1000)
    usage = importing.shutil.disk_usage(store.folder)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda p: usage._replace(free=1000))
    with pytest.raises(FailedPrecondition, match="the disk has 1000"):
        store.load(path)

    assert store.blobs.usage() == (0, 0)


def test_a_full_disk_is_a_typed_error(store: Store, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FailedPrecondition, match="full"):
        store.load(make_gguf())
    monkeypatch.undo()

    store.assert_empty()


def test_a_file_that_changes_or_shrinks_meanwhile_is_refused(store: Store, make_gguf: Callable[..., Path]) -> None:
    path = make_gguf("F32")
    data = path.read_bytes()

    def touch(phase: str, done: int, total: int) -> None:
        if phase == "commit":
            path.write_bytes(data[:-1] + b"x")

    def shrink(phase: str, done: int, total: int) -> None:
        if phase == "store":
            os.truncate(path, 5000)

    for change in (touch, shrink):
        path.write_bytes(data)
        with pytest.raises(CorruptModelFile):
            store.load(path, progress=change)

    store.assert_empty()


@pytest.mark.parametrize("moment", ["store", "commit"])
def test_a_killed_import_leaves_nothing_visible_and_its_bytes_are_swept(moment: str, any_store: Store, database_url: str, make_gguf: Callable[..., Path]) -> None:
    """kill -9 in the middle of the bytes, and between the last byte and the transaction."""
    path = make_gguf("F32", layers=2)
    code = """
import os, signal, sys
from pathlib import Path
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue
from plugmesh_weightstore.importing import AllowedRoots, import_model
path, root, url, moment = sys.argv[1:]
def progress(phase, done, total):
    if phase == moment and (phase != "store" or done > total / 2):
        os.kill(os.getpid(), signal.SIGKILL)
import_model(Path(path), Catalogue(url), BlobStore(Path(root)), AllowedRoots([Path(path).parent]), alias="killed", progress=progress)
"""
    arguments = [sys.executable, "-c", code, str(path), str(any_store.blobs.root), database_url, moment]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, timeout=60)

    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert any_store.blobs.usage()[0] > 0  # it was in the middle
    any_store.assert_empty()
    assert any_store.load(path, alias="killed").aliases[0] == "killed"


def test_packing_happens_once_for_many_callers(any_store: Store, make_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = any_store.load(make_gguf())
    packs: list[str] = []
    real = Resolver._pack
    monkeypatch.setattr(Resolver, "_pack", lambda self, m, f: (packs.append(f), real(self, m, f))[1])
    results: list[list[StoredTensor]] = []
    threads = [threading.Thread(target=lambda: results.append(any_store.resolver.tensors(model, "bfloat16"))) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert packs == ["bfloat16"]
    assert len(results) == 6 and all(r == results[0] for r in results)


def test_two_resolvers_packing_at_once_agree(any_store: Store, make_gguf: Callable[..., Path]) -> None:
    """As two processes would: each with locks of its own."""
    model = any_store.load(make_gguf())
    results: list[list[StoredTensor]] = []
    resolvers = [Resolver(any_store.catalogue, any_store.blobs) for _ in range(2)]
    threads = [threading.Thread(target=lambda r=r: results.append(r.tensors(model, "bfloat16"))) for r in resolvers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert len(results) == 2 and results[0] == results[1]
    assert any_store.catalogue.find("").formats == ("source", "bfloat16")


def test_a_lost_packed_blob_is_made_again_and_a_lost_source_is_data_loss(store: Store, make_gguf: Callable[..., Path]) -> None:
    model = store.load(make_gguf())
    packed = store.resolver.tensors(model, "bfloat16")
    store.blobs.path(packed[3].blob.sha256).unlink()

    assert store.resolver.tensors(model, "bfloat16") == packed
    assert store.blobs.has(packed[3].blob.sha256, packed[3].blob.num_bytes)
    quantised = next(t for t in store.resolver.tensors(model, "source") if t.dtype == "Q4_1")
    store.blobs.path(quantised.blob.sha256).unlink()
    with pytest.raises(DataLoss):
        store.resolver.tensors(model, "source")
    store.load(store.folder / "Q4_1-0.gguf")  # importing again heals it
    assert store.resolver.tensors(model, "source")


def test_unknown_formats_and_removed_models_are_typed_errors(store: Store, make_gguf: Callable[..., Path]) -> None:
    model = store.load(make_gguf())
    for format in ("int3", "", "x" * 10_000):
        with pytest.raises(InvalidRequest, match="bfloat16"):
            store.resolver.tensors(model, format)
    store.catalogue.remove(model.version)
    for format in ("source", "bfloat16"):
        with pytest.raises(NotFound):
            store.resolver.tensors(model, format)


def test_removing_frees_only_what_nobody_else_uses(any_store: Store, make_gguf: Callable[..., Path]) -> None:
    one = any_store.load(make_gguf("Q8_0", seed=0), alias="one")
    two = any_store.load(make_gguf("Q8_0", seed=1), alias="two")
    any_store.resolver.tensors(one, "bfloat16")
    shared = {b.sha256 for _, b in one.assets} & {b.sha256 for _, b in two.assets}
    assert shared

    any_store.catalogue.remove("one")
    num_blobs, num_bytes = sweep(any_store.catalogue, any_store.blobs)

    assert num_blobs == 22  # 11 tensors as imported and 11 packed; the assets are shared
    assert num_bytes > 0
    assert all(any_store.blobs.has(b.sha256, b.num_bytes) for _, b in two.assets)
    for t in any_store.resolver.tensors(two, "source"):
        assert hashlib.sha256(any_store.blobs.path(t.blob.sha256).read_bytes()).hexdigest() == t.blob.sha256


def test_bfloat16_safetensors_keep_their_bits(store: Store, make_hf: Callable[..., Path]) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = make_hf()
    weights = {n: torch.from_numpy(w).to(torch.bfloat16) for n, w in hf_weights().items()}
    save_file(weights, folder / "model.safetensors")

    found = store.arrays(store.load(folder), "bfloat16")

    for name, expected in weights.items():
        assert np.array_equal(found[name], expected.float().numpy())


@pytest.mark.model
def test_the_default_model_is_imported_and_packed_as_the_library_reads_it(store: Store) -> None:
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not in the cache; plugmesh pull smollm2")
    model = import_model(path, store.catalogue, store.blobs, AllowedRoots([path.parent]), alias="smollm2")

    found = store.arrays(model, "bfloat16")

    by_name = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for theirs, ours in (("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight"), ("blk.7.attn_k.weight", "model.layers.7.self_attn.k_proj.weight")):
        t = by_name[theirs]
        assert np.array_equal(found[ours], from_bfloat16(to_bfloat16(gguf.dequantize(t.data, t.tensor_type))))
    assert len(found) == 272


def test_safetensors_written_by_the_library_are_read_through_the_blobs(store: Store, make_hf: Callable[..., Path]) -> None:
    folder = make_hf()
    expected = safetensors.numpy.load_file(folder / "model.safetensors")

    found = store.arrays(store.load(folder), "source")

    assert all(np.array_equal(found[n], w) for n, w in expected.items())
