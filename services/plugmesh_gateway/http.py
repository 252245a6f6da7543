"""HTTP: the routes, the edge around them (keys, sizes, error shapes), and the server inside this process."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import prometheus_client
import pydantic.json_schema
import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from swagger_ui_bundle import swagger_ui_path

from plugmesh.errors import (
    Cancelled,
    ConfigError,
    InternalError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    PlugmeshError,
    Unavailable,
)

from .connection import Connection, Protocol
from .generation import Event
from .handle import Accepted, Gateway
from .keys import KeyRing
from .parse import ChatBody, CompletionBody, parse_chat, parse_completion
from .request import Wanted, new_request_id
from .respond import DONE, ChatShape, CompletionShape, Shape, error_event, error_headers, error_object, token_ids_of

log = structlog.get_logger()

_OPEN = frozenset({"/live", "/health"})
_SEND_BUFFER_BYTES = 128 * 1024
_SEND_TIMEOUT_S = 30.0  # one write to a client that does not read


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared as JSON."""

    http_status = 415


class RequestTimeout(InvalidRequest):
    """The body did not arrive in time."""

    http_status = 408


class MethodNotAllowed(InvalidRequest):
    """The path exists, the method does not."""

    http_status = 405


def scope_of(method: str, path: str) -> str:
    """The key scope a route needs; "" for any valid key (also for paths that do not exist, so that they cannot be told apart)."""
    if path == "/v1/models" or path.startswith("/v1/models/"):
        return "models"
    if path.startswith("/v1/"):
        return "inference"
    if path == "/metrics":
        return "metrics"
    if path in ("/docs", "/openapi.json") or path.startswith("/docs/"):
        return "docs"
    return ""


def error_response(error: PlugmeshError) -> JSONResponse:
    return JSONResponse(error_object(error), error.http_status, error_headers(error))


class Edge:
    """Around the whole application: request id, authentication before routing, a cap on requests, errors without internals."""

    def __init__(self, app: ASGIApp, keys: KeyRing, max_requests: int) -> None:
        self.app = app
        self.keys = keys
        self.max_requests = max_requests
        self.num_requests = 0
        # Paths that many requests take to handlers that need nothing of the framework, whose middleware costs more than they do.
        self.shortcuts: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self.app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_on(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        self.num_requests += 1
        try:
            if self.num_requests > self.max_requests and scope["path"] not in _OPEN:
                raise Unavailable("too many connections", retry_after_s=1)
            if scope["path"] not in _OPEN:
                authorization = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
                scope["state"]["client"] = self.keys.check(authorization.decode("latin-1"), scope_of(scope["method"], scope["path"]))
            handler = self.shortcuts.get((scope["method"], scope["path"]))
            if handler is None:
                await self.app(scope, receive, send_on)
            else:
                await (await handler(Request(scope, receive)))(scope, receive, send_on)
        except PlugmeshError as e:
            if not has_started:
                await error_response(e)(scope, receive, send_on)
        except Exception as e:
            log.exception("http.failed", request_id=request_id, error=type(e).__name__)
            if not has_started:
                await error_response(InternalError("the server failed on this request"))(scope, receive, send_on)
        finally:
            self.num_requests -= 1


class Answer(Response):
    """Runs one generation while it watches the connection; a client that goes away cancels everything."""

    def __init__(self, gateway: Gateway, wanted: Wanted, make_shape: Callable[[Accepted], Shape], *, is_stream: bool) -> None:
        self.gateway = gateway
        self.wanted = wanted
        self.make_shape = make_shape
        self.is_stream = is_stream
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(scope, receive, send), name=f"http:{self.wanted.request_id}")
        gone = asyncio.create_task(_until_gone(receive), name="http:gone")
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        accepted: Accepted | None = None
        has_started = False
        try:
            accepted = await self.gateway.submit(self.wanted)
            shape = self.make_shape(accepted)
            events: list[Event] = []
            async for batch in accepted.generation.batches(self._writer(scope, shape)):
                if not self.is_stream:
                    events.extend(batch)
                    continue
                if not has_started:  # only now: until the first token an error still gets its own status
                    has_started = True
                    await send({"type": "http.response.start", "status": 200, "headers": [
                        (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]})
                data = shape.chunks(batch, await self._pieces(shape, accepted, batch))
                if data:
                    await _send_within(send, data, more=True)
            if self.is_stream:
                tail = shape.usage_chunk(accepted.generation) if shape.include_usage else b""
                await _send_within(send, tail + DONE, more=False)
            else:
                body = shape.whole(events, await self._pieces(shape, accepted, events), accepted.generation)
                await Response(body, media_type="application/json")(scope, receive, send)
        except PlugmeshError as e:
            if not has_started:
                await error_response(e)(scope, receive, send)
            elif not isinstance(e, Cancelled):
                await _send_within(send, error_event(e) + DONE, more=False)
        except TimeoutError:
            log.info("http.slow_reader", request_id=self.wanted.request_id)  # the server closes what is not complete
        finally:
            if accepted is not None:
                accepted.generation.cancel()

    def _writer(self, scope: Scope, shape: Shape) -> Callable[[list[Event]], bool] | None:
        """What writes chunks between the first and the last; None when the answer is not streamed or its chunks need a call elsewhere."""
        connection = Connection.of(scope)
        if connection is None or not self.is_stream or shape.logprobs:
            return None

        def take(events: list[Event]) -> bool:
            if not connection.is_ready():  # asked first: making chunks changes what the shape remembers
                return False
            connection.write(shape.chunks(events, {}))
            return True

        return take

    async def _pieces(self, shape: Shape, accepted: Accepted, events: list[Event]) -> dict[int, bytes]:
        if not shape.logprobs:
            return {}
        return await self.gateway.tokenizers.pieces(accepted.model, token_ids_of(events), accepted.generation.deadline)


async def _send_within(send: Send, data: bytes, *, more: bool) -> None:
    async with asyncio.timeout(_SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_json_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The body, never more than `max_bytes` of it in memory.

    Raises:
        UnsupportedMediaType, PayloadTooLarge, RequestTimeout, InvalidRequest
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("send the body as 'Content-Type: application/json'")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > max_bytes:
        raise PayloadTooLarge(f"the body has {length} bytes, at most {max_bytes} are allowed")
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > max_bytes:
                    raise PayloadTooLarge(f"the body has more than the {max_bytes} bytes that are allowed")
                parts.append(part)
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(parts)


def build_app(gateway: Gateway, keys: KeyRing, registry: prometheus_client.CollectorRegistry, version: str) -> Edge:
    """The ASGI application."""
    app = FastAPI(title="plugmesh", version=version, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                  description="Language models served by a mesh of small services. The OpenAI API's chat, completions and models.")
    settings = gateway.settings

    async def body_of(request: Request) -> bytes:
        return await read_json_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)

    def refused(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def counted(request: Request) -> Response:
            try:
                return await handler(request)
            except PlugmeshError as e:
                gateway.refuse(request.state.request_id, request.url.path, e)
                raise
        return counted

    async def chat(request: Request) -> Response:
        wanted, is_stream, include_usage = parse_chat(
            await body_of(request), request_id=request.state.request_id, limits=gateway.limits, headers=request.headers, client=request.state.client)
        return Answer(gateway, wanted, _shaper(ChatShape, wanted, include_usage), is_stream=is_stream)

    async def completions(request: Request) -> Response:
        wanted, is_stream, include_usage = parse_completion(
            await body_of(request), request_id=request.state.request_id, limits=gateway.limits, headers=request.headers, client=request.state.client)
        return Answer(gateway, wanted, _shaper(CompletionShape, wanted, include_usage), is_stream=is_stream)

    async def chat_route(request: Request) -> Response:
        return await refused(chat)(request)

    async def completions_route(request: Request) -> Response:
        return await refused(completions)(request)

    def body_schema(name: str) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}}

    app.post("/v1/chat/completions", openapi_extra=body_schema("ChatBody"), response_model=None)(_documented(
        chat_route, "Answers a chat, streamed as server-sent events or whole."))
    app.post("/v1/completions", openapi_extra=body_schema("CompletionBody"), response_model=None)(_documented(
        completions_route, "Continues one or several prompts."))

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        """Models that live decode instances serve."""
        return JSONResponse({"object": "list", "data": [_model_object(m) for m in await gateway.models.served()]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        """One model, by alias or version."""
        for m in await gateway.models.served():
            if name in (m.model, m.version):
                return JSONResponse(_model_object(m))
        raise NotFound(f"model {name[:128]!r} is not served here", param="model", openai_code="model_not_found")

    @app.get("/live", response_model=None)
    async def live() -> Response:
        """The process runs."""
        return JSONResponse({"status": "ok"})

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """A request would be served: 200, or 503 with what is missing."""
        missing = gateway.missing_roles()
        if gateway.admission.is_draining:
            return JSONResponse({"status": "draining", "missing": missing}, 503, {"retry-after": "1"})
        if missing:
            return JSONResponse({"status": "unavailable", "missing": missing}, 503, {"retry-after": "2"})
        return JSONResponse({"status": "ok", "missing": []})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus metrics of this instance."""
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", include_in_schema=False, response_model=None)
    async def openapi() -> Response:
        return JSONResponse(_openapi(app))

    @app.get("/docs", include_in_schema=False, response_model=None)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title="plugmesh", swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css", swagger_favicon_url="/docs/static/favicon-32x32.png")

    app.mount("/docs/static", StaticFiles(directory=pathlib.Path(swagger_ui_path)), name="docs-static")

    async def on_http_error(request: Request, e: Exception) -> Response:
        status = getattr(e, "status_code", 500)
        error: PlugmeshError
        if status == 404:
            error = NotFound(f"there is no {request.method} {request.url.path[:128]}")
        elif status == 405:
            error = MethodNotAllowed(f"{request.url.path} does not take {request.method}")
        else:
            error = InvalidRequest("the request is malformed")
        response = error_response(error)
        if status == 405 and getattr(e, "headers", None):
            response.headers.update(e.headers)  # type: ignore[attr-defined]
        return response

    async def on_error(request: Request, e: Exception) -> Response:
        assert isinstance(e, PlugmeshError)
        return error_response(e)

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(PlugmeshError, on_error)
    app.add_exception_handler(Exception, _on_defect)
    edge = Edge(app, keys, settings.max_connections)
    edge.shortcuts = {("POST", "/v1/chat/completions"): chat_route, ("POST", "/v1/completions"): completions_route}
    return edge


async def _on_defect(request: Request, e: Exception) -> Response:
    return error_response(InternalError("the server failed on this request"))


def _documented(handler: Callable[[Request], Awaitable[Response]], text: str) -> Callable[[Request], Awaitable[Response]]:
    handler.__doc__ = text
    return handler


def _shaper(shape: type[Shape], wanted: Wanted, include_usage: bool) -> Callable[[Accepted], Shape]:
    n = wanted.sampling.num_sequences
    return lambda accepted: shape(
        request_id=wanted.request_id, model=accepted.model.model, num_choices=n * len(wanted.prompts), include_usage=include_usage,
        logprobs=wanted.sampling.logprobs, top_logprobs=wanted.sampling.top_logprobs, echoes=accepted.echoes, num_sequences=n,
        tool_format=accepted.tool_format, is_named_call=wanted.tools is not None and wanted.tools.choice == "named")


def _model_object(m: Any) -> dict[str, Any]:
    return {"id": m.model, "object": "model", "created": m.first_seen_unix_s, "owned_by": "plugmesh",
            "version": m.version, "max_model_len": m.context_length}


def _openapi(app: FastAPI) -> dict[str, Any]:
    document = app.openapi()
    _, schemas = pydantic.json_schema.models_json_schema(
        [(ChatBody, "validation"), (CompletionBody, "validation")], ref_template="#/components/schemas/{model}")
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return document


class HttpServer:
    """uvicorn in this process's event loop, without its signal handlers.

    Attributes:
        port: The bound port, after `start`.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._app = app
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises ConfigError when the address cannot be bound."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it: the kernel would otherwise keep megabytes for a client that does not read.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            listener.bind((self.host, self.port))
        except OSError as e:
            listener.close()
            raise ConfigError(f"services.gateway.port: cannot bind {self.host}:{self.port}: {e.strerror}", key="services.gateway.port") from e
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_keep_alive=30, ws="none",
            http=Protocol, proxy_headers=False)
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-server")
        until = time.monotonic() + 10
        while not self._server.started:
            if self._task.done() or time.monotonic() > until:
                raise ConfigError(f"services.gateway.port: the HTTP server did not start on {self.host}:{self.port}", key="services.gateway.port")
            await asyncio.sleep(0.005)

    async def drain(self, deadline_s: float) -> None:
        """Closes the listener and idle connections, then waits for running answers."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await asyncio.wait({self._task}, timeout=deadline_s)

    async def stop(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            await asyncio.wait({self._task}, timeout=5)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the process's signals belong to the mesh runtime


