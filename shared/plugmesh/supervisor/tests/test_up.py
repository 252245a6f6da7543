"""`plugmesh up` as a user meets it: one real mesh of real processes, looked at, hurt and stopped; nothing stays behind."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest

from plugmesh import models
from plugmesh.config import SERVICE_NAMES

PLUGMESH = [sys.executable, "-m", "plugmesh.cli"]


class Up:
    """`plugmesh up` in a process of its own, with private folders."""

    def __init__(self, tmp_path: pathlib.Path, *arguments: str, **env: str) -> None:
        self.runs = tmp_path / "xdg"
        self.runs.mkdir(exist_ok=True)
        self.env = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(self.runs),
            "PLUGMESH_MESH__DATA_DIR": str(tmp_path / "data"),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            **env,
        }
        self.out = tmp_path / f"up-{time.monotonic_ns()}.txt"
        with self.out.open("wb") as sink:
            self.process = subprocess.Popen(
                [*PLUGMESH, "up", "--port", "0", "--plain", *arguments], env=self.env, cwd=tmp_path, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL
            )
        self.seen: set[int] = set()

    def text(self) -> str:
        return self.out.read_text()

    def children(self) -> list[psutil.Process]:
        """All processes below the supervisor; remembered for `left`."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen.update(p.pid for p in found)
        return found

    def pid_of(self, module: str) -> int | None:
        for p in self.children():
            try:
                if module in " ".join(p.cmdline()):
                    return p.pid
            except psutil.NoSuchProcess:
                continue
        return None

    def command(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*PLUGMESH, *arguments], env=self.env, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)

    def instances(self) -> dict[str, list[dict]]:
        done = self.command("status", "--json")
        rows = json.loads(done.stdout)["instances"] if done.returncode in (0, 3) else []
        return {role: [r for r in rows if r["role"] == role and r["state"] == "ready"] for role in SERVICE_NAMES}

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def left(self) -> dict[str, list]:
        """What should be gone: processes, files of the run, shared memory of this supervisor."""
        return {
            "processes": [p for p in sorted(self.seen) if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE],
            "files": sorted(str(p) for p in self.runs.rglob("*") if p != self.runs / "plugmesh"),
            "shared memory": sorted(str(p) for p in pathlib.Path("/dev/shm").glob(f"plugmesh-*-{self.process.pid}")),
        }

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


NOTHING = {"processes": [], "files": [], "shared memory": []}


def until(condition: Callable[[], object], timeout_s: float, what: str) -> object:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout_s} s")


def ask(url: str, max_tokens: int = 4) -> dict:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A mesh that serves; stopped by Ctrl-C at the end, and then nothing of it may be left."""
    if models.find("smollm2") is None:
        pytest.fail("the default model is missing: plugmesh pull smollm2")
    up = Up(tmp_path_factory.mktemp("up"), "--ready-timeout", "100")
    try:
        until(lambda: up.process.poll() is not None or "serves" in up.text(), 110, "the mesh is up")
        assert up.process.poll() is None, up.text()
        up.children()
        yield up
        up.children()
        assert all(up.left().values()), "what must be gone later is there now"
        up.process.send_signal(signal.SIGINT)
        assert up.wait(60) == 0, up.text()
        assert up.left() == NOTHING
    finally:
        up.end()


def url_of(up: Up) -> str:
    found = re.search(r"at (http://[\d.]+:\d+)/v1", up.text())
    assert found is not None, up.text()
    return found[1]


@pytest.mark.model
@pytest.mark.nats
@pytest.mark.timeout(240)
class TestRunningMesh:
    def test_status_shows_every_service_as_it_is(self, mesh: Up) -> None:
        done = mesh.command("status", "--json")
        answer = json.loads(done.stdout)

        assert (done.returncode, answer["missing_roles"], answer["mesh"]["state"]) == (0, [], "ready")
        assert sorted(i["role"] for i in answer["instances"]) == sorted(SERVICE_NAMES)
        assert {i["pid"] for i in answer["instances"]} <= {p.pid for p in mesh.children()}
        assert all(i["incarnation"] and i["grpc_address"] and i["version"] for i in answer["instances"])
        assert "password" not in done.stdout

    def test_only_this_user_can_read_the_run(self, mesh: Up) -> None:
        for path in mesh.runs.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0 or path.is_relative_to(next(mesh.runs.glob("plugmesh/*.run-*"))), path
        assert [p.stat().st_mode & 0o777 for p in mesh.runs.glob("plugmesh/*.run-*")] == [0o700]

    def test_run_uses_the_mesh_that_is_there_and_leaves_it_alone(self, mesh: Up) -> None:
        before = {p.pid for p in mesh.children()}
        done = mesh.command("run", "Say hello.", "--max-tokens", "5")

        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert {p.pid for p in mesh.children()} == before

    def test_chat_answers_line_by_line_and_ends_with_the_input(self, mesh: Up) -> None:
        lines = "Hello.\n\n/reset\nWhat is 1+1?\n"
        done = subprocess.run(
            [*PLUGMESH, "chat", "--max-tokens", "3", "--temperature", "0"], env=mesh.env, input=lines, capture_output=True, text=True, timeout=60
        )

        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) >= 2
        assert "forgotten" in done.stderr

    def test_a_reader_that_goes_away_ends_the_answer(self, mesh: Up) -> None:
        asking = subprocess.Popen(
            [*PLUGMESH, "run", "Count from 1 to 500.", "--max-tokens", "2000"], env=mesh.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert asking.stdout.read(1)
        asking.send_signal(signal.SIGINT)
        _, err = asking.communicate(timeout=30)

        assert (asking.returncode, err) == (130, b"")
        until(lambda: all(r["load"].get("num_running", 0) == 0 for r in mesh.instances()["decode"]), 10, "decode stopped working on it")

    def test_a_second_mesh_of_the_same_name_is_refused(self, mesh: Up) -> None:
        done = mesh.command("up", "--port", "0", "--plain")

        assert done.returncode == 1
        assert f"already running (process {mesh.process.pid})" in " ".join(done.stderr.split())

    def test_a_killed_service_is_restarted_and_serves_again(self, mesh: Up) -> None:
        victim = mesh.pid_of("plugmesh_tokenizer")
        os.kill(victim, signal.SIGKILL)
        until(lambda: re.search(r"tokenizer\S* killed by SIGKILL", mesh.text()), 10, "the crash is reported")
        until(lambda: "is serving again" in mesh.text(), 60, "the restart is reported")

        assert [i["pid"] for i in mesh.instances()["tokenizer"]] == [mesh.pid_of("plugmesh_tokenizer")]
        assert until(lambda: _answers(mesh), 30, "chats are answered again")

    def test_a_killed_broker_comes_back_where_it_was_and_full_function_returns(self, mesh: Up) -> None:
        before = json.loads(mesh.command("status", "--json").stdout)["mesh"]["nats_url"]
        pids = {role: [r["pid"] for r in rows] for role, rows in mesh.instances().items()}
        os.kill(mesh.pid_of("nats-server"), signal.SIGKILL)
        until(lambda: re.search(r"broker\S* killed by SIGKILL", mesh.text()), 10, "the crash is reported")
        until(lambda: {role: [r["pid"] for r in rows] for role, rows in mesh.instances().items()} == pids, 40, "every service is back, none restarted")

        assert json.loads(mesh.command("status", "--json").stdout)["mesh"]["nats_url"] == before
        assert until(lambda: _answers(mesh), 30, "chats are answered again")


def _answers(mesh: Up) -> bool:
    try:
        return ask(url_of(mesh))["usage"]["completion_tokens"] > 0
    except OSError:
        return False


def started(tmp_path: pathlib.Path, **env: str) -> Up:
    """A mesh whose processes run but which serves nothing yet."""
    up = Up(tmp_path, **env)
    until(lambda: up.process.poll() is not None or len([c for c in up.children() if "plugmesh_" in " ".join(c.cmdline())]) >= len(SERVICE_NAMES), 30, "processes")
    assert up.process.poll() is None, up.text()
    return up


def catches_sigterm(process: psutil.Process) -> bool:
    """Until it does, SIGTERM ends a process at once, even a suspended one."""
    caught = re.search(r"SigCgt:\s*(\w+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.nats
@pytest.mark.model
def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing_either(tmp_path: pathlib.Path) -> None:
    up = started(tmp_path)
    try:
        gateways = lambda: [p for p in up.children() if "plugmesh_gateway" in " ".join(p.cmdline()) and catches_sigterm(p)]  # noqa: E731
        for p in until(gateways, 30, "a gateway that drains"):
            p.suspend()  # a service that will never drain
        up.process.send_signal(signal.SIGINT)
        until(lambda: "draining" in up.text(), 10, "the first one is heard")
        assert up.process.poll() is None
        up.process.send_signal(signal.SIGINT)

        assert up.wait(15) == 1, up.text()
        assert "by force" in up.text()
        assert up.left() == NOTHING
    finally:
        up.end()


@pytest.mark.nats
@pytest.mark.model
def test_after_kill_9_no_process_is_left_and_the_next_start_removes_the_files(tmp_path: pathlib.Path) -> None:
    up = started(tmp_path)
    up.process.kill()
    up.wait(10)
    until(lambda: up.left()["processes"] == [], 10, "every process is gone")
    assert up.left()["files"] != []
    assert up.command("status").returncode == 1, "the record of a dead mesh is ignored"
    again = started(tmp_path)
    try:
        again.process.send_signal(signal.SIGINT)  # during the start

        assert again.wait(60) == 0, again.text()
        assert up.left() == NOTHING
        assert again.left() == NOTHING
    finally:
        again.end()


@pytest.mark.nats
@pytest.mark.model
def test_run_on_its_own_starts_a_mesh_answers_and_leaves_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "xdg").mkdir()
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "xdg"), "PLUGMESH_MESH__DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    asking = subprocess.Popen(
        [*PLUGMESH, "run", "What is the capital of France?", "--max-tokens", "20"], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = set()

    def look() -> bool:
        seen.update(p.pid for p in psutil.Process(asking.pid).children(recursive=True))
        return len(seen) > len(SERVICE_NAMES)

    until(look, 60, "its mesh starts")
    out, err = asking.communicate(timeout=100)

    assert asking.returncode == 0, err
    assert "Paris" in out
    assert "Paris" not in err
    assert [p for p in seen if psutil.pid_exists(p)] == []
    assert [p for p in (tmp_path / "xdg").rglob("*") if p.name != "plugmesh"] == []
    assert list(pathlib.Path("/dev/shm").glob(f"plugmesh-*-{asking.pid}")) == []


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[services.decode]\ndtyp = 'float32'", "unknown key 'services.decode.dtyp'; did you mean 'dtype'?"),
        ("[services.decoder]", "unknown service [services.decoder]; did you mean 'decode'?"),
        ("[services.decode]\nplugins = ['nonesuch']", "there is no plugin 'nonesuch'"),
        ("[services.decode]\nreplicas = 0", "services.decode.replicas is 0"),
        ("[mesh", "is not valid TOML"),
    ],
)
def test_a_bad_configuration_is_one_clear_message_and_exit_2(tmp_path: pathlib.Path, toml: str, says: str) -> None:
    (tmp_path / "mesh.toml").write_text(toml)
    up = Up(tmp_path, "--config", "mesh.toml")
    try:
        assert up.wait(30) == 2, up.text()
        assert says in " ".join(up.text().split())
        assert up.text().count("error:") == 1
        assert "Traceback" not in up.text()
        assert up.left() == NOTHING
    finally:
        up.end()


@pytest.mark.nats
@pytest.mark.model
def test_a_configuration_that_only_a_service_can_judge_stops_everything_with_its_words(tmp_path: pathlib.Path) -> None:
    up = Up(tmp_path, PLUGMESH_SERVICES__GATEWAY__KEYS_FILE='"/nonexistent/keys.toml"')
    try:
        until(lambda: up.children() is None or up.process.poll() is not None, 60, "the end")

        assert up.wait(30) == 2, up.text()
        assert "cannot read /nonexistent/keys.toml" in " ".join(up.text().split())
        assert up.left() == NOTHING
    finally:
        up.end()


def test_a_taken_port_is_named_before_anything_starts(tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        up = Up(tmp_path, "--port", str(port))
        try:
            assert up.wait(30) == 2, up.text()
            assert f"cannot listen on 127.0.0.1:{port}" in " ".join(up.text().split())
            assert up.left() == NOTHING
        finally:
            up.end()
