"""A whole mesh for tests: `plugmesh up` as a child process, looked at through `plugmesh status` and the metrics ports.

Nothing is faked: the real broker, services as processes, the real model. Faults are injected by signals to process ids.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import prometheus_client.parser
import psutil

from plugmesh.cli.status import EXIT_INCOMPLETE
from plugmesh.supervisor.observe import Observer


class Cluster:
    """One running mesh.

    Args:
        folder: Private to this mesh: configuration, data, runtime files and the log of `plugmesh up`.
        config: Nested tables as in mesh.toml. Host, folders and ports are filled in.
        cache_dir: Where model files lie; shared between meshes.
        arguments: Further ones for `plugmesh up`.
    """

    def __init__(
        self, folder: pathlib.Path, config: Mapping[str, Any], *, cache_dir: pathlib.Path | None = None, arguments: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self._arguments = tuple(arguments)
        self._env = {k: v for k, v in os.environ.items() if not k.startswith("PLUGMESH_")}
        runtime = folder / "xdg"
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._env["XDG_RUNTIME_DIR"] = str(runtime)
        tables = {"mesh": {"data_dir": str(folder / "data")}, **{k: dict(v) for k, v in config.items()}}
        tables["mesh"] = {"data_dir": str(folder / "data"), **config.get("mesh", {})}
        if cache_dir is not None:
            tables["mesh"]["cache_dir"] = str(cache_dir)
        tables.setdefault("services", {}).setdefault("gateway", {}).setdefault("port", 0)
        (folder / "mesh.toml").write_text(_toml(tables))
        self._process: subprocess.Popen[bytes] | None = None
        self.pids_seen: set[int] = set()

    def start(self, timeout_s: float = 120.0) -> None:
        """Starts the mesh and waits until it can serve a first token. Raises AssertionError with the log when it does not."""
        log = (self.folder / "up.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "plugmesh.cli", "up", "--config", str(self.folder / "mesh.toml"), *self._arguments],
            env=self._env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.folder,
        )  # fmt: skip
        log.close()
        wait_until(self._is_up, timeout_s, lambda: f"the mesh did not start:\n{self.log()}")

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"plugmesh up ended with {self._process.returncode}:\n{self.log()}"
        return "plugmesh status" in self._output()

    def _output(self) -> str:
        return (self.folder / "up.log").read_text(errors="replace")

    def log(self) -> str:
        """What `plugmesh up` printed, and the ends of the services' logs."""
        parts = [self._output()]
        with contextlib.suppress(FileNotFoundError):  # a mesh that stops removes its folder while we look
            for path in sorted(self.folder.glob("xdg/plugmesh/*/logs/*.log")):
                parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(parts)

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ctrl-C, and waits. Returns the exit status of `plugmesh up`."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
            raise AssertionError(f"plugmesh up did not stop within {timeout_s:g} s:\n{self.log()}") from None

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Another `plugmesh` command of the same user, which finds this mesh by itself."""
        return subprocess.Popen(
            [sys.executable, "-m", "plugmesh.cli", *arguments], env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder
        )

    @property
    def supervisor_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def descendants(self) -> list[psutil.Process]:
        """All processes of the mesh, the broker among them, without the supervisor."""
        try:
            found = psutil.Process(self.supervisor_pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.pids_seen.update(p.pid for p in found)
        return found

    def status(self) -> dict[str, Any]:
        """`plugmesh status --json`, of a mesh that may lack a role at the moment."""
        out = subprocess.run(
            [sys.executable, "-m", "plugmesh.cli", "status", "--json"], env=self._env, capture_output=True, timeout=30, cwd=self.folder, check=False,
        )  # fmt: skip
        assert out.returncode in (0, EXIT_INCOMPLETE), f"plugmesh status ended with {out.returncode}: {out.stderr.decode()}"
        status: dict[str, Any] = json.loads(out.stdout)
        return status

    def instances(self, role: str = "") -> list[dict[str, Any]]:
        """Rows of the discovery table, all or those of a role, read from the broker. Raises Unavailable when it is away."""
        record = self.run_record()

        async def read() -> list[dict[str, Any]]:
            observer = await Observer.connect(
                record["name"], url=record["nats_url"], user=record["nats_user"], password_file=record["nats_password_file"],
                tls_ca_file=record["nats_tls_ca_file"], lease_ttl_s=5.0, timeout_s=5.0,
            )  # fmt: skip
            try:
                return [dataclasses.asdict(i) for i in observer.instances() if role in ("", i.role)]
            finally:
                await observer.close()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # the caller may have an event loop of its own
            return pool.submit(asyncio.run, read()).result(20)

    def run_record(self) -> dict[str, Any]:
        """What the running mesh left for other commands: broker address, gateway address."""
        (path,) = (self.folder / "xdg" / "plugmesh").glob("*.json")
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    @property
    def base_url(self) -> str:
        return self.run_record()["gateway_url"].rstrip("/") + "/v1"

    def broker(self) -> psutil.Process | None:
        """The broker's process; None while there is none."""
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end while we look
                if "nats-server" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def metric(self, instance: Mapping[str, Any], name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, from an instance's metrics page; 0 when it was never set."""
        address = instance["metrics_address"]
        url = address if address.startswith("http") else f"http://{address}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:  # an address from our own registry
            text = response.read().decode()
        samples = [s for family in prometheus_client.parser.text_string_to_metric_families(text) for s in family.samples]
        return sum(float(s.value) for s in samples if s.name == name and all(s.labels.get(k) == v for k, v in labels.items()))

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL, index: int = 0) -> int:
        """Sends a signal to an instance of a role; returns its process id."""
        pid = int(self.instances(role)[index]["pid"])
        os.kill(pid, number)
        return pid


@contextlib.contextmanager
def running(folder: pathlib.Path, config: Mapping[str, Any]) -> Iterator[Cluster]:
    """A mesh for the length of a with block."""
    cluster = Cluster(folder, config)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def wait_until(condition: Callable[[], bool], timeout_s: float, message: Callable[[], str] | str = "condition") -> float:
    """Polls until `condition()`; returns how long it took. Raises AssertionError with the message after `timeout_s`."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {message() if callable(message) else message}")
        time.sleep(0.1)
    return time.monotonic() - started


def _toml(tables: Mapping[str, Any]) -> str:
    lines: list[str] = []

    def write(prefix: str, table: Mapping[str, Any]) -> None:
        if prefix:
            lines.append(f"[{prefix}]")
        nested = []
        for key, value in table.items():
            if isinstance(value, Mapping):
                nested.append((f"{prefix}.{key}" if prefix else key, value))
            else:
                lines.append(f"{key} = {json.dumps(value)}")
        for name, inner in nested:
            write(name, inner)

    write("", tables)
    return "\n".join(lines) + "\n"
