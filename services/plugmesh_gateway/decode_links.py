"""Token frames in, commands out: one Session per decode instance carries all requests of this gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import structlog

from plugmesh.errors import DataLoss, PlugmeshError, Unavailable
from plugmesh.mesh.api import Mesh
from plugmesh.types import InstanceInfo
from plugmesh_proto.v1 import decode_pb2, decode_pb2_grpc

from .links import Link, was_cancelled
from .peers import Peers

log = structlog.get_logger()


class RowSink(Protocol):
    """Who takes the rows of one attempt."""

    def on_row(self, row: Any) -> None: ...
    def on_decode_lost(self, cause: str, error: PlugmeshError) -> None: ...


class DecodeLinks:
    """Sessions to decode instances, opened when first used.

    `before_frame()` and `on_frame()` are called before and after the rows of each frame are handed out.

    Args:
        stall_s: Without a frame and without an answer to Status for so long, an instance with work is given up.
        hang_s: It answers and has running sequences, but its step counter stands still for so long: given up, too.
    """

    def __init__(
        self, mesh: Mesh, *, stall_s: float, hang_s: float, on_frame: Callable[[], None], before_frame: Callable[[], None] = lambda: None
    ) -> None:
        self.mesh = mesh
        self.peers = Peers(mesh, "decode", self._on_gone)
        self.stall_s = stall_s
        self.hang_s = hang_s
        self._on_frame = on_frame
        self._before_frame = before_frame
        self._links: dict[str, Link] = {}
        self._sinks: dict[Link, dict[str, RowSink]] = {}
        self._probes: dict[Link, asyncio.Task[None]] = {}
        self._steps: dict[Link, tuple[int, float]] = {}  # steps seen by probes, and since when
        self._watchdog: asyncio.Task[None] | None = None
        self._closed: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.peers.start()
        self._watchdog = asyncio.create_task(self._watch(), name="decode-watchdog")

    async def stop(self) -> None:
        self.peers.stop()
        tasks = [t for t in (self._watchdog, *self._probes.values()) if t is not None]
        for task in tasks:
            task.cancel()
        links = list(self._sinks)
        for link in links:
            link.close()
        await asyncio.gather(*tasks, *(link.wait_closed() for link in links), return_exceptions=True)
        self._links.clear()
        self._sinks.clear()

    @property
    def num_unsent(self) -> int:
        return sum(link.num_unsent for link in self._sinks)

    @property
    def num_requests(self) -> int:
        return sum(len(s) for s in self._sinks.values())

    def submit(self, info: InstanceInfo, request: decode_pb2.GenerateRequest, sink: RowSink) -> Link:
        """Starts one attempt; rows come to `sink` until `forget`, `request_done` or the loss of the link."""
        link = self._links.get(info.instance_id)
        if link is not None and (not link.is_open or link.info.incarnation != info.incarnation):
            self._give_up(link, "restarted", Unavailable("the decode instance was restarted", retry_after_s=1))
            link = None
        if link is None:
            stub = decode_pb2_grpc.DecodeStub(self.mesh.channel("decode", info.instance_id))
            link = Link(info, stub.Session, on_message=self._on_message, on_lost=self._on_lost)
            self._links[info.instance_id] = link
            self._sinks[link] = {}
        if not self._sinks[link]:
            link.last_alive = time.monotonic()  # idle time is no stall
        self._sinks[link][request.request_id] = sink
        link.send(decode_pb2.DecodeCommand(submit=request))
        return link

    def cancel(self, link: Link, attempt_id: str) -> None:
        """Cancels one attempt and forgets it; rows still on their way are dropped."""
        if self._sinks.get(link, {}).pop(attempt_id, None) is not None:
            link.send(decode_pb2.DecodeCommand(cancel=decode_pb2.CancelRequest(request_id=attempt_id)))

    def cancel_and_listen(self, link: Link, attempt_id: str) -> None:
        """Cancels one attempt without forgetting it: rows that were on their way still come, the last of them with `request_done`."""
        if attempt_id in self._sinks.get(link, {}):
            link.send(decode_pb2.DecodeCommand(cancel=decode_pb2.CancelRequest(request_id=attempt_id)))

    def cancel_sequence(self, link: Link, attempt_id: str, sequence: int) -> None:
        """Cancels one sequence of an attempt, whose other sequences go on."""
        if attempt_id in self._sinks.get(link, {}):
            link.send(decode_pb2.DecodeCommand(cancel=decode_pb2.CancelRequest(request_id=attempt_id, sequence=sequence, one_sequence=True)))

    def _on_message(self, link: Link, frame: decode_pb2.TokenFrame) -> None:
        sinks = self._sinks.get(link)
        if sinks is None:
            return
        self.peers.trust(link.info)
        self._before_frame()
        try:
            for row in frame.rows:
                request_id = row.request_id
                sink = sinks.get(request_id)
                if sink is None:
                    continue  # cancelled or migrated: its late rows mean nothing
                if row.request_done:
                    del sinks[request_id]
                sink.on_row(row)
        finally:
            self._on_frame()

    def _on_lost(self, link: Link, error: PlugmeshError) -> None:
        self._give_up(link, "lost", error)

    def _on_gone(self, info: InstanceInfo, why: str) -> None:
        link = self._links.get(info.instance_id)
        if link is None or link.info.incarnation != info.incarnation:
            return
        if why == "suspect" and time.monotonic() - link.last_alive < 1.0 and self._sinks.get(link):
            return  # it delivers frames, so only its lease is late; the watchdog keeps looking
        self._give_up(link, why, Unavailable(f"decode instance {info.instance_id} is gone ({why})", retry_after_s=1))

    def _give_up(self, link: Link, cause: str, error: PlugmeshError) -> None:
        if link not in self._sinks:
            return
        link.close()
        if self._links.get(link.info.instance_id) is link:
            del self._links[link.info.instance_id]
        sinks = self._sinks.pop(link)
        self._steps.pop(link, None)
        probe = self._probes.pop(link, None)
        if probe is not None and probe is not asyncio.current_task():
            probe.cancel()
        if cause != "drained":
            self.peers.suspect(link.info, self.stall_s / 2 if cause in ("stalled", "suspect") else min(0.5, self.stall_s))
            log.warning("decode.lost", peer=link.info.instance_id, cause=cause, code=error.code, num_requests=len(sinks))
        for sink in sinks.values():
            sink.on_decode_lost(cause, error)

    async def _watch(self) -> None:
        tick = min(max(self.stall_s / 4, 0.02), 0.5)
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            for link, sinks in list(self._sinks.items()):
                if not sinks:
                    self._steps.pop(link, None)
                    if self.peers.is_leaving(link.info):
                        self._give_up(link, "drained", Unavailable("the decode instance is draining"))
                    continue
                if now - link.last_alive > self.stall_s:
                    self._give_up(link, "stalled", Unavailable(f"decode instance {link.info.instance_id} does not answer", retry_after_s=1))
                elif now - link.last_alive > self.stall_s / 8 and link not in self._probes:
                    self._probes[link] = asyncio.create_task(self._probe(link), name="decode-probe")

    async def _probe(self, link: Link) -> None:
        """Asks for the status of an instance that sends no frames: it may be computing a long prompt, or be stopped."""
        try:
            stub = decode_pb2_grpc.DecodeStub(self.mesh.channel("decode", link.info.instance_id))
            status = await stub.Status(decode_pb2.DecodeStatusRequest(), timeout=self.stall_s / 2)
            now = time.monotonic()
            link.last_alive = now
            num_steps, since = self._steps.get(link, (-1, now))
            if status.num_steps != num_steps or status.num_running == 0:
                self._steps[link] = (status.num_steps, now)
            elif now - since > self.hang_s:
                self._give_up(link, "stalled", DataLoss(f"decode instance {link.info.instance_id} makes no steps"))
        except grpc.RpcError:
            pass  # counts as no sign of life
        except asyncio.CancelledError:
            if was_cancelled():
                raise
        finally:
            self._probes.pop(link, None)
