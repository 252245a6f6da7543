"""A KV block as a train of messages of at most 1 MiB, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from plugmesh.errors import DataLoss, InvalidRequest
from plugmesh_proto.v1 import kvstore_pb2 as pb

PIECE_BYTES = 1 << 20
BLOCK_ID_BYTES = 32


def checksum(data: bytes | bytearray | memoryview) -> int:
    """xxh3_64 of the bytes: what every checksum of a block in this mesh is."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True, slots=True)
class WholeBlock:
    """A block that arrived complete and whose checksum was verified."""

    block_id: bytes
    parent_id: bytes
    num_tokens: int
    data: bytearray
    checksum: int


def split(
    block_id: bytes, parent_id: bytes, num_tokens: int, data: memoryview, digest: int, *, lease_id: str = ""
) -> Iterator[pb.BlockPiece]:
    """The pieces of one block in order; the facts travel on the first, the checksum on the last."""
    total = len(data)
    for offset in range(0, total, PIECE_BYTES):
        end = min(offset + PIECE_BYTES, total)
        piece = pb.BlockPiece(block_id=block_id, offset=offset, data=bytes(data[offset:end]), is_last=end == total)
        if offset == 0:
            piece.lease_id, piece.parent_id = lease_id, parent_id
            piece.num_tokens, piece.num_bytes = num_tokens, total
        if end == total:
            piece.checksum = digest
        yield piece


class Assembler:
    """Puts the pieces of one stream together, one block at a time; holds at most one block's bytes.

    Args:
        max_block_bytes: Larger blocks are refused before anything is allocated.
    """

    def __init__(self, max_block_bytes: int) -> None:
        self._max = max_block_bytes
        self._head: pb.BlockPiece | None = None
        self._data = bytearray()
        self._filled = 0

    def add(self, piece: pb.BlockPiece) -> WholeBlock | None:
        """The block that this piece completes, else None.

        Raises:
            InvalidRequest: Wrong id length, size out of range, too large a piece.
            DataLoss: Pieces out of order or of another block, or the checksum does not fit.
        """
        if len(piece.data) > PIECE_BYTES:
            raise InvalidRequest(f"a piece holds {len(piece.data)} bytes, more than {PIECE_BYTES}", param="data")
        if self._head is None:
            if len(piece.block_id) != BLOCK_ID_BYTES:
                raise InvalidRequest(f"a block id has {BLOCK_ID_BYTES} bytes, got {len(piece.block_id)}", param="block_id")
            if not 0 < piece.num_bytes <= self._max:
                raise InvalidRequest(f"a block of {piece.num_bytes} bytes; 1 to {self._max} are allowed", param="num_bytes")
            self._head, self._data, self._filled = piece, bytearray(piece.num_bytes), 0
        head = self._head
        end = self._filled + len(piece.data)
        if piece.block_id != head.block_id or piece.offset != self._filled or end > head.num_bytes or not piece.data:
            self._head = None
            raise DataLoss(f"a piece at {piece.offset} does not continue the block at {self._filled}")
        self._data[self._filled : end] = piece.data
        self._filled = end
        if not piece.is_last:
            return None
        self._head = None
        if end != head.num_bytes:
            raise DataLoss(f"a block ended after {end} of {head.num_bytes} bytes")
        digest = checksum(self._data)
        if digest != piece.checksum:
            raise DataLoss("a block's checksum does not fit its bytes", want=f"{piece.checksum:016x}", got=f"{digest:016x}")
        return WholeBlock(head.block_id, head.parent_id, head.num_tokens, self._data, digest)

    @property
    def in_middle(self) -> bool:
        """Whether a block has begun and not ended."""
        return self._head is not None
