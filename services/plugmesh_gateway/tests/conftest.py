"""A gateway over real gRPC, with small peers: a decode instance that replays a script and a tokenizer whose ids are bytes.

The peers follow their protos to the letter and nothing else; the whole mesh with the real ones is tested in `tests/`.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import grpc
import openai
import prometheus_client
import pytest

from plugmesh import wire
from plugmesh.config import MeshConfig
from plugmesh.errors import InvalidRequest, PlugmeshError, UnsupportedGrammar
from plugmesh.host import PluginHost
from plugmesh.mesh.api import ServiceContext
from plugmesh.types import InstanceInfo, KvLayout
from plugmesh_gateway.config import Settings
from plugmesh_gateway.service import GatewayService
from plugmesh_proto.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    grammar_pb2,
    grammar_pb2_grpc,
    kvstore_pb2,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)

EOS = 256
VOCAB = 300


class ByteTokenizer(tokenizer_pb2_grpc.TokenizerServicer):
    """Token id = byte; 256 ends. `is_silent` makes it swallow frames, as a stopped process does."""

    def __init__(self) -> None:
        self.is_silent = False
        self.num_opened = 0
        self.num_replays = 0
        self.num_frames = 0
        self.open: set[int] = set()
        self.chat_template = ""
        self.chats: list[Any] = []
        self.vocabulary: Callable[[], list[Any]] | None = None  # parts to answer Vocabulary with; without, it has no such call

    async def Describe(self, request, context):
        return tokenizer_pb2.TokenizerDescription(model="tiny", vocab_size=VOCAB, eos_token_ids=[EOS], has_chat_template=True, chat_template=self.chat_template)

    async def Vocabulary(self, request, context):
        if self.vocabulary is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        for part in self.vocabulary():
            yield part

    async def Encode(self, request, context):
        return tokenizer_pb2.EncodeReply(token_ids=list(request.text.encode()))

    async def EncodeChat(self, request, context):
        self.chats.append(request)
        if any("refuse me" in m.content for m in request.messages):
            raise InvalidRequest("the template refuses the messages", param="messages")
        text = "".join(f"<{m.role}>{m.content}" for m in request.messages)
        return tokenizer_pb2.EncodeReply(token_ids=list(text.encode()))

    async def Decode(self, request, context):
        pieces = [bytes([t]) if t < 256 else b"<end>" for t in request.token_ids]
        return tokenizer_pb2.DecodeReply(text=b"".join(pieces).decode("utf-8", "replace"), token_bytes=pieces)

    async def Detokenize(self, requests, context):
        states: dict[int, Detokenizer] = {}

        def answer(out, sequence_id, token_ids, is_final):
            state = states[sequence_id]
            text = "" if state.ended else state.feed(token_ids, is_final)
            state.ended = state.ended or is_final or bool(state.stopped)
            out.texts.add(sequence_id=sequence_id, text=text, num_chars_total=state.num_sent, num_tokens_consumed=state.num_tokens,
                          stopped=bool(state.stopped), stop_string=state.stopped, is_final=state.ended)
            if state.ended:
                self.open.discard(sequence_id)

        async for frame in requests:
            self.num_frames += 1
            if self.is_silent:
                continue
            out = tokenizer_pb2.DetokenizedFrame()
            for o in frame.open:
                self.num_opened += 1
                self.num_replays += bool(o.replay_token_ids)
                states[o.sequence_id] = Detokenizer(list(o.stop), o.num_delivered_chars)
                self.open.add(o.sequence_id)
                if o.replay_token_ids:
                    answer(out, o.sequence_id, o.replay_token_ids, False)
            for t in frame.tokens:
                answer(out, t.sequence_id, t.token_ids, t.is_final)
            for sequence_id in frame.close:
                self.open.discard(sequence_id)
            if out.texts:
                yield out


class Detokenizer:
    """All text again for each call: slow and obvious."""

    def __init__(self, stop: list[str], num_delivered: int) -> None:
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.num_sent = num_delivered
        self.num_tokens = 0
        self.stopped = ""
        self.ended = False

    def feed(self, ids, is_final: bool) -> str:
        for token in ids:
            self.num_tokens += 1
            self.text += self.decoder.decode(bytes([token]) if token < 256 else b"")
            found = [(self.text.index(s), s) for s in self.stop if s in self.text]
            if found:
                at, self.stopped = min(found)
                self.text = self.text[:at]
                break
        if is_final and not self.stopped:
            self.text += self.decoder.decode(b"", True)
        end = len(self.text)
        if not is_final and not self.stopped:
            for s in self.stop:
                for n in range(min(len(s) - 1, len(self.text)), 0, -1):
                    if self.text.endswith(s[:n]):
                        end = min(end, len(self.text) - n)
                        break
        out = self.text[self.num_sent : end] if end > self.num_sent else ""
        self.num_sent += len(out)
        return out


class NamingGrammars(grammar_pb2_grpc.GrammarServicer):
    """Compiles nothing: a grammar's key is its source. Refuses schemas with `not`, as the real one refuses what it cannot enforce."""

    def __init__(self) -> None:
        self.specs: list[Any] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def Compile(self, request, context):
        self.specs.append(request.spec)
        await self.may_answer.wait()
        found = self._find(json.loads(request.spec.source) if request.spec.source[:1] == "{" else None, "")
        if found is not None:
            raise UnsupportedGrammar(f"not at {found} cannot be enforced", keyword="not", path=found)
        return grammar_pb2.CompiledGrammarInfo(key=f"key of {request.spec.source}", engine="e", engine_version="1")

    def _find(self, value: Any, path: str) -> str | None:
        if isinstance(value, dict):
            if "not" in value:
                return f"{path}/not"
            return next((f for k, v in value.items() if (f := self._find(v, f"{path}/{k}")) is not None), None)
        if isinstance(value, list):
            return next((f for i, v in enumerate(value) if (f := self._find(v, f"{path}/{i}")) is not None), None)
        return None


class ScriptedDecode(decode_pb2_grpc.DecodeServicer):
    """Generates what `script(request, sequence)` says, one token per sequence and step, from where `resume` ends.

    `pause_after` stops a sequence there, until it is raised and `poke` called, or with `waits_for_cancel` until
    a cancel is heard; `is_silent` also stops Status, as SIGSTOP does.
    """

    def __init__(self, name: str, script: Callable[[Any, int], list[int]]) -> None:
        self.name = name
        self.script = script
        self.submits: list[decode_pb2.GenerateRequest] = []
        self.cancels: list[decode_pb2.CancelRequest] = []
        self.live: dict[str, Any] = {}
        self.num_steps = 0
        self.num_tokens = 0
        self.pause_after = 10**9           # tokens per sequence after which it stops sending
        self.waits_for_cancel = False
        self.is_silent = False
        self.error: PlugmeshError | None = None
        self.max_model_len = 4096
        self.model = "tiny"
        self.eos = EOS
        self.token_delay_s = 0.0
        self.top = 0
        self.confidence: Callable[[int], float] = lambda token: 1.0
        self.layout: KvLayout | None = None
        self.cached: list[bytes] = []      # blocks that a snapshot tells
        self.changed = asyncio.Event()

    def pause_until_cancelled(self, num_tokens: int) -> None:
        """Every sequence stops after `num_tokens` until something is cancelled, however slow the gateway is about it."""
        self.pause_after, self.waits_for_cancel = num_tokens, True

    def poke(self) -> None:
        event, self.changed = self.changed, asyncio.Event()
        event.set()

    async def Status(self, request, context):
        while self.is_silent:
            await asyncio.sleep(0.02)
        return decode_pb2.DecodeStatus(model=self.model, weight_version="v1", max_model_len=self.max_model_len, num_steps=self.num_steps,
                                       num_running=len(self.live), layout=wire.layout_to_pb(self.layout) if self.layout else None)

    async def KvSnapshot(self, request, context):
        yield kvstore_pb2.SnapshotPage(as_of_sequence=3, incarnation="some life", block_ids=self.cached)

    async def Session(self, commands, context):
        live: dict[str, dict[int, list[int]]] = {}
        requests: dict[str, decode_pb2.GenerateRequest] = {}
        counts: dict[str, dict[int, int]] = {}
        ended: list[str] = []  # cancelled, their last row is to be sent
        wake = asyncio.Event()

        async def read() -> None:
            async for command in commands:
                if command.HasField("submit"):
                    r = command.submit
                    self.submits.append(r)
                    requests[r.request_id] = r
                    resume = {p.sequence: p for p in r.resume}
                    live[r.request_id] = {}
                    counts[r.request_id] = {}
                    for i in range(r.sampling.num_sequences or 1):
                        p = resume.get(i)
                        counts[r.request_id][i] = len(p.token_ids) if p else 0
                        if not (p and p.finished):
                            live[r.request_id][i] = self.script(r, i)
                    self.live[r.request_id] = live[r.request_id]
                else:
                    c = command.cancel
                    self.cancels.append(c)
                    if self.waits_for_cancel:
                        self.pause_after = 10**9
                    if c.one_sequence:
                        live.get(c.request_id, {}).pop(c.sequence, None)
                    if not c.one_sequence or not live.get(c.request_id):
                        if live.pop(c.request_id, None) is not None:
                            ended.append(c.request_id)
                        self.live.pop(c.request_id, None)
                wake.set()
                self.poke()

        reader = asyncio.create_task(read())
        try:
            while True:
                frame = decode_pb2.TokenFrame(step=self.num_steps)
                while ended:
                    frame.rows.add(request_id=ended.pop(), finish_reason=common_pb2.FINISH_REASON_CANCELLED, request_done=True)
                for rid, sequences in list(live.items()):
                    if self.error is not None:
                        frame.rows.add(request_id=rid, finish_reason=common_pb2.FINISH_REASON_ERROR, error=wire.error_to_pb(self.error), request_done=True)
                        live.pop(rid)
                        self.live.pop(rid, None)
                        continue
                    r = requests[rid]
                    for i, ids in list(sequences.items()):
                        k = counts[rid][i]
                        if k >= self.pause_after or self.is_silent:
                            continue
                        token = ids[k] if k < len(ids) else self.eos
                        info = common_pb2.TokenInfo(token_id=token, logprob=-0.5 if r.sampling.logprobs else 0.0)
                        for a in range(r.sampling.top_logprobs):
                            info.top.add(token_id=(token + a) % 256, logprob=-0.5 - a)
                        if r.sampling.confidence_top_k:
                            info.confidence = self.confidence(token)
                        row = frame.rows.add(request_id=rid, sequence=i, index=k, tokens=[info])
                        counts[rid][i] = k + 1
                        self.num_tokens += 1
                        if (token == self.eos and not r.sampling.ignore_eos) or token in r.sampling.stop_token_ids:
                            row.finish_reason = common_pb2.FINISH_REASON_STOP
                        elif k + 1 >= r.sampling.max_tokens:
                            row.finish_reason = common_pb2.FINISH_REASON_LENGTH
                        if row.finish_reason:
                            del sequences[i]
                            if not sequences:
                                row.request_done = True
                                row.usage.prompt_tokens = len(r.token_ids)
                                row.usage.cached_tokens = min(16, len(r.token_ids) - 1)
                                live.pop(rid)
                                self.live.pop(rid, None)
                if frame.rows:
                    self.num_steps += 1
                    yield frame
                    self.poke()
                    await asyncio.sleep(self.token_delay_s)
                else:
                    wake.clear()
                    changed = self.changed
                    waits = {asyncio.ensure_future(wake.wait()), asyncio.ensure_future(changed.wait())}
                    _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for w in pending:
                        w.cancel()
        finally:
            reader.cancel()
            for rid in live:
                self.live.pop(rid, None)
            self.poke()


class Translate(grpc.aio.ServerInterceptor):
    """What the carriers do: typed errors to statuses."""

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            async def stream(request, context):
                try:
                    async for m in handler.unary_stream(request, context):
                        yield m
                except PlugmeshError as e:
                    await wire.abort(context, e)
            return grpc.unary_stream_rpc_method_handler(stream, handler.request_deserializer, handler.response_serializer)

        async def unary(request, context):
            try:
                return await handler.unary_unary(request, context)
            except PlugmeshError as e:
                await wire.abort(context, e)
        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)


class Peer:
    def __init__(self, server, servicer, info: InstanceInfo) -> None:
        self.server, self.servicer, self.info = server, servicer, info


class TestMesh:
    """A discovery table and channels to real gRPC servers in this process."""

    __test__ = False
    name = "test"
    connected = True

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.load: dict[str, float] = {}
        self._watchers: list[Callable[[str, InstanceInfo], None]] = []
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._ids = itertools.count()
        self.self_info = InstanceInfo("gateway", "gateway-0", "i", "", "h", 1)

    async def add(self, role: str, servicer: Any, name: str = "") -> Peer:
        server = grpc.aio.server(interceptors=[Translate()])
        adders = {"decode": decode_pb2_grpc.add_DecodeServicer_to_server, "tokenizer": tokenizer_pb2_grpc.add_TokenizerServicer_to_server,
                  "grammar": grammar_pb2_grpc.add_GrammarServicer_to_server}
        adders[role](servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        n = next(self._ids)
        info = InstanceInfo(role, name or f"{role}-{n}", f"inc-{n}", f"127.0.0.1:{port}", "h", 1, model="tiny", roles=(role,), started_unix_s=1000.0 + n)
        peer = self.peers[info.instance_id] = Peer(server, servicer, info)
        self.tell("joined", info)
        return peer

    async def kill(self, peer: Peer, *, tell: bool = True) -> None:
        """As kill -9: streams break; the table notices (or not yet)."""
        if tell:
            self.peers.pop(peer.info.instance_id, None)
            self.tell("left", peer.info)
        channel = self._channels.pop(peer.info.instance_id, None)
        await peer.server.stop(0)
        if channel is not None:
            await channel.close()

    def set_state(self, peer: Peer, state: str) -> None:
        peer.info = dataclasses.replace(peer.info, state=state)
        self.tell("suspect" if state == "suspect" else "updated", peer.info)

    def tell(self, event: str, info: InstanceInfo) -> None:
        for w in list(self._watchers):
            w(event, info)

    def channel(self, role: str, instance: str | None = None):
        info = next((p.info for p in self.peers.values() if p.info.role == role and instance in (None, p.info.instance_id)), None)
        key = instance or (info.instance_id if info else "")
        if key not in self._channels:
            self._channels[key] = grpc.aio.insecure_channel(info.grpc_address if info else "127.0.0.1:1")
        return self._channels[key]

    def instances(self, role: str, *, include_suspect: bool = False) -> list[InstanceInfo]:
        return [p.info for p in self.peers.values() if p.info.role == role and (include_suspect or p.info.state != "suspect")]

    def watch(self, callback):
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    def subscribe(self, topic, callback, *, max_pending=1024):
        return lambda: None

    def set_load(self, **load: float) -> None:
        self.load.update(load)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        for peer in self.peers.values():
            await peer.server.stop(0)


def say(text: str) -> Callable[[Any, int], list[int]]:
    """A script: the same text for every request, the sequence's number in place of '#'."""
    return lambda request, i: [*text.replace("#", str(i)).encode(), EOS]


class Stack:
    """A running gateway with one decode and one tokenizer instance, more on demand."""

    def __init__(self, mesh: TestMesh, service: GatewayService, registry) -> None:
        self.mesh, self.service, self.registry = mesh, service, registry
        self.gateway = service.gateway
        self._clients: list[openai.AsyncOpenAI] = []
        self.url = f"http://127.0.0.1:{service.http.port}"

    def client(self, **kw) -> openai.AsyncOpenAI:
        self._clients.append(openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=kw.pop("api_key", "none"), max_retries=0, timeout=20, **kw))
        return self._clients[-1]

    async def decode(self, script=None, name: str = "") -> Peer:
        return await self.mesh.add("decode", ScriptedDecode(name, script or say("Hello, world!")), name)

    async def tokenizer(self) -> Peer:
        return await self.mesh.add("tokenizer", ByteTokenizer())

    async def grammar(self) -> Peer:
        return await self.mesh.add("grammar", NamingGrammars())

    async def stop(self) -> None:
        for client in self._clients:
            await client.close()
        await self.service.stop()
        await self.mesh.close()

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def is_idle(self) -> bool:
        """Nothing is held anywhere."""
        g = self.gateway
        return (g.num_running == 0 and g.admission.num_places == 0 and g.admission.num_tokens == 0 and g.decode.num_requests == 0
                and g.texts.num_sequences == 0 and not g.engine.router.router._requests and not g.engine.router.router._pending
                and all(not p.servicer.live if p.info.role == "decode" else not getattr(p.servicer, "open", ()) for p in self.mesh.peers.values()))


async def until(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    """Polls a condition of another task; fails the test when it does not come true."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


async def make_stack(*, peers: bool = True, plugins: tuple[tuple[str, object], ...] = (), **settings: Any) -> Stack:
    """A started Stack; the caller stops it."""
    mesh = TestMesh()
    config = MeshConfig.model_validate({"mesh": {"model": "tiny"}})
    host = PluginHost("gateway", config)
    for slug, plugin in plugins:
        host.register(slug, plugin)
    registry = prometheus_client.CollectorRegistry()
    fields = {"port": 0, "stall_s": 1.0, "recovery_wait_s": 5.0, **settings}
    service = GatewayService(ServiceContext("gateway", mesh, config, Settings(**fields), host, registry))
    await service.start()
    stack = Stack(mesh, service, registry)
    if peers:
        await stack.decode()
        await stack.tokenizer()
    return stack


@pytest.fixture
async def start():
    """`await start(peers=..., **settings)` gives a Stack that is stopped after the test."""
    stacks: list[Stack] = []

    async def make(**kw: Any) -> Stack:
        stacks.append(await make_stack(**kw))
        return stacks[-1]

    yield make
    for stack in stacks:
        await stack.stop()
