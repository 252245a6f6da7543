"""Tables of tokens' bytes, so that this gateway can turn ids into text by itself; got from a tokenizer instance."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
import structlog

from plugmesh.errors import DataLoss, PlugmeshError
from plugmesh.mesh.api import Mesh
from plugmesh.wire import error_from_rpc
from plugmesh_proto.v1 import tokenizer_pb2, tokenizer_pb2_grpc

from .peers import Peers
from .prepare import ServedModel

log = structlog.get_logger()

_FETCH_S = 30.0
_RETRY_S = 30.0
_MAX_TABLES = 8        # 3 MB each for 49,000 tokens
_MAX_TOKENS = 4_000_000


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Implements `plugmesh.detokenize.TokenTable`."""

    vocab_size: int
    token_bytes: tuple[bytes | None, ...]
    special_ids: frozenset[int]


class Vocabularies:
    """One table per model version. Fetching runs beside requests, which use the tokenizer's own stream meanwhile."""

    def __init__(self, mesh: Mesh, peers: Peers, *, is_enabled: bool) -> None:
        self.mesh = mesh
        self.peers = peers
        self.is_enabled = is_enabled
        self._tables: dict[str, TokenBytes] = {}
        self._retry_at: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def known(self, model: ServedModel) -> TokenBytes | None:
        """The table of a model, or None while it is not here; then somebody fetches it."""
        key = model.version or model.model
        table = self._tables.get(key)
        if table is None and self.is_enabled and key not in self._tasks and time.monotonic() >= self._retry_at.get(key, 0.0):
            task = self._tasks[key] = asyncio.create_task(self._fetch(key, model.model), name=f"vocabulary:{model.model}")
            task.add_done_callback(lambda _: self._tasks.pop(key, None))
        return table

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, key: str, model: str) -> None:
        # Whatever goes wrong, requests are served without the table.
        began = time.monotonic()
        self._retry_at[key] = began + _RETRY_S
        try:
            table = await self._read(model)
        except grpc.RpcError as e:
            log.info("vocabulary.unavailable", model=model, code=error_from_rpc(e).code)
            return
        except PlugmeshError as e:
            log.warning("vocabulary.malformed", model=model, code=e.code, error=e.message)
            return
        while len(self._tables) >= _MAX_TABLES:
            del self._tables[next(iter(self._tables))]
        self._tables[key] = table
        self._retry_at.pop(key, None)
        log.info("vocabulary.fetched", model=model, num_tokens=table.vocab_size, fetch_ms=round(1000 * (time.monotonic() - began), 1))

    async def _read(self, model: str) -> TokenBytes:
        """Raises grpc.RpcError, DataLoss."""
        live = self.peers.live()
        channel = self.mesh.channel("tokenizer", live[0].instance_id) if live else self.mesh.channel("tokenizer")
        pieces: list[bytes | None] = []
        special: frozenset[int] = frozenset()
        hashes: set[str] = set()
        size = 0
        async for part in tokenizer_pb2_grpc.TokenizerStub(channel).Vocabulary(tokenizer_pb2.DescribeTokenizerRequest(model=model), timeout=_FETCH_S):
            if not pieces:
                size, special = part.vocab_size, frozenset(part.special_ids)
            hashes.add(part.tokenizer_hash)
            if part.first_id != len(pieces) or len(hashes) > 1 or size > _MAX_TOKENS:
                raise DataLoss(f"a vocabulary of {size} tokens came in parts that do not fit together")
            pieces.extend(part.token_bytes)
            for missing in part.missing_ids:
                if not part.first_id <= missing < len(pieces):
                    raise DataLoss(f"a vocabulary of {size} tokens calls {missing} missing elsewhere")
                pieces[missing] = None
        if len(pieces) != size or not size:
            raise DataLoss(f"a vocabulary of {size} tokens came with {len(pieces)}")
        return TokenBytes(size, tuple(pieces), special)
