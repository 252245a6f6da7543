"""Figures from rounds, goals, and what a terminal and a page show of them."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from plugmesh.bench.structured import jump, overhead, report
from plugmesh.bench.structured.rows import grids
from plugmesh.bench.structured.scoring import CaseResult, Judgement, plain
from plugmesh.bench.structured.table import page, print_report
from plugmesh.cli.app import app


def figures(tpot_ms: float, **more: Any) -> dict[str, Any]:
    return {"tpot_ms": {"mean": tpot_ms}, "num_failed": 0, "num_inexact": 0, "errors": [], **more}


def test_an_increase_is_the_median_over_rounds_of_the_ratio_within_a_round() -> None:
    runs = {"m": {"free": {0: figures(10), 1: figures(20), 2: figures(30)}, "x": {0: figures(10.1), 1: figures(20.4), 2: figures(33)}}}
    (line,) = overhead.lines_of(runs)

    assert math.isclose(line["increase_percent"]["median"], 2.0) and line["holds"]
    assert math.isclose(line["increase_percent"]["high"], 10.0)
    assert line["interval_percent"] is None and line["median_between"] is None  # of three rounds nothing is certain
    assert (20, 20.4) == (line["free_ms"]["median"], line["constrained_ms"]["median"])


def test_the_interval_between_two_tokens_is_compared_too() -> None:
    runs = {"m": {"free": {i: figures(10, itl_ms={"p50": 8}) for i in range(6)}, "x": {i: figures(11, itl_ms={"p50": 8 + i / 100}) for i in range(6)}}}
    (line,) = overhead.lines_of(runs)

    assert not line["holds"] and math.isclose(line["interval_percent"]["median"], 0.3125)
    assert line["interval_between"] == (0.0, line["interval_percent"]["high"])


def test_a_run_of_another_length_is_in_no_line() -> None:
    runs = {"m": {"free": {0: figures(10), 1: figures(10)}, "x": {0: figures(20, num_inexact=1), 1: figures(10.5)}}}
    (line,) = overhead.lines_of(runs)

    assert 1 == line["increase_percent"]["num"] and not line["holds"]
    assert math.isclose(line["increase_percent"]["median"], 5.0)
    assert [] == overhead.lines_of({"m": {"x": {0: figures(1)}}})
    assert ["m, x, round 1"] == [f["where"] for f in overhead.left_out(runs)]


def jumped(wall_s: float, steps: int, texts: list[str]) -> dict[str, Any]:
    return {"wall_s": wall_s, "num_steps": steps, "num_tokens": 100, "num_jumped": 7, "num_whole": 2, "texts": texts}


def test_a_jump_is_compared_by_time_passes_and_texts() -> None:
    (line,) = jump.lines_of({"m": {"off": {0: jumped(2, 90, ["a", "b"]), 1: jumped(3, 90, [])}, "on": {0: jumped(1, 40, ["b", "c"]), 1: jumped(1, 40, [])}}})

    assert (2.5, 2, 3) == (line["gain"]["median"], line["gain"]["low"], line["gain"]["high"])
    assert (90, 40, 1, 2, 7) == (line["steps_off"], line["steps_on"], line["num_same"], line["num_answers"], line["num_jumped"])
    assert (41.66666666666667, 100) == (line["tok_s_off"], line["tok_s_on"])


def test_the_schemas_that_fix_lengths_cannot_end_within_a_run_and_the_fixed_keys_are_fixed() -> None:
    assert all(s["minItems"] * 2 >= 128 for s in overhead.SCHEMAS.values())  # an item is at least one token and a comma
    record = jump.fixed_keys_schema()["properties"]["first_shipment"]
    assert record["required"] == list(record["properties"]) and not record["additionalProperties"]
    assert overhead.prompts_of(1, 32) == overhead.prompts_of(1, 32) != overhead.prompts_of(2, 32)


@pytest.fixture
def full() -> dict[str, Any]:
    times = {"num": 3, "p50": 1.5, "p90": 2, "p99": 3, "max": 4}
    good = CaseResult("a-0", ("enum",), engine="xgrammar", example_accepted=True, judgements=(Judgement("valid"), Judgement("cut")))
    bad = CaseResult("b-0", ("not|x",), code="unsupported_grammar", keyword="not", gateway_refused=False)
    suite = {
        "engines": ["xgrammar", "llguidance"], **plain([good, bad]), "num_outputs": 2, "num_output_tokens": 9, "compile_ms": times, "first_call_ms": times,
        "cached_call_ms": None, "unchecked_formats": ["regex"], "failures": [],
    }  # fmt: skip
    side = {"num": 5, "json": 1.0, "json_leniently": 1.0, "valid": 0.8, "right_fields": 0.5, "cut": 0.0, "failed": 0, "num_tokens": 9, "errors": []}
    lines = overhead.lines_of({"records": {"free": {0: figures(10)}, "xgrammar": {0: figures(10.2)}}})
    micro = {"accepted": 1, "refused": 1, "tokens": 9, "free_masks": 0, "forced": 2, "examples_left": 0, "compile_ms": times, "load_ms": None, "fill_us": times,
             "accept_us": times, "forced_us": times, "matcher_us": times, "bytes": times}  # fmt: skip
    parts = {
        "suite": {"xgrammar+llguidance": suite, "llguidance": {"error": "no such library"}}, "extraction": {"sides": {"asked": {**side, "json": 0.4}, "mode": side, "strict": side}},
        "overhead": {"lines": lines, "failures": [{"where": "records, llguidance", "reason": "gone"}]},
        "times": {"engines": {"xgrammar": micro}, "lower_ms": times},
        "jump": {"lines": jump.lines_of({"m": {"off": {0: jumped(2, 90, ["a"])}, "on": {0: jumped(1, 40, ["a"])}}}), "failures": []},
    }  # fmt: skip
    machine = {"cpu": "A CPU", "cores": 2, "features": ["avx2"], "load_before": 0.5}
    return {"parts": parts, "goals": report.goals(parts), "machine": machine, "model": "m", "finished": "2026-11-23T00:00:00", "command": "plugmesh bench structured",
            "num_rounds": 5, "is_quick": False, "failures": [{"part": "mesh-overhead", "reason": "no mesh"}]}  # fmt: skip


def test_goals_hold_only_when_everything_that_was_generated_validates(full: dict[str, Any]) -> None:
    found = {g["name"]: g["holds"] for g in full["goals"]}

    assert found["xgrammar+llguidance: finished outputs that validate"] and found["extraction with strict: valid JSON"]
    assert found["xgrammar, records: time per token"] and found["jump-forward, m: passes"]
    for verdict in ("invalid", "broken", "failed"):
        one = CaseResult("a-0", (), engine="x", judgements=(Judgement("valid"), Judgement(verdict)))  # type: ignore[arg-type]
        assert not report.goals({"suite": {"x": plain([one])}})[0]["holds"]
    nothing = CaseResult("a-0", (), engine="x", judgements=(Judgement("cut"),))
    assert not report.goals({"suite": {"x": plain([nothing])}})[0]["holds"]


def test_every_table_is_shown_with_its_notes_on_a_terminal_and_on_a_page(full: dict[str, Any]) -> None:
    shown = grids(full)
    stream = io.StringIO()
    print_report(Console(file=stream, width=240), full)
    text, written = stream.getvalue(), page(full)

    assert all(len(row) == len(grid.head) for grid in shown for row in grid.rows)
    for expected in ("unsupported_grammar: not (1)", "the gateway did not answer 400", "llguidance: not measured: no such library", "records, llguidance", "40.0%", "no mesh", "regex"):
        assert expected in text and expected in written
    assert r"not\|x" in written


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--engine", "other"], ["--write", "--quick"]])
def test_wrong_options_are_refused_before_anything_starts(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "structured", *arguments])

    assert result.exit_code != 0
    assert result.exception is not None and arguments[0] in str(result.exception)


def test_a_median_is_as_certain_as_its_order_statistics() -> None:
    """The coverage of the interval over draws whose median is known, and its shape."""
    import random

    from plugmesh.bench.metrics import median_interval

    assert median_interval([1.0] * 5) is None and median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert median_interval(range(20)) == (5, 14)
    rng = random.Random(1)
    hits = sum(low <= 0.0 <= high for low, high in (median_interval([rng.gauss(0, 1) ** 3 for _ in range(25)]) or (1, 1) for _ in range(2000)))
    assert 0.94 < hits / 2000 < 0.985
