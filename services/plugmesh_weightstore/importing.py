"""A file or folder becomes a model: check, store the tensors as blobs, then make all of it visible at once."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from plugmesh.errors import Cancelled, CorruptModelFile, FailedPrecondition, InvalidRequest, NotFound, PermissionDenied
from plugmesh_weightstore.blobs import Blob, BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel, StoredTensor, check_alias
from plugmesh_weightstore.gguf_model import load_gguf_model
from plugmesh_weightstore.hf_model import load_hf_model
from plugmesh_weightstore.source import FileStamp, SourceModel, SourceTensor, open_regular

log = structlog.get_logger()

Progress = Callable[[str, int, int], None]  # phase, done bytes, total bytes; from any thread
_PIECE_BYTES = 1 << 20
_STORE_THREADS = 4  # hashing and writing release the interpreter's lock, and the disk takes several flushes at once


class AllowedRoots:
    """The folders below which files may be read."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [r.expanduser().resolve() for r in roots]

    def check(self, path: Path) -> Path:
        """The real path, symlinks resolved.

        Raises:
            PermissionDenied: It lies outside every root, possibly by way of a symlink; says nothing about what exists there.
            NotFound: It lies inside, but does not exist.
        """
        try:
            real = path.expanduser().resolve()
        except (OSError, ValueError, RuntimeError) as e:  # a loop of symlinks, a null byte, no such user
            raise InvalidRequest("not a usable path", param="path") from e
        if not any(real.is_relative_to(root) for root in self.roots):
            raise PermissionDenied("the path is outside the folders that models may be imported from", param="path")
        if not real.exists():
            raise NotFound(f"{path.name} does not exist", param="path")
        return real


def load_source(path: Path, roots: AllowedRoots) -> SourceModel:
    """Checks a GGUF file, a single safetensors file's folder, or a Hugging Face folder. Reads no tensors.

    Raises:
        CorruptModelFile, PermissionDenied, NotFound, InvalidRequest: see there.
    """
    real = roots.check(path)
    if real.is_dir():
        if (real / "config.json").exists():
            return load_hf_model(real, roots.check)
        files = sorted(real.glob("*.gguf"))
        if len(files) != 1:
            raise InvalidRequest(f"{path.name} holds neither a config.json nor exactly one .gguf file", param="path")
        return load_gguf_model(roots.check(files[0]))
    if real.suffix == ".safetensors":
        return load_hf_model(real.parent, roots.check)
    return load_gguf_model(real)


def import_model(
    path: Path, catalogue: Catalogue, blobs: BlobStore, roots: AllowedRoots, *,
    alias: str = "", make_default: bool = False, max_bytes: int = 0,
    progress: Progress | None = None, cancelled: threading.Event | None = None,
) -> StoredModel:  # fmt: skip
    """Imports a model; blocks. Whatever happens before the last step, nothing of it is visible.

    Args:
        alias: Name for it besides its own title; moves here if another model has it.
        max_bytes: Refuse models with more bytes of tensors; 0 is no limit.
        progress: Phases "verify", "store", "commit", "done".
        cancelled: Set it to give up between two pieces.

    Raises:
        CorruptModelFile: The file is damaged, hostile, changed meanwhile or not supported.
        InvalidRequest, PermissionDenied, NotFound: A bad alias or path.
        FailedPrecondition: Too large, or too little space on the disk.
        Cancelled: `cancelled` was set.
    """
    report = progress or (lambda phase, done, total: None)
    stop = cancelled or threading.Event()
    start = time.monotonic()
    if alias:
        check_alias(alias)
    report("verify", 0, 0)
    source = load_source(path, roots)
    total = sum(t.num_bytes for t in source.tensors)
    if max_bytes and total > max_bytes:
        raise FailedPrecondition(f"{path.name} has {total} bytes of tensors, at most {max_bytes} are allowed", param="path")
    free = shutil.disk_usage(blobs.root).free
    if total > free:
        raise FailedPrecondition(f"{path.name} needs {total} bytes, the disk has {free}", param="path")
    with blobs.writing():
        tensors = _store_tensors(source, blobs, total, report, stop)
        assets = [(name, blobs.put([data])) for name, data in sorted(source.assets.items())]
        report("commit", total, total)
        blobs.flush([t.blob for t in tensors] + [blob for _, blob in assets])
        _check_unchanged(source)
        if stop.is_set():
            raise Cancelled("the import was cancelled")
        model = catalogue.add_model(
            source.config, tensors, assets, source=source.source, name=source.name, license=source.license,
            num_parameters=sum(math.prod(t.shape) for t in tensors), alias=alias, make_default=make_default,
        )  # fmt: skip
    seconds = time.monotonic() - start
    log.info("weightstore.imported", model=model.aliases[0], version=model.version, num_tensors=len(tensors), num_bytes=total, seconds=round(seconds, 3))
    report("done", total, total)
    return model


def _store_tensors(source: SourceModel, blobs: BlobStore, total: int, report: Progress, stop: threading.Event) -> list[StoredTensor]:
    done = 0
    counting = threading.Lock()
    failed = threading.Event()  # one tensor failed: the others need not be finished

    def pieces(fd: int, tensor: SourceTensor) -> Iterator[bytes]:
        nonlocal done
        end = tensor.offset + tensor.num_bytes
        for at in range(tensor.offset, end, _PIECE_BYTES):
            if stop.is_set() or failed.is_set():
                raise Cancelled("the import was cancelled")
            # Read, not mapped: a map of a file that shrinks kills the process.
            piece = os.pread(fd, min(_PIECE_BYTES, end - at), at)
            if len(piece) != min(_PIECE_BYTES, end - at):
                raise CorruptModelFile(f"{tensor.file.name}: {tensor.name}: the file became shorter", file=tensor.file.name, field=tensor.name)
            yield piece
            with counting:
                done += len(piece)
                report("store", done, total)

    fds: dict[Path, int] = {}
    try:
        for path in source.stamps:
            fds[path] = open_regular(path)
        pool = ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="store")
        try:
            stored: list[Blob] = list(pool.map(lambda t: blobs.put(pieces(fds[t.file], t)), source.tensors))
        finally:
            failed.set()
            pool.shutdown(wait=True, cancel_futures=True)
    finally:
        for fd in fds.values():
            os.close(fd)
    return [StoredTensor(t.name, t.dtype, t.shape, blob) for t, blob in zip(source.tensors, stored, strict=True)]


def _check_unchanged(source: SourceModel) -> None:
    """The header was checked before the data was read; both must be of the same file."""
    for path, stamp in source.stamps.items():
        fd = open_regular(path)
        try:
            if FileStamp.of(fd) != stamp:
                raise CorruptModelFile(f"{path.name}: changed while it was imported", file=path.name, field="file")
        finally:
            os.close(fd)


def sweep(catalogue: Catalogue, blobs: BlobStore, timeout_s: float = 0.0) -> tuple[int, int]:
    """Deletes what interrupted imports and removed models left; returns (blobs, bytes).

    Raises:
        Unavailable: Somebody is importing or packing; try again later.
    """
    with blobs.sweeping(timeout_s):
        num_blobs, num_bytes = blobs.sweep(catalogue.referenced_blobs())
    if num_blobs:
        log.info("weightstore.swept", num_blobs=num_blobs, num_bytes=num_bytes)
    return num_blobs, num_bytes
