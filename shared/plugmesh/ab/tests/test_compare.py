"""A whole comparison on the default model, with a plugin of the test's own."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import pytest
from typer.testing import CliRunner

from plugmesh import models
from plugmesh.ab.compare import Options, run
from plugmesh.ab.sides import subject_of
from plugmesh.bench.systems import Setting
from plugmesh.cli.app import app

ROOT = pathlib.Path(__file__).resolve().parents[4]
CARD = """
slug = "{slug}"
version = "0.1"
summary = "made by a test"
services = ["decode", "tools"]
hooks = ["register_quality_metrics"]
fidelity = "exact"
[ab.services.decode]
{services}
"""
PLUGIN = '''
import numpy as np
from plugmesh.hookspecs import hookimpl
from plugmesh.records import Observation, QualityDelta, QualityMetricRecord

def observe(subject):
    if {raises}:
        raise RuntimeError("no such thing")
    tokens = subject.generate([subject.encode("Once upon a time")], 5)[0]
    return Observation({"length": len(subject.decode(tokens))}, {"tokens": np.array(tokens)})

def compare(a, b):
    same = float((a.arrays["tokens"] == b.arrays["tokens"]).mean())
    return [QualityDelta("same_story", same, same, same, "higher")]

@hookimpl
def register_quality_metrics(context):
    return [QualityMetricRecord("story", "the same story", frozenset({"tokens"}), observe, compare)]
'''


@pytest.fixture
def make_plugin(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Importable here and in the sides' processes."""
    made = []

    def make(slug: str, *, services: str = "", raises: bool = False) -> str:
        folder = tmp_path / "path" / f"plugmesh_{slug}"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "plugin.py").write_text(PLUGIN.replace("{raises}", str(raises)))
        (folder / "plugin.toml").write_text(CARD.format(slug=slug, services=services))
        made.append(f"plugmesh_{slug}")
        return slug

    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    ours = [str(ROOT / d) for d in ("shared", "services", "plugins")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), *ours]))
    yield make
    for name in list(sys.modules):
        if name.split(".")[0] in made:
            del sys.modules[name]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    model = models.find("smollm2")
    assert model is not None, "plugmesh pull smollm2"
    return Setting(model, tmp_path_factory.mktemp("ab"), threads=1)


@pytest.mark.model
@pytest.mark.slow
def test_a_plugin_that_changes_output_though_its_card_says_exact_is_found_out_and_its_metric_is_measured(make_plugin, setting: Setting) -> None:
    """The card switches the KV to int8, which changes logits but seldom the likeliest token; seeded samples show it."""
    slug = make_plugin("liar", services='kv_dtype = "int8"')
    options = Options(is_quick=False, parts=("quality",), tiers=("engine",), metrics=("story",), reference=False)
    told = run(subject_of([slug]), setting, options)

    assert told["failures"] == []
    assert told["facts"]["with"]["kv_bytes_per_token"] < told["facts"]["without"]["kv_bytes_per_token"]
    assert [d["name"] for q in told["quality"] for d in q["deltas"]] == ["same_story"]
    assert told["fidelity"]["engine"]["shares"]["seeded"] < 1
    assert not told["holds"]


@pytest.mark.model
def test_a_metric_that_raises_is_reported_and_the_others_are_measured(make_plugin, setting: Setting) -> None:
    slug = make_plugin("broken", raises=True)
    options = Options(is_quick=True, parts=("quality", "memory"), tiers=("engine",), metrics=("story", "greedy"), reference=False)
    told = run(subject_of([slug]), setting, options)

    assert [(f["where"], f["side"], f["reason"]) for f in told["failures"]] == [(("story"), s, "the engine refuses: RuntimeError: no such thing") for s in ("without", "with")]
    assert [q["metric"] for q in told["quality"]] == ["greedy"]
    assert told["holds"]
    assert told["memory"]["ratios"]["pss"] > 0.5


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_command_measures_in_a_process_and_through_a_mesh_and_writes_everything(tmp_path: pathlib.Path) -> None:
    json_file, html_file = tmp_path / "ab.json", tmp_path / "ab.html"
    done = CliRunner().invoke(app, ["ab", "ngram_draft", "--quick", "--threads", "1", "--json", str(json_file), "--html", str(html_file)])
    told = json.loads(json_file.read_text())

    assert done.exit_code == 0, done.output
    assert told["failures"] == []
    assert {r["tier"] for r in told["speed"]} == {"engine", "served"}
    assert set(told["fidelity"]) == {"engine", "served"}
    assert all(v["shares"] == {"greedy": 1.0, "seeded": 1.0} for v in told["fidelity"].values())
    assert "reference" in told["quality"][0]["figures"]
    assert set(told["served_memory"]) == {"without", "with"}
    assert "<svg" in html_file.read_text()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_pairs_are_tried_in_a_process_or_in_a_mesh_and_conflicts_are_told(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "pairs.json"
    done = CliRunner().invoke(app, ["ab", "--pairs", "ngram_draft", "sarathi", "splitwise", "--quick", "--threads", "1", "--json", str(file)])
    pairs = {(p["a"], p["b"]): p for p in json.loads(file.read_text())["pairs"]}

    assert done.exit_code == 0, done.output
    assert {k: (p["state"], p["tier"]) for k, p in pairs.items()} == {
        ("ngram_draft", "sarathi"): ("same", "engine"), ("ngram_draft", "splitwise"): ("same", "served"), ("sarathi", "splitwise"): ("same", "served"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the plugins"), (["sarathi", "--with", "a,b"], "name the plugins"), (["sarathi", "--only", "taste"], "there are speed, memory, quality"),
        (["sarathi", "--quick", "--write"], "--write keeps full runs"), (["sarathi", "--tier", "moon"], "there are engine, served"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused_before_anything_starts(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["ab", *arguments])

    assert done.exit_code != 0
    assert message in str(done.exception)
