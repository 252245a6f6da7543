"""Token ids out, text in: one Detokenize stream per tokenizer instance, one frame out per token frame in."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence as Seq
from typing import Any, Protocol

import structlog

from plugmesh.errors import PlugmeshError, Unavailable
from plugmesh.mesh.api import Mesh
from plugmesh.tasks import end
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import tokenizer_pb2, tokenizer_pb2_grpc

from .links import Link
from .peers import Peers

log = structlog.get_logger()

_FRAME_BYTES = 128 * 1024   # an estimate above which a frame leaves early; a message of the bus holds 256 KiB
_REPLAY_TOKENS = 16384      # of one sequence in one frame


class TextSink(Protocol):
    """One sequence whose text is wanted."""

    def on_text(self, text: Any) -> None: ...
    def on_text_lost(self) -> None:
        """The tokenizer is gone; open the sequence again."""


class TextSequence:
    """A sequence open on one link."""

    __slots__ = ("is_final_sent", "link", "num_sent", "sequence_id", "sink")

    def __init__(self, link: Link, sequence_id: int, sink: TextSink, num_sent: int) -> None:
        self.link = link
        self.sequence_id = sequence_id
        self.sink = sink
        self.num_sent = num_sent       # tokens, replayed ones included
        self.is_final_sent = False


class TextLinks:
    """Detokenize streams, opened when first used.

    What the callers add between two calls of `flush` travels in one frame per tokenizer instance.
    """

    def __init__(self, mesh: Mesh, *, stall_s: float) -> None:
        self.mesh = mesh
        self.peers = Peers(mesh, "tokenizer", self._on_gone)
        self.stall_s = stall_s
        self._ids = itertools.count(1)
        self._links: dict[str, Link] = {}
        self._sequences: dict[Link, dict[int, TextSequence]] = {}
        self._waiting: dict[Link, dict[int, float]] = {}  # sequences that await an answer, and since when
        self._frames: dict[Link, tokenizer_pb2.DetokenizeFrame] = {}
        self._frame_bytes: dict[Link, int] = {}
        self._watchdog: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.peers.start()
        self._watchdog = asyncio.create_task(self._watch(), name="text-watchdog")

    async def stop(self) -> None:
        self.peers.stop()
        links = list(self._sequences)
        for link in links:
            link.close()
        if self._watchdog is not None:
            await end(self._watchdog)
        await asyncio.gather(*(link.wait_closed() for link in links), return_exceptions=True)
        self._links.clear()
        self._sequences.clear()

    @property
    def num_unsent(self) -> int:
        return sum(link.num_unsent for link in self._sequences)

    @property
    def num_sequences(self) -> int:
        return sum(len(s) for s in self._sequences.values())

    def open(self, sink: TextSink, *, model: str, stop: Seq[str], replay: Seq[int], num_chars: int) -> TextSequence | None:
        """Opens a sequence on the tokenizer with the fewest. None when no tokenizer lives.

        Args:
            replay: Its tokens so far; `num_chars` characters of their text are delivered already.
        """
        live = self.peers.live()
        if not live:
            return None
        info = min(live, key=lambda i: (len(self._sequences[self._links[i.instance_id]]) if i.instance_id in self._links else 0, i.instance_id))
        link = self._links.get(info.instance_id)
        if link is not None and (not link.is_open or link.info.incarnation != info.incarnation):
            self._give_up(link, "restarted")
            link = None
        if link is None:
            stub = tokenizer_pb2_grpc.TokenizerStub(self.mesh.channel("tokenizer", info.instance_id))
            link = Link(info, stub.Detokenize, on_message=self._on_message, on_lost=lambda link, e: self._give_up(link, "lost", e))
            self._links[info.instance_id] = link
            self._sequences[link] = {}
            self._waiting[link] = {}
        sequence_id = next(self._ids)
        head = replay[:_REPLAY_TOKENS]
        sequence = self._sequences[link][sequence_id] = TextSequence(link, sequence_id, sink, len(head))
        self._frame(link, 64 + 4 * len(head) + sum(4 * len(s) for s in stop)).open.add(
            sequence_id=sequence_id, model=model, stop=stop, skip_special_tokens=True, replay_token_ids=head, num_delivered_chars=num_chars)
        for i in range(len(head), len(replay), _REPLAY_TOKENS):
            self.add(sequence, replay[i : i + _REPLAY_TOKENS], False)
        return sequence

    def add(self, sequence: TextSequence, token_ids: Seq[int], is_final: bool) -> None:
        """Tokens of one sequence for the next frame."""
        link = sequence.link
        if sequence.sequence_id in self._sequences.get(link, ()):
            self._frame(link, 16 + 4 * len(token_ids)).tokens.add(sequence_id=sequence.sequence_id, token_ids=token_ids, is_final=is_final)
            sequence.num_sent += len(token_ids)
            sequence.is_final_sent = is_final
            self._waiting[link].setdefault(sequence.sequence_id, time.monotonic())

    def close(self, sequence: TextSequence) -> None:
        """Forgets a sequence here and there. A sequence that ended by itself needs no close."""
        link = sequence.link
        if self._forget(link, sequence.sequence_id):
            self._frame(link, 8).close.append(sequence.sequence_id)

    def flush(self) -> None:
        """Sends what was added, one frame per tokenizer instance."""
        if self._frames:
            frames, self._frames = self._frames, {}
            self._frame_bytes.clear()
            for link, frame in frames.items():
                link.send(frame)

    def _frame(self, link: Link, num_bytes: int) -> tokenizer_pb2.DetokenizeFrame:
        """The frame that is being filled for a link, with room for about `num_bytes` more."""
        frame = self._frames.get(link)
        size = self._frame_bytes.get(link, 0) + num_bytes
        if frame is not None and size > _FRAME_BYTES:
            link.send(frame)
            frame, size = None, num_bytes
        self._frame_bytes[link] = size
        if frame is None:
            frame = self._frames[link] = tokenizer_pb2.DetokenizeFrame()
        return frame

    def _forget(self, link: Link, sequence_id: int) -> bool:
        self._waiting.get(link, {}).pop(sequence_id, None)
        return self._sequences.get(link, {}).pop(sequence_id, None) is not None

    def _on_message(self, link: Link, frame: tokenizer_pb2.DetokenizedFrame) -> None:
        sequences = self._sequences.get(link)
        if sequences is None:
            return
        self.peers.trust(link.info)
        waiting = self._waiting[link]
        for text in frame.texts:
            sequence = sequences.get(text.sequence_id)
            if sequence is None:
                continue
            waiting.pop(text.sequence_id, None)
            if text.is_final or text.stopped or text.error:
                del sequences[text.sequence_id]
            elif sequence.is_final_sent or text.num_tokens_consumed < sequence.num_sent:
                waiting[text.sequence_id] = time.monotonic()
            sequence.sink.on_text(text)
        self.flush()

    def _on_gone(self, info: InstanceInfo, why: str) -> None:
        link = self._links.get(info.instance_id)
        if link is not None and link.info.incarnation == info.incarnation:
            self._give_up(link, why)

    def _give_up(self, link: Link, cause: str, error: PlugmeshError | None = None) -> None:
        if link not in self._sequences:
            return
        error = error or Unavailable(f"tokenizer instance {link.info.instance_id} is gone ({cause})", retry_after_s=1)
        link.close()
        if self._links.get(link.info.instance_id) is link:
            del self._links[link.info.instance_id]
        self._frames.pop(link, None)
        self._frame_bytes.pop(link, None)
        self._waiting.pop(link, None)
        sequences = self._sequences.pop(link)
        if cause != "drained":
            self.peers.suspect(link.info, self.stall_s / 2 if cause in ("stalled", "suspect") else min(0.5, self.stall_s))
            log.warning("tokenizer.lost", peer=link.info.instance_id, cause=cause, code=error.code, num_sequences=len(sequences))
        for sequence in sequences.values():
            sequence.sink.on_text_lost()
        self.flush()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(max(self.stall_s / 4, 0.02), 0.5))
            for link, sequences in list(self._sequences.items()):
                if not sequences and self.peers.is_leaving(link.info):
                    self._give_up(link, "drained")  # it waits for the end of this stream
            now = time.monotonic()
            for link, waiting in list(self._waiting.items()):
                # An answer pops its sequence and the next token adds it at the end, so the first is the oldest.
                oldest = next(iter(waiting.values()), now)
                if now - oldest > self.stall_s:
                    self._give_up(link, "stalled")
