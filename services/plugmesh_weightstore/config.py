"""`[services.weightstore]` of mesh.toml."""

from __future__ import annotations

import pathlib

import pydantic

from plugmesh.config import ServiceSettings


class Settings(ServiceSettings):
    """Instances that share a database must share `store_dir` too: the catalogue speaks of its blobs."""

    # Empty: SQLite in store_dir. PostgreSQL: postgresql://user@host/database, with the password in its own file.
    database_url: str = ""
    database_password_file: pathlib.Path | None = None
    database_timeout_s: float = pydantic.Field(60.0, gt=0, le=600)   # wait for the database at start this long
    store_dir: pathlib.Path | None = None                            # blobs; default: `weights` below the mesh's data_dir
    # Import reads below these, besides `models` below cache_dir and data_dir and the configured model itself.
    allowed_roots: tuple[pathlib.Path, ...] = ()
    max_model_bytes: int = pydantic.Field(1 << 40, ge=1)             # tensors of one model
    pull: bool = True                                                # fetch the configured model when it is not on this machine
    max_imports: int = pydantic.Field(2, ge=1, le=16)                # at the same time; more are refused
    max_calls: int = pydantic.Field(256, ge=1, le=4096)              # waiting or running, other than imports and reads
    max_readers: int = pydantic.Field(64, ge=1, le=1024)             # ReadBlob streams at the same time
    max_published_versions: int = pydantic.Field(3, ge=1, le=1000)   # of one alias; older ones go unless somebody uses them
    publish_idle_s: float = pydantic.Field(30.0, gt=0, le=600)       # a publisher that sends nothing for so long is given up
    inline_asset_bytes: int = pydantic.Field(64 << 10, ge=0, le=96 << 10)  # larger assets go by path or ReadBlob
