"""Where a running mesh leaves its address for other commands of the same user, and its private folder.

One folder per user (0700) holds, per mesh: `<mesh>.json` (this record, 0600), `<mesh>.lock` (held by the supervisor for
its life; the kernel lets go of it even after kill -9) and the run's own folder with credentials, sockets and logs.
A record counts only while the process that wrote it lives: id and start time are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from plugmesh.errors import AlreadyExists, ConfigError, NotFound

SHM = pathlib.Path("/dev/shm")  # noqa: S108  folders below it are private and named per run


@dataclass(frozen=True, slots=True)
class MeshRun:
    """What another command must know to talk to a mesh that runs on this machine.

    `state` is "starting", "ready" or "stopping"; `pid_started` comes from `process_start`. Holds no secret: the
    broker's password is in `nats_password_file`.
    """

    name: str
    pid: int
    pid_started: int
    runtime_dir: str
    state: str
    started_unix_s: float
    version: str
    model: str
    gateway_url: str = ""
    nats_url: str = ""
    nats_user: str = ""
    nats_password_file: str = ""
    nats_tls_ca_file: str = ""
    shm_paths: tuple[str, ...] = ()
    ephemeral: bool = False   # started by one command for itself

    def alive(self) -> bool:
        return process_start(self.pid) == self.pid_started != 0


def process_start(pid: int) -> int:
    """When a process started, in kernel ticks since boot; 0 when there is none. With the id it names a process for good."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return _process_start_elsewhere(pid)
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def _process_start_elsewhere(pid: int) -> int:
    if pathlib.Path("/proc/self/stat").exists():
        return 0
    import psutil

    try:
        return int(psutil.Process(pid).create_time() * 1000)
    except psutil.Error:
        return 0


def user_dir(environ: Mapping[str, str] | None = None) -> pathlib.Path:
    """The user's folder for records and runs, made with mode 0700: $XDG_RUNTIME_DIR/plugmesh, else ~/.cache/plugmesh/run.

    Raises:
        ConfigError: It cannot be made, or belongs to somebody else.
    """
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
        path = pathlib.Path(base) / "plugmesh"
    else:
        path = pathlib.Path(environ.get("HOME") or "~").expanduser() / ".cache" / "plugmesh" / "run"
    make_private(path)
    return path


def make_private(path: pathlib.Path) -> None:
    """Makes `path` a folder that only this user can enter. Raises ConfigError when that is impossible."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise ConfigError(f"{path} is not a folder of this user")
        if info.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as e:
        raise ConfigError(f"cannot make the folder {path}: {e.strerror}") from e


def live_runs(folder: pathlib.Path | None = None) -> list[MeshRun]:
    """Every mesh of this user whose supervisor lives, sorted by name."""
    folder = folder or user_dir()
    runs = [run for path in sorted(folder.glob("*.json")) if (run := _read(path)) is not None and run.alive()]
    return runs


def find_run(name: str | None = None, folder: pathlib.Path | None = None) -> MeshRun:
    """The running mesh of that name, or the only one.

    Raises:
        NotFound: None runs, or several do and no name was given; the message lists them.
    """
    runs = live_runs(folder)
    if name is not None:
        for run in runs:
            if run.name == name:
                return run
        raise NotFound(f"no mesh named {name!r} is running here" + (f"; running: {', '.join(r.name for r in runs)}" if runs else ""))
    if not runs:
        raise NotFound("no mesh is running here; start one with: plugmesh up")
    lasting = [r for r in runs if not r.ephemeral] or runs
    if len(lasting) > 1:
        raise NotFound(f"several meshes are running; choose one with --mesh: {', '.join(r.name for r in lasting)}")
    return lasting[0]


def write(run: MeshRun, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Publishes a record; readers see the old one or the new one, never half of it."""
    folder = folder or user_dir()
    path = folder / f"{run.name}.json"
    fd, temporary = tempfile.mkstemp(dir=folder, prefix=f".{run.name}.")  # 0600 by construction
    with open(fd, "w") as f:
        json.dump(dataclasses.asdict(run), f, indent=1)
    os.replace(temporary, path)
    return path


def _read(path: pathlib.Path) -> MeshRun | None:
    try:
        data = json.loads(path.read_text())
        data["shm_paths"] = tuple(data.get("shm_paths", ()))
        return MeshRun(**data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # of another version, or not ours: as good as absent


@contextlib.contextmanager
def hold(name: str, folder: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Claims a mesh name for this process, cleans up after a dead holder, and removes record and lock at the end.

    Yields:
        The user's folder.

    Raises:
        AlreadyExists: A living process holds the name.
    """
    folder = folder or user_dir()
    path = folder / f"{name}.lock"
    fd = _lock(path, name, folder)
    try:
        sweep(name, folder)
        yield folder
    finally:
        for leftover in (folder / f"{name}.json", path):
            leftover.unlink(missing_ok=True)
        os.close(fd)


def _lock(path: pathlib.Path, name: str, folder: pathlib.Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            run = _read(folder / f"{name}.json")
            pid = f" (process {run.pid})" if run else ""
            raise AlreadyExists(f"a mesh named {name!r} is already running{pid}; see: plugmesh status") from None
        try:
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # its last holder removed the file between our open and our lock


def sweep(name: str, folder: pathlib.Path) -> int:
    """Removes what a killed supervisor of this mesh left: its record, its folder, shared memory. Returns how much it removed."""
    num_removed = remove_shm(dead_shm())
    path = folder / f"{name}.json"
    run = _read(path)
    if run is not None and not run.alive():
        num_removed += remove_shm(run.shm_paths)
        path.unlink(missing_ok=True)
        if _is_ours(pathlib.Path(run.runtime_dir)):
            shutil.rmtree(run.runtime_dir, ignore_errors=True)
            num_removed += 1
    for run_dir in folder.glob(f"{name}.run-*"):
        if _is_ours(run_dir):
            shutil.rmtree(run_dir, ignore_errors=True)
            num_removed += 1
    return num_removed


_MARK = ".plugmesh-run"


def make_run_dir(name: str, folder: pathlib.Path, wanted: pathlib.Path | None) -> pathlib.Path:
    """The private folder of one run: `wanted` when it is configured (it must be absent or empty), else a new one.

    Raises:
        ConfigError: `wanted` holds something already or cannot be made.
    """
    if wanted is None:
        path = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}.run-", dir=folder))
    else:
        path = wanted.expanduser().absolute()
        make_private(path)
        if _is_ours(path):
            shutil.rmtree(path)
            make_private(path)
        elif any(path.iterdir()):
            raise ConfigError(f"mesh.runtime_dir {path} is not empty; it is emptied at every start and stop, so give it a folder of its own")
    (path / _MARK).touch(mode=0o600)
    return path


def remove_run_dir(path: pathlib.Path) -> None:
    """Removes a run's folder if it is one."""
    if _is_ours(path):
        shutil.rmtree(path, ignore_errors=True)


def _is_ours(path: pathlib.Path) -> bool:
    return (path / _MARK).is_file() and path.stat().st_uid == os.getuid()


def dead_shm() -> tuple[str, ...]:
    """Shared memory of this user whose supervisor, named by the number at its end, lives no more; of any mesh and user folder."""
    found = []
    for path in SHM.glob("plugmesh-*-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and process_start(int(pid)) == 0:
            found.append(str(path))
    return tuple(found)


def remove_shm(paths: tuple[str, ...]) -> int:
    """Removes shared-memory files and folders of this user. Only `/dev/shm/plugmesh-*`, so that a record edited by hand
    cannot name anything else. Returns how many there were."""
    num_removed = 0
    for text in paths:
        path = pathlib.Path(text)
        if path.parent != SHM or not path.name.startswith("plugmesh-") or path.is_symlink():
            continue
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                num_removed += 1
    return num_removed
