"""One end of one call: packets in order, credit, batching, and going on after the broker was away.

Order. Every packet of a direction has the next sequence number. A hole or a repetition ends the call with DataLoss,
except around an interruption of the connection:

Silence. A hole shows only when the next packet comes. So a client that has heard nothing for a while sends CHECK, with
the number of its next packet; the server answers with its own. As carriers keep the order, each then knows whether
something is missing.

Interruption. Each end keeps what it sent until the other end acknowledged it (every packet carries an acknowledgement;
the credit window bounds what is kept). While the connection is down packets are only kept. When it is back, an end sends
SYNC_REQUEST with its acknowledgement until it hears SYNC_ACK; whoever hears either sends again, marked AGAIN, what the
other lacks. An end that no longer knows the call answers RESET.

Source: the retransmission idea is TCP's; that lost frames are errors rather than silently repaired while the connection
stands is the mesh's own rule (a hole then means a bug or a broker that sheds).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from plugmesh.errors import DataLoss, PayloadTooLarge, PlugmeshError
from plugmesh.mesh.rpc import frames
from plugmesh.mesh.rpc.carrier import Carrier, is_no_responders
from plugmesh.mesh.rpc.flow import ReceiveWindow, SendWindow
from plugmesh.mesh.rpc.frames import Packet
from plugmesh.mesh.rpc.peers import Peer, PeerWatch

FIRST_CHECK_S = 0.5
MAX_CHECK_S = 8.0


class Pipe:
    """Base of both ends of a call. All methods run on the event loop's thread.

    Subclasses implement `on_packet` (sections other than data and credit), `on_broken` (this end must fail the call with
    the error given), `on_nobody` (nobody listens at the subject we sent to) and set `peer` once they know it.
    """

    def __init__(self, carrier: Carrier, watch: PeerWatch, token: str, loop: asyncio.AbstractEventLoop) -> None:
        self.carrier = carrier
        self.watch = watch
        self.token = token
        self.loop = loop
        self.address = f"{carrier.inbox}.{token}"
        self.peer = ""                               # subject for our packets, empty until known
        self.peer_state: Peer | None = None
        self.closed = False                          # this end is finished with the call
        self.heard = loop.time()                     # the last packet of this call
        self.check_after_s = FIRST_CHECK_S
        self._next = 0
        self._expected = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._held: list[bytes] = []                 # encoded before the peer's subject was known
        self.resyncing = False
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._flush_handle: asyncio.Handle | None = None
        self.send_window = SendWindow()
        self.receive_window = ReceiveWindow()
        self._inbound: deque[bytes] = deque()
        self._taker: Callable[[bytes], None] | None = None   # gets messages as they arrive, instead of `read_message`
        self.remote_closed = False                   # no more messages will come
        self._readers: deque[asyncio.Future[None]] = deque()
        self._writers: deque[asyncio.Future[None]] = deque()
        carrier.routes[token] = self.deliver

    # --- for subclasses -------------------------------------------------------------------------------------------

    def on_packet(self, p: Packet) -> None:
        raise NotImplementedError

    def on_broken(self, error: PlugmeshError) -> None:
        raise NotImplementedError

    def on_nobody(self) -> None:
        raise NotImplementedError

    # --- sending --------------------------------------------------------------------------------------------------

    def emit(self, p: Packet, *, subject: str = "") -> None:
        """Numbers, encodes and sends a packet, after what is batched. `subject` overrides the peer for a call's opening."""
        p.sequence = self._next
        p.ack = self._expected
        self._next += 1
        data = frames.encode(p)
        if subject:
            self.carrier.publish(subject, data, self.address)
            return
        self._kept.append((p.sequence, data))
        if not self.peer:
            self._held.append(data)
        elif not self.resyncing and not self.carrier.publish(self.peer, data, self.address):
            self.resyncing = True

    def peer_known(self, subject: str) -> None:
        """From now on packets go to `subject`; what waited for it goes first."""
        self.peer = subject
        held, self._held = self._held, []
        if not self.resyncing:
            for data in held:
                self.carrier.publish(subject, data, self.address)

    def add_batched(self, p: Packet) -> Packet:
        """Puts the messages that wait for a flush into this packet."""
        if self._batch:
            p.flags |= frames.DATA
            p.messages = self._batch
            self._batch = []
            self._batch_bytes = 0
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        return p

    def decorate(self, p: Packet) -> Packet:
        """Hook: sections to add to the next packet (the server's PEER and INITIAL)."""
        return p

    def flush(self) -> None:
        self._flush_handle = None
        if self._batch and not self.closed:
            self.emit(self.decorate(self.add_batched(Packet())))

    def check_size(self, message: bytes) -> None:
        """Raises PayloadTooLarge above the carrier's cap."""
        cap = self.carrier.max_message_bytes
        if cap is not None and len(message) > cap:
            raise PayloadTooLarge(f"message of {len(message)} bytes is over the limit of {cap} bytes", limit_bytes=cap)

    async def write_message(self, message: bytes) -> bool:
        """Sends one message when there is credit. Returns False when the call ended instead.

        Raises PayloadTooLarge before anything is sent.
        """
        self.check_size(message)
        while not self.closed and not self.send_window.is_open():
            self.flush()
            await self._wait(self._writers)
        if self.closed:
            return False
        self.send_window.spend(len(message))
        self._batch.append(message)
        self._batch_bytes += len(message)
        if self._batch_bytes >= frames.BATCH_BYTES:
            if self._flush_handle is not None:
                self._flush_handle.cancel()
            self.flush()
        elif self._flush_handle is None:
            self._flush_handle = self.loop.call_soon(self.flush)
        return True

    def write_at_once(self, message: bytes) -> bool:
        """As `write_message`, leaving before this returns, with what is batched before it; False when it would have to wait.

        False also for a message that `write_message` would refuse, and for a call that ended.
        """
        cap = self.carrier.max_message_bytes
        if self.closed or self._writers or not self.send_window.is_open() or (cap is not None and len(message) > cap):
            return False
        self.send_window.spend(len(message))
        self._batch.append(message)
        self.emit(self.decorate(self.add_batched(Packet())))
        return True

    # --- receiving ------------------------------------------------------------------------------------------------

    def deliver(self, message: Any) -> None:
        """What arrives at our address."""
        if message.headers is not None and is_no_responders(message):
            if not self.closed:
                self.on_nobody()
            return
        try:
            p = frames.decode(message.data)
        except DataLoss as e:
            self.on_broken(e)
            return
        self.heard = self.loop.time()
        if self.peer_state is not None:
            self.peer_state.heard = self.heard
        if p.flags & frames.UNSEQUENCED:
            if p.flags & frames.CHECK:
                self._on_check(p)
            else:
                self._on_sync(p, message.reply)
            return
        self.check_after_s = FIRST_CHECK_S
        if p.sequence != self._expected:
            if not self.resyncing and not (p.flags & frames.AGAIN and p.sequence < self._expected):
                self.on_broken(DataLoss(f"packet {p.sequence} arrived where {self._expected} was due"))
            return
        self._expected += 1
        self._acknowledged(p.ack)
        self.accept(p)

    def accept(self, p: Packet) -> None:
        """A packet in order: data and credit here, the rest in `on_packet`."""
        if p.flags & frames.DATA:
            try:
                for m in p.messages:
                    self.receive_window.arrived(len(m))
                    self._inbound.append(m)
            except DataLoss as e:
                self.on_broken(e)
                return
            if self._taker is None:
                self._wake(self._readers)
            else:
                self._hand_over()
        if p.flags & frames.CREDIT:
            self.send_window.grant(*p.credit)
            self._wake(self._writers)
        if p.flags & ~(frames.DATA | frames.CREDIT | frames.AGAIN):
            self.on_packet(p)

    def hand_over_to(self, taker: Callable[[bytes], None]) -> None:
        """From now on messages go to `taker` as they arrive, in the turn of the loop that read them. It must not raise."""
        self._taker = taker
        self._hand_over()

    def _hand_over(self) -> None:
        assert self._taker is not None
        while self._inbound and not self.closed:
            self._taker(self.take())

    async def read_message(self) -> bytes | None:
        """The next message, or None when there will be no more."""
        while not self._inbound:
            if self.remote_closed or self.closed:
                return None
            await self._wait(self._readers)
        return self.take()

    def take(self) -> bytes:
        """A message that is known to be there; grants credit when it is due."""
        m = self._inbound.popleft()
        grant = self.receive_window.taken(len(m))
        if grant is not None and not self.remote_closed and not self.closed:
            self.emit(self.decorate(self.add_batched(Packet(frames.CREDIT, credit=grant))))
        return m

    def has_inbound(self) -> bool:
        return bool(self._inbound)

    # --- silence --------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Called now and then by the watch; asks after lost packets, less and less often while nothing happens."""
        if self.peer and now - self.heard >= self.check_after_s and not self.closed and not self.resyncing:
            self.check_after_s = min(self.check_after_s * 2, MAX_CHECK_S)
            self.send_check()

    def send_check(self) -> None:
        self._send_sync(frames.CHECK, self.peer)

    def _on_check(self, p: Packet) -> None:
        if self.resyncing:
            return
        if p.sequence > self._expected:
            self.on_broken(DataLoss(f"packets {self._expected} to {p.sequence - 1} are missing"))
            return
        self._acknowledged(p.ack)
        self.on_checked()

    def on_checked(self) -> None:
        """Hook: the peer asked and nothing is missing here."""

    # --- interruption ---------------------------------------------------------------------------------------------

    def on_disconnected(self) -> None:
        self.resyncing = True

    def resync(self) -> None:
        """Asks the peer where it is. Called when the connection is back, and again until it answers."""
        if self.peer and self.resyncing:
            self._send_sync(frames.SYNC_REQUEST, self.peer)

    def _send_sync(self, flag: int, subject: str) -> None:
        self.carrier.publish(subject, frames.encode(Packet(flag, self._next, self._expected)), self.address)

    def _on_sync(self, p: Packet, reply: str) -> None:
        if p.flags & frames.RESET:
            self.on_reset()
            return
        if reply and not self.peer:
            self.peer_known(reply)
        if p.flags & frames.SYNC_REQUEST and reply:
            self._send_sync(frames.SYNC_ACK, reply)
        self._acknowledged(p.ack)
        self.resyncing = False
        self.on_resynced()
        for _, data in list(self._kept):
            self.carrier.publish(self.peer, frames.mark_again(data), self.address)

    def on_resynced(self) -> None:
        """Hook: both ends know again where they are."""

    def on_reset(self) -> None:
        """Hook: the peer does not know the call."""

    def _acknowledged(self, ack: int) -> None:
        kept = self._kept
        while kept and kept[0][0] < ack:
            kept.popleft()

    @property
    def num_kept_bytes(self) -> int:
        return sum(len(data) for _, data in self._kept)

    # --- waiting --------------------------------------------------------------------------------------------------

    async def _wait(self, waiters: deque[asyncio.Future[None]]) -> None:
        future = self.loop.create_future()
        waiters.append(future)
        try:
            await future
        finally:
            if not future.done() or future.cancelled():
                try:
                    waiters.remove(future)
                except ValueError:
                    pass

    def _wake(self, waiters: deque[asyncio.Future[None]]) -> None:
        while waiters:
            future = waiters.popleft()
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """This end is done: wakes whoever waits. Idempotent; the route stays until `forget`."""
        self.closed = True
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        self._wake(self._readers)
        self._wake(self._writers)

    def forget(self) -> None:
        """Takes the route away and stops watching the peer."""
        if self.carrier.routes.get(self.token) == self.deliver:
            del self.carrier.routes[self.token]
        self.watch.leave(self)
