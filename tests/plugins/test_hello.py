"""The example of a plugin outside of the tree: built, installed and found by its entry point, as anybody's would be."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "plugmesh-hello"
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with what pip made of the example; built from a copy, without network, by the setuptools that are here."""
    source = tmp_path_factory.mktemp("source") / "plugmesh-hello"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return target


def python(installed: pathlib.Path, folder: pathlib.Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    roots = [str(installed), *(str(ROOT / d) for d in ("shared", "services", "plugins"))]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PLUGMESH_")}
    env |= {"PYTHONPATH": os.pathsep.join(roots), **more}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=100)


def test_the_distribution_holds_package_card_and_entry_point(installed: pathlib.Path) -> None:
    names = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}

    assert {"plugmesh_hello/plugin.py", "plugmesh_hello/plugin.toml", "plugmesh_hello/README.md"} <= names
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "hello = plugmesh_hello.plugin" in entry_points.read_text()


def test_the_command_shows_its_card(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mesh.toml").write_text('[services.decode]\nplugins = ["hello"]\n')
    done = python(installed, tmp_path, "-m", "plugmesh.cli", "plugins", "hello", "--json")

    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert (card["slug"], card["loaded_in"], card["folder"]) == ("hello", ["decode"], str(installed / "plugmesh_hello"))


def test_a_host_finds_it_by_its_entry_point_under_another_package_name(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The slug alone says nothing of where the code lies."""
    moved = tmp_path / "moved"
    shutil.copytree(installed, moved)
    (moved / "plugmesh_hello").rename(moved / "somebodys_hello")
    for path in moved.glob("*.dist-info/entry_points.txt"):
        path.write_text("[plugmesh]\nhello = somebodys_hello.plugin\n")
    plugin = moved / "somebodys_hello" / "plugin.py"
    plugin.write_text(plugin.read_text().replace("plugmesh_hello", "somebodys_hello"))
    code = (
        "from plugmesh.config import MeshConfig; from plugmesh.host import PluginHost\n"
        "host = PluginHost.load(['hello'], MeshConfig(plugins={'hello': {'name': 'you'}}), service='decode')\n"
        "print(host.records('prefill_policies')[-1].choose(10**6, 9, 1), host.versions)\n"
        "import somebodys_hello.plugin as p; print(p.GREETER.text)\n"
    )
    done = python(moved, tmp_path, "-c", code)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["local {'hello': '0.1.0'}", "hello, you"]


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copy(EXAMPLE / "plugmesh_hello/tests/test_hello.py", tmp_path)
    done = python(installed, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path))

    assert done.returncode == 0, done.stdout[-3000:]
