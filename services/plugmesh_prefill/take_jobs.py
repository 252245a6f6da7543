"""The work queue: jobs taken, kept alive while they run, acknowledged once their result is safe."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import grpc
import structlog
from google.protobuf.message import DecodeError

from plugmesh.errors import InternalError, PlugmeshError, Unavailable
from plugmesh.mesh.api import Job, Mesh
from plugmesh.wire import error_to_pb
from plugmesh_prefill.compute import PrefillRunner
from plugmesh_proto.v1 import decode_pb2_grpc
from plugmesh_proto.v1 import prefill_pb2 as pb

log = structlog.get_logger()

REPORT_TIMEOUT_S = 2.0
RETRY_BROKER_S = 1.0


class JobTaker:
    """Takes jobs from the prefill queue until `stop`."""

    def __init__(self, mesh: Mesh, runner: PrefillRunner, *, max_jobs: int, ack_wait_s: float, max_deliveries: int, count: Callable[[str], None]) -> None:
        self._mesh = mesh
        self._runner = runner
        self._max_jobs = max_jobs
        self._ack_wait_s = ack_wait_s
        self._max_deliveries = max_deliveries
        self._count = count
        self._running: set[asyncio.Task[None]] = set()
        self._taker: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._taker = asyncio.create_task(self._take())

    async def stop(self) -> None:
        """Takes no more jobs; those that run go on."""
        if self._taker is not None:
            self._taker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._taker

    async def cancel_running(self) -> None:
        """Gives running jobs back to the queue."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _take(self) -> None:
        while True:
            try:
                async for job in self._mesh.queue("prefill").take(max_in_flight=self._max_jobs, ack_wait_s=self._ack_wait_s):
                    task = asyncio.create_task(self._handle(job))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
            except PlugmeshError as e:
                log.warning("prefill.queue_lost", reason=e.code)
            await asyncio.sleep(RETRY_BROKER_S)

    async def _handle(self, job: Job) -> None:
        try:
            message = pb.PrefillJob.FromString(job.data)
        except DecodeError:
            self._count("malformed")
            await job.drop()
            return
        late = message.deadline_unix_s and time.time() > message.deadline_unix_s
        if late or job.num_deliveries > self._max_deliveries:
            self._count("expired")
            await job.drop()
            return
        beat = asyncio.create_task(self._keep_alive(job))
        try:
            await self._compute(message)
            await job.done()
        except asyncio.CancelledError:
            await job.retry()
            raise
        except PlugmeshError as e:
            # The consumer was told and computes locally; another delivery would be work for nobody.
            self._count(e.code)
            await job.done()
        finally:
            beat.cancel()

    async def _keep_alive(self, job: Job) -> None:
        while True:
            await asyncio.sleep(self._ack_wait_s / 3)
            await job.in_progress()

    async def _compute(self, message: pb.PrefillJob) -> None:
        decode = decode_pb2_grpc.DecodeStub(self._mesh.channel("decode", message.reply_instance))
        try:
            # First sign of life: is anybody still waiting?
            if not await self._report(decode, pb.PrefillEvent(job_id=message.job_id, prefill_instance=self._mesh.self_info.instance_id)):
                self._count("unwanted")
                return
            events = self._runner.run(message)
            async with contextlib.aclosing(events):
                async for event in events:
                    if not await self._report(decode, event):
                        self._count("unwanted")
                        return
            self._count("done")
        except PlugmeshError as e:
            await self._report(decode, pb.PrefillEvent(job_id=message.job_id, error=error_to_pb(e)))
            raise
        except Exception as e:
            log.exception("prefill.job_failed", request_id=message.request_id)
            error = InternalError(f"the prefill job failed: {type(e).__name__}")
            await self._report(decode, pb.PrefillEvent(job_id=message.job_id, error=error_to_pb(error)))
            raise error from e

    async def _report(self, decode: decode_pb2_grpc.DecodeStub, event: pb.PrefillEvent) -> bool:
        """False when the consumer does not want the job any more, or cannot be reached."""
        try:
            reply = await decode.ReportPrefill(event, timeout=REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as e:
            if e.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return False
            raise Unavailable("the decode instance refused a report") from e
        return bool(reply.still_wanted)
