"""Strategies of plugins: children are ordinary generations, whatever the strategy does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json

import httpx
import openai
import pytest

from plugmesh.client import AsyncClient
from plugmesh.errors import ConfigError, InvalidRequest
from plugmesh.hookspecs import hookimpl
from plugmesh.records import StrategyEvent, StrategyRecord
from plugmesh.types import FinishReason, TokenInfo
from plugmesh_gateway import generation

from .conftest import say, until
from .test_grpc import connect  # noqa: F401 # a fixture


class Plugin:
    """Registers functions as strategies."""

    def __init__(self, **strategies) -> None:
        self.strategies = strategies

    @hookimpl
    def register_strategies(self) -> list[StrategyRecord]:
        return [StrategyRecord(name, lambda run=run: type("S", (), {"run": staticmethod(run)})()) for name, run in self.strategies.items()]


async def join(request, api):
    """All children's texts in the order of their numbers, and what became of each."""
    texts, reasons = {}, {}
    async for e in api.generate(request.options.get("n", 3), sampling=dataclasses.replace(request.sampling, confidence_top_k=4)):
        texts[e.child] = texts.get(e.child, "") + e.text
        assert all(t.confidence > 0 for t in e.tokens)
        if e.finish_reason:
            reasons[e.child] = e.finish_reason.value
    yield StrategyEvent(text="|".join(texts[i] for i in sorted(texts)))
    yield StrategyEvent(finish_reason=FinishReason.STOP, detail={"reasons": [reasons[i] for i in sorted(reasons)]})


async def post(stack, **body):
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(f"{stack.url}/v1/completions", json={"prompt": "hi", "max_tokens": 10, **body})


async def started(start, *, script=None, settings=None, **strategies):
    stack = await start(plugins=(("mine", Plugin(**strategies)),), peers=False, **(settings or {}))
    peer = await stack.decode(script or say("ab#"))
    await stack.tokenizer()
    return stack, peer.servicer


async def test_children_share_a_prompt_and_usage_counts_all_of_them(start):
    stack, decode = await started(start, join=join)
    reply = (await post(stack, strategy={"name": "join"})).json()

    assert reply["choices"][0]["text"] == "ab0|ab1|ab2"
    assert reply["choices"][0]["finish_reason"] == "stop" and len(reply["choices"]) == 1
    assert reply["usage"]["completion_tokens"] == 3 * 4 and reply["usage"]["prompt_tokens"] == 2
    assert reply["strategy"]["reasons"] == ["stop"] * 3
    assert (reply["strategy"]["num_tokens"], reply["strategy"]["num_calls"], reply["strategy"]["name"]) == (12, 3, "join")
    assert len(decode.submits) == 1 and decode.submits[0].sampling.num_sequences == 3
    await until(stack.is_idle)  # peers hear of the end a moment later
    assert stack.value("plugmesh_gateway_strategy_children_total", strategy="join", outcome="stop") == 3
    assert stack.value("plugmesh_gateway_tokens_total", kind="completion") == 12
    assert stack.value("plugmesh_gateway_requests_total", route="completions", outcome="stop") == 1


async def test_a_stream_ends_with_the_answer_the_usage_and_the_facts(start):
    stack, _ = await started(start, join=join)
    reply = await post(stack, strategy={"name": "join", "n": 2}, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n") if line.startswith("data: {")]

    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == "ab0|ab1"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 8 and chunks[-1]["strategy"]["reasons"] == ["stop", "stop"]
    await until(stack.is_idle)  # peers hear of the end a moment later


async def test_the_official_client_asks_for_one_in_its_extra_body(start):
    stack, _ = await started(start, join=join)
    reply = await stack.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=10, extra_body={"strategy": {"name": "join"}})

    assert reply.choices[0].message.content == "ab0|ab1|ab2"
    assert reply.usage.completion_tokens == 12


async def test_grpc_carries_name_options_and_facts(connect):  # noqa: F811
    stack, address = await connect(plugins=(("mine", Plugin(join=join)),))
    async with AsyncClient(address) as client:
        from plugmesh.client.messages import request_to_pb
        from plugmesh_proto.v1 import inference_pb2_grpc

        request = request_to_pb("hi", None, model="", stop=(), priority=0, request_id="", sampling={"max_tokens": 5})
        request.strategy_json = '{"name": "join", "n": 2}'
        stub = inference_pb2_grpc.InferenceStub(client._channel)
        whole = await stub.Complete(request, timeout=10)
        events = [e async for e in stub.Generate(request, timeout=10)]

    assert whole.choices[0].text == "Hello|Hello" and whole.usage.completion_tokens == 10
    assert json.loads(whole.strategy_json)["reasons"] == ["length", "length"]
    assert "".join(e.text for e in events) == "Hello|Hello"
    assert json.loads(events[-1].strategy_json)["num_tokens"] == 10 and events[-1].usage.completion_tokens == 10
    await until(stack.is_idle)  # peers hear of the end a moment later


async def test_many_children_are_several_submissions_with_seeds_of_their_own_that_repeat(start):
    stack, decode = await started(start, join=join, settings={"max_sequences": 4})
    for _ in range(2):
        reply = (await post(stack, strategy={"name": "join", "n": 10}, seed=5)).json()
        assert reply["choices"][0]["text"].count("|") == 9
    seeds = [(s.sampling.seed, s.sampling.num_sequences) for s in decode.submits]

    assert seeds[:3] == seeds[3:] and [n for _, n in seeds[:3]] == [4, 4, 2]
    assert len({s for s, _ in seeds}) == 3 and seeds[0][0] == 5


async def test_the_budget_limits_how_many_children_start_and_is_never_exceeded(start):
    stack, decode = await started(start, join=join, settings={"strategy_budget_calls": 5})
    by_tokens = (await post(stack, strategy={"name": "join", "n": 4, "budget_tokens": 25})).json()  # 10 tokens each may be used
    by_calls = (await post(stack, strategy={"name": "join", "n": 9, "budget_calls": 100})).json()

    assert by_tokens["choices"][0]["text"] == "ab0|ab1" and by_tokens["strategy"]["num_tokens"] <= 25
    assert by_calls["choices"][0]["text"].count("|") == 4 and by_calls["strategy"]["budget_calls"] == 5
    assert [s.sampling.num_sequences for s in decode.submits] == [2, 5]


async def test_a_cancelled_child_ends_at_once_while_its_siblings_go_on_and_late_tokens_are_counted(start):
    seen = []

    async def prune(request, api):
        async for e in api.generate(3):
            seen.append((e.child, e.text, e.finish_reason))
            if e.child == 1 and not e.finish_reason:
                api.cancel(1)
        yield StrategyEvent(text="done", finish_reason=FinishReason.STOP)

    stack, decode = await started(start, prune=prune, script=say("abcdefgh"))
    decode.pause_until_cancelled(4)
    reply = (await post(stack, strategy={"name": "prune"})).json()

    assert [(t, r) for c, t, r in seen if c == 1][-1] == ("", FinishReason.CANCELLED)
    assert sum(1 for c, t, r in seen if c == 1) == 2  # nothing of it after the decision but its end
    assert "".join(t for c, t, _ in seen if c == 0) == "".join(t for c, t, _ in seen if c == 2) == "abcdefgh"
    assert any(c.one_sequence and c.sequence == 1 for c in decode.cancels)
    assert reply["usage"]["completion_tokens"] == reply["strategy"]["num_tokens"] == decode.num_tokens >= 2 * 9 + 1
    await until(stack.is_idle)  # peers hear of the end a moment later


async def test_when_the_last_child_is_cancelled_decode_is_heard_out_and_told_once(start, monkeypatch):
    monkeypatch.setattr(generation, "_CLOSING_S", 300.0)  # decode's last row ends it, not the clock
    async def first_token(request, api):
        async for e in api.generate(2):
            if not e.finish_reason:
                api.cancel(e.child)
        yield StrategyEvent(finish_reason=FinishReason.STOP)

    stack, decode = await started(start, first_token=first_token, script=lambda r, i: [97] * 100)
    decode.token_delay_s = 0.005
    reply = (await post(stack, strategy={"name": "first_token"}, max_tokens=100)).json()

    assert 2 <= reply["strategy"]["num_tokens"] == decode.num_tokens < 200
    await until(lambda: not decode.live and stack.is_idle())


async def test_leaving_the_children_early_cancels_them(start):
    async def race(request, api):
        async with contextlib.aclosing(api.generate(3)) as events:
            async for e in events:
                yield StrategyEvent(text=e.text)
                break
        yield StrategyEvent(finish_reason=FinishReason.STOP)

    stack, decode = await started(start, race=race, script=lambda r, i: [97] * 1000)
    decode.token_delay_s = 0.005
    reply = (await post(stack, strategy={"name": "race"}, max_tokens=1000)).json()

    assert reply["choices"][0]["text"].startswith("a")
    await until(lambda: not decode.live and stack.is_idle())


async def test_children_that_a_strategy_forgot_end_with_its_request(start):
    tasks = []

    async def forgets(request, api):
        async def read():
            async for _ in api.generate(2):
                pass

        tasks.append(asyncio.create_task(read()))
        while api.ledger.num_calls < 2:
            await asyncio.sleep(0.01)
        yield StrategyEvent(text="x", finish_reason=FinishReason.STOP)

    stack, decode = await started(start, forgets=forgets, script=lambda r, i: [97] * 100_000)
    decode.token_delay_s = 0.002
    assert (await post(stack, strategy={"name": "forgets"}, max_tokens=4000)).json()["choices"][0]["text"] == "x"
    await until(lambda: not decode.live and stack.is_idle())
    await asyncio.wait(tasks, timeout=5)

    assert tasks[0].done() and tasks[0].exception() is not None


async def test_what_a_strategy_does_wrong_costs_its_request_and_nothing_else(start):
    async def raises(request, api):
        async for _ in api.generate(2):
            raise RuntimeError("of the plugin")
        yield StrategyEvent()

    async def raises_at_once(request, api):
        raise KeyError("x")
        yield

    async def garbage(request, api):
        yield 7

    async def not_json(request, api):
        yield StrategyEvent(finish_reason=FinishReason.STOP, detail={"x": object()})

    async def no_end(request, api):
        yield StrategyEvent(text="x")

    async def refuses(request, api):
        raise InvalidRequest("n must be odd", param="strategy.n")
        yield

    stack, decode = await started(
        start, raises=raises, raises_at_once=raises_at_once, garbage=garbage, not_json=not_json, no_end=no_end, refuses=refuses,
        join=join, script=lambda r, i: [97] * 1000)
    decode.token_delay_s = 0.002
    for name in ("raises", "raises_at_once", "garbage", "not_json", "no_end"):
        reply = await post(stack, strategy={"name": name}, max_tokens=500)
        assert reply.status_code == 500 and reply.json()["error"]["code"] == "plugin_error", name
        assert name in reply.json()["error"]["message"]
    refused = await post(stack, strategy={"name": "refuses"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "strategy.n")
    await until(lambda: not decode.live and stack.is_idle())

    assert (await post(stack, strategy={"name": "join"}, max_tokens=3)).json()["choices"][0]["text"] == "aaa|aaa|aaa"


async def test_a_strategy_that_hangs_or_holds_on_ends_with_the_deadline_or_the_client(start):
    async def hangs(request, api):
        try:
            async for _ in api.generate(1):
                await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
        yield StrategyEvent(finish_reason=FinishReason.STOP)

    stack, decode = await started(start, hangs=hangs, script=lambda r, i: [97] * 10000, settings={"request_timeout_s": 0.5})
    decode.token_delay_s = 0.002
    reply = await post(stack, strategy={"name": "hangs"}, max_tokens=4000)
    assert reply.status_code == 504
    await until(lambda: not decode.live and stack.is_idle())

    stack, decode = await started(start, hangs=hangs, script=lambda r, i: [97] * 10000)
    decode.token_delay_s = 0.002
    with pytest.raises(openai.APITimeoutError):
        await stack.client().with_options(timeout=0.3).completions.create(
            model="tiny", prompt="hi", max_tokens=4000, extra_body={"strategy": {"name": "hangs"}})
    await until(lambda: not decode.live and stack.is_idle())


async def test_children_wait_for_places_and_a_parent_holds_none(start):
    """With a single place, two strategies at once would stand in each other's way if parents kept theirs."""
    stack, _ = await started(start, join=join, settings={"max_in_flight": 1})
    replies = await asyncio.gather(*(post(stack, strategy={"name": "join", "n": 1}) for _ in range(4)))

    assert [r.json()["choices"][0]["text"] for r in replies] == ["ab0"] * 4
    await until(stack.is_idle)  # peers hear of the end a moment later


async def test_children_move_when_their_instance_dies(start):
    stack, decode = await started(start, join=join, script=say("abcdefgh#"))
    decode.pause_after = 3
    task = asyncio.create_task(post(stack, strategy={"name": "join"}))
    await until(lambda: decode.num_steps >= 3)
    await stack.decode(say("abcdefgh#"))
    await stack.mesh.kill(next(p for p in stack.mesh.peers.values() if p.servicer is decode))
    reply = (await task).json()

    assert reply["choices"][0]["text"] == "abcdefgh0|abcdefgh1|abcdefgh2"
    assert reply["strategy"]["num_tokens"] == 3 * 10


@pytest.mark.parametrize(("strategy", "more", "param"), [
    ({"name": "nope"}, {}, "strategy"), ({}, {}, "strategy.name"), ({"name": 3}, {}, "strategy.name"),
    ({"name": "join", "budget_tokens": 0}, {}, "strategy.budget_tokens"), ({"name": "join", "budget_calls": True}, {}, "strategy.budget_calls"),
    ({"name": "join"}, {"n": 2}, "n"), ({"name": "join"}, {"prompt": ["a", "b"]}, "prompt"), ("join", {}, "strategy"),
])  # fmt: skip
async def test_bad_choices_are_refused_by_name(start, strategy, more, param):
    stack, decode = await started(start, join=join)
    reply = await post(stack, strategy=strategy, **more)

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert decode.submits == []
    await until(stack.is_idle)


async def test_a_default_strategy_serves_requests_that_name_none_and_can_be_left_out(start):
    stack, _ = await started(start, join=join, settings={"default_strategy": "join"})

    assert (await post(stack)).json()["choices"][0]["text"] == "ab0|ab1|ab2"
    plain = (await post(stack, strategy={"name": "none"})).json()
    assert plain["choices"][0]["text"] == "ab0" and "strategy" not in plain
    assert len((await post(stack, n=2)).json()["choices"]) == 2
    with pytest.raises(ConfigError, match="no plugin registers 'nope'"):
        await start(default_strategy="nope", peers=False)


@pytest.mark.parametrize("budget", [1000, 45])
async def test_children_without_a_mesh_behave_like_those_of_the_gateway(start, budget):
    """`plugmesh.testing.strategies.ReplayApi`, which suites and measurements use, against the real api over the same tokens."""
    from plugmesh.testing.strategies import ReplayApi, Script

    words = ["one two three", "ab", "", "long enough to be cut off at its limit", "x"]
    max_tokens = 20
    seen = {}

    async def watch(request, api):
        rows = {}
        for n in (3, 2):
            async for e in api.generate(n, sampling=dataclasses.replace(request.sampling, confidence_top_k=20)):
                text, confidences, _ = rows.get(e.child, ("", (), None))
                rows[e.child] = (text + e.text, confidences + tuple(t.confidence for t in e.tokens), e.finish_reason)
        with pytest.raises(ValueError, match="no child"):
            api.cancel(len(rows))
        seen[type(api).__name__] = (rows, dict(api.ledger.as_row()), request)
        yield StrategyEvent(finish_reason=FinishReason.STOP)

    submitted = []

    def script(request, i):
        if i == 0:
            submitted.append(request)
        first = 0 if len(submitted) == 1 else submitted[0].sampling.num_sequences
        return [*words[first + i].encode(), 256]

    stack, decode = await started(start, watch=watch, script=script)
    decode.confidence = float
    reply = await post(stack, strategy={"name": "watch", "budget_tokens": budget}, max_tokens=max_tokens)
    assert reply.status_code == 200
    real_rows, real_ledger, request = seen["Api"]

    def replay(child, sampling):
        ids = words[child].encode()
        cut = len(ids) >= max_tokens
        return Script([TokenInfo(t, confidence=float(t)) for t in ids], [chr(t) for t in ids], FinishReason.LENGTH if cut else FinishReason.STOP)

    api = ReplayApi(request, replay, budget_tokens=budget)
    async for _ in watch(request, api):
        pass

    assert seen["ReplayApi"][0] == real_rows and len(real_rows) == (5 if budget == 1000 else 3)
    assert {**seen["ReplayApi"][1], "budget_calls": 0} == {**real_ledger, "budget_calls": 0}
