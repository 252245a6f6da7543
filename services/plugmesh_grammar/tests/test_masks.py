"""The Masks RPC: many sequences on a stream, and processes that die under them."""

import asyncio
import os
import signal
import time

import numpy as np
import pytest

from plugmesh import wire
from plugmesh.errors import AlreadyExists, GrammarTimeout, InvalidRequest, LimitExceeded, NotFound
from plugmesh.grammar.spec import GrammarSpec
from plugmesh_grammar.tests.test_service import EOS, HELLO, literal, request, stub_of  # noqa: F401 - a fixture
from plugmesh_proto.v1 import grammar_pb2 as pb


def allowed(reply):
    """Ids of a mask, bit by bit."""
    return {j for j in range(8 * len(reply.mask)) if int.from_bytes(reply.mask[4 * (j // 32) : 4 * (j // 32) + 4], "little") >> (j % 32) & 1}


def ids(text):
    return [3 + byte for byte in text.encode()]


class Stream:
    """One Masks stream; `ask` sends one request and waits for its reply."""

    def __init__(self, rig):
        self.call = stub_of(rig).Masks()

    async def ask(self, sequence, **what):
        await self.call.write(pb.MaskRequest(sequence=sequence, **what))
        reply = await self.call.read()
        assert reply.sequence == sequence
        return reply

    async def open(self, sequence, spec=HELLO):
        return await self.ask(sequence, open=pb.OpenMatcher(grammar=request(spec)))

    async def accept(self, sequence, tokens):
        return await self.ask(sequence, accept=pb.AcceptTokens(token_ids=tokens))

    async def end(self):
        await self.call.done_writing()
        async for _ in self.call:
            pass


def error_of(reply):
    return type(wire.error_from_pb(reply.error)) if reply.HasField("error") else None


async def test_a_sequence_from_its_beginning_to_its_end(literal):  # noqa: F811
    instance = await literal.add()
    stream = Stream(literal)
    first = await stream.open("a", GrammarSpec("regex", "abc!"))
    assert ({*ids("a"), 259, 260}, b"abc!", False) == (allowed(first), first.forced, first.is_completed)  # "a", "ab", "abc"
    second = await stream.accept("a", [259])
    assert (set(ids("c")), b"c!", 1) == (allowed(second), second.forced, second.num_accepted)
    refused = await stream.accept("a", [*ids("c"), *ids("x"), *ids("!")])
    assert (1, set(ids("!"))) == (refused.num_accepted, allowed(refused))
    done = await stream.accept("a", ids("!"))
    assert (True, False, {EOS}, b"") == (done.is_completed, done.is_terminated, allowed(done), done.forced)
    over = await stream.accept("a", [EOS])
    assert (True, True, set()) == (over.is_completed, over.is_terminated, allowed(over))
    back = await stream.ask("a", rollback=3)
    assert set(ids("c")) == allowed(back)
    assert not (await stream.ask("a", close=True)).mask
    assert NotFound == error_of(await stream.accept("a", ids("c")))
    await stream.end()

    assert len(instance.service.matching) == instance.service.num_streams == 0


@pytest.mark.slow
async def test_sequences_of_two_streams_do_not_know_each_other(literal):  # noqa: F811
    instance = await literal.add()
    one, two = Stream(literal), Stream(literal)
    await asyncio.gather(one.open("a", GrammarSpec("regex", "xy")), two.open("a", GrammarSpec("regex", "pq")))
    assert (set(ids("y")), set(ids("q"))) == tuple(map(allowed, await asyncio.gather(one.accept("a", ids("x")), two.accept("a", ids("p")))))
    await one.end()
    assert set() == allowed(await two.accept("a", [])) - set(ids("q"))
    two.call.cancel()  # the client goes away
    async with asyncio.timeout(5):
        while len(instance.service.matching):
            await asyncio.sleep(0.01)


async def test_a_grammar_can_be_opened_by_its_key_and_by_no_other(literal):  # noqa: F811
    await literal.add()
    info = await literal.client.compile(HELLO, "", timeout_s=10)
    stream = Stream(literal)

    assert set(ids("h")) == allowed(await stream.ask("a", open=pb.OpenMatcher(key=info.key)))
    assert NotFound == error_of(await stream.ask("b", open=pb.OpenMatcher(key="0" * 64)))
    await stream.end()


async def test_a_bad_sequence_costs_itself_only(literal):  # noqa: F811
    await literal.add(max_sequences_per_stream=2, mask_timeout_s=0.5, max_tokens_per_sequence=1024)
    stream = Stream(literal)
    await stream.open("good")
    await stream.accept("good", ids("he"))
    assert AlreadyExists == error_of(await stream.open("good"))
    await stream.open("slow", GrammarSpec("regex", "slowly"))
    assert LimitExceeded == error_of(await stream.open("third"))
    assert InvalidRequest == error_of(await stream.ask("", open=pb.OpenMatcher(grammar=request(HELLO))))
    assert GrammarTimeout == error_of(await stream.accept("slow", ids("slow")))
    assert NotFound == error_of(await stream.accept("slow", ids("l")))
    # The process was killed; the good one is made again out of its tokens.
    assert set(ids("o")) == allowed(await stream.accept("good", ids("ll")))
    assert LimitExceeded == error_of(await stream.ask("good", rollback=100))
    await stream.end()


async def test_kill_9_of_the_process_goes_unnoticed(literal):  # noqa: F811
    instance = await literal.add()
    stream = Stream(literal)
    for name in "abc":
        await stream.open(name, GrammarSpec("regex", f"{name}1234567"))
        await stream.accept(name, ids(f"{name}1"))
    os.kill(instance.service.matching.pid, signal.SIGKILL)
    for name in "abc":
        assert set(ids("4")) == allowed(await stream.accept(name, ids("23")))
    await stream.end()

    assert instance.service.num_killed == 1


@pytest.mark.slow
async def test_more_can_be_taken_back_than_an_engine_takes_at_once(literal):  # noqa: F811
    await literal.add()
    stream = Stream(literal)
    text = "".join(chr(97 + i % 26) for i in range(1000))
    await stream.open("a", GrammarSpec("regex", text))
    await stream.accept("a", ids(text))

    assert set(ids("f")) <= allowed(await stream.ask("a", rollback=995))
    assert text[5:].encode() == (await stream.accept("a", [])).forced
    await stream.end()


@pytest.mark.slow
async def test_the_event_loop_goes_on_while_a_mask_hangs(literal):  # noqa: F811
    await literal.add(mask_timeout_s=0.6)
    stream = Stream(literal)
    await stream.open("slow", GrammarSpec("regex", "slowly"))
    hanging = asyncio.create_task(stream.accept("slow", ids("slow")))
    begin = time.monotonic()
    for i in range(5):
        await literal.client.compile(GrammarSpec("regex", f"meanwhile{i}"), "", timeout_s=5)
    assert time.monotonic() - begin < 0.5
    assert GrammarTimeout == error_of(await hanging)
    await stream.end()


@pytest.mark.slow
async def test_too_many_streams_are_refused(literal):  # noqa: F811
    import grpc

    await literal.add(max_streams=1)
    first, second = Stream(literal), Stream(literal)
    await first.open("a")
    with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
        await second.open("a")
    await first.end()


def test_masks_are_little_endian_words():
    words = np.array([1 << 31, 2], dtype="<u4").tobytes()

    assert {31, 33} == allowed(pb.MaskReply(mask=words))
