"""Deleting a plugin's folder breaks nothing but the configurations that name it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLUGINS = sorted(p.parent.name for p in (ROOT / "plugins").glob("plugmesh_*/plugin.toml"))
FORGET_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(getattr(f, '__module__', '')).lower()]\n"
# Whether something is missing shows in a few examples as well as in many.
FEW_EXAMPLES = """
import functools, hypothesis
_make = hypothesis.settings.__init__
@functools.wraps(_make)
def _few(self, *args, **kwargs):
    if "max_examples" in kwargs:
        kwargs["max_examples"] = min(kwargs["max_examples"], 5)
    _make(self, *args, **kwargs)
hypothesis.settings.__init__ = _few
hypothesis.settings.register_profile("few", hypothesis.settings.get_profile("plugmesh"), max_examples=5)
hypothesis.settings.load_profile("few")
"""

MASKED = """
import importlib, pathlib, sys
from plugmesh import cards
from plugmesh.config import MeshConfig
from plugmesh.errors import ConfigError
from plugmesh.host import PluginHost

class Mask:
    name = ""
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(name, name=name)

mask = Mask()
sys.meta_path.insert(0, mask)
folder = pathlib.Path(sys.argv[1])
packages = sorted(p.parent.name for p in folder.glob("plugmesh_*/plugin.toml"))
for gone in packages:
    mask.name = gone
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]
    found = cards.installed()
    assert gone.removeprefix("plugmesh_") not in found, gone
    for package in packages:
        if package == gone:
            continue
        slug = package.removeprefix("plugmesh_")
        assert slug in found, f"without {gone}, {slug} is gone too"
        host = PluginHost.load([slug], MeshConfig(), service=next(s for s in found[slug].services if s != "tools"))
        for path in sorted((folder / package).glob("*.py")):
            importlib.import_module(package if path.stem == "__init__" else f"{package}.{path.stem}")
    try:
        PluginHost.load([gone.removeprefix("plugmesh_")], MeshConfig(), service="decode")
    except ConfigError as e:
        assert "there is no plugin" in e.message, e.message
    else:
        raise AssertionError(gone)
    print(gone)
"""


def environment(root: pathlib.Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PLUGMESH_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(str(root / d) for d in ("shared", "services", "plugins")), "OMP_NUM_THREADS": "1"}


def test_without_any_one_plugin_the_others_are_found_and_import_all_their_modules() -> None:
    """Each is hidden in turn from the import system of one process."""
    done = subprocess.run(
        [sys.executable, "-c", FORGET_EDITABLE + MASKED, str(ROOT / "plugins")], env=environment(ROOT), capture_output=True, text=True, timeout=100
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == PLUGINS


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("gone", PLUGINS)
def test_the_tests_of_the_host_and_of_the_other_plugins_pass_in_a_tree_without_it(tmp_path: pathlib.Path, gone: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache", gone)
    for name in ("shared", "services", "plugins", "docs", "tests", "pyproject.toml", "README.md", "conftest.py"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path / name)
    conftest = tmp_path / "conftest.py"
    conftest.write_text(FORGET_EDITABLE + conftest.read_text() + FEW_EXAMPLES)
    wanted = ["tests/plugins/test_host.py", "tests/plugins/test_cards.py", "tests/plugins/test_conformance.py", "tests/plugins/test_documents.py", "plugins"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *wanted, "-m", "not slow and not gpu and not docker and not peers and not model and not nats", "-o", "timeout=600"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=1950,
    )  # fmt: skip

    assert not (tmp_path / "plugins" / gone).exists()
    assert done.returncode == 0, done.stdout[-5000:]
