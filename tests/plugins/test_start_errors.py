"""A start that cannot work ends with one clear message, the line of the configuration, exit code 2, and nothing left running. Real processes."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import psutil
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

CARD = """
slug = "{slug}"
version = "0.1"
summary = "made by a test"
services = ["decode"]
hooks = []
fidelity = "exact"
"""


@pytest.fixture
def bad(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with a plugin that cannot be imported, one with a strict setting, and one that implements no known hook."""
    for slug, code in {
        "t_import": "raise RuntimeError('no such device')",
        "t_exit": "import sys; sys.exit(0)",
        "t_hook": "from plugmesh.hookspecs import hookimpl\n@hookimpl\ndef register_sheduler(context): return []\n",
        "t_set": "from plugmesh.config import StrictModel\nclass Settings(StrictModel):\n    weight: int = 1\n",
    }.items():
        folder = tmp_path / "plugins" / f"plugmesh_{slug}"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "plugin.py").write_text(code)
        (folder / "plugin.toml").write_text(CARD.format(slug=slug))
    return tmp_path


def start(folder: pathlib.Path, text: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    (folder / "mesh.toml").write_text(text)
    roots = [str(folder / "plugins"), *(str(ROOT / d) for d in ("shared", "services", "plugins"))]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PLUGMESH_", "XDG_"))}
    env |= {"PYTHONPATH": os.pathsep.join(roots), "XDG_RUNTIME_DIR": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def left_running(folder: pathlib.Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(folder):
            found.append(" ".join(process.info["cmdline"] or ()))
    return found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[services.decode]\n# why not\nplugins = [\n  "t_set",\n  "t_import",\n]\n', "mesh.toml:5: [services.decode] plugins: plugin 't_import' failed to import: RuntimeError: no such device"),
        pytest.param('[services.decode]\nplugins = ["t_exit"]\n', "mesh.toml:2: [services.decode] plugins: plugin 't_exit' failed to import: SystemExit: 0", marks=pytest.mark.slow, id="exits"),
        pytest.param('[services.decode]\nplugins = ["t_hook"]\n', "mesh.toml:2: [services.decode] plugins: plugin 't_hook'", marks=pytest.mark.slow, id="unknown hook"),
        ('[services.decode]\nplugins = ["t_set"]\n\n[plugins.t_set]\n# heavy\nweight = "much"\n', "mesh.toml:6: plugins.t_set.weight"),
        pytest.param('[services.decode]\nplugins = ["no_such"]\n', "mesh.toml:2: [services.decode] plugins: there is no plugin 'no_such'; installed: ", marks=pytest.mark.slow, id="unknown"),
    ],
)  # fmt: skip
def test_a_service_says_what_is_wrong_in_which_line(bad: pathlib.Path, text: str, message: str) -> None:
    done = start(bad, text, "-m", "plugmesh_decode")
    complaint = [line for line in done.stderr.splitlines() if line.startswith("plugmesh decode: ")]

    assert done.returncode == 2, done.stderr
    assert len(complaint) == 1 and message in complaint[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert left_running(bad) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('[services.decode]\nplugins = ["sarathi", "sarathi"]\n', "mesh.toml:2: [services.decode] plugins: plugin 'sarathi' is named twice", marks=pytest.mark.slow, id="twice"),
        ('[services.gateway]\nplugins = [\n  "splitwise",\n  "ngram_draft"]\n', "mesh.toml:4: [services.gateway] plugins: plugin 'ngram_draft' is for decode"),
        pytest.param("[services.decode]\n\n\n[plugins.sarathi]\ntoken_budget = 3\n", "mesh.toml:4: [plugins.sarathi] configures a plugin that no service loads", marks=pytest.mark.slow, id="nobody's"),
        pytest.param("[services.decode]\ndtyp = 'x'\n", "mesh.toml:2: unknown key 'services.decode.dtyp'; did you mean 'dtype'?", marks=pytest.mark.slow, id="key"),
    ],
)  # fmt: skip
def test_a_mesh_says_what_is_wrong_before_anything_is_started(bad: pathlib.Path, text: str, message: str) -> None:
    done = start(bad, text, "-m", "plugmesh.cli", "up", "--port", "0", "--plain")

    assert done.returncode == 2, done.stderr
    assert f"error: {message}" in done.stderr
    assert "starting" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.nats
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_mesh_whose_service_cannot_import_a_plugin_is_stopped_again(bad: pathlib.Path) -> None:
    done = start(bad, '[services.decode]\nplugins = ["t_import"]\n', "-m", "plugmesh.cli", "up", "--port", "0", "--plain", timeout=110)

    assert done.returncode == 2, done.stderr
    assert "error: decode: mesh.toml:2: [services.decode] plugins: plugin 't_import' failed to import: RuntimeError: no such device" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_running(bad) == []
