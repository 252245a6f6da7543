"""The compiled form that engines share: a header that says whose it is, and a check of every byte.

    "PMGR", version (u8), length of the header (u32 LE), header (JSON: engine, engine version, tokenizer hash, length of the content), sha256 of
    everything but itself, content (zlib)

Libraries that read compiled grammars trust what they read. The check is against damage and mix-ups, not against a forger: whoever can write to
the mesh's catalogue can write a form with the right sum.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib

from plugmesh.errors import DataLoss

_HEAD = struct.Struct("<4sBI")
_MAGIC, _VERSION = b"PMGR", 1
_SUM = 32
MAX_CONTENT = 1 << 30


def pack(engine: str, engine_version: str, tokenizer_hash: str, content: bytes) -> bytes:
    """Equal for equal input."""
    header = json.dumps([engine, engine_version, tokenizer_hash, len(content)], separators=(",", ":")).encode()
    start = _HEAD.pack(_MAGIC, _VERSION, len(header)) + header
    body = zlib.compress(content, 1)
    return start + hashlib.sha256(start + body).digest() + body


def unpack(form: bytes, engine: str, engine_version: str, tokenizer_hash: str) -> bytes:
    """The content.

    Raises:
        DataLoss: Damaged, or of another engine, version or tokenizer.
    """
    if len(form) < _HEAD.size:
        raise DataLoss(f"a compiled grammar of {len(form)} bytes is too short")
    magic, version, num_header = _HEAD.unpack_from(form)
    at = _HEAD.size + num_header
    if (magic, version) != (_MAGIC, _VERSION) or num_header > 4096 or len(form) < at + _SUM:
        raise DataLoss("these bytes are no compiled grammar, or of another version")
    start, found, body = form[:at], form[at : at + _SUM], form[at + _SUM :]
    if hashlib.sha256(start + body).digest() != found:
        raise DataLoss("a compiled grammar is damaged: its checksum differs")
    try:
        *owner, num_content = json.loads(start[_HEAD.size :])
    except (ValueError, TypeError) as e:
        raise DataLoss("a compiled grammar's header cannot be read") from e
    for what, is_, wanted in zip(("engine", "version", "tokenizer"), owner, (engine, engine_version, tokenizer_hash), strict=False):
        if is_ != wanted:
            raise DataLoss(f"a compiled grammar is for {what} {str(is_)[:80]!r}, not {wanted!r}")
    if len(owner) != 3 or not isinstance(num_content, int) or not 0 <= num_content <= MAX_CONTENT:
        raise DataLoss("a compiled grammar's header cannot be read")
    try:
        inflate = zlib.decompressobj()
        content = inflate.decompress(body, num_content + 1)
    except zlib.error as e:
        raise DataLoss("a compiled grammar cannot be unpacked") from e
    if len(content) != num_content or not inflate.eof or inflate.unused_data:
        raise DataLoss("a compiled grammar has another length than its header says")
    return content
