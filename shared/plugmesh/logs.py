"""structlog set up once per process: console on a terminal, JSON lines otherwise."""

from __future__ import annotations

import logging
import sys

import structlog


class _Stderr:
    """Standard error as it is when something is written: whoever captures it for a while, as test runners do, closes what was there meanwhile."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(level: str = "info", *, service: str = "", instance: str = "", json: bool | None = None) -> None:
    """Call once at start, before the first log line.

    Args:
        json: None chooses by whether stderr is a terminal.
    """
    if json is None:
        json = not sys.stderr.isatty()
    renderer = structlog.processors.JSONRenderer() if json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]  # what it needs of a file
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    if service:
        structlog.contextvars.bind_contextvars(service=service, instance=instance)
