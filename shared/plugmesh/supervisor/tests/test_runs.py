"""Records of running meshes: found while the owner lives, ignored and swept afterwards."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import secrets
import subprocess
import sys

import pytest

from plugmesh.errors import AlreadyExists, ConfigError, NotFound
from plugmesh.supervisor import runs

HERE = runs.MeshRun("m", os.getpid(), runs.process_start(os.getpid()), "/nowhere", "ready", 0.0, "0", "smollm2")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "run"
    runs.make_private(path)
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_record_is_found_while_its_process_lives(folder: pathlib.Path) -> None:
    path = runs.write(HERE, folder)

    assert runs.find_run(folder=folder) == HERE
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("stale", [{"pid": 0}, {"pid_started": 1}, {"pid_started": 0}])
def test_a_record_of_a_dead_process_or_a_reused_id_is_ignored(folder: pathlib.Path, stale: dict[str, int]) -> None:
    runs.write(dataclasses.replace(HERE, **(stale if stale.get("pid") != 0 else {"pid": dead_pid()})), folder)

    assert runs.live_runs(folder) == []
    with pytest.raises(NotFound, match="plugmesh up"):
        runs.find_run(folder=folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "m"}', '{"name": "m", "surprise": 1}'])
def test_a_damaged_record_is_as_good_as_absent(folder: pathlib.Path, text: str) -> None:
    (folder / "m.json").write_text(text)

    assert runs.live_runs(folder) == []


def test_several_meshes_need_a_name(folder: pathlib.Path) -> None:
    for name in ("a", "b"):
        runs.write(dataclasses.replace(HERE, name=name), folder)
    with pytest.raises(NotFound, match="a, b"):
        runs.find_run(folder=folder)

    assert runs.find_run("b", folder).name == "b"
    with pytest.raises(NotFound, match="running: a, b"):
        runs.find_run("c", folder)


def test_a_name_is_held_by_one_process_and_free_afterwards(folder: pathlib.Path) -> None:
    with runs.hold("m", folder):
        runs.write(HERE, folder)
        with pytest.raises(AlreadyExists, match=str(os.getpid())), runs.hold("m", folder):
            pass
        with runs.hold("other", folder):
            pass
    with runs.hold("m", folder):
        pass

    assert list(folder.iterdir()) == []


def test_the_next_holder_removes_what_a_killed_one_left(folder: pathlib.Path) -> None:
    run_dir = runs.make_run_dir("m", folder, None)
    lost = runs.make_run_dir("m", folder, None)  # killed before it wrote its record
    shm = pathlib.Path(f"/dev/shm/plugmesh-test-{secrets.token_hex(4)}")
    shm.mkdir()
    (shm / "arena").touch()
    runs.write(dataclasses.replace(HERE, pid=dead_pid(), runtime_dir=str(run_dir), shm_paths=(str(shm), str(folder))), folder)
    with runs.hold("m", folder):
        assert not run_dir.exists()
        assert not lost.exists()
        assert not shm.exists()

    assert folder.exists(), "a path outside /dev/shm is never removed"


def test_a_configured_run_folder_must_be_empty_or_ours(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        runs.make_run_dir("m", folder, mine)
    runs.remove_run_dir(mine)

    assert (mine / "thesis.tex").exists()
    again = runs.make_run_dir("m", folder, tmp_path / "new")
    assert runs.make_run_dir("m", folder, tmp_path / "new") == again
    runs.remove_run_dir(again)
    assert not again.exists()


def test_the_user_folder_follows_the_environment(tmp_path: pathlib.Path) -> None:
    assert runs.user_dir({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path / "plugmesh"
    assert runs.user_dir({"HOME": str(tmp_path)}) == tmp_path / ".cache/plugmesh/run"
    assert runs.user_dir({"XDG_RUNTIME_DIR": str(tmp_path / "absent"), "HOME": str(tmp_path)}) == tmp_path / ".cache/plugmesh/run"


def test_shared_memory_of_dead_supervisors_is_removed_and_of_living_ones_kept(folder: pathlib.Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(30)
    token = secrets.token_hex(4)
    dead, alive, foreign = (runs.SHM / f"plugmesh-{token}-x-{end}" for end in (ended.pid, os.getpid(), "notes"))
    for path in (dead, alive, foreign):
        path.mkdir(mode=0o700)
    try:
        runs.sweep("another-mesh", folder)

        assert [False, True, True] == [p.exists() for p in (dead, alive, foreign)]
    finally:
        for path in (alive, foreign):
            path.rmdir()
