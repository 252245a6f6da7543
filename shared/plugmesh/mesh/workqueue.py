"""Work queues on JetStream: each job goes to one worker and comes again until the worker says it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import nats.errors
import nats.js.errors
import structlog
from nats.js import api

from plugmesh.errors import NotFound, Overloaded, PayloadTooLarge, Unavailable
from plugmesh.mesh import subjects
from plugmesh.mesh.api import Job
from plugmesh.mesh.rpc.frames import MAX_MESSAGE_BYTES
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier
from plugmesh.tasks import check_cancelled

log = structlog.get_logger()

_FETCH_S = 2.0
_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError, asyncio.TimeoutError)
# JetStream's error codes for "full" under discard-new: maximum messages, maximum bytes, and "insufficient storage".
_FULL = (10077, 10047, 10023)


class NatsJob:
    """See `plugmesh.mesh.api.Job`."""

    def __init__(self, message: Any, release: asyncio.Semaphore) -> None:
        self._message = message
        self._release = release
        self._ended = False
        self.data: bytes = message.data
        self.num_deliveries: int = message.metadata.num_delivered

    async def in_progress(self) -> None:
        if not self._ended:
            await self._say(self._message.in_progress)

    async def done(self) -> None:
        await self._end(self._message.ack)

    async def retry(self, delay_s: float = 0.0) -> None:
        await self._end(self._message.nak, delay=delay_s or None)

    async def drop(self) -> None:
        await self._end(self._message.term)

    async def _end(self, say: Any, **kwargs: Any) -> None:
        if not self._ended:
            self._ended = True
            self._release.release()
            await self._say(say, **kwargs)

    async def _say(self, say: Any, **kwargs: Any) -> None:
        try:
            await say(**kwargs)
        except _ERRORS as e:
            # The broker is away: the job comes again after its ack wait, as any unacknowledged one.
            log.warning("queue.answer_lost", error=type(e).__name__)


class NatsWorkQueue:
    """See `plugmesh.mesh.api.WorkQueue`."""

    def __init__(self, carrier: NatsCarrier, mesh: str, name: str) -> None:
        spec = subjects.QUEUES.get(name)
        if spec is None:
            raise NotFound(f"no work queue {name!r}; known: {', '.join(sorted(subjects.QUEUES))}")
        self.spec = spec
        self._carrier = carrier
        self._mesh = mesh
        self._stream = subjects.queue_stream(mesh, name)
        self._subject = subjects.queue_subject(mesh, name)
        self._consumer = subjects.queue_consumer(name)
        self._js = carrier.client.jetstream(timeout=2.0)
        self._ready = False

    async def ensure(self) -> None:
        """Makes the stream when it is missing. Raises nats errors."""
        try:
            await self._js.stream_info(self._stream)
        except nats.js.errors.NotFoundError:
            spec = self.spec
            await self._js.add_stream(
                api.StreamConfig(
                    name=self._stream, subjects=[self._subject], retention=api.RetentionPolicy.WORK_QUEUE,
                    discard=api.DiscardPolicy.NEW, max_msgs=spec.max_jobs, max_bytes=spec.max_bytes, max_age=spec.max_age_s,
                    duplicate_window=min(spec.dedup_window_s, spec.max_age_s), max_msg_size=MAX_MESSAGE_BYTES,
                    storage=api.StorageType.FILE if spec.storage == "file" else api.StorageType.MEMORY,
                )
            )
        self._ready = True

    async def put(self, data: bytes, *, dedup_id: str = "") -> None:
        if len(data) > MAX_MESSAGE_BYTES:
            raise PayloadTooLarge(f"job of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes")
        if not self._carrier.connected:
            raise Unavailable("the broker is away", retry_after_s=1.0)
        headers = {"Nats-Msg-Id": dedup_id} if dedup_id else None
        for attempt in (0, 1):
            try:
                if not self._ready:
                    await self.ensure()
                await self._js.publish(self._subject, data, headers=headers)
                return
            except nats.js.errors.NoStreamResponseError:
                self._ready = False  # a broker that lost its store
                if attempt:
                    raise Unavailable(f"the {self.spec.name} queue is missing", retry_after_s=1.0) from None
            except nats.js.errors.APIError as e:
                if e.err_code in _FULL:
                    raise Overloaded(f"the {self.spec.name} queue is full ({self.spec.max_jobs} jobs)", retry_after_s=1.0) from e
                raise Unavailable(f"the {self.spec.name} queue refused the job: {e.description}", retry_after_s=1.0) from e
            except _ERRORS as e:
                raise Unavailable(f"the {self.spec.name} queue cannot be reached", retry_after_s=1.0) from e

    async def take(self, *, max_in_flight: int, ack_wait_s: float = 30.0) -> AsyncIterator[Job]:
        slots = asyncio.Semaphore(max_in_flight)
        subscription: Any = None
        try:
            while True:
                await slots.acquire()
                message = None
                while message is None:
                    check_cancelled()
                    try:
                        if subscription is None:
                            subscription = await self._subscribe(ack_wait_s)
                        message = (await subscription.fetch(1, timeout=_FETCH_S))[0]
                    except (nats.errors.TimeoutError, TimeoutError):
                        continue
                    except _ERRORS as e:
                        # The broker is away or was emptied; make everything anew when it is back.
                        log.debug("queue.waiting", queue=self.spec.name, error=type(e).__name__)
                        if subscription is not None and self._carrier.connected:
                            await self._unsubscribe(subscription)
                            subscription = None
                            self._ready = False
                        await asyncio.sleep(0.25)
                try:
                    check_cancelled()
                except asyncio.CancelledError:
                    await message.nak()
                    raise
                yield NatsJob(message, slots)
        finally:
            if subscription is not None:
                await self._unsubscribe(subscription)

    async def _subscribe(self, ack_wait_s: float) -> Any:
        if not self._ready:
            await self.ensure()
        await self._js.add_consumer(
            self._stream,
            api.ConsumerConfig(
                name=self._consumer, durable_name=self._consumer, ack_policy=api.AckPolicy.EXPLICIT, ack_wait=ack_wait_s,
                max_deliver=self.spec.max_deliver, max_ack_pending=self.spec.max_jobs, filter_subject=self._subject,
            ),
        )
        return await self._js.pull_subscribe_bind(consumer=self._consumer, stream=self._stream)

    async def _unsubscribe(self, subscription: Any) -> None:
        """Gives back what arrived after the last fetch was given up, so that another worker has it at once."""
        queue = subscription._sub._pending_queue
        try:
            while not queue.empty():
                message = queue.get_nowait()
                if message.reply.startswith("$JS.ACK."):
                    await message.nak()
            await subscription.unsubscribe()
        except _ERRORS:
            pass

    async def depth(self) -> int:
        try:
            if not self._ready:
                await self.ensure()
            info = await self._js.stream_info(self._stream)
        except _ERRORS as e:
            raise Unavailable(f"the {self.spec.name} queue cannot be reached", retry_after_s=1.0) from e
        return int(info.state.messages)
