"""What the service and its worker processes say to each other: a JSON object with bytes behind it. No pickle: a worker that a grammar took over
can send nothing but data."""

from __future__ import annotations

import array
import json
import struct
from typing import Any, BinaryIO

from plugmesh.errors import PlugmeshError, from_info
from plugmesh.grammar.seams import GrammarVocabulary

HEAD = struct.Struct(">II")  # bytes of the JSON object, bytes behind it


def pack(fields: dict[str, Any], data: bytes = b"") -> bytes:
    head = json.dumps(fields, separators=(",", ":")).encode()
    return HEAD.pack(len(head), len(data)) + head + data


def read(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None at the end."""
    sizes = stream.read(HEAD.size)
    if len(sizes) < HEAD.size:
        return None
    num_head, num_data = HEAD.unpack(sizes)
    return json.loads(stream.read(num_head)), stream.read(num_data)


def pack_vocabulary(vocabulary: GrammarVocabulary) -> bytes:
    """The message that teaches a worker a vocabulary, but for its `encode`."""
    lengths = array.array("i", (-1 if piece is None else len(piece) for piece in vocabulary.token_bytes))
    fields = {
        "op": "vocabulary", "hash": vocabulary.tokenizer_hash, "num_tokens": len(lengths), "vocab_size": vocabulary.vocab_size,
        "special_ids": sorted(vocabulary.special_ids), "eos_token_ids": list(vocabulary.eos_token_ids),
    }
    return pack(fields, lengths.tobytes() + b"".join(piece or b"" for piece in vocabulary.token_bytes))


def unpack_vocabulary(fields: dict[str, Any], data: bytes) -> GrammarVocabulary:
    lengths = array.array("i")
    at = 4 * fields["num_tokens"]
    lengths.frombytes(data[:at])
    pieces: list[bytes | None] = []
    for length in lengths:
        pieces.append(None if length < 0 else data[at : at + length])
        at += max(length, 0)
    return GrammarVocabulary(
        token_bytes=tuple(pieces), vocab_size=fields["vocab_size"], special_ids=frozenset(fields["special_ids"]),
        eos_token_ids=tuple(fields["eos_token_ids"]), tokenizer_hash=fields["hash"])


def error_fields(e: PlugmeshError) -> dict[str, Any]:
    return {"code": e.code, "message": e.message, "param": e.param, "fields": {k: str(v) for k, v in e.fields.items()}}


def error_of(fields: dict[str, Any]) -> PlugmeshError:
    return from_info(fields["code"], fields["message"], fields.get("param", ""), 0.0, fields.get("fields", {}))
