"""One prompt computed by a prefill instance: the job, its progress, and giving up on it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
import structlog

from plugmesh.errors import DeadlineExceeded, PlugmeshError, Unavailable
from plugmesh.mesh.api import Mesh
from plugmesh.types import InstanceInfo
from plugmesh.wire import error_from_pb, error_from_rpc
from plugmesh_proto.v1 import prefill_pb2 as pb
from plugmesh_proto.v1 import prefill_pb2_grpc as rpc

log = structlog.get_logger()


@dataclass(slots=True)
class _Waiting:
    result: asyncio.Future[pb.PrefillEvent]
    last_progress_s: float
    worker: str = ""


class RemotePrefill:
    """The jobs that this decode instance waits for.

    A job goes to the work queue, or straight to an instance that a router chose. Either way its events come back as
    `report`, and `compute` gives up when there was no event for `timeout_s` or the instance at work left the mesh.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._waiting: dict[str, _Waiting] = {}
        self._unwatch = mesh.watch(self._on_instance)

    def close(self) -> None:
        """Stops watching the mesh; jobs still waited for fail."""
        self._unwatch()
        for waiting in self._waiting.values():
            if not waiting.result.done():
                waiting.result.set_exception(Unavailable("this decode instance stops"))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def report(self, event: pb.PrefillEvent) -> bool:
        """Takes an event of a job. False when nobody waits for it any more, so that the worker can stop."""
        waiting = self._waiting.get(event.job_id)
        if waiting is None or waiting.result.done():
            return False
        waiting.last_progress_s = time.monotonic()
        waiting.worker = event.prefill_instance or waiting.worker
        if event.HasField("error"):
            waiting.result.set_exception(error_from_pb(event.error))
        elif event.done:
            waiting.result.set_result(event)
        return True

    async def compute(self, job: pb.PrefillJob, instance: str = "") -> pb.PrefillEvent:
        """Has a prompt computed elsewhere.

        Args:
            job: Its `job_id` must be new; `reply_instance` is this instance.
            instance: A prefill instance to call directly; empty for the work queue.

        Returns:
            The last event of the job: first tokens and where the blocks are.

        Raises:
            PlugmeshError: The job failed, was late, or could not be queued. The prompt can still be computed locally.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(loop.create_future(), time.monotonic(), instance)
        self._waiting[job.job_id] = waiting
        call: asyncio.Task[None] | None = None
        try:
            if instance:
                call = asyncio.create_task(self._call(job, instance, waiting))
            else:
                await self._mesh.queue("prefill").put(job.SerializeToString(), dedup_id=job.job_id)
            while True:
                left_s = waiting.last_progress_s + self._timeout_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineExceeded(f"no progress on the prefill job for {self._timeout_s:g} s")
                await asyncio.wait([waiting.result], timeout=left_s)
                if waiting.result.done():
                    return waiting.result.result()
        finally:
            del self._waiting[job.job_id]
            if not waiting.result.done():
                waiting.result.cancel()  # first, so that the call's own end finds nobody waiting
            if call is not None and not call.done():
                call.cancel()

    async def _call(self, job: pb.PrefillJob, instance: str, waiting: _Waiting) -> None:
        error: PlugmeshError = Unavailable("the prefill instance ended the job without a result")
        try:
            async for event in rpc.PrefillStub(self._mesh.channel("prefill", instance)).Run(job):
                if not self.report(event):
                    return
        except grpc.aio.AioRpcError as e:
            error = error_from_rpc(e)
        finally:  # a peer that cancels a stream raises CancelledError in its reader
            if not waiting.result.done():
                waiting.result.set_exception(error)

    def _on_instance(self, change: str, info: InstanceInfo) -> None:
        if change not in ("left", "suspect") or info.role != "prefill":
            return
        for waiting in self._waiting.values():
            if waiting.worker == info.instance_id and not waiting.result.done():
                waiting.result.set_exception(Unavailable(f"prefill instance {info.instance_id} is {change}"))
