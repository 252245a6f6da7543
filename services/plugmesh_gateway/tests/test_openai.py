"""The official client against the gateway: shapes, parameters, usage."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest

from .conftest import EOS, make_stack, say, until


async def test_chat_answers_whole_with_usage(start):
    stack = await start()
    reply = await stack.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])

    assert reply.choices[0].message.content == "Hello, world!"
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len("<user>hi"), len("Hello, world!") + 1)
    assert reply.usage.prompt_tokens_details.cached_tokens == 7
    assert stack.is_idle()


async def test_chat_streams_the_same_text_with_exact_chunks(start):
    stack = await start()
    chunks = [c async for c in await stack.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True, stream_options={"include_usage": True})]

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world!"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 14
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"


async def test_stream_ends_with_done_and_carries_event_stream_headers(start):
    stack = await start()
    async with httpx.AsyncClient() as http:
        reply = await http.post(f"{stack.url}/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": 3})

    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in reply.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]] == ["H", "e", "l"]


def test_the_synchronous_client_streams(start_in_thread):
    url = start_in_thread()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    text = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True))
    whole = client.completions.create(model="tiny", prompt="x", max_tokens=5)

    assert text == "Hello, world!"
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("Hello", "length")


@pytest.fixture
def start_in_thread():
    """A stack on a loop of its own thread, for callers that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    made = []

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

    def go() -> str:
        stack = run(make_stack())
        made.append(stack)
        return stack.url

    yield go
    for stack in made:
        run(stack.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


async def test_completions_take_every_form_of_prompt(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    await stack.decode(lambda r, i: [*bytes(reversed(r.token_ids)), EOS])
    c = stack.client()

    assert (await c.completions.create(model="tiny", prompt="abc")).choices[0].text == "cba"
    assert (await c.completions.create(model="tiny", prompt=[97, 98])).choices[0].text == "ba"
    many = await c.completions.create(model="tiny", prompt=["ab", "cd"], n=2)
    assert [(x.index, x.text) for x in many.choices] == [(0, "ba"), (1, "ba"), (2, "dc"), (3, "dc")]
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (4, 12)
    ids = await c.completions.create(model="tiny", prompt=[[97, 98], [99, 100]], echo=True)
    assert [x.text for x in ids.choices] == ["abba", "cddc"]
    echoed = await c.completions.create(model="tiny", prompt="xy", echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in echoed]) == "xyyx"


async def test_n_choices_stream_under_their_own_index(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    await stack.decode(say("choice #"))
    texts = {0: "", 1: "", 2: ""}
    finished = []
    async for chunk in await stack.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        finished += [chunk.choices[0].index] if chunk.choices[0].finish_reason else []

    assert texts == {0: "choice 0", 1: "choice 1", 2: "choice 2"}
    assert sorted(finished) == [0, 1, 2]


@pytest.mark.parametrize(("stop", "text", "num_tokens"), [
    ("world", "Hello, ", 12), (["lo", "never"], "Hel", 5), (["zzz"], "Hello, world!", 14), (["Hel"], "", 3),
])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it_and_cancels_the_rest(start, stop, text, num_tokens, stream):
    stack = await start()
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    is_cut = stop != ["zzz"]
    if is_cut:
        decode.pause_until_cancelled(num_tokens)
    c = stack.client()
    if stream:
        got, reasons, usage = "", [], None
        async for chunk in await c.completions.create(model="tiny", prompt="x", max_tokens=99, stop=stop, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                got += choice.text
                reasons += [choice.finish_reason] if choice.finish_reason else []
    else:
        reply = await c.completions.create(model="tiny", prompt="x", max_tokens=99, stop=stop)
        got, reasons, usage = reply.choices[0].text, [reply.choices[0].finish_reason], reply.usage

    assert (got, reasons, usage.completion_tokens) == (text, ["stop"], num_tokens)
    await until(stack.is_idle)
    assert [x.one_sequence for x in decode.cancels] == [False] * is_cut


async def test_a_stop_string_of_one_choice_leaves_the_others_running(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    decode = (await stack.decode(say("ab#cdefghij"))).servicer
    decode.pause_until_cancelled(5)
    reply = await stack.client().completions.create(model="tiny", prompt="x", max_tokens=50, n=2, stop="0c")

    assert [c.text for c in reply.choices] == ["ab", "ab1cdefghij"]
    assert [(c.sequence, c.one_sequence) for c in decode.cancels] == [(0, True)]
    await until(stack.is_idle)


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    await stack.decode(lambda r, i: [*"é!".encode(), EOS])
    for stream in (False, True):
        made = await stack.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2, stream=stream)
        if stream:
            content = [t async for c in made if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        else:
            content = made.choices[0].logprobs.content

        assert b"".join(bytes(t.bytes) for t in content) == "é!".encode()
        assert [t.logprob for t in content] == [-0.5] * 3
        assert [[a.logprob for a in t.top_logprobs] for t in content] == [[-0.5, -1.5]] * 3
        assert bytes(content[2].top_logprobs[1].bytes) == b'"'


async def test_legacy_logprobs_have_offsets_and_name_partial_characters(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    await stack.decode(lambda r, i: [*"aé!".encode(), EOS])
    reply = await stack.client().completions.create(model="tiny", prompt="x", logprobs=1)
    lp = reply.choices[0].logprobs

    assert lp.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert lp.token_logprobs == [-0.5] * 4
    assert [list(d) for d in lp.top_logprobs] == [["a"], ["bytes:\\xc3"], ["bytes:\\xa9"], ["!"]]
    assert len(lp.text_offset) == 4 and lp.text_offset[0] == 0


async def test_every_parameter_reaches_decode(start):
    stack = await start()
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    await stack.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], temperature=0.5, top_p=0.25, max_completion_tokens=7, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={"65": -100}, seed=11, n=2, user="me",
        extra_body={"top_k": 4, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9], "priority": -3})
    r = decode.submits[0]
    s = r.sampling

    assert (s.temperature, s.top_p, s.max_tokens, s.presence_penalty, s.frequency_penalty) == (0.5, 0.25, 7, 0.5, -0.5)
    assert (dict(s.logit_bias), s.seed, s.num_sequences, s.top_k, s.min_p) == ({65: -100.0}, 11, 2, 4, 0.125)
    assert (s.repetition_penalty, s.min_tokens, s.ignore_eos, list(s.stop_token_ids), r.priority) == (1.5, 2, True, [9], -3)
    assert r.deadline_unix_s > 0


async def test_a_request_without_a_seed_gets_one_from_the_gateway(start):
    stack = await start()
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    for _ in range(2):
        await stack.client().completions.create(model="tiny", prompt="x")

    assert all(r.sampling.HasField("seed") for r in decode.submits)
    assert decode.submits[0].sampling.seed != decode.submits[1].sampling.seed


async def test_models_are_those_that_decode_serves(start):
    stack = await start()
    c = stack.client()

    assert [m.id for m in (await c.models.list()).data] == ["tiny"]
    assert (await c.models.retrieve("tiny")).id == "tiny"
    assert (await c.models.retrieve("v1")).id == "tiny"
    with pytest.raises(openai.NotFoundError) as e:
        await c.models.retrieve("other")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await c.completions.create(model="other", prompt="x")
    assert (await c.completions.create(model="v1", prompt="x", max_tokens=1)).choices[0].text == "H"


async def test_thirty_two_chats_at_once_share_one_stream_per_peer(start):
    stack = await start(peers=False)
    tokenizer = (await stack.tokenizer()).servicer
    decode = (await stack.decode(lambda r, i: [*r.token_ids[6:], EOS])).servicer
    decode.token_delay_s = 0.002
    c = stack.client()

    async def one(k: int) -> tuple[str, int]:
        text, usage = "", None
        async for chunk in await c.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": f"number {k} " * 4}], stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            text += "".join(x.delta.content or "" for x in chunk.choices)
        return text, usage.completion_tokens

    results = await asyncio.gather(*(one(k) for k in range(32)))

    assert results == [(f"number {k} " * 4, len(f"number {k} " * 4) + 1) for k in range(32)]
    # One frame to the tokenizer per frame from decode, whatever the number of rows, besides opening and closing.
    assert tokenizer.num_frames <= stack.value("plugmesh_gateway_frames_total") + 3 * 32
    assert decode.num_steps < sum(n for _, n in results) / 4
    await until(stack.is_idle)


async def test_documents_and_probes_work_offline(start):
    stack = await start()
    async with httpx.AsyncClient(base_url=stack.url) as http:
        page = await http.get("/docs")
        assert "/docs/static/swagger-ui-bundle.js" in page.text and "https://" not in page.text.replace("https://cdn", "CDN")
        assert "CDN" not in page.text
        assert (await http.get("/docs/static/swagger-ui-bundle.js")).status_code == 200
        document = (await http.get("/openapi.json")).json()
        assert "repetition_penalty" in document["components"]["schemas"]["ChatBody"]["properties"]
        assert (await http.get("/live")).json() == {"status": "ok"}
        assert (await http.get("/health")).status_code == 200
        await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4})
        text = (await http.get("/metrics")).text
        assert 'plugmesh_gateway_requests_total{outcome="length",route="completions"} 1.0' in text
        assert 'plugmesh_ttft_seconds_count{route="completions"} 1.0' in text
        assert 'plugmesh_gateway_tokens_total{kind="completion"} 4.0' in text


async def test_health_says_what_is_missing(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    async with httpx.AsyncClient(base_url=stack.url) as http:
        reply = await http.get("/health")

    assert (reply.status_code, reply.json()["missing"]) == (503, ["decode"])
