"""Real plugins in a real mesh: switched on by configuration, removed by deleting their folder."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import openai
import pytest

from plugmesh import cards, models
from plugmesh.testing.cluster import running

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.nats
@pytest.mark.model
@pytest.mark.timeout(240)
@pytest.mark.skipif(models.find("smollm2") is None, reason="plugmesh pull smollm2 fetches the model")
def test_sarathi_and_splitwise_serve_the_same_greedy_tokens_as_the_core(tmp_path):
    plain = {"dtype": "float32", "num_kv_blocks": 256, "num_threads": 1}
    on = {
        "services": {
            "gateway": {"plugins": ["splitwise"]},
            "decode": {**plain, "plugins": ["sarathi"]},
            "prefill": {**plain, "plugins": ["splitwise"]},
        },
        "plugins": {"sarathi": {"token_budget": 24}, "splitwise": {"overlap_min_tokens": 64}},
    }
    prompts = ["The capital of France is", " ".join(f"item {i}," for i in range(60)), "One two three"]
    answers = {}
    for name, config in {"on": on, "off": {"services": {"decode": plain, "prefill": plain}}}.items():
        (tmp_path / name).mkdir()
        with running(tmp_path / name, config) as mesh:
            with openai.OpenAI(base_url=mesh.base_url, api_key="none", max_retries=0, timeout=60) as client:
                answers[name] = [
                    client.completions.create(model="smollm2", prompt=p, max_tokens=16, temperature=0).choices[0].text for p in prompts
                ]
            table = {i["role"]: i for i in mesh.instances()}
            loaded = {role: set(i["plugins"]) for role, i in table.items() if i["plugins"]}
            remote = mesh.metric(table["decode"], "plugmesh_decode_prefills_total", mode="remote")
            assert (3 if name == "on" else 0) == remote  # splitwise sends every prompt to the prefill pool
            named = {"gateway": {"splitwise"}, "decode": {"sarathi"}, "prefill": {"splitwise"}} if name == "on" else {}
            engines = set(cards.DEFAULT_ENGINES)  # in grammar and decode without being named
            assert named == {role: slugs - engines for role, slugs in loaded.items() if slugs - engines}

    assert answers["off"] == answers["on"]


@pytest.mark.parametrize("slug", sorted(cards.installed()))
def test_nothing_outside_a_plugins_folder_imports_it(slug):
    """So deleting the folder breaks nothing but the scenarios that switch it on."""
    package = cards.package_of(slug)
    importers = []
    for folder in ("shared", "services", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            if package in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                importers += [str(path) for n in names if n.split(".")[0] == package]

    assert [] == importers


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('[services.decode]\nplugins = ["no_such"]', "no_such"),
        ('[services.decode]\nplugins = ["splitwise"]', "not for decode"),
        ('[services.decode]\nplugins = ["sarathi"]\n[plugins.sarathi]\ntoken_budgett = 3', "token_budget"),
        ("[plugins.splitwise]\noverlap_min_tokens = 3", "no service loads"),
        ("[services.decode]\ndtyp = 'float32'", "dtype"),
    ],
)
def test_a_mesh_with_a_wrong_plugin_or_setting_does_not_start_and_says_why(tmp_path, config, message):
    (tmp_path / "mesh.toml").write_text(config)
    out = subprocess.run(
        [sys.executable, "-m", "plugmesh.cli", "up", "--config", str(tmp_path / "mesh.toml"), "--port", "0"],
        capture_output=True, timeout=100, cwd=tmp_path, check=False,
    )  # fmt: skip
    text = out.stdout.decode() + out.stderr.decode()

    assert 2 == out.returncode, text
    assert message in text
    assert "Traceback" not in text
