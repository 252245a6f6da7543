"""What `plugmesh new-plugin` writes works and passes its tests as it is."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from plugmesh import scaffold
from plugmesh.docs import hooks
from plugmesh.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_tests(folder: pathlib.Path, kinds: list[str]) -> None:
    """Generates the kinds and runs their tests untouched, in one process."""
    for kind in kinds:
        scaffold.make(f"made_{kind.replace('-', '_')}", kind, folder)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    roots = [str(folder), *(str(ROOT / d) for d in ("shared", "services", "plugins"))]
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("PLUGMESH_")}, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x"], cwd=folder, env=env, capture_output=True, text=True, timeout=280)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert all(f"made_{k.replace('-', '_')}" in "".join(map(str, folder.rglob("test_*.py"))) for k in kinds)


@pytest.mark.timeout(120)
def test_a_new_plugin_of_two_kinds_passes_its_tests_untouched(tmp_path: pathlib.Path) -> None:
    run_tests(tmp_path, ["prefill-policy", "kv-hand-over"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_new_plugin_of_every_kind_passes_its_tests_untouched(tmp_path: pathlib.Path) -> None:
    run_tests(tmp_path, scaffold.kinds())


def test_every_record_type_has_a_kind() -> None:
    """So that a hook without a template is noticed."""
    registered = set()
    for kind in scaffold.kinds():
        registered |= set(tomllib.loads((scaffold.TEMPLATES / kind / "plugin.toml.txt").read_text())["hooks"])

    assert {h.name for h in hooks.hooks() if h.record is not None} - registered == set()


def test_a_distribution_has_an_entry_point_and_a_package_alone_has_none(tmp_path: pathlib.Path) -> None:
    files = scaffold.make("my_idea", "router", tmp_path, is_distribution=True)
    project = tomllib.loads((tmp_path / "plugmesh-my-idea" / "pyproject.toml").read_text())
    alone = scaffold.make("my_idea", "router", tmp_path)

    assert project["project"]["entry-points"]["plugmesh"] == {"my_idea": "plugmesh_my_idea.plugin"}
    assert all(p.is_file() for p in files)
    assert [p.name for p in alone if p.name == "pyproject.toml"] == []


@pytest.mark.parametrize(("slug", "kind"), [("Bad", "router"), ("x", "router"), ("a-b", "router"), ("ok_name", "no-such-kind"), ("end_", "router")])
def test_what_cannot_be_made_is_refused_and_leaves_nothing(tmp_path: pathlib.Path, slug: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be|no kind"):
        scaffold.make(slug, kind, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: pathlib.Path) -> None:
    scaffold.make("twice", "router", tmp_path)
    before = (tmp_path / "plugmesh_twice" / "plugin.py").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="exists already"):
        scaffold.make("twice", "draft", tmp_path)

    assert (tmp_path / "plugmesh_twice" / "plugin.py").stat().st_mtime_ns == before


def test_it_goes_where_one_would_look_for_it(tmp_path: pathlib.Path) -> None:
    assert scaffold.default_place(ROOT / "shared" / "plugmesh") == (ROOT / "plugins", False)
    assert scaffold.default_place(tmp_path) == (tmp_path, True)
