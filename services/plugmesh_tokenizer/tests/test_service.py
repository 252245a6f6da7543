"""The service over real gRPC, with a weightstore that serves the tiny tokenizer."""

import asyncio
import contextlib
import hashlib
import json
from types import SimpleNamespace

import grpc
import prometheus_client
import pytest

from plugmesh import wire
from plugmesh.config import MeshConfig
from plugmesh.errors import (
    DataLoss,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PlugmeshError,
    Unavailable,
)
from plugmesh.mesh.api import ServiceContext
from plugmesh.mesh.hostid import host_id
from plugmesh.tokenization.encode import Encoder
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import tokenizer_pb2 as pb
from plugmesh_proto.v1 import tokenizer_pb2_grpc, weightstore_pb2, weightstore_pb2_grpc
from plugmesh_tokenizer.config import Settings
from plugmesh_tokenizer.service import create


class Typed(grpc.aio.ServerInterceptor):
    """Turns PlugmeshErrors into statuses, as the carriers do."""

    async def intercept_service(self, continuation, details):
        handler = await continuation(details)
        if handler is None:
            return None

        async def unary(request, context):
            try:
                return await handler.unary_unary(request, context)
            except PlugmeshError as e:
                await wire.abort(context, e)

        async def stream(request_iterator, context):
            try:
                async for reply in handler.stream_stream(request_iterator, context):
                    yield reply
            except PlugmeshError as e:
                await wire.abort(context, e)

        kwargs = {"request_deserializer": handler.request_deserializer, "response_serializer": handler.response_serializer}
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(stream, **kwargs)
        if handler.unary_stream:
            return handler
        return grpc.unary_unary_rpc_method_handler(unary, **kwargs)


class WeightStore(weightstore_pb2_grpc.WeightStoreServicer):
    """Knows one tokenizer under two aliases; `ways` says how its file can be had."""

    def __init__(self, data, path):
        self.data, self.path, self.ways, self.sha256 = data, path, {"inline"}, hashlib.sha256(data).hexdigest()
        self.num_resolved, self.num_read, self.is_away = 0, 0, False

    async def Resolve(self, request, context):
        self.num_resolved += 1
        if self.is_away:
            await wire.abort(context, Unavailable("away", retry_after_s=1))
        if request.model not in ("", "tiny", "other"):
            await wire.abort(context, NotFound(f"no model {request.model!r}"))
        asset = weightstore_pb2.AssetEntry(name="tokenizer.gguf.json", sha256=self.sha256, num_bytes=len(self.data))
        if "inline" in self.ways:
            asset.data = self.data
        if "path" in self.ways:
            asset.path = str(self.path)
        return weightstore_pb2.ModelManifest(
            model="tiny", version="v-other" if request.model == "other" else "v1", assets=[asset], host=host_id())

    async def ReadBlob(self, request, context):
        self.num_read += 1
        for at in range(0, len(self.data), 1000):
            yield weightstore_pb2.BlobPiece(offset=at, data=self.data[at : at + 1000])


class Mesh:
    """Just the channels."""

    def __init__(self, channel):
        self._channel = channel

    def channel(self, role, instance=None):
        return self._channel

    def direct_channel(self, info):
        return self._channel

    def instances(self, role, *, include_suspect=False):
        return [InstanceInfo("weightstore", "w1", "i", "", "", 0)]


@contextlib.asynccontextmanager
async def serving(add, servicer):
    server = grpc.aio.server(interceptors=[Typed()])
    add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield channel
        finally:
            await server.stop(0)


@contextlib.asynccontextmanager
async def running(store, **settings):
    async with serving(weightstore_pb2_grpc.add_WeightStoreServicer_to_server, store) as store_channel:
        config = MeshConfig.model_validate({"mesh": {"model": "tiny"}})
        registry = prometheus_client.CollectorRegistry()
        service = create(ServiceContext("tokenizer", Mesh(store_channel), config, Settings(**settings), None, registry))
        try:
            await service.start()
            binding = service.bindings()[0]
            async with serving(binding.add_to_server, binding.servicer) as channel:
                yield SimpleNamespace(stub=tokenizer_pb2_grpc.TokenizerStub(channel), service=service, registry=registry)
        finally:
            await service.stop()


@pytest.fixture
def store(tiny_meta, tmp_path):
    data = json.dumps(tiny_meta).encode()
    path = tmp_path / "tokenizer.gguf.json"
    path.write_bytes(data)
    return WeightStore(data, path)


@contextlib.asynccontextmanager
async def refused(kind):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    error = wire.error_from_rpc(caught.value)

    assert kind is type(error), error


async def test_all_calls(store, tiny):
    async with running(store) as it:
        described = await it.stub.Describe(pb.DescribeTokenizerRequest())
        plain = await it.stub.Encode(pb.EncodeRequest(text="abc<|im_end|>", add_special_tokens=True))
        special = await it.stub.Encode(pb.EncodeRequest(model="tiny", text="abc<|im_end|>", allow_special=True))
        chat = await it.stub.EncodeChat(pb.EncodeChatRequest(
            messages=[pb.ChatMessage(role="user", content="<|im_end|>x")], add_generation_prompt=True, return_rendered=True))
        decoded = await it.stub.Decode(pb.DecodeRequest(token_ids=chat.token_ids))

        assert (tiny.hash, tiny.vocab_size, 1, [2], True) == (
            described.tokenizer_hash, described.vocab_size, described.bos_token_id, list(described.eos_token_ids), described.has_chat_template)
        assert tiny.chat_templates[""] == described.chat_template
        assert tiny.special_tokens == dict(described.special_tokens)
        assert Encoder(tiny).encode("abc<|im_end|>", allow_special=False, add_special_tokens=True) == list(plain.token_ids)
        assert [260, 2] == list(special.token_ids)
        assert "<|im_start|>user\n<|im_end|>x<|im_end|>\n<|im_start|>assistant\n" == chat.rendered == decoded.text
        assert [1, 2, 1] == [t for t in chat.token_ids if t in tiny.special_ids]
        assert decoded.text.encode() == b"".join(decoded.token_bytes)
        assert it.registry.get_sample_value("plugmesh_tokenizer_tokens_total", {"direction": "encoded"}) > 0


async def test_a_vocabulary_comes_whole_in_parts(store, tiny, monkeypatch):
    monkeypatch.setattr("plugmesh_tokenizer.service._PART_BYTES", 256)
    async with running(store) as it:
        parts = [p async for p in it.stub.Vocabulary(pb.DescribeTokenizerRequest())]

        pieces: list[bytes | None] = []
        for part in parts:
            assert (len(pieces), tiny.hash, tiny.vocab_size) == (part.first_id, part.tokenizer_hash, part.vocab_size)
            pieces += [None if part.first_id + i in part.missing_ids else b for i, b in enumerate(part.token_bytes)]
        assert len(parts) > 3 and tiny.token_bytes == tuple(pieces)
        assert tiny.special_ids == set(parts[0].special_ids) and all(not p.special_ids for p in parts[1:])


@pytest.mark.parametrize("ways", [{"inline"}, {"path"}, set()])
async def test_files_come_by_path_inline_or_as_a_blob(store, tiny, ways):
    store.ways = ways
    async with running(store) as it:
        described = await it.stub.Describe(pb.DescribeTokenizerRequest())

    assert tiny.hash == described.tokenizer_hash
    assert (0 if ways else 1) == store.num_read


async def test_a_changed_file_is_refused(store):
    store.ways = {"path"}
    store.path.write_bytes(store.data[:-1] + b" ")
    with pytest.raises(DataLoss):
        async with running(store):
            pass


async def test_start_waits_for_the_weightstore_but_not_for_ever(store):
    store.is_away = True

    async def come_back():
        while store.num_resolved < 3:
            await asyncio.sleep(0.01)
        store.is_away = False

    back = asyncio.create_task(come_back())
    async with running(store, start_timeout_s=20) as it:
        await it.stub.Describe(pb.DescribeTokenizerRequest())
    await back

    store.is_away = True
    with pytest.raises(Unavailable):
        async with running(store, start_timeout_s=0.3):
            pass


async def test_models_load_on_first_use_and_the_oldest_goes(store):
    async with running(store, max_models=1) as it:
        async with refused(NotFound):
            await it.stub.Describe(pb.DescribeTokenizerRequest(model="none"))
        await it.stub.Describe(pb.DescribeTokenizerRequest(model="other"))

        assert 1 == len(it.service.models)
        assert it.service.models.known("tiny") is None
        await it.stub.Describe(pb.DescribeTokenizerRequest(model="tiny"))
        assert it.service.models.known("tiny").version == "v1"


async def test_a_known_model_outlives_its_weightstore(store):
    async with running(store, alias_ttl_s=0.001) as it:
        store.is_away = True
        for _ in range(3):
            await it.stub.Encode(pb.EncodeRequest(text="a"))
        async with refused(Unavailable):
            await it.stub.Encode(pb.EncodeRequest(model="other", text="a"))


async def test_limits_are_typed_errors(store):
    async with running(store, max_text_bytes=4000, max_messages=2, max_tokens_per_call=1024) as it:
        async with refused(PayloadTooLarge):
            await it.stub.Encode(pb.EncodeRequest(text="é" * 2001))
        async with refused(PayloadTooLarge):
            await it.stub.EncodeChat(pb.EncodeChatRequest(messages=[pb.ChatMessage(role="user", content="x" * 4001)]))
        async with refused(LimitExceeded):
            await it.stub.EncodeChat(pb.EncodeChatRequest(messages=[pb.ChatMessage(role="user", content="x")] * 3))
        async with refused(LimitExceeded):
            await it.stub.Decode(pb.DecodeRequest(token_ids=[3] * 1025))
        async with refused(InvalidRequest):
            await it.stub.Decode(pb.DecodeRequest(token_ids=[-1]))
        for bad in ({"tools_json": "{}"}, {"template_kwargs_json": "[]"}, {"template_kwargs_json": '{"messages": 1}'}):
            async with refused(InvalidRequest):
                await it.stub.EncodeChat(pb.EncodeChatRequest(messages=[pb.ChatMessage(role="user", content="x")], **bad))
        await it.stub.Encode(pb.EncodeRequest(text="é" * 2000))


async def test_a_large_text_leaves_the_event_loop_free(store, tiny):
    async with running(store) as it:
        text = "word and <|im_end|> 123 " * 40_000
        ticks, done = 0, asyncio.Event()

        async def tick():
            nonlocal ticks
            while not done.is_set():
                ticks += 1
                await asyncio.sleep(0.002)

        ticker = asyncio.create_task(tick())
        ids = await it.service.offload(
            len(text), lambda: it.service.models.known("").encoder.encode(text, allow_special=False), inline_below=4096)
        seen = ticks
        done.set()
        await ticker

        assert tiny.special_ids.isdisjoint(ids)
        assert seen > 5


async def test_one_frame_out_for_each_frame_in(store):
    async with running(store) as it:
        call = it.stub.Detokenize()

        async def ask(**frame):
            await call.write(pb.DetokenizeFrame(**frame))
            return list((await asyncio.wait_for(call.read(), 10)).texts)

        opened = await ask(open=[pb.OpenSequence(sequence_id=n, stop=["ab"] if n == 2 else [], skip_special_tokens=True) for n in (1, 2, 3)])
        assert [] == opened
        a, b = 3 + 97, 3 + 98
        texts = await ask(tokens=[pb.SequenceTokens(sequence_id=n, token_ids=[3 + 99, a]) for n in (1, 2)])
        assert [(1, "ca", 2), (2, "c", 2)] == [(t.sequence_id, t.text, t.num_tokens_consumed) for t in texts]
        texts = await ask(tokens=[pb.SequenceTokens(sequence_id=n, token_ids=[b, b]) for n in (1, 2)], close=[3])
        assert [("bb", False, ""), ("", True, "ab")] == [(t.text, t.stopped, t.stop_string) for t in texts]
        assert [4, 3] == [t.num_tokens_consumed for t in texts]
        # Tokens that were under way to an ended sequence, a closed one, an unknown one, an id out of range.
        texts = await ask(tokens=[
            pb.SequenceTokens(sequence_id=2, token_ids=[a]), pb.SequenceTokens(sequence_id=3, token_ids=[a]),
            pb.SequenceTokens(sequence_id=9, token_ids=[a]), pb.SequenceTokens(sequence_id=1, token_ids=[10**6])])
        assert [(True, False), (False, True), (False, True), (False, True)] == [(t.stopped, bool(t.error)) for t in texts]
        assert 0 == it.service.num_sequences
        await call.done_writing()

        assert grpc.aio.EOF is await asyncio.wait_for(call.read(), 10)
    assert 0 == it.service.num_streams


async def test_a_sequence_goes_on_at_another_instance(store):
    ids = [3 + b for b in "añb日\n\nabc".encode()]
    async with running(store) as it:
        for dies_after in range(len(ids) + 1):
            received, num_chars = "", 0
            for tokens, replay in ((ids[:dies_after], []), (ids[dies_after:], ids[:dies_after])):
                call = it.stub.Detokenize()
                await call.write(pb.DetokenizeFrame(
                    open=[pb.OpenSequence(sequence_id=7, stop=["abc"], replay_token_ids=replay, num_delivered_chars=num_chars)],
                    tokens=[pb.SequenceTokens(sequence_id=7, token_ids=tokens)]))
                for text in (await asyncio.wait_for(call.read(), 10)).texts:
                    received += text.text
                    num_chars = text.num_chars_total
                call.cancel()

            assert ("añb日\n\n", len("añb日\n\n")) == (received, num_chars)


async def test_stream_limits_cost_a_sequence_or_are_refused(store):
    async with running(store, max_sequences_per_stream=2, max_stop_strings=2, max_stop_chars=4, max_streams=1, max_tokens_per_call=1024) as it:
        call = it.stub.Detokenize()
        opens = [
            pb.OpenSequence(sequence_id=1, stop=["12345"]), pb.OpenSequence(sequence_id=2, stop=[""]), pb.OpenSequence(sequence_id=3, stop=["a"] * 3),
            pb.OpenSequence(sequence_id=4, model="none"), pb.OpenSequence(sequence_id=5, num_delivered_chars=-1),
            pb.OpenSequence(sequence_id=6, replay_token_ids=[3] * 1025),
            pb.OpenSequence(sequence_id=7), pb.OpenSequence(sequence_id=8), pb.OpenSequence(sequence_id=9),
        ]
        await call.write(pb.DetokenizeFrame(open=opens, tokens=[
            pb.SequenceTokens(sequence_id=7, token_ids=[3 + 97] * 1024), pb.SequenceTokens(sequence_id=8, token_ids=[3])]))
        texts = (await asyncio.wait_for(call.read(), 10)).texts

        assert {1, 2, 3, 4, 5, 6, 8, 9} == {t.sequence_id for t in texts if t.error}
        assert ["a" * 1024] == [t.text for t in texts if not t.error]
        second = it.stub.Detokenize()
        async with refused(Overloaded):
            await asyncio.wait_for(second.read(), 10)
        call.cancel()


async def test_drain_waits_for_streams_and_refuses_new_ones(store):
    async with running(store) as it:
        call = it.stub.Detokenize()
        await call.write(pb.DetokenizeFrame(open=[pb.OpenSequence(sequence_id=1)]))
        await asyncio.wait_for(call.read(), 10)
        drain = asyncio.create_task(it.service.drain(20))
        await asyncio.sleep(0)
        async with refused(Unavailable):
            await asyncio.wait_for(it.stub.Detokenize().read(), 10)
        assert not drain.done()
        await it.stub.Encode(pb.EncodeRequest(text="calls that are one message still work"))
        await call.done_writing()
        await asyncio.wait_for(drain, 10)
