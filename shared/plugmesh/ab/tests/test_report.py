"""Figures of the report, and how they are shown."""

from __future__ import annotations

import json
import math
import pathlib
import re

import numpy as np
import pytest
from rich.console import Console

from plugmesh import cards
from plugmesh.ab import leaderboard, report
from plugmesh.ab.compare import Findings, Options
from plugmesh.ab.page import page
from plugmesh.ab.sides import Subject
from plugmesh.ab.table import print_report, verdict
from plugmesh.ab.workloads import CoreWorkloads
from plugmesh.quality.core import CoreQualityMetrics
from plugmesh.records import Observation

ROOT = pathlib.Path(__file__).resolve().parents[4]
MACHINE = {"cpu": "a <cpu>", "cores": 2, "features": ["avx2"], "memory_bytes": 8e9, "python": "3.11", "system": "Linux", "load_before": 0.5}
LOSS = {"metric": "perplexity_ratio", "bound": 1.05, "setting": "default"}


def card(**more: object) -> cards.Card:
    base = {"slug": "mine", "version": "1.2", "summary": "does <this>", "services": ("decode",), "hooks": (), "fidelity": "exact"}
    return cards.Card.model_validate({**base, **more})


def run(**figures: float) -> dict[str, object]:
    return {"num_failed": 0, "num_inexact": 0, **figures}


def findings(*, nll: float = 2.0, greedy: list[list[int]] | None = None) -> Findings:
    """Three rounds in which the plugin halves the time to the first token and doubles the rate, on a machine that gets slower."""
    slow = [1.0, 2.0, 4.0]
    served = {
        side: [{"round": i, **run(output_tok_s=rate / s), "ttft_ms": {"p50": ttft * s}, "tpot_ms": {"p50": 10.0 * s}} for i, s in enumerate(slow)]
        for side, rate, ttft in (("without", 100.0, 40.0), ("with", 200.0, 20.0))
    }
    found = Findings()
    found.speed["served"] = {
        "measures": {"served_16": {"runs": served}}, "memory": {s: {"decode": {"rss": 2e6, "pss": 1e6}} for s in ("without", "with")},
    }  # fmt: skip
    for side, size in (("without", 100.0), ("with", 25.0)):
        found.facts[side] = {"weight_bytes": size, "stored_weight_bytes": size, "kv_bytes_per_token": 23040.0}
        found.memory[side] = {"rss": 200, "pss": 100}
    texts = np.random.default_rng(0).normal(2, 0.1, (2, 128))
    found.observed["perplexity"] = {
        side: Observation({"perplexity": float(np.exp((texts + more).mean()))}, {"nll": texts + more}) for side, more in (("without", 0.0), ("with", nll - 2), ("reference", 0.0))
    }
    found.outputs["engine"] = {"without": {"greedy": [[1, 2]]}, "with": {"greedy": greedy or [[1, 2]]}}
    return found


def build(found: Findings, **card_fields: object) -> dict[str, object]:
    options = Options(num_rounds=3)
    return report.build(Subject((card(**card_fields),)), options, MACHINE, CoreQualityMetrics().register_quality_metrics(), CoreWorkloads().register_workloads(), found)


def test_a_gain_above_one_is_better_for_rates_and_for_times() -> None:
    rows = {r["figure"]: r for r in build(findings())["speed"]}

    assert rows["output_tok_s"]["gain"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert rows["ttft_ms.p50"]["gain"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert rows["tpot_ms.p50"]["gain"]["value"] == 1.0
    assert [f for f, r in rows.items() if r["is_main"]] == ["output_tok_s"]


def test_rounds_with_failures_or_other_lengths_are_no_comparison() -> None:
    found = findings()
    found.speed["served"]["measures"]["served_16"]["runs"]["with"][0]["num_failed"] = 1

    assert len(build(found)["speed"][0]["rounds"]["with"]) == 2


def test_memory_is_compared_as_with_over_without() -> None:
    assert build(findings())["memory"]["ratios"] == {"weight_bytes": 0.25, "stored_weight_bytes": 0.25, "kv_bytes_per_token": 1.0, "rss": 1.0, "pss": 1.0}


def test_quality_is_compared_between_the_sides_and_with_the_reference() -> None:
    (quality,) = build(findings(nll=2.1))["quality"]

    assert quality["deltas"][0]["value"] == pytest.approx(math.exp(0.1))
    assert quality["against_reference"]["with"][0]["value"] == pytest.approx(math.exp(0.1))
    assert quality["against_reference"]["without"][0]["value"] == pytest.approx(1.0)


def test_an_exact_plugin_whose_output_differs_does_not_hold() -> None:
    assert build(findings())["holds"]
    assert not build(findings(greedy=[[1, 3]]))["holds"]


@pytest.mark.parametrize(("nll", "holds"), [(2.04, True), (2.06, False)])
def test_the_bound_of_a_lossy_card_is_held_against_what_was_measured(nll: float, holds: bool) -> None:
    found = build(findings(nll=nll, greedy=[[1, 3]]), fidelity="lossy", loss=LOSS)

    assert [p["holds"] for p in found["promises"]] == [holds]
    assert found["holds"] == holds


def test_a_metric_that_cannot_compare_is_a_failure_and_the_rest_is_told() -> None:
    found = findings()
    found.observed["perplexity"]["with"] = Observation({"perplexity": 1.0}, {})
    told = build(found)

    assert {f["where"] for f in told["failures"]} == {"perplexity"}
    assert told["speed"]


@pytest.mark.parametrize(
    ("interval", "expected"), [((1.2, 1.1, 1.3), "good"), ((1.2, 0.9, 1.3), "same"), ((0.8, 0.7, 0.9), "bad"), ((1.0, 1.0, 1.0), "same")]
)
def test_a_difference_is_one_when_its_interval_leaves_none_out(interval, expected: str) -> None:
    assert verdict(*interval, neutral=1.0, better="higher") == expected


def shown(told) -> str:
    console = Console(record=True, width=180, file=None, quiet=False)
    with console.capture() as captured:
        print_report(console, told)
    return captured.get()


def test_the_table_shows_every_part() -> None:
    text = shown(build(findings(nll=2.1)))

    assert all(word in text for word in ("a <cpu>", "output tok/s", "2 ", "0.25", "perplexity_ratio", "1.105"))
    assert "the card says exact, but greedy output 1 of 1 differs" in shown(build(findings(greedy=[[1, 3]])))


def test_the_page_shows_every_part_and_escapes_what_comes_from_cards() -> None:
    html = page(build(findings(nll=2.1)))

    assert "does &lt;this&gt;" in html
    assert "<this>" not in html
    assert html.count("<svg") >= 8
    assert all(word in html for word in ("Speed", "Memory", "Quality", "perplexity_ratio"))


def test_the_leaderboard_has_a_row_per_plugin_with_what_was_measured() -> None:
    text = leaderboard.page([build(findings(nll=2.1))])
    (row,) = [line for line in text.splitlines() if line.startswith("| [mine]")]
    cells = dict(zip(leaderboard._COLUMNS, [c.strip() for c in row.strip("|").split("|")], strict=True))

    assert cells["served, 16 streams"] == "2.00× (2.00-2.00)"
    assert (cells["weights"], cells["single stream"], cells["perplexity"]) == ("0.25×", "-", "1.105×")
    assert cells["output"] == "exact"
    assert "**not exact**" in leaderboard.page([build(findings(greedy=[[1, 3]]))])


def test_the_matrix_has_every_pair_twice_and_tells_why() -> None:
    pairs = {
        "finished": "2026-11-23T00:00:00", "plugins": ["a", "b", "c"],
        "pairs": [{"a": "a", "b": "b", "state": "conflict", "reason": "both provide x"}, {"a": "a", "b": "c", "state": "same", "reason": ""}, {"a": "b", "b": "c", "state": "differs", "reason": "y"}],
    }  # fmt: skip
    lines = leaderboard.matrix(pairs).splitlines()

    assert "| a | · | conflict | same output |" in lines
    assert "| b | conflict | · | **differs** |" in lines
    assert "- a and b: both provide x" in lines


def test_what_is_kept_is_json_without_nan_and_without_paths_of_the_machine(tmp_path: pathlib.Path) -> None:
    told = {**build(findings()), "command": "plugmesh ab mine --json /home/somebody/x.json"}
    told["machine"]["load_before"] = math.nan
    path = leaderboard.write_report(told, tmp_path)
    again = leaderboard.read(tmp_path)

    assert "NaN" not in path.read_text()
    assert again is not None
    assert (again["command"], again["machine"]["load_before"]) == ("plugmesh ab mine --json x.json", None)
    assert leaderboard.read(tmp_path / "nowhere") is None
    assert page(json.loads(json.dumps(build(findings()))))


def test_the_leaderboard_in_the_tree_is_what_lies_beside_the_cards() -> None:
    document = ROOT / "docs" / "leaderboard.md"
    rows = {m.group(1): line for line in document.read_text().splitlines() if (m := re.match(r"\| \[([a-z0-9_]+)\]", line))}
    kept = {r["plugins"][0]["slug"]: leaderboard.row(r) for folder in (ROOT / "plugins").glob("plugmesh_*") if (r := leaderboard.read(folder))}

    assert {slug: rows.get(slug) for slug in kept} == kept, "plugmesh ab --write makes it"
