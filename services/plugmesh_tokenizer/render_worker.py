"""The process in which chat templates run. Started by `render.py` as a script; imports nothing of plugmesh.

Reads requests from stdin and answers on stdout, each a 4-byte big-endian length and a JSON object. A template is a
program that came with a model, so it runs here under an address-space limit and an alarm that ends the process,
whatever the template is doing; the parent starts another.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class TemplateRaised(Exception):
    """The template called raise_exception."""


class OutputTooLong(Exception):
    """The rendered text is longer than allowed."""


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise TemplateRaised(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters and sorts keys, which models have not seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def render(source: str, variables: dict[str, Any], max_chars: int) -> str:
    """The template's text. Stops at the first piece that makes it longer than `max_chars`."""
    pieces: list[str] = []
    length = 0
    for piece in _compiled(source).generate(**variables):
        length += len(piece)
        if length > max_chars:
            raise OutputTooLong
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One reply: {"texts": [...]}, one text per entry of `renders`, or {"error": kind, "message": text}."""
    try:
        return {"texts": [render(request["source"], variables, request["max_chars"]) for variables in request["renders"]]}
    except jinja2.TemplateSyntaxError as e:
        return {"error": "syntax", "message": f"line {e.lineno}: {e.message}"}
    except TemplateRaised as e:
        return {"error": "raised", "message": str(e)[:500]}
    except OutputTooLong:
        return {"error": "too_long", "message": ""}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except RecursionError:
        return {"error": "failed", "message": "nested too deeply"}
    except Exception as e:  # whatever a template can provoke costs this request only
        return {"error": "failed", "message": f"{type(e).__name__}: {e}"[:500]}


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    return stream.read(struct.unpack(">I", head)[0])


def main() -> None:
    memory_bytes, timeout_s = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside a C loop or after the parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the parent, which closes stdin
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while (data := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        reply = json.dumps(answer(json.loads(data))).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sink.write(struct.pack(">I", len(reply)) + reply)
        sink.flush()


if __name__ == "__main__":
    main()
