from plugmesh_proto.v1 import common_pb2 as _common_pb2
from plugmesh_proto.v1 import grammar_pb2 as _grammar_pb2
from plugmesh_proto.v1 import kvstore_pb2 as _kvstore_pb2
from plugmesh_proto.v1 import prefill_pb2 as _prefill_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "token_ids", "sampling", "priority", "deadline_unix_s", "prefill_mode", "resume", "no_prefix_cache", "trace", "prefill_instance", "fork", "hold", "max_total_tokens", "grammar")
    class PrefillMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PREFILL_AUTO: _ClassVar[GenerateRequest.PrefillMode]
        PREFILL_LOCAL: _ClassVar[GenerateRequest.PrefillMode]
        PREFILL_REMOTE: _ClassVar[GenerateRequest.PrefillMode]
    PREFILL_AUTO: GenerateRequest.PrefillMode
    PREFILL_LOCAL: GenerateRequest.PrefillMode
    PREFILL_REMOTE: GenerateRequest.PrefillMode
    class TraceEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MODE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    NO_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    MAX_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    priority: int
    deadline_unix_s: float
    prefill_mode: GenerateRequest.PrefillMode
    resume: _containers.RepeatedCompositeFieldContainer[GeneratedPrefix]
    no_prefix_cache: bool
    trace: _containers.ScalarMap[str, str]
    prefill_instance: str
    fork: ForkPoint
    hold: bool
    max_total_tokens: int
    grammar: GrammarUse
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_unix_s: _Optional[float] = ..., prefill_mode: _Optional[_Union[GenerateRequest.PrefillMode, str]] = ..., resume: _Optional[_Iterable[_Union[GeneratedPrefix, _Mapping]]] = ..., no_prefix_cache: _Optional[bool] = ..., trace: _Optional[_Mapping[str, str]] = ..., prefill_instance: _Optional[str] = ..., fork: _Optional[_Union[ForkPoint, _Mapping]] = ..., hold: _Optional[bool] = ..., max_total_tokens: _Optional[int] = ..., grammar: _Optional[_Union[GrammarUse, _Mapping]] = ...) -> None: ...

class GrammarUse(_message.Message):
    __slots__ = ("key", "spec")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    key: str
    spec: _grammar_pb2.GrammarSpec
    def __init__(self, key: _Optional[str] = ..., spec: _Optional[_Union[_grammar_pb2.GrammarSpec, _Mapping]] = ...) -> None: ...

class ForkPoint(_message.Message):
    __slots__ = ("request_id", "sequence", "num_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    sequence: int
    num_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., sequence: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class TokenList(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("request_id", "model", "token_ids", "continuations", "top_logprobs", "priority", "deadline_unix_s", "no_prefix_cache", "fork")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NO_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    continuations: _containers.RepeatedCompositeFieldContainer[TokenList]
    top_logprobs: int
    priority: int
    deadline_unix_s: float
    no_prefix_cache: bool
    fork: ForkPoint
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., continuations: _Optional[_Iterable[_Union[TokenList, _Mapping]]] = ..., top_logprobs: _Optional[int] = ..., priority: _Optional[int] = ..., deadline_unix_s: _Optional[float] = ..., no_prefix_cache: _Optional[bool] = ..., fork: _Optional[_Union[ForkPoint, _Mapping]] = ...) -> None: ...

class TapRequest(_message.Message):
    __slots__ = ("request_id", "model", "token_ids", "layers", "positions", "priority", "deadline_unix_s", "fork")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    priority: int
    deadline_unix_s: float
    fork: ForkPoint
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., layers: _Optional[_Iterable[int]] = ..., positions: _Optional[_Iterable[int]] = ..., priority: _Optional[int] = ..., deadline_unix_s: _Optional[float] = ..., fork: _Optional[_Union[ForkPoint, _Mapping]] = ...) -> None: ...

class TapFrame(_message.Message):
    __slots__ = ("layer", "positions", "values", "hidden_size")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    values: bytes
    hidden_size: int
    def __init__(self, layer: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., values: _Optional[bytes] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class ReleaseHoldRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ReleaseHoldReply(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: bool
    def __init__(self, released: _Optional[bool] = ...) -> None: ...

class GeneratedPrefix(_message.Message):
    __slots__ = ("sequence", "token_ids", "finished")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    def __init__(self, sequence: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[bool] = ...) -> None: ...

class DecodeCommand(_message.Message):
    __slots__ = ("submit", "cancel", "release")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    submit: GenerateRequest
    cancel: CancelRequest
    release: ReleaseHoldRequest
    def __init__(self, submit: _Optional[_Union[GenerateRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., release: _Optional[_Union[ReleaseHoldRequest, _Mapping]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id", "sequence", "one_sequence")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ONE_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    sequence: int
    one_sequence: bool
    def __init__(self, request_id: _Optional[str] = ..., sequence: _Optional[int] = ..., one_sequence: _Optional[bool] = ...) -> None: ...

class TokenFrame(_message.Message):
    __slots__ = ("step", "rows")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    step: int
    rows: _containers.RepeatedCompositeFieldContainer[TokenRow]
    def __init__(self, step: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[TokenRow, _Mapping]]] = ...) -> None: ...

class TokenRow(_message.Message):
    __slots__ = ("request_id", "sequence", "index", "tokens", "finish_reason", "error", "request_done", "usage", "prefill", "weight_version", "weight_epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REQUEST_DONE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    sequence: int
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenInfo]
    finish_reason: _common_pb2.FinishReason
    error: _common_pb2.ErrorInfo
    request_done: bool
    usage: _common_pb2.Usage
    prefill: str
    weight_version: str
    weight_epoch: int
    def __init__(self, request_id: _Optional[str] = ..., sequence: _Optional[int] = ..., index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_common_pb2.TokenInfo, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error: _Optional[_Union[_common_pb2.ErrorInfo, _Mapping]] = ..., request_done: _Optional[bool] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., prefill: _Optional[str] = ..., weight_version: _Optional[str] = ..., weight_epoch: _Optional[int] = ...) -> None: ...

class ReportPrefillReply(_message.Message):
    __slots__ = ("still_wanted",)
    STILL_WANTED_FIELD_NUMBER: _ClassVar[int]
    still_wanted: bool
    def __init__(self, still_wanted: _Optional[bool] = ...) -> None: ...

class SwapWeightsRequest(_message.Message):
    __slots__ = ("version", "mode", "timeout_s")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FINISH: _ClassVar[SwapWeightsRequest.Mode]
        CONTINUE: _ClassVar[SwapWeightsRequest.Mode]
        ABORT: _ClassVar[SwapWeightsRequest.Mode]
    FINISH: SwapWeightsRequest.Mode
    CONTINUE: SwapWeightsRequest.Mode
    ABORT: SwapWeightsRequest.Mode
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    version: str
    mode: SwapWeightsRequest.Mode
    timeout_s: float
    def __init__(self, version: _Optional[str] = ..., mode: _Optional[_Union[SwapWeightsRequest.Mode, str]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class SwapWeightsReply(_message.Message):
    __slots__ = ("old_version", "new_version", "pause_ms", "num_running", "num_restarted", "weight_epoch", "load_ms", "num_bytes")
    OLD_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEW_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAUSE_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTARTED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOAD_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    old_version: str
    new_version: str
    pause_ms: float
    num_running: int
    num_restarted: int
    weight_epoch: int
    load_ms: float
    num_bytes: int
    def __init__(self, old_version: _Optional[str] = ..., new_version: _Optional[str] = ..., pause_ms: _Optional[float] = ..., num_running: _Optional[int] = ..., num_restarted: _Optional[int] = ..., weight_epoch: _Optional[int] = ..., load_ms: _Optional[float] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class DecodeStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeStatus(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_pending_tokens", "kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "kv_blocks_leaked", "num_steps", "num_tokens_generated", "weight_version", "model", "max_model_len", "layout", "weight_epoch")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_LEAKED_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_GENERATED_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_pending_tokens: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    kv_blocks_leaked: int
    num_steps: int
    num_tokens_generated: int
    weight_version: str
    model: str
    max_model_len: int
    layout: _common_pb2.KvLayout
    weight_epoch: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_pending_tokens: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_leaked: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens_generated: _Optional[int] = ..., weight_version: _Optional[str] = ..., model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., weight_epoch: _Optional[int] = ...) -> None: ...
