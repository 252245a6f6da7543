"""Prompts to token ids, and facts of models: the unary calls before a request runs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from plugmesh.errors import Cancelled, DeadlineExceeded, NotFound, PlugmeshError, Unavailable
from plugmesh.mesh.api import Mesh
from plugmesh.types import InstanceInfo
from plugmesh.wire import error_from_rpc, layout_from_pb
from plugmesh_proto.v1 import decode_pb2, decode_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc

from .links import was_cancelled
from .peers import Peers
from .request import ChatPrompt, Prompt, TextPrompt

log = structlog.get_logger()

_TRY_S = 5.0        # one attempt at a tokenizer; encoding takes milliseconds, so more means that it is stuck
_MAX_TRIES = 4
_PIECES_PER_CALL = 4096  # their bytes fit into one message of the bus


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that at least one decode instance serves.

    `layout_key` seeds the names of its KV blocks, in the layout of the first of its instances; empty when it told none.
    """

    model: str
    version: str
    context_length: int
    is_default: bool
    first_seen_unix_s: int
    layout_key: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What limits, end tokens and tools need."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    chat_template: str = ""     # that for chats with tools; empty when there is none, or too long a one


class Models:
    """What is served by whom: asked once from each life of a decode instance."""

    def __init__(self, mesh: Mesh, decode: Peers, default_model: str) -> None:
        self.mesh = mesh
        self.decode = decode
        self.default_model = default_model
        self._known: dict[str, tuple[str, str, ServedModel]] = {}   # instance id to incarnation, weight version, model
        self._failed: dict[str, tuple[str, float]] = {}

    async def served(self) -> list[ServedModel]:
        """Models of the live decode instances, the default one first."""
        return [m for m, _ in await self._groups()]

    async def choose(self, name: str) -> tuple[ServedModel, frozenset[str]]:
        """The model meant by `name` (alias, version, or empty) and the decode instances that serve it.

        Raises:
            NotFound: Nobody serves it.
            Unavailable: No decode instance lives.
        """
        groups = await self._groups()
        if not groups:
            raise Unavailable("no decode instance is ready", retry_after_s=2)
        if name in ("", self.default_model):
            return groups[0]
        for model, instances in groups:
            if name in (model.model, model.version):
                return model, instances
        raise NotFound(f"model {name[:128]!r} is not served here", param="model", openai_code="model_not_found")

    async def _groups(self) -> list[tuple[ServedModel, frozenset[str]]]:
        live = self.decode.live()
        now = time.monotonic()
        unknown = []
        for info in live:
            known = self._known.get(info.instance_id)
            if known is not None and known[0] == info.incarnation and known[1] == info.weight_version:
                continue
            failed = self._failed.get(info.instance_id)
            if failed is None or failed[0] != info.incarnation or now > failed[1]:
                unknown.append(info)
        if unknown:
            await asyncio.gather(*(self._ask(info) for info in unknown))
        ids = {info.instance_id for info in live}
        for gone in [i for i in self._known if i not in ids]:
            if len(self._known) > 256:
                del self._known[gone]
        groups: dict[tuple[str, str], tuple[ServedModel, set[str]]] = {}
        for info in live:
            known = self._known.get(info.instance_id)
            if known is None or known[0] != info.incarnation:
                continue
            model = known[2]
            groups.setdefault((model.model, model.version), (model, set()))[1].add(info.instance_id)
        ordered = sorted(groups.values(), key=lambda g: (not g[0].is_default, g[0].first_seen_unix_s, g[0].model))
        if ordered and not ordered[0][0].is_default:  # [mesh] model may be a path or another name for what is served
            first, instances = ordered[0]
            ordered[0] = (dataclasses.replace(first, is_default=True), instances)
        return [(model, frozenset(instances)) for model, instances in ordered]

    async def _ask(self, info: InstanceInfo) -> None:
        stub = decode_pb2_grpc.DecodeStub(self.mesh.channel("decode", info.instance_id))
        try:
            status = await stub.Status(decode_pb2.DecodeStatusRequest(), timeout=3.0)
        except (grpc.RpcError, asyncio.CancelledError) as e:
            if was_cancelled() and isinstance(e, asyncio.CancelledError):
                raise
            code = error_from_rpc(e).code if isinstance(e, grpc.RpcError) else "cancelled"
            log.warning("decode.status_failed", peer=info.instance_id, code=code)
            self._failed[info.instance_id] = (info.incarnation, time.monotonic() + 1.0)
            return
        self._failed.pop(info.instance_id, None)
        model, version = status.model or info.model, status.weight_version or info.weight_version
        self._known[info.instance_id] = (info.incarnation, info.weight_version, ServedModel(
            model=model, version=version, context_length=status.max_model_len,
            is_default=self.default_model in (model, version), first_seen_unix_s=int(info.started_unix_s or time.time()),
            layout_key=layout_from_pb(status.layout).key() if status.HasField("layout") else b""))


class Tokenizers:
    """Unary calls to any tokenizer instance; one that is stuck or gone is left for another within the deadline."""

    def __init__(self, mesh: Mesh, peers: Peers) -> None:
        self.mesh = mesh
        self.peers = peers
        self._turn = 0
        self._facts: dict[str, TokenizerFacts] = {}
        self._pieces: dict[str, dict[int, bytes]] = {}

    async def facts(self, model: ServedModel, deadline: float) -> TokenizerFacts:
        """Vocabulary size and end tokens; asked once per model version."""
        key = model.version or model.model
        facts = self._facts.get(key)
        if facts is None:
            reply = await self._call("Describe", tokenizer_pb2.DescribeTokenizerRequest(model=model.model), deadline)
            if len(self._facts) >= 64:
                self._facts.clear()
            facts = self._facts[key] = TokenizerFacts(reply.vocab_size, frozenset(reply.eos_token_ids), reply.chat_template)
        return facts

    async def encode(self, model: ServedModel, prompt: Prompt, deadline: float) -> tuple[int, ...]:
        """Token ids of a prompt. Raises InvalidRequest (a template refused the messages), Unavailable, DeadlineExceeded."""
        if isinstance(prompt, ChatPrompt):
            reply = await self._call("EncodeChat", tokenizer_pb2.EncodeChatRequest(
                model=model.model, add_generation_prompt=prompt.add_generation_prompt, continue_final_message=prompt.continue_final_message,
                template_kwargs_json=prompt.template_kwargs_json, tools_json=prompt.tools_json,
                messages=[tokenizer_pb2.ChatMessage(role=m.role, content=m.content, name=m.name, extra_json=m.extra_json) for m in prompt.messages],
            ), deadline)
        elif isinstance(prompt, TextPrompt):
            reply = await self._call("Encode", tokenizer_pb2.EncodeRequest(model=model.model, text=prompt.text, add_special_tokens=True), deadline)
        else:
            return prompt.token_ids
        return tuple(reply.token_ids)

    async def decode(self, model: ServedModel, token_ids: Sequence[int], deadline: float) -> str:
        """The text of ids, special tokens left out."""
        reply = await self._call("Decode", tokenizer_pb2.DecodeRequest(model=model.model, token_ids=token_ids, skip_special_tokens=True), deadline)
        return str(reply.text)

    async def pieces(self, model: ServedModel, token_ids: Iterable[int], deadline: float) -> dict[int, bytes]:
        """The exact bytes of tokens, for log-probabilities; kept per model, so that most calls ask nobody."""
        known = self._pieces.setdefault(model.version or model.model, {})
        missing = sorted({t for t in token_ids if t not in known})
        for i in range(0, len(missing), _PIECES_PER_CALL):
            if len(self._pieces) > 64:
                self._pieces = {model.version or model.model: known}
            part = missing[i : i + _PIECES_PER_CALL]
            reply = await self._call("Decode", tokenizer_pb2.DecodeRequest(model=model.model, token_ids=part), deadline)
            known.update(zip(part, reply.token_bytes, strict=True))
        return known

    async def _call(self, method: str, message: Any, deadline: float) -> Any:
        error: PlugmeshError = Unavailable("no tokenizer instance is ready", retry_after_s=2)
        for _ in range(_MAX_TRIES):
            live = self.peers.live()
            if not live:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded("the deadline passed while the prompt was tokenized")
            self._turn += 1
            info = live[self._turn % len(live)]
            stub = tokenizer_pb2_grpc.TokenizerStub(self.mesh.channel("tokenizer", info.instance_id))
            try:
                return await getattr(stub, method)(message, timeout=min(left, _TRY_S))
            except grpc.RpcError as e:
                error = error_from_rpc(e)
                if not isinstance(error, Unavailable | DeadlineExceeded | Cancelled):
                    raise error from None
            except asyncio.CancelledError:
                if was_cancelled():
                    raise
                error = Unavailable(f"tokenizer instance {info.instance_id} cancelled the call", retry_after_s=1)
            log.warning("tokenizer.call_failed", peer=info.instance_id, method=method, code=error.code)
            self.peers.suspect(info, 1.0)
        if isinstance(error, DeadlineExceeded | Cancelled) and deadline - time.monotonic() > 0:
            error = Unavailable("the tokenizers do not answer", retry_after_s=2)
        raise error
