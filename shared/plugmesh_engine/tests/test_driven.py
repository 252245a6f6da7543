"""The engine on its driver's thread gives what its own loop gives, to callers that come while steps run."""

from __future__ import annotations

import asyncio
import time

import pytest

from plugmesh.errors import ContextLengthExceeded
from plugmesh_engine import Engine, EngineConfig
from plugmesh_engine.bench import run_closed_loop
from plugmesh_engine.driven import run_driven
from plugmesh_engine.testing import tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("tiny"))
    return Engine(model, EngineConfig(executor="torch", dtype="float32", num_blocks=64, num_threads=1))


def calls(*lengths: tuple[int, int]) -> list[dict]:
    return [{"prompt": [3 + (i + n) % 200 for i in range(n)], "max_tokens": out} for n, out in lengths]


def test_the_same_requests_give_the_same_tokens_as_in_the_engines_own_loop(engine):
    work = [calls((5, 4)), calls((17, 1)), calls((9, 12)), calls((5, 3), (14, 6))]
    expected = run_closed_loop(engine, work, 2, want_tokens=True)
    actual = asyncio.run(run_driven(engine, work, 2, want_tokens=True))

    assert sorted(expected["tokens"]) == sorted(actual["tokens"])
    assert all(r["num_out"] == r["asked_out"] == len(r["times_s"]) and not r["error"] for r in actual["records"])
    assert all(r["sent_s"] < r["times_s"][0] <= r["times_s"][-1] for r in actual["records"])
    assert "tokens" not in asyncio.run(run_driven(engine, work, 2))
    assert 0 == engine.stats().kv_blocks_used


def test_a_request_that_comes_during_a_step_waits_for_its_end(engine):
    """Its first token is at least a whole step after the end of the one it met; in the engine's own loop pauses mean nothing."""
    (short,) = calls((6, 4))
    work = [calls((5, 24)), [short | {"pause_s": 0.08}, short | {"pause_s": 0.08}]]
    step = engine.step

    def slow_step():
        time.sleep(0.05)
        return step()

    engine.step = slow_step
    try:
        driven = asyncio.run(run_driven(engine, work, 2))
    finally:
        del engine.step
    records = sorted((r for r in driven["records"] if r["asked_out"] == 4), key=lambda r: r["sent_s"])

    assert len(records) == 2
    assert records[1]["sent_s"] - records[0]["times_s"][-1] >= 0.08
    assert all(r["times_s"][0] - r["sent_s"] > 0.05 for r in records)


def test_a_refused_request_leaves_nothing_behind(engine):
    with pytest.raises(ContextLengthExceeded):
        asyncio.run(run_driven(engine, [calls((5, 8)), calls((100_000, 4))], 2))
    assert not engine.has_work()
    assert 0 == engine.stats().kv_blocks_used
