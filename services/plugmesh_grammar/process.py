"""One worker process as the service sees it; `worker.py` is the other end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import structlog

from plugmesh.config import MeshConfig
from plugmesh.errors import Unavailable
from plugmesh.grammar.seams import GrammarVocabulary
from plugmesh.mesh.scheduling import short_slice
from plugmesh_grammar import protocol

log = structlog.get_logger()

_START_S = 120.0  # an interpreter, and the engines' libraries, on a busy machine


class WorkerDied(Exception):
    """The process ended without an answer; `number` is the signal that ended it, 0 for none."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Worker:
    """One process. `ask` and `teach` are called by one task at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.vocabularies: set[str] = set()
        self.idle_since = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    @classmethod
    async def start(cls, config: MeshConfig, *, memory_bytes: int, timeout_s: float) -> Worker:
        """Raises Unavailable when it does not start."""
        # A short environment: the process sees no credential. It needs the import path; its libraries get one thread.
        env = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH") if key in os.environ}
        env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        with short_slice():  # a request waits for it
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "plugmesh_grammar.worker", str(timeout_s),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=env, cwd="/",
            )
        worker = cls(process)
        raw = json.loads(config.model_dump_json())
        own = {"services": {"grammar": {k: v for k, v in raw["services"].get("grammar", {}).items() if k == "plugins"}}, "plugins": raw["plugins"]}
        try:
            async with asyncio.timeout(_START_S):
                await worker.ask({"op": "start", "config": own, "memory_bytes": memory_bytes})
        except (TimeoutError, WorkerDied) as e:
            await worker.kill()
            raise Unavailable("the grammar process does not start", retry_after_s=5) from e
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def teach(self, vocabulary: GrammarVocabulary, packed: bytes) -> None:
        """Gives the process a vocabulary that it has not got; it builds its engines for it, which may take seconds.

        Raises:
            WorkerDied, Unavailable: It did not; the process is of no use any more.
        """
        if vocabulary.tokenizer_hash in self.vocabularies:
            return
        try:
            async with asyncio.timeout(_START_S):
                fields, _ = await self._ask(packed)
        except TimeoutError as e:
            raise Unavailable("the grammar engines do not start", retry_after_s=5) from e
        if "error" in fields:
            raise protocol.error_of(fields["error"])
        for name, why in fields["missing"].items():
            log.warning("grammar.engine_unusable", engine=name, why=why)
        self.vocabularies.add(vocabulary.tokenizer_hash)

    async def ask(self, fields: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Its reply; an "error" in it is the caller's to raise. Raises WorkerDied."""
        return await self._ask(protocol.pack(fields, data))

    async def _ask(self, message: bytes) -> tuple[dict[str, Any], bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(message)
            await stdin.drain()
            num_head, num_data = protocol.HEAD.unpack(await stdout.readexactly(protocol.HEAD.size))
            head = json.loads(await stdout.readexactly(num_head))
            return head, await stdout.readexactly(num_data)
        except (asyncio.IncompleteReadError, ConnectionError, RuntimeError) as e:
            code = await self.kill()
            raise WorkerDied(-code if code < 0 else 0) from e

    async def kill(self) -> int:
        """Ends the process at once and reaps it; its return code."""
        if self._process.returncode is None:
            # A process that is about to say why it died is given the moment to.
            try:
                async with asyncio.timeout(0.2 if self._process.stdout is not None and self._process.stdout.at_eof() else 0):
                    return await self._process.wait()
            except TimeoutError:
                pass
            try:
                self._process.send_signal(signal.SIGKILL)
            except ProcessLookupError:
                pass
        return await self._process.wait()
