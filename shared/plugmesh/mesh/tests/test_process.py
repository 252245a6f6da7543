"""The life of real service processes: start, signals, faults. The service is a probe written into a temporary package."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import sys
import textwrap
import time
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from plugmesh import config as configuration
from plugmesh import errors, wire
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.real import RealMesh
from plugmesh.mesh.rpc.peers import Patience
from plugmesh.testing.carriers import ProbeStub, ask, failure, until
from plugmesh.testing.nats import mesh_config

pytestmark = pytest.mark.nats
SHARED = pathlib.Path(__file__).resolve().parents[3]
PATIENCE = Patience(ping_s=0.3, silence_s=2.0, grace_s=2.0)

SERVICE = '''
import asyncio
import os
from plugmesh.errors import Unavailable
from plugmesh.mesh.api import Binding
from plugmesh.testing import carriers


class Probe:
    def __init__(self, context):
        self.context = context
        self.probe = carriers.ProbeServicer()

    def bindings(self):
        return [Binding(lambda s, server: carriers.add_probe(s, server), self.probe, carriers.SERVICE)]

    async def start(self):
        if self.context.settings.fail:
            raise Unavailable("told to fail")
        if self.context.settings.slow_start:
            await asyncio.sleep(60)
        self.context.mesh.set_load(num_running=0)

    async def drain(self, deadline_s):
        async def idle():
            while self.probe.num_running:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(idle(), deadline_s)

    async def stop(self):
        if self.context.settings.stopped_file:
            open(self.context.settings.stopped_file, "w").close()

    def describe(self):
        return {"model": "probe-model", "roles": ("probe",)}


def create(context):
    return Probe(context)
'''
SETTINGS = '''
from plugmesh.config import ServiceSettings


class Settings(ServiceSettings):
    fail: bool = False
    slow_start: bool = False
    stopped_file: str = ""
'''
MAIN = '''
from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("probe")
'''


class Processes:
    """Starts probe services against one broker, and ends what is left of them."""

    def __init__(self, broker: EmbeddedBroker, folder: pathlib.Path) -> None:
        self.broker = broker
        self.folder = folder
        package = folder / "plugmesh_probe"
        package.mkdir()
        for name, text in {"__init__": "", "service": SERVICE, "config": SETTINGS, "__main__": MAIN}.items():
            (package / f"{name}.py").write_text(textwrap.dedent(text))
        self.started: list[asyncio.subprocess.Process] = []

    async def start(self, *, nats_url: str = "", **service: Any) -> asyncio.subprocess.Process:
        config = mesh_config(self.broker, lease_ttl_s=2.0, drain_s=5.0).model_copy(update={"services": {"probe": service}})
        data = json.loads(configuration.dump_json(config))
        data["mesh"]["nats"]["url"] = nats_url or data["mesh"]["nats"]["url"]
        env = {**os.environ, "PYTHONPATH": f"{SHARED}:{self.folder}", "PLUGMESH_CONFIG_JSON": json.dumps(data)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "plugmesh_probe", env=env, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, limit=1 << 20
        )
        self.started.append(process)
        return process

    async def ready(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        """The `service.ready` event."""
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while True:
                line = await process.stderr.readline()
                assert line, f"ended with {await process.wait()} before it was ready"
                event = json.loads(line) if line.startswith(b"{") else {}
                if event.get("event") == "service.ready":
                    return event

    async def rest(self, process: asyncio.subprocess.Process) -> tuple[int, str]:
        """Exit code and what it still wrote to stderr."""
        assert process.stderr is not None
        text = await asyncio.wait_for(process.stderr.read(), 30)
        return await asyncio.wait_for(process.wait(), 30), text.decode()

    async def stop(self) -> None:
        for process in self.started:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest_asyncio.fixture
async def processes(tmp_path: pathlib.Path) -> AsyncIterator[Processes]:
    async with EmbeddedBroker(tmp_path / "broker") as broker:
        p = Processes(broker, tmp_path)
        yield p
        await p.stop()


@pytest_asyncio.fixture
async def observer(processes: Processes) -> AsyncIterator[RealMesh]:
    async with await RealMesh.connect(mesh_config(processes.broker, lease_ttl_s=2.0), patience=PATIENCE) as mesh:
        yield mesh


async def test_a_service_serves_on_every_port_and_drains_on_sigterm(processes: Processes, observer: RealMesh, tmp_path: pathlib.Path) -> None:
    stopped = tmp_path / "stopped"
    process = await processes.start(stopped_file=str(stopped), instance_id="probe-x")
    ready = await processes.ready(process)
    await until(lambda: len(observer.instances("probe")) == 1)
    (info,) = observer.instances("probe")
    assert (info.instance_id, info.model, info.roles, info.pid) == ("probe-x", "probe-model", ("probe",), process.pid)
    assert info.grpc_address.endswith(f":{ready['grpc_port']}") and info.load == {"num_running": 0.0}

    direct = observer.direct_channel(info)
    for channel in (observer.channel("probe"), observer.channel("probe", "probe-x"), direct):
        assert await ProbeStub(channel).unary(ask(echo="x"), timeout=5) == b"x"
        e = await failure(ProbeStub(channel).unary(ask(**{"raise": "overloaded"}), timeout=5))
        assert isinstance(wire.error_from_rpc(e), errors.Overloaded)
    health = health_pb2_grpc.HealthStub(direct)
    assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2_grpc.ServerReflectionStub(direct).ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
    names = {s.name for s in (await listing.read()).list_services_response.service}
    assert {"plugmesh.testing.Probe", "grpc.health.v1.Health"} <= names
    metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{info.metrics_address}/metrics", timeout=5).read().decode())
    assert "plugmesh_mesh_connected 1.0" in metrics and "process_resident_memory_bytes" in metrics

    stream = ProbeStub(observer.channel("probe", "probe-x")).count(ask(n=2000, pad=1000), timeout=20)
    assert await stream.read()
    process.send_signal(signal.SIGTERM)
    await until(lambda: [i.state for i in observer.instances("probe")] == ["draining"])
    got = 1
    while await stream.read() is not grpc.aio.EOF:                 # what ran when the signal came is finished
        got += 1
    code, log = await processes.rest(process)

    assert (got, code) == (2000, 0)
    assert stopped.exists() and "service.drained" in log and "service.stopped" in log
    await until(lambda: observer.instances("probe", include_suspect=True) == [], 1.0)


async def test_sigint_during_a_slow_start_ends_it_cleanly(processes: Processes, observer: RealMesh, tmp_path: pathlib.Path) -> None:
    stopped = tmp_path / "stopped"
    process = await processes.start(slow_start=True, stopped_file=str(stopped))
    assert process.stderr is not None
    while b"service.starting" not in await asyncio.wait_for(process.stderr.readline(), 30):
        pass
    await asyncio.sleep(0.3)
    process.send_signal(signal.SIGINT)
    code, _ = await processes.rest(process)

    assert code == 0 and stopped.exists()
    assert observer.instances("probe") == []


async def test_configuration_errors_are_one_line_and_exit_code_2(processes: Processes) -> None:
    process = await processes.start(grcp_port=1)
    code, text = await processes.rest(process)

    assert code == 2
    assert text.strip().count("\n") == 0 and "grcp_port" in text and "grpc_port" in text


async def test_a_taken_port_is_a_configuration_error(processes: Processes) -> None:
    first = await processes.ready(await processes.start())
    code, text = await processes.rest(await processes.start(grpc_port=first["grpc_port"]))

    assert code == 2 and "services.probe.grpc_port" in text.strip().splitlines()[-1]


async def test_a_failing_start_exits_with_1(processes: Processes) -> None:
    code, text = await processes.rest(await processes.start(fail=True))

    assert code == 1 and text.strip().splitlines()[-1] == "plugmesh probe: told to fail"


@pytest.mark.slow
async def test_a_missing_broker_exits_with_1(processes: Processes) -> None:
    code, text = await processes.rest(await processes.start(nats_url="nats://127.0.0.1:9"))

    assert code == 1 and "cannot reach the broker at nats://127.0.0.1:9" in text


async def test_a_killed_instance_is_noticed_within_three_seconds(processes: Processes, observer: RealMesh) -> None:
    process = await processes.start()
    await processes.ready(process)
    await until(lambda: len(observer.instances("probe")) == 1)
    left: list[float] = []
    observer.watch(lambda event, i: left.append(time.monotonic()) if event == "left" else None)
    stream = ProbeStub(observer.channel("probe")).count(ask(n=9, hang_at=1), timeout=30)
    await stream.read()
    unary = ProbeStub(observer.channel("probe")).unary(ask(sleep=30), timeout=30)
    await until(lambda: bool(unary._pipe.peer))
    process.kill()
    began = time.monotonic()
    codes = [(await failure(stream)).code(), (await failure(unary)).code()]

    assert codes == [grpc.StatusCode.UNAVAILABLE] * 2
    assert time.monotonic() - began < 3.0
    await until(lambda: bool(left), 3.0)
    assert (await failure(ProbeStub(observer.channel("probe")).unary(ask(echo="x"), timeout=5))).code() is grpc.StatusCode.UNAVAILABLE


async def test_death_of_a_caller_cancels_what_it_asked_for(processes: Processes, observer: RealMesh) -> None:
    process = await processes.start()
    info = await processes.ready(process)
    script = textwrap.dedent(f"""
        import asyncio, pathlib
        from plugmesh.mesh.real import RealMesh
        from plugmesh.config import MeshConfig
        from plugmesh.testing.carriers import ProbeStub, ask
        async def main():
            mesh = await RealMesh.connect(MeshConfig.model_validate_json(pathlib.Path({str(processes.folder / "c.json")!r}).read_text()))
            call = ProbeStub(mesh.channel("probe")).count(ask(n=9, hang_at=1))
            await call.read()
            print("running", flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    (processes.folder / "c.json").write_text(configuration.dump_json(mesh_config(processes.broker)))
    env = {**os.environ, "PYTHONPATH": str(SHARED)}
    caller = await asyncio.create_subprocess_exec(sys.executable, "-c", script, env=env, stdout=asyncio.subprocess.PIPE)
    processes.started.append(caller)
    assert caller.stdout is not None
    while await asyncio.wait_for(caller.stdout.readline(), 30) != b"running\n":
        pass

    async def running() -> float:
        url = f"http://127.0.0.1:{info['metrics_port']}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        return float(next(line for line in text.splitlines() if line.startswith("plugmesh_rpc_calls_running ")).split()[1])

    assert await running() == 1.0
    caller.kill()
    began = time.monotonic()
    while await running():
        assert time.monotonic() - began < 4.0
        await asyncio.sleep(0.05)


async def test_a_stopped_and_woken_instance_is_fenced_and_comes_back_as_a_new_one(processes: Processes, observer: RealMesh) -> None:
    process = await processes.start()
    ready = await processes.ready(process)
    await until(lambda: len(observer.instances("probe")) == 1)
    events: list[str] = []
    observer.watch(lambda event, i: events.append(event))
    stream = ProbeStub(observer.channel("probe")).count(ask(n=9, hang_at=1), timeout=30)
    await stream.read()
    process.send_signal(signal.SIGSTOP)
    try:
        assert (await failure(stream)).code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: "left" in events, 12.0)
        assert "suspect" in events and observer.instances("probe", include_suspect=True) == []
        assert observer.discovery.table.is_fenced(f"probe/{ready['incarnation']}")
    finally:
        process.send_signal(signal.SIGCONT)
    await until(lambda: bool(observer.instances("probe")), 10.0)
    (info,) = observer.instances("probe")

    assert info.incarnation != ready["incarnation"] and info.pid == process.pid
    assert await ProbeStub(observer.channel("probe")).unary(ask(echo="x"), timeout=5) == b"x"
