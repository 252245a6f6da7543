"""`[services.rollout]` of mesh.toml."""

from __future__ import annotations

import pathlib
from typing import Literal

import pydantic

from plugmesh.config import ServiceSettings

MIB = 1 << 20


class Settings(ServiceSettings):
    """A mesh has one experience table or none; it starts only where `replicas = 1` asks for it."""

    replicas: int = pydantic.Field(0, ge=0, le=1)
    # What an answer waits for: "commit" (on disk), "batch" (with the operating system: survives kill -9, not a power cut), "none" (memory only).
    durability: Literal["commit", "batch", "none"] = "commit"
    ledger_dir: pathlib.Path | None = None     # default: `rollout` below the mesh's data_dir
    segment_bytes: int = pydantic.Field(64 * MIB, ge=1 << 16, le=1 << 40)  # of the files that hold values
    memory_bytes: int = pydantic.Field(2048 * MIB, ge=1 << 16, le=1 << 44)  # sum of all topics' capacity_bytes at most
    waiting_bytes: int = pydantic.Field(64 * MIB, ge=1 << 16, le=1 << 40)   # of calls that wait for room
    shared_bytes: int = pydantic.Field(256 * MIB, ge=0, le=1 << 40)         # of memory that callers on the same host move values through; 0: none
    max_topics: int = pydantic.Field(256, ge=1, le=65536)
    max_waiting: int = pydantic.Field(1024, ge=1, le=65536)                 # calls that wait, per topic and kind
    max_wait_s: float = pydantic.Field(60.0, gt=0, le=3600)                 # longest wait_s of a call; clients ask again
    sweep_s: float = pydantic.Field(0.1, gt=0.001, le=60)                   # how often leases are looked at
