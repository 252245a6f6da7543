"""`[services.tokenizer]` of mesh.toml."""

from __future__ import annotations

import pydantic

from plugmesh.config import ServiceSettings


class Settings(ServiceSettings):
    """Limits of one tokenizer instance. Whatever a caller sends, memory and time stay below these."""

    # Models
    max_models: int = pydantic.Field(8, ge=1, le=256)                  # loaded at a time; the least recently used goes
    max_asset_bytes: int = pydantic.Field(128 << 20, ge=1 << 20)       # one tokenizer file
    start_timeout_s: float = pydantic.Field(60.0, gt=0, le=600)        # wait for the weightstore this long at start
    call_timeout_s: float = pydantic.Field(10.0, gt=0, le=120)         # one call to the weightstore
    alias_ttl_s: float = pydantic.Field(30.0, gt=0)                    # ask again what an alias stands for after this long

    # Text to ids
    max_text_bytes: int = pydantic.Field(4 << 20, ge=1024)             # UTF-8 bytes of one Encode, or of all messages of a chat
    max_messages: int = pydantic.Field(2048, ge=1)
    max_json_depth: int = pydantic.Field(64, ge=4, le=200)             # tools_json, template_kwargs_json, extra_json
    encode_threads: int = pydantic.Field(2, ge=1, le=64)
    inline_chars: int = pydantic.Field(4096, ge=0)                     # shorter texts are encoded on the event loop
    max_waiting: int = pydantic.Field(256, ge=1)                       # encodes and renders that may queue

    # Chat templates
    render_workers: int = pydantic.Field(2, ge=1, le=32)
    render_timeout_s: float = pydantic.Field(2.0, gt=0, le=60)
    render_memory_bytes: int = pydantic.Field(512 << 20, ge=128 << 20)  # address space of a render worker
    max_rendered_chars: int = pydantic.Field(8 << 20, ge=1024)
    max_template_chars: int = pydantic.Field(256 << 10, ge=1024)

    # Ids to text
    max_streams: int = pydantic.Field(256, ge=1)                       # Detokenize streams at a time
    max_sequences_per_stream: int = pydantic.Field(1024, ge=1)
    max_stop_strings: int = pydantic.Field(16, ge=0, le=64)
    max_stop_chars: int = pydantic.Field(256, ge=1, le=4096)           # of one stop string; also bounds the text held back
    max_tokens_per_call: int = pydantic.Field(262144, ge=1024)         # in one Decode, one frame, or one replay
