"""Metrics and the closing log event of every call; `docs/operations.md` defines each name."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import prometheus_client
import structlog

from plugmesh.errors import PlugmeshError
from plugmesh.metrics import Metrics

log = structlog.get_logger()


class Measures:
    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        m = Metrics(registry)
        self._calls = m.counter("weightstore_calls", "Calls by method and outcome", ("method", "code"))
        self._seconds = m.histogram("weightstore_call_seconds", "Time of a call, streams to their end", ("method",))
        self.read_bytes = m.counter("weightstore_read_bytes", "Bytes sent by ReadBlob")
        self.models = m.gauge("weightstore_models", "Versions in the catalogue")
        self.blobs = m.gauge("weightstore_blobs", "Files in the blob folder")
        self.blob_bytes = m.gauge("weightstore_blob_bytes", "Bytes in the blob folder")
        self.running = m.gauge("weightstore_running", "Calls now running, by kind; each kind has a cap", ("kind",))

    @contextlib.contextmanager
    def call(self, method: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Around one call; whatever the body adds to the yielded facts is logged at its end."""
        start, code = time.monotonic(), "ok"
        try:
            yield facts
        except PlugmeshError as e:
            code = e.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = "cancelled"
            raise
        except BaseException:
            code = "internal_error"
            raise
        finally:
            seconds = time.monotonic() - start
            self._calls.labels(method, code).inc()
            self._seconds.labels(method).observe(seconds)
            level = log.debug if method == "ReadBlob" and code == "ok" else log.info
            level("weightstore.call", method=method, code=code, ms=round(1000 * seconds, 3), **facts)
