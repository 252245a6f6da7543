"""Tools: how they are read, shown to the model in its family's way, enforced, and given back as OpenAI's tool calls."""

from __future__ import annotations

import json

import openai
import pydantic
import pytest

from plugmesh.errors import InvalidRequest
from plugmesh_gateway.request import ChatPrompt, GrammarWanted, Message
from plugmesh_gateway.structured import GrammarSpec
from plugmesh_gateway.tool_formats import FORMATS, HERMES, LLAMA3, SMOLLM2, choose_format, tools_grammar, with_tools
from plugmesh_gateway.tools import read_tools

from .conftest import say

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city.", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}}}
NOW = {"type": "function", "function": {"name": "now"}}
USER = [{"role": "user", "content": "hi"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


# Reading.


@pytest.mark.parametrize(("args", "param"), [
    (([{"type": "custom"}], None), "tools[0].type"), (([3], None), "tools[0].type"), (([{"type": "function"}], None), "tools[0].function"),
    (([{**NOW, "x": 1}], None), "tools[0].x"), (([{"type": "function", "function": {"name": "a b"}}], None), "tools[0].function.name"),
    (([{"type": "function", "function": {"name": "a", "arguments": {}}}], None), "tools[0].function.arguments"),
    (([{"type": "function", "function": {"name": "a", "strict": "yes"}}], None), "tools[0].function.strict"),
    (([{"type": "function", "function": {"name": "a", "parameters": []}}], None), "tools[0].function.parameters"),
    (([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], None), "tools[0].function.parameters/type"),
    (([NOW, NOW], None), "tools[1].function.name"), (([NOW] * 129, None), "tools"), (([], "auto"), "tool_choice"), ((None, "required"), "tool_choice"),
    (([NOW], "any"), "tool_choice"), (([NOW], {"type": "custom"}), "tool_choice.type"), (([NOW], {"type": "function"}), "tool_choice.function.name"),
    (([NOW], {"type": "function", "function": {"name": "f"}}), "tool_choice.function.name"),
    (([NOW], {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}), "tool_choice.allowed_tools"),
])
def test_malformed_tools_are_refused_by_their_place(args, param):
    with pytest.raises(InvalidRequest) as e:
        read_tools(*args, None)

    assert (e.value.param, e.value.http_status) == (param, 400)


def test_choices_say_which_tools_may_be_called_and_how_often():
    def facts(choice, parallel=None):
        read = read_tools([WEATHER, NOW], choice, parallel)
        return None if read is None else (read.choice, [t.name for t in read.allowed], len(read.shown), read.is_parallel)

    both = ["get_weather", "now"]
    assert facts(None) == facts("auto") == ("auto", both, 2, True)
    assert facts("none") is None
    assert facts("required", False) == ("required", both, 2, False)
    assert facts({"type": "function", "function": {"name": "now"}}) == ("named", ["now"], 2, False)
    assert facts({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}) == ("required", ["now"], 2, True)


# The prompt.


def test_the_family_is_known_by_its_template_or_its_name():
    hermes = "{% if tools %}<tool_call>\\n{'name': ..., \"arguments\": }{% endif %}".replace("'name': ...,", '"name": x, ')
    assert choose_format("m", hermes) == (HERMES, True)
    assert choose_format("m", '{% if tools %}ipython {"name": x, "parameters": y}{% endif %}') == (LLAMA3, True)
    assert choose_format("smollm2", "{{ messages }}") == (SMOLLM2, False)
    assert choose_format("SmolLM2-135M-Instruct", "") == (SMOLLM2, False)
    assert choose_format("Llama-3.2-1B", "") == (LLAMA3, False)
    assert choose_format("whatever", "{% if tools %}[TOOL_CALLS]{% endif %}") == (HERMES, False)
    assert choose_format("smollm2", hermes, "llama3") == (LLAMA3, False)
    assert choose_format("smollm2", hermes, "hermes") == (HERMES, True)


HISTORY = ChatPrompt((
    Message("system", "Be brief."), Message("user", "hi"),
    Message("assistant", "", "", json.dumps({"tool_calls": [CALL, {**CALL, "id": "call_2"}], "refusal": None})),
    Message("tool", "sunny", "", '{"tool_call_id": "call_1"}'), Message("tool", "rain", "", '{"tool_call_id": "call_2"}'), Message("user", "and?")))


def test_a_template_that_knows_tools_gets_them_with_arguments_as_objects():
    tools = read_tools([WEATHER, NOW], None, None)
    out = with_tools(HISTORY, tools.shown, HERMES, template_knows=True)

    assert [t["function"]["name"] for t in json.loads(out.tools_json)] == ["get_weather", "now"]
    assert "strict" not in out.tools_json
    assert [m.role for m in out.messages] == [m.role for m in HISTORY.messages]
    extra = json.loads(out.messages[2].extra_json)
    assert extra["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}} and "refusal" not in extra


@pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)
def test_a_template_that_knows_none_gets_them_written_out(how):
    out = with_tools(HISTORY, read_tools([WEATHER, NOW], None, None).shown, how, template_knows=False)

    assert [m.role for m in out.messages] == ["system", "user", "assistant", "user", "user"]
    assert out.messages[0].content.endswith("\n\nBe brief.") and '"get_weather"' in out.messages[0].content and not out.tools_json
    call = how.call("get_weather", {"city": "Paris"})
    assert out.messages[2].content == how.block([call, call]) and not out.messages[2].extra_json
    assert out.messages[3].content == "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nrain\n</tool_response>"


def test_a_chat_without_tools_is_left_alone():
    plain = ChatPrompt((Message("user", "hi"),))
    assert with_tools(plain, (), HERMES, template_knows=False) is plain
    assert with_tools(HISTORY, (), SMOLLM2, template_knows=False).messages[0].content == "Be brief."


@pytest.mark.parametrize("calls", [3, [3], [{}], [{"function": {"name": 1}}]])
@pytest.mark.parametrize("template_knows", [False, True])
def test_malformed_calls_among_the_messages_are_refused(calls, template_knows):
    chat = ChatPrompt((Message("user", "x"), Message("assistant", "", "", json.dumps({"tool_calls": calls}))))
    with pytest.raises(InvalidRequest) as e:
        with_tools(chat, (), HERMES, template_knows=template_knows)

    assert e.value.param.startswith("messages[1].tool_calls")


# The grammar.


def test_a_form_beside_tools_is_json_and_only_where_calls_may_be_left_out():
    auto, required = read_tools([NOW], "auto", None), read_tools([NOW], "required", None)
    free = GrammarWanted(GrammarSpec("json_schema", '{"type": "array"}', whitespace="compact"), "response_format.json_schema.schema")
    both = tools_grammar(auto, HERMES, free)

    assert json.loads(both.spec.source)["format"]["elements"][0] == {"type": "json_schema", "json_schema": {"type": "array"}}
    assert both.spec.whitespace == "compact"
    for tools, how, form in ((required, HERMES, free), (auto, LLAMA3, free), (auto, HERMES, GrammarWanted(GrammarSpec("regex", "a"), "guided_regex"))):
        with pytest.raises(InvalidRequest) as e:
            tools_grammar(tools, how, form)
        assert e.value.param == form.param.partition(".")[0]


def test_every_schema_of_a_tag_is_found_in_the_body():
    for how in FORMATS.values():
        for choice in ("auto", "required", {"type": "function", "function": {"name": "now"}}):
            wanted = tools_grammar(read_tools([WEATHER, NOW], choice, None), how, None)
            tag = json.loads(wanted.spec.source)
            for pointer, param in wanted.where:
                node = tag
                for key in pointer.split("/")[1:]:
                    node = node[int(key)] if isinstance(node, list) else node[key]
                assert node == (WEATHER["function"]["parameters"] if param.startswith("tools[0]") else {"type": "object", "properties": {}, "additionalProperties": False})
            assert {p for _, p in wanted.where} == ({"tools[1].function.parameters"} if choice not in ("auto", "required") else
                                                    {"tools[0].function.parameters", "tools[1].function.parameters"})


# Answers.


async def stack_saying(start, text, **settings):
    stack = await start(peers=False, **settings)
    tokenizer = (await stack.tokenizer()).servicer
    await stack.grammar()
    decode = (await stack.decode(say(text))).servicer
    return stack, tokenizer, decode


TWO = HERMES.block([HERMES.call("get_weather", {"city": "Pa\"r}is"}), HERMES.call("now", {})])


async def test_calls_come_whole(start):
    stack, tokenizer, decode = await stack_saying(start, "Let me see.\n" + TWO)
    reply = await stack.client().chat.completions.create(model="tiny", messages=USER, tools=[WEATHER, NOW])
    message = reply.choices[0].message

    assert (message.content, reply.choices[0].finish_reason) == ("Let me see.", "tool_calls")
    assert [(c.function.name, json.loads(c.function.arguments), c.type) for c in message.tool_calls] == [
        ("get_weather", {"city": "Pa\"r}is"}, "function"), ("now", {}, "function")]
    assert len({c.id for c in message.tool_calls}) == 2 and all(c.id.startswith("call_") for c in message.tool_calls)
    assert tokenizer.chats[0].messages[0].role == "system" and decode.submits[0].grammar.spec.kind == "structural_tag"


async def test_calls_stream_incrementally(start):
    stack, _, _ = await stack_saying(start, "Let me see.\n" + TWO)
    chunks = [c async for c in await stack.client().chat.completions.create(model="tiny", messages=USER, tools=[WEATHER, NOW], stream=True, n=2)]
    for index in (0, 1):
        deltas = [c.choices[0].delta for c in chunks if c.choices[0].index == index]
        calls = [t for d in deltas for t in d.tool_calls or ()]

        assert deltas[0].role == "assistant" and deltas[0].content is None
        assert "".join(d.content or "" for d in deltas) == "Let me see."
        assert [(t.index, t.function.name) for t in calls if t.id] == [(0, "get_weather"), (1, "now")]
        assert len([t for t in calls if t.index == 0]) > 10  # a token each
        assert json.loads("".join(t.function.arguments for t in calls if t.index == 0)) == {"city": "Pa\"r}is"}
        assert all(t.function.name is None for t in calls if not t.id)
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].index == index and c.choices[0].finish_reason] == ["tool_calls"]


async def test_finish_reasons_are_openais(start):
    stack, _, _ = await stack_saying(start, HERMES.block([HERMES.call("now", {})]))
    create = stack.client().chat.completions.create
    named = await create(model="tiny", messages=USER, tools=[NOW], tool_choice={"type": "function", "function": {"name": "now"}})
    required = await create(model="tiny", messages=USER, tools=[NOW], tool_choice="required")
    cut = await create(model="tiny", messages=USER, tools=[NOW], max_tokens=45)
    none = await create(model="tiny", messages=USER, tools=[NOW], tool_choice="none")

    assert [r.choices[0].finish_reason for r in (named, required, cut, none)] == ["stop", "tool_calls", "length", "stop"]
    assert named.choices[0].message.content is None and named.choices[0].message.tool_calls[0].function.arguments == "{}"
    assert cut.choices[0].message.tool_calls[0].function.name == "now"
    assert none.choices[0].message.tool_calls is None and "<tool_call>" in none.choices[0].message.content


@pytest.mark.parametrize(("text", "content"), [
    ("<tool_call>[]</tool_call>", ""), ("<tool_call>[\n]</tool_call>\n", ""), ("Hm.\n<tool_call>[]</tool_call>", "Hm."), ("<tool_call>[]</tool_call>\nNo.", "No."),
])
async def test_a_block_without_a_call_is_no_call_and_no_text(start, text, content):
    """SmolLM2's way to say that no tool fits."""
    stack, _, decode = await stack_saying(start, text, tool_format="smollm2")
    create = stack.client().chat.completions.create
    whole = (await create(model="tiny", messages=USER, tools=[WEATHER, NOW])).choices[0]
    chunks = [c.choices[0] async for c in await create(model="tiny", messages=USER, tools=[WEATHER, NOW], stream=True)]

    assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (content, None, "stop")
    assert "".join(c.delta.content or "" for c in chunks) == content
    assert [c for c in chunks if c.delta.tool_calls] == []
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["stop"]
    assert decode.submits[0].grammar.spec.kind == "structural_tag"


async def test_logprobs_of_calls_are_complete(start):
    stack, _, _ = await stack_saying(start, "a\n" + TWO)
    chunks = [c async for c in await stack.client().chat.completions.create(
        model="tiny", messages=USER, tools=[WEATHER, NOW], stream=True, logprobs=True)]

    got = b"".join(bytes(t.bytes) for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content)
    assert got.decode() == "a\n" + TWO


class GetWeather(pydantic.BaseModel):
    """Weather of a city."""

    city: str
    days: int


async def test_the_clients_helpers_parse_models_and_calls(start):
    text = HERMES.block([HERMES.call("GetWeather", {"city": "Rome", "days": 3})])
    stack, _, _ = await stack_saying(start, text)
    client = stack.client()
    tools = [openai.pydantic_function_tool(GetWeather)]
    parsed = await client.chat.completions.parse(model="tiny", messages=USER, tools=tools)
    async with client.chat.completions.stream(model="tiny", messages=USER, tools=tools) as stream:
        events = [e async for e in stream]
        final = await stream.get_final_completion()

    for message in (parsed.choices[0].message, final.choices[0].message):
        assert message.tool_calls[0].function.parsed_arguments == GetWeather(city="Rome", days=3)
    assert "tool_calls.function.arguments.delta" in {e.type for e in events}
    done = next(e for e in events if e.type == "tool_calls.function.arguments.done")
    assert (done.name, done.parsed_arguments) == ("GetWeather", GetWeather(city="Rome", days=3))


async def test_the_clients_helpers_parse_response_formats(start):
    stack, _, _ = await stack_saying(start, '{"city": "Rome", "days": 3}')
    client = stack.client()
    parsed = await client.chat.completions.parse(model="tiny", messages=USER, response_format=GetWeather)
    async with client.chat.completions.stream(model="tiny", messages=USER, response_format=GetWeather) as stream:
        events = [e async for e in stream]

    assert parsed.choices[0].message.parsed == GetWeather(city="Rome", days=3)
    assert next(e for e in events if e.type == "content.done").parsed == GetWeather(city="Rome", days=3)
    assert len([e for e in events if e.type == "content.delta"]) > 5


async def test_a_configured_format_is_used_for_prompt_and_answer(start):
    stack, tokenizer, _ = await stack_saying(start, LLAMA3.block([LLAMA3.call("now", {})]), tool_format="llama3")
    reply = await stack.client().chat.completions.create(model="tiny", messages=USER, tools=[NOW])

    assert reply.choices[0].message.tool_calls[0].function.name == "now"
    assert '"parameters"' in tokenizer.chats[0].messages[0].content
