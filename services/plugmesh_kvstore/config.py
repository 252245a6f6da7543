"""`[services.kvstore]` of mesh.toml."""

from __future__ import annotations

import pathlib

import pydantic

from plugmesh.config import ServiceSettings

MIB = 1 << 20


class Settings(ServiceSettings):
    """Sizes are caps, not reservations: the arena and the segments are sparse files."""

    arena_bytes: int = pydantic.Field(256 * MIB, ge=1, le=1 << 44)
    arena_dir: pathlib.Path | None = None      # default: a private folder in /dev/shm, else in the runtime folder
    max_layouts: int = pydantic.Field(4, ge=1, le=64)  # layouts that have an arena at the same time
    disk_bytes: int = pydantic.Field(1024 * MIB, ge=0, le=1 << 46)  # 0: no disk tier
    disk_dir: pathlib.Path | None = None       # default: `kvstore` below the mesh's data_dir
    segment_bytes: int = pydantic.Field(64 * MIB, ge=1, le=1 << 40)
    # Blocks are copied to disk in the background once more than this share of the arena is in use; 0 copies every block.
    spill_above: float = pydantic.Field(0.5, ge=0, le=1)
    spill_batch: int = pydantic.Field(8, ge=1, le=256)  # blocks held by the background writer at a time
    lease_ttl_s: float = pydantic.Field(4.0, gt=0.05, le=3600)
    max_leases: int = pydantic.Field(1024, ge=1)
    sweep_s: float = pydantic.Field(0.5, gt=0.01, le=60)  # how often leases and guards are looked at
    verify_on_commit: bool = True
    event_buffer: int = pydantic.Field(4096, ge=16)  # events kept while the broker is away; older ones become a gap
    max_blocks_per_call: int = pydantic.Field(4096, ge=1, le=8192)
    flush_on_stop_s: float = pydantic.Field(5.0, ge=0)  # time to write blocks that only the arena has
