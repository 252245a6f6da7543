"""The whole of `plugmesh bench structured --quick` on the real model."""

from __future__ import annotations

import json
import pathlib

import pytest
from typer.testing import CliRunner

from plugmesh.bench.structured.report import PARTS
from plugmesh.cli.app import app

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_part_runs_and_nothing_that_was_generated_is_wrong(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "structured.json"
    result = CliRunner().invoke(app, ["bench", "structured", "--quick", "--json", str(file)])
    report = json.loads(file.read_text())

    assert 0 == result.exit_code, result.output[-3000:]
    assert set(PARTS) == set(report["parts"]) and report["failures"] == []
    for suite in report["parts"]["suite"].values():
        total = suite["total"]
        assert total["num_accepted"] > 0 and total["valid"] + total["cut"] == suite["num_outputs"] > 0
        assert suite["failures"] == [] and suite["compile_ms"]["num"] == total["num_accepted"]
    assert 1.0 == report["parts"]["extraction"]["sides"]["strict"]["json"] or report["parts"]["extraction"]["sides"]["strict"]["cut"] > 0
    for part in ("overhead", "mesh-overhead"):
        assert {"xgrammar", "llguidance"} == {line["engine"] for line in report["parts"][part]["lines"]}
    for times in report["parts"]["times"]["engines"].values():
        assert times["accepted"] > 0 and times["fill_us"]["num"] > 0 and times["examples_left"] == 0
    assert all(line["num_same"] <= line["num_answers"] and line["steps_on"] < line["steps_off"] for line in report["parts"]["jump"]["lines"])
