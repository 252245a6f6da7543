"""The model that the deployment is configured for, imported at start when the catalogue lacks it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import structlog

from plugmesh import models
from plugmesh.errors import NotFound, Unavailable
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue, StoredModel
from plugmesh_weightstore.importing import AllowedRoots, import_model

log = structlog.get_logger()


def ensure_default(
    name: str, catalogue: Catalogue, blobs: BlobStore, *, cache_dir: Path, pull: bool, max_bytes: int = 0
) -> StoredModel | None:
    """Makes the configured model the default; blocks, and fetches or imports it first where it is missing.

    Args:
        name: An alias or version of the catalogue, a known name, "hf:owner/repo" or a path; empty: keep the default as it is.
        pull: Whether a missing file may be fetched.

    Raises:
        Unavailable: It must be fetched and cannot be at the moment, or may not be.
        NotFound: No such name or path.
        CorruptModelFile: The file cannot be imported.
    """
    if not name:
        return None
    try:
        model = catalogue.find(name)
    except NotFound:
        model = _import(name, catalogue, blobs, cache_dir, pull, max_bytes)
    catalogue.set_default(model.version)
    return model


def _import(name: str, catalogue: Catalogue, blobs: BlobStore, cache_dir: Path, pull: bool, max_bytes: int) -> StoredModel:
    path = models.find(name, cache_dir)
    if path is None:
        if not pull and (name in models.KNOWN or name.startswith("hf:")):
            raise Unavailable(f"the model {name} is not on this machine, and the weightstore may not fetch it")
        log.info("weightstore.pulling", model=name)
        path = models.pull(name, cache_dir)
    key = _fingerprint(path)
    version = catalogue.noted_import(key)
    if version is not None:
        return catalogue.find(version)
    alias = name if name in models.KNOWN or name.startswith("hf:") else ""
    # Who writes the configuration may read the file; links inside a folder still must not lead out of it.
    root = path if path.is_dir() else path.parent
    model = import_model(path, catalogue, blobs, AllowedRoots([root]), alias=alias, make_default=True, max_bytes=max_bytes)
    catalogue.note_import(key, model.version)
    return model


def _fingerprint(path: Path) -> str:
    """Changes when any file of the model does; so an unchanged one is not read again at every start."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()
