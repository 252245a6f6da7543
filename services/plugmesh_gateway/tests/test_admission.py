"""Who may come in: the core's bounds pass the suite of all policies, and policies of plugins are asked before them."""

from __future__ import annotations

import asyncio

import openai
import pytest

from plugmesh.errors import Overloaded
from plugmesh.hookspecs import hookimpl
from plugmesh.records import AdmissionRecord, AdmissionRequest, KvEvent, Route, RouterRecord
from plugmesh.testing.conformance.admission import AdmissionConformance
from plugmesh.types import KvLayout, block_chain
from plugmesh_gateway.admit import Admission

from .conftest import until

LAYOUT = KvLayout("tiny", "raw", "float32", 1, 1, 8, 16, 1024)


class TestCore(AdmissionConformance):
    """The gateway's own policy is no plugin, so what concerns the loading of one is left out."""

    slug = "core"
    test_the_records_name_stays_the_same_from_load_to_load = None
    test_a_setting_that_does_not_exist_is_refused_with_its_name = None

    @pytest.fixture
    def record(self):
        return AdmissionRecord("places", lambda: Admission(max_places=8, max_queued=16, max_tokens=2000))


class Tickets:
    """A policy that writes down what it is asked, and fails where `fault` says."""

    def __init__(self) -> None:
        self.fault = ""
        self.asked: list[AdmissionRequest] = []
        self.taken: list[tuple[int, int]] = []
        self.released: list[int] = []

    async def admit(self, request):
        self.asked.append(request)
        self._fail("admit")
        return self

    async def take_tokens(self, num_prompt_tokens, num_wanted_tokens):
        self.taken.append((num_prompt_tokens, num_wanted_tokens))
        self._fail("take_tokens")

    def release(self, num_generated_tokens):
        self.released.append(num_generated_tokens)
        if self.fault == "release":
            raise ZeroDivisionError

    def _fail(self, where: str) -> None:
        if self.fault == f"{where} refuses":
            raise Overloaded("not you", retry_after_s=7)
        if self.fault == f"{where} raises":
            raise ZeroDivisionError
        if self.fault == f"{where} times out":
            raise TimeoutError


@pytest.fixture
async def stack(start):
    policy = Tickets()

    class Plugin:
        @hookimpl
        def register_admission(self):
            return [AdmissionRecord("mine", lambda: policy)]

    stack = await start(plugins=(("mine", Plugin()),))
    stack.policy = policy
    return stack


def complete(stack, **extra):
    return stack.client().completions.create(model="tiny", prompt="hello", max_tokens=5, **extra)


async def test_a_policy_learns_who_asks_for_what_and_what_became_of_it(stack):
    await complete(stack, user="somebody", n=2)

    assert [(r.client, r.num_sequences) for r in stack.policy.asked] == [("somebody", 2)]
    assert stack.policy.taken == [(5, 10)]
    assert len(stack.policy.released) == 1
    assert 2 <= stack.policy.released[0] <= 10


@pytest.mark.parametrize("where", ["admit", "take_tokens"])
async def test_a_refusal_is_429_with_the_time_and_leaves_no_place_taken(stack, where):
    stack.policy.fault = f"{where} refuses"
    with pytest.raises(openai.RateLimitError) as e:
        await complete(stack)

    assert e.value.response.headers["retry-after"] == "7"
    assert stack.gateway.admission.num_places == stack.gateway.admission.num_tokens == 0
    assert stack.policy.released == ([0] if where == "take_tokens" else [])
    stack.policy.fault = ""
    assert (await complete(stack)).choices[0].finish_reason


@pytest.mark.parametrize("fault", ["admit raises", "take_tokens raises", "admit times out", "release"])
async def test_a_policy_that_fails_costs_at_most_the_request_it_was_asked_for(stack, fault):
    stack.policy.fault = fault
    if fault == "release":
        await complete(stack)
    else:
        with pytest.raises(openai.InternalServerError) as e:
            await complete(stack)
        assert "mine" in str(e.value)
    stack.policy.fault = ""

    assert (await complete(stack)).choices[0].finish_reason
    assert stack.gateway.admission.num_places == stack.gateway.admission.num_tokens == 0


async def test_a_refusal_of_the_core_gives_the_tickets_of_plugins_back(start):
    policy = Tickets()

    class Plugin:
        @hookimpl
        def register_admission(self):
            return [AdmissionRecord("mine", lambda: policy)]

    stack = await start(plugins=(("mine", Plugin()),), max_in_flight=1, max_queued=0)
    decode = next(p.servicer for p in stack.mesh.peers.values() if p.info.role == "decode")
    decode.pause_after = 1
    first = asyncio.create_task(complete(stack))
    await until(lambda: decode.num_steps)
    with pytest.raises(openai.RateLimitError):
        await complete(stack)

    assert policy.released == [0]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_router_that_wants_them_gets_block_ids_and_the_events_of_caches(start):
    class Follower:
        def __init__(self):
            self.requests, self.events = [], []

        def route(self, request, decode, prefill):
            self.requests.append(request)
            return Route(decode[0].instance_id)

        def on_progress(self, request_id, num_tokens): ...
        def on_finished(self, request_id): ...

        def on_kv_event(self, event: KvEvent):
            self.events.append(event)
            raise ZeroDivisionError  # costs nobody anything

    router = Follower()

    class Plugin:
        @hookimpl
        def register_routers(self):
            return [RouterRecord("mine", lambda: router, needs_block_ids=True)]

    stack = await start(plugins=(("mine", Plugin()),), peers=False)
    await stack.tokenizer()
    peer = await stack.decode()
    peer.servicer.layout, peer.servicer.cached = LAYOUT, [b"x" * 32]
    await until(lambda: router.events)
    prompt = "x" * 50
    await stack.client().completions.create(model="tiny", prompt=prompt, max_tokens=2)
    await stack.client().completions.create(model="tiny", prompt=prompt[:16], max_tokens=2)

    assert router.events == [KvEvent(peer.info.instance_id, "some life", 3, "stored", (b"x" * 32,))]
    assert [list(r.block_ids) for r in router.requests] == [block_chain(LAYOUT.key(), prompt[:48].encode()), []]  # the last token is computed
    await stack.mesh.kill(peer)
    await until(lambda: len(router.events) == 2)
    assert router.events[1].kind == "cleared"
