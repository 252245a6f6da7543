"""Spans: passed on without configuration, exported over OTLP when an address is configured."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from plugmesh.mesh.trace import is_valid
from plugmesh.tracing import Tracing

PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


def test_without_configuration_the_context_is_passed_on_untouched():
    span = Tracing().start("x", PARENT)
    span.end()

    assert {"traceparent": PARENT} == span.carrier
    assert {} == Tracing().start("x").carrier


async def test_spans_arrive_at_an_otlp_endpoint():
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        tracing = Tracing()
        tracing.configure(f"http://127.0.0.1:{server.server_port}/v1/traces", service="gateway", instance="g0")
        span = tracing.start("gateway.request", request_id="r")
        assert is_valid(span.traceparent)
        span.end(num_generated_tokens=3)
        await asyncio.to_thread(tracing.close)
    finally:
        server.shutdown()
        server.server_close()
    (resource,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans

    assert ["gateway.request"] == [s.name for scope in resource.scope_spans for s in scope.spans]
    assert "plugmesh-gateway" in {a.value.string_value for a in resource.resource.attributes}
