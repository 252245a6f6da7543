"""The header reader against the library's own reader, and against every lie a header can tell."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh import models
from plugmesh.errors import CorruptModelFile
from plugmesh_weightstore.gguf_file import BLOCK_SIZES, read_gguf
from plugmesh_weightstore.gguf_model import load_gguf_model

F32, Q4_0 = 0, 2


def string(text: bytes | str) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str, dims: tuple[int, ...] = (32,), kind: int = F32, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(pairs: Sequence[bytes] = (), infos: list[bytes] | None = None, data: int = 128, *, magic: bytes = b"GGUF", version: int = 3,
         num_tensors: int | None = None, num_pairs: int | None = None) -> bytes:  # fmt: skip
    infos = [info("a")] if infos is None else infos
    out = magic + struct.pack("<IQQ", version, len(infos) if num_tensors is None else num_tensors, len(pairs) if num_pairs is None else num_pairs)
    out += b"".join(pairs) + b"".join(infos)
    return out + bytes(-len(out) % 32) + bytes(data)


HOSTILE = {
    "empty": (b"", "magic"),
    "magic": (file(magic=b"GGML"), "magic"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + file()[8:], "version"),
    "version 1": (file(version=1), "version"),
    "more tensors than bytes": (file(num_tensors=1 << 60), "tensor_count"),
    "a few tensors too many": (file(num_tensors=5), "tensors[1].name"),
    "no tensors": (file(infos=[]), "tensor_count"),
    "more pairs than bytes": (file(num_pairs=(1 << 64) - 1), "kv_count"),
    "key longer than the file": (file([struct.pack("<Q", 1 << 50)]), "kv[0].key"),
    "key twice": (file([pair("k", 4, bytes(4))] * 2), "kv[1].key"),
    "empty key": (file([pair("", 4, bytes(4))]), "kv[0].key"),
    "key not UTF-8": (file([string(b"\xff\xfe") + bytes(8)]), "kv[0].key"),
    "string longer than the file": (file([pair("s", 8, struct.pack("<Q", 1 << 20))]), "s"),
    "string of exabytes": (file([pair("s", 8, struct.pack("<Q", 1 << 62))]), "s"),
    "unknown value type": (file([pair("k", 99, bytes(8))]), "k"),
    "boolean 7": (file([pair("k", 7, b"\x07")]), "k"),
    "array of exabytes": (file([pair("k", 9, struct.pack("<IQ", 4, 1 << 61))]), "k"),
    "array of countless strings": (file([pair("k", 9, struct.pack("<IQ", 8, 1 << 40))]), "k"),
    "array of arrays": (file([pair("k", 9, struct.pack("<IQ", 9, 1))]), "k"),
    "no dimensions": (file(infos=[info("a", ())]), "tensors[0].dims"),
    "five dimensions": (file(infos=[info("a", (2,) * 5)]), "tensors[0].dims"),
    "billions of dimensions": (file(infos=[string("a") + struct.pack("<I", 0xFFFFFFFF)]), "tensors[0].dims"),
    "zero dimension": (file(infos=[info("a", (32, 0))]), "tensors[0].dims"),
    "huge dimension": (file(infos=[info("a", (1 << 63,))]), "tensors[0].dims"),
    "product overflows 64 bits": (file(infos=[info("a", (1 << 32, 1 << 32))]), "tensors[0].dims"),
    "unknown tensor type": (file(infos=[info("a", kind=77)]), "tensors[0].type"),
    "removed tensor type": (file(infos=[info("a", kind=4)]), "tensors[0].type"),
    "integer tensor": (file(infos=[info("a", kind=int(gguf.GGMLQuantizationType.I32))]), "tensors[0].type"),
    "row is no whole block": (file(infos=[info("a", (33,), Q4_0)]), "tensors[0].dims"),
    "offset beyond the end": (file(infos=[info("a", offset=1 << 40)]), "tensors[0].offset"),
    "offset near 2**64": (file(infos=[info("a", offset=(1 << 64) - 32)]), "tensors[0].offset"),
    "data one byte short": (file(data=127), "tensors[0].offset"),
    "unaligned offset": (file(infos=[info("a", offset=4)], data=256), "tensors[0].offset"),
    "overlap": (file(infos=[info("a"), info("b", offset=96)], data=512), "tensors[1].offset"),
    "name twice": (file(infos=[info("a"), info("a", offset=128)], data=512), "tensors[1].name"),
    "alignment 3": (file([pair("general.alignment", 4, struct.pack("<I", 3))]), "general.alignment"),
    "alignment 0": (file([pair("general.alignment", 4, bytes(4))]), "general.alignment"),
    "alignment is text": (file([pair("general.alignment", 8, string("32"))]), "general.alignment"),
    "alignment 2**31": (file([pair("general.alignment", 4, struct.pack("<I", 1 << 31))]), "general.alignment"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_a_lie_in_the_header_is_named(case: str, tmp_path: Path) -> None:
    content, field = HOSTILE[case]
    path = tmp_path / "evil.gguf"
    path.write_bytes(content)

    with pytest.raises(CorruptModelFile) as e:
        read_gguf(path)

    assert (e.value.file, e.value.field) == ("evil.gguf", field)
    assert "evil.gguf" in e.value.message and field in e.value.message


def test_the_smallest_honest_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ok.gguf"
    path.write_bytes(file([pair("k", 9, struct.pack("<IQ", 5, 2) + struct.pack("<ii", -1, 2))], [info("a", (4, 8), offset=128)], data=256))

    read = read_gguf(path)

    assert read.metadata == {"k": [-1, 2]}
    assert [(t.name, t.dtype, t.shape, t.offset, t.num_bytes) for t in read.tensors] == [("a", "float32", (8, 4), 256, 128)]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("pipe", "link", "missing"):
        with pytest.raises(CorruptModelFile):
            read_gguf(tmp_path / name)


@pytest.mark.parametrize("dtype", ["F32", "Q4_1", "Q6_K"])
def test_header_equals_that_of_the_library(dtype: str, make_gguf: Callable[..., Path]) -> None:
    assert_equals_library(make_gguf(dtype))


@pytest.mark.slow  # the library takes seconds for its 98,000 strings
@pytest.mark.model
def test_header_of_the_default_model_equals_that_of_the_library() -> None:
    path = models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not in the cache; plugmesh pull smollm2")
    assert_equals_library(path)


def assert_equals_library(path: Path) -> None:
    reader, ours = gguf.GGUFReader(path), read_gguf(path)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    theirs = [
        (t.name, names.get(t.tensor_type.name, t.tensor_type.name), tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]
    assert [(t.name, t.dtype, t.shape, t.offset, t.num_bytes) for t in ours.tensors] == theirs
    assert ours.metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}


def test_every_weight_type_of_the_library_is_known() -> None:
    """Types it can dequantise are importable; a new version of the library may add some."""
    for name in ("float32", "float16", "bfloat16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4"):
        assert name in BLOCK_SIZES
    assert not {"Q8_1", "Q8_K", "I32", "F64"} & set(BLOCK_SIZES)


def test_any_damage_is_a_typed_error_and_costs_little_memory(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Mutated, truncated and extended files: CorruptModelFile or a model, nothing else."""
    good = make_gguf("Q4_1").read_bytes()
    header_bytes = 4000  # everything before the data, where damage matters
    path = tmp_path / "fuzz.gguf"
    edits = st.lists(
        st.tuples(st.integers(0, header_bytes), st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f"]))),
        max_size=4,
    )

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(edits, st.one_of(st.none(), st.integers(0, len(good))), st.binary(max_size=16))
    def damage(changes: list[tuple[int, bytes]], cut: int | None, tail: bytes) -> None:
        data = bytearray(good)
        for at, new in changes:
            data[at : at + len(new)] = new
        path.write_bytes(bytes(data[:cut]) + tail)
        fault = None
        try:
            load_gguf_model(path)
        except CorruptModelFile as e:
            fault = e
        assert fault is None or (fault.field and fault.file == "fuzz.gguf")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    damage()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_after_the_magic_are_a_typed_error(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".gguf") as f:
        f.write(b"GGUF\x03\x00\x00\x00" + data)
        f.flush()
        with pytest.raises(CorruptModelFile):
            load_gguf_model(Path(f.name))
