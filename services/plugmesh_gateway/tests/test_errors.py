"""Bad input, keys and limits: a typed 4xx in OpenAI's shape that names the parameter, and nothing is changed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import ConfigError, InvalidRequest, PermissionDenied, PlugmeshError, Unauthenticated
from plugmesh.limits import Limits
from plugmesh_gateway.keys import KeyRing, hash_key, main, new_key, toml_entry
from plugmesh_gateway.parse import ChatBody, CompletionBody, parse_chat, parse_completion, parse_json
from plugmesh_gateway.respond import error_object

USER = [{"role": "user", "content": "x"}]


def chat(**kw):
    return parse_chat(json.dumps({"messages": USER, **kw}).encode(), request_id="r", limits=Limits(), headers={})


@pytest.mark.parametrize(("body", "param"), [
    ({"temperature": 2.1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.01}, "top_p"), ({"n": 0}, "n"), ({"n": 17}, "n"), ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -1}, "max_tokens"), ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"stop": ["a"] * 17}, "stop"), ({"stop": ""}, "stop"), ({"stop": "x" * 300}, "stop"), ({"stop": [1]}, "stop"),
    ({"presence_penalty": -2.5}, "presence_penalty"), ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"5": 101}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": 2**63}, "seed"), ({"min_p": 1.5}, "min_p"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"top_k": -2}, "top_k"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"), ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": list(range(200))}, "stop_token_ids"),
    ({"priority": 10**7}, "priority"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"frobnicate": 1}, "frobnicate"), ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"), ({"messages": USER * 1025}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"functions": [{}]}, "functions"), ({"audio": {}}, "audio"), ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"prompt_logprobs": 1}, "prompt_logprobs"),
])
def test_every_refusal_names_its_parameter(body, param):
    with pytest.raises(InvalidRequest) as e:
        chat(**body)

    assert (e.value.param, e.value.http_status) == (param, 400)


@pytest.mark.parametrize(("body", "param"), [
    ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": {}}, "prompt"),
    ({}, "prompt"), ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 2}, "best_of"), ({"prompt": "a", "logprobs": 21}, "top_logprobs"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"), ({"prompt": ["a"] * 65}, "prompt"), ({"prompt": ["a"] * 40, "n": 2}, "n"),
    ({"prompt": "a", "messages": USER}, "messages"), ({"prompt": [2**31]}, "prompt"),
])
def test_completion_refusals_name_their_parameter(body, param):
    with pytest.raises(InvalidRequest) as e:
        parse_completion(json.dumps(body).encode(), request_id="r", limits=Limits(), headers={})

    assert e.value.param.partition("[")[0] == param


def test_nulls_and_harmless_parameters_change_nothing():
    plain, *_ = chat()
    full, is_stream, include_usage = chat(
        temperature=None, stop=None, n=None, user="u", store=True, metadata={"a": "b"}, service_tier="auto", tools=[], response_format={"type": "text"},
        tool_choice="none", parallel_tool_calls=True, top_k=-1, stream=False, model=None)

    assert full.client == "u"  # for rate limits and routers
    assert (dataclasses.replace(full, client=plain.client), is_stream, include_usage) == (plain, False, False)


def test_content_parts_and_further_keys_of_messages_are_kept():
    wanted, *_ = chat(messages=[
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "tool", "content": "r", "tool_call_id": "1"}])
    messages = wanted.prompts[0].messages

    assert [(m.role, m.content) for m in messages] == [("system", "ab"), ("assistant", ""), ("tool", "r")]
    assert json.loads(messages[2].extra_json) == {"tool_call_id": "1"}


@pytest.mark.parametrize("raw", [
    b"", b"null", b"[]", b'"x"', b"{", b'{"messages": NaN}', b'{"a": Infinity}', b"\xff\xfe", b'{"a": "\\ud800"}', b'{"\\ud800": 1}',
    b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", b"[" * 200000, b'{"a": ' * 5000, b'{"a": 1' + b"0" * 5000 + b"}",
])
def test_a_body_that_is_no_sound_json_object_is_refused(raw):
    with pytest.raises(InvalidRequest):
        parse_json(raw)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)
_keys = st.sampled_from([*ChatBody.model_fields, *CompletionBody.model_fields, "tools", "response_format", "suffix"]) | st.text(max_size=6)
_message = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "x"]) | _json, "content": st.text(max_size=5) | _json, "name": _json})
_bodies = st.dictionaries(_keys, _json, max_size=5).flatmap(
    lambda d: st.one_of(st.just(d), st.lists(_message, max_size=2).map(lambda m: {**d, "messages": m}), st.text(max_size=4).map(lambda p: {**d, "prompt": p})))


@settings(max_examples=200, deadline=None)
@given(_bodies)
def test_any_json_object_is_understood_or_refused_with_a_typed_error(body):
    raw = json.dumps(body).encode()
    for parse in (parse_chat, parse_completion):
        try:
            parse(raw, request_id="r", limits=Limits(), headers={})
        except PlugmeshError as e:
            assert 400 <= e.http_status < 500  # noqa: PT017  (most bodies raise, some do not)
            json.dumps(error_object(e)).encode()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_refused_with_a_typed_error(raw):
    with pytest.raises(InvalidRequest):
        parse_chat(raw, request_id="r", limits=Limits(), headers={})


def shape_of(reply: httpx.Response) -> dict:
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in reply.text and ".py" not in reply.text
    return body["error"]


async def test_http_statuses_have_openais_shape(start):
    stack = await start(max_body_bytes=2048)
    async with httpx.AsyncClient(base_url=stack.url) as http:
        async def post(path="/v1/chat/completions", **kw):
            return await http.post(path, **kw)

        unknown = await post(json={"messages": USER, "foo": 1})
        assert (unknown.status_code, shape_of(unknown)["param"]) == (400, "foo")
        assert (await post(json={"messages": USER, "tools": [{}]})).status_code == 400
        malformed = await post(content=b"{", headers={"content-type": "application/json"})
        assert (malformed.status_code, shape_of(malformed)["type"]) == (400, "invalid_request_error")
        untyped = await post(content=b"{}")
        assert (untyped.status_code, shape_of(untyped)["code"]) == (415, "unsupported_media_type")
        large = await post(json={"messages": [{"role": "user", "content": "x" * 3000}]})
        assert (large.status_code, shape_of(large)["code"]) == (413, "payload_too_large")
        nowhere = await http.get("/v1/nothing")
        assert (nowhere.status_code, shape_of(nowhere)["code"]) == (404, "not_found")
        wrong = await http.get("/v1/chat/completions")
        assert (wrong.status_code, shape_of(wrong)["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")
        model = await post(json={"messages": USER, "model": "gpt-9"})
        assert (model.status_code, shape_of(model)["code"]) == (404, "model_not_found")
        long = await post(json={"messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 4090})
        assert (long.status_code, shape_of(long)["code"]) == (400, "context_length_exceeded")
        vocabulary = await post(json={"messages": USER, "logit_bias": {"300": 1}})
        assert (vocabulary.status_code, shape_of(vocabulary)["param"]) == (400, "logit_bias")
        template = await post(json={"messages": [{"role": "user", "content": "refuse me"}]})
        assert (template.status_code, shape_of(template)["message"]) == (400, "the template refuses the messages")
        outside = await post("/v1/completions", json={"prompt": [5, 300]})
        assert (outside.status_code, shape_of(outside)["param"]) == (400, "prompt")
        empty = await post("/v1/completions", json={"prompt": ""})
        assert (empty.status_code, shape_of(empty)["param"]) == (400, "prompt")
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    assert not decode.submits and stack.is_idle()


async def test_an_endless_body_without_a_length_is_cut_off(start):
    stack = await start(max_body_bytes=2048)

    async def endless():
        for _ in range(100000):
            yield b"x" * 1024
    async with httpx.AsyncClient(base_url=stack.url) as http:
        try:
            reply = await http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
            assert reply.status_code == 413
        except httpx.HTTPError:
            pass  # the server may close before the client has sent everything
    assert stack.value("plugmesh_gateway_refused_total", code="payload_too_large") == 1


async def test_a_body_that_does_not_come_is_a_408(start):
    stack = await start(body_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.service.http.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    line = await asyncio.wait_for(reader.readline(), 5)
    writer.close()

    assert b" 408 " in line


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60) | _bodies.map(lambda b: json.dumps(b).encode()))
def test_whatever_is_posted_gets_a_status_below_500(server, raw):
    reply = httpx.post(f"{server}/v1/completions", content=raw, headers={"content-type": "application/json"}, timeout=20)

    assert reply.status_code == 200 or (400 <= reply.status_code < 500 and shape_of(reply))


@pytest.fixture(scope="module")
def server():
    """A stack on a loop of its own thread."""
    import threading

    from .conftest import make_stack

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = asyncio.run_coroutine_threadsafe(make_stack(), loop).result(20)
    yield stack.url
    asyncio.run_coroutine_threadsafe(stack.stop(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


async def test_no_key_opens_nothing_but_the_probes(start, tmp_path):
    keys = {name: new_key() for name in ("user", "scraper")}
    file = tmp_path / "keys.toml"
    file.write_text(toml_entry("user", keys["user"]) + toml_entry("scraper", keys["scraper"], ("metrics",)))
    stack = await start(keys_file=file)
    async with httpx.AsyncClient(base_url=stack.url) as http:
        for method, path in [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/docs"),
                             ("GET", "/docs/static/swagger-ui.css"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("DELETE", "/v1/models")]:
            reply = await http.request(method, path)
            assert (reply.status_code, shape_of(reply)["type"], reply.headers["www-authenticate"]) == (401, "authentication_error", "Bearer")
            reply = await http.request(method, path, headers={"authorization": f"Bearer {new_key()}"})
            assert reply.status_code == 401
        assert (await http.get("/live")).status_code == (await http.get("/health")).status_code == 200
        scraper = {"authorization": f"Bearer {keys['scraper']}"}
        assert (await http.get("/metrics", headers=scraper)).status_code == 200
        assert (await http.post("/v1/completions", headers=scraper, json={"prompt": "x"})).status_code == 403
    assert (await stack.client(api_key=keys["user"]).completions.create(model="tiny", prompt="x")).choices[0].text == "Hello, world!"
    with pytest.raises(openai.AuthenticationError):
        await stack.client(api_key="wrong").models.list()
    assert keys["user"] not in file.read_text()


def test_a_key_file_that_is_wrong_stops_the_start_and_an_empty_one_lets_nobody_in(tmp_path, capsys):
    file = tmp_path / "keys.toml"
    with pytest.raises(ConfigError):
        KeyRing.load(file)
    for text in ("x = 1", "[[keys]]\nhash = 'sha256:zz'", "[[keys]]\nname='a'\nhash='md5:00'", "[[keys]", f"[[keys]]\nhash='{hash_key('a')}'\nscopes=['root']"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            KeyRing.load(file)
    file.write_text("")
    with pytest.raises(Unauthenticated):
        KeyRing.load(file).check("Bearer x", "")

    assert main(["laptop", "metrics"]) == 0
    printed = capsys.readouterr()
    file.write_text(printed.out)
    key = printed.err.split()[-1]
    assert KeyRing.load(file).check(f"Bearer {key}", "metrics") == "laptop"
    with pytest.raises(PermissionDenied):
        KeyRing.load(file).check(f"Bearer {key}", "inference")
    assert main([]) == 2


async def test_a_port_in_use_is_a_config_error(start):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(ConfigError):
            await start(port=s.getsockname()[1])
