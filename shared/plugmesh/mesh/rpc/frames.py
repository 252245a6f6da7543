"""The bytes of one RPC packet: what a call's two ends send each other.

A packet is a head and the sections its flags announce, in the order of the flags. One packet is one NATS message. A
whole unary call is two packets; small messages of a stream share packets.

    head      u8 version, u16 flags, u32 sequence number, u32 acknowledgement (next sequence number expected)
    OPEN      method, i64 timeout in ms (-1: none), caller, metadata           first packet of a call
    PEER      subject for the answers, instance id, incarnation                first packet of a server that takes a call
    INITIAL   metadata
    CREDIT    u32 messages, u32 bytes                                          granted to the receiver of the packet
    DATA      u32 count, then length-prefixed messages
    CLOSE     (empty)                                                          no more messages from this side
    STATUS    u8 code, details, metadata                                       the call is over
    CANCEL    reason                                                           the client gives the call up
    SYNC_REQUEST, SYNC_ACK, AGAIN, RESET, CHECK: see `pipe.py`

Decoding trusts nothing: every length is checked against the packet's end.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from plugmesh.errors import DataLoss

MAX_MESSAGE_BYTES = 256 << 10   # larger messages are refused at the sender
MAX_METADATA_BYTES = 32 << 10
BATCH_BYTES = 32 << 10          # small messages are packed together up to about this size

VERSION = 1
OPEN = 0x001
PEER = 0x002
INITIAL = 0x004
CREDIT = 0x008
DATA = 0x010
CLOSE = 0x020
STATUS = 0x040
CANCEL = 0x080
SYNC_REQUEST = 0x100
SYNC_ACK = 0x200
AGAIN = 0x400
RESET = 0x800
CHECK = 0x1000
KNOWN_FLAGS = 0x1FFF
UNSEQUENCED = SYNC_REQUEST | SYNC_ACK | RESET | CHECK   # their sequence number is that of the next packet to come

_HEAD = struct.Struct("<BHII")
_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_CREDIT = struct.Struct("<II")

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(slots=True)
class Packet:
    """A decoded packet; which fields mean something follows from `flags`."""

    flags: int = 0
    sequence: int = 0
    ack: int = 0
    method: str = ""
    timeout_ms: int = -1
    caller: str = ""
    metadata: Metadata = ()
    peer_subject: str = ""
    peer_instance: str = ""
    peer_incarnation: str = ""
    initial: Metadata = ()
    credit: tuple[int, int] = (0, 0)
    messages: tuple[bytes, ...] | list[bytes] = ()
    code: int = 0
    details: str = ""
    trailing: Metadata = ()
    reason: str = ""


def encode(p: Packet) -> bytes:
    """The packet's bytes. Values are ours, so out-of-range ones are a programming error (struct.error)."""
    flags = p.flags
    out = [_HEAD.pack(VERSION, flags, p.sequence, p.ack)]
    if flags & OPEN:
        out += (_text(p.method), _I64.pack(p.timeout_ms), _text(p.caller))
        _put_metadata(out, p.metadata)
    if flags & PEER:
        out += (_text(p.peer_subject), _text(p.peer_instance), _text(p.peer_incarnation))
    if flags & INITIAL:
        _put_metadata(out, p.initial)
    if flags & CREDIT:
        out.append(_CREDIT.pack(*p.credit))
    if flags & DATA:
        out.append(_U32.pack(len(p.messages)))
        for m in p.messages:
            out.append(_U32.pack(len(m)))
            out.append(m)
    if flags & STATUS:
        out.append(_U8.pack(p.code))
        out.append(_text(p.details))
        _put_metadata(out, p.trailing)
    if flags & CANCEL:
        out.append(_text(p.reason))
    return b"".join(out)


def decode(data: bytes) -> Packet:
    """Inverse of `encode`.

    Raises:
        DataLoss: The bytes are not exactly one packet of this version.
    """
    try:
        return _decode(data)
    except (struct.error, UnicodeDecodeError, ValueError) as e:
        raise DataLoss(f"malformed packet of {len(data)} bytes") from e


def _decode(data: bytes) -> Packet:
    version, flags, sequence, ack = _HEAD.unpack_from(data)
    if version != VERSION or flags & ~KNOWN_FLAGS:
        raise ValueError("version")
    p = Packet(flags, sequence, ack)
    at = _HEAD.size
    if flags & OPEN:
        p.method, at = _get_text(data, at)
        (p.timeout_ms,) = _I64.unpack_from(data, at)
        p.caller, at = _get_text(data, at + 8)
        p.metadata, at = _get_metadata(data, at)
    if flags & PEER:
        p.peer_subject, at = _get_text(data, at)
        p.peer_instance, at = _get_text(data, at)
        p.peer_incarnation, at = _get_text(data, at)
    if flags & INITIAL:
        p.initial, at = _get_metadata(data, at)
    if flags & CREDIT:
        p.credit = _CREDIT.unpack_from(data, at)
        at += _CREDIT.size
    if flags & DATA:
        (count,) = _U32.unpack_from(data, at)
        at += 4
        messages = []
        for _ in range(count):  # ends by struct.error when the count lies
            (size,) = _U32.unpack_from(data, at)
            at += 4
            end = at + size
            if end > len(data):
                raise ValueError("message length")
            messages.append(data[at:end])
            at = end
        p.messages = messages
    if flags & STATUS:
        p.code = data[at] if at < len(data) else _short()
        p.details, at = _get_text(data, at + 1)
        p.trailing, at = _get_metadata(data, at)
    if flags & CANCEL:
        p.reason, at = _get_text(data, at)
    if at != len(data):
        raise ValueError("trailing bytes")
    return p


def mark_again(data: bytes) -> bytes:
    """The same packet, marked as sent once more."""
    flags = _U16.unpack_from(data, 1)[0] | AGAIN
    return data[:1] + _U16.pack(flags) + data[3:]


def _short() -> int:
    raise ValueError("short packet")


def _text(value: str) -> bytes:
    raw = value.encode()
    return _U32.pack(len(raw)) + raw


def _get_text(data: bytes, at: int) -> tuple[str, int]:
    (size,) = _U32.unpack_from(data, at)
    at += 4
    if at + size > len(data):
        raise ValueError("text length")
    return data[at : at + size].decode(), at + size


def _put_metadata(out: list[bytes], metadata: Metadata) -> None:
    out.append(_U16.pack(len(metadata)))
    for key, value in metadata:
        is_bytes = not isinstance(value, str)
        raw = value.encode() if isinstance(value, str) else bytes(value)
        out += (_text(key), _U8.pack(is_bytes), _U32.pack(len(raw)), raw)


def _get_metadata(data: bytes, at: int) -> tuple[Metadata, int]:
    (count,) = _U16.unpack_from(data, at)
    at += 2
    if not count:
        return (), at
    pairs: list[tuple[str, str | bytes]] = []
    for _ in range(count):
        key, at = _get_text(data, at)
        (is_bytes,) = _U8.unpack_from(data, at)
        (size,) = _U32.unpack_from(data, at + 1)
        at += 5
        if at + size > len(data) or is_bytes > 1:
            raise ValueError("metadata length")
        raw = data[at : at + size]
        pairs.append((key, raw if is_bytes else raw.decode()))
        at += size
    return tuple(pairs), at


def metadata_bytes(metadata: Metadata) -> int:
    """Size that counts against `MAX_METADATA_BYTES`."""
    return sum(len(k) + len(v) for k, v in metadata)
