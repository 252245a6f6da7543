"""Grammars on their way to decode: compiled beside encoding, kept over a migration, refused by place, and missing without harm to others."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from plugmesh.client import AsyncClient
from plugmesh.errors import InvalidRequest, Unavailable, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec

from .conftest import say, until
from .test_grpc import connect  # noqa: F401 # a fixture
from .test_strategies import Plugin, join

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
USER = [{"role": "user", "content": "x"}]


async def constrained(start, text='{"a": "b"}', **settings):
    stack = await start(peers=False, **settings)
    grammar = (await stack.grammar()).servicer
    await stack.tokenizer()
    decode = (await stack.decode(say(text))).servicer
    return stack, decode, grammar


async def test_a_schema_reaches_decode_compiled_and_the_text_comes_back(start):
    stack, decode, grammar = await constrained(start)
    reply = await stack.client().chat.completions.create(model="tiny", messages=USER, response_format=FORMAT)

    assert json.loads(reply.choices[0].message.content) == {"a": "b"}
    assert [(s.kind, json.loads(s.source), s.relaxed, s.whitespace) for s in grammar.specs] == [("json_schema", SCHEMA, False, "flexible")]
    assert decode.submits[0].grammar.key == f"key of {json.dumps(SCHEMA)}"
    assert decode.submits[0].grammar.spec == grammar.specs[0]
    assert stack.value("plugmesh_gateway_grammars_total", kind="json_schema", outcome="compiled") == 1


async def test_compilation_and_encoding_run_at_the_same_time(start):
    stack, decode, grammar = await constrained(start)
    tokenizer = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "tokenizer")
    grammar.may_answer.clear()
    task = asyncio.create_task(stack.client().chat.completions.create(model="tiny", messages=USER, response_format=FORMAT))
    await until(lambda: bool(grammar.specs and tokenizer.chats))

    assert not decode.submits
    grammar.may_answer.set()
    assert (await task).choices[0].finish_reason == "stop"


async def test_a_request_that_moves_takes_its_grammar_along(start):
    stack, first, _ = await constrained(start)
    second = (await stack.decode(say('{"a": "b"}'))).servicer
    first.pause_after = second.pause_after = 3
    task = asyncio.create_task(stack.client().completions.create(model="tiny", prompt="x", extra_body={"guided_json": SCHEMA}))
    await until(lambda: any(g is not None and g.num_completion_tokens == 3 for g in stack.gateway._running.values()))  # sent is not received
    used, other = (first, second) if first.submits else (second, first)
    other.pause_after = 10**9
    await stack.mesh.kill(next(p for p in stack.mesh.peers.values() if p.servicer is used))

    assert (await task).choices[0].text == '{"a": "b"}'
    assert len(other.submits[0].resume[0].token_ids) == 3
    assert other.submits[0].grammar == used.submits[0].grammar and used.submits[0].grammar.key


async def test_without_a_grammar_service_only_constrained_requests_are_refused(start):
    stack = await start()
    async with httpx.AsyncClient(base_url=stack.url) as http:
        refused = await http.post("/v1/chat/completions", json={"messages": USER, "response_format": FORMAT})
        tools = await http.post("/v1/chat/completions", json={"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]})
        served = await http.post("/v1/chat/completions", json={"messages": USER})
        none = await http.post(
            "/v1/chat/completions", json={"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"})
    for reply in (refused, tools):
        assert (reply.status_code, reply.json()["error"]["code"], reply.headers["retry-after"]) == (503, "unavailable", "1")
        assert reply.json()["error"]["type"] == "server_error"
    assert (served.status_code, none.status_code) == (200, 200)
    await until(stack.is_idle)
    await stack.grammar()
    again = await stack.client().chat.completions.create(model="tiny", messages=USER, response_format=FORMAT)

    assert again.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("body", "param"), [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": {"a": {"not": {}}}}}}},
     "response_format.json_schema.schema/properties/a/not"),
    ({"guided_json": {"not": {}}}, "guided_json/not"),
    ({"structured_outputs": {"json": {"items": {"not": {}}}}}, "structured_outputs.json/items/not"),
    ({"tools": [{"type": "function", "function": {"name": "f"}},
                {"type": "function", "function": {"name": "g", "parameters": {"properties": {"a": {"not": {}}}}}}]},
     "tools[1].function.parameters/properties/a/not"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": {"a": {"not": {}}}}}},
      "tools": [{"type": "function", "function": {"name": "f"}}]}, "response_format.json_schema.schema/properties/a/not"),
])
async def test_what_cannot_be_enforced_is_a_400_with_keyword_and_path(start, body, param):
    stack, decode, _ = await constrained(start)
    async with httpx.AsyncClient(base_url=stack.url) as http:
        reply = await http.post("/v1/chat/completions", json={"messages": USER, **body})
    error = reply.json()["error"]

    assert (reply.status_code, error["code"], error["param"], error["type"]) == (400, "unsupported_grammar", param, "invalid_request_error")
    assert "not" in error["message"]
    assert not decode.submits
    await until(stack.is_idle)


async def test_a_schema_cut_by_max_tokens_ends_as_length(start):
    stack, _, _ = await constrained(start)
    client = stack.client()
    reply = await client.chat.completions.create(model="tiny", messages=USER, response_format=FORMAT, max_tokens=4)

    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ('{"a"', "length")
    with pytest.raises(openai.LengthFinishReasonError):
        await client.chat.completions.parse(model="tiny", messages=USER, response_format=FORMAT, max_tokens=4)


async def test_children_of_a_strategy_obey_the_grammar_too(start):
    async def gone_on(request, api):
        async for e in api.generate(1, prefix=(65,)):
            yield e

    stack = await start(plugins=(("mine", Plugin(join=join, gone_on=gone_on)),), peers=False)
    decode = (await stack.decode(say("ab"))).servicer
    await stack.tokenizer()
    await stack.grammar()
    async with httpx.AsyncClient(base_url=stack.url) as http:
        body = {"prompt": "x", "max_tokens": 10, "guided_regex": "ab"}
        served = await http.post("/v1/completions", json={**body, "strategy": {"name": "join"}})
        refused = await http.post("/v1/completions", json={**body, "strategy": {"name": "gone_on"}})

    assert served.json()["choices"][0]["text"] == "ab|ab|ab"
    assert [s.grammar.key for s in decode.submits] == ["key of ab"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "strategy")


async def test_grpc_clients_send_grammars_and_tools(connect):  # noqa: F811
    stack, address = await connect(peers=False)
    decode = (await stack.decode(say("{}"))).servicer
    tokenizer = (await stack.tokenizer()).servicer
    async with AsyncClient(address) as client:
        with pytest.raises(Unavailable):
            await client.complete("x", grammar=SCHEMA)
        grammar = (await stack.grammar()).servicer
        assert (await client.complete("x", grammar=SCHEMA)).text == "{}"
        assert "".join([e.text async for e in client.generate("x", grammar=["a", "b"])]) == "{}"
        await client.complete("x", grammar=GrammarSpec("regex", "a+", whitespace="compact"))
        await client.complete(messages=USER, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(UnsupportedGrammar) as e:
            await client.complete("x", grammar={"not": {}})
        with pytest.raises(InvalidRequest):
            await client.complete("x", grammar=GrammarSpec("regex", "a", relaxed=True))
        with pytest.raises(InvalidRequest):
            await client.complete("x", grammar=["a"], ignore_eos=True)

    assert (e.value.param, e.value.fields["keyword"]) == ("grammar/not", "not")
    assert [(s.kind, s.source, s.whitespace) for s in grammar.specs[:3]] == [
        ("json_schema", json.dumps(SCHEMA), "flexible"), ("choice", '["a", "b"]', "flexible"), ("regex", "a+", "compact")]
    assert grammar.specs[3].kind == "structural_tag" and '"name": "f"' in tokenizer.chats[-1].messages[0].content
    assert len(decode.submits) == 4
