"""The closed loop around the engine gives exact lengths, keeps its streams, and its process speaks its protocol."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from plugmesh import models
from plugmesh_engine import Engine, EngineConfig
from plugmesh_engine.bench import run_closed_loop
from plugmesh_engine.testing import tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("tiny"))
    return Engine(model, EngineConfig(executor="torch", dtype="float32", num_blocks=64, num_threads=1))


def calls(*lengths: tuple[int, int]) -> list[dict]:
    return [{"prompt": [3 + (i + n) % 200 for i in range(n)], "max_tokens": out} for n, out in lengths]


def test_every_request_has_the_length_asked_for(engine):
    done = run_closed_loop(engine, [calls((5, 4)), calls((17, 1)), calls((9, 12)), calls((5, 3), (14, 6))], 2)

    assert [(5, 3), (5, 4), (9, 12), (14, 6), (17, 1)] == sorted((r["num_prompt"], r["num_out"]) for r in done["records"])
    assert all(r["num_out"] == r["asked_out"] == len(r["times_s"]) and not r["error"] for r in done["records"])
    assert all(r["sent_s"] < r["times_s"][0] <= r["times_s"][-1] for r in done["records"])
    assert 0 == engine.stats().kv_blocks_used


def test_tokens_come_when_asked_for(engine):
    prompt = calls((9, 6))
    done = run_closed_loop(engine, [prompt, prompt], 1, want_tokens=True)

    assert [6, 6] == [len(t) for t in done["tokens"]]
    assert done["tokens"][0] == done["tokens"][1]
    assert "tokens" not in run_closed_loop(engine, [prompt], 1)


@pytest.mark.parametrize("streams", [1, 3])
def test_there_are_never_more_requests_at_once_than_streams(engine, streams):
    done = run_closed_loop(engine, [calls((6, 5)) for _ in range(7)], streams)
    changes = sorted([(r["sent_s"], 1) for r in done["records"]] + [(r["times_s"][-1], -1) for r in done["records"]])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)

    assert streams == most


def test_a_refused_request_leaves_nothing_behind(engine):
    from plugmesh.errors import ContextLengthExceeded

    with pytest.raises(ContextLengthExceeded):
        run_closed_loop(engine, [calls((5, 50)), calls((600, 1))], 2)

    assert not engine.has_work()
    assert 0 == engine.stats().kv_blocks_used


@pytest.mark.slow
@pytest.mark.model
def test_the_process_loads_the_default_model_and_answers_line_by_line(tmp_path):
    ask = {"conversations": [calls((5, 3)), calls((7, 2))], "streams": 2}
    too_long = {"conversations": [calls((9000, 3))], "streams": 1}
    root = pathlib.Path(__file__).resolve().parents[3]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / d) for d in ("shared", "services", "plugins"))}
    out = subprocess.run(
        [sys.executable, "-m", "plugmesh_engine.bench", "--model", str(models.find("smollm2")), "--store", str(tmp_path / "store"), "--num-blocks", "64", "--threads", "1"],
        input="".join(json.dumps(x) + "\n" for x in (ask, too_long, ask)), capture_output=True, text=True, timeout=110, env=env, check=True,
    )  # fmt: skip
    ready, first, refused, again = (json.loads(line) for line in out.stdout.splitlines())

    assert ready["ready"]["weight_bytes"] > 50e6
    assert [3, 2] == [r["asked_out"] for r in sorted(first["records"], key=lambda r: r["num_prompt"])]
    assert "error" in refused
    assert 2 == len(again["records"])
