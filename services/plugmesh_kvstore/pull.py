"""Fetches blocks from another kvstore over gRPC."""

from __future__ import annotations

import grpc

from plugmesh import wire
from plugmesh.kv.pieces import Assembler
from plugmesh.mesh.api import Mesh
from plugmesh.types import InstanceInfo, KvLayout
from plugmesh_kvstore.store import BlockStore
from plugmesh_proto.v1 import kvstore_pb2 as pb
from plugmesh_proto.v1 import kvstore_pb2_grpc

CALL_S = 5.0
STREAM_S = 120.0


async def pull_blocks(
    mesh: Mesh, peer: InstanceInfo, store: BlockStore, layout: KvLayout, block_ids: list[bytes]
) -> tuple[int, int]:
    """Copies what `peer` has of `block_ids` and this store has not; returns (blocks, bytes).

    The remote blocks are held one at a time while they are sent; every block's checksum is verified here.

    Raises:
        Unavailable, DeadlineExceeded: The peer.
        DataLoss: A block arrived damaged; those before it were stored.
    """
    partition = store.partition_with_arena(layout)
    wanted = [b for b in block_ids if b not in partition.blocks]
    if not wanted:
        return 0, 0
    me = mesh.self_info
    stub = kvstore_pb2_grpc.KvStoreStub(mesh.direct_channel(peer))
    num = num_bytes = 0
    try:
        attach = pb.AttachRequest(layout=wire.layout_to_pb(layout), holder=me.instance_id, incarnation=me.incarnation)
        lease = await stub.Attach(attach, timeout=CALL_S)
        assembler = Assembler(layout.block_bytes)
        try:
            request = pb.GetBlocksRequest(lease_id=lease.lease_id, block_ids=wanted)
            stream = stub.GetBlocks(request, timeout=STREAM_S)
            async for piece in stream:
                whole = assembler.add(piece)
                if whole is None:
                    continue
                outcome = store.insert(partition, whole.block_id, whole.parent_id, whole.num_tokens, whole.data, whole.checksum)
                if outcome == "full":
                    stream.cancel()
                    break
                num += outcome == "stored"
                num_bytes += len(whole.data) * (outcome == "stored")
        finally:
            await stub.Detach(pb.DetachRequest(lease_id=lease.lease_id), timeout=CALL_S)
    except grpc.aio.AioRpcError as e:
        raise wire.error_from_rpc(e) from e
    return num, num_bytes
