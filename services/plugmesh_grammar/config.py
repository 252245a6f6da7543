"""`[services.grammar]` of mesh.toml."""

from __future__ import annotations

import pathlib

import pydantic

from plugmesh.config import ServiceSettings


class Settings(ServiceSettings):
    """Limits of one grammar instance. Whatever a grammar holds, it costs its request at most these.

    `plugins` are the engines in the order in which they are tried; left out: xgrammar and llguidance, as far as they are installed.
    """

    # What is taken; checked before any process sees the grammar
    max_schema_bytes: int = pydantic.Field(192 << 10, ge=1024, le=240 << 10)  # of a grammar's source, in UTF-8; it must fit into a message over NATS
    max_schema_depth: int = pydantic.Field(64, ge=4, le=256)                # nested objects and arrays of a schema, groups of a regex or rule
    max_enum_values: int = pydantic.Field(4096, ge=1)                       # of one enum, or choices
    max_regex_chars: int = pydantic.Field(4096, ge=16)                      # of a regex, or one pattern of a schema

    # Compilation
    compile_timeout_s: float = pydantic.Field(5.0, gt=0, le=120)
    compile_workers: int = pydantic.Field(2, ge=1, le=32)                   # processes; one is kept warm, the others end after idle_worker_s
    compile_memory_bytes: int = pydantic.Field(1 << 30, ge=64 << 20)        # address space of a process above what its engines take
    max_compiled_bytes: int = pydantic.Field(16 << 20, ge=1 << 20)          # one compiled form
    max_waiting: int = pydantic.Field(64, ge=1)                             # compilations that may queue
    idle_worker_s: float = pydantic.Field(60.0, gt=0)

    # What is kept
    cache_bytes: int = pydantic.Field(256 << 20, ge=0)                      # compiled forms in memory
    refused_ttl_s: float = pydantic.Field(30.0, ge=0)                       # remember that a grammar is not valid
    database_url: str = ""                                                  # empty: SQLite below data_dir; postgresql://user@host/database
    database_password_file: pathlib.Path | None = None
    catalogue_bytes: int = pydantic.Field(1 << 30, ge=0)                    # compiled forms in the catalogue; 0: no catalogue

    # Masks
    max_streams: int = pydantic.Field(64, ge=1)                             # Masks streams at a time
    max_sequences_per_stream: int = pydantic.Field(256, ge=1)
    max_tokens_per_sequence: int = pydantic.Field(131_072, ge=1024)
    mask_timeout_s: float = pydantic.Field(2.0, gt=0, le=60)                # one step of one sequence
    max_validate_bytes: int = pydantic.Field(256 << 10, ge=1024)            # UTF-8 bytes of a text

    # Models
    max_models: int = pydantic.Field(4, ge=1, le=64)                        # vocabularies loaded at a time
    max_asset_bytes: int = pydantic.Field(128 << 20, ge=1 << 20)            # one tokenizer file
    start_timeout_s: float = pydantic.Field(60.0, gt=0, le=600)             # wait for the weightstore this long at start
    call_timeout_s: float = pydantic.Field(10.0, gt=0, le=120)              # one call to the weightstore
    alias_ttl_s: float = pydantic.Field(30.0, gt=0)                         # ask again what an alias stands for after this long
