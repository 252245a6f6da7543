"""Structured output and tool calls of the real mesh and model, through the official client and its helpers."""

from __future__ import annotations

import json
import re
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest

from plugmesh import models
from plugmesh.testing.cluster import running

pytestmark = [pytest.mark.nats, pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]  # test_serving.py has a short one for every run


class Address(pydantic.BaseModel):
    street: str = pydantic.Field(max_length=16)
    number: int = pydantic.Field(ge=1, le=999)


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str = pydantic.Field(max_length=16)
    mood: Literal["happy", "sad"]
    addresses: list[Address] = pydantic.Field(min_length=1, max_length=2)


class GetWeather(pydantic.BaseModel):
    """Weather of a city on the coming days."""

    city: str = pydantic.Field(max_length=16)
    num_days: int = pydantic.Field(ge=1, le=9)


class TellTime(pydantic.BaseModel):
    """The time at a place."""

    place: str = pydantic.Field(max_length=16)


TOOLS = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(TellTime)]
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module", params=["both engines", "llguidance"])
def client(request, tmp_path_factory):
    if models.find("smollm2") is None:
        pytest.skip("the default model is not here; plugmesh pull smollm2 fetches it")
    config = {"services": {"decode": {"num_kv_blocks": 256}, "prefill": {"num_kv_blocks": 256}}}
    if request.param != "both engines":
        config["services"]["grammar"] = {"plugins": [request.param]}
    with running(tmp_path_factory.mktemp("mesh"), config) as cluster, openai.OpenAI(
        base_url=cluster.base_url, api_key="none", max_retries=0, timeout=300) as c:
        yield c


def test_parse_gives_the_pydantic_model_hot_and_cold(client):
    for temperature, seed in ((0.0, 1), (1.0, 2), (1.0, 3)):
        reply = client.chat.completions.parse(
            model="smollm2", messages=[{"role": "user", "content": "Invent a person."}], response_format=Person, temperature=temperature, seed=seed, max_tokens=256)

        assert "stop" == reply.choices[0].finish_reason
        assert isinstance(reply.choices[0].message.parsed, Person)


def test_the_stream_helper_parses_what_came(client):
    with client.chat.completions.stream(
        model="smollm2", messages=[{"role": "user", "content": "Invent a person."}], response_format=Person, temperature=1.0, seed=5, max_tokens=256) as stream:
        events = list(stream)

    done = next(e for e in events if e.type == "content.done")
    assert isinstance(done.parsed, Person)
    assert done.content == "".join(e.delta for e in events if e.type == "content.delta")
    assert len([e for e in events if e.type == "content.delta"]) > 5


def test_json_object_is_json(client):
    reply = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Give me a small JSON object."}], response_format={"type": "json_object"}, temperature=0,
        max_tokens=64)

    content = reply.choices[0].message.content
    assert content.startswith("{")
    if reply.choices[0].finish_reason == "stop":  # this small model may go on for long
        assert isinstance(json.loads(content), dict)


def test_vllms_names_work_on_completions(client):
    def text(**extra):
        return client.completions.create(model="smollm2", prompt="The answer is", temperature=1.0, seed=4, max_tokens=64, extra_body=extra).choices[0].text

    assert text(guided_choice=["entirely", "not at all"]) in ("entirely", "not at all")
    assert re.fullmatch(r"[A-F]{3}-[0-9]{2}", text(guided_regex="[A-F]{3}-[0-9]{2}"))
    assert re.fullmatch(r"(ab)+c", text(guided_grammar='root ::= "ab" root | "abc"'))
    jsonschema.validate(json.loads(text(structured_outputs={"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}})),
                        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3})


def test_a_required_call_is_parsed_by_the_helper(client):
    reply = client.chat.completions.parse(model="smollm2", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=128)
    (call,) = reply.choices[0].message.tool_calls

    assert ("tool_calls", None) == (reply.choices[0].finish_reason, reply.choices[0].message.content)
    assert isinstance(call.function.parsed_arguments, GetWeather | TellTime)
    assert call.function.name == type(call.function.parsed_arguments).__name__


def test_calls_stream_as_deltas_of_their_arguments(client):
    with client.chat.completions.stream(
        model="smollm2", messages=ASK, tools=TOOLS, tool_choice="required", temperature=1.0, seed=3, max_tokens=256, parallel_tool_calls=False) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    (done,) = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    deltas = [e for e in events if e.type == "tool_calls.function.arguments.delta"]

    assert done.name in ("GetWeather", "TellTime")
    assert len(deltas) > 2
    assert done.arguments == "".join(d.arguments_delta for d in deltas)
    assert isinstance(message.tool_calls[0].function.parsed_arguments, GetWeather | TellTime)


def test_a_named_function_is_called_exactly_once_and_its_result_goes_back(client):
    named = {"type": "function", "function": {"name": "TellTime"}}
    reply = client.chat.completions.parse(model="smollm2", messages=ASK, tools=TOOLS, tool_choice=named, temperature=1.0, seed=9, max_tokens=128)
    message = reply.choices[0].message
    (call,) = message.tool_calls
    answer = client.chat.completions.create(model="smollm2", temperature=0, max_tokens=24, tools=TOOLS, tool_choice="none", messages=[
        *ASK, {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "It is noon."}])

    assert ("stop", "TellTime") == (reply.choices[0].finish_reason, call.function.name)
    assert isinstance(call.function.parsed_arguments, TellTime)
    assert answer.choices[0].message.content


def test_auto_says_something_or_calls(client):
    for seed in range(3):
        reply = client.chat.completions.parse(model="smollm2", messages=ASK, tools=TOOLS, temperature=0.7, seed=seed, max_tokens=96)
        choice = reply.choices[0]

        assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)
        assert "<tool_call>" not in (choice.message.content or "")
        for call in choice.message.tool_calls or ():
            assert isinstance(call.function.parsed_arguments, GetWeather | TellTime)


@pytest.mark.parametrize(("body", "param", "keyword"), [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "object", "properties": {"a": {"type": "string", "pattern": r"(?=x)\1"}}}}}}, "response_format.json_schema.schema/properties/a/pattern", "pattern"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": r"(?=x)\1"}}}}}]},
     "tools[0].function.parameters/properties/a/pattern", "pattern"),
    ({"extra_body": {"guided_json": {"type": "object", "properties": {"a": {"$ref": "https://example.org/other.json"}}}}},
     "guided_json/properties/a/$ref", "$ref"),
])
def test_what_cannot_be_enforced_is_named_with_its_place(client, body, param, keyword):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="smollm2", messages=ASK, **body)

    assert (param, "unsupported_grammar") == (e.value.body["param"], e.value.body["code"])
    assert keyword in e.value.body["message"]
