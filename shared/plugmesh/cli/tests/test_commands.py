"""Commands that need no mesh: what they print and with which status they end."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import time
import tomllib

import pytest

from plugmesh.cli import output, status
from plugmesh.types import InstanceInfo


def plugmesh(tmp_path: pathlib.Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "xdg").mkdir(exist_ok=True)
    full = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PLUGMESH_")},
        "XDG_RUNTIME_DIR": str(tmp_path / "xdg"),
        "PLUGMESH_MESH__DATA_DIR": str(tmp_path / "data"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "COLUMNS": "200",
        **env,
    }
    return subprocess.run([sys.executable, "-m", "plugmesh.cli", *arguments], env=full, cwd=tmp_path, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)


def test_help_comes_at_once(tmp_path: pathlib.Path) -> None:
    """Processor time, so that a busy machine does not matter; wall time on an idle one is below it."""
    plugmesh(tmp_path, "--help")
    before = os.times()
    done = plugmesh(tmp_path, "--help")
    after = os.times()

    assert done.returncode == 0
    assert all(command in done.stdout for command in ("up", "serve", "status", "run", "chat", "pull", "doctor", "plugins"))
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["status"], 1, "no mesh is running here; start one with: plugmesh up"),
        (["status", "--mesh", "x"], 1, "no mesh named 'x'"),
        (["serve", "decoder"], 2, "there is no service 'decoder'; did you mean 'decode'?"),
        (["serve", "kvstore"], 2, "no broker to join"),
        (["run", " "], 1, "the prompt is empty"),
        (["pull", "nonesuch"], 1, "no model named 'nonesuch'"),
        (["doctor", "--config", "absent.toml"], 1, "cannot read absent.toml"),
        (["plugins", "--config", "absent.toml"], 2, "cannot read absent.toml"),
        (["keys", "new", "a b"], 2, "a key's name is"),
        (["keys", "new", "x", "--scope", "root"], 2, "unknown scope 'root'"),
        (["nonesuch"], 2, "No such command"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(tmp_path: pathlib.Path, arguments: list[str], code: int, says: str) -> None:
    done = plugmesh(tmp_path, *arguments)

    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert says in done.stderr + done.stdout


def test_doctor_tells_facts_as_json(tmp_path: pathlib.Path) -> None:
    done = plugmesh(tmp_path, "doctor", "--json")
    answer = json.loads(done.stdout)
    findings = {f["name"]: f for f in answer["findings"]}

    assert {"processor", "instructions", "memory", "shared memory", "GPU", "python", "torch", "kernels", "broker", "compiler", "gateway port", "running"} <= set(findings)
    assert all(f["meaning"] and f["state"] in ("ok", "note", "problem") for f in findings.values())
    assert answer["ok"] == (done.returncode == 0)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in findings["python"]["value"]


@pytest.mark.parametrize(
    ("isa", "value", "meaning"),
    [
        ("none", "not in use", "PLUGMESH_KERNELS_ISA=none; torch computes instead"),
        ("portable", "compiled, portable", "no instruction set that the kernels are written for|chosen by PLUGMESH_KERNELS_ISA; this processor can do|was built from other sources"),
    ],
)  # fmt: skip
def test_doctor_says_which_kernels_compute(isa: str, value: str, meaning: str) -> None:
    """Asked directly: the command takes seconds, most of them for torch."""
    import plugmesh_kernels
    from plugmesh.cli import doctor
    from plugmesh.config import MeshConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUGMESH_KERNELS_ISA", isa)
        (found,) = doctor._kernels(MeshConfig())

    if isa != "none" and not plugmesh_kernels.available():
        value, meaning = "not in use", "compile"
    assert (found.name, found.state, found.value) == ("kernels", "note", value)
    assert re.search(meaning, found.meaning)


@pytest.mark.parametrize(("isa", "state"), [("none", "problem"), ("portable", "note")])
def test_a_missing_torch_is_a_problem_only_where_no_kernels_compute(isa: str, state: str) -> None:
    import plugmesh_kernels
    from plugmesh.cli import doctor
    from plugmesh.config import MeshConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUGMESH_KERNELS_ISA", isa)
        patch.setattr(doctor, "_version", lambda name: None)
        (found,) = doctor._torch(MeshConfig())

    assert (found.name, found.state) == ("torch", state if plugmesh_kernels.available() else "problem")


def test_doctor_finds_what_is_wrong(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mesh.toml").write_text("[mesh]\nmodel = 'nowhere.gguf'\ncach_dir = 'x'\n")
    done = plugmesh(tmp_path, "doctor", "--json", PLUGMESH_MESH__CACHE_DIR=str(tmp_path / "empty"))
    problem = next(f for f in json.loads(done.stdout)["findings"] if f["name"] == "configuration")

    assert done.returncode == 1
    assert problem["state"] == "problem"
    assert "did you mean 'cache_dir'" in problem["value"]


def test_doctor_says_how_to_get_the_model(tmp_path: pathlib.Path) -> None:
    done = plugmesh(tmp_path, "doctor", PLUGMESH_MESH__CACHE_DIR=str(tmp_path / "empty"))

    assert "plugmesh pull smollm2" in done.stdout
    assert done.returncode == 0


def test_a_new_key_is_shown_once_and_only_its_hash_is_kept(tmp_path: pathlib.Path) -> None:
    first, second = (plugmesh(tmp_path, "keys", "new", name) for name in ("laptop", "phone"))
    path = tmp_path / "data/keys.toml"
    kept = tomllib.loads(path.read_text())["keys"]

    assert [k["name"] for k in kept] == ["laptop", "phone"]
    assert first.stdout != second.stdout
    assert first.stdout.startswith("pm-")
    assert first.stdout.strip() not in path.read_text() + first.stderr
    assert path.stat().st_mode & 0o777 == 0o600
    from plugmesh_gateway.keys import KeyRing

    assert KeyRing.load(path).check(f"Bearer {second.stdout.strip()}", "inference") == "phone"


def test_plugins_are_listed_with_where_they_are_switched_on(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mesh.toml").write_text('[services.decode]\nplugins = ["sarathi"]\n')
    rows = {row["slug"]: row for row in json.loads(plugmesh(tmp_path, "plugins", "--json").stdout)}

    assert rows["sarathi"]["loaded_in"] == ["decode"]
    assert rows["splitwise"]["loaded_in"] == []
    assert rows["sarathi"]["summary"] in " ".join(plugmesh(tmp_path, "plugins").stdout.split())


def test_amounts_and_durations_read_well() -> None:
    assert [output.amount(n) for n in (0, 999, 98_362_432, 25_300_000_000, 4e12)] == ["0 B", "999 B", "98.4 MB", "25.3 GB", "4.0 TB"]
    assert [output.seconds(s) for s in (0.04, 59.94, 61, 7260)] == ["0.0 s", "59.9 s", "1 min 1 s", "2 h 1 min"]


def test_load_is_told_in_few_words() -> None:
    load = {"num_running": 3.0, "num_waiting": 0.0, "kv_blocks_used": 12.0, "kv_blocks_total": 512.0, "http_port": 8000.0}

    assert status.load_text(InstanceInfo("decode", "d", "i", "", "", 1, load=load)) == "running 3, kv blocks 12/512"
    assert "idle" in status.load_text(InstanceInfo("decode", "d", "i", "", "", 1, load={"num_running": 0.0}))


def test_a_reader_that_closes_early_is_no_traceback(tmp_path: pathlib.Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m plugmesh.cli doctor | head -n 1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}, cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
