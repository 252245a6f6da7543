"""Events over NATS: every subscribed instance gets every message; what a slow one misses is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from plugmesh.errors import PayloadTooLarge
from plugmesh.mesh import subjects
from plugmesh.mesh.api import Event
from plugmesh.mesh.rpc.frames import MAX_MESSAGE_BYTES
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier

log = structlog.get_logger()


class Listener:
    """Feeds one callback from a bounded queue, in order; the newest message is dropped when the queue is full."""

    def __init__(self, topic: str, callback: Callable[[Event], Awaitable[None]], max_pending: int) -> None:
        self.topic = topic
        self.num_dropped = 0
        self._callback = callback
        self._queue: asyncio.Queue[Event] = asyncio.Queue(max_pending)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"plugmesh-bus-{topic}")

    def offer(self, event: Event) -> None:
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self.num_dropped += 1

    async def _run(self) -> None:
        while True:
            event = await self._queue.get()
            try:
                await self._callback(event)
            except Exception:
                log.exception("bus.callback_failed", topic=self.topic)

    def stop(self) -> None:
        self._task.cancel()


class NatsBus:
    """Publish and subscribe for one process."""

    def __init__(self, carrier: NatsCarrier, mesh: str) -> None:
        self._carrier = carrier
        self._mesh = mesh
        self._listeners: set[Listener] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._dropped_before = 0   # by listeners that have left

    @property
    def num_dropped(self) -> int:
        return self._dropped_before + sum(listener.num_dropped for listener in self._listeners)

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > MAX_MESSAGE_BYTES:
            raise PayloadTooLarge(f"event of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes")
        await self._carrier.publish_now(subjects.bus(self._mesh, topic), data)

    def subscribe(self, topic: str, callback: Callable[[Event], Awaitable[None]], max_pending: int) -> Callable[[], None]:
        """The subscription is on its way when this returns; consumers start from a snapshot anyway."""
        listener = Listener(topic, callback, max_pending)
        self._listeners.add(listener)
        undo: list[Callable[[], None]] = []
        stopped = False
        prefix = subjects.bus(self._mesh, "")

        def receive(message: Any) -> None:
            listener.offer(Event(message.subject.removeprefix(prefix), message.data, dict(message.headers or {})))

        async def begin() -> None:
            while not stopped:
                try:
                    undo.append(await self._carrier.subscribe(subjects.bus(self._mesh, topic), receive))
                    break
                except Exception as e:
                    log.warning("bus.subscribe_failed", topic=topic, error=type(e).__name__)
                    await asyncio.sleep(0.5)
            if stopped:
                for u in undo:
                    u()

        task = asyncio.get_running_loop().create_task(begin())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

        def unsubscribe() -> None:
            nonlocal stopped
            stopped = True
            for u in undo:
                u()
            undo.clear()
            listener.stop()
            if listener in self._listeners:
                self._listeners.discard(listener)
                self._dropped_before += listener.num_dropped

        return unsubscribe

    def stop(self) -> None:
        for listener in self._listeners:
            listener.stop()
        for task in self._tasks:
            task.cancel()
