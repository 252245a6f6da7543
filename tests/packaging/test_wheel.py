"""The distribution holds all that a mesh needs and nothing else, and services start from it alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator

import pytest

import plugmesh_kernels
from plugmesh import __version__, models
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.supervisor.observe import Observer
from plugmesh_kernels import build

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROOTS = ("shared", "services", "plugins")
pytestmark = pytest.mark.timeout(300)  # whichever test comes first builds the wheel, and compiles the kernels when no objects are at hand


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built from a copy, so that no build folder appears in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in (*ROOTS, "pyproject.toml", "setup.py", "README.md", "LICENSE", "build/kernels"):  # the last: objects of kernels compiled before
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif path.exists():
            shutil.copy(path, source / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (source / "dist").glob("plugmesh-*.whl")
    return found


@pytest.fixture(scope="module")
def names(wheel: pathlib.Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def packages() -> Iterator[pathlib.Path]:
    """Top-level packages of the repository."""
    for root in ROOTS:
        yield from sorted(p.parent for p in (ROOT / root).glob("*/__init__.py"))


def test_every_module_is_in_the_wheel_and_no_test_is(names: set[str]) -> None:
    wanted = {
        str(path.relative_to(package.parent))
        for package in packages()
        for path in package.rglob("*.py")
        if "tests" not in path.relative_to(package).parts
    }
    assert len(wanted) > 80
    assert wanted - names == set()
    assert [n for n in names if "tests/" in n or n.split("/")[-1].startswith(("test_", "conftest"))] == []


def test_generated_protos_are_in_the_wheel(names: set[str]) -> None:
    protos = [p.stem for p in (ROOT / "protos/plugmesh_proto/v1").glob("*.proto")]
    wanted = {f"plugmesh_proto/v1/{stem}{end}" for stem in protos for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")}

    assert len(protos) >= 7
    assert wanted - names == set()


def test_data_files_are_in_the_wheel(names: set[str]) -> None:
    native = [p for top in ("shared", "plugins") for p in (ROOT / top).glob("*/csrc/*") if p.suffix in (".cpp", ".h", ".inc")]
    assert {"plugmesh_kernels", "plugmesh_qserve", "plugmesh_xgrammar"} <= {p.parent.parent.name for p in native}
    wanted = {"plugmesh/py.typed"} | {f"{p.parent.parent.name}/csrc/{p.name}" for p in native}
    for package in packages():
        wanted |= {f"{package.name}/{f}" for f in ("plugin.toml", "README.md", "py.typed") if (package / f).exists()}
        wanted |= {str(p.relative_to(package.parent)) for end in ("ini", "mako", "html", "jinja", "txt") for p in package.rglob(f"*.{end}") if "tests" not in p.parts}
    assert any("migrations/versions/" in n for n in names)
    assert any(n.endswith("/plugin.toml") for n in wanted)
    assert wanted - names == set()


def test_every_plugin_has_a_card_and_a_page() -> None:
    plugins = [p for p in packages() if p.parent.name == "plugins"]

    assert plugins
    assert [f"{p.name}/{f}" for p in plugins for f in ("plugin.toml", "README.md", "plugin.py") if not (p / f).is_file()] == []


@pytest.mark.skipif(not plugmesh_kernels.available(), reason="the kernels cannot be compiled here")
def test_the_wheel_is_for_this_platform_and_brings_the_kernels(wheel: pathlib.Path, names: set[str]) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"

    assert f"-{python}-{python}-" in wheel.name and not wheel.name.endswith("-any.whl")
    assert [n for n in names if n.endswith(".so")] == [f"plugmesh_kernels/{build.module_file_name()}"]


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Python whose plugmesh is the wheel. Other packages come from this environment through a path file, which (unlike a
    site folder of its own) does not activate this environment's editable plugmesh."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # The broker's binary is found beside the interpreter.
    binary = pathlib.Path(sys.executable).parent / "nats-server"
    if binary.exists():
        (folder / "bin" / "nats-server").symlink_to(binary)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def clean_env(tmp_path: pathlib.Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PLUGMESH", "XDG"))}
    return {**kept, "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(tmp_path), **more}


def test_the_installed_command_runs_outside_the_repository(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run([installed.parent / "plugmesh", *arguments], cwd=tmp_path, env=clean_env(tmp_path), capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [installed, "-c", "import plugmesh, plugmesh_decode, plugmesh_proto; print(plugmesh.__file__, plugmesh_decode.__file__, plugmesh_proto.__file__)"],
        cwd=tmp_path, env=clean_env(tmp_path), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip

    assert all(str(installed.parent.parent) in path for path in where.stdout.split())
    assert run("version").strip() == __version__
    assert {card["slug"] for card in json.loads(run("plugins", "--json"))} == {p.name.removeprefix("plugmesh_") for p in packages() if p.parent.name == "plugins"}


@pytest.mark.skipif(not plugmesh_kernels.available(), reason="the kernels cannot be compiled here")
def test_the_installed_kernels_are_those_of_the_wheel(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = "import plugmesh_kernels as k; print(k.library(), k.isa(), k.is_stale())"
    asked = subprocess.run([installed, "-c", code], cwd=tmp_path, env=clean_env(tmp_path), capture_output=True, text=True, timeout=60, check=True)
    library, isa, is_stale = asked.stdout.split()

    assert library.startswith(str(installed.parent.parent))
    assert (isa, is_stale) == (plugmesh_kernels.native().best_isa(), "False")


@pytest.mark.nats
@pytest.mark.model
async def test_services_start_from_the_wheel_and_announce_themselves(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The weightstore brings its database to life by the migrations in the wheel; the kvstore is the other kind of store."""
    assert models.find("smollm2") is not None, "plugmesh pull smollm2"
    processes: list[subprocess.Popen[bytes]] = []
    async with EmbeddedBroker(tmp_path / "broker", mesh="wheel") as broker:
        try:
            for role in ("weightstore", "kvstore"):
                credential = broker.credential(role)
                nats = {"url": credential.url, "user": role, "password_file": str(credential.password_file)}
                config = {"mesh": {"name": "wheel", "nats": nats, "data_dir": str(tmp_path / "data"), "runtime_dir": str(tmp_path / "run")}}
                with (tmp_path / f"{role}.log").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [installed, "-m", f"plugmesh_{role}"], cwd=tmp_path, stdout=log, stderr=log,
                            env=clean_env(tmp_path, PLUGMESH_CONFIG_JSON=json.dumps(config)),
                        )
                    )  # fmt: skip
            address = broker.address
            observer = await Observer.connect("wheel", url=address.url, user=address.user, password_file=str(address.password_file))
            try:
                async with asyncio.timeout(90):
                    while {i.role for i in observer.instances() if i.state == "ready"} != {"weightstore", "kvstore"}:
                        assert all(p.poll() is None for p in processes), _logs(tmp_path)
                        await asyncio.sleep(0.1)
            finally:
                await observer.close()
            for process in processes:
                process.terminate()

            assert [await asyncio.to_thread(p.wait, 30) for p in processes] == [0, 0], _logs(tmp_path)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                process.wait(10)


def _logs(folder: pathlib.Path) -> str:
    return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in folder.glob("*.log"))
