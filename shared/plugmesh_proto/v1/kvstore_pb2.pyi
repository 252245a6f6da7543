from plugmesh_proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("layout", "holder", "incarnation", "host")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    layout: _common_pb2.KvLayout
    holder: str
    incarnation: str
    host: str
    def __init__(self, layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., holder: _Optional[str] = ..., incarnation: _Optional[str] = ..., host: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("lease_id", "lease_ttl_s", "arena_path", "arena_bytes", "slot_bytes", "store_instance", "grpc_address")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    ARENA_PATH_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    lease_ttl_s: float
    arena_path: str
    arena_bytes: int
    slot_bytes: int
    store_instance: str
    grpc_address: str
    def __init__(self, lease_id: _Optional[str] = ..., lease_ttl_s: _Optional[float] = ..., arena_path: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., store_instance: _Optional[str] = ..., grpc_address: _Optional[str] = ...) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class DetachReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("lease_ttl_s",)
    LEASE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    lease_ttl_s: float
    def __init__(self, lease_ttl_s: _Optional[float] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("lease_id", "block_ids", "pin")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    pin: bool
    def __init__(self, lease_id: _Optional[str] = ..., block_ids: _Optional[_Iterable[bytes]] = ..., pin: _Optional[bool] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: _containers.RepeatedCompositeFieldContainer[BlockLocation]
    def __init__(self, found: _Optional[_Iterable[_Union[BlockLocation, _Mapping]]] = ...) -> None: ...

class BlockLocation(_message.Message):
    __slots__ = ("block_id", "slot", "checksum", "tier", "num_bytes")
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    block_id: bytes
    slot: int
    checksum: int
    tier: str
    num_bytes: int
    def __init__(self, block_id: _Optional[bytes] = ..., slot: _Optional[int] = ..., checksum: _Optional[int] = ..., tier: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_id", "block_ids")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease_id: _Optional[str] = ..., block_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ("num_released",)
    NUM_RELEASED_FIELD_NUMBER: _ClassVar[int]
    num_released: int
    def __init__(self, num_released: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("lease_id", "block_ids")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease_id: _Optional[str] = ..., block_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("lease_id", "blocks")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    blocks: _containers.RepeatedCompositeFieldContainer[CommitBlock]
    def __init__(self, lease_id: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[CommitBlock, _Mapping]]] = ...) -> None: ...

class CommitBlock(_message.Message):
    __slots__ = ("block_id", "slot", "checksum", "parent_id", "num_tokens", "num_bytes")
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    block_id: bytes
    slot: int
    checksum: int
    parent_id: bytes
    num_tokens: int
    num_bytes: int
    def __init__(self, block_id: _Optional[bytes] = ..., slot: _Optional[int] = ..., checksum: _Optional[int] = ..., parent_id: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("num_committed",)
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    num_committed: int
    def __init__(self, num_committed: _Optional[int] = ...) -> None: ...

class BlockPiece(_message.Message):
    __slots__ = ("lease_id", "block_id", "offset", "data", "checksum", "is_last", "parent_id", "num_tokens", "num_bytes")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    IS_LAST_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    block_id: bytes
    offset: int
    data: bytes
    checksum: int
    is_last: bool
    parent_id: bytes
    num_tokens: int
    num_bytes: int
    def __init__(self, lease_id: _Optional[str] = ..., block_id: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ..., is_last: _Optional[bool] = ..., parent_id: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class PutBlocksReply(_message.Message):
    __slots__ = ("num_stored", "num_known")
    NUM_STORED_FIELD_NUMBER: _ClassVar[int]
    NUM_KNOWN_FIELD_NUMBER: _ClassVar[int]
    num_stored: int
    num_known: int
    def __init__(self, num_stored: _Optional[int] = ..., num_known: _Optional[int] = ...) -> None: ...

class GetBlocksRequest(_message.Message):
    __slots__ = ("lease_id", "block_ids")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease_id: _Optional[str] = ..., block_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("from_address", "layout", "block_ids")
    FROM_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    from_address: str
    layout: _common_pb2.KvLayout
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, from_address: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., block_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("num_pulled", "num_bytes")
    NUM_PULLED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_pulled: int
    num_bytes: int
    def __init__(self, num_pulled: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class KvEvent(_message.Message):
    __slots__ = ("sequence", "store_instance", "incarnation", "kind", "block_ids", "parent_id", "tier", "model")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[KvEvent.Kind]
        STORED: _ClassVar[KvEvent.Kind]
        REMOVED: _ClassVar[KvEvent.Kind]
        CLEARED: _ClassVar[KvEvent.Kind]
    KIND_UNSPECIFIED: KvEvent.Kind
    STORED: KvEvent.Kind
    REMOVED: KvEvent.Kind
    CLEARED: KvEvent.Kind
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    store_instance: str
    incarnation: str
    kind: KvEvent.Kind
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    parent_id: bytes
    tier: str
    model: str
    def __init__(self, sequence: _Optional[int] = ..., store_instance: _Optional[str] = ..., incarnation: _Optional[str] = ..., kind: _Optional[_Union[KvEvent.Kind, str]] = ..., block_ids: _Optional[_Iterable[bytes]] = ..., parent_id: _Optional[bytes] = ..., tier: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class SnapshotPage(_message.Message):
    __slots__ = ("as_of_sequence", "incarnation", "block_ids")
    AS_OF_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    as_of_sequence: int
    incarnation: str
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, as_of_sequence: _Optional[int] = ..., incarnation: _Optional[str] = ..., block_ids: _Optional[_Iterable[bytes]] = ...) -> None: ...

class KvStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvStats(_message.Message):
    __slots__ = ("arena_bytes", "arena_used_bytes", "arena_pinned_bytes", "arena_reserved_bytes", "disk_bytes", "disk_used_bytes", "num_blocks", "num_leases", "num_hits", "num_misses", "num_corrupt", "num_evicted", "event_sequence")
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSES_FIELD_NUMBER: _ClassVar[int]
    NUM_CORRUPT_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    EVENT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    arena_bytes: int
    arena_used_bytes: int
    arena_pinned_bytes: int
    arena_reserved_bytes: int
    disk_bytes: int
    disk_used_bytes: int
    num_blocks: int
    num_leases: int
    num_hits: int
    num_misses: int
    num_corrupt: int
    num_evicted: int
    event_sequence: int
    def __init__(self, arena_bytes: _Optional[int] = ..., arena_used_bytes: _Optional[int] = ..., arena_pinned_bytes: _Optional[int] = ..., arena_reserved_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., disk_used_bytes: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_hits: _Optional[int] = ..., num_misses: _Optional[int] = ..., num_corrupt: _Optional[int] = ..., num_evicted: _Optional[int] = ..., event_sequence: _Optional[int] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClearReply(_message.Message):
    __slots__ = ("num_removed",)
    NUM_REMOVED_FIELD_NUMBER: _ClassVar[int]
    num_removed: int
    def __init__(self, num_removed: _Optional[int] = ...) -> None: ...
