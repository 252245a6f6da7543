"""A pool of killable processes in which chat templates run; see `render_worker.py`."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any

import structlog

from plugmesh.errors import FailedPrecondition, InvalidRequest, LimitExceeded, Overloaded, Unavailable
from plugmesh.mesh.scheduling import short_slice

log = structlog.get_logger()

_WORKER = pathlib.Path(__file__).with_name("render_worker.py")
_START_S = 20.0  # a fresh interpreter imports jinja2 well within this, even on a busy machine


class _WorkerDied(Exception):
    """The process ended without an answer."""


def pack_request(source: str, renders: Sequence[dict[str, Any]], max_chars: int) -> bytes:
    """What `Renderer.render` takes: a template, the sets of variables to render it with, and a limit per text."""
    return json.dumps({"source": source, "renders": list(renders), "max_chars": max_chars}).encode()


class _Worker:
    """One process. `ask` is called by one task at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, memory_bytes: int, timeout_s: float) -> _Worker:
        # A short environment: the process sees no credential. It needs the import path to find jinja2.
        env = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "TZ") if key in os.environ}
        env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
        with short_slice():  # a request waits for it
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", str(_WORKER), str(memory_bytes), str(timeout_s),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=env, cwd="/",
            )
        worker = cls(process)
        try:
            # The first answer tells that imports are over, so that they do not count against a template's time.
            async with asyncio.timeout(_START_S):
                await worker.ask(pack_request("", [{}], 1))
        except (TimeoutError, _WorkerDied) as e:
            await worker.kill()
            raise Unavailable("the template process does not start", retry_after_s=1) from e
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def ask(self, data: bytes) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(struct.pack(">I", len(data)) + data)
            await stdin.drain()
            (length,) = struct.unpack(">I", await stdout.readexactly(4))
            return json.loads(await stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as e:
            raise _WorkerDied from e

    async def kill(self) -> int:
        """Ends the process at once and reaps it; its return code."""
        if self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                pass
        return await self._process.wait()


class Renderer:
    """Renders templates within limits of time, memory and length.

    Args:
        max_waiting: Callers that may queue for a process; more get Overloaded.
    """

    def __init__(self, *, workers: int, timeout_s: float, memory_bytes: int, max_waiting: int) -> None:
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._max_waiting = max_waiting
        self._free = asyncio.Semaphore(workers)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._num_waiting = 0
        self._is_closed = False
        self.num_killed = 0

    async def start(self) -> None:
        """Starts the first process, so that the first chat need not wait for it."""
        async with self._free:
            self._idle.append(await self._spawn())

    async def stop(self) -> None:
        """Ends all processes; calls under way fail with Unavailable."""
        self._is_closed = True
        await asyncio.gather(*(worker.kill() for worker in self._all))
        self._all.clear()
        self._idle.clear()

    async def render(self, request: bytes) -> list[str]:
        """One text per set of variables of the request, which `pack_request` makes.

        Raises:
            InvalidRequest: The template refused the messages or failed on them.
            LimitExceeded: More time, memory or text than allowed.
            FailedPrecondition: The template is not valid Jinja.
            Overloaded: Too many callers wait.
        """
        if self._num_waiting >= self._max_waiting:
            raise Overloaded(f"{self._num_waiting} chats wait for a template process", retry_after_s=1)
        self._num_waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._num_waiting -= 1
        try:
            if self._is_closed:
                raise Unavailable("the tokenizer is stopping", retry_after_s=1)
            worker = self._idle.pop() if self._idle else await self._spawn()
            return await self._render_on(worker, request)
        finally:
            self._free.release()

    async def _render_on(self, worker: _Worker, request: bytes) -> list[str]:
        reply: dict[str, Any] | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await worker.ask(request)
        except TimeoutError:
            raise LimitExceeded(f"the chat template ran longer than {self._timeout_s:g} s", param="messages") from None
        except _WorkerDied as e:
            if self._is_closed:
                raise Unavailable("the tokenizer is stopping", retry_after_s=1) from e
            if await worker.kill() == -signal.SIGALRM:
                raise LimitExceeded(f"the chat template ran longer than {self._timeout_s:g} s", param="messages") from e
            raise LimitExceeded("the chat template needs more memory than allowed", param="messages") from e
        finally:
            # After an answer the process is as before; without one (time, death, cancelled caller) it is unusable.
            if reply is not None and reply.get("error") != "memory" and not self._is_closed:
                self._idle.append(worker)
            else:
                self.num_killed += 1
                self._all.discard(worker)
                await worker.kill()
        kind, message = reply.get("error"), reply.get("message", "")
        if kind is None:
            return reply["texts"]
        if kind == "syntax":
            raise FailedPrecondition(f"the model's chat template is not valid: {message}")
        if kind == "too_long":
            raise LimitExceeded("the templated prompt is longer than allowed", param="messages")
        if kind == "memory":
            raise LimitExceeded("the chat template needs more memory than allowed", param="messages")
        if kind == "raised":
            raise InvalidRequest(message, param="messages")
        raise InvalidRequest(f"the chat template failed on these messages: {message}", param="messages")

    async def _spawn(self) -> _Worker:
        worker = await _Worker.start(self._memory_bytes, self._timeout_s + 1.0)
        self._all.add(worker)
        if self._is_closed:
            await worker.kill()
            raise Unavailable("the tokenizer is stopping", retry_after_s=1)
        return worker
