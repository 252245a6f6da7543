"""One mesh on this machine, from its configuration to the first token and back to nothing.

    start:  check configuration -> claim the name -> run folder -> broker -> services, all at once
            -> every process has announced itself -> the gateway has served a token -> record says "ready"
    stop:   record says "stopping" -> gateway drains, engines drain, stores stop -> broker
            -> shared memory, run folder and record are gone
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import structlog

from plugmesh import __version__, errors
from plugmesh.config import MeshConfig, ServiceSettings
from plugmesh.mesh import subjects
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.hostid import host_id
from plugmesh.supervisor import http, logfiles, plan, runs
from plugmesh.supervisor.children import ChildEvent, ChildSpec, ChildState, ChildStatus, RestartPolicy, Supervisor
from plugmesh.supervisor.observe import Observer
from plugmesh.tasks import end

log = structlog.get_logger()

BROKER = "broker"
BROKER_TIMEOUT_S = 15.0
WATCH_S = 0.1             # how often the table is compared with the children
STOP_MARGIN_S = 5.0       # beyond `mesh.drain_s`, for a service to release what it holds
Say = Callable[[str], None]


class Launcher:
    """Owns one mesh. `start` once, `stop` once (always, also after a failed start); `kill` at any time, from the same loop."""

    def __init__(
        self,
        config: MeshConfig,
        *,
        on_event: Callable[[ChildEvent], None] | None = None,
        ephemeral: bool = False,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.config = config
        self.served_model = config.mesh.model
        self._ephemeral = ephemeral
        self._supervisor = Supervisor(policy, on_event)
        self._cleanup = contextlib.ExitStack()
        self._run: runs.MeshRun | None = None
        self._folder: pathlib.Path | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._killed = False

    @property
    def run(self) -> runs.MeshRun:
        """Where the mesh can be reached. Only after `start` has claimed the name."""
        assert self._run is not None, "start first"
        return self._run

    def snapshot(self) -> list[ChildStatus]:
        """The broker and every service."""
        return self._supervisor.snapshot()

    def log_tail(self, name: str) -> list[str]:
        """The last lines that a child wrote."""
        return next((logfiles.tail(s.log_path) for s in self.snapshot() if s.name == name), [])

    async def start(self, say: Say, timeout_s: float) -> None:
        """Returns when the mesh has served a token.

        Args:
            say: Told in words what is going on besides the children's own states.

        Raises:
            ConfigError: The configuration, or a service refused it.
            AlreadyExists: A mesh of that name runs.
            Unavailable: A process crashed again and again, or something was not ready after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        settings = plan.check(self.config)
        port = await self._gateway_port(settings)
        self._claim(port)
        nats = await self._start_broker(say)
        self._record(nats(subjects.OPERATOR))
        self._start_services(settings, nats, port)
        say("waiting for the services to announce themselves")
        await self._all_ready(deadline)
        say("asking for a first token")
        await self._first_token(deadline)
        self._write(state="ready")

    async def stop(self) -> bool:
        """Drains, stops and removes everything. True when nothing had to be killed.

        A mesh that was not ready yet has nothing to drain: its processes get `STOP_MARGIN_S` and are then killed, which counts
        as orderly.
        """
        served = self._run is not None and self._run.state == "ready"
        try:
            if self._run is not None:
                self._write(state="stopping")
            if self._watcher is not None:
                await end(self._watcher)
            drain_s = self.config.mesh.drain_s if served else 0.0
            orderly = await self._supervisor.stop(drain_s + STOP_MARGIN_S, in_order=served)
            return (orderly or not served) and not self._killed
        finally:
            self._cleanup.close()

    def kill(self) -> None:
        """Ends every process now; `stop` still has to be called (or is running) and cleans up."""
        self._killed = True
        self._supervisor.kill()

    async def _gateway_port(self, settings: Mapping[str, ServiceSettings]) -> int:
        gateway = settings["gateway"]
        port = int(getattr(gateway, "port", 0))
        if port == 0:
            return plan.free_port(self.config.mesh.host)
        for i in range(gateway.replicas):
            plan.require_free(self.config.mesh.host, port + i)
        return port

    def _claim(self, port: int) -> None:
        name = self.config.mesh.name
        self._folder = self._cleanup.enter_context(runs.hold(name))
        run_dir = runs.make_run_dir(name, self._folder, self.config.mesh.runtime_dir)
        self._cleanup.callback(runs.remove_run_dir, run_dir)
        (run_dir / "logs").mkdir(mode=0o700)
        shm: tuple[str, ...] = ()
        if runs.SHM.is_dir() and os.access(runs.SHM, os.W_OK):
            shm = (str(runs.SHM / f"plugmesh-{name}-{run_dir.name[-8:]}-{os.getpid()}"),)
            self._cleanup.callback(runs.remove_shm, shm)
        pid = os.getpid()
        host = self.config.mesh.host
        reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104  compared, not bound
        self._run = runs.MeshRun(
            name=name, pid=pid, pid_started=runs.process_start(pid), runtime_dir=str(run_dir), state="starting", started_unix_s=time.time(),
            version=__version__, model=self.config.mesh.model, gateway_url=f"http://{reachable}:{port}", shm_paths=shm, ephemeral=self._ephemeral,
        )  # fmt: skip
        self._write()

    async def _start_broker(self, say: Say) -> Callable[[str], dict[str, Any]]:
        """Role to its `[mesh.nats]`."""
        given = self.config.mesh.nats
        if given.url:
            same = json.loads(given.model_dump_json())
            return lambda role: same
        broker = EmbeddedBroker(pathlib.Path(self.run.runtime_dir) / "broker", mesh=self.config.mesh.name)

        async def start() -> subprocess.Popen[bytes]:
            await broker.start(BROKER_TIMEOUT_S)
            assert broker.process is not None
            return broker.process

        say("starting the broker")
        self._supervisor.start([ChildSpec(BROKER, BROKER, (), {}, broker.directory / "nats-server.log", stop_rank=9, start=start)])
        deadline = time.monotonic() + BROKER_TIMEOUT_S
        while not self._supervisor.pids(BROKER):
            self._raise_if_hopeless()
            if time.monotonic() > deadline:
                raise errors.Unavailable(f"the broker did not come up: {_reason(self.log_tail(BROKER))}")
            await self._supervisor.changed(0.05)
        self._supervisor.mark_ready(self._supervisor.pids(BROKER))

        def for_role(role: str) -> dict[str, Any]:
            credential = broker.credential(role)
            return {"url": credential.url, "user": credential.user, "password_file": str(credential.password_file)}

        return for_role

    def _record(self, nats: Mapping[str, Any]) -> None:
        self._write(
            nats_url=nats["url"], nats_user=nats.get("user") or "", nats_password_file=str(nats.get("password_file") or ""),
            nats_tls_ca_file=str(nats.get("tls_ca_file") or ""),
        )  # fmt: skip

    def _start_services(self, settings: Mapping[str, ServiceSettings], nats: Callable[[str], dict[str, Any]], port: int) -> None:
        shm = self.run.shm_paths
        self._supervisor.start(
            plan.specs(
                self.config, settings, nats=nats, run_dir=pathlib.Path(self.run.runtime_dir), gateway_port=port,
                arena_dir=pathlib.Path(shm[0]) if shm else None,
            )
        )  # fmt: skip
        self._watcher = asyncio.create_task(self._watch(), name="watch-table")

    async def _watch(self) -> None:
        """Marks children as serving when their leases show up, as long as the mesh lives: restarted ones, too."""
        run = self.run
        while True:
            try:
                observer = await Observer.connect(
                    run.name, url=run.nats_url, user=run.nats_user, password_file=run.nats_password_file, tls_ca_file=run.nats_tls_ca_file,
                    lease_ttl_s=self.config.mesh.lease_ttl_s,
                )  # fmt: skip
                break
            except errors.Unavailable as e:
                log.warning("launch.no_observer", reason=e.message)
                await asyncio.sleep(0.5)
        try:
            while True:
                here = host_id()
                self._supervisor.mark_ready(i.pid for i in observer.instances() if i.host == here and i.state in ("ready", "draining"))
                self._supervisor.mark_ready(self._supervisor.pids(BROKER))
                await asyncio.sleep(WATCH_S)
        finally:
            await observer.close()

    def _write(self, **changes: Any) -> None:
        assert self._folder is not None
        self._run = replace(self.run, **changes)
        runs.write(self._run, self._folder)

    async def _all_ready(self, deadline: float) -> None:
        while True:
            statuses = self.snapshot()
            self._raise_if_hopeless()
            waiting = [s.name for s in statuses if s.state is not ChildState.READY]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise errors.Unavailable(f"not ready in time: {', '.join(waiting)}")
            await self._supervisor.changed(0.2)

    def _raise_if_hopeless(self) -> None:
        for status in self._supervisor.config_failures:
            raise errors.ConfigError(f"{status.name}: {_reason(self.log_tail(status.name))}", service=status.name)
        for status in self.snapshot():
            if status.state is ChildState.FAILED:
                raise errors.Unavailable(f"{status.name} cannot be kept running ({status.detail}): {_reason(self.log_tail(status.name))}")

    async def _first_token(self, deadline: float) -> None:
        """Asks the gateway for one token. A gateway that wants a key has proved enough by saying so."""
        while True:
            left_s = deadline - time.monotonic()
            try:
                if left_s <= 0:
                    raise errors.Unavailable("no first token in time")
                self.served_model = await _ask(self.run.gateway_url, timeout_s=max(0.1, left_s))
                return
            except (errors.Unauthenticated, errors.PermissionDenied):
                return
            except (errors.Unavailable, errors.Overloaded) as e:
                self._raise_if_hopeless()
                if left_s <= 0:
                    raise
                log.debug("launch.not_yet", reason=e.message)
            await asyncio.sleep(0.1)


async def _ask(url: str, timeout_s: float) -> str:
    """The name of the served model, after it has given one token."""
    async with http.request("GET", f"{url}/v1/models", timeout_s=timeout_s) as answer:
        listed = (await answer.json()).get("data") or []
    if not listed:
        raise errors.Unavailable("the gateway lists no model yet")
    model = str(listed[0]["id"])
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    async with http.request("POST", f"{url}/v1/chat/completions", body, timeout_s=timeout_s) as answer:
        await answer.json()
    return model


def _reason(lines: list[str]) -> str:
    """The most telling of a child's last lines: its own closing word, else what a structured line calls its error, else the last."""
    for line in reversed(lines):
        if line.startswith("plugmesh "):
            return line.partition(": ")[2] or line
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and (text := event.get("error") or event.get("message") or event.get("reason")):
            return str(text)
    return lines[-1] if lines else "it said nothing"
