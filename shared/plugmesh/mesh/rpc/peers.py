"""Whether the other ends of running calls are still there.

One watch per connection, not per call. A peer that was silent for `ping_s` is pinged; when the broker says that nobody
listens at its inbox any more, it is dead and its calls fail at once; when it stays silent for `silence_s` (stopped, or
its event loop is stuck) they fail, too. While the connection to the broker is down nobody is judged.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from plugmesh.errors import DataLoss, PlugmeshError, Unavailable
from plugmesh.mesh.rpc import frames
from plugmesh.mesh.rpc.carrier import UNKNOWN, Carrier, is_no_responders
from plugmesh.tasks import end

if TYPE_CHECKING:
    from plugmesh.mesh.rpc.pipe import Pipe

log = structlog.get_logger()

PING_TOKEN = "ping"  # noqa: S105 - a part of a subject


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for others, in seconds."""

    ping_s: float = 0.5
    silence_s: float = 4.0
    grace_s: float = 4.0       # after a reconnection: others may need as long to be back


@dataclass(slots=True)
class Peer:
    """The connection at the other end of some of our calls."""

    root: str
    instance: str
    incarnation: str
    token: str                 # our route for its answers to pings
    heard: float
    pipes: set[Any] = field(default_factory=set)


class PeerWatch:
    """Pings peers and tells pipes when theirs is gone. `start` and `stop` on the event loop."""

    def __init__(self, carrier: Carrier, patience: Patience | None = None) -> None:
        self.carrier = carrier
        self.patience = patience or Patience()
        self._peers: dict[str, Peer] = {}
        self._pipes: set[Pipe] = set()
        self._unanswered: dict[Pipe, float] = {}      # opened, nobody has taken it yet; time of opening
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None
        self.on_lost: Callable[[str, str], None] | None = None   # told (instance, incarnation) of a lost peer
        self._connected_at = -1e9
        self._undo = carrier.on_state(self._on_state)
        carrier.routes[PING_TOKEN] = self._answer_ping
        carrier.routes[UNKNOWN] = self._on_unknown

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="plugmesh-peer-watch")

    async def stop(self) -> None:
        self._undo()
        if self._task is not None:
            await end(self._task)
            self._task = None

    def opened(self, pipe: Pipe) -> None:
        """A call went out; somebody must take it within `silence_s`."""
        self._pipes.add(pipe)
        self._unanswered[pipe] = pipe.loop.time()

    def join(self, pipe: Pipe, subject: str, instance: str, incarnation: str) -> None:
        """The pipe's peer is known: frames go to `subject`."""
        root = subject.rpartition(".")[0]
        now = pipe.loop.time()
        peer = self._peers.get(root)
        if peer is None:
            peer = self._peers[root] = Peer(root, instance, incarnation, f"k{next(self._numbers)}", now)
            self.carrier.routes[peer.token] = functools.partial(self._on_pong, peer)
        peer.heard = now
        peer.pipes.add(pipe)
        pipe.peer_state = peer
        self._pipes.add(pipe)
        self._unanswered.pop(pipe, None)

    def keep(self, pipe: Pipe) -> None:
        """An interruption is over only when this pipe's peer has said where it is."""
        self._pipes.add(pipe)

    def leave(self, pipe: Pipe) -> None:
        self._pipes.discard(pipe)
        self._unanswered.pop(pipe, None)
        peer = pipe.peer_state
        if peer is not None:
            peer.pipes.discard(pipe)
            if not peer.pipes and self._peers.get(peer.root) is peer:
                self._drop(peer)
            pipe.peer_state = None

    def incarnation_left(self, instance: str, incarnation: str) -> None:
        """Discovery removed an instance: its calls fail, whatever its connection says."""
        for peer in list(self._peers.values()):
            if peer.instance == instance and peer.incarnation == incarnation:
                self._lost(peer, f"instance {instance} has left the mesh")

    @property
    def num_pipes(self) -> int:
        return len(self._pipes)

    # --- inner workings -------------------------------------------------------------------------------------------

    def _on_state(self, connected: bool) -> None:
        if not connected:
            for pipe in self._pipes:
                pipe.on_disconnected()
            return
        loop = asyncio.get_running_loop()
        self._connected_at = loop.time()
        self._forgive(self._connected_at)
        for pipe in list(self._pipes):
            pipe.resync()

    def _forgive(self, now: float) -> None:
        for peer in self._peers.values():
            peer.heard = now
        for pipe in self._unanswered:
            self._unanswered[pipe] = now

    def in_grace(self) -> bool:
        """Whether we reconnected so recently that "nobody listens" may only mean "not back yet"."""
        return asyncio.get_running_loop().time() - self._connected_at < self.patience.grace_s

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            await asyncio.sleep(self.patience.ping_s)
            now = loop.time()
            if now - last > self.patience.ping_s + 1.0:
                # We were stopped or stuck ourselves: what others sent meanwhile is still to be read.
                self._forgive(now)
            last = now
            if self.carrier.connected:
                try:
                    self._tick(now)
                except Exception:
                    log.exception("rpc.peer_watch_failed")

    def _tick(self, now: float) -> None:
        silence_s = self.patience.silence_s
        for pipe, since in list(self._unanswered.items()):
            if now - since > silence_s:
                pipe.on_broken(Unavailable(f"nobody took the call within {silence_s:g} s", retry_after_s=1.0))
        for pipe in list(self._pipes):
            if pipe.resyncing:
                pipe.resync()
            else:
                pipe.check(now)
        for peer in list(self._peers.values()):
            idle = now - peer.heard
            if idle > silence_s:
                self._lost(peer, f"no sign of life from instance {peer.instance or peer.root} for {silence_s:g} s")
            elif idle > self.patience.ping_s * 0.9:
                self.carrier.publish(f"{peer.root}.{PING_TOKEN}", b"", f"{self.carrier.inbox}.{peer.token}")

    def _answer_ping(self, message: Any) -> None:
        if message.reply:
            self.carrier.publish(message.reply, b"")

    def _on_unknown(self, message: Any) -> None:
        """A packet for a call that is over here. Who asks about it is told so."""
        if message.reply and message.data:
            try:
                flags = frames.decode(message.data).flags
            except DataLoss:
                return
            if flags & (frames.SYNC_REQUEST | frames.CHECK):
                self.carrier.publish(message.reply, frames.encode(frames.Packet(frames.RESET)))

    def _on_pong(self, peer: Peer, message: Any) -> None:
        if not is_no_responders(message):
            peer.heard = asyncio.get_running_loop().time()
        elif not self.in_grace() and self._peers.get(peer.root) is peer:
            self._lost(peer, f"instance {peer.instance or peer.root} is gone")

    def _drop(self, peer: Peer) -> None:
        self._peers.pop(peer.root, None)
        self.carrier.routes.pop(peer.token, None)

    def _lost(self, peer: Peer, why: str) -> None:
        self._drop(peer)
        if self.on_lost is not None and peer.instance:
            self.on_lost(peer.instance, peer.incarnation)
        error: PlugmeshError = Unavailable(why, retry_after_s=1.0)
        for pipe in list(peer.pipes):
            pipe.on_broken(error)
