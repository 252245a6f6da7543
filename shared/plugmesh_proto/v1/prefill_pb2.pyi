from plugmesh_proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillJob(_message.Message):
    __slots__ = ("job_id", "request_id", "model", "token_ids", "sampling", "layout", "deadline_unix_s", "reply_instance", "reply_incarnation", "trace", "store_instance")
    class TraceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    REPLY_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    REPLY_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    STORE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    request_id: str
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    layout: _common_pb2.KvLayout
    deadline_unix_s: float
    reply_instance: str
    reply_incarnation: str
    trace: _containers.ScalarMap[str, str]
    store_instance: str
    def __init__(self, job_id: _Optional[str] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., deadline_unix_s: _Optional[float] = ..., reply_instance: _Optional[str] = ..., reply_incarnation: _Optional[str] = ..., trace: _Optional[_Mapping[str, str]] = ..., store_instance: _Optional[str] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("job_id", "num_tokens_done", "block_ids", "done", "first_tokens", "num_cached_tokens", "store_instance", "prefill_instance", "error", "compute_ms")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_DONE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    num_tokens_done: int
    block_ids: _containers.RepeatedScalarFieldContainer[bytes]
    done: bool
    first_tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenInfo]
    num_cached_tokens: int
    store_instance: str
    prefill_instance: str
    error: _common_pb2.ErrorInfo
    compute_ms: float
    def __init__(self, job_id: _Optional[str] = ..., num_tokens_done: _Optional[int] = ..., block_ids: _Optional[_Iterable[bytes]] = ..., done: _Optional[bool] = ..., first_tokens: _Optional[_Iterable[_Union[_common_pb2.TokenInfo, _Mapping]]] = ..., num_cached_tokens: _Optional[int] = ..., store_instance: _Optional[str] = ..., prefill_instance: _Optional[str] = ..., error: _Optional[_Union[_common_pb2.ErrorInfo, _Mapping]] = ..., compute_ms: _Optional[float] = ...) -> None: ...

class PrefillStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillStatus(_message.Message):
    __slots__ = ("num_running", "num_pending_tokens", "num_jobs_done", "kv_blocks_used", "kv_blocks_total")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_JOBS_DONE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_pending_tokens: int
    num_jobs_done: int
    kv_blocks_used: int
    kv_blocks_total: int
    def __init__(self, num_running: _Optional[int] = ..., num_pending_tokens: _Optional[int] = ..., num_jobs_done: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ...) -> None: ...
