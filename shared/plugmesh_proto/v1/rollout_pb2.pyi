from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TopicSpec(_message.Message):
    __slots__ = ("name", "fields", "dtypes", "tasks", "group_size", "capacity_rows", "capacity_bytes", "staleness", "batch_rows", "admission_task", "keep_done", "row_bytes", "remember_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_ROWS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    BATCH_ROWS_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_TASK_FIELD_NUMBER: _ClassVar[int]
    KEEP_DONE_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    REMEMBER_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    fields: _containers.RepeatedScalarFieldContainer[str]
    dtypes: _containers.RepeatedScalarFieldContainer[str]
    tasks: _containers.RepeatedScalarFieldContainer[str]
    group_size: int
    capacity_rows: int
    capacity_bytes: int
    staleness: int
    batch_rows: int
    admission_task: str
    keep_done: bool
    row_bytes: int
    remember_rows: int
    def __init__(self, name: _Optional[str] = ..., fields: _Optional[_Iterable[str]] = ..., dtypes: _Optional[_Iterable[str]] = ..., tasks: _Optional[_Iterable[str]] = ..., group_size: _Optional[int] = ..., capacity_rows: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., staleness: _Optional[int] = ..., batch_rows: _Optional[int] = ..., admission_task: _Optional[str] = ..., keep_done: _Optional[bool] = ..., row_bytes: _Optional[int] = ..., remember_rows: _Optional[int] = ...) -> None: ...

class CreateTopicReply(_message.Message):
    __slots__ = ("created",)
    CREATED_FIELD_NUMBER: _ClassVar[int]
    created: bool
    def __init__(self, created: _Optional[bool] = ...) -> None: ...

class DropTopicRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class DropTopicReply(_message.Message):
    __slots__ = ("dropped",)
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    dropped: bool
    def __init__(self, dropped: _Optional[bool] = ...) -> None: ...

class TableRow(_message.Message):
    __slots__ = ("id", "group", "version", "cells", "index", "spans")
    ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CELLS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    id: str
    group: str
    version: int
    cells: _containers.RepeatedScalarFieldContainer[bytes]
    index: int
    spans: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[str] = ..., group: _Optional[str] = ..., version: _Optional[int] = ..., cells: _Optional[_Iterable[bytes]] = ..., index: _Optional[int] = ..., spans: _Optional[_Iterable[int]] = ...) -> None: ...

class ShareRequest(_message.Message):
    __slots__ = ("boot_id", "num_bytes")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    boot_id: str
    num_bytes: int
    def __init__(self, boot_id: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class ShareReply(_message.Message):
    __slots__ = ("area", "path", "num_bytes", "nonce")
    AREA_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    area: str
    path: str
    num_bytes: int
    nonce: bytes
    def __init__(self, area: _Optional[str] = ..., path: _Optional[str] = ..., num_bytes: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("topic", "fields", "rows", "keep_existing", "wait_s", "area")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    KEEP_EXISTING_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    topic: str
    fields: _containers.RepeatedScalarFieldContainer[str]
    rows: _containers.RepeatedCompositeFieldContainer[TableRow]
    keep_existing: bool
    wait_s: float
    area: str
    def __init__(self, topic: _Optional[str] = ..., fields: _Optional[_Iterable[str]] = ..., rows: _Optional[_Iterable[_Union[TableRow, _Mapping]]] = ..., keep_existing: _Optional[bool] = ..., wait_s: _Optional[float] = ..., area: _Optional[str] = ...) -> None: ...

class PutReply(_message.Message):
    __slots__ = ("indexes",)
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indexes: _Optional[_Iterable[int]] = ...) -> None: ...

class PutFieldsRequest(_message.Message):
    __slots__ = ("topic", "fields", "rows", "lease_id", "task", "wait_s", "area")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    topic: str
    fields: _containers.RepeatedScalarFieldContainer[str]
    rows: _containers.RepeatedCompositeFieldContainer[TableRow]
    lease_id: str
    task: str
    wait_s: float
    area: str
    def __init__(self, topic: _Optional[str] = ..., fields: _Optional[_Iterable[str]] = ..., rows: _Optional[_Iterable[_Union[TableRow, _Mapping]]] = ..., lease_id: _Optional[str] = ..., task: _Optional[str] = ..., wait_s: _Optional[float] = ..., area: _Optional[str] = ...) -> None: ...

class PutFieldsReply(_message.Message):
    __slots__ = ("num_changed",)
    NUM_CHANGED_FIELD_NUMBER: _ClassVar[int]
    num_changed: int
    def __init__(self, num_changed: _Optional[int] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("topic", "task", "fields", "batch_size", "min_rows", "partial", "sampler", "sampler_options", "latest_version", "any_version", "stamp_version", "lease_id", "lease_s", "wait_s", "rank", "num_ranks", "batch_index", "area", "area_offset", "area_bytes")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MIN_ROWS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAMPLER_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    ANY_VERSION_FIELD_NUMBER: _ClassVar[int]
    STAMP_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    BATCH_INDEX_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    AREA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    AREA_BYTES_FIELD_NUMBER: _ClassVar[int]
    topic: str
    task: str
    fields: _containers.RepeatedScalarFieldContainer[str]
    batch_size: int
    min_rows: int
    partial: bool
    sampler: str
    sampler_options: str
    latest_version: int
    any_version: bool
    stamp_version: int
    lease_id: str
    lease_s: float
    wait_s: float
    rank: int
    num_ranks: int
    batch_index: int
    area: str
    area_offset: int
    area_bytes: int
    def __init__(self, topic: _Optional[str] = ..., task: _Optional[str] = ..., fields: _Optional[_Iterable[str]] = ..., batch_size: _Optional[int] = ..., min_rows: _Optional[int] = ..., partial: _Optional[bool] = ..., sampler: _Optional[str] = ..., sampler_options: _Optional[str] = ..., latest_version: _Optional[int] = ..., any_version: _Optional[bool] = ..., stamp_version: _Optional[int] = ..., lease_id: _Optional[str] = ..., lease_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., rank: _Optional[int] = ..., num_ranks: _Optional[int] = ..., batch_index: _Optional[int] = ..., area: _Optional[str] = ..., area_offset: _Optional[int] = ..., area_bytes: _Optional[int] = ...) -> None: ...

class GetReply(_message.Message):
    __slots__ = ("rows", "num_more", "latest_version")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_MORE_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[TableRow]
    num_more: int
    latest_version: int
    def __init__(self, rows: _Optional[_Iterable[_Union[TableRow, _Mapping]]] = ..., num_more: _Optional[int] = ..., latest_version: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("topic", "lease_id", "skip")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    topic: str
    lease_id: str
    skip: int
    def __init__(self, topic: _Optional[str] = ..., lease_id: _Optional[str] = ..., skip: _Optional[int] = ...) -> None: ...

class AckRequest(_message.Message):
    __slots__ = ("topic", "task", "lease_id", "indexes")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    topic: str
    task: str
    lease_id: str
    indexes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, topic: _Optional[str] = ..., task: _Optional[str] = ..., lease_id: _Optional[str] = ..., indexes: _Optional[_Iterable[int]] = ...) -> None: ...

class AckReply(_message.Message):
    __slots__ = ("num_done",)
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    num_done: int
    def __init__(self, num_done: _Optional[int] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("topic", "lease_id", "lease_s")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    topic: str
    lease_id: str
    lease_s: float
    def __init__(self, topic: _Optional[str] = ..., lease_id: _Optional[str] = ..., lease_s: _Optional[float] = ...) -> None: ...

class ExtendReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReleaseRowsRequest(_message.Message):
    __slots__ = ("topic", "lease_id")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    topic: str
    lease_id: str
    def __init__(self, topic: _Optional[str] = ..., lease_id: _Optional[str] = ...) -> None: ...

class ReleaseRowsReply(_message.Message):
    __slots__ = ("num_released",)
    NUM_RELEASED_FIELD_NUMBER: _ClassVar[int]
    num_released: int
    def __init__(self, num_released: _Optional[int] = ...) -> None: ...

class ClearRowsRequest(_message.Message):
    __slots__ = ("topic", "indexes", "older_than")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    OLDER_THAN_FIELD_NUMBER: _ClassVar[int]
    topic: str
    indexes: _containers.RepeatedScalarFieldContainer[int]
    older_than: int
    def __init__(self, topic: _Optional[str] = ..., indexes: _Optional[_Iterable[int]] = ..., older_than: _Optional[int] = ...) -> None: ...

class ClearRowsReply(_message.Message):
    __slots__ = ("num_cleared",)
    NUM_CLEARED_FIELD_NUMBER: _ClassVar[int]
    num_cleared: int
    def __init__(self, num_cleared: _Optional[int] = ...) -> None: ...

class PublishVersionRequest(_message.Message):
    __slots__ = ("topic", "version")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    topic: str
    version: int
    def __init__(self, topic: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class PublishVersionReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TableStatusRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class TableStatus(_message.Message):
    __slots__ = ("topics", "durability")
    TOPICS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    topics: _containers.RepeatedCompositeFieldContainer[TopicStatus]
    durability: str
    def __init__(self, topics: _Optional[_Iterable[_Union[TopicStatus, _Mapping]]] = ..., durability: _Optional[str] = ...) -> None: ...

class TopicStatus(_message.Message):
    __slots__ = ("spec", "num_rows", "num_bytes", "num_put", "num_in_flight", "num_leases", "num_stale", "latest_version", "versions", "tasks", "num_waiting_puts", "num_waiting_gets")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class TasksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: TaskStatus
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[TaskStatus, _Mapping]] = ...) -> None: ...
    SPEC_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_PUT_FIELD_NUMBER: _ClassVar[int]
    NUM_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    NUM_STALE_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_PUTS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_GETS_FIELD_NUMBER: _ClassVar[int]
    spec: TopicSpec
    num_rows: int
    num_bytes: int
    num_put: int
    num_in_flight: int
    num_leases: int
    num_stale: int
    latest_version: int
    versions: _containers.ScalarMap[int, int]
    tasks: _containers.MessageMap[str, TaskStatus]
    num_waiting_puts: int
    num_waiting_gets: int
    def __init__(self, spec: _Optional[_Union[TopicSpec, _Mapping]] = ..., num_rows: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_put: _Optional[int] = ..., num_in_flight: _Optional[int] = ..., num_leases: _Optional[int] = ..., num_stale: _Optional[int] = ..., latest_version: _Optional[int] = ..., versions: _Optional[_Mapping[int, int]] = ..., tasks: _Optional[_Mapping[str, TaskStatus]] = ..., num_waiting_puts: _Optional[int] = ..., num_waiting_gets: _Optional[int] = ...) -> None: ...

class TaskStatus(_message.Message):
    __slots__ = ("num_free", "num_held", "num_done", "num_ready", "lags")
    class NumReadyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_FIELD_NUMBER: _ClassVar[int]
    LAGS_FIELD_NUMBER: _ClassVar[int]
    num_free: int
    num_held: int
    num_done: int
    num_ready: _containers.ScalarMap[str, int]
    lags: _containers.ScalarMap[int, int]
    def __init__(self, num_free: _Optional[int] = ..., num_held: _Optional[int] = ..., num_done: _Optional[int] = ..., num_ready: _Optional[_Mapping[str, int]] = ..., lags: _Optional[_Mapping[int, int]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("topic",)
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    topic: str
    def __init__(self, topic: _Optional[str] = ...) -> None: ...

class TableEvent(_message.Message):
    __slots__ = ("topic", "sequence", "num_rows", "num_ready", "latest_version")
    class NumReadyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_READY_FIELD_NUMBER: _ClassVar[int]
    LATEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    topic: str
    sequence: int
    num_rows: int
    num_ready: _containers.ScalarMap[str, int]
    latest_version: int
    def __init__(self, topic: _Optional[str] = ..., sequence: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_ready: _Optional[_Mapping[str, int]] = ..., latest_version: _Optional[int] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointReply(_message.Message):
    __slots__ = ("num_topics",)
    NUM_TOPICS_FIELD_NUMBER: _ClassVar[int]
    num_topics: int
    def __init__(self, num_topics: _Optional[int] = ...) -> None: ...
