"""What an importer finds in a model file or folder, before any byte of a tensor is stored."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from plugmesh.errors import CorruptModelFile
from plugmesh.types import ModelConfig


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Identity of a file at the time it was checked; another stamp later means that the checks no longer hold."""

    num_bytes: int
    inode: int
    mtime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileStamp:
        s = os.fstat(fd)
        return cls(s.st_size, s.st_ino, s.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where the bytes of one tensor lie.

    `name` is the Hugging Face name, `dtype` "float32", "float16", "bfloat16" or a GGUF type ("Q4_1"), `shape` row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A checked model: configuration, where its tensors are, and its small files (`assets`: name to bytes)."""

    source: str  # "gguf" or "safetensors"
    name: str
    license: str
    config: ModelConfig
    tensors: tuple[SourceTensor, ...]
    assets: dict[str, bytes]
    stamps: dict[Path, FileStamp]


def open_regular(path: Path, field: str = "file") -> int:
    """A read-only descriptor of a regular file. Never blocks on a FIFO and does not follow a symlink.

    Raises:
        CorruptModelFile: Not readable or not a regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise CorruptModelFile(f"{path.name}: cannot be opened: {e.strerror}", file=path.name, field=field) from e
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptModelFile(f"{path.name}: not a regular file", file=path.name, field=field)
    return fd


def read_whole(path: Path, max_bytes: int, field: str = "file") -> bytes:
    """The content of a small file. Raises CorruptModelFile above `max_bytes`."""
    fd = open_regular(path, field)
    try:
        num_bytes = os.fstat(fd).st_size
        if num_bytes > max_bytes:
            raise CorruptModelFile(f"{path.name}: {num_bytes} bytes, at most {max_bytes} are allowed", file=path.name, field=field)
        data = os.pread(fd, num_bytes, 0)
    finally:
        os.close(fd)
    if len(data) != num_bytes:
        raise CorruptModelFile(f"{path.name}: ended after {len(data)} of {num_bytes} bytes", file=path.name, field=field)
    return data


def check_layout(file: str, spans: Iterable[tuple[int, int, str]], end: int) -> None:
    """Refuses tensors that overlap or reach beyond `end`.

    Args:
        spans: (offset, number of bytes, field name of the error), offsets from the same origin as `end`.
    """
    previous_end, previous = 0, ""
    for offset, num_bytes, field in sorted(spans):
        if offset + num_bytes > end:
            raise CorruptModelFile(f"{file}: {field}: ends at byte {offset + num_bytes}, the data has {end}", file=file, field=field)
        if offset < previous_end:
            raise CorruptModelFile(f"{file}: {field}: overlaps {previous}", file=file, field=field)
        previous_end, previous = offset + num_bytes, field
