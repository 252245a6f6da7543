"""Reads and checks the header of a GGUF file without trusting one number in it.

The `gguf` library maps the file and believes its counts and offsets; it would allocate, loop or read out of bounds on a
hostile file. So the header is read here, with bounds, and the library only dequantises blocks whose size has been
checked (`pack`). The layout is that of GGUF versions 2 and 3, little endian:

    "GGUF", version u32, tensor count u64, pair count u64
    pairs:   key string, type u32, value            (string: length u64, bytes)
    tensors: name string, number of dims u32, dims u64 (fastest first), type u32, offset u64
    padding to general.alignment, then the data; offsets count from there
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np

from plugmesh.errors import CorruptModelFile
from plugmesh_weightstore.source import FileStamp, check_layout, open_regular

MAX_HEADER_BYTES = 64 << 20
MAX_PAIRS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 1 << 12
MAX_STRING_BYTES = 4 << 20
MAX_ARRAY_STRINGS = 1 << 21  # of all arrays together: vocabularies and merges hold about 10**6
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 40

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Types that the library can turn into float32; others (Q8_1, Q8_K, integers) are no weight types.
_WEIGHT_TYPES: dict[int, tuple[str, int, int]] = {
    int(t): (_FLOATS.get(t.name, t.name), *gguf.GGML_QUANT_SIZES[t])
    for t in gguf.GGMLQuantizationType
    if t in gguf.GGML_QUANT_SIZES and (t.name in _FLOATS or hasattr(gguf.quants, t.name))
}
BLOCK_SIZES: dict[str, tuple[int, int]] = {name: (elements, num_bytes) for name, elements, num_bytes in _WEIGHT_TYPES.values()}
"""Type name to (elements, bytes) of one block; all types that can be imported."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table; `shape` is row-major, `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The checked header: metadata (numbers, strings, lists of them) and tensors in file order."""

    path: Path
    stamp: FileStamp
    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path) -> GgufFile:
    """Checks the whole header; reads none of the data.

    Memory stays within a few times the header, which is at most 64 MiB.

    Raises:
        CorruptModelFile: With the file's name and the field at fault ("tensor_count", "tensors[3].offset", a key).
    """
    fd = open_regular(path)
    try:
        return _Parser(path, fd).parse()
    finally:
        os.close(fd)


class _Parser:
    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd, self.stamp = path, fd, FileStamp.of(fd)
        self.size = self.stamp.num_bytes
        self.buffer, self.at = bytearray(), 0
        self.num_strings = 0

    def fail(self, field: str, problem: str) -> NoReturn:
        raise CorruptModelFile(f"{self.path.name}: {field}: {problem}", file=self.path.name, field=field)

    def need(self, num_bytes: int, field: str) -> int:
        """Makes the next `num_bytes` of the file present in the buffer; returns where they start and moves on."""
        start = self.at
        end = start + num_bytes
        if end > len(self.buffer):
            if end > self.size:
                self.fail(field, f"needs {num_bytes} bytes at {start}, the file has {self.size}")
            if end > MAX_HEADER_BYTES:
                self.fail(field, f"the header is longer than {MAX_HEADER_BYTES} bytes")
            while len(self.buffer) < end:
                piece = os.pread(self.fd, max(end - len(self.buffer), 1 << 20), len(self.buffer))
                if not piece:
                    self.fail(field, "the file became shorter while it was read")
                self.buffer += piece
        self.at = end
        return start

    def number(self, code: str, field: str) -> Any:
        return struct.unpack_from(code, self.buffer, self.need(struct.calcsize(code), field))[0]

    def string(self, field: str, max_bytes: int = MAX_STRING_BYTES) -> str:
        num_bytes = self.number("<Q", field)
        if num_bytes > max_bytes:
            self.fail(field, f"a string of {num_bytes} bytes, at most {max_bytes} are allowed")
        start = self.need(num_bytes, field)
        try:
            return self.buffer[start : start + num_bytes].decode()
        except UnicodeDecodeError as e:
            self.fail(field, f"not UTF-8 at byte {e.start}")

    def parse(self) -> GgufFile:
        # 1. The fixed part.
        start = self.need(4, "magic")
        if self.buffer[start : start + 4] != b"GGUF":
            self.fail("magic", "does not begin with GGUF")
        version = self.number("<I", "version")
        if version not in (2, 3):
            self.fail("version", f"{version}, expected 2 or 3" + (" (a big-endian file?)" if version > 0xFFFF else ""))
        num_tensors, num_pairs = self.number("<Q", "tensor_count"), self.number("<Q", "kv_count")
        # Lower bounds of an entry's size: a count that cannot fit is refused before any loop.
        for field, count, limit, smallest in (("tensor_count", num_tensors, MAX_TENSORS, 33), ("kv_count", num_pairs, MAX_PAIRS, 14)):
            if count > limit or count * smallest > self.size:
                self.fail(field, f"{count} entries in a file of {self.size} bytes, at most {limit} are allowed")
        if num_tensors == 0:
            self.fail("tensor_count", "the file holds no tensors")
        # 2. Metadata.
        metadata: dict[str, Any] = {}
        for i in range(num_pairs):
            key = self.string(f"kv[{i}].key", MAX_KEY_BYTES)
            if not key or key in metadata:
                self.fail(f"kv[{i}].key", f"{'occurs twice' if key else 'is empty'}: {key[:80]!r}")
            metadata[key] = self.value(self.number("<I", key), key)
        # 3. The tensor table.
        table = [self.tensor(i) for i in range(num_tensors)]
        seen: set[str] = set()
        for i, (name, *_) in enumerate(table):
            if name in seen:
                self.fail(f"tensors[{i}].name", f"occurs twice: {name!r}")
            seen.add(name)
        # 4. The data: where it starts, and that every tensor lies in it.
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            self.fail("general.alignment", f"{alignment!r} is not a power of two up to 2**20")
        data_start = -(-self.at // alignment) * alignment
        tensors = []
        for i, (name, dtype, shape, offset, num_bytes) in enumerate(table):
            if offset % alignment:
                self.fail(f"tensors[{i}].offset", f"{offset} is not a multiple of {alignment}")
            tensors.append(GgufTensor(name, dtype, shape, data_start + offset, num_bytes))
        check_layout(self.path.name, ((t.offset, t.num_bytes, f"tensors[{i}].offset") for i, t in enumerate(tensors)), self.size)
        return GgufFile(self.path, self.stamp, version, metadata, tuple(tensors))

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.fail(key, f"unknown value type {kind}")
        value = self.number(_SCALARS[kind], key)
        if kind == _BOOL:
            if value > 1:
                self.fail(key, f"{value} is not a boolean")
            return bool(value)
        return value

    def array(self, key: str) -> list[Any]:
        kind, count = self.number("<I", key), self.number("<Q", key)
        if kind == _STRING:
            self.num_strings += count
            if self.num_strings > MAX_ARRAY_STRINGS or count * 8 > self.size - self.at:
                self.fail(key, f"an array of {count} strings does not fit")
            return [self.string(key) for _ in range(count)]
        if kind not in _SCALARS:
            self.fail(key, f"unknown or nested array type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        if count * dtype.itemsize > self.size - self.at or count > MAX_ARRAY_STRINGS:
            self.fail(key, f"an array of {count} numbers does not fit")
        start = self.need(count * dtype.itemsize, key)
        values = np.frombuffer(self.buffer, dtype, count, start).tolist()  # a copy: the buffer may grow later
        return [bool(v) for v in values] if kind == _BOOL else values

    def tensor(self, i: int) -> tuple[str, str, tuple[int, ...], int, int]:
        field = f"tensors[{i}]"
        name = self.string(f"{field}.name", MAX_KEY_BYTES)
        if not name:
            self.fail(f"{field}.name", "is empty")
        num_dims = self.number("<I", f"{field}.dims")
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"{field}.dims", f"{num_dims} dimensions, expected 1 to {MAX_DIMS}")
        dims = [self.number("<Q", f"{field}.dims") for _ in range(num_dims)]
        if min(dims) < 1 or max(dims) > MAX_ELEMENTS or math.prod(dims) > MAX_ELEMENTS:
            self.fail(f"{field}.dims", f"{dims} is empty or has more than 2**40 elements")
        kind = self.number("<I", f"{field}.type")
        if kind not in _WEIGHT_TYPES:
            self.fail(f"{field}.type", f"type {kind} is unknown or not a weight type")
        dtype, block_elements, block_bytes = _WEIGHT_TYPES[kind]
        if dims[0] % block_elements:
            self.fail(f"{field}.dims", f"rows of {dims[0]} are not whole blocks of {block_elements} ({dtype})")
        num_bytes = math.prod(dims) // block_elements * block_bytes
        return name, dtype, tuple(reversed(dims)), self.number("<Q", f"{field}.offset"), num_bytes
