"""Every error that crosses a function, a process or the wire.

PlugmeshError
├── InvalidRequest            400  the caller's fault; `param` names the field
│   ├── ContextLengthExceeded 400  prompt plus max_tokens is longer than the model's context
│   ├── LimitExceeded         400  more than a documented limit allows
│   └── PayloadTooLarge       413  body or message over its cap
├── Unauthenticated           401
├── PermissionDenied          403
├── NotFound                  404  model, block, instance
├── AlreadyExists             409  request id in use
├── FailedPrecondition        409  right call, wrong state: stale incarnation, layout mismatch
│   └── StaleIncarnation      409  a write from an earlier life of an instance
├── Overloaded                429  a bounded queue is full; carries retry_after_s
├── Unavailable               503  nobody can serve this now; carries retry_after_s
├── DeadlineExceeded          504
├── Cancelled                 499  the caller went away; a flow signal, seldom logged
├── DataLoss                  500  a frame, block or file is corrupt or missing
│   └── CorruptModelFile      400  an imported file; names `file` and `field`
├── PluginError               500  a plugin raised; carries `plugin` and the request it cost
├── ConfigError               --   the process cannot start; exit code 2
└── InternalError             500  ours; the text that leaves the process never holds a traceback

`to_info` and `from_info` carry an error over the wire in an ErrorInfo message; `GRPC_STATUS` and
`http_status` map it to the two protocols. Codes are snake_case class names unless a class says otherwise.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar


class PlugmeshError(Exception):
    """Base of the tree. `message` is safe to show to the caller.

    Args:
        message: One sentence with the numbers in it.
        param: The request field at fault.
        retry_after_s: Above 0 when the same call may succeed after that many seconds.
        fields: Further typed facts, shown in logs and in `ErrorInfo.fields`.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"  # name of a grpc.StatusCode

    def __init__(self, message: str, *, param: str = "", retry_after_s: float = 0.0, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = float(retry_after_s)
        self.fields = {k: str(v) for k, v in fields.items()}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class InvalidRequest(PlugmeshError):
    """The request is malformed; nothing was changed."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus wanted tokens exceed the model's context."""


class LimitExceeded(InvalidRequest):
    """A documented limit (n, stop strings, logit_bias entries, messages, max_tokens) was exceeded."""


class UnsupportedGrammar(InvalidRequest):
    """A grammar is malformed or cannot be enforced exactly; `fields` hold "keyword" and "path" (JSON Pointer) of a schema's part at fault."""


class PayloadTooLarge(InvalidRequest):
    """A body or message is larger than its cap."""

    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class Unauthenticated(PlugmeshError):
    """No API key or a wrong one."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class PermissionDenied(PlugmeshError):
    """The key is valid but its scope does not cover the call."""

    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class NotFound(PlugmeshError):
    """A model, block, route or instance does not exist."""

    http_status = 404
    grpc_status = "NOT_FOUND"


class AlreadyExists(PlugmeshError):
    """A request id is in use."""

    http_status = 409
    grpc_status = "ALREADY_EXISTS"


class FailedPrecondition(PlugmeshError):
    """The call is right but the state is not (layout mismatch, service draining for writes)."""

    http_status = 409
    grpc_status = "FAILED_PRECONDITION"


class StaleIncarnation(FailedPrecondition):
    """A write from an earlier life of an instance, or under an expired lease."""


class Overloaded(PlugmeshError):
    """A bounded queue is full; try again after `retry_after_s`."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class Unavailable(PlugmeshError):
    """Nobody can serve this at the moment; try again after `retry_after_s`."""

    http_status = 503
    grpc_status = "UNAVAILABLE"


class DeadlineExceeded(PlugmeshError):
    """The deadline passed before the work was done."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class GrammarTimeout(DeadlineExceeded):
    """A grammar took too long to compile; it may be valid."""


class Cancelled(PlugmeshError):
    """The caller went away. A flow signal rather than a fault."""

    http_status = 499
    grpc_status = "CANCELLED"


class DataLoss(PlugmeshError):
    """A frame, block or blob is missing or fails its checksum."""

    grpc_status = "DATA_LOSS"


class CorruptModelFile(DataLoss):
    """A model file that cannot be imported; `file` and `field` say where it is wrong."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, file: str, field: str, **kwargs: Any) -> None:
        super().__init__(message, file=file, field=field, **kwargs)
        self.file = file
        self.field = field


class PluginError(PlugmeshError):
    """A plugin raised; the request it served is lost, the process is not."""

    def __init__(self, message: str, *, plugin: str, **kwargs: Any) -> None:
        super().__init__(message, plugin=plugin, **kwargs)
        self.plugin = plugin


class ConfigError(PlugmeshError):
    """The configuration or a plugin makes it impossible to start. The CLI exits with code 2."""

    grpc_status = "FAILED_PRECONDITION"


class InternalError(PlugmeshError):
    """A defect of ours. The text names no internals."""


def _walk(cls: type[PlugmeshError]) -> dict[str, type[PlugmeshError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_walk(sub))
    return found


def by_code() -> dict[str, type[PlugmeshError]]:
    """Code to class, for every class of the tree."""
    return _walk(PlugmeshError)


def from_info(code: str, message: str, param: str = "", retry_after_s: float = 0.0, fields: dict[str, str] | None = None) -> PlugmeshError:
    """The error that an ErrorInfo on the wire stands for.

    An unknown code (a newer peer) becomes InternalError with the code among its fields.
    """
    fields = dict(fields or {})
    cls = by_code().get(code)
    if cls is None:
        return InternalError(message, param=param, retry_after_s=retry_after_s, wire_code=code)
    if cls is CorruptModelFile:
        return CorruptModelFile(message, file=fields.pop("file", ""), field=fields.pop("field", ""), param=param)
    if cls is PluginError:
        return PluginError(message, plugin=fields.pop("plugin", ""), param=param)
    return cls(message, param=param, retry_after_s=retry_after_s, **fields)
