"""The gateway's span: one per request, below the client's trace and above decode's."""

from __future__ import annotations

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from plugmesh.tracing import TRACING

from .conftest import until

PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture
def exported():
    exporter = InMemorySpanExporter()
    TRACING.configure("", service="test", instance="t0", exporter=exporter)
    yield exporter
    TRACING.close()


async def test_a_request_leaves_one_span_below_the_clients_and_a_refused_one_its_code(start, exported):
    stack = await start(peers=False)
    decode, _ = await stack.decode(), await stack.tokenizer()
    async with httpx.AsyncClient(headers={"traceparent": PARENT}) as http:
        assert 200 == (await http.post(f"{stack.url}/v1/completions", json={"prompt": "hi", "max_tokens": 3})).status_code
        assert 404 == (await http.post(f"{stack.url}/v1/completions", json={"prompt": "hi", "model": "nobody"})).status_code
    await until(lambda: len(exported.get_finished_spans()) == 2)
    good, refused = exported.get_finished_spans()

    assert ["gateway.request"] * 2 == [good.name, refused.name]
    assert PARENT[3:35] == f"{good.context.trace_id:032x}"
    assert PARENT[36:52] == f"{good.parent.span_id:016x}"
    assert f"{good.context.span_id:016x}" == decode.servicer.submits[0].trace["traceparent"][36:52]
    assert 3 == good.attributes["plugmesh.num_generated_tokens"]
    assert "not_found" == refused.status.description
