"""OpenTelemetry spans of requests, when `[mesh] otlp_endpoint` is set; otherwise trace context is passed on and nothing else happens.

One span per request and service (gateway.request, decode.request, prefill.job), each the child of the one that caused it. Lengths
and ids only, never text.
"""

from __future__ import annotations

from typing import Any

from plugmesh.errors import ConfigError

KEY = "traceparent"


class Span:
    """A span that is running, or nothing. `traceparent` is what the work it causes must carry."""

    def __init__(self, traceparent: str, span: Any = None) -> None:
        self.traceparent = traceparent
        self._span = span

    @property
    def carrier(self) -> dict[str, str]:
        """Trace context for a message's `trace` field."""
        return {KEY: self.traceparent} if self.traceparent else {}

    def end(self, *, error: str = "", **attributes: str | int | float) -> None:
        """Ends it; later calls change nothing. `error` is an error's code."""
        span, self._span = self._span, None
        if span is None:
            return
        from opentelemetry.trace import StatusCode

        span.set_attributes({f"plugmesh.{k}": v for k, v in attributes.items()})
        if error:
            span.set_status(StatusCode.ERROR, error)
        span.end()


class Tracing:
    """The spans of one process. `configure` before the first request; without it every span is empty."""

    def __init__(self) -> None:
        self._tracer: Any = None
        self._provider: Any = None

    def configure(self, endpoint: str, *, service: str, instance: str, exporter: Any = None) -> None:
        """Sends spans to an OTLP/HTTP endpoint ("http://127.0.0.1:4318/v1/traces") in the background; an exporter overrides it.

        Raises:
            ConfigError: An endpoint is configured but the extra `otel` is not installed.
        """
        if not endpoint and exporter is None:
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                processor: Any = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5))
            else:
                processor = SimpleSpanProcessor(exporter)
        except ImportError as e:
            raise ConfigError(f"[mesh] otlp_endpoint is set, but {e.name} is not installed: pip install 'plugmesh[otel]'") from e
        self._provider = TracerProvider(resource=Resource.create({"service.name": f"plugmesh-{service}", "service.instance.id": instance}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("plugmesh")

    def start(self, name: str, traceparent: str = "", **attributes: str | int | float) -> Span:
        """A span below `traceparent` (W3C), or the root of a new trace."""
        if self._tracer is None:
            return Span(traceparent)
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_span(
            name, context=propagator.extract({KEY: traceparent}), attributes={f"plugmesh.{k}": v for k, v in attributes.items()}
        )
        context = span.get_span_context()
        return Span(f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}", span)

    def close(self) -> None:
        """Sends what is left, for at most a few seconds."""
        provider, self._provider, self._tracer = self._provider, None, None
        if provider is not None:
            provider.shutdown()


TRACING = Tracing()
