"""The tokenizer on the wire: checks requests, calls the encoder, the template and the detokenizer, counts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import structlog

from plugmesh.errors import LimitExceeded, Overloaded, PayloadTooLarge, Unavailable
from plugmesh.mesh.api import Binding, ServiceContext
from plugmesh.metrics import Metrics
from plugmesh_proto.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from plugmesh_tokenizer.config import Settings
from plugmesh_tokenizer.detokenize import decode
from plugmesh_tokenizer.frames import DetokenizeStream, StreamLimits
from plugmesh_tokenizer.models import LoadedTokenizer, Models
from plugmesh_tokenizer.render import Renderer
from plugmesh_tokenizer.template import Message, parse_json, prepare_chat

log = structlog.get_logger()

FULL_NAME = "plugmesh_proto.v1.Tokenizer"
_MAX_TOLD_TEMPLATE = 1 << 16  # characters; a message of the bus holds 256 KiB
_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2)
_INLINE_TOKENS = 8192  # Decode of fewer stays on the event loop
_PART_BYTES = 32 << 10  # of one part of a vocabulary: a millisecond of work

T = TypeVar("T")


def create(context: ServiceContext) -> TokenizerService:
    """The service of one instance; see `plugmesh.mesh.api.Service`."""
    return TokenizerService(context)


class TokenizerService:
    """Life cycle of the tokenizer; the RPCs are in `TokenizerServicer`."""

    def __init__(self, context: ServiceContext) -> None:
        settings: Settings = context.settings
        self.settings = settings
        self._context = context
        self.models = Models(
            context.mesh, max_models=settings.max_models, max_asset_bytes=settings.max_asset_bytes,
            call_timeout_s=settings.call_timeout_s, alias_ttl_s=settings.alias_ttl_s,
        )
        self.renderer = Renderer(
            workers=settings.render_workers, timeout_s=settings.render_timeout_s, memory_bytes=settings.render_memory_bytes,
            max_waiting=settings.max_waiting,
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
        self._num_offloaded = 0
        self._default: LoadedTokenizer | None = None
        self.is_draining = False
        self.num_streams = 0
        self.num_sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()

        metrics = Metrics(context.metrics)
        self.num_tokens = metrics.counter("tokenizer_tokens_total", "Tokens encoded or decoded", ("direction",))
        self.seconds = metrics.histogram("tokenizer_seconds", "Time of one step of the work", ("step",), buckets=_BUCKETS)
        self.num_frames = metrics.counter("tokenizer_frames_total", "Detokenize frames answered")
        metrics.gauge("tokenizer_streams", "Detokenize streams open").set_function(lambda: self.num_streams)
        metrics.gauge("tokenizer_sequences", "Sequences open on all streams").set_function(lambda: self.num_sequences)
        metrics.gauge("tokenizer_models", "Tokenizers loaded").set_function(lambda: len(self.models))
        metrics.gauge("tokenizer_waiting", "Texts waiting for a thread").set_function(lambda: self._num_offloaded)
        metrics.gauge("tokenizer_template_processes_killed", "Template processes ended before their time").set_function(
            lambda: self.renderer.num_killed)

    def bindings(self) -> Sequence[Binding]:
        return [Binding(tokenizer_pb2_grpc.add_TokenizerServicer_to_server, TokenizerServicer(self), FULL_NAME)]

    async def start(self) -> None:
        """Loads the deployment's model. Raises the last failure when the weightstore stays away too long."""
        configured = str(self._context.config.mesh.model)
        # A path is the weightstore's affair; what it made of it is the default model.
        names = ("",) if "/" in configured or configured.endswith(".gguf") else (configured, "")
        _, self._default = await asyncio.gather(
            self.renderer.start(), self.models.start(names, within_s=self.settings.start_timeout_s))

    async def drain(self, deadline_s: float) -> None:
        """Refuses new streams and waits until those open have ended."""
        self.is_draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("tokenizer.drain_timed_out", num_streams=self.num_streams, num_sequences=self.num_sequences)

    async def stop(self) -> None:
        await self.models.stop()
        await self.renderer.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        return {"model": self._default.model, "weight_version": self._default.version} if self._default else {}

    async def offload(self, size: int, work: Callable[[], T], *, inline_below: int) -> T:
        """Runs `work` here if it is small, else on a thread. Raises Overloaded when too much waits."""
        if size < inline_below:
            return work()
        if self._num_offloaded >= self.settings.max_waiting:
            raise Overloaded(f"{self._num_offloaded} texts wait to be encoded", retry_after_s=1)
        self._num_offloaded += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._num_offloaded -= 1

    def stream_opened(self) -> None:
        """Raises Unavailable while draining and Overloaded when too many streams are open."""
        if self.is_draining:
            raise Unavailable("this tokenizer is draining", retry_after_s=1)
        if self.num_streams >= self.settings.max_streams:
            raise Overloaded(f"{self.num_streams} streams are open", retry_after_s=1)
        self.num_streams += 1
        self._idle.clear()

    def stream_closed(self) -> None:
        self.num_streams -= 1
        if not self.num_streams:
            self._idle.set()


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServicer):
    """See tokenizer.proto. Raises PlugmeshErrors, which the carrier translates."""

    def __init__(self, service: TokenizerService) -> None:
        self._service = service
        self._settings = service.settings

    async def Describe(self, request: Any, context: Any) -> Any:
        loaded = await self._service.models.get(request.model)
        vocabulary = loaded.vocabulary
        template = vocabulary.chat_templates.get("tool_use", vocabulary.chat_templates.get("", ""))
        return tokenizer_pb2.TokenizerDescription(
            model=loaded.model, tokenizer_hash=vocabulary.hash, vocab_size=vocabulary.vocab_size,
            bos_token_id=vocabulary.bos_token_id, eos_token_ids=vocabulary.eos_token_ids,
            has_chat_template="" in vocabulary.chat_templates, special_tokens=vocabulary.special_tokens,
            chat_template=template if len(template) <= _MAX_TOLD_TEMPLATE else "",
        )

    async def Vocabulary(self, request: Any, context: Any) -> AsyncIterator[Any]:
        vocabulary = (await self._service.models.get(request.model)).vocabulary
        table, special = vocabulary.token_bytes, sorted(vocabulary.special_ids)
        part, num_bytes = tokenizer_pb2.VocabularyPart(first_id=0, special_ids=special), 4 * len(special)
        for token_id in range(vocabulary.vocab_size):
            piece = table[token_id]
            if num_bytes > _PART_BYTES:
                part.tokenizer_hash, part.vocab_size = vocabulary.hash, vocabulary.vocab_size
                yield part
                await asyncio.sleep(0)  # streams that run have their turn
                part, num_bytes = tokenizer_pb2.VocabularyPart(first_id=token_id), 0
            if piece is None:
                part.missing_ids.append(token_id)
            part.token_bytes.append(piece or b"")
            num_bytes += len(piece or b"") + 8
        part.tokenizer_hash, part.vocab_size = vocabulary.hash, vocabulary.vocab_size
        yield part

    async def Encode(self, request: Any, context: Any) -> Any:
        begin = time.perf_counter()
        self._check_size(len(request.text), "text", request.text)
        loaded = await self._service.models.get(request.model)
        text, allow_special, add = request.text, request.allow_special, request.add_special_tokens
        ids = await self._service.offload(
            len(text), lambda: loaded.encoder.encode(text, allow_special=allow_special, add_special_tokens=add),
            inline_below=self._settings.inline_chars)
        elapsed_s = time.perf_counter() - begin
        self._service.num_tokens.labels("encoded").inc(len(ids))
        self._service.seconds.labels("encode").observe(elapsed_s)
        log.info("tokenizer.encoded", num_chars=len(text), num_tokens=len(ids), encode_ms=round(1000 * elapsed_s, 2))
        return tokenizer_pb2.EncodeReply(token_ids=ids)

    async def EncodeChat(self, request: Any, context: Any) -> Any:
        begin = time.perf_counter()
        settings = self._settings
        if len(request.messages) > settings.max_messages:
            raise LimitExceeded(f"{len(request.messages)} messages, at most {settings.max_messages} are allowed", param="messages")
        num_bytes = request.ByteSize()
        self._check_size(num_bytes, "messages")
        loaded = await self._service.models.get(request.model)
        chat = await self._service.offload(num_bytes, lambda: self._prepare(loaded, request), inline_below=settings.inline_chars)
        texts = await self._service.renderer.render(chat.request)
        rendered = time.perf_counter()

        def finish() -> tuple[str, list[int]]:
            prompt = chat.finish(texts)
            ids = loaded.encoder.encode(prompt.marked, allow_special=True, restore=prompt.marker.restore)
            return prompt.text if request.return_rendered else "", ids

        text, ids = await self._service.offload(len(texts[0]), finish, inline_below=settings.inline_chars)
        end = time.perf_counter()
        self._service.num_tokens.labels("encoded").inc(len(ids))
        self._service.seconds.labels("render").observe(rendered - begin)
        self._service.seconds.labels("encode").observe(end - rendered)
        log.info(
            "tokenizer.chat_encoded", num_messages=len(request.messages), num_tokens=len(ids),
            render_ms=round(1000 * (rendered - begin), 2), encode_ms=round(1000 * (end - rendered), 2),
        )
        return tokenizer_pb2.EncodeReply(token_ids=ids, rendered=text)

    async def Decode(self, request: Any, context: Any) -> Any:
        if len(request.token_ids) > self._settings.max_tokens_per_call:
            raise LimitExceeded(
                f"{len(request.token_ids)} tokens, at most {self._settings.max_tokens_per_call} are allowed", param="token_ids")
        begin = time.perf_counter()
        loaded = await self._service.models.get(request.model)
        text, pieces = await self._service.offload(
            len(request.token_ids),
            lambda: decode(loaded.vocabulary, request.token_ids, skip_special_tokens=request.skip_special_tokens),
            inline_below=_INLINE_TOKENS)
        self._service.num_tokens.labels("decoded").inc(len(pieces))
        self._service.seconds.labels("decode").observe(time.perf_counter() - begin)
        return tokenizer_pb2.DecodeReply(text=text, token_bytes=pieces)

    async def Detokenize(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        service, settings = self._service, self._settings
        service.stream_opened()
        stream = DetokenizeStream(
            service.models,
            StreamLimits(
                max_sequences=settings.max_sequences_per_stream, max_stop_strings=settings.max_stop_strings,
                max_stop_chars=settings.max_stop_chars, max_tokens=settings.max_tokens_per_call,
            ),
        )
        num_frames = num_tokens = num_sequences = 0
        decoded, seconds = service.num_tokens.labels("decoded"), service.seconds.labels("detokenize")
        try:
            async for frame in request_iterator:
                begin = time.perf_counter()
                answer = await stream.answer(frame)
                service.num_sequences += len(stream) - num_sequences
                num_sequences = len(stream)
                num_frames += 1
                decoded.inc(stream.num_tokens - num_tokens)
                num_tokens = stream.num_tokens
                service.num_frames.inc()
                seconds.observe(time.perf_counter() - begin)
                yield answer
        finally:
            service.num_sequences -= num_sequences
            service.stream_closed()
            log.info("tokenizer.stream_closed", num_frames=num_frames, num_tokens=num_tokens, num_sequences_left=num_sequences)

    def _prepare(self, loaded: LoadedTokenizer, request: Any) -> Any:
        settings, depth = self._settings, self._settings.max_json_depth
        return prepare_chat(
            loaded.vocabulary,
            [Message(m.role, m.content, m.name, parse_json(m.extra_json, dict, "messages", max_depth=depth)) for m in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=parse_json(request.tools_json, list, "tools_json", max_depth=depth),
            template_kwargs=parse_json(request.template_kwargs_json, dict, "template_kwargs_json", max_depth=depth),
            max_depth=depth,
            max_template_chars=settings.max_template_chars,
            max_rendered_chars=settings.max_rendered_chars,
        )

    def _check_size(self, size: int, param: str, text: str = "") -> None:
        limit = self._settings.max_text_bytes
        if size > limit or (4 * size > limit and text and len(text.encode()) > limit):
            raise PayloadTooLarge(f"{param} is larger than {limit} bytes", param=param)



