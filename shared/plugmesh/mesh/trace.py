"""W3C trace context that travels with calls, without depending on OpenTelemetry.

A servicer finds the caller's `traceparent` in the context variable; calls it makes carry it on.
"""

from __future__ import annotations

import contextvars
import re
import secrets

KEY = "traceparent"
traceparent: contextvars.ContextVar[str] = contextvars.ContextVar("plugmesh_traceparent", default="")

_VALID = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def new() -> str:
    """A fresh sampled traceparent."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def is_valid(value: str) -> bool:
    return _VALID.fullmatch(value) is not None


def trace_id() -> str:
    """The current trace id, or an empty string outside a trace."""
    value = traceparent.get()
    return value[3:35] if value else ""
