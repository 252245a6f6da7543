"""Instances that die, stop, drain or refuse in the middle of streams; clients that leave or do not read."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httpx
import openai
import pytest

from plugmesh.errors import ContextLengthExceeded, Overloaded, Unavailable
from plugmesh.hookspecs import hookimpl
from plugmesh.records import Route, RouterRecord

from .conftest import ScriptedDecode, say, until

TEXT = "The quick brown fox — jumps über the lazy dog."


async def stream_text(stack, into: list[str] | None = None, **kw) -> tuple[str, list[str], int]:
    """Text, finish reasons and completion tokens of one streamed completion; `into` receives the pieces as they come."""
    pieces = into if into is not None else []
    reasons, num_tokens = [], 0
    async for chunk in await stack.client().completions.create(
        model="tiny", prompt="x", max_tokens=200, stream=True, stream_options={"include_usage": True}, **kw):
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        for c in chunk.choices:
            pieces.append(c.text)
            reasons += [c.finish_reason] if c.finish_reason else []
    return "".join(pieces), reasons, num_tokens


async def two_decodes(start, pause_after: int, **settings):
    stack = await start(peers=False, **settings)
    tokenizer = await stack.tokenizer()
    peers = [await stack.decode(say(TEXT)), await stack.decode(say(TEXT))]
    for p in peers:
        p.servicer.pause_after = pause_after
    return stack, tokenizer, peers


def user_of(peers):
    """(the peer that has the request, the other one)"""
    return peers if peers[0].servicer.submits else peers[::-1]


@pytest.mark.parametrize("tell", [True, False], ids=["table_notices", "stream_breaks"])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_killed_decode_instance_loses_and_doubles_nothing(start, tell, n):
    stack, _, peers = await two_decodes(start, 10)
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces, n=n))
    await until(lambda: sum(len(p) for p in pieces) == 10 * n)
    used, other = user_of(peers)
    other.servicer.pause_after = 10**9
    await stack.mesh.kill(used, tell=tell)
    text, reasons, num_tokens = await task

    assert sorted(text) == sorted(TEXT * n) and (n > 1 or text == TEXT)
    assert reasons == ["stop"] * n
    assert num_tokens == n * (len(TEXT.encode()) + 1)
    resumed = other.servicer.submits[0]
    assert [len(r.token_ids) for r in resumed.resume] == [10] * n
    assert resumed.request_id.endswith("#2") and used.servicer.submits[0].request_id.endswith("#1")
    assert resumed.sampling.seed == used.servicer.submits[0].sampling.seed
    assert stack.value("plugmesh_gateway_migrated_total", cause="left" if tell else "lost") == 1
    stack.mesh.peers.pop(used.info.instance_id, None)
    await until(stack.is_idle)


async def test_a_request_waits_for_the_only_decode_instance_to_come_back(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    old = await stack.decode(say(TEXT), name="decode-a")
    old.servicer.pause_after = 7
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: sum(map(len, pieces)) == 7)
    await stack.mesh.kill(old)
    async with httpx.AsyncClient(base_url=stack.url) as http:
        refused = await http.post("/v1/completions", json={"prompt": "x"})
    await stack.decode(say(TEXT), name="decode-a")

    assert (await task)[0] == TEXT
    assert (refused.status_code, refused.headers["retry-after"], refused.json()["error"]["code"]) == (503, "2", "unavailable")
    await until(stack.is_idle)


async def test_nobody_comes_back_is_a_typed_error_in_time(start):
    stack = await start(peers=False, recovery_wait_s=0.3)
    await stack.tokenizer()
    old = await stack.decode(say(TEXT))
    old.servicer.pause_after = 7
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: sum(map(len, pieces)) == 7)
    await stack.mesh.kill(old)
    with pytest.raises(openai.APIError) as e:
        await asyncio.wait_for(task, 5)

    assert e.value.code == "unavailable"
    assert "".join(pieces) == TEXT[:7]
    await until(stack.is_idle)


async def test_a_stopped_decode_instance_is_noticed_without_the_table(start):
    stack, _, peers = await two_decodes(start, 12, stall_s=0.4)
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: sum(map(len, pieces)) > 9)
    used, other = user_of(peers)
    used.servicer.is_silent = True
    other.servicer.pause_after = 10**9
    text, reasons, _ = await task

    assert (text, reasons) == (TEXT, ["stop"])
    assert stack.value("plugmesh_gateway_migrated_total", cause="stalled") == 1
    used.servicer.is_silent = False  # it wakes: what it still sends belongs to an attempt nobody knows
    used.servicer.poke()
    await until(stack.is_idle)


async def test_an_instance_that_computes_long_but_answers_probes_keeps_its_request(start):
    stack, _, peers = await two_decodes(start, 0, stall_s=0.6)
    task = asyncio.create_task(stream_text(stack))
    await until(lambda: any(p.servicer.submits for p in peers))
    used, _ = user_of(peers)
    await asyncio.sleep(1.5)  # more than twice the stall limit, with probes answered
    used.servicer.pause_after = 10**9
    used.servicer.poke()

    assert (await task)[0] == TEXT
    assert sum(len(p.servicer.submits) for p in peers) == 1


async def test_an_instance_that_answers_but_makes_no_steps_is_given_up(start):
    stack, _, peers = await two_decodes(start, 5, stall_s=0.6, hang_s=0.6)
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: sum(map(len, pieces)) == 5)
    _, other = user_of(peers)
    other.servicer.pause_after = 10**9

    assert (await task)[0] == TEXT
    assert stack.value("plugmesh_gateway_migrated_total", cause="stalled") == 1


async def test_a_draining_instance_gets_no_new_request_and_its_refusal_moves_on(start):
    stack, _, peers = await two_decodes(start, 10**9)
    stack.mesh.set_state(peers[0], "draining")
    for _ in range(3):
        await stream_text(stack)
    assert [len(p.servicer.submits) for p in peers] == [0, 3]

    stack.mesh.set_state(peers[0], "ready")
    for p in peers:
        p.servicer.submits.clear()
    peers[1].servicer.error = Unavailable("shutting down")  # its lease does not say so yet
    for _ in range(4):
        assert (await stream_text(stack))[0] == TEXT
    assert len(peers[0].servicer.submits) == 4
    await until(stack.is_idle)


async def test_a_full_instance_leaves_the_request_to_another_and_all_full_is_429(start):
    stack, _, peers = await two_decodes(start, 10**9)
    peers[0].servicer.error = Overloaded("full", retry_after_s=3)
    for _ in range(4):
        assert (await stream_text(stack))[0] == TEXT
    peers[1].servicer.error = Overloaded("full", retry_after_s=3)
    await asyncio.sleep(0.6)  # the suspicion of the first ends
    with pytest.raises(openai.RateLimitError) as e:
        await stack.client().completions.create(model="tiny", prompt="x")

    assert e.value.response.headers["retry-after"] == "3"
    await until(stack.is_idle)


async def test_an_error_of_the_engine_keeps_its_type(start):
    stack = await start()
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    decode.error = ContextLengthExceeded("too long", param="messages")
    with pytest.raises(openai.BadRequestError) as e:
        await stack.client().completions.create(model="tiny", prompt="x", stream=True)

    assert (e.value.code, e.value.param) == ("context_length_exceeded", "messages")
    await until(stack.is_idle)


@pytest.mark.parametrize("stop", [[], ["lazy"]], ids=["no_stop", "stop_string"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_lost_tokenizer_is_replaced_in_the_middle_of_a_character(start, how, stop):
    stack = await start(peers=False, stall_s=0.4)
    first = await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    cut = TEXT.encode().index("ü".encode()) + 1
    decode.pause_after = cut
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces, stop=stop))
    await until(lambda: "".join(pieces).endswith(" "))
    await until(lambda: decode.num_steps == cut)
    second = await stack.tokenizer()
    if how == "killed":
        await stack.mesh.kill(first)
    else:
        first.servicer.is_silent = True
    decode.pause_after = 10**9
    decode.poke()
    text, reasons, _ = await asyncio.wait_for(task, 10)

    assert (text, reasons) == (TEXT[: TEXT.index("lazy")] if stop else TEXT, ["stop"])
    assert second.servicer.num_replays == 1
    assert len(decode.submits) == 1
    first.servicer.is_silent = False
    stack.mesh.peers.pop(first.info.instance_id, None)
    await until(stack.is_idle)


async def test_a_lost_tokenizer_after_the_last_token_still_gives_the_tail(start):
    stack = await start(peers=False)
    first = await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.pause_after = 20
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: sum(map(len, pieces)) > 15)
    first.servicer.is_silent = True
    decode.pause_after = 10**9
    decode.poke()
    await until(lambda: not decode.live)
    await stack.mesh.kill(first)
    await stack.tokenizer()

    assert (await task)[:2] == (TEXT, ["stop"])
    await until(stack.is_idle)


async def test_a_client_that_leaves_a_stream_cancels_everywhere(start):
    stack, _, peers = await two_decodes(start, 10)
    stream = await stack.client().completions.create(model="tiny", prompt="x", max_tokens=200, stream=True)
    async for _ in stream:
        break
    used, _ = user_of(peers)
    assert used.servicer.live
    await stream.close()
    await until(stack.is_idle)

    assert [c.request_id for c in used.servicer.cancels] == [used.servicer.submits[0].request_id]
    assert stack.value("plugmesh_gateway_requests_total", route="completions", outcome="cancelled") == 1


async def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_or_in_the_queue_cancels(start):
    stack = await start(peers=False, max_in_flight=1)
    await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.pause_after = 3
    tasks = [asyncio.create_task(stack.client().completions.create(model="tiny", prompt="x")) for _ in range(3)]
    await until(lambda: stack.gateway.admission.num_queued == 2 and decode.num_steps >= 3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(stack.is_idle)

    assert stack.gateway.admission.num_queued == 0 and len(decode.submits) == 1


async def test_two_hundred_cancellations_at_any_moment_leave_nothing_behind(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.token_delay_s = 0.001
    async with httpx.AsyncClient(base_url=stack.url, limits=httpx.Limits(max_connections=50)) as http:
        async def one(k: int) -> None:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(0.002 * (k % 40)):
                    await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 50, "stream": k % 2 == 0, "n": 1 + k % 3}, timeout=10)
        await asyncio.gather(*(one(k) for k in range(200)))
    await until(stack.is_idle)

    assert stack.value("plugmesh_gateway_in_flight") == 0


async def test_a_client_that_does_not_read_is_cut_off_and_holds_nothing(start):
    stack = await start(peers=False, max_buffered_events=50)
    await stack.tokenizer()
    decode = (await stack.decode(lambda r, i: [97] * 100000)).servicer
    decode.max_model_len = 200000
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(s.connect, ("127.0.0.1", stack.service.http.port))
        body = b'{"prompt": "x", "stream": true, "max_tokens": 100000, "logprobs": 20}'
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: stack.value("plugmesh_gateway_slow_readers_total") == 1, 20)
        await until(lambda: stack.gateway.num_running == 0 and not decode.live)

        assert stack.gateway.admission.num_places == 0


async def test_a_deadline_is_a_504_or_an_error_event_and_frees_everything(start):
    stack = await start(peers=False, request_timeout_s=0.5)
    await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.pause_after = 4
    async with httpx.AsyncClient(base_url=stack.url) as http:
        whole = await http.post("/v1/completions", json={"prompt": "x"})
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    pieces: list[str] = []
    with pytest.raises(openai.APIError) as e:
        await stream_text(stack, pieces)

    assert e.value.code == "deadline_exceeded"
    assert "".join(pieces) == TEXT[:4]
    await until(stack.is_idle)


async def test_a_full_gateway_refuses_with_429_and_serves_by_priority(start):
    stack = await start(peers=False, max_in_flight=1, max_queued=2)
    await stack.tokenizer()
    decode = (await stack.decode(say("abc"))).servicer
    decode.pause_after = 1
    async with httpx.AsyncClient(base_url=stack.url) as http:
        async def ask(priority: int):
            return await http.post("/v1/completions", json={"prompt": "x", "priority": priority}, timeout=20)
        tasks = [asyncio.create_task(ask(0))]
        await until(lambda: len(decode.submits) == 1)
        tasks += [asyncio.create_task(ask(5))]
        await until(lambda: stack.gateway.admission.num_queued == 1)
        tasks += [asyncio.create_task(ask(-5))]
        await until(lambda: stack.gateway.admission.num_queued == 2)
        assert stack.value("plugmesh_gateway_queued") == 2
        refused = await ask(0)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(refused.headers["retry-after"]) >= 1
        decode.pause_after = 10**9
        decode.poke()
        replies = await asyncio.gather(*tasks)

    assert [r.json()["choices"][0]["text"] for r in replies] == ["abc"] * 3
    assert [r.priority for r in decode.submits] == [0, -5, 5]
    await until(stack.is_idle)


async def test_the_token_budget_holds_requests_back(start):
    stack = await start(peers=False, max_pending_tokens=100)
    await stack.tokenizer()
    decode = (await stack.decode(say("abc"))).servicer
    decode.pause_after = 1
    tasks = [asyncio.create_task(stack.client().completions.create(model="tiny", prompt="x", max_tokens=60)) for _ in range(3)]
    await until(lambda: stack.gateway.admission.num_queued == 2 and len(decode.submits) == 1)
    decode.pause_after = 10**9
    decode.poke()

    assert [t.choices[0].text for t in await asyncio.gather(*tasks)] == ["abc"] * 3
    await until(stack.is_idle)


async def test_drain_refuses_new_requests_and_finishes_running_ones(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.pause_after = 10
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: len("".join(pieces)) == 10)
    drain = asyncio.create_task(stack.service.drain(10))
    await until(lambda: stack.gateway.admission.is_draining)
    with pytest.raises(openai.APIConnectionError):
        for _ in range(100):
            with contextlib.suppress(openai.APIStatusError):
                await stack.client().completions.create(model="tiny", prompt="x")
    decode.pause_after = 10**9
    decode.poke()

    assert (await task)[0] == TEXT
    await asyncio.wait_for(drain, 5)


class BadRouter:
    """Fails as told for the next request."""

    fault = ""

    def route(self, request, decode, prefill):
        if self.fault == "raise":
            raise RuntimeError("secret detail")
        return Route("nowhere" if self.fault == "nowhere" else decode[0].instance_id, prefill_mode="local")

    def on_progress(self, request_id, num_tokens):
        if self.fault == "progress":
            raise RuntimeError("secret detail")

    def on_finished(self, request_id):
        raise RuntimeError("secret detail")


@pytest.mark.parametrize("fault", ["raise", "nowhere", "progress"])
async def test_a_router_that_fails_costs_one_request_and_is_named(start, fault):
    router = BadRouter()

    class Plugin:
        @hookimpl
        def register_routers(self):
            return [RouterRecord("bad", lambda: router)]

    stack = await start(plugins=(("badplugin", Plugin()),))
    router.fault = fault
    async with httpx.AsyncClient(base_url=stack.url) as http:
        reply = await http.post("/v1/completions", json={"prompt": "x"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "plugin_error")
        assert "bad" in reply.text and "secret" not in reply.text
        router.fault = ""
        assert (await http.post("/v1/completions", json={"prompt": "x"})).status_code == 200
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    assert decode.submits[-1].prefill_mode == 1
    assert stack.gateway.num_running == 0 and stack.gateway.admission.num_places == 0


async def test_work_goes_to_the_instance_with_the_fewest_pending_tokens(start):
    stack, _, peers = await two_decodes(start, 2)
    tasks = [asyncio.create_task(stack.client().completions.create(model="tiny", prompt="x", max_tokens=m)) for m in (100,)]
    await until(lambda: any(p.servicer.submits for p in peers))
    used, other = user_of(peers)
    tasks += [asyncio.create_task(stack.client().completions.create(model="tiny", prompt="x", max_tokens=20)) for _ in range(3)]
    await until(lambda: len(other.servicer.submits) == 3)
    for p in peers:
        p.servicer.pause_after = 10**9
        p.servicer.poke()
    await asyncio.gather(*tasks)

    assert isinstance(used.servicer, ScriptedDecode) and len(used.servicer.submits) == 1
    await until(stack.is_idle)


async def test_one_closing_event_per_request_without_its_text(start):
    import structlog

    stack = await start()
    with structlog.testing.capture_logs() as logs:
        await stack.client().completions.create(model="tiny", prompt="secret prompt")
    closing = [e for e in logs if e["event"] == "request.finished"]

    assert len(closing) == 1
    assert (closing[0]["outcome"], closing[0]["num_prompt_tokens"], closing[0]["num_generated_tokens"]) == ("stop", 13, 14)
    assert "secret" not in str(logs) and "Hello" not in str(logs)


async def test_while_the_broker_is_away_new_requests_get_503_and_running_ones_wait(start):
    stack, _, peers = await two_decodes(start, 10, stall_s=0.4)
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: len("".join(pieces)) == 10)
    stack.mesh.connected = False
    for p in peers:
        p.servicer.is_silent = True
    async with httpx.AsyncClient(base_url=stack.url) as http:
        refused = await http.post("/v1/completions", json={"prompt": "x"})
        health = await http.get("/health")
    assert (refused.status_code, refused.headers["retry-after"], health.status_code) == (503, "2", 503)
    await until(lambda: stack.value("plugmesh_gateway_migrated_total", cause="stalled") == 1)
    assert sum(len(p.servicer.submits) for p in peers) == 1
    for p in peers:
        p.servicer.is_silent = False
        p.servicer.pause_after = 10**9
    stack.mesh.connected = True

    assert (await task)[0] == TEXT
    await until(stack.is_idle)


async def test_a_request_too_large_for_the_bus_costs_itself_only(start):
    stack = await start(peers=False)
    await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.max_model_len = 10**6
    decode.pause_after = 5
    pieces: list[str] = []
    other = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: len("".join(pieces)) == 5)
    async with httpx.AsyncClient(base_url=stack.url) as http:
        reply = await http.post("/v1/completions", json={"prompt": [65] * 260000})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")
    decode.pause_after = 10**9
    decode.poke()

    assert (await other)[0] == TEXT
    assert len(decode.submits) == 1


async def test_replays_are_cut_into_frames_that_fit_the_bus(start, monkeypatch):
    monkeypatch.setattr("plugmesh_gateway.text_links._REPLAY_TOKENS", 7)
    monkeypatch.setattr("plugmesh_gateway.text_links._FRAME_BYTES", 100)
    stack = await start(peers=False)
    first = await stack.tokenizer()
    decode = (await stack.decode(say(TEXT))).servicer
    decode.pause_after = 33
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces, n=2))
    await until(lambda: any(g is not None and g.num_completion_tokens == 2 * 33 for g in stack.gateway._running.values()))
    await stack.mesh.kill(first)
    second = await stack.tokenizer()
    decode.pause_after = 10**9
    decode.poke()
    text, reasons, _ = await task

    assert (sorted(text), reasons) == (sorted(TEXT * 2), ["stop"] * 2)
    assert second.servicer.num_frames > 6
    await until(stack.is_idle)


@pytest.mark.parametrize("role", ["decode", "tokenizer"])
async def test_an_instance_that_the_table_still_lists_after_its_death_does_not_use_up_the_attempts(start, role):
    stack = await start(peers=False, max_attempts=5, stall_s=5)
    tokenizer, decode = await stack.tokenizer(), await stack.decode(say(TEXT))
    decode.servicer.pause_after = 10
    pieces: list[str] = []
    task = asyncio.create_task(stream_text(stack, pieces))
    await until(lambda: len("".join(pieces)) == 10)
    dead = decode if role == "decode" else tokenizer
    await stack.mesh.kill(dead, tell=False)
    decode.servicer.pause_after = 10**9
    if role == "tokenizer":
        decode.servicer.poke()
    await asyncio.sleep(3)  # a lease's time: four attempts at half-second intervals would be over
    assert not task.done()
    stack.mesh.peers.pop(dead.info.instance_id)
    stack.mesh.tell("left", dead.info)
    await (stack.decode(say(TEXT)) if role == "decode" else stack.tokenizer())

    assert (await task)[0] == TEXT
    await until(stack.is_idle)
