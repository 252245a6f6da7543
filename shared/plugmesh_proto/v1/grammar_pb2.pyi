from plugmesh_proto.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GrammarSpec(_message.Message):
    __slots__ = ("kind", "source", "relaxed", "whitespace", "engine")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RELAXED_FIELD_NUMBER: _ClassVar[int]
    WHITESPACE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    source: str
    relaxed: bool
    whitespace: str
    engine: str
    def __init__(self, kind: _Optional[str] = ..., source: _Optional[str] = ..., relaxed: _Optional[bool] = ..., whitespace: _Optional[str] = ..., engine: _Optional[str] = ...) -> None: ...

class CompileGrammarRequest(_message.Message):
    __slots__ = ("spec", "model")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    spec: GrammarSpec
    model: str
    def __init__(self, spec: _Optional[_Union[GrammarSpec, _Mapping]] = ..., model: _Optional[str] = ...) -> None: ...

class CompiledGrammarInfo(_message.Message):
    __slots__ = ("key", "engine", "engine_version", "tokenizer_hash", "num_bytes", "was_cached", "compile_ms", "unenforced")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAS_CACHED_FIELD_NUMBER: _ClassVar[int]
    COMPILE_MS_FIELD_NUMBER: _ClassVar[int]
    UNENFORCED_FIELD_NUMBER: _ClassVar[int]
    key: str
    engine: str
    engine_version: str
    tokenizer_hash: str
    num_bytes: int
    was_cached: bool
    compile_ms: float
    unenforced: _containers.RepeatedCompositeFieldContainer[UnenforcedKeyword]
    def __init__(self, key: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., tokenizer_hash: _Optional[str] = ..., num_bytes: _Optional[int] = ..., was_cached: _Optional[bool] = ..., compile_ms: _Optional[float] = ..., unenforced: _Optional[_Iterable[_Union[UnenforcedKeyword, _Mapping]]] = ...) -> None: ...

class UnenforcedKeyword(_message.Message):
    __slots__ = ("keyword", "path", "reason")
    KEYWORD_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    keyword: str
    path: str
    reason: str
    def __init__(self, keyword: _Optional[str] = ..., path: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GrammarPart(_message.Message):
    __slots__ = ("info", "data")
    INFO_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    info: CompiledGrammarInfo
    data: bytes
    def __init__(self, info: _Optional[_Union[CompiledGrammarInfo, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class MaskRequest(_message.Message):
    __slots__ = ("sequence", "open", "accept", "rollback", "close")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    open: OpenMatcher
    accept: AcceptTokens
    rollback: int
    close: bool
    def __init__(self, sequence: _Optional[str] = ..., open: _Optional[_Union[OpenMatcher, _Mapping]] = ..., accept: _Optional[_Union[AcceptTokens, _Mapping]] = ..., rollback: _Optional[int] = ..., close: _Optional[bool] = ...) -> None: ...

class OpenMatcher(_message.Message):
    __slots__ = ("key", "grammar")
    KEY_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    key: str
    grammar: CompileGrammarRequest
    def __init__(self, key: _Optional[str] = ..., grammar: _Optional[_Union[CompileGrammarRequest, _Mapping]] = ...) -> None: ...

class AcceptTokens(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class MaskReply(_message.Message):
    __slots__ = ("sequence", "mask", "is_completed", "is_terminated", "forced", "num_accepted", "error")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    IS_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    IS_TERMINATED_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    sequence: str
    mask: bytes
    is_completed: bool
    is_terminated: bool
    forced: bytes
    num_accepted: int
    error: _common_pb2.ErrorInfo
    def __init__(self, sequence: _Optional[str] = ..., mask: _Optional[bytes] = ..., is_completed: _Optional[bool] = ..., is_terminated: _Optional[bool] = ..., forced: _Optional[bytes] = ..., num_accepted: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.ErrorInfo, _Mapping]] = ...) -> None: ...

class ValidateGrammarRequest(_message.Message):
    __slots__ = ("grammar", "text")
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    grammar: CompileGrammarRequest
    text: str
    def __init__(self, grammar: _Optional[_Union[CompileGrammarRequest, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

class ValidateGrammarReply(_message.Message):
    __slots__ = ("is_valid", "is_prefix", "num_valid_bytes")
    IS_VALID_FIELD_NUMBER: _ClassVar[int]
    IS_PREFIX_FIELD_NUMBER: _ClassVar[int]
    NUM_VALID_BYTES_FIELD_NUMBER: _ClassVar[int]
    is_valid: bool
    is_prefix: bool
    num_valid_bytes: int
    def __init__(self, is_valid: _Optional[bool] = ..., is_prefix: _Optional[bool] = ..., num_valid_bytes: _Optional[int] = ...) -> None: ...

class DescribeGrammarsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GrammarsDescription(_message.Message):
    __slots__ = ("engines", "num_cached", "cached_bytes", "num_compiled", "num_killed", "max_schema_bytes", "max_schema_depth", "max_enum_values", "max_regex_chars", "compile_timeout_s")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPILED_FIELD_NUMBER: _ClassVar[int]
    NUM_KILLED_FIELD_NUMBER: _ClassVar[int]
    MAX_SCHEMA_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SCHEMA_DEPTH_FIELD_NUMBER: _ClassVar[int]
    MAX_ENUM_VALUES_FIELD_NUMBER: _ClassVar[int]
    MAX_REGEX_CHARS_FIELD_NUMBER: _ClassVar[int]
    COMPILE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[GrammarEngineInfo]
    num_cached: int
    cached_bytes: int
    num_compiled: int
    num_killed: int
    max_schema_bytes: int
    max_schema_depth: int
    max_enum_values: int
    max_regex_chars: int
    compile_timeout_s: float
    def __init__(self, engines: _Optional[_Iterable[_Union[GrammarEngineInfo, _Mapping]]] = ..., num_cached: _Optional[int] = ..., cached_bytes: _Optional[int] = ..., num_compiled: _Optional[int] = ..., num_killed: _Optional[int] = ..., max_schema_bytes: _Optional[int] = ..., max_schema_depth: _Optional[int] = ..., max_enum_values: _Optional[int] = ..., max_regex_chars: _Optional[int] = ..., compile_timeout_s: _Optional[float] = ...) -> None: ...

class GrammarEngineInfo(_message.Message):
    __slots__ = ("name", "version", "languages")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LANGUAGES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    languages: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., languages: _Optional[_Iterable[str]] = ...) -> None: ...
