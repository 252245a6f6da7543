"""Blocks as trains of pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.errors import DataLoss, InvalidRequest
from plugmesh.kv.pieces import PIECE_BYTES, Assembler, checksum, split
from plugmesh_proto.v1 import kvstore_pb2 as pb

ID, PARENT = b"i" * 32, b"p" * 32
LIMIT = 3 * PIECE_BYTES


def train(data, block_id=ID):
    return list(split(block_id, PARENT, 7, memoryview(data), checksum(data), lease_id="l"))


def feed(pieces):
    assembler = Assembler(LIMIT)
    done = [whole for piece in pieces if (whole := assembler.add(pb.BlockPiece.FromString(piece.SerializeToString())))]
    assert not assembler.in_middle
    return done


@given(st.lists(st.tuples(st.sampled_from([1, 2, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, LIMIT]), st.integers(0, 255)), max_size=4))
def test_blocks_arrive_as_they_were_split(blocks):
    sent = [(bytes([i]) * 32, bytes([fill]) * size) for i, (size, fill) in enumerate(blocks)]
    arrived = feed([piece for block_id, data in sent for piece in train(data, block_id)])

    assert [(w.block_id, bytes(w.data)) for w in arrived] == sent
    assert all((w.parent_id, w.num_tokens, w.checksum) == (PARENT, 7, checksum(w.data)) for w in arrived)


@given(st.data())
def test_a_train_with_any_one_defect_is_refused(data):
    """Lost, doubled, swapped, altered, cut: never a wrong block."""
    body = bytes(range(256)) * (2 * PIECE_BYTES // 256) + b"tail"
    pieces = train(body)
    defect = data.draw(st.sampled_from(["lose", "double", "swap", "flip", "checksum", "offset", "other_block", "early_end"]))
    i = data.draw(st.integers(0, len(pieces) - 1))
    if defect == "lose":
        del pieces[i]
    elif defect == "double":
        pieces.insert(i, pieces[i])
    elif defect == "swap":
        j = (i + 1) % len(pieces)
        pieces[i], pieces[j] = pieces[j], pieces[i]
    elif defect == "flip":
        at = data.draw(st.integers(0, len(pieces[i].data) - 1))
        pieces[i].data = pieces[i].data[:at] + bytes([pieces[i].data[at] ^ 1]) + pieces[i].data[at + 1 :]
    elif defect == "checksum":
        pieces[-1].checksum ^= 1
    elif defect == "offset":
        pieces[i].offset += 1
    elif defect == "other_block":
        pieces[max(i, 1)].block_id = PARENT
    else:
        pieces = pieces[:-1]
        pieces[-1].is_last = True
    with pytest.raises((DataLoss, InvalidRequest, AssertionError)) as e:
        feed(pieces)

    # Losing or doubling the end shows only as a train that never ends; the caller asks `in_middle`.
    assert e.type is not AssertionError or (defect, i) in {("lose", len(pieces)), ("double", len(pieces) - 2)}


@pytest.mark.parametrize("change", [{"num_bytes": LIMIT + 1}, {"num_bytes": 0}, {"num_bytes": -1}, {"block_id": b"x"}, {"num_bytes": 1 << 62}])
def test_hostile_sizes_are_refused_before_anything_is_allocated(change):
    [piece] = train(b"abc")
    for name, value in change.items():
        setattr(piece, name, value)
    with pytest.raises(InvalidRequest):
        Assembler(LIMIT).add(piece)


def test_an_oversized_piece_is_refused():
    piece = pb.BlockPiece(block_id=ID, data=bytes(PIECE_BYTES + 1), num_bytes=LIMIT)
    with pytest.raises(InvalidRequest):
        Assembler(LIMIT).add(piece)
