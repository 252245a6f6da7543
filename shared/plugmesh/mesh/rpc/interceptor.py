"""For real gRPC servers: typed errors become statuses, and the caller's trace context is taken over."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog

from plugmesh import wire
from plugmesh.errors import InternalError, PlugmeshError
from plugmesh.mesh import trace

log = structlog.get_logger()


def where(e: BaseException) -> str:
    """The innermost frames of an exception. Its text and its locals may quote a prompt, so they are not logged."""
    frames = traceback.extract_tb(e.__traceback__)[-4:]
    return " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in reversed(frames))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """PlugmeshError raised by a servicer becomes its status with details; any other exception INTERNAL without its text."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        traceparent = ""
        for key, value in handler_call_details.invocation_metadata or ():
            if key == trace.KEY and isinstance(value, str) and trace.is_valid(value):
                traceparent = value
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            return make(_streaming(inner, method, traceparent), handler.request_deserializer, handler.response_serializer)
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        return make(_unary(inner, method, traceparent), handler.request_deserializer, handler.response_serializer)


def _unary(inner: Any, method: str, traceparent: str) -> Any:
    async def behavior(request: Any, context: grpc.aio.ServicerContext) -> Any:
        trace.traceparent.set(traceparent)
        try:
            result = inner(request, context)
            return await result if inspect.isawaitable(result) else result
        except Exception as e:
            await _translate(e, method, context)

    return behavior


def _streaming(inner: Any, method: str, traceparent: str) -> Any:
    # A coroutine that writes rather than a generator: when the call is cancelled during a write, gRPC drops a generator
    # without closing it, and its `finally` runs whenever the garbage collector comes by.
    async def behavior(request: Any, context: grpc.aio.ServicerContext) -> None:
        trace.traceparent.set(traceparent)
        try:
            result = inner(request, context)
            if hasattr(result, "__aiter__"):
                try:
                    async for message in result:
                        await context.write(message)
                finally:
                    if hasattr(result, "aclose"):
                        await result.aclose()
            else:
                await result     # writes through the context
        except Exception as e:
            await _translate(e, method, context)

    return behavior


async def _translate(e: Exception, method: str, context: grpc.aio.ServicerContext) -> None:
    if isinstance(e, grpc.aio.AbortError | asyncio.CancelledError):
        raise e
    if isinstance(e, PlugmeshError):
        await wire.abort(context, e)
    code = context.code()
    if code not in (None, 0, grpc.StatusCode.OK) and isinstance(code, grpc.StatusCode):
        await context.abort(code, context.details() or "")
    log.error("rpc.handler_failed", method=method, error=type(e).__name__, where=where(e))
    await wire.abort(context, InternalError("internal error"))
