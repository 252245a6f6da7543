"""Reads and checks the header of a safetensors file: 8 bytes of length, JSON, then the data without holes.

The JSON is parsed here rather than by the library, because its own errors do not say which field is wrong.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from plugmesh.errors import CorruptModelFile
from plugmesh_weightstore.source import FileStamp, SourceTensor, check_layout, open_regular

MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 16
DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}


def read_safetensors(path: Path) -> tuple[list[SourceTensor], FileStamp]:
    """The tensors of one file in the order of their bytes; reads none of the data.

    Raises:
        CorruptModelFile: With the file's name and the field at fault ("header_size", "<tensor>.data_offsets").
    """

    def fail(field: str, problem: str) -> NoReturn:
        raise CorruptModelFile(f"{path.name}: {field}: {problem}", file=path.name, field=field)

    fd = open_regular(path)
    try:
        stamp = FileStamp.of(fd)
        head = os.pread(fd, 8, 0)
        if len(head) < 8:
            fail("header_size", f"the file has {stamp.num_bytes} bytes")
        header_bytes = int.from_bytes(head, "little")
        if header_bytes > min(MAX_HEADER_BYTES, stamp.num_bytes - 8):
            fail("header_size", f"{header_bytes} bytes in a file of {stamp.num_bytes}, at most {MAX_HEADER_BYTES} are allowed")
        text = os.pread(fd, header_bytes, 8)
    finally:
        os.close(fd)
    header = parse_json(text, path.name, "header")
    data_start, data_bytes = 8 + header_bytes, stamp.num_bytes - 8 - header_bytes
    header.pop("__metadata__", None)
    if not 1 <= len(header) <= MAX_TENSORS:
        fail("header", f"{len(header)} tensors, expected 1 to {MAX_TENSORS}")
    tensors = [_tensor(name, entry, path, data_start, fail) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.num_bytes))
    check_layout(path.name, ((t.offset - data_start, t.num_bytes, f"{t.name}.data_offsets") for t in tensors), data_bytes)
    if sum(t.num_bytes for t in tensors) != data_bytes:
        fail("data_offsets", f"{data_bytes} bytes of data, the tensors cover {sum(t.num_bytes for t in tensors)}")
    return tensors, stamp


def _tensor(name: str, entry: Any, path: Path, data_start: int, fail: Any) -> SourceTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fail(name[:200], "needs exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        fail(f"{name[:200]}.dtype", f"not supported; supported are {', '.join(DTYPES)}")
    dtype, item_bytes = DTYPES[entry["dtype"]]
    for key, most in (("shape", 4), ("data_offsets", 2)):
        values = entry[key]
        if not isinstance(values, list) or len(values) > most or not all(type(v) is int and 0 <= v < 1 << 48 for v in values):
            fail(f"{name[:200]}.{key}", f"not a list of at most {most} sensible sizes")
    if len(entry["data_offsets"]) != 2:
        fail(f"{name[:200]}.data_offsets", "needs a begin and an end")
    begin, end = entry["data_offsets"]
    num_bytes = math.prod(entry["shape"]) * item_bytes
    if num_bytes == 0 or end - begin != num_bytes:
        fail(f"{name[:200]}.data_offsets", f"{end - begin} bytes, {entry['dtype']} of shape {entry['shape']} needs {num_bytes}")
    return SourceTensor(name, dtype, tuple(entry["shape"]), path, data_start + begin, num_bytes)


def parse_json(text: bytes, file: str, field: str) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises CorruptModelFile for anything else."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CorruptModelFile(f"{file}: {field}: not valid JSON: {str(e)[:120]}", file=file, field=field) from e
    if not isinstance(value, dict):
        raise CorruptModelFile(f"{file}: {field}: not a JSON object", file=file, field=field)
    return value
